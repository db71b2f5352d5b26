"""Arrays that lie in shards on a mesh: read and cut where they lie.

What is asked of all shards is reduced on each of them and then across them; what has to move
between two devices goes from the one to the other. So no device ever holds more than its own share
of a tensor, but for vectors: one number for each channel is whole on each device.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxslim.errors import ShardingError

try:
    from jax import shard_map
except ImportError:  # jax 0.6.0
    from jax.experimental.shard_map import shard_map


def on_mesh(x: Any) -> bool:
    """Whether an array lies on several devices of a mesh, in shards or copies.

    Or on one whose axes are explicit: then the ordinary operations ask for shardings too.
    """
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return False
    if not isinstance(x.sharding, NamedSharding):
        return False
    explicit = AxisType.Explicit in x.sharding.mesh.axis_types
    return explicit or len(x.sharding.device_set) > 1


def spans_processes(x: Any) -> bool:
    """Whether an array lies on devices of several processes."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and not x.is_fully_addressable


def is_apart(x: Any) -> bool:
    """Whether it does so in shards, of which no process sees all."""
    return spans_processes(x) and not x.is_fully_replicated


def told(x: jax.Array) -> str:
    """Where an array is that spans processes, for messages."""
    here = f"{len(x.addressable_shards)} of them in process {jax.process_index()}"
    return f"{x.shape} over {len(x.sharding.device_set)} devices, {here}"


def host(x: Any) -> np.ndarray:
    """The values on the host, in every process; meant for vectors."""
    if is_apart(x):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def put(values: np.ndarray, like: Any) -> jax.Array:
    """Values of the host in the shards of another array, or copied where these do not divide."""
    sharding = like.sharding
    try:
        sharding.shard_shape(values.shape)
    except ValueError:
        sharding = NamedSharding(sharding.mesh, P())
    return _spread(values.astype(like.dtype, copy=False), sharding)


def _spread(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Values that every process has, each shard made of them where it lies."""
    return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])


def automatic(x: Any) -> Any:
    """The same array where the compiler propagates shardings, on a mesh with explicit axes or not.

    A function that was traced without a mesh runs on it then.
    """
    if not on_mesh(x):
        return x
    mesh, spec = _sharding(x).mesh, _sharding(x).spec
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return x
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    like = Mesh(np.asarray(mesh.devices), mesh.axis_names, axis_types=kinds)
    return jax.device_put(x, NamedSharding(like, spec))


def axes_of(x: jax.Array, dimension: int) -> tuple[str, ...]:
    """The axes of the mesh that split a dimension."""
    return _axes_of(_sharding(x).spec, dimension)


def _axes_of(spec: P, dimension: int) -> tuple[str, ...]:
    names = spec[dimension] if dimension < len(spec) else None
    return names if isinstance(names, tuple) else () if names is None else (names,)


def shards(x: jax.Array, dimension: int) -> int:
    """Into how many pieces the mesh splits a dimension."""
    return _count(_sharding(x), axes_of(x, dimension))


def _sharding(x: jax.Array) -> NamedSharding:
    assert isinstance(x.sharding, NamedSharding)  # as `on_mesh` says
    return x.sharding


def _count(sharding: NamedSharding, names: Iterable[str]) -> int:
    return math.prod(sharding.mesh.shape[name] for name in names)


# --- what is asked of all shards --------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reduction of an array, on a shard and across the shards.

    Attributes:
      term: of a shard, and of what else it takes: what is reduced.
      local, across, host: reduces dimensions of a shard, the shards of some axes of a mesh, and
        what is left on the host.
    """

    term: Callable[..., Any]
    local: Callable[..., Any]
    across: Callable[..., Any]
    host: np.ufunc


def _bits(x: Any) -> Any:
    # The largest pattern, and not the `or` of them, which devices cannot reduce across.
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned) & (np.iinfo(unsigned).max >> 1)
    return bits.astype(np.promote_types(unsigned, np.uint32))


def _squares(x: Any, scale: Any) -> Any:
    return jnp.square(x.astype(jnp.promote_types(x.dtype, np.float32)) / scale)


def _products(x: Any, y: Any) -> Any:
    return x.astype(np.float64) * y


