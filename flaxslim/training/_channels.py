"""What belongs to each channel of a site, in terms that JAX can trace.

A number of a tensor belongs to the channel at whose index of the prunable axis it stands. Values of
channels are rows `(s, f)`, one row for each index of the stacked axes (s = 1 for most). Of tensors
that have an axis of key/value groups, what belongs to a group belongs to each of its heads, and a
group lives as long as one of them does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxslim._roots import table_path
from flaxslim._spec import Site, Tensor

Rows = jax.Array


def total(
    site: Site, term: Callable[..., Any], *leaves: Mapping[str, Any], of: Sequence[Tensor] = ()
) -> Rows:
    """The sum of `term(x, ...)` over all numbers of each channel: float32 (or wider) `(s, f)`.

    `x, ...` is a tensor in each of the trees in turn. `of` are the tensors to look at, all that
    are cut if it is empty. Dimensions are summed where they lie, so that a sharded tensor is never
    gathered.
    """
    rows = jnp.zeros((site.rows, site.size), jnp.float32)
    for tensor in of or site.cut:
        axes, axis, stack = tensor.axes, site.axis(tensor), site.second.axes.stack
        split = [axes.split(_wide(tree[tensor.path])) for tree in leaves]
        found = whole(axes.rows(term(*split).sum(axes.others(axis, stack)), axis, stack))
        rows = rows + (found[:, site.owners] if axis == site.pair.group else found)
    return rows


def whole(rows: Rows) -> Rows:
    """Rows that each device has all of, as sorting needs them.

    The compiler sees to that by itself, but not on a mesh with explicit axes (the default of
    `jax.make_mesh`), where the sharding of an array is part of its type.
    """
    sharding = jax.typeof(rows).sharding
    if all(part is None for part in sharding.spec):
        return rows
    return jax.sharding.reshard(rows, NamedSharding(sharding.mesh, P()))


def values(site: Site, tensor: Tensor, leaf: Any) -> jax.Array:
    """All numbers of each channel in one tensor, `(s, f, n)`."""
    axes, axis, stack = tensor.axes, site.axis(tensor), site.second.axes.stack
    front = [axes.position(name) for name in (*stack, axis)]
    rest = [i for i in range(len(axes.factors)) if i not in front]
    y = axes.split(jnp.asarray(leaf)).transpose([*front, *rest])
    size = y.shape[len(front) - 1]
    y = y.reshape(site.rows, size, -1)
    return y[:, site.owners] if axis == site.pair.group else y


def spread(site: Site, tensor: Tensor, rows: Any) -> jax.Array:
    """Values of channels `(s, f)` as an array that broadcasts against one tensor of the site.

    Of a group it is the largest value of its heads.
    """
    axis = site.axis(tensor)
    if axis == site.pair.group:
        owners = site.owners
        heads = [rows[:, np.flatnonzero(owners == g)] for g in range(len(site.groups))]
        rows = jnp.stack([own.max(-1) for own in heads], axis=-1)
    return tensor.axes.spread(jnp.asarray(rows), tensor.shape, axis, site.second.axes.stack)


def masks(
    sites: Iterable[Site],
    alive: Mapping[str, Any],
    of: Callable[[Site], Iterable[Tensor]] = lambda site: site.cut,
) -> dict[str, jax.Array]:
    """Which numbers of each tensor belong to living channels, by path; each broadcasts.

    `alive` holds rows `(s, f)` of bool by the paths of the second kernels, `of` says which tensors
    of a site to look at. One that belongs to two sites is looked at along both axes. A table that
    tied sites share lives where any of them does.
    """
    found: dict[str, jax.Array] = {}
    for own in together(sites):
        any_alive = jnp.stack([jnp.asarray(alive[site.second.path]) for site in own]).any(0)
        for site in own:
            tables = {table_path(site.root, name) for name in site.pair.tables}
            for tensor in of(site):
                rows = any_alive if tensor.path in tables else alive[site.second.path]
                mask = spread(site, tensor, rows)
                old = found.get(tensor.path)
                found[tensor.path] = mask if old is None else old & mask
    return found


def placed(mask: Any, like: Any) -> Any:
    """A mask that is sharded as the array it selects from; the same mask without explicit axes."""
    sharding = jax.typeof(like).sharding
    if all(part is None for part in sharding.spec):
        return mask
    spec = [part if n > 1 else None for part, n in zip(sharding.spec, mask.shape, strict=True)]
    return jax.sharding.reshard(mask, NamedSharding(sharding.mesh, P(*spec)))


def together(sites: Iterable[Site]) -> list[tuple[Site, ...]]:
    """The sites whose channels die together: those that are tied, every other by itself."""
    found: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        found.setdefault((site.tied or site.second.path, site.size), []).append(site)
    return [tuple(own) for own in found.values()]


def reading(site: Site) -> tuple[Tensor, ...]:
    """What reads the channels: kernels, and the low-rank matrices that are added to them."""
    kernels = {tensor.path for tensor in site.reading}
    return (*site.reading, *(matrix for kernel, matrix in site.lora if kernel in kernels))


def read(site: Site, leaves: Mapping[str, Any]) -> Rows:
    """Which channels something reads: bool `(s, f)`, false by rule (i) of `flaxslim._dead`."""
    return total(site, lambda x: x != 0, leaves, of=reading(site)) > 0


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
