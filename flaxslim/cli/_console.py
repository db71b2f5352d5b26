"""Where results and messages go: results to stdout, progress and errors to stderr."""

from rich.console import Console

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)
