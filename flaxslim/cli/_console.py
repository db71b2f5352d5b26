"""Where results and messages go: results to stdout, progress and errors to stderr."""

import re

from rich.console import Console

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


def in_flags(text: str) -> str:
    """A message of the library with its arguments as the flags of the command line.

    >>> in_flags('pass width="per_layer"')
    'pass --width per_layer'
    """
    return re.sub(r'\bwidth="(uniform|per_layer)"', r"--width \1", text)
