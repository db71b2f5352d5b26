"""Lazy tensors of TensorStore, cut and written a chunk at a time.

A chunk is what one device held when the checkpoint was saved. What is left of a tensor is written
in as many of them, each of which is read when it is written.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from flaxslim import _bits
from flaxslim._apply import CutLater
from flaxslim._lazy import BLOCK, Lazy
from flaxslim._spec import Tensor
from flaxslim.errors import CorruptFileError

Region = tuple[slice, ...]
_BYTE = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored(Lazy):
    """A tensor of an Orbax checkpoint, read by TensorStore in its chunks."""

    store: Any
    path: str

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of the pieces in which it is stored."""
        return tuple(self.store.chunk_layout.read_chunk.shape or ())

    def region(self, region: Region) -> np.ndarray:
        """The values in a box."""
        try:
            return np.asarray(self.store[region].read().result())
        except (ValueError, OSError) as error:
            raise CorruptFileError(
                "a tensor of the checkpoint cannot be read",
                path=self.path,
                seen=str(error).splitlines()[0],
                mend="copy the checkpoint again",
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.region((slice(None),) * self.ndim)
        return values if dtype is None else values.astype(dtype, copy=False)

    def blocks(self) -> Iterator[np.ndarray]:
        if not self.ndim:
            yield self.region(())
            return
        row = max(self.nbytes // max(self.shape[0], 1), 1)
        step = max(self.chunk[0], BLOCK // row)
        for start in range(0, self.shape[0], step):
            yield self.region((slice(start, min(start + step, self.shape[0])),))


def outline(leaf: Stored, tensor: Tensor, axes: Collection[str]) -> np.ndarray:
    """Ones and zeros in the shape of a kernel: zero where all of it is, but along some axes.

    By this the exact rules judge channels as they do by the kernel, in the memory of one chunk.
    Raises `NonFiniteError` for NaN or infinity.
    """
    dims = tensor.axes.dimensions
    over = tuple(i for i, dim in enumerate(dims) if all(f in axes for f in dim))
    found = np.zeros([1 if i in over else n for i, n in enumerate(leaf.shape)], bool)
    for region in regions(leaf.shape, leaf.chunk):
        values = leaf.region(region)
        own = tuple(slice(None) if i in over else part for i, part in enumerate(region))
        for rows in _slabs(values):
            _bits.check_finite(values[rows], tensor)
            at = found[own] if 0 in over else found[own][rows]
            at |= (values[rows] != 0).any(axis=over, keepdims=True)
    # In one byte each, if it is to be judged at all: as floats of any kind.
    judged = leaf.dtype in _bits.FLOATS
    return np.broadcast_to(found.astype(_BYTE if judged else leaf.dtype), leaf.shape)


def _slabs(values: np.ndarray) -> Iterator[slice]:
    """Rows that are few enough for what is computed of them to need little memory."""
    if values.ndim and values.size:
        step = max(BLOCK * len(values) // values.nbytes, 1)
        yield from (slice(i, i + step) for i in range(0, len(values), step))


def region_of(leaf: Any, region: Region) -> np.ndarray:
    """A box of a leaf, of which no more is read than what the box needs.

    Boxes that cover a tensor have read what goes from it, too: NaN in that raises `NonFiniteError`.
    """
    if isinstance(leaf, Stored):
        return leaf.region(region)
    if not isinstance(leaf, CutLater):
        return np.asarray(leaf)[region]
    axes, shape = leaf.tensor.axes, leaf.leaf.shape
    axis, stack = leaf.cut.site.axis(leaf.tensor), leaf.cut.site.second.axes.stack
    rows = np.stack([axes.flat(shape, axis, row)[1] for row in leaf.cut.indices(leaf.tensor)])
    at, dims = axes.dimension(axis), [axes.dimension(name) for name in stack]
    if len(rows) > 1 and any(len(axes.dimensions[i]) > 1 for i in dims):
        return np.asarray(leaf)[region]  # a stack that shares a dimension with others
    start, stop = region[at].start, region[at].stop
    low = int(rows[:, start - 1].min()) + 1 if start else 0
    high = int(rows[:, stop - 1].max()) + 1 if stop < rows.shape[-1] else shape[at]
    values = region_of(leaf.leaf, (*region[:at], slice(low, high), *region[at + 1 :]))
    for slab in _slabs(values):
        _bits.check_finite(values[slab], leaf.tensor)
    rows = rows[:, start:stop] - low
    if len(rows) == 1:
        return np.take(values, rows[0], axis=at)
    # Each index of the stack keeps others: an index array that broadcasts against the values.
    index = rows.reshape(*(shape[i] for i in dims), -1)[tuple(region[i] for i in dims)]
    index = index.transpose(np.argsort((*dims, at)))
    others = tuple(i for i in range(values.ndim) if i not in (*dims, at))
    return np.take_along_axis(values, np.expand_dims(index, others), axis=at)


def chunk_of(leaf: Any) -> tuple[int, ...]:
    """The chunks to write a leaf in: those that it is stored in, as many along each dimension."""
    inner = leaf
    while isinstance(inner, CutLater):
        inner = inner.leaf
    if not isinstance(inner, Stored):
        return tuple(np.shape(leaf))
    counts = [
        -(-size // max(chunk, 1)) for size, chunk in zip(inner.shape, inner.chunk, strict=True)
    ]
    return tuple(
        max(-(-size // max(count, 1)), 1) for size, count in zip(leaf.shape, counts, strict=True)
    )


def regions(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Region]:
    """The boxes that chunks of a shape make of a tensor.

    >>> list(regions((3,), (2,)))
    [(slice(0, 2, None),), (slice(2, 3, None),)]
    """
    ranges = [
        [slice(i, min(i + step, size)) for i in range(0, size, step)]
        for size, step in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*ranges)
