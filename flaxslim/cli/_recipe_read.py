"""Reading recipes: TOML files, checked before anything is loaded.

All mistakes of a recipe are told at once, each with its line.
"""

import dataclasses
import datetime
import difflib
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from flaxslim.cli._kinds import Range, Source
from flaxslim.cli._recipe import START, Recipe
from flaxslim.cli._recipe_book import Book
from flaxslim.cli._recipe_checks import contradictions
from flaxslim.cli._recipe_lines import Key, lines, parsed
from flaxslim.cli._tasks import TASKS
from flaxslim.errors import RecipeError, nearest, neighbours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A recipe that is right, and which of the files that it names are not there (yet)."""

    recipe: Recipe
    missing: tuple[RecipeError, ...]


def read(path: Path | str, overrides: Sequence[str] = (), *, files: bool = True) -> Read:
    """The checked recipe of a file, with some values set anew: "train.steps=100".

    Paths are relative to the recipe, those of overrides to the current folder. Raises
    `RecipeError` for all mistakes at once; missing files are among them if `files`.
    """
    return checked(*load(path, overrides), files=files)


def load(path: Path | str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Book]:
    """What a file says, with some values set anew, and a book for the mistakes in it.

    Raises `RecipeError` if it is no TOML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "the recipe cannot be read",
            path=str(path),
            seen=str(error),
            near=_recipes_near(path),
            mend="flaxslim run path/to/recipe.toml",
        ) from error
    return _load(text, path, overrides)


def parse(text: str, path: Path, overrides: Sequence[str] = (), *, files: bool = True) -> Read:
    """As `read`, of a text; `path` is where it stands."""
    return checked(*_load(text, path, overrides), files=files)


def _load(text: str, path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Book]:
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        line = re.search(r"at line (\d+)", str(error))
        where = f"{path}:{line[1] if line else len(text.splitlines())}"
        raise RecipeError(
            "this is no TOML", path=where, seen=str(error), mend="correct the line"
        ) from error
    book = Book(path=path, lines=lines(text))
    for text in overrides:
        override(book, tree, text)
    return tree, book


def checked(tree: Mapping[str, Any], book: Book, *, files: bool = True) -> Read:
    """The recipe in a tree. Raises `RecipeError` as `read`."""
    recipe = _Values(book=book).recipe(tree)
    if recipe is not None and not book.mistakes:
        book.mistakes += contradictions(recipe, book)
    raise_mistakes(book, files=files)
    assert recipe is not None
    return Read(recipe=recipe, missing=tuple(book.missing))


def raise_mistakes(book: Book, *, files: bool = True) -> None:
    """Raise all mistakes as one `RecipeError`; missing files are among them if `files`."""
    mistakes = [*book.mistakes, *(book.missing if files else ())]
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        told = [str(mistake) for mistake in sorted(mistakes, key=_line)]
        raise RecipeError("\n\n".join([f"{len(mistakes)} mistakes in {book.path}", *told]))


def _line(mistake: RecipeError) -> int:
    """Where it stands in the file; those of the command line come first."""
    line = re.search(r":(\d+)$", mistake.path or "")
    return int(line[1]) if line else 0


def _recipes_near(path: Path) -> list[str]:
    found = path.parent.glob("*.toml") if path.parent.is_dir() else ()
    return difflib.get_close_matches(str(path), [str(p) for p in found], cutoff=0.3)


