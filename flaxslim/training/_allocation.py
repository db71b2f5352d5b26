"""Which channels die, once it is known what each of them is worth and how many are to be dead.

Those with the smallest scores, at each site by itself or among all sites, but never so many that a
site has fewer than its floor. What is dead stays dead, unless channels regrow.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxslim._spec import Site
from flaxslim.training._channels import Rows, together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """How deaths are shared out.

    Attributes:
      among_all: the smallest scores among all sites die, instead of as many at each.
      min_width: so many channels of each site live on; for each axis its own, if a mapping.
      max_sparsity: no larger share of a site's channels dies; likewise.
    """

    among_all: bool = False
    min_width: int | Mapping[str, int] = 1
    max_sparsity: float | Mapping[str, float] = 1.0

    def floor(self, axis: str, whole: Any) -> Any:
        """How many of so many channels live on: a number, traced if theirs is."""
        least = _of_axis(self.min_width, axis, 1)
        share = 1.0 - _of_axis(self.max_sparsity, axis, 1.0)
        return jnp.maximum(jnp.ceil(share * whole - 1e-4).astype(int), least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """Sites that keep the same channels (one, unless they are tied): what is known of them.

    Attributes:
      paths: the second kernels of the sites.
      axis: of the pair.
      score, alive: `(s, f)`; a channel is alive if it is at any of the sites.
      gone: how many channels each row has lost for good, which count as dead: a traced int.
    """

    paths: tuple[str, ...]
    axis: str
    score: Rows
    alive: Rows
    gone: Any

    @property
    def whole(self) -> Any:
        """How many channels a row had at first."""
        return self.alive.shape[-1] + self.gone

    def floor(self, how: Allocation) -> Any:
        """How many channels of each row live on."""
        return jnp.minimum(how.floor(self.axis, self.whole), self.alive.shape[-1])


def _of_axis(value: Any, axis: str, default: Any) -> Any:
    return value.get(axis, default) if isinstance(value, Mapping) else value


def members(
    sites: Sequence[Site], score: Mapping[str, Rows], channels: Mapping[str, Mapping[str, Any]]
) -> list[Member]:
    """The sites, those that are tied as one, with the sum of their scores."""
    found: list[Member] = []
    for own in together(sites):
        paths = tuple(site.second.path for site in own)
        state = channels[paths[0]]
        found.append(
            Member(
                paths=paths,
                axis=own[0].pair.axis,
                score=sum((score[path] for path in paths[1:]), score[paths[0]]),
                alive=jnp.stack([channels[path]["alive"] for path in paths]).any(0),
                gone=state["gone"],
            )
        )
    return found


def choose(
    found: Sequence[Member], sparsity: Mapping[str, Any], how: Allocation
) -> dict[str, Rows]:
    """Which channels are alive from now on, by second kernel. `sparsity` is by axis.

    A channel whose score is not finite does not die.
    """
    alive: dict[str, Rows] = {}
    for axis, share in sparsity.items():
        own = [m for m in found if m.axis == axis]
        rows = _among_all(own, share, how) if how.among_all else [_each(m, share, how) for m in own]
        alive |= {path: row for m, row in zip(own, rows, strict=True) for path in m.paths}
    return alive


def _each(m: Member, share: Any, how: Allocation) -> Rows:
    dead = _rounded(share * m.whole) - m.gone
    dead = jnp.minimum(dead, m.alive.shape[-1] - m.floor(how))
    return m.alive & ~((_rank(_key(m, m.alive)) < dead) & jnp.isfinite(m.score))


def _among_all(found: Sequence[Member], share: Any, how: Allocation) -> list[Rows]:
    if not found:
        return []
    keys, weights, total, gone = [], [], 0, 0
    for m in found:
        key = _key(m, m.alive)
        safe = _rank(key) >= key.shape[-1] - m.floor(how)
        keys.append(jnp.where(safe & m.alive, jnp.inf, key).ravel())
        weights.append(np.full(key.size, len(m.paths)))
        total += m.whole * len(key) * len(m.paths)
        gone += m.gone * len(key) * len(m.paths)
    key, weight = jnp.concatenate(keys), jnp.asarray(np.concatenate(weights))
    order = jnp.argsort(key, stable=True)
    so_far = jnp.cumsum(weight[order])
    dies = jnp.zeros(key.shape, bool).at[order].set(so_far <= _rounded(share * total) - gone)
    ends = np.cumsum([m.alive.size for m in found])[:-1]
    rows = jnp.split(dies & jnp.isfinite(key), ends.tolist())
    return [m.alive & ~row.reshape(m.alive.shape) for m, row in zip(found, rows, strict=True)]


def regrown(m: Member, alive: Rows, growth: Rows, share: Any) -> Rows:
    """Some of the living make room for as many of the dead, whose gradients are larger.

    As RigL does it (Evci et al. 2020, arXiv 1911.11134): of those that are alive after a step, the
    `share` with the smallest scores gives way to the largest by `growth`, `(s, f)`, among all
    others. A channel whose score is not finite does not give way.
    """
    count = alive.sum(-1, keepdims=True)
    room = jnp.minimum(_rounded(share * count), alive.shape[-1] - count)
    size = alive.shape[-1]
    kept = alive & (_rank(_key(m, alive)) >= size - (count - room))
    growth = jnp.where(jnp.isfinite(growth), growth, -jnp.inf)
    return _rank(jnp.where(kept, jnp.inf, growth)) >= size - count


def _key(m: Member, alive: Rows) -> Rows:
    """What is dead comes first, what must not die last."""
    return jnp.where(alive, jnp.where(jnp.isfinite(m.score), m.score, jnp.inf), -jnp.inf)


def _rank(key: Rows) -> Rows:
    """The place of each channel in its row, the smallest first."""
    return jnp.argsort(jnp.argsort(key, axis=-1, stable=True), axis=-1)


def _rounded(x: Any) -> Any:
    # A share such as 0.7 in float32 may lie a hair below the half.
    return jnp.floor(jnp.asarray(x, jnp.float32) + 0.5 + 1e-4).astype(int)
