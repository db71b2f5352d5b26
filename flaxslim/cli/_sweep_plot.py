"""The picture of a sweep: what is left of a metric, over the parameters that are left."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxslim._errors import FlaxslimError

_FIXED = ("preset", "keep", "parameters")
_COLOURS = ("#1f6fb4", "#b4531f", "#3b8f4a", "#7a4fb0", "#444444")


def check(path: Path) -> None:
    """Raise `FlaxslimError` if no picture can be written there, before hours are spent."""
    _matplotlib()
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise FlaxslimError(
            "a picture is .png, .svg or .pdf", path=str(path), mend="name such a file"
        )


def plot(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write a panel for each number that was measured; a line for each preset.

    Raises `FlaxslimError` if matplotlib is not installed.
    """
    FigureCanvasAgg, Figure = _matplotlib()
    names = [name for name in rows[0] if name not in _FIXED]
    figure = Figure(figsize=(7, 3.2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
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


def _matplotlib() -> tuple[Any, Any]:
    try:
        # Not pyplot: figures made there stay in its memory, and it asks for a screen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlaxslimError(
            "the plot needs matplotlib, which is not installed",
            mend="pip install 'flaxslim[plots]'; or leave out --plot",
        ) from error
    return FigureCanvasAgg, Figure
