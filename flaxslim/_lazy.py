"""Leaves whose values are read, or cut, only when they are asked for.

So that a tree may be larger than memory: it is found, planned and cut as any other, and the values
of one tensor at a time, or of some rows of it, are in memory.
"""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BLOCK = 2**20  # bytes that are read at once: few enough to stay in the cache until they are written


class Lazy(abc.ABC):
    """A leaf with a shape and a dtype, whose values come when it is turned into an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def blocks(self) -> Iterator[np.ndarray]:
        """The values in order, some rows of the first axis at a time (a scalar: itself).

        Each is valid until the next is asked for, which may take its memory: fresh memory for every
        block would cost more time than to read it.
        """

    @property
    def block_rows(self) -> int:
        """How many of the first axis are a block."""
        return max(1, BLOCK * self.shape[0] // max(self.nbytes, 1)) if self.shape else 1

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self)[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the values are read anew each time, which is a copy")
        values = np.empty(self.shape, self.dtype)
        if not self.ndim:
            values[()] = next(self.blocks())
            return values.astype(dtype or self.dtype)
        at = 0
        for block in self.blocks():
            values[at : at + len(block)] = block
            at += len(block)
        return values if dtype is None else values.astype(dtype, copy=False)


def transposed(leaf: Any, axes: Sequence[int]) -> Any:
    """A leaf with its axes permuted; of a lazy one, later."""
    if not isinstance(leaf, Lazy):
        return leaf.transpose(axes)
    return leaf if [*axes] == [*range(leaf.ndim)] else Transposed(leaf=leaf, axes=tuple(axes))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Transposed(Lazy):
    """A lazy tensor with its axes permuted. While it is read it is in memory as a whole."""

    leaf: Lazy
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(self.leaf.shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.leaf.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        values = np.asarray(self.leaf).transpose(self.axes)
        for start in range(0, len(values), self.block_rows):
            yield np.ascontiguousarray(values[start : start + self.block_rows])
