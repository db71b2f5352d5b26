"""Pictures of pruning: the widths that are left, and what is left of a metric at each size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxslim._errors import FlaxslimError, TargetError
from flaxslim.posttraining._report import Report

_FIXED = ("preset", "keep", "parameters")
_COLOURS = ("#1f6fb4", "#b4531f", "#3b8f4a", "#7a4fb0", "#444444")


def check(path: Path) -> None:
    """Raise `FlaxslimError` if no picture can be written there, before hours are spent."""
    _figure(1, 1)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise FlaxslimError(
            "a picture is .png, .svg or .pdf", path=str(path), mend="name such a file"
        )
    if not path.resolve().parent.is_dir():
        raise TargetError("there is no such folder", path=str(path.resolve().parent))


def widths(report: Report, path: Path, *, title: str) -> None:
    """Write a bar for each site: what stays, of what there was, and the error of its output."""
    figure = _figure(9, 1.2 + 0.26 * len(report.rows))
    panel = figure.subplots()
    for at, row in enumerate(report.rows):
        share = 100 * row.after / max(row.before, 1)
        colour = _COLOURS[row.unit != "channels"]
        panel.barh(at, 100, color=colour, alpha=0.15)
        panel.barh(at, share, color=colour)
        text = f"{row.after:,} of {row.before:,} {row.unit}, error {row.measured:.3f}"
        panel.text(101, at, text, va="center", fontsize=8)
    panel.set_yticks(range(len(report.rows)), [_site(row.path) for row in report.rows], fontsize=8)
    panel.set_ylim(len(report.rows) - 0.5, -0.5)
    panel.set_xlim(0, 100)
    panel.set_xlabel("what stays, %")
    panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def _site(path: str) -> str:
    return path.removeprefix("params/").removesuffix("/kernel")


def sweep(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a panel for each number that was measured; a line for each preset."""
    names = [name for name in rows[0] if name not in _FIXED]
    figure = _figure(7, 3.2 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    dense = rows[0]
    presets = list(dict.fromkeys(row["preset"] for row in rows[1:]))
    for panel, name in zip(panels, names, strict=True):
        for preset, colour in zip(presets, _COLOURS * len(presets), strict=False):
            own = [dense, *(row for row in rows if row["preset"] == preset)]
            own.sort(key=lambda row: row["parameters"])
            panel.plot(
                [row["parameters"] / 1e6 for row in own],
                [row[name] for row in own],
                marker="o",
                color=colour,
                label=preset,
            )
        panel.axhline(dense[name], color="#888888", linestyle="--", linewidth=1, label="dense")
        panel.set_ylabel(name)
        panel.grid(alpha=0.25)
    panels[0].legend()
    panels[-1].set_xlabel("parameters, millions")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    """An empty figure, of so many inches. Raises `FlaxslimError` if matplotlib is not installed."""
    try:
        # Not pyplot: figures made there stay in its memory, and it asks for a screen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlaxslimError(
            "the plot needs matplotlib, which is not installed",
            mend="pip install 'flaxslim[plots]'; or leave out --plot",
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