_largest = functools.partial(jnp.max, initial=0)  # of no numbers as well

BITS = Reduction(term=_bits, local=_largest, across=lax.pmax, host=np.maximum)
SQUARES = Reduction(term=_squares, local=jnp.sum, across=lax.psum, host=np.add)
PRODUCTS = Reduction(term=_products, local=jnp.sum, across=lax.psum, host=np.add)


def reduced(how: Reduction, x: jax.Array, dimensions: Sequence[int], *others: Any) -> np.ndarray:
    """A reduction over some dimensions, which stay as ones; on the host, in every process.

    `others` broadcast against `x`.
    """
    with _wide() if how is PRODUCTS else contextlib.nullcontext():
        shapes = tuple(map(np.shape, others))
        run, specs = _reducing(how, _sharding(x), x.ndim, tuple(dimensions), shapes)
        own = [NamedSharding(_sharding(x).mesh, spec) for spec in specs]
        return np.asarray(run(x, *map(_spread, map(np.asarray, others), own)))


def _wide() -> Any:
    """float64 for a while; where jax has it moved to depends on the release."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax import experimental

    return experimental.enable_x64(True)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=256)
def _reducing(
    how: Reduction,
    sharding: NamedSharding,
    ndim: int,
    dimensions: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> Any:
    names = [_axes_of(sharding.spec, i) for i in range(ndim)]
    across = tuple(name for i in dimensions for name in names[i])

    def reduce(x: Any, *others: Any) -> Any:
        found = how.local(how.term(x, *others), axis=dimensions, keepdims=True)
        return how.across(found, across) if across else found

    def split(whole: Sequence[bool]) -> P:
        return P(*(names[i] or None if whole[i] else None for i in range(len(whole))))

    specs = [split([n > 1 for n in own]) for own in shapes]
    run = shard_map(
        reduce,
        mesh=sharding.mesh,
        in_specs=(split([True] * ndim), *specs),
        out_specs=split([i not in dimensions for i in range(ndim)]),
    )
    return jax.jit(run, out_shardings=NamedSharding(sharding.mesh, P())), specs


# --- what moves between them ------------------------------------------------------------------


def taken(x: jax.Array, dimension: int, index: np.ndarray, rows: Sequence[int] = ()) -> jax.Array:
    """The indices along a dimension, in the same mesh and `PartitionSpec`.

    `index` is `(1, w)`; or `(s, w)`, one row for each index of the dimensions `rows`. Bits stay as
    they are. Raises `ShardingError` if the mesh does not divide w.
    """
    program, arguments = gathering(x, dimension, index, rows)
    y = program(*arguments)
    if all(device.platform == "cpu" for device in x.devices()):
        # Of two such programs at once each can hold threads that the other waits for: with eight
        # devices on two cores jaxlib 0.6.0 stood still.
        y.block_until_ready()
    return y if y.sharding == x.sharding else jax.device_put(y, x.sharding)


def gathering(
    x: jax.Array, dimension: int, index: np.ndarray, rows: Sequence[int] = ()
) -> tuple[Any, tuple[Any, ...]]:
    """The program of `taken`, and what it is called with.

    Channels that stay are in order, so that nearly all of them stay on their device or go to a
    device nearby. For each distance between two devices there is one exchange, as large as the
    largest need among all of them: a mesh runs one program. (XLA's own gather along a dimension
    that is split has each device hold the result whole, and adds them all up.)
    """
    count, width = shards(x, dimension), index.shape[-1]
    if width % count:
        names = axes_of(x, dimension)
        raise ShardingError(
            f"{count} devices do not divide the {width} of {x.shape[dimension]} indices that stay",
            seen=f"dimension {dimension} of shape {x.shape}, split by {', '.join(names)} of "
            f"{dict(_sharding(x).mesh.shape)}",
            expected=f"a multiple of {count}, such as {-(-width // count) * count}",
            mend="make the plan for the arrays where they are, which rounds widths up; or with a "
            "multiple_of that the mesh divides",
        )
    moves = _moves(index, count, x.shape[dimension] // count, width // count)
    sizes = [x.shape[i] for i in rows]
    order = sorted(range(len(rows)), key=lambda i: rows[i])

    def placed(of_shards: np.ndarray) -> np.ndarray:
        """`(n, s, c)`, the shards in front, as indices that broadcast against x."""
        if not rows:
            return of_shards[:, 0]
        y = of_shards.reshape(count, *sizes, -1)
        y = y.transpose(0, *(i + 1 for i in order), y.ndim - 1)
        shape = [
            x.shape[i] if i in rows else y.shape[-1] if i == dimension else 1 for i in range(x.ndim)
        ]
        return np.moveaxis(y, -1, 1 + sum(i < dimension for i in rows)).reshape(count, *shape)

    run, spec = _gathering(_sharding(x), x.ndim, dimension, tuple(rows), tuple(moves.sent))
    own = NamedSharding(_sharding(x).mesh, spec)
    return run, (x, *(_spread(placed(i), own) for i in (*moves.sent.values(), moves.order)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Moves:
    """What each shard sends, and in which order it takes what it has then.

    Attributes:
      sent: by how many shards further it goes, the indices `(n, s, c)` in the shard that sends it.
        What stays (0) is first.
      order: indices `(n, s, w)` into all that a shard holds then, what came by one distance after
        what came by another.
    """

    sent: Mapping[int, np.ndarray]
    order: np.ndarray


def _moves(index: np.ndarray, count: int, before: int, after: int) -> _Moves:
    """`before`, `after`: how many indices a shard has."""
    places = index.reshape(len(index), count, after)
    distance = np.arange(count)[:, None] - places // max(before, 1)
    grain = max(after // _GRAINS, 1)
    sent, order, begin = {}, np.zeros((count, len(index), after), np.int32), 0
    for by in sorted({0, *np.unique(distance).tolist()}, key=lambda by: (abs(by), by)):
        here = distance == by  # (s, n, after)
        most = int(here.sum(-1).max(initial=0))
        own = np.zeros((count, len(index), min(after, -(-most // grain) * grain)), np.int32)
        for row, shard in zip(*np.nonzero(here.any(-1)), strict=True):
            found = np.flatnonzero(here[row, shard])
            own[shard - by, row, : len(found)] = places[row, shard, found] % before
            order[shard, row, found] = begin + np.arange(len(found))
        sent[by] = own
        begin += own.shape[-1]
    return _Moves(sent=sent, order=order)


# How finely the size of an exchange is said, in parts of a shard: fewer programs for more bytes.
_GRAINS = 8


@functools.lru_cache(maxsize=256)
def _gathering(
    sharding: NamedSharding,
    ndim: int,
    dimension: int,
    rows: tuple[int, ...],
    distances: tuple[int, ...],
) -> Any:
    names = [_axes_of(sharding.spec, i) or None for i in range(ndim)]
    across = names[dimension] or ()
    count = _count(sharding, across)
    # Devices are counted in the order of the axes in the mesh, shards in that of the spec.
    ordered = tuple(name for name in sharding.mesh.axis_names if name in across)
    numbers = np.arange(count).reshape([sharding.mesh.shape[name] for name in ordered])
    ids = numbers.transpose([ordered.index(name) for name in across]).reshape(-1).tolist()

    def take(x: Any, index: Any) -> Any:
        if rows:
            return jnp.take_along_axis(x, index[0], axis=dimension, mode="clip")
        return jnp.take(x, index[0], axis=dimension, mode="clip")

    def gather(x: Any, *indices: Any) -> Any:
        parts = []
        for by, index in zip(distances, indices, strict=False):
            part = take(x, index)
            if by:
                pairs = [(ids[i], ids[i + by]) for i in range(count) if 0 <= i + by < count]
                part = lax.ppermute(part, ordered, pairs)
            parts.append(part)
        return take(jnp.concatenate(parts, axis=dimension), indices[-1])

    inside = [names[i] if i in rows else None for i in range(ndim)] if rows else [None]
    own, spec = P(*names), P(across or None, *inside)
    specs = (own, *(spec for _ in (*distances, 0)))
    run = shard_map(gather, mesh=sharding.mesh, in_specs=specs, out_specs=own)
    return jax.jit(run), spec
