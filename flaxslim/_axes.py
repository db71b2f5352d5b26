"""Axis patterns: one string says which dimension of a tensor carries the prunable axis.

A pattern names the dimensions of an array, in order, in the manner of einops::

    "d f"        a Dense kernel: inputs d, hidden channels f
    "f d"        its transpose (GPT-2's Conv1D, every PyTorch linear layer)
    "d (2 f)"    gate and up side by side in one kernel: channel j is columns j and f + j
    "2 f d"      the same, stacked
    "d l f"      layers scanned on axis 1

One rule serves them all: *remove index i along axis f wherever f occurs*.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim._errors import AxisPatternError

_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_NAME = re.compile(r"[a-z][a-z0-9_]*")

Dimension = tuple[str | int, ...]


def namespace(x: Any) -> Any:
    """numpy for host arrays, `jax.numpy` for the rest: each kind of leaf stays what it is.

    A float64 numpy leaf must not pass through jax.numpy, which rounds it to float32 unless x64
    is enabled; and a device array must not be fetched.
    """
    return jnp if isinstance(x, jax.Array) else np


@functools.lru_cache(maxsize=1024)
def _parse(pattern: str) -> tuple[Dimension, ...]:
    dimensions: list[Dimension] = []
    if _TOKEN.sub("", pattern).strip():
        raise AxisPatternError("unbalanced parentheses in an axis pattern", seen=repr(pattern))
    for group, single in _TOKEN.findall(pattern):
        factors: list[str | int] = []
        for token in group.split() if group else [single]:
            if token.isdigit() and int(token) > 0:
                factors.append(int(token))
            elif _NAME.fullmatch(token):
                factors.append(token)
            else:
                raise AxisPatternError(
                    f"cannot read {token!r} in an axis pattern",
                    seen=repr(pattern),
                    expected="lower-case axis names and positive numbers, such as 'd (2 f)'",
                )
        dimensions.append(tuple(factors))
    names = [f for dimension in dimensions for f in dimension if isinstance(f, str)]
    if len(set(names)) < len(names) or not dimensions:
        raise AxisPatternError(
            "an axis pattern names at least one axis, each of them once", seen=repr(pattern)
        )
    return tuple(dimensions)


@dataclasses.dataclass(frozen=True)
class Axes:
    """A parsed axis pattern.

    Raises `AxisPatternError` when the pattern is malformed.

    >>> Axes("d (2 f)").sizes((768, 4096))
    {'d': 768, 'f': 2048}
    >>> Axes("d (2 f)").take(np.arange(8).reshape(1, 8), "f", np.array([0, 3]))
    array([[0, 3, 4, 7]])
    """

    pattern: str

    def __post_init__(self) -> None:
        _parse(self.pattern)

    def __str__(self) -> str:
        return self.pattern

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return _parse(self.pattern)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f for dim in self.dimensions for f in dim if isinstance(f, str))

    def reversed(self) -> "Axes":
        """The pattern of the transposed array, which is how PyTorch stores a linear layer."""
        return Axes(_format(self.dimensions[::-1]))

    def without(self, axis: str) -> "Axes":
        """The pattern with one plain axis left out: the bias of a layer whose input is `axis`."""
        return Axes(_format(tuple(dim for dim in self.dimensions if dim != (axis,))))

    def sizes(self, shape: Sequence[int], *, path: str | None = None) -> dict[str, int]:
        """The size of each named axis; `AxisPatternError` if the shape does not fit."""
        return dict(_sizes(self.pattern, tuple(shape), path))

    def _expanded(self, shape: Sequence[int]) -> tuple[int, ...]:
        sizes = self.sizes(shape)
        return tuple(f if isinstance(f, int) else sizes[f] for d in self.dimensions for f in d)

    def position(self, axis: str) -> int:
        """Where `axis` stands once every composite dimension is split into its factors."""
        return [f for dim in self.dimensions for f in dim].index(axis)

    def others(self, axis: str) -> tuple[int, ...]:
        """The positions of all factors but `axis`: what a statistic per channel reduces over."""
        count = sum(map(len, self.dimensions))
        return tuple(i for i in range(count) if i != self.position(axis))

    def split(self, x: Any) -> Any:
        """`x` with every composite dimension split into its factors."""
        shape = self._expanded(x.shape)
        return x if shape == x.shape else x.reshape(shape)

    def flat(self, shape: Sequence[int], axis: str, keep: np.ndarray) -> tuple[int, np.ndarray]:
        """The dimension that carries `axis`, and the indices along it that belong to `keep`."""
        sizes = self.sizes(shape)
        for number, factors in enumerate(self.dimensions):
            if axis in factors:
                grid = np.arange(shape[number]).reshape(
                    [f if isinstance(f, int) else sizes[f] for f in factors]
                )
                return number, np.take(grid, keep, axis=factors.index(axis)).ravel()
        raise AxisPatternError(f"axis {axis!r} is not in the pattern", seen=repr(self.pattern))

    def take(self, x: Any, axis: str, keep: np.ndarray) -> Any:
        """`x` with only the indices `keep` left along `axis`; numpy in, numpy out.

        Eager `take` is the fastest gather known on CPU: one jitted call over all kernels loses
        five times, fancy indexing seven.
        """
        dimension, index = self.flat(x.shape, axis, keep)
        if namespace(x) is np:
            return np.take(x, index, axis=dimension)
        y = jnp.take(x, index, axis=dimension, mode="clip")
        return y if len(x.devices()) == 1 else _resharded(y, x.sharding)

    def zero(self, x: Any, axis: str, channels: np.ndarray) -> Any:
        """A copy of `x` with the given channels along `axis` set to zero."""
        dimension, index = self.flat(x.shape, axis, channels)
        at = (slice(None),) * dimension + (index,)
        if namespace(x) is np:
            y = x.copy()
            y[at] = 0
            return y
        return x.at[at].set(0)

    def norm(self, x: Any, axis: str) -> np.ndarray:
        """The L2 norm of each channel: float64 of shape (f,), summed in float32 on a device."""
        xp = namespace(x)
        wide = np.float64 if xp is np else np.promote_types(x.dtype, np.float32)
        y = self.split(x).astype(wide)
        # Scaled first, or the squares of large weights overflow and those of small ones vanish.
        largest = xp.max(xp.abs(y), initial=0)
        y = y / xp.where(largest > 0, largest, 1)
        relative = xp.sqrt(xp.sum(y * y, axis=self.others(axis)))
        return np.asarray(relative, np.float64) * float(largest)


def _resharded(y: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """`y` in a sharding, or as it is where the devices do not divide its shape."""
    try:
        sharding.shard_shape(y.shape)
    except ValueError:
        return y
    return jax.device_put(y, sharding)


def _format(dimensions: Sequence[Dimension]) -> str:
    return " ".join(
        str(dim[0]) if len(dim) == 1 else f"({' '.join(map(str, dim))})" for dim in dimensions
    )


@functools.lru_cache(maxsize=4096)
def _sizes(pattern: str, shape: tuple[int, ...], path: str | None) -> dict[str, int]:
    dimensions = _parse(pattern)
    expected = f'an array of pattern "{pattern}"'
    if len(shape) != len(dimensions):
        raise AxisPatternError(
            f"an array has {len(shape)} dimensions where its pattern has {len(dimensions)}",
            path=path,
            seen=shape,
            expected=expected,
            mend="name every dimension of the array in the pattern, in order",
        )
    sizes: dict[str, int] = {}
    for size, factors in zip(shape, dimensions, strict=True):
        free = [f for f in factors if isinstance(f, str)]
        fixed = math.prod(f for f in factors if isinstance(f, int))
        if len(free) > 1:
            raise AxisPatternError(
                f"the sizes of {' and '.join(free)} do not follow from the shape",
                path=path,
                seen=shape,
                expected=expected,
                mend="name at most one unknown axis in a dimension",
            )
        if size % fixed or (not free and size != fixed):
            raise AxisPatternError(
                f"a dimension of {size} is not {_format((factors,))}",
                path=path,
                seen=shape,
                expected=expected,
            )
        if free:
            sizes[free[0]] = size // fixed
    return sizes
