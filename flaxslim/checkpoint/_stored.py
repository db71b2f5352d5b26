"""A tensor in a file: where its bytes are, which are read when they are asked for.

By plain reads and not through a mapped file: pages of a map count as memory in use for as long as
it lives, and a file that shrinks under a map ends the process.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxslim._lazy import Lazy
from flaxslim.errors import CorruptFileError


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored(Lazy):
    """A tensor of a file, little-endian and in C order.

    Attributes:
      spans: where its bytes are, in order: (offset, number of bytes) of each piece.
    """

    path: Path
    spans: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Raises `CorruptFileError` if the file has become shorter since its header was read."""
        length = self.shape[0] if self.shape else 1
        rows = self.block_rows
        at, ends = 0, np.cumsum([size for _, size in self.spans])
        memory = np.empty((min(rows, length), *self.shape[1:]) if self.shape else (), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, length, rows):
                count = min(rows, length - start)
                values = memory[:count] if self.shape else memory
                left = values.reshape(-1).view(np.uint8).data
                while len(left):
                    span = int(np.searchsorted(ends, at, side="right"))
                    offset, size = self.spans[span]
                    file.seek(offset + at - int(ends[span]) + size)
                    got = file.readinto(left[: int(ends[span]) - at])
                    if not got:
                        raise self._shrunk()
                    at, left = at + got, left[got:]
                yield values

    def _shrunk(self) -> CorruptFileError:
        return CorruptFileError(
            "the file has become shorter while it was read",
            path=str(self.path),
            seen=f"{self.path.stat().st_size} bytes",
            expected=f"{max(sum(span) for span in self.spans)} bytes at least",
            mend="let nothing write to the source, and start again",
        )
