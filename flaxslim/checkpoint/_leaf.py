"""Tensors on their way to disk: read, cut, permuted and cast only when their bytes are written.

So that saving needs the memory of some rows of a tensor, not of one model.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (numpy knows "bfloat16" by name once this is imported)
import numpy as np

from flaxslim._lazy import Lazy
from flaxslim.errors import UnsupportedDtypeError

Bytes = bytes | memoryview


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaf:
    """An array (numpy, jax or lazy), the permutation and the dtype in which it is to be written."""

    array: Any
    axes: tuple[int, ...] | None = None
    cast: np.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.array.shape)
        return shape if self.axes is None else tuple(shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> np.dtype:
        stored = np.dtype(self.array.dtype)
        return self.cast if self.cast is not None and is_floating(stored) else stored

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """The values on the host, contiguous."""
        values = np.asarray(self.array)
        if self.axes is not None:
            values = values.transpose(self.axes)
        # order="C" and not np.ascontiguousarray, which turns a scalar into a vector.
        return np.asarray(values, dtype=self.dtype, order="C")

    def bytes(self) -> Iterator[memoryview]:
        """What is written, a piece at a time."""
        lazy = isinstance(self.array, Lazy) and self.axes is None
        whole = dataclasses.replace(self, cast=None)
        for block in self.array.blocks() if lazy else (whole.numpy(),):
            with np.errstate(over="ignore"):  # looked for below
                values = np.asarray(block, dtype=self.dtype, order="C")
            if values.dtype != block.dtype:
                _check_cast(block, values)
            yield values.reshape(-1).view(np.uint8).data


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Bytes of a file that is to be written: how many, and what gives them."""

    nbytes: int
    bytes: Callable[[], Iterator[Bytes]]

    @classmethod
    def of(cls, text: Bytes) -> "Piece":
        return cls(nbytes=len(text), bytes=lambda: iter((text,)))

    @classmethod
    def whole(cls, leaf: Leaf) -> "Piece":
        return cls(nbytes=leaf.nbytes, bytes=leaf.bytes)

    @classmethod
    def interleaved(cls, leaf: Leaf, headers: Sequence[Bytes], sizes: Sequence[int]) -> "Piece":
        """A leaf in parts of these sizes, a header before each."""

        def parts() -> Iterator[Bytes]:
            blocks, block = leaf.bytes(), memoryview(b"")
            for header, size in zip(headers, sizes, strict=True):
                yield header
                while size:
                    block = block or next(blocks)
                    yield block[:size]
                    size, block = size - len(block[:size]), block[size:]

        return cls(nbytes=leaf.nbytes + sum(map(len, headers)), bytes=parts)


def _check_cast(before: np.ndarray, after: np.ndarray) -> None:
    """Raise `UnsupportedDtypeError` if a number is beyond what its new dtype can say."""
    wrong = ~np.isfinite(after) & np.isfinite(before)
    if wrong.any():
        raise UnsupportedDtypeError(
            f"a weight is beyond what {after.dtype} can say",
            seen=f"{before[wrong].flat[0]} in {before.dtype}",
            mend="cast to bfloat16 or float32, or leave dtype out",
        )


def is_floating(dtype: Any) -> bool:
    """Whether a dtype is floating point, bfloat16 and the 8-bit floats included."""
    import jax.numpy as jnp

    return bool(jnp.issubdtype(dtype, jnp.floating))


def nest(flat: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Names joined by a separator as nested dicts; `ValueError` if one name is inside another.

    >>> nest({"a.b": 1, "a.c": 2}, ".")
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} lies inside another tensor")
        if last in node:
            raise ValueError(f"{name!r} is there twice")
        node[last] = value
    return tree
