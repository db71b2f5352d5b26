"""`plot_plan`: what stays of each site, and how the scores of its channels are spread."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxslim._plan import Plan
from flaxslim.errors import PlotError, nearest
from flaxslim.plots import _style
from flaxslim.plots._widths import SiteWidth, by_unit, shortened, widths
from flaxslim.posttraining._report import Report
from flaxslim.training._sparsity import Sparsity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 200  # columns of the heat map; more are not told apart on a page
_ROW, _FRAME = 0.26, 0.75  # inches: of a site, and of what is around the sites of a panel


def plot_plan(
    source: Plan | Report,
    *,
    scores: Sparsity | Mapping[str, Any] | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw the width of each site before (light) and after (dark), a panel for each unit.

    Args:
      source: a plan, or the report of `prune`, whose errors are written beside the bars.
      scores: `(f,)` or `(s, f)` for each site, by the path of its second kernel, such as what
        `sparsity` gives. Beside the bars they become a heat map: of each site the largest score
        first, relative to it; a line shows how many stay. What is not finite is left blank.
      title: above the picture.

    Returns a figure of matplotlib (`figure.savefig("plan.svg")`). Raises `PlotError` if there are
    no sites, or scores do not fit them, and `FlaxslimError` if matplotlib is not installed.

    >>> from flaxslim import Pair, Spec, plan
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> tree = {"up": {"kernel": np.ones((3, 4))}, "down": {"kernel": np.diag([1.0, 0, 0, 2.0])}}
    >>> figure = plot_plan(plan(tree, spec=MLP))
    >>> figure.axes[0].get_xlabel()
    'width, channels'
    """
    sites = widths(source)
    if not sites:
        raise PlotError("there are no sites to draw", mend="give a plan that has some")
    known = None if scores is None else _scores(sites, scores)
    panels = by_unit(sites)
    heights = [_FRAME + _ROW * len(own) for own in panels.values()]
    with _style.drawing(sum(heights) + 0.35 * (title is not None)) as figure:
        grid = figure.subplots(
            len(panels), 1 if known is None else 2, squeeze=False, height_ratios=heights
        )
        for row, (unit, own) in zip(grid, panels.items(), strict=True):
            _bars(row[0], own, unit, room=known is None)
            if known is not None:
                _heat(figure, row[1], own, known, unit)
        if title is not None:
            figure.suptitle(title)
    return figure


def _bars(panel: Any, sites: Sequence[SiteWidth], unit: str, *, room: bool) -> None:
    """A bar for each site; how much stays is written beside it."""
    labels, pattern = shortened([site.path for site in sites])
    colour = _style.COLOURS[unit != "channels"]
    light = _style.lighter(colour)
    largest = max(site.before for site in sites)
    for at, site in enumerate(sites):
        panel.barh(at, site.before, color=light, height=0.75)
        panel.barh(at, site.after, color=colour, height=0.75)
        words = f"{site.after:,} of {site.before:,}"
        text = f"{words}, {site.note}" if site.note else words
        panel.text(site.before + 0.015 * largest, at, text, va="center", fontsize=8)
    _rows(panel, labels)
    longest = max(len(site.note) for site in sites)
    # The text beside the longest bar needs room, in a narrow panel more of it.
    panel.set_xlim(0, max(largest, 1) * (1.2 + 0.012 * longest if room else 1.5 + 0.03 * longest))
    panel.locator_params(axis="x", nbins="auto" if room else 4, integer=True)
    # None where the words are, which are no widths.
    ticks = [tick for tick in panel.get_xticks() if 0 <= tick <= largest]
    panel.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    panel.set_xlabel(f"width, {unit}")
    panel.set_ylabel("site" if not pattern else "layer" if _numbers(labels) else "*")
    panel.set_title(f"{pattern or unit}{'; dark: what stays' if room else ''}")
    panel.grid(axis="x")


def _rows(panel: Any, labels: Sequence[str]) -> None:
    """The first site is at the top."""
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)


def _numbers(labels: Sequence[str]) -> bool:
    return all(label.isdigit() for label in labels)


# --- scores -----------------------------------------------------------------------------------


def _scores(
    sites: Sequence[SiteWidth], given: Sparsity | Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The scores `(s, f)` of each site, checked."""
    if isinstance(given, Sparsity):
        given = {path: site.score for path, site in given.sites.items()}
    found = {}
    for site in sites:
        if site.path not in given:
            raise PlotError(
                "a site has no scores",
                path=site.path,
                near=nearest(site.path, given),
                mend="give scores of the same tree, by the paths of the second kernels",
            )
        score = np.atleast_2d(np.asarray(given[site.path], float))
        if score.ndim != 2 or score.shape[1] != site.before:
            raise PlotError(
                "the scores of a site are not one for each of its channels",
                path=site.path,
                seen=f"shape {np.shape(given[site.path])}",
                expected=f"{site.before} {site.unit}",
                mend="take plan and scores at the same step: after a shrink there are fewer",
            )
        found[site.path] = score
    return found


def _profile(score: np.ndarray) -> np.ndarray:
    """Scores `(s, f)`, the largest first and relative to it, as `(s, bins)`; NaN at the end."""
    score = np.where(np.isfinite(score), score, np.nan)
    ordered = -np.sort(-score, axis=1)
    largest = np.nanmax(np.abs(ordered), initial=0.0) or 1.0
    bins = min(_BINS, score.shape[1])
    # The middle of each bin stands for it: a mean would hide where the dead begin.
    at = ((np.arange(bins) + 0.5) * score.shape[1] / max(bins, 1)).astype(int)
    return ordered[:, at] / largest


def _heat(
    figure: Any,
    panel: Any,
    sites: Sequence[SiteWidth],
    scores: Mapping[str, np.ndarray],
    unit: str,
) -> None:
    from matplotlib.colors import PowerNorm

    profiles = [_profile(scores[site.path]) for site in sites]
    # Scores such as movement's may be negative; all others have zero as their least. Of these a
    # few are often far above the rest, which a linear scale would leave all dark.
    least = min(0.0, *(float(np.nanmin(own, initial=0.0)) for own in profiles))
    scale = PowerNorm(1.0 if least < 0 else 0.5, vmin=least, vmax=1.0)
    shown = None
    for at, (site, profile) in enumerate(zip(sites, profiles, strict=True)):
        if not site.before:
            continue
        shown = panel.imshow(
            profile,
            extent=(0, 100, at + 0.375, at - 0.375),
            aspect="auto",
            interpolation="nearest",
            cmap=_style.HEAT,
            norm=scale,
        )
        stays = 100 * site.after / site.before
        for width, colour in ((3.0, "black"), (1.4, "white")):  # seen on any colour
            panel.plot([stays, stays], [at - 0.45, at + 0.45], color=colour, linewidth=width)
    _rows(panel, [""] * len(sites))
    panel.set_xlim(0, 100)
    panel.set_xlabel(f"{unit}, the largest score first, %")
    panel.set_title("scores; line: as many stay")
    if shown is not None:
        figure.colorbar(shown, ax=panel, label="score / largest of the site")
