"""Where results and messages go: results to stdout, progress and errors to stderr."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

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


def in_flags(text: str) -> str:
    """A message of the library with its arguments as the flags of the command line.

    >>> in_flags('pass width="per_layer"')
    'pass --width per_layer'
    """
    return re.sub(r'\bwidth="(uniform|per_layer)"', r"--width \1", text)
