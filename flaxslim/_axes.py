"""Axis patterns: one string says which dimension of a tensor carries the prunable axis.

A pattern names the dimensions of an array, in order, in the manner of einops::

    "d f"        a Dense kernel: inputs d, hidden channels f
    "f d"        its transpose (GPT-2's Conv1D, every PyTorch linear layer)
    "d (2 f)"    gate and up side by side in one kernel: channel j is columns j and f + j
    "2 f d"      the same, stacked
    "d l f"      layers scanned on axis 1; each layer has channels of its own
    "e d f"      experts, likewise
    "d (h k)"    heads of k columns each, side by side; k must be known (`Axes.known`)
    "h k d"      heads on an axis of their own
    "x y d f"    a convolution with a window of (x, y), which no bias has

One rule serves them all: *remove index i along axis f wherever f occurs*.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _mesh
from flaxslim._lazy import Lazy
from flaxslim.errors import AxisPatternError

_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_NAME = re.compile(r"[a-z][a-z0-9_]*")

Dimension = tuple[str | int, ...]

# Along these each index has channels of its own: layers that are scanned, experts.
STACK = ("l", "e")

# The window of a convolution: a second layer sums over it, whatever the channels are.
WINDOW = ("x", "y", "z")


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
    """A parsed axis pattern; `known` are sizes that do not follow from a shape.

    Where a method takes `stack`, a statistic or a choice of channels has one row for each index of
    these axes, `(s, f)`, with `s` the product of their sizes (1 if there are none).

    Raises `AxisPatternError` when the pattern is malformed.

    >>> Axes("d (2 f)").sizes((768, 4096))
    {'d': 768, 'f': 2048}
    >>> Axes("d (2 f)").take(np.arange(8).reshape(1, 8), "f", np.array([0, 3]))
    array([[0, 3, 4, 7]])
    >>> Axes("d (h k)", known=(("k", 64),)).sizes((768, 768))
    {'d': 768, 'h': 12, 'k': 64}
    """

    pattern: str
    known: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        _parse(self.pattern)

    def __str__(self) -> str:
        return self.pattern

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return _parse(self.pattern)

    @property
    def factors(self) -> Dimension:
        """The dimensions in order, every composite one split."""
        return tuple(f for dim in self.dimensions for f in dim)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f for f in self.factors if isinstance(f, str))

    @property
    def stack(self) -> tuple[str, ...]:
        """The axes along which each index has channels of its own."""
        return tuple(name for name in STACK if name in self.names)

    def reversed(self) -> "Axes":
        """The pattern of the transposed array, which is how PyTorch stores a linear layer."""
        return dataclasses.replace(self, pattern=pattern_of(self.dimensions[::-1]))

    def only(self, names: Collection[str]) -> "Axes":
        """The pattern without the dimensions that name none of `names` (literal ones stay).

        >>> str(Axes("d (h k)").only("hk"))
        '(h k)'
        """
        kept = tuple(
            dim
            for dim in self.dimensions
            if not (own := [f for f in dim if isinstance(f, str)]) or {*own} & {*names}
        )
        return dataclasses.replace(self, pattern=pattern_of(kept))

    def bias(self, names: Collection[str]) -> "Axes":
        """The pattern of a bias that has the axes `names` of this kernel.

        A stack has its axis at the same place in every tensor, as `nn.scan` does it. The single
        input of a depthwise convolution is no dimension of its bias.

        >>> [str(Axes(pattern).bias("lf")) for pattern in ("l d f", "d l f", "x 1 f")]
        ['l f', 'f l', 'f']
        """
        dimensions = [d for d in self.only({*names} - {*self.stack}).dimensions if d != (1,)]
        for number, dim in enumerate(self.dimensions):
            if {*dim} & {*self.stack} & {*names}:
                dimensions.insert(number, dim)
        return dataclasses.replace(self, pattern=pattern_of(dimensions))

    def sizes(self, shape: Sequence[int], *, path: str | None = None) -> dict[str, int]:
        """The size of each named axis; `AxisPatternError` if the shape does not fit."""
        return dict(_sizes(self.pattern, self.known, tuple(shape), path))

    def _expanded(self, shape: Sequence[int]) -> tuple[int, ...]:
        sizes = self.sizes(shape)
        return tuple(f if isinstance(f, int) else sizes[f] for f in self.factors)

    def dimension(self, axis: str) -> int:
        """The number of the dimension that carries `axis`."""
        for number, factors in enumerate(self.dimensions):
            if axis in factors:
                return number
        raise AxisPatternError(f"axis {axis!r} is not in the pattern", seen=repr(self.pattern))

    def position(self, axis: str) -> int:
        """Where `axis` stands once every composite dimension is split into its factors."""
        return self.factors.index(axis)

    def others(self, axis: str, stack: Sequence[str] = ()) -> tuple[int, ...]:
        """The positions of all factors but `axis` and `stack`: what a statistic reduces over."""
        return tuple(i for i, f in enumerate(self.factors) if f != axis and f not in stack)

    def rows(self, reduced: Any, axis: str, stack: Sequence[str] = ()) -> Any:
        """A statistic that was reduced over `others`, as `(s, f)`."""
        left = [f for f in self.factors if f == axis or f in stack]
        order = [left.index(name) for name in (*stack, axis)]
        y = reduced.transpose(order)
        return y.reshape(math.prod(y.shape[:-1]), y.shape[-1])

    def split(self, x: Any) -> Any:
        """`x` with every composite dimension split into its factors; a lazy one is read."""
        x = np.asarray(x) if isinstance(x, Lazy) else x
        shape = self._expanded(x.shape)
        return x if shape == x.shape else x.reshape(shape)

    def flat(self, shape: Sequence[int], axis: str, keep: np.ndarray) -> tuple[int, np.ndarray]:
        """The dimension that carries `axis`, and the indices along it that belong to `keep`."""
        sizes = self.sizes(shape)
        number = self.dimension(axis)
        factors = self.dimensions[number]
        grid = np.arange(shape[number]).reshape(
            [f if isinstance(f, int) else sizes[f] for f in factors]
        )
        return number, np.take(grid, keep, axis=factors.index(axis)).ravel()

    def take(self, x: Any, axis: str, keep: np.ndarray, stack: Sequence[str] = ()) -> Any:
        """`x` with only the indices `keep` left along `axis`; numpy in, numpy out.

        `keep` is `(w,)`, the same everywhere, or `(s, w)`, one row for each index of `stack`.
        Eager `take` is the fastest gather known on CPU: one jitted call over all kernels loses
        five times, fancy indexing seven. What lies on a mesh moves only where it has to; raises
        `ShardingError` where the mesh does not divide what is left.
        """
        if _mesh.on_mesh(x):
            return self._taken_on_mesh(x, axis, keep, stack)
        xp = namespace(x)
        if keep.ndim > 1 and len(keep) > 1:
            index = self._spread(keep, x.shape, axis, stack)
            # A copy of its own: take_along_axis gives the axes in another order in memory.
            y = xp.take_along_axis(self.split(x), index, axis=self.position(axis))
            y = y.reshape(self.resized(x.shape, axis, keep.shape[-1]))
        else:
            dimension, index = self.flat(x.shape, axis, keep.reshape(-1))
            if xp is np:
                return np.take(x, index, axis=dimension)
            y = jnp.take(x, index, axis=dimension, mode="clip")
        return y if xp is np or len(x.devices()) == 1 else _resharded(y, x.sharding)

    def _taken_on_mesh(self, x: Any, axis: str, keep: np.ndarray, stack: Sequence[str]) -> Any:
        rows = np.atleast_2d(keep)
        index = np.stack([self.flat(x.shape, axis, row)[1] for row in rows])
        stacked = [self.dimension(name) for name in stack] if len(rows) > 1 else []
        if all(len(self.dimensions[i]) == 1 for i in stacked):
            return _mesh.taken(x, self.dimension(axis), index, stacked)
        raise AxisPatternError(
            "a stack that shares a dimension with others cannot be cut on a mesh",
            seen=repr(self.pattern),
            mend="place the array on one device, or on the host, first",
        )

    def put(self, x: Any, axis: str, keep: np.ndarray, size: int, stack: Sequence[str] = ()) -> Any:
        """The inverse of `take`: `size` indices along `axis`, zero where nothing was kept."""
        y, at = self.split(_mesh.host(x)), self.position(axis)
        full = np.zeros((*y.shape[:at], size, *y.shape[at + 1 :]), y.dtype)
        np.put_along_axis(full, self._spread(keep, x.shape, axis, stack), y, axis=at)
        full = full.reshape(self.resized(x.shape, axis, size))
        return full if namespace(x) is np else _resharded(full, x.sharding)

    def resized(self, shape: Sequence[int], axis: str, size: int) -> tuple[int, ...]:
        """The shape with another size along `axis`."""
        number, sizes = self.dimension(axis), {**self.sizes(shape), axis: size}
        new = math.prod(f if isinstance(f, int) else sizes[f] for f in self.dimensions[number])
        return (*shape[:number], new, *shape[number + 1 :])

    def zero(self, x: Any, axis: str, channels: np.ndarray, stack: Sequence[str] = ()) -> Any:
        """A copy of `x` with channels along `axis` set to zero.

        `channels` are indices `(n,)`, the same everywhere, or a mask `(s, f)` of bools.
        """
        mask = channels
        if channels.dtype != bool:
            mask = np.zeros((1, self.sizes(x.shape)[axis]), bool)
            mask[:, channels] = True
        dead = self.spread(mask, x.shape, axis, stack)
        return namespace(x).where(dead, x.dtype.type(0), x)

    def norm(self, x: Any, axis: str, stack: Sequence[str] = ()) -> np.ndarray:
        """The L2 norm of each channel: float64 `(f,)`, or `(s, f)` where there is a stack.

        Summed in float32 on a device.
        """
        if _mesh.on_mesh(x):
            return self._norm_on_mesh(x, axis, stack)
        xp = namespace(x)
        wide = np.float64 if xp is np else np.promote_types(x.dtype, np.float32)
        y = self.split(x).astype(wide)
        # Scaled first, or the squares of large weights overflow and those of small ones vanish.
        largest = xp.max(xp.abs(y), initial=0)
        y = y / xp.where(largest > 0, largest, 1)
        relative = xp.sqrt(xp.sum(y * y, axis=self.others(axis, stack)))
        rows = self.rows(np.asarray(relative, np.float64), axis, stack) * float(largest)
        return rows if stack else rows[0]

    def _norm_on_mesh(self, x: Any, axis: str, stack: Sequence[str]) -> np.ndarray:
        others = self.others(axis, stack)
        bits = _mesh.reduced(_mesh.BITS, x, range(x.ndim)).astype(f"uint{8 * x.dtype.itemsize}")
        largest = float(bits.view(x.dtype).max(initial=0))
        squares = self.reduced(_mesh.SQUARES, x, others, np.float32(largest or 1))
        rows = self.rows(np.sqrt(squares.astype(np.float64)), axis, stack) * (largest or 1)
        return rows if stack else rows[0]

    def reduced(
        self, how: _mesh.Reduction, x: Any, over: Collection[int], *others: Any
    ) -> np.ndarray:
        """A reduction of what lies on a mesh over some positions, as if it had been split."""
        begins = np.cumsum([0, *map(len, self.dimensions)])
        inside = [range(begins[i], begins[i + 1]) for i in range(len(self.dimensions))]
        whole = [i for i, own in enumerate(inside) if {*own} <= {*over}]
        left, sizes = _mesh.reduced(how, x, whole, *others), self.sizes(x.shape)
        shape = [
            1 if i in whole else f if isinstance(f, int) else sizes[f]
            for i, dim in enumerate(self.dimensions)
            for f in dim
        ]
        return how.host.reduce(left.reshape(shape), axis=tuple(over), initial=0)

    def spread(self, rows: Any, shape: Sequence[int], axis: str, stack: Sequence[str] = ()) -> Any:
        """Rows `(s, f)` or `(f,)` as an array that broadcasts against `x` itself, of this shape.

        >>> Axes("d (2 f)").spread(np.array([True, False]), (8, 4), "f")
        array([[ True, False,  True, False]])
        """
        number, sizes = self.dimension(axis), self.sizes(shape)
        y = self._spread(rows, shape, axis, stack)
        # Only the dimension that holds the axis has to be whole; the others stay 1 where they are.
        full = [y.shape[i] for i in range(y.ndim)]
        dims, at = [], 0
        for i, dim in enumerate(self.dimensions):
            inside = slice(at, at + len(dim))
            if i == number or any(full[j] > 1 for j in range(at, at + len(dim))):
                full[inside] = [f if isinstance(f, int) else sizes[f] for f in dim]
            dims.append(math.prod(full[inside]))
            at += len(dim)
        return namespace(y).broadcast_to(y, full).reshape(dims)

    def _spread(self, rows: Any, shape: Sequence[int], axis: str, stack: Sequence[str]) -> Any:
        """Rows `(s, w)` or `(w,)` as an array that broadcasts against the split `x`."""
        rows = rows if rows.ndim > 1 else rows[None]
        sizes = self.sizes(shape)
        own = () if len(rows) == 1 else tuple(stack)
        y = rows.reshape([*(sizes[name] for name in own), rows.shape[-1]])
        order = [f for f in self.factors if f == axis or f in own]
        y = y.transpose([(*own, axis).index(name) for name in order])
        at = [i for i, f in enumerate(self.factors) if f not in order]
        return namespace(y).expand_dims(y, tuple(at))


def _resharded(y: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """`y` in a sharding, or as it is where the devices do not divide its shape."""
    try:
        sharding.shard_shape(y.shape)
    except ValueError:
        return jnp.asarray(y)
    return jax.device_put(y, sharding)


def pattern_of(dimensions: Sequence[Dimension]) -> str:
    """What `Axes` reads as these dimensions."""
    return " ".join(
        str(dim[0]) if len(dim) == 1 else f"({' '.join(map(str, dim))})" for dim in dimensions
    )


@functools.lru_cache(maxsize=4096)
def _sizes(
    pattern: str,
    known: tuple[tuple[str, int], ...],
    shape: tuple[int, ...],
    path: str | None,
) -> dict[str, int]:
    dimensions = _parse(pattern)
    given = dict(known)
    expected = f'an array of pattern "{pattern}"'
    if known and (named := [f"{name} = {size}" for name, size in known if name in pattern]):
        expected += f" with {', '.join(named)}"
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
        free = [f for f in factors if isinstance(f, str) and f not in given]
        fixed = math.prod(given.get(f, 1) if isinstance(f, str) else f for f in factors)
        if len(free) > 1:
            raise AxisPatternError(
                f"the sizes of {' and '.join(free)} do not follow from the shape",
                path=path,
                seen=shape,
                expected=expected,
                mend=f"name at most one unknown axis in a dimension, or say where the config "
                f'holds the others: Pair(sizes={{"{free[-1]}": "a config key"}})',
            )
        if size % max(fixed, 1) or (not free and size != fixed):
            raise AxisPatternError(
                f"a dimension of {size} is not {pattern_of((factors,))}",
                path=path,
                seen=shape,
                expected=expected,
                mend="correct the tensor or its pattern; where the config says a size, pass the "
                "one that was saved with these parameters",
            )
        for factor in factors:
            if isinstance(factor, str):
                sizes[factor] = given.get(factor, size // max(fixed, 1))
    return sizes
