"""The width policies: which sites share a width, and which width a config can say for them."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from flaxslim import _config
from flaxslim._config import Width
from flaxslim._dead import Marks
from flaxslim._multiples import Multiples
from flaxslim._pair import Pair
from flaxslim._plan import PER_LAYER
from flaxslim._spec import Site
from flaxslim._widths import Cluster, Target, need

WIDTHS = ("uniform", "per_layer")


def says(condition: str | None, pair: Pair, cfg: Any) -> bool | None:
    """Whether a config says a condition of a pair: `key`, or `key=value` with wildcards.

    None if there is no such key, which is no answer; of a key that ends in "?" it is a no.
    """
    if condition is None:
        return False
    key, _, value = condition.partition("=")
    key, optional = key.removesuffix("?"), key.endswith("?")
    if not _config.has(cfg, pair.config + key):
        return False if optional else None
    said = _config.read(cfg, pair.config + key)
    return fnmatchcase(str(said).lower(), value.lower()) if value else bool(said)


def clusters(sites: Sequence[Site], marks: Mapping[str, Marks]) -> list[Cluster]:
    """Sites that must keep the same channels, together."""
    tied: dict[Any, list[Site]] = {}
    for number, site in enumerate(sites):
        key = number if site.tied is None else (site.tied, site.size)
        tied.setdefault(key, []).append(site)
    return [
        Cluster(
            sites=tuple(members),
            living=np.logical_or.reduce([~marks[site.second.path].dead for site in members]),
            weak=np.logical_or.reduce([marks[site.second.path].weak for site in members]),
        )
        for members in tied.values()
    ]


def sharing(found: Sequence[Cluster], width: str, sized: bool) -> list[list[Cluster]]:
    """The clusters that share a width."""
    if width == "per_layer":
        return [[cluster] for cluster in found]
    groups: dict[Any, list[Cluster]] = {}
    for cluster in found:
        site = cluster.sites[0]
        expression = site.pair.width_expression if sized else None
        # Without a key nothing says which sites must agree: those of one pair and size do.
        key = expression.label if expression else (site.pair, site.size)
        groups.setdefault(key, []).append(cluster)
    return list(groups.values())


def target(
    members: Sequence[Cluster],
    cfg: Any,
    width: str,
    multiples: Multiples,
    least: int,
    shared: Mapping[str, str],
) -> tuple[Target, str | None]:
    """The common width of some clusters, and the reason if no config can say a smaller one.

    `least` is what a layer keeps in any case if each has its own width. `shared` says why a
    key cannot change with them.
    """
    site = members[0].sites[0]
    if (scaled := says(site.pair.scaled_by, site.pair, cfg)) is not False:
        dead = not all(cluster.living.all() for cluster in members)
        why = f"this class scales its heads by their number ({site.pair.scaled_by}): none can go"
        if scaled is None:
            key = site.pair.config + str(site.pair.scaled_by).partition("=")[0]
            why = (
                "this class may scale its heads by their number, and then none can go: pass a "
                f"config that says {key}"
            )
        return Target(width=site.size), why if dead else None
    if width == "per_layer":
        # Groups of unequal size need a class that carries them, and a config to say them in.
        alike = not site.pair.ragged or bool(site.stack) or cfg is None or multiples.groups > 1
        return _need(members, multiples, even=bool(site.groups) and alike, least=least), None
    return _uniform(members, cfg, multiples, shared)


def _need(members: Sequence[Cluster], multiples: Multiples, *, even: bool, least: int) -> Target:
    return need(
        members, even=even, least=least, multiple_of=multiples.channels, groups_of=multiples.groups
    )


def _uniform(
    members: Sequence[Cluster], cfg: Any, multiples: Multiples, shared: Mapping[str, str]
) -> tuple[Target, str | None]:
    """What the plain key of a config can say."""
    site = members[0].sites[0]
    sizes = {s.size for cluster in members for s in cluster.sites}
    full = Target(width=max(sizes))
    laid_out = f"{PER_LAYER} records it in a layout, which can say any"
    expression = site.pair.width_expression if cfg is not None else None
    if expression is not None and len(sizes) > 1:
        if all(cluster.living.all() for cluster in members):
            return full, None
        return full, (
            f"the layers differ in {expression} already, so that they cannot share one; {laid_out}"
        )
    # No stock class can be built at width 0, so one dead channel stays in that case.
    wish = _need(members, multiples, even=bool(site.groups), least=1)
    if expression is None or wish.width == site.size:
        return wish, None
    if why := _unsaid(site, expression, wish.width, shared):
        return full, f"{why}; {laid_out}"
    if site.groups:
        return wish, None
    step = expression.step(cfg)
    multiple = math.lcm(multiples.channels, step)
    and_of = f", and the mesh or multiple_of asks for {multiple}" if multiple > step else ""
    found = need(members, even=False, least=1, multiple_of=multiple)
    if found.width == site.size:
        return full, (
            f"{wish.width} of {site.size} {site.pair.unit} are needed, but the config "
            f"({expression}) can only say multiples of {step}{and_of}; {laid_out}"
        )
    return found, None


def _unsaid(site: Site, expression: Width, wish: int, shared: Mapping[str, str]) -> str | None:
    """Why no plain key can say a smaller width, whatever it is."""
    if site.pair.fixed or expression.key is None:
        how = "hard-codes its width"
        if site.pair.fixed:
            heads = site.pair.axis == "h"
            how = "ties its heads to its hidden size" if heads else "ties this width to other sizes"
        return (
            f"this class {how} ({expression} = {site.size}): its config cannot say the "
            f"{wish} {site.pair.unit} that are needed"
        )
    return f"{expression} {shared[expression.key]}" if expression.key in shared else None
