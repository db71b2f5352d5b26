"""Recipes for `flaxslim prune`: a TOML file with `command = "prune"` whose keys are its flags."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxslim.cli import _prune_commands
from flaxslim.cli._recipe_book import Book
from flaxslim.cli._recipe_read import raise_mistakes
from flaxslim.errors import RecipeError, nearest, neighbours

COMMAND = "command"
_FILES = ("calibration", "evaluation")
_NEEDED = ("source", "out", "calibration")


def arguments(tree: Mapping[str, Any], book: Book, *, files: bool = True) -> list[str]:
    """What a recipe says, as arguments of the command line.

    What a flag takes is left to the command line, which says so by its own name. Raises
    `RecipeError` for all other mistakes; missing files are among them if `files`.
    """
    known = inspect.signature(_prune_commands.prune).parameters
    if tree[COMMAND] != "prune":
        book.note(
            (COMMAND,), "there is no such command", seen=repr(tree[COMMAND]), expected="prune"
        )
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name == COMMAND:
            continue
        if name not in known:
            book.note(
                (name,),
                "flaxslim prune has no such flag",
                seen=name,
                near=nearest(name, known),
                mend="flaxslim prune --help lists them; a recipe writes them with _ for -",
            )
            continue
        if isinstance(value, Mapping):
            book.note((name,), "a flag takes a value, not a table", seen=repr(value))
            continue
        found[name] = _placed(name, value, book)
    for name in _NEEDED:
        if name not in tree:
            book.note((name,), f"the recipe says no {name}", mend=f'{name} = "..."')
    raise_mistakes(book, files=files)
    places = [str(found.pop(name)) for name in ("source", "out")]
    flags = [text for name, value in found.items() for text in _flag(name, value)]
    return ["prune", *places, *flags]


def _placed(name: str, value: Any, book: Book) -> Any:
    """Paths are relative to the recipe; those of files must be there."""
    if not isinstance(value, str):
        return value
    path = book.placed((name,), value)
    if name == "source":
        local = os.path.isdir(path) or value.startswith((".", "/", "~"))
        if local and not os.path.isdir(path):
            book.missing.append(_missing(book, name, path))
        return path if local else value
    if name in _FILES and not os.path.exists(path):
        book.missing.append(_missing(book, name, path))
    return path if name in (*_FILES, "out", "plot") else value


def _missing(book: Book, name: str, path: Path) -> RecipeError:
    return book.mistake((name,), "this is not there", seen=str(path), near=neighbours(path))


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, *map(str, value if isinstance(value, list) else [value])]
