"""The width of each site before and after, whatever value tells of it."""

import dataclasses
from collections.abc import Iterable, Sequence

from flaxslim._plan import Plan
from flaxslim.errors import PlotError
from flaxslim.posttraining._report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteWidth:
    """What stays at one site.

    Attributes:
      path: that of the second kernel.
      unit: what is counted, "channels" or "heads".
      before, after: how many there were, and are; of a stacked site in each of its rows.
      note: what else is to be said of it, or nothing.
    """

    path: str
    unit: str
    before: int
    after: int
    note: str = ""


def widths(source: Plan | Report) -> tuple[SiteWidth, ...]:
    """The sites of a plan, or of what `prune` did."""
    if isinstance(source, Plan):
        return tuple(
            SiteWidth(
                path=cut.site.second.path,
                unit=cut.site.pair.unit,
                before=cut.site.size,
                after=cut.width,
            )
            for cut in source.cuts
        )
    if isinstance(source, Report):
        return tuple(
            SiteWidth(
                path=row.path,
                unit=row.unit,
                before=row.before,
                after=row.after,
                note=f"error {row.measured:.3g}",
            )
            for row in source.rows
        )
    raise PlotError(
        "this tells of no widths",
        seen=type(source).__name__,
        expected="a Plan, or the Report of prune",
        mend="pass flaxslim.plan(params, cfg), or what prune(..., report=...) was given",
    )


def by_unit(sites: Iterable[SiteWidth]) -> dict[str, list[SiteWidth]]:
    """The sites whose widths are of one kind, and can be compared."""
    found: dict[str, list[SiteWidth]] = {}
    for site in sites:
        found.setdefault(site.unit, []).append(site)
    return found


def shortened(paths: Sequence[str]) -> tuple[list[str], str]:
    """What tells paths apart, and the pattern that they share; empty if they share nothing.

    >>> shortened(["params/layer/0/up/kernel", "params/layer/1/up/kernel"])
    (['0', '1'], 'layer/*/up')
    >>> shortened(["down/kernel"])
    (['down'], '')
    """
    parts = [path.removeprefix("params/").removesuffix("/kernel").split("/") for path in paths]
    if len(parts) < 2:
        return ["/".join(own) for own in parts], ""
    room = min(map(len, parts)) - 1  # something is left of each
    head = _shared(parts, room)
    tail = _shared([own[::-1] for own in parts], room - head)
    labels = ["/".join(own[head : len(own) - tail]) for own in parts]
    shared = [*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]
    return labels, "/".join(shared) if head or tail else ""


def _shared(parts: Sequence[Sequence[str]], most: int) -> int:
    """With how many equal words all of them begin."""
    for count, words in enumerate(zip(*parts, strict=False)):
        if count >= most or len(set(words)) > 1:
            return count
    return most
