"""Where results and messages go: results to stdout, progress and errors to stderr."""

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from flaxslim.errors import FlaxslimError

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


@contextmanager
def bar(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, called with what is done and what there is in all.

    Without a `unit` it counts bytes. It may be called by any thread.
    """
    from rich import progress

    counts = progress.TextColumn("{task.completed}/{task.total} " + unit)
    columns = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        counts if unit else progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=messages, transient=True) as shown:
        task = shown.add_task(text, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


# Arguments whose flags are called as they are; of `spec` and `width` only the values of a flag.
_ARGUMENT = (
    r'(?:spec="all"|width="(?:uniform|per_layer)"'
    r"|(?:keep|fields|samples|packed)=(?:\('[^()]*'\)|True|False|\d(?:[\d.]*\d)?)?)"
)
_ARGUMENTS = re.compile(rf"(?<![\w.]){_ARGUMENT}(?:, {_ARGUMENT})*")
# What Python does by an assignment, a command does.
_BY_COMMAND = {
    "make rows of the second layers zero": "flaxslim prune DIR OUT --calibration texts.txt "
    "--keep 0.7",
    "or give a threshold": "or give a --threshold",
}


def in_flags(text: str) -> str:
    """A message of the library with its arguments as the flags of the command line.

    >>> in_flags('pass width="per_layer", or keep=0.7')
    'pass --width per_layer, or --keep 0.7'
    >>> in_flags("keep= is a share; name two arrays: fields=('ids', 'my mask')")
    "--keep is a share; name two arrays: --fields ids 'my mask'"
    """
    for said, command in _BY_COMMAND.items():
        text = text.replace(said, command)
    return _ARGUMENTS.sub(lambda found: " ".join(map(_flag, re.findall(_ARGUMENT, found[0]))), text)


def _flag(argument: str) -> str:
    name, _, text = argument.partition("=")
    if name == "spec":
        return "--heads"
    value = ast.literal_eval(text) if text else ()
    if isinstance(value, bool):
        value = "yes" if value else "no"
    words = value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{name}", *(shlex.quote(str(word)) for word in words)])


def message_in_flags(error: FlaxslimError) -> str:
    """The message of an error in flags; paths and what was found stay as they are."""
    expected, mend = (
        None if part is None else in_flags(str(part)) for part in (error.expected, error.mend)
    )
    told = FlaxslimError(
        in_flags(error.problem),
        path=error.path,
        seen=error.seen,
        expected=expected,
        near=error.near,
        mend=mend,
    )
    return str(told)
