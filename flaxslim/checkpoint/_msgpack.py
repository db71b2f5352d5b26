"""Flax's msgpack files: tensors found without reading them, written as Flax itself would.

An array is an extension of type 1 that holds (shape, name of the dtype, bytes); one of more than
2^30 bytes is a map of several of these (flax/serialization.py).
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (numpy knows "bfloat16" by name once this is imported)
import numpy as np

from flaxslim.checkpoint import _folder
from flaxslim.checkpoint._leaf import Leaf, Piece, nest
from flaxslim.checkpoint._stored import Stored
from flaxslim.errors import CorruptFileError

_ARRAYS = (1, 3)  # the extension types of an array and of a numpy scalar
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 2**30  # bytes
_PEEK = 2**16  # the name of a tensor, or its shape and dtype, are in fewer bytes


def stored(path: Path) -> dict[str, Any]:
    """The nested dict of tensors in a msgpack file, none of them read.

    Raises `CorruptFileError` if the file is truncated or is something else.
    """
    import msgpack

    _folder.refuse_pointer(path)
    with path.open("rb") as file:
        reader, size, problem = _Reader(file, path), path.stat().st_size, ""
        try:
            tree = _joined(reader.node())
            if reader.at != size:
                problem = f"they end at byte {reader.at}"
            elif not isinstance(tree, dict) or not _is_tree_of_arrays(tree):
                problem = "they are no tree of arrays"
        except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
            tree, problem = {}, str(error) or type(error).__name__
    if problem:
        raise CorruptFileError(
            "not a whole msgpack file of Flax parameters",
            path=str(path),
            seen=f"{size} bytes ({problem})",
            mend="download or copy the file again",
        )
    return tree


class _Reader:
    """Walks through a file from header to header, and steps over the bytes of arrays."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.at = file, path, 0
        self.size = path.stat().st_size

    def node(self) -> Any:
        first = self._bytes(1)[0]
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            return self._map()
        if 0xD4 <= first <= 0xD8 or 0xC7 <= first <= 0xC9:
            return self._array()
        return self._value()

    def _map(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for _ in range(self._small(lambda unpacker: unpacker.read_map_header())):
            key = self._value()
            if not isinstance(key, str) or key in tree:
                raise ValueError(f"a name is {key!r}" + " twice" * (key in tree))
            tree[key] = self.node()
        return tree

    def _array(self) -> Stored:
        kind, length = self._extension()
        end = self.at + length
        shape, name = self._small(
            lambda unpacker: (unpacker.read_array_header(), unpacker.unpack(), unpacker.unpack())
        )[1:]
        dtype = _dtype(name)
        if kind not in _ARRAYS:
            raise ValueError(f"an array in an extension of type {kind}")
        shape, count = _shape(shape), self._sized({0xC4: "B", 0xC5: "H", 0xC6: "I"})
        if count != math.prod(shape) * dtype.itemsize or self.at + count != end:
            raise ValueError(f"{count} bytes of {dtype} {shape}")
        if end > self.size:
            raise ValueError(f"an array ends at byte {end}")
        span, self.at = (self.at, count), end
        return Stored(path=self.path, spans=(span,), shape=shape, dtype=dtype)

    def _extension(self) -> tuple[int, int]:
        first = self._bytes(1)[0]
        if first >= 0xD4:
            self.at += 1
            length = 2 ** (first - 0xD4)
        else:
            length = self._sized({0xC7: "B", 0xC8: "H", 0xC9: "I"})
        kind = struct.unpack("b", self._bytes(1))[0]
        self.at += 1
        return kind, length

    def _sized(self, forms: Mapping[int, str]) -> int:
        """A header of one byte that says how long the number after it is."""
        form = ">" + forms[self._bytes(1)[0]]
        width = struct.calcsize(form)
        (value,) = struct.unpack(form, self._bytes(1 + width)[1:])
        self.at += 1 + width
        return value

    def _value(self) -> Any:
        return self._small(lambda unpacker: unpacker.unpack())

    def _small(self, read: Any) -> Any:
        import msgpack

        # Room is made for what a header says; there is no more than has been read.
        unpacker = msgpack.Unpacker(max_array_len=_PEEK, max_map_len=_PEEK)
        self.file.seek(self.at)
        unpacker.feed(self.file.read(_PEEK))
        value = read(unpacker)
        self.at += unpacker.tell()
        return value

    def _bytes(self, count: int) -> bytes:
        self.file.seek(self.at)
        found = self.file.read(count)
        if len(found) < count:
            raise ValueError(f"it ends at byte {self.size}")
        return found


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list | tuple) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"a shape is {sizes!r}"[:80])
    return tuple(sizes)


