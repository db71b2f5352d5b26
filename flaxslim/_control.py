"""The proof put to the test: wrong cuts on purpose, whose difference must stand out.

All are made in the parameters after the cut, at unchanged shapes: so nothing is compiled again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax.numpy as jnp
import numpy as np

from flaxslim._compare import Reference, compare
from flaxslim._dead import first_norms, second_norms
from flaxslim._proof import Control, ControlRow
from flaxslim._spec import Site
from flaxslim._tree import flatten, replace
from flaxslim.errors import UnsupportedTreeError

MOST_SITES = 64  # as many are cut wrongly on purpose: a run of the model each

T = TypeVar("T")


class Run(Protocol):
    """A compiled model: called with parameters it gives its outputs by path."""

    params: Any

    def __call__(self, params: Any = None) -> dict[str, Any]: ...


def norms(site: Site, leaves: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each channel: its columns and biases (parts, s, f), and all rows that read it (s, f)."""
    columns, biases = first_norms(site, leaves)
    return columns, biases, np.hypot.reduce(second_norms(site, leaves))


def bar(measured: float, tolerance: float, first: Mapping[str, Reference]) -> float:
    """What the difference of a wrong cut must exceed.

    The tolerance, or the cut would have passed for right; and a hundred times what was measured,
    so that it is no rounding. In 16 bits, where rounding alone makes a percent and no cut can
    make a hundred times that, twice what was measured.
    """
    narrow = any(jnp.finfo(a.dtype).bits < 32 for a in first.values() if a.inexact)
    return max(tolerance, (2 if narrow else 100) * measured)


def _spread(items: Sequence[T], what: str) -> tuple[Sequence[T], list[str]]:
    """At most `MOST_SITES` of them, evenly spread, and a note if these are not all."""
    if len(items) <= MOST_SITES:
        return items, []
    chosen = np.linspace(0, len(items) - 1, MOST_SITES).round().astype(int)
    note = f"the control tried {MOST_SITES} of {len(items)} {what}, evenly spread"
    return [items[i] for i in chosen], [note]


def _difference(run: Run, first: Mapping[str, Reference], leaves: Mapping[str, Any]) -> float:
    """What it makes of the outputs to put these leaves in the places of the right ones."""
    wrong = run(replace(run.params, leaves))
    return max(compare(first[name], x).relative for name, x in wrong.items())


# --- channels, where a spec says what one is --------------------------------------------------


def by_site(
    run: Run,
    first: Mapping[str, Reference],
    sites: tuple[Site, ...],
    before: tuple[tuple[Site, ...], Any],
    bar: float,
    measured: float,
) -> tuple[Control, list[str]]:
    """A wrong cut at each site (at most `MOST_SITES`, evenly spread), and notes.

    Args:
      before: the sites before the cut, and the parameters. A site that lives there and has no
        living channel after, while no output differs by more than `measured`, is not reached.
    """
    leaves = flatten(run.params)
    ranks = {site.second.path: _living(site, leaves) for site in sites}
    notes, rows = [], []
    if silent := [path for path, living in ranks.items() if not len(living)]:
        notes.append(
            f"{len(silent)} of {len(sites)} sites have no living channel, so no wrong cut can be "
            "made there"
        )
        old = flatten(before[1])
        for site in before[0]:
            if site.second.path in silent and (count := _surely_living(site, old)):
                rows.append(
                    ControlRow(
                        site=site.second.path,
                        channels=count,
                        living=count,
                        relative=measured,
                        seen=False,
                    )
                )
    tried, more = _spread([site for site in sites if len(ranks[site.second.path])], "sites")
    rows += [_wrong_cut(run, first, site, ranks[site.second.path], bar) for site in tried]
    return Control(rows=tuple(rows), sites=len(sites), bar=bar), notes + more


def _living(site: Site, leaves: Mapping[str, Any]) -> np.ndarray:
    """The channels that something reads, those that weigh most first.

    Of a stacked site they are counted through, row after row.
    """
    columns, biases, rows = norms(site, leaves)
    strength = (rows * np.prod(np.hypot(columns, biases), axis=0)).ravel()
    second = rows.ravel()
    order = np.lexsort((-second, -strength))
    return order[second[order] > 0]


def _surely_living(site: Site, leaves: Mapping[str, Any]) -> int:
    """How many channels are alive whatever the activation: no column and no row of them is zero."""
    columns, _, second = norms(site, leaves)
    return int(((columns > 0).all(axis=0) & (second > 0)).sum())


def _wrong_cut(
    run: Run, first: Mapping[str, Reference], site: Site, ranks: np.ndarray, bar: float
) -> ControlRow:
    """One channel taken away, another if it is silent on these inputs (relu), then more."""
    leaves, axis, stack = flatten(run.params), site.pair.axis, site.second.axes.stack
    best = (-1.0, 0)
    for channels in _trials(ranks):
        mask = np.zeros(site.rows * site.size, bool)
        mask[channels] = True
        mask = mask.reshape(site.rows, site.size)
        cut = {t.path: t.axes.zero(leaves[t.path], axis, mask, stack) for t in site.reading}
        relative = _difference(run, first, cut)
        best = max(best, (relative, len(channels)), key=lambda found: found[0])
        if relative > bar:
            break
    relative, count = best
    return ControlRow(
        site=site.second.path,
        channels=count,
        living=len(ranks),
        relative=relative,
        seen=relative > bar,
    )


def _trials(ranks: np.ndarray) -> Iterator[np.ndarray]:
    """The four strongest, one at a time; then the strongest eighth; then all."""
    sizes = [(i, i + 1) for i in range(min(4, len(ranks)))]
    sizes += [(0, n) for n in (len(ranks) // 8, len(ranks)) if n > 1]
    for start, stop in dict.fromkeys(sizes):
        yield ranks[start:stop]


# --- tensors, where none does -----------------------------------------------------------------


def by_tensor(
    run: Run, first: Mapping[str, Reference], before: Any, bar: float
) -> tuple[Control | None, list[str]]:
    """Each tensor that has another shape than `before` zeroed as a whole, and notes.

    Coarser than `by_site`: it shows that the inputs reach what was cut, not that they reach one
    channel. None if no tensor can be put to this test.
    """
    try:
        old, leaves = flatten(before), flatten(run.params)
    except UnsupportedTreeError:  # a bare array has no path
        return None, []
    changed = [
        path for path, leaf in leaves.items() if path in old and np.shape(old[path]) != leaf.shape
    ]
    living = [path for path in changed if bool(jnp.any(leaves[path] != 0))]
    notes = []
    if len(living) < len(changed):
        notes.append(
            f"{len(changed) - len(living)} of {len(changed)} tensors that were cut are zero, so "
            "to zero them is no test"
        )
    if not living:
        return None, notes
    notes.append(
        "no spec is known, so whole tensors that were cut were zeroed for the control; spec= "
        "gives a finer one"
    )
    tried, more = _spread(living, "tensors")
    rows = []
    for path in tried:
        relative = _difference(run, first, {path: jnp.zeros_like(leaves[path])})
        rows.append(
            ControlRow(
                site=path, channels=None, living=None, relative=relative, seen=relative > bar
            )
        )
    return Control(rows=tuple(rows), sites=len(changed), bar=bar), notes + more
