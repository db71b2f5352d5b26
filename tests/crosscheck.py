"""What `discover` found, held against a spec that a person wrote, and against the function."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from resized import Block, annotated, run, zeroed

from flaxslim._discover._discovery import Discovery, discovered
from flaxslim._discover._function import Function, Walked, function, walked
from flaxslim._discover._groups import Group, Verdict, groups
from flaxslim._spec import Site
from flaxslim._tree import flatten

# Along a dimension of a tensor, which channel each index belongs to.
Owners = Mapping[tuple[str, int], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Traced:
    """A function, what was discovered of it, and a walk through it whose atoms are at hand."""

    function: Function
    discovery: Discovery

    @functools.cached_property
    def walked(self) -> Walked:
        return walked(self.function)

    @functools.cached_property
    def block(self) -> Block:
        return annotated(self.walked)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        return self.discovery.spec("DISCOVERED").sites(dict(self.function.params))

    def groups(self, *verdicts: Verdict) -> list[Group]:
        """The groups with these verdicts, in the atoms of the walk."""
        chosen = {group.members for group in self.discovery.groups if group.verdict in verdicts}
        found = groups(self.walked.walk, self.walked.dims)
        return [group for group in found if group.members in chosen]


def traced(fn: Any, params: Any, *inputs: Any) -> Traced:
    own = function(fn, params, inputs)
    return Traced(own, discovered(own))


# --- against a spec ---------------------------------------------------------------------------


def owners(site: Site) -> Owners:
    """The dimensions along which a site is cut; one key/value group for all heads counts not."""
    own = {}
    for tensor in site.cut:
        axis = site.axis(tensor)
        number, count = tensor.axes.dimension(axis), tensor.axes.sizes(tensor.shape)[axis]
        if count == 1:
            continue
        channel = np.empty(tensor.shape[number], int)
        for j in range(count):
            channel[tensor.axes.flat(tensor.shape, axis, np.array([j]))[1]] = j
        own[tensor.path, number] = tuple(channel.tolist())
    return own


def matched(
    theirs: Sequence[Site], found: Sequence[Site]
) -> tuple[list[tuple[Site, Site]], list[Site], list[Site]]:
    """Sites of a spec with the discovered ones that hold them; those of either without."""
    known = [(site, owners(site)) for site in found]
    pairs, missing = [], []
    for site in theirs:
        own = owners(site)
        holder = next((other for other, more in known if own.items() <= more.items()), None)
        if holder is None:
            missing.append(site)
        else:
            pairs.append((site, holder))
    used = {id(holder) for _, holder in pairs}
    return pairs, missing, [site for site in found if id(site) not in used]


# --- against the function ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Relative to the largest output: by how much the cut differs, and what it cuts matters."""

    difference: float
    control: float


def outcome(made: Traced, params: Any, chosen: Sequence[Group], seed: int = 0) -> Outcome:
    """Zero some channels of each group in what reads them, and cut them: is it the same?

    The control cuts as well what was not zeroed.
    """
    rng = np.random.default_rng(seed)
    leaves = {path: np.asarray(x) for path, x in flatten(params).items()}
    kept = {
        group.atom: np.sort(rng.choice(group.size, rng.integers(1, group.size), replace=False))
        for group in chosen
    }
    dead = zeroed(leaves, chosen, kept)

    def outputs(params: Mapping[str, np.ndarray], **more: Any) -> list[np.ndarray]:
        return run(made.walked, params, made.function.inputs, block=made.block, **more)

    before = outputs(dead)
    return Outcome(
        difference=gap(outputs(dead, kept=kept), before),
        control=gap(outputs(leaves, kept=kept), outputs(leaves)),
    )


def gap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    largest = max(np.abs(x).max(initial=0) for x in theirs)
    return max(float(np.abs(a - b).max(initial=0)) for a, b in zip(ours, theirs, strict=True)) / (
        float(largest) or 1.0
    )


def check_cut(made: Traced, params: Any) -> Outcome:
    """All that is exact can be cut at once; if not, it is said of which group that is wrong."""
    chosen = made.groups(Verdict.EXACT, Verdict.INNER)
    whole = outcome(made, params, chosen)
    if not whole.difference < 1e-9:
        each = {group.paths: outcome(made, params, [group]).difference for group in chosen}
        wrong = {paths: by for paths, by in each.items() if not by < 1e-9}
        raise AssertionError(f"{whole.difference:.1e}: {wrong}")
    assert whole.control > 1e-3
    return whole