def _dtype(name: Any) -> np.dtype:
    import jax.numpy as jnp

    text = name.decode() if isinstance(name, bytes) else name
    if not isinstance(text, str):  # for None numpy has a dtype, too
        raise ValueError(f"a dtype is {name!r}"[:80])
    dtype = np.dtype(text)
    if not dtype.isnative or not (dtype == np.bool_ or jnp.issubdtype(dtype, np.number)):
        raise ValueError(f"an array of {dtype}")
    return dtype


def _joined(node: Any) -> Any:
    """The tree with arrays in place of the maps of their chunks."""
    if not isinstance(node, dict):
        return node
    if _CHUNKED not in node:
        return {key: _joined(child) for key, child in node.items()}
    shape, chunks = ([*dict(node[name]).values()] for name in ("shape", "chunks"))
    if not chunks or not all(isinstance(chunk, Stored) for chunk in chunks):
        raise ValueError("chunks that are no arrays")
    whole = Stored(
        path=chunks[0].path,
        spans=tuple(span for chunk in chunks for span in chunk.spans),
        shape=_shape(shape),
        dtype=chunks[0].dtype,
    )
    if math.prod(whole.shape) * whole.dtype.itemsize != sum(size for _, size in whole.spans):
        raise ValueError(f"chunks that are no array of shape {whole.shape}")
    return whole


def _is_tree_of_arrays(node: Any) -> bool:
    if isinstance(node, dict):
        return all(_is_tree_of_arrays(child) for child in node.values())
    return isinstance(node, Stored)


# --- writing ----------------------------------------------------------------------------------


def pieces(leaves: Mapping[str, Leaf]) -> Iterator[Piece]:
    """What a file of a tree (paths joined by slashes) consists of."""
    import msgpack

    packer: Any = msgpack.Packer()

    def walk(node: Any) -> Iterator[Piece]:
        if isinstance(node, Leaf):
            yield from _array(node, packer)
            return
        yield Piece.of(packer.pack_map_header(len(node)))
        for key, child in node.items():
            yield Piece.of(packer.pack(key))
            yield from walk(child)

    return walk(nest(leaves, "/"))


def _array(leaf: Leaf, packer: Any) -> Iterator[Piece]:
    if leaf.nbytes <= _CHUNK:
        yield Piece.of(_header(leaf.shape, leaf.dtype, leaf.nbytes, packer))
        yield Piece.whole(leaf)
        return
    step = max(1, _CHUNK // leaf.dtype.itemsize) * leaf.dtype.itemsize
    sizes = [min(step, leaf.nbytes - start) for start in range(0, leaf.nbytes, step)]
    names = {str(i): size for i, size in enumerate(leaf.shape)}
    front = packer.pack_map_header(3) + packer.pack(_CHUNKED) + packer.pack(True)
    front += packer.pack("shape") + packer.pack(names)
    yield Piece.of(front + packer.pack("chunks") + packer.pack_map_header(len(sizes)))
    headers = [
        packer.pack(str(i)) + _header((size // leaf.dtype.itemsize,), leaf.dtype, size, packer)
        for i, size in enumerate(sizes)
    ]
    yield Piece.interleaved(leaf, headers, sizes)


def _header(shape: tuple[int, ...], dtype: np.dtype, nbytes: int, packer: Any) -> bytes:
    """What stands before the bytes of an array."""
    inner = b"\x93" + packer.pack(list(shape)) + packer.pack(dtype.name)
    inner += _sized({0xC4: "B", 0xC5: "H", 0xC6: "I"}, nbytes)
    length = len(inner) + nbytes
    if length == 16:  # of the lengths that have a form of their own the only one that occurs
        return b"\xd8\x01" + inner
    return _sized({0xC7: "B", 0xC8: "H", 0xC9: "I"}, length) + b"\x01" + inner


def _sized(forms: Mapping[int, str], value: int) -> bytes:
    """The shortest form that holds a number."""
    for first, form in forms.items():
        if value < 2 ** (8 * struct.calcsize(form)):
            return struct.pack(f">B{form}", first, value)
    raise ValueError(f"{value} bytes are too many for msgpack")
