"""What reads a file: how a good one is made, how it is broken, and what reads it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from faults.mutate import broken_bytes, broken_json


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`make` fills a new folder, `spoil` breaks something in it, `open` reads it.

    What `open` raises, if anything, is to be a `FlaxslimError`.
    """

    make: Callable[[Path], Any]
    spoil: Callable[[Path, Random], None]
    open: Callable[[Path, Random], Any]


def some(folder: Path, patterns: Sequence[str], random: Random) -> Path:
    found = sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file())
    return random.choice(found)


def by_bytes(*patterns: str) -> Callable[[Path, Random], None]:
    def spoil(folder: Path, random: Random) -> None:
        path = some(folder, patterns, random)
        path.write_bytes(broken_bytes(path.read_bytes(), random))

    return spoil


def by_json(*patterns: str) -> Callable[[Path, Random], None]:
    def spoil(folder: Path, random: Random) -> None:
        path = some(folder, patterns, random)
        path.write_bytes(broken_json(path.read_text(encoding="utf-8"), random))

    return spoil


def _header(folder: Path, random: Random) -> None:
    """A header that says something else; the eight bytes before it may say another length."""
    path = some(folder, ("*.safetensors", "*.jaxexport"), random)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = broken_json(data[8:end].decode(), random)
    length = len(text) if random.random() < 0.9 else random.choice((0, 2**20, 2**40, 2**63))
    path.write_bytes(length.to_bytes(8, "little") + text + data[end:])


def header_or_bytes(folder: Path, random: Random) -> None:
    bytes_ = by_bytes("*.safetensors", "*.jaxexport")
    (_header if random.random() < 0.6 else bytes_)(folder, random)


def text_file(name: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_text(text, encoding="utf-8")

    return make


def by_lines(name: str, between: str, values: Sequence[str]) -> Callable[[Path, Random], None]:
    """Values of lines `key = value` replaced, lines doubled and moved; or bytes changed."""

    def spoil(folder: Path, random: Random) -> None:
        path = folder / name
        lines = path.read_text(encoding="utf-8").split("\n")
        if random.random() < 0.3:
            path.write_bytes(broken_bytes(path.read_bytes(), random))
            return
        for _ in range(random.choice((1, 1, 2, 4))):
            at = random.randrange(len(lines))
            key, found, _ = lines[at].partition(between)
            if random.random() < 0.7 and found:
                lines[at] = f"{key}{between} {random.choice(values)}"
            else:
                lines.insert(at, random.choice((*lines, *values)))
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")

    return spoil
