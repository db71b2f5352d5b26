"""One file written by several threads: each reads, cuts and writes a piece at its own place."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import xxhash

from flaxslim.checkpoint._leaf import Piece

# More keep more tensors in memory, and a disk is no faster for them.
_MOST_THREADS = 8

Progress = Callable[[int], None]  # called with the number of bytes that were written


def pour(path: Path, pieces: Iterable[Piece], progress: Progress) -> str:
    """Write a file; returns its checksum, that of `checksum`.

    Reading, cutting and writing overlap, since numpy and the system let go of the interpreter.
    The memory is that of a block of one piece for each thread.
    """
    pieces = list(pieces)
    ends = list(accumulate(piece.nbytes for piece in pieces))
    stop = threading.Event()
    # The system lets only one write to a file, and the others burn their cores until it is done.
    turn = threading.Lock()

    def put(piece: Piece, end: int) -> bytes:
        hashed, at = xxhash.xxh3_64(), end - piece.nbytes
        with _opened(path) as file:
            file.seek(at)
            for block in piece.bytes():
                if stop.is_set():
                    break
                view = memoryview(block)
                hashed.update(view)
                with turn:
                    while len(view):
                        view = view[file.write(view) :]
                at += len(memoryview(block))
                progress(len(block))
        assert stop.is_set() or at == end, "a piece is of another size than it said"
        return hashed.digest()

    with path.open("wb") as file:
        file.truncate(ends[-1] if ends else 0)
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    try:
        found = list(pool.map(put, pieces, ends))
    finally:
        stop.set()  # also for Ctrl-C: what is under way ends with its block
        pool.shutdown(cancel_futures=True)
    return _together(found)


def _opened(path: Path) -> BinaryIO:
    return path.open("r+b", buffering=0)  # pyright: ignore[reportReturnType]


def checksum(path: Path, pieces: Iterable[Piece]) -> str | None:
    """The checksum of a file in these pieces: XXH3 of each; None if it has another size."""
    pieces = list(pieces)
    if not path.is_file() or path.stat().st_size != sum(piece.nbytes for piece in pieces):
        return None
    found = []
    with path.open("rb", buffering=0) as file:
        for piece in pieces:
            hashed, left = xxhash.xxh3_64(), piece.nbytes
            while left:
                block = file.read(min(left, 2**24))
                if not block:
                    return None
                hashed.update(block)
                left -= len(block)
            found.append(hashed.digest())
    return _together(found)


def _together(digests: list[bytes]) -> str:
    return xxhash.xxh3_64(b"".join(digests)).hexdigest()
