"""`plot_sweep`: what several methods keep of a model at each size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxslim.errors import PlotError
from flaxslim.plots import _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE = "dense"  # the row of the model before
_KEYS = ("preset", "keep", "parameters")
_LABELS = {
    "error": "distance from the dense outputs",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
}


def plot_sweep(
    rows: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] | None = None,
    reference: Mapping[str, float] | None = None,
    log: Sequence[str] = (),
    title: str | None = None,
) -> "Figure":
    """Draw a panel for each metric over the share of the parameters that is left, a line for each
    preset.

    Args:
      rows: what `flaxslim sweep --csv FILE` writes: `preset`, `keep`, `parameters`, and the
        metrics, with one row whose preset is "dense". Numbers may be text, as `csv.DictReader`
        gives them.
      metrics: which of them to draw; by default all.
      reference: values by metric that are drawn as dashed lines, such as those of a published
        result; by default those of the dense model.
      log: the metrics whose axis is logarithmic.
      title: above the picture.

    Returns a figure of matplotlib. Raises `PlotError` for rows without a dense model, a method or a
    metric, and `FlaxslimError` if matplotlib is not installed.

    >>> figure = plot_sweep([
    ...     {"preset": "dense", "keep": 1.0, "parameters": 100, "error": 0.0},
    ...     {"preset": "fast", "keep": 0.5, "parameters": 60, "error": 0.2},
    ... ])
    >>> figure.axes[0].get_xlabel()
    'parameters left, %'
    """
    dense = _dense(rows)
    names = _metrics(dense, metrics)
    presets = list(dict.fromkeys(row["preset"] for row in rows if row["preset"] != DENSE))
    if not presets:
        raise PlotError("a sweep without a method", mend="give rows of a preset besides the dense")
    with _style.drawing(0.7 + 2.4 * len(names)) as figure:
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for panel, name in zip(panels, names, strict=True):
            for number, preset in enumerate(presets):
                _line(panel, rows, dense, preset, name, number)
            _reference(panel, dense, reference, name)
            panel.set_ylabel(_LABELS.get(name, name))
            if name in log:
                _log(panel)
            panel.grid()
        panels[-1].set_xlabel("parameters left, %")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right upper", title="preset"
        )
        if title is not None:
            figure.suptitle(title)
    return figure


def _dense(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    found = [row for row in rows if row.get("preset") == DENSE]
    missing = [row for row in rows if "preset" not in row]
    if len(found) != 1 or missing:
        raise PlotError(
            "these are not the rows of a sweep",
            seen=f"{len(rows)} rows, {len(found)} of them dense, {len(missing)} without a preset",
            expected='rows with a "preset", one of which is "dense"',
            mend="pass all rows that `flaxslim sweep --csv FILE` wrote",
        )
    return found[0]


def _metrics(dense: Mapping[str, Any], asked: Sequence[str] | None) -> list[str]:
    there = [name for name in dense if name not in _KEYS]
    names = there if asked is None else list(asked)
    if not names or (unknown := [name for name in names if name not in there]):
        raise PlotError(
            "there is no such metric" if names else "the rows have no metric",
            seen=_style.named(unknown) if names else None,
            expected=_style.named(there) or "a number beside preset, keep and parameters",
            mend="leave metrics out to draw all that there are",
        )
    return names


def _share(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    whole = _style.number(dense, "parameters", "sweep")
    return 100 * _style.number(row, "parameters", "sweep") / max(whole, 1.0)


def _line(
    panel: Any,
    rows: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    preset: str,
    name: str,
    number: int,
) -> None:
    own = [row for row in rows if row["preset"] == preset]
    points = sorted(
        (_share(row, dense), _style.number(row, name, "sweep")) for row in [dense, *own]
    )
    colours, markers = _style.COLOURS, _style.MARKERS
    panel.plot(
        *zip(*points, strict=True),
        color=colours[number % len(colours)],
        # Another marker for each colour, and other pairs of them when all were had.
        marker=markers[(number + number // len(colours)) % len(markers)],
        label=preset,
    )


def _log(panel: Any) -> None:
    """A logarithmic axis with plain numbers, also within a decade, which is often all there is."""
    from matplotlib.ticker import LogFormatter

    panel.set_yscale("log")
    for which in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))


def _reference(
    panel: Any, dense: Mapping[str, Any], given: Mapping[str, float] | None, name: str
) -> None:
    values = dense if given is None else given
    if name in values:
        label = "dense" if given is None else "reference"
        value = _style.number(values, name, "reference")
        panel.axhline(value, color=_style.GREY, linestyle="--", linewidth=1.2, label=label)
