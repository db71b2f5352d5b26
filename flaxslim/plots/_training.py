"""`plot_training`: how sparsity, loss and the time of a step went while a model trained."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxslim.errors import PlotError
from flaxslim.plots import _style
from flaxslim.training._sparsity import Sparsity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a row may hold: its axis label, and what it is multiplied by.
_PANELS = {
    "sparsity": ("dead channels, %", 100.0),
    "loss": ("loss", 1.0),
    "ms_per_step": ("time of a step, ms", 1.0),
}


def plot_training(
    rows: Sequence[Mapping[str, Any]],
    *,
    shrunk: Sequence[int] = (),
    title: str | None = None,
) -> "Figure":
    """Draw sparsity, loss and milliseconds of a step over the steps, a panel for each.

    Args:
      rows: the lines of the `metrics.jsonl` that `flaxslim run` writes, or rows of your own loop:
        `step`, and of `sparsity` (a share, or what `flaxslim.sparsity` gives), `loss` and
        `ms_per_step` those that you have.
      shrunk: the steps after which dead channels were cut out, as dashed lines.
      title: above the picture.

    Returns a figure of matplotlib. Raises `PlotError` if there is no row, or nothing in it to draw,
    and `FlaxslimError` if matplotlib is not installed.

    >>> rows = [{"step": 10, "loss": 0.9, "sparsity": 0.0}, {"step": 20, "loss": 0.7,
    ...          "sparsity": 0.5}]
    >>> [panel.get_ylabel() for panel in plot_training(rows, shrunk=[20]).axes]
    ['dead channels, %', 'loss']
    """
    names = [name for name in _PANELS if rows and name in rows[0]]
    if not names:
        raise PlotError(
            "there is nothing to draw",
            seen=_style.named(list(rows[0])) if rows else "no rows",
            expected=f"rows with step and one of {', '.join(_PANELS)}",
            mend="pass the lines of metrics.jsonl, each by json.loads",
        )
    steps = [_style.number(row, "step", "run") for row in rows]
    with _style.drawing(0.7 + 1.7 * len(names)) as figure:
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for panel, name, colour in zip(panels, names, _style.COLOURS, strict=False):
            label, scale = _PANELS[name]
            values = [scale * _value(row, name) for row in rows]
            # Channels die at a step, all at once; between two rows it is not known at which.
            panel.plot(
                steps,
                values,
                color=colour,
                drawstyle="steps-post" if name == "sparsity" else "default",
            )
            panel.set_ylabel(label)
            for step in shrunk:
                panel.axvline(step, color=_style.GREY, linestyle="--", linewidth=1.2)
            panel.grid()
            if name != "loss":
                panel.set_ylim(0, 100 if name == "sparsity" else None)
        panels[-1].set_xlabel("step")
        told = [title] if title else []
        told += ["dashed: dead channels are cut out"] if shrunk else []
        if told:
            figure.suptitle("; ".join(told))
    return figure


def _value(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return value.total if isinstance(value, Sparsity) else _style.number(row, name, "run")
