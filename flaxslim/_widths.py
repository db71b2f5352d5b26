"""How wide each site is to be: the width policies, and which channels fill a width up.

Sites that must keep the same channels form a cluster (most are one site); clusters that share a
width form a group. A cluster has a mask `(s, f)` of its living channels: those that live at any
of its sites.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from flaxslim._spec import Site
from flaxslim.errors import WidthError, nearest

HEADS = "h"  # their axis, in every spec


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


def need(
    clusters: Sequence[Cluster], *, even: bool, least: int, multiple_of: int, groups_of: int = 1
) -> Target:
    """What all of these clusters can have in common: the largest need, rounded up.

    `even`: key/value groups stay of one size, as classes with one number for it ask; their number
    is a multiple of `groups_of`.
    """
    full = clusters[0].sites[0].size
    if not even:
        largest = max(int(c.living.sum(1).max(initial=0)) for c in clusters)
        return Target(width=rounded(max(largest, least), multiple_of, full))
    counts = [c.by_group(c.living) for c in clusters]
    groups = max(int((count > 0).sum(1).max(initial=0)) for count in counts)
    each = max(int(count.max(initial=0)) for count in counts)
    groups = max(groups, least)
    each = max(each, least) if groups else 0
    return _even_target(groups, each, multiple_of, groups_of, clusters[0].groups)


def _even_target(
    groups: int, each: int, multiple_of: int, groups_of: int, full: Sequence[int]
) -> Target:
    """The least number of heads that is a multiple, in groups of one size; or all there are."""
    numbers = [g for g in range(groups, len(full) + 1) if g % groups_of == 0]
    larger = ((g, e) for g in numbers for e in range(each, max(full) + 1))
    fitting = ((g * e, g, e) for g, e in larger if g * e % multiple_of == 0)
    width, groups, each = min(fitting, default=(sum(full), len(full), max(full)))
    return Target(width=width, groups=groups, each=each)


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

    A number is for channels: 128 of them suit a matrix unit, and no model has 128 heads to spare.
    A mapping may name the axis ("f", "h"), or sites of channels by a pattern of their root with
    `*`; the last entry that fits holds.
    """
    if not isinstance(multiple_of, Mapping):
        return 1 if site.pair.axis == HEADS else int(multiple_of)
    fitting = [value for name, value in multiple_of.items() if _fits(name, site)]
    return int(fitting[-1]) if fitting else 1


def _fits(name: str, site: Site) -> bool:
    if site.pair.axis == HEADS:
        return name == HEADS
    return name in (site.pair.axis, site.root) or fnmatchcase(site.root, name)


def check_entries(multiple_of: int | Mapping[str, int], sites: Sequence[Site]) -> None:
    """Raise `WidthError` for an entry that fits no site: a slip of the pen would go unseen."""
    # One mapping may serve models and specs that have only channels, or only heads.
    axes = {"f", HEADS} | {site.pair.axis for site in sites}
    for name in multiple_of if isinstance(multiple_of, Mapping) else ():
        if name not in axes and not any(_fits(name, site) for site in sites):
            roots = [site.root for site in sites if site.pair.axis != HEADS]
            raise WidthError(
                f"multiple_of has an entry {name!r} that fits no site",
                seen=repr(multiple_of),
                expected='an axis ("f": channels, "h": heads), or a pattern of the roots of '
                'channels such as "decoder/*"',
                near=nearest(name, [*sorted(axes), *roots]),
                mend="correct its name, or leave it out",
            )