def override(book: Book, tree: dict[str, Any], text: str) -> None:
    """Set one value of the tree."""
    name, equals, value = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        book.mistakes.append(
            RecipeError(
                "this sets no key", path=f"--set {text}", expected="--set section.key=value"
            )
        )
        return
    node = tree
    for part in key[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    found = parsed(f"value = {value}")
    node[key[-1]] = value.strip() if found is None else found["value"]
    book.said[key] = f"--set {text}"


# --- values -----------------------------------------------------------------------------------


class _Wrong(Exception):
    """What is wrong with one value."""

    def __init__(self, problem: str, **details: Any):
        self.problem, self.details = problem, details


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Values:
    """What the annotations make of a tree; mistakes are noted in the book."""

    book: Book

    def recipe(self, tree: Mapping[str, Any]) -> Recipe | None:
        """The whole recipe; None if there are mistakes in it."""
        task = tree.get("task")
        made = TASKS.get(task) if isinstance(task, str) else None
        if made is None:
            seen = {"seen": repr(task), "near": nearest(str(task), TASKS)} if task else {}
            self.book.note(
                ("task",),
                "there is no such task" if task else "a recipe needs a task",
                expected=", ".join(TASKS),
                **seen,
            )
            tree = {**tree, "task": ""}  # told once
        data = Mapping if made is None else made().Data
        return self.section(Recipe, tree, (), {"data": data})

    def section(
        self, cls: type, tree: Mapping[str, Any], at: Key, more: Mapping[str, Any] | None = None
    ) -> Any:
        """A dataclass from a table; None if there are mistakes in it."""
        hints = typing.get_type_hints(cls, include_extras=True) | dict(more or {})
        fields = {field.metadata.get("key", field.name): field for field in dataclasses.fields(cls)}
        before = len(self.book.mistakes)
        for name in tree.keys() - fields.keys():
            where = f"[{'.'.join(at)}]" if at else "the recipe"
            self.book.note(
                (*at, name),
                f"{where} has no key {name!r}",
                near=nearest(name, fields),
                expected=", ".join(fields) or "none: there is nothing to say here",
            )
        made = {}
        for name, field in fields.items():
            hint = hints[field.name]
            if name in tree:
                made[field.name] = self.value(hint, tree[name], (*at, name))
            elif isinstance(hint, type) and _is_optional(hint):
                made[field.name] = hint()
            elif _is_required(field):
                self.book.note(at, f"{'.'.join((*at, name))} is missing", expected=_expected(hint))
        return cls(**made) if len(self.book.mistakes) == before else None

    def value(self, hint: Any, value: Any, key: Key) -> Any:
        """A value as its annotation asks; a mistake is noted, and None comes back."""
        if dataclasses.is_dataclass(hint) or _optional_class(hint):
            cls: Any = _optional_class(hint) or hint
            if isinstance(value, Mapping):
                return self.section(cls, value, key)
            self.book.note(
                key,
                f"{'.'.join(key)} is a table",
                seen=repr(value),
                expected=f"[{'.'.join(key)}]",
            )
            return None
        try:
            return self.plain(hint, value, key)
        except _Wrong as wrong:
            details = {"seen": repr(value), "expected": _expected(hint), **wrong.details}
            problem = f"{'.'.join(key)} {wrong.problem}"
            self.book.note(key, problem, **details)
            return None

    def plain(self, hint: Any, value: Any, key: Key) -> Any:
        """A value that is no section. Raises `_Wrong`."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            found: Any = self.plain(args[0], value, key)
            for rule in args[1:]:
                if isinstance(rule, Range) and found not in rule:
                    raise _Wrong("is out of its range")
                if isinstance(rule, Source):
                    found = self.source(found, key)
            return found
        if origin in (typing.Union, types.UnionType):
            wrongs = []
            for one in args:
                try:
                    return (
                        None if one is type(None) and value is None else self.plain(one, value, key)
                    )
                except _Wrong as wrong:
                    wrongs.append(wrong)
            # The one that came nearest: a number out of range says more than a number at all.
            raise next((w for w in wrongs if w.problem != _KIND), wrongs[0])
        if origin is Literal:
            if value not in args:
                raise _Wrong("is none of its choices", near=nearest(str(value), map(str, args)))
            return value
        if origin is tuple:
            if not isinstance(value, list):
                raise _Wrong(_KIND)
            return tuple(self.plain(args[0], x, key) for x in value)
        if origin is not None and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise _Wrong(_KIND)
            return {name: self.plain(args[1], x, (*key, name)) for name, x in value.items()}
        if hint in (Any, Mapping) and _dated(value):
            raise _Wrong("holds a date or a time, which no key takes")
        if hint is Any:
            return value
        if hint is Path:
            if not isinstance(value, str):
                raise _Wrong(_KIND)
            return self.book.placed(key, value)
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint is Mapping and isinstance(value, Mapping):
            return value
        if type(value) is not hint:
            raise _Wrong(_KIND)
        return value

    def source(self, value: str, key: Key) -> str:
        """A folder as a path, or the id of a repository on the Hub. Raises `_Wrong`."""
        folder = self.book.placed(key, value)
        if os.path.isdir(folder) or value == START:
            return value if value == START else str(folder)
        if value.startswith((".", "/", "~")):
            self.book.missing.append(
                self.book.mistake(
                    key, "there is no such folder", seen=str(folder), near=neighbours(folder)
                )
            )
            return str(folder)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            raise _Wrong("is neither a folder nor a Hub id", expected="a folder, or org/name")
        return value


_KIND = "is of the wrong kind"


def _dated(value: Any) -> bool:
    """Whether TOML's dates or times are in it: what is written elsewhere has none."""
    if isinstance(value, Mapping):
        return any(map(_dated, value.values()))
    if isinstance(value, list):
        return any(map(_dated, value))
    return isinstance(value, datetime.date | datetime.time)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_optional(cls: Any) -> bool:
    """Whether it is a section that need not say anything."""
    return dataclasses.is_dataclass(cls) and not any(map(_is_required, dataclasses.fields(cls)))


def _optional_class(hint: Any) -> type | None:
    """The dataclass in `Class | None`."""
    args = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else ()
    return next((arg for arg in args if dataclasses.is_dataclass(arg)), None)  # pyright: ignore


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
    Any: "anything",
    Mapping: "a table",
}


def _expected(hint: Any) -> str:
    """What an annotation asks for, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for rule in args[1:]:
            if isinstance(rule, Source):
                return "a folder or a Hub id"
            if isinstance(rule, Range):
                return f"{_expected(args[0])}, {rule}"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_expected(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        return f"a list, each {_expected(args[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a table, each value {_expected(args[1])}"
    return _WORDS.get(hint, "a table")
