"""How every picture looks, and how one gets into a file."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxslim.errors import FlaxslimError, PlotError, TargetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = 7.2  # the width of every picture: of a page of the docs
KINDS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which those who are colour-blind tell apart, without the yellow that is
# too light for a line; each method has a marker of its own besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#666666"
HEAT = "cividis"  # made for those who are colour-blind
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "figure.titlesize": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.dpi": 120,
    # The same figure gives the same bytes.
    "svg.hashsalt": "flaxslim",
}


@contextlib.contextmanager
def drawing(height: float) -> Iterator["Figure"]:
    """A new figure, so many inches high; what is drawn within is in our style.

    Raises `FlaxslimError` if matplotlib is not installed.
    """
    try:
        # Not pyplot: figures made there stay in its memory, and it asks for a screen.
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlaxslimError(
            "pictures need matplotlib, which is not installed",
            mend="pip install 'flaxslim[plots]'; or ask for no picture",
        ) from error
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(INCHES, height), layout="constrained")


def lighter(colour: str) -> tuple[float, ...]:
    """The same hue, near white: no alpha, through which the grid would be seen.

    >>> lighter("#000000")
    (0.75, 0.75, 0.75)
    """
    return tuple(0.75 + 0.25 * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def write(figure: "Figure", path: Path) -> None:
    """The figure as a .png, .svg or .pdf, without the time at which it was made."""
    import matplotlib

    from flaxslim.checkpoint._atomic import fresh_file

    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context(STYLE), fresh_file(path) as new:
        figure.savefig(new, format=path.suffix[1:], metadata=date.get(path.suffix))


def check(path: Path) -> None:
    """Raise `FlaxslimError` if no picture can be written there, before hours are spent."""
    from flaxslim.checkpoint._atomic import check_file

    with drawing(1):
        pass
    if path.suffix not in KINDS:
        raise FlaxslimError(
            "a picture is .png, .svg or .pdf", path=str(path), mend="name such a file"
        )
    if not path.resolve().parent.is_dir():
        raise TargetError("there is no such folder", path=str(path.resolve().parent))
    check_file(path, overwrite=True, ours=_is_picture, what="a picture")


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith((b"\x89PNG", b"<?xml", b"<svg", b"%PDF"))


def number(row: Any, name: str, what: str) -> float:
    """A number of a row, also where it is text, as in a table that was read from a file."""
    try:
        return float(row[name])
    except (KeyError, TypeError, ValueError) as error:
        raise PlotError(
            f"a row of the {what} has no number {name!r}",
            seen=str(row)[:80],
            mend="give every row the same names",
        ) from error


def named(found: Sequence[str], most: int = 4) -> str:
    """Some names, for a message."""
    return ", ".join(found[:most]) + (" ..." if found[most:] else "")
