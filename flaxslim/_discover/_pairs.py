"""Groups written as the pairs of a spec, as a person would have written them.

One group is one `Pair` at a concrete place; pairs that differ in the numbers of their layers alone
are one, with `{i}`. Whatever is written is bound to the tree again, and only what binds to the very
tensors of its groups is kept.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flaxslim._discover._formula import formula
from flaxslim._discover._function import Walked
from flaxslim._discover._groups import Group, Verdict
from flaxslim._discover._writer import Unwritable, pair_of
from flaxslim._pair import Pair
from flaxslim._roots import root_regex
from flaxslim._spec import Spec
from flaxslim.errors import FlaxslimError

# A pair, and the groups that it stands for.
Paired = tuple[Pair, tuple[Group, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What became of the exact groups: pairs with the groups that each stands for, or why none."""

    pairs: tuple[Paired, ...]
    failed: Mapping[Group, str]


def written(found: Sequence[Group], seen: Walked) -> Written:
    """The exact groups as pairs, folded over the layers."""
    within = _within(found)
    heads = {*within.values()}
    failed: dict[Group, str] = {}
    single: dict[Group, Pair] = {}
    folded: dict[Pair, list[Group]] = {}
    taken: set[str] = set()
    for group in found:
        if group.verdict is not Verdict.EXACT or group in heads:
            continue
        if group.seconds[0] in taken:  # a plan knows a pair by its second layer
            failed[group] = "its second layer is that of another pair"
            continue
        try:
            single[group] = pair_of(group, within.get(group), seen)
            taken.add(group.seconds[0])
            folded.setdefault(_folded(group, single[group], seen), []).append(group)
        except (Unwritable, FlaxslimError) as error:
            failed[group] = str(error).partition("\n")[0]
    pairs: list[Paired] = []
    for pair, members in folded.items():
        if _misfit(pair, members, seen.leaves) is None:
            pairs.append((pair, tuple(members)))
            continue
        for group in members:  # the same names hold something else elsewhere
            own = dataclasses.replace(single[group], at="/" + single[group].at)
            misfit = _misfit(own, [group], _beside(group, seen))
            if misfit is None:
                pairs.append((own, (group,)))
            else:
                failed[group] = misfit
    return Written(pairs=tuple(pairs), failed=failed)


def _misfit(pair: Pair, groups: Sequence[Group], leaves: Mapping[str, Any]) -> str | None:
    """Why a pair does not bind to the tensors of these groups, all of them and no others."""
    try:
        sites = Spec(name="DISCOVERED", pairs=pair).sites(_reached(pair, leaves))
    except FlaxslimError as error:
        return error.problem
    bound: dict[str, set[tuple[str, int]]] = {}
    for site in sites:
        axes = {(t.path, t.axes.dimension(site.axis(t))) for t in site.cut}
        if len(axes) < len(site.cut):
            return "one of its tensors would be cut twice, as a bias and as another layer"
        bound.setdefault(site.tied or site.second.path, set()).update(axes)
    wanted = [sorted({(m.path, m.dimension) for m in group.members}) for group in groups]
    if sorted(map(sorted, bound.values())) != sorted(wanted):
        return "the names of its tensors stand for others too"
    return None


def _reached(pair: Pair, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """All that a pair can mean: what is below its root, and what is called as its tables are."""
    root = re.compile(root_regex(pair))
    tables = {re.split("[/:]", name)[-1] for name in pair.tables}
    return {
        path: leaf
        for path, leaf in leaves.items()
        if root.match(path) or path.rpartition("/")[2] in tables
    }


def _beside(group: Group, seen: Walked) -> dict[str, Any]:
    """The tensors of a group, and those in the same layers."""
    layers = {path.rpartition("/")[0] for path in group.paths}
    return {p: seen.leaves[p] for layer in layers for p in seen.folders[layer]}


def _with_places(pair: Pair) -> Pair:
    """The same pair at `{i}` instead of a number."""
    letters = iter("ijkmnopq")
    at = re.sub(
        r"(?<![^/_])\d+(?=/|$)", lambda _: f"{{{next(letters, 'r')}}}", pair.at
    )  # layer/0, block_0; but dinov2
    at = f"{at}/".removeprefix("params/").rstrip("/")
    return dataclasses.replace(pair, at=at)


# --- layers that share a table ----------------------------------------------------------------


def _folded(group: Group, pair: Pair, seen: Walked) -> Pair:
    """The pair of a group for any layer."""
    layers = _by_layer(group)
    if not layers:
        return _with_places(pair)
    try:
        pairs = [_with_places(pair_of(layer, None, seen)) for layer in layers]
    except (Unwritable, FlaxslimError):
        return _with_places(pair)
    tables = {name: axes for one in pairs for name, axes in one.tables.items()}
    first, *others = (dataclasses.replace(one, tables=tables) for one in pairs)
    return _with_places(pair) if any(other != first for other in others) else first


def _by_layer(group: Group) -> list[Group]:
    """A group that spans layers by them: those of T5 share a table of position biases.

    Empty if its layers are not alike.
    """
    split = [second.split("/") for second in group.seconds]
    moving = [i for i, names in enumerate(zip(*split, strict=False)) if len({*names}) > 1]
    if len(split) < 2 or len(moving) != 1 or len({len(names) for names in split}) > 1:
        return []
    at = moving[0] + 1
    places = ["/".join(names[:at]) + "/" for names in split]
    layers = []
    for place, second in zip(places, group.seconds, strict=True):
        members = tuple(
            m
            for m in group.members
            if m.path.startswith(place) or not m.path.startswith(tuple(places))
        )
        sums = group.sums_with(second)
        layers.append(dataclasses.replace(group, members=members, sums=sums, seconds=(second,)))
    return layers


# --- heads in groups --------------------------------------------------------------------------


def _within(found: Sequence[Group]) -> dict[Group, Group]:
    """For key/value groups, the heads in them: an axis always right inside of theirs.

    Both are exact: a group can go with all its heads, and each head by itself. (The values of a
    head lie in the same way inside of it, but its keys do not know of them: see `_groups`.)
    """
    own = {group.atom: group for group in found}
    within: dict[Group, Group] = {}
    for inner in found:
        if inner.verdict is not Verdict.INNER:
            continue
        outers = {
            dims[m.factor - 1] if m.factor else None
            for m in inner.members
            for dims in [inner.factors[m.path, m.dimension]]
        }
        outer = own.get(next(iter(outers))) if len(outers) == 1 else None  # pyright: ignore
        if outer is None or outer.verdict is not Verdict.EXACT or inner.seconds != outer.seconds:
            continue
        firsts = {source.path for source in formula(outer).sources}
        if firsts and not firsts & {*inner.paths}:
            within[outer] = inner
    return within
