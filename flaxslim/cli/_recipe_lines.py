"""On which line of a TOML text each key stands."""

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

Key = tuple[str, ...]


def lines(text: str) -> dict[Key, int]:
    """The line of each key and table. tomllib tells none, but knows when a statement is whole."""
    found: dict[Key, int] = {}
    table: Key = ()
    all_lines = text.splitlines()
    at = 0
    while at < len(all_lines):
        first, statement = at + 1, all_lines[at]
        at += 1
        while (tree := parsed(statement)) is None and at < len(all_lines):
            statement += "\n" + all_lines[at]
            at += 1
        keys = list(_keys(tree or {}))
        if statement.lstrip().startswith("["):
            table = keys[-1] if keys else ()
            keys = [table[: i + 1] for i in range(len(table))]
        else:
            keys = [(*table, *key) for key in keys]
        for key in keys:
            found.setdefault(key, first)
    return found


def parsed(text: str) -> dict[str, Any] | None:
    """The text as TOML; None if it is none."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None


def _keys(tree: Mapping[str, Any]) -> Iterator[Key]:
    for name, value in tree.items():
        yield (name,)
        if isinstance(value, Mapping):
            yield from ((name, *key) for key in _keys(value))
