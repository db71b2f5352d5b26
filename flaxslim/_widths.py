"""How wide each site is to be: the width policies, and which channels fill a width up.

Sites that must keep the same channels form a cluster (most are one site); clusters that share a
width form a group. A cluster has a mask `(s, f)` of its living channels: those that live at any
of its sites.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from flaxslim._spec import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Sites that keep the same channels. `living` and `weak` are `(s, f)`."""

    sites: tuple[Site, ...]
    living: np.ndarray
    weak: np.ndarray

    @property
    def groups(self) -> tuple[int, ...]:
        """How many heads each key/value group has; empty if there are no groups."""
        return self.sites[0].groups

    def by_group(self, mask: np.ndarray) -> np.ndarray:
        """How many channels of each key/value group a mask has, `(s, g)`."""
        return np.stack(
            [mask[:, self.sites[0].owners == g].sum(1) for g in range(len(self.groups))], 1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A width; `even` heads come as `groups` key/value groups of `each` heads."""

    width: int
    groups: int = 0
    each: int = 0

    @property
    def even(self) -> bool:
        return self.groups > 0


def need(clusters: Sequence[Cluster], *, even: bool, least: int, multiple_of: int) -> Target:
    """What all of these clusters can have in common: the largest need, rounded up.

    `even`: key/value groups stay of one size, as classes with one number for it ask.
    """
    full = clusters[0].sites[0].size
    if not even:
        largest = max(int(c.living.sum(1).max(initial=0)) for c in clusters)
        return Target(width=rounded(max(largest, least), multiple_of, full))
    counts = [c.by_group(c.living) for c in clusters]
    groups = max(int((count > 0).sum(1).max(initial=0)) for count in counts)
    each = max(int(count.max(initial=0)) for count in counts)
    groups = rounded(max(groups, least), multiple_of, len(clusters[0].groups))
    each = max(each, least) if groups else 0
    return Target(width=groups * each, groups=groups, each=each)


def rounded(count: int, multiple_of: int, full: int) -> int:
    """The next multiple, or all there are."""
    return min(full, math.ceil(count / multiple_of) * multiple_of)


def keep(cluster: Cluster, target: Target) -> np.ndarray:
    """The mask `(s, f)` of what stays: what lives, filled up to the target.

    Filling is free of loss if it takes the weak first: a dead channel is missed by nobody.
    """
    rows = zip(cluster.living, cluster.weak, strict=True)
    if target.even:
        return np.stack([_even(cluster, living, weak, target) for living, weak in rows])
    return np.stack([_filled(living, weak, target.width) for living, weak in rows])


def _filled(living: np.ndarray, weak: np.ndarray, width: int) -> np.ndarray:
    mask = living.copy()
    filling = np.flatnonzero(weak & ~living), np.flatnonzero(~weak & ~living)
    mask[np.concatenate(filling)[: width - int(living.sum())]] = True
    return mask


def _even(cluster: Cluster, living: np.ndarray, weak: np.ndarray, target: Target) -> np.ndarray:
    owners = cluster.sites[0].owners
    lives = np.asarray([living[owners == g].any() for g in range(len(cluster.groups))])
    frail = np.asarray([weak[owners == g].any() for g in range(len(cluster.groups))])
    mask = np.zeros_like(living)
    for group in np.flatnonzero(_filled(lives, frail, target.groups)):
        own = owners == group
        mask[own] = _filled(living[own], weak[own], target.each)
    return mask


def multiple_for(site: Site, multiple_of: int | Mapping[str, int]) -> int:
    """What a site's width is to be a multiple of.

    A mapping may name the axis ("f", "h"), or sites by a pattern of their root with `*`; the last
    entry that fits holds.
    """
    if isinstance(multiple_of, int):
        return multiple_of
    from fnmatch import fnmatch

    found = 1
    for name, value in multiple_of.items():
        if name == site.pair.axis or fnmatch(site.root, name):
            found = value
    return found
