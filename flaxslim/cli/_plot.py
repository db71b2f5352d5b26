"""The picture of a run: sparsity, loss and step time over the steps."""

from collections.abc import Sequence
from pathlib import Path

from flaxslim._errors import FlaxslimError
from flaxslim.cli._metrics import Row

FILE = "training.png"


def plot(rows: Sequence[Row], path: Path, *, title: str, shrunk: Sequence[int] = ()) -> None:
    """Write three panels, one above the other; dashed lines where dead channels were cut out.

    Raises `FlaxslimError` if matplotlib is not installed.
    """
    try:
        # Not pyplot: figures made there stay in its memory, and it asks for a screen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlaxslimError(
            "the plot needs matplotlib, which is not installed",
            mend="pip install 'flaxslim[plots]'; or say plot = false under [output]",
        ) from error

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [row.step for row in rows]
    panels = figure.subplots(3, 1, sharex=True)
    dead, loss, time = panels
    dead.step(steps, [100 * row.sparsity for row in rows], where="post", color="#444444")
    dead.set_ylabel("channels dead, %")
    dead.set_ylim(0, 100)
    loss.plot(steps, [row.loss for row in rows], color="#1f6fb4")
    loss.set_ylabel("loss")
    time.plot(steps, [row.ms_per_step for row in rows], color="#b4531f")
    time.set_ylabel("step, ms")
    time.set_ylim(bottom=0)
    time.set_xlabel("step")
    for panel in panels:
        panel.grid(alpha=0.25)
        for step in shrunk:
            panel.axvline(step, color="#888888", linestyle="--", linewidth=1)
    label = "; dashed: the model shrank" if shrunk else ""
    figure.suptitle(f"{title}{label}", fontsize=11)
    figure.savefig(path, dpi=120)
