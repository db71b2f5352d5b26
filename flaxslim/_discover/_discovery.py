"""What was discovered of a function: the spec, the groups behind it, and why not more."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim._discover._function import Function, Walked, walked
from flaxslim._discover._groups import Group, Verdict, groups
from flaxslim._discover._keys import with_keys
from flaxslim._discover._pairs import Paired, written
from flaxslim._discover._retrace import Difference, checked
from flaxslim._spec import Spec
from flaxslim.errors import DiscoveryError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discovery:
    """What a trace of a function shows of the axes of its parameters.

    Attributes:
      pairs: the pairs of the spec, each with the groups that it stands for.
      groups: all groups of axes, with the verdict on each.
      shapes: the shapes of the parameters.
      notes: what a user must know: keys that were not found, widths that could not be tried.
      unknown: primitives without a rule, and where they are.
    """

    pairs: tuple[Paired, ...]
    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]
    unknown: Mapping[str, str]

    def spec(self, name: str) -> Spec:
        """The exact groups as a spec; `DiscoveryError` if there are none."""
        if not self.pairs:
            raise DiscoveryError(
                f"nothing in the {len(self.shapes)} tensors can be cut exactly",
                seen="; ".join(self._reasons()[:3]) or None,
                mend="flaxslim.explain(fn, params, None, *inputs) says of each axis why not",
            )
        return Spec(name=name, pairs=tuple(pair for pair, _ in self.pairs))

    def _reasons(self) -> list[str]:
        counts = Counter(str(group.reason) for group in self.groups if group.reason)
        return [why for why, _ in counts.most_common()]

    def __str__(self) -> str:
        kinds = "1 kind" if len(self.pairs) == 1 else f"{len(self.pairs)} kinds"
        lines = [f"{kinds} of pairs that can be cut exactly"]
        for pair, own in self.pairs:
            sizes = sorted({group.size for group in own})
            lines.append(f"  {len(own)} x {pair}, {' or '.join(map(str, sizes))} {pair.unit}")
        for verdict, title in _TITLES.items():
            chosen = [group for group in self.groups if group.verdict is verdict]
            lines += [title] if chosen else []
            lines += [f"  {line}" for line in _counted(chosen)]
        lines += [f"no rule for {name}: {place}" for name, place in self.unknown.items()]
        return "\n".join([*lines, *self.notes])

    def explain(self, path: str) -> str:
        """With what each axis of a tensor is tied, whether it can be cut, and why not."""
        if path not in self.shapes:
            near = [name for name in self.shapes if name.endswith(f"/{path}")]
            if len(near) != 1:
                raise DiscoveryError(
                    f"{len(near)} parameters end so" if near else "there is no such parameter",
                    path=path,
                    near=near[:3] or nearest(path, self.shapes),
                    mend="give the whole path"
                    if near
                    else "give the path of one of the floating point tensors",
                )
            (path,) = near
        shape = self.shapes[path]
        parts = [f"{path} {shape}."]
        for axis, size in enumerate(shape):
            parts += list(self._axis(path, axis, size))
        return " ".join(parts)

    def _axis(self, path: str, axis: int, size: int) -> Iterator[str]:
        own = [
            group
            for group in self.groups
            if any(m.path == path and m.dimension == axis for m in group.members)
        ]
        if not own:
            yield f"Axis {axis} has size {size}."
        for group in own:
            factor = "" if group.size == size else f", of which {group.size}"
            yield f"Axis {axis} ({size}{factor}) {_ties(group, path)}{self._verdict(group, path)}."

    def _verdict(self, group: Group, path: str) -> str:
        pair = next((pair for pair, own in self.pairs if group in own), None)
        if pair is not None:
            act = f", with activation {pair.activation}" if pair.activation else ""
            rows = " and ".join(group.seconds)
            return f" It can be cut exactly: channels go whose rows in {rows} are zero{act}"
        if group.verdict is Verdict.INNER:
            return (
                " It could be cut exactly, but lies inside of another axis: it is not in the spec"
            )
        reason = group.reason
        why = str(reason) if reason else "no axis pattern can say it"
        if group.verdict is Verdict.APPROXIMATE:
            return f" It can be cut only approximately: {why}"
        return f" It cannot be cut: {why}"


_TITLES = {
    Verdict.INNER: "exact, but inside of another axis",
    Verdict.APPROXIMATE: "approximate only",
    Verdict.UNUSED: "not summed over",
    Verdict.REFUSED: "refused",
}


def _ties(group: Group, path: str) -> str:
    others = [p for p in group.paths if p != path]
    if not others:
        return "is tied with no other."
    shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    return f"is tied with {shown}."


def _counted(chosen: Sequence[Group]) -> list[str]:
    """One line for each reason, with an example."""
    by_reason: dict[str, list[Group]] = {}
    for group in chosen:
        why = str(group.reason) if group.reason else ""
        by_reason.setdefault(why, []).append(group)
    return [
        f"{len(own)} x {own[0].paths[0]} axis {own[0].members[0].dimension} ({own[0].size})"
        + (f": {why}" if why else "")
        for why, own in by_reason.items()
    ]


def discovered(
    fn: Function, cfg: Any = None, rebuild: Callable[[Any], Any] | None = None
) -> Discovery:
    """Trace a function, group the axes of its parameters, and judge them."""
    seen = walked(fn)
    found = groups(seen.walk, seen.dims)
    made = written(found, seen)
    pairs, notes, refused = _tried(seen, made.pairs)
    replaced = {
        **{g: g.refused(why, g.sums[0].place) for g, why in made.failed.items()},
        **refused,
    }
    pairs, more = with_keys(pairs, cfg, rebuild, fn.params)
    if seen.unused:
        some = ", ".join(seen.unused[:3])
        notes.append(f"the function does not use {len(seen.unused)} of the parameters: {some}")
    return Discovery(
        pairs=tuple(pairs),
        groups=tuple(replaced.get(group, group) for group in found),
        shapes={path: tuple(np.shape(fn.params[path])) for path in seen.dims},
        notes=(*notes, *more),
        unknown={name: str(place) for name, place in seen.walk.unknown.items()},
    )


# At most so many traces at other widths, of a model whose pairs do not fold and do not run so.
_TRACES = 64


def _tried(
    seen: Walked, pairs: Sequence[Paired]
) -> tuple[list[Paired], list[str], dict[Group, Group]]:
    """The pairs at whose other widths the function is the same, or cannot run at all.

    All at once; and where that fails, by halves.
    """
    kept: list[Paired] = []
    stiff = 0
    refused: dict[Group, Group] = {}
    left, traces = [list(pairs)] if pairs else [], 0
    while left:
        chosen, traces = left.pop(0), traces + 1
        own = [group for _, members in chosen for group in members]
        result = checked(seen, own)
        if result is not None and len(chosen) > 1 and traces < _TRACES:
            left += [chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]]
            continue
        for pair, members in chosen:
            doubts = [g.doubt for g in members if g.doubt is not None] if result else []
            against = result if isinstance(result, Difference) else next(iter(doubts), None)
            if against is not None:
                refused |= {g: g.refused(against.why, against.place) for g in members}
                continue
            kept.append((pair, members))
            stiff += result is not None
    notes = []
    if stiff:
        notes.append(
            f"the function does not run at another width of {stiff} of its pairs, as a module with "
            "sizes of its own does not: a number that follows from the width would not be seen, so "
            "prove each cut with flaxslim.verify"
        )
    order = {id(members): number for number, (_, members) in enumerate(pairs)}
    return sorted(kept, key=lambda one: order[id(one[1])]), notes, refused
