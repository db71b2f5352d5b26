"""Recipes: TOML files that say a whole training run, checked before anything is loaded.

A section is a frozen dataclass; what a key takes is said by the annotation of its field. All
mistakes of a recipe are told at once, each with its line.
"""

import dataclasses
import difflib
import functools
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from flaxslim._errors import RecipeError, nearest
from flaxslim.cli._kinds import (
    Checkpoint,
    Count,
    Positive,
    Range,
    Share,
    Source,
    Steps,
    Weight,
)
from flaxslim.cli._tasks import TASKS

Key = tuple[str, ...]

# How a recipe says that the model teaches itself, as it was when its pruning began.
START = "start"


# --- the sections -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained: a stock Flax class of transformers, from a checkpoint or at random.

    Attributes:
      cls: `class`, with the head of the task, such as "FlaxBertForQuestionAnswering".
      source: a folder or a Hub id. What the head lacks there begins at random.
      revision: branch, tag or commit on the Hub.
      config: values of its config; without a source all that differs from the defaults.
    """

    cls: str = dataclasses.field(metadata={"key": "class"})
    source: Checkpoint | None = None
    revision: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How it is trained.

    Attributes:
      steps: while channels die, and after. All steps of other sections are counted from here.
      dense_steps: before that, without pruning, with a rise and fall of the learning rate.
      warmup: steps in which the learning rate rises from zero.
      decay: how it then falls to zero.
      clip: the largest norm of all gradients together; 0 for any.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    dense_steps: Steps = 0
    optimizer: Literal["adamw", "adam", "lion", "sgd"] = "adamw"
    warmup: Steps = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Weight = 0.0
    clip: Weight = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which channels die, and when.

    Attributes:
      spec: FFN channels, attention heads, or both.
      sparsity: the share that is dead at the end; by axis where they differ: {f = 0.9, h = 0.6}.
        0 trains on without pruning, as what pruning is compared with.
      start: the share that is dead at `begin`.
      begin, end, every: the first and the last step at which channels die, and how often between.
      stepwise: for that schedule: {"1000" = 0.3, "2000" = 0.5}.
      min_width: channels that each site keeps; max_sparsity: the largest share that it loses.
      fade: steps in which the doomed channels fade.
      regrow: the share of the dead that may revive each time.
    """

    sparsity: Share | Mapping[str, Share] = 0.0
    spec: Literal["ffn", "heads", "all"] = "ffn"
    score: Literal[
        "magnitude",
        "magnitude_l1",
        "magnitude_product",
        "snip",
        "snip_momentum",
        "gradient_weight",
        "taylor",
        "fisher",
        "movement",
        "random",
    ] = "magnitude"
    allocation: Literal["site", "global"] = "site"
    schedule: Literal["cubic", "linear", "exponential", "one_shot", "stepwise"] = "cubic"
    start: Share = 0.0
    begin: Steps = 0
    end: Steps | None = None
    every: Count = 1
    stepwise: Mapping[str, Share] = dataclasses.field(default_factory=dict)
    min_width: Steps = 1
    max_sparsity: Share = 1.0
    fade: Steps = 0
    regrow: Share = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """The share that is dead at the end, by axis."""
        if self.schedule == "stepwise":
            return dict.fromkeys(self.axes, max(self.stepwise.values(), default=0.0))
        if isinstance(self.sparsity, Mapping):
            return dict(self.sparsity)
        return dict.fromkeys(self.axes, self.sparsity)

    @property
    def axes(self) -> tuple[str, ...]:
        """The prunable axes of the spec."""
        return {"ffn": ("f",), "heads": ("h",), "all": ("f", "h")}[self.spec]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """What else it learns: to say what a teacher says.

    Attributes:
      teacher: a folder or a Hub id; "start" for the model itself before pruning.
      weight: of the teacher's part of the loss; task_weight: of the task's own.
    """

    teacher: Checkpoint
    weight: Weight = 1.0
    task_weight: Weight = 1.0
    temperature: Positive = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured: always the pruned model and the one reloaded; the dense one if asked."""

    dense: bool = True
    batch_size: Count = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink:
    """When dead channels are cut out, for training to go on faster.

    Attributes:
      at: after these steps; end: after the last one.
      width: "uniform" or "per_layer", as for `flaxslim slim`.
      verify: prove each time that nothing else has changed.
    """

    at: tuple[Count, ...] = ()
    end: bool = True
    width: Literal["uniform", "per_layer"] = "uniform"
    multiple_of: Count = 1
    verify: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where the model goes, with the metrics, the plot and the report beside it."""

    folder: Path
    log_every: Count = 10
    plot: bool = True
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `data` is of the class that the task says (`Task.Data`)."""

    task: str
    model: Model
    data: Any
    train: Train
    output: Output
    seed: Annotated[int, Range(low=0)] = 0
    pruning: Pruning = dataclasses.field(default_factory=Pruning)
    distillation: Distillation | None = None
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    shrink: Shrink = dataclasses.field(default_factory=Shrink)

    @property
    def prunes(self) -> bool:
        """Whether any channel is to die."""
        return any(self.pruning.shares.values())

    def to_toml(self) -> str:
        """The recipe with all its defaults."""
        return "\n".join(_toml((), _plain(self))).strip() + "\n"


# --- reading ----------------------------------------------------------------------------------


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
    return parse(text, path, overrides, files=files)


def parse(text: str, path: Path, overrides: Sequence[str] = (), *, files: bool = True) -> Read:
    """As `read`, of a text; `path` is where it stands."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{path}:{line[1] if line else len(text.splitlines())}"
        raise RecipeError(
            "this is no TOML", path=where, seen=str(error), mend="correct the line"
        ) from error
    book = _Book(path=path, lines=_lines(text))
    for override in overrides:
        book.override(tree, override)
    recipe = book.recipe(tree)
    if recipe is not None and not book.mistakes:
        book.mistakes += _contradictions(recipe, book)
    if files:
        book.mistakes += book.missing
    _raise(book.mistakes, path)
    assert recipe is not None
    return Read(recipe=recipe, missing=tuple(book.missing))


def _raise(mistakes: Sequence[RecipeError], path: Path) -> None:
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        told = [str(mistake) for mistake in sorted(mistakes, key=_line)]
        raise RecipeError("\n\n".join([f"{len(mistakes)} mistakes in {path}", *told]))


def _line(mistake: RecipeError) -> int:
    """Where it stands in the file; those of the command line come first."""
    line = re.search(r":(\d+)$", mistake.path or "")
    return int(line[1]) if line else 0


def _recipes_near(path: Path) -> list[str]:
    found = path.parent.glob("*.toml") if path.parent.is_dir() else ()
    return difflib.get_close_matches(str(path), [str(p) for p in found], cutoff=0.3)


def _lines(text: str) -> dict[Key, int]:
    """The line of each key and table. tomllib tells none, but knows when a statement is whole."""
    found: dict[Key, int] = {}
    table: Key = ()
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        first, statement = at + 1, lines[at]
        at += 1
        while (tree := _parsed(statement)) is None and at < len(lines):
            statement += "\n" + lines[at]
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


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _keys(tree: Mapping[str, Any]) -> Iterator[Key]:
    for name, value in tree.items():
        yield (name,)
        if isinstance(value, Mapping):
            yield from ((name, *key) for key in _keys(value))


class _Wrong(Exception):
    """What is wrong with one value."""

    def __init__(self, problem: str, **details: Any):
        self.problem, self.details = problem, details


@dataclasses.dataclass(kw_only=True)
class _Book:
    """The recipe while it is read: where its keys stand, and the mistakes so far."""

    path: Path
    lines: dict[Key, int]
    said: dict[Key, str] = dataclasses.field(default_factory=dict)
    mistakes: list[RecipeError] = dataclasses.field(default_factory=list)
    missing: list[RecipeError] = dataclasses.field(default_factory=list)

    def override(self, tree: dict[str, Any], text: str) -> None:
        """Set one value of the tree."""
        name, equals, value = text.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            self.mistakes.append(
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
        parsed = _parsed(f"value = {value}")
        node[key[-1]] = value.strip() if parsed is None else parsed["value"]
        self.said[key] = f"--set {text}"

    def where(self, key: Key) -> str:
        """The line of a key, or of the nearest table around it."""
        for end in range(len(key), 0, -1):
            inside = (text for said, text in self.said.items() if said[:end] == key[:end])
            if text := next(inside, None):
                return text
            if key[:end] in self.lines:
                return f"{self.path}:{self.lines[key[:end]]}"
        return str(self.path)

    def mistake(self, key: Key, problem: str, **details: Any) -> RecipeError:
        return RecipeError(problem, path=self.where(key), **details)

    def base(self, key: Key) -> Path:
        """What paths are relative to."""
        on_the_command_line = any(key[:end] in self.said for end in range(1, len(key) + 1))
        return Path() if on_the_command_line else self.path.parent

    # --- values -------------------------------------------------------------------------------

    def recipe(self, tree: Mapping[str, Any]) -> Recipe | None:
        """The whole recipe; None if there are mistakes in it."""
        task = tree.get("task")
        made = TASKS.get(task) if isinstance(task, str) else None
        if made is None:
            seen = {"seen": repr(task), "near": nearest(str(task), TASKS)} if task else {}
            self.mistakes.append(
                self.mistake(
                    ("task",),
                    "there is no such task" if task else "a recipe needs a task",
                    expected=", ".join(TASKS),
                    **seen,
                )
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
        before = len(self.mistakes)
        for name in tree.keys() - fields.keys():
            where = f"[{'.'.join(at)}]" if at else "the recipe"
            self.mistakes.append(
                self.mistake(
                    (*at, name),
                    f"{where} has no key {name!r}",
                    near=nearest(name, fields),
                    expected=", ".join(fields) or "none: there is nothing to say here",
                )
            )
        made = {}
        for name, field in fields.items():
            hint = hints[field.name]
            if name in tree:
                made[field.name] = self.value(hint, tree[name], (*at, name))
            elif isinstance(hint, type) and _is_optional(hint):
                made[field.name] = hint()
            elif _is_required(field):
                self.mistakes.append(
                    self.mistake(
                        at, f"{'.'.join((*at, name))} is missing", expected=_expected(hint)
                    )
                )
        return cls(**made) if len(self.mistakes) == before else None

    def value(self, hint: Any, value: Any, key: Key) -> Any:
        """A value as its annotation asks; a mistake is noted, and None comes back."""
        if dataclasses.is_dataclass(hint) or _optional_class(hint):
            cls: Any = _optional_class(hint) or hint
            if isinstance(value, Mapping):
                return self.section(cls, value, key)
            self.mistakes.append(
                self.mistake(
                    key,
                    f"{'.'.join(key)} is a table",
                    seen=repr(value),
                    expected=f"[{'.'.join(key)}]",
                )
            )
            return None
        try:
            return self.plain(hint, value, key)
        except _Wrong as wrong:
            details = {"seen": repr(value), "expected": _expected(hint), **wrong.details}
            problem = f"{'.'.join(key)} {wrong.problem}"
            self.mistakes.append(self.mistake(key, problem, **details))
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
        if hint is Any:
            return value
        if hint is Path:
            if not isinstance(value, str):
                raise _Wrong(_KIND)
            return self.base(key) / Path(value).expanduser()
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint is Mapping and isinstance(value, Mapping):
            return value
        if type(value) is not hint:
            raise _Wrong(_KIND)
        return value

    def source(self, value: str, key: Key) -> str:
        """A folder as a path, or the id of a repository on the Hub. Raises `_Wrong`."""
        folder = self.base(key) / Path(value).expanduser()
        if folder.is_dir() or value == START:
            return value if value == START else str(folder)
        if value.startswith((".", "/", "~")):
            self.missing.append(
                self.mistake(key, "there is no such folder", seen=str(folder), near=_beside(folder))
            )
            return str(folder)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            raise _Wrong("is neither a folder nor a Hub id", expected="a folder, or org/name")
        return value


_KIND = "is of the wrong kind"


def _beside(path: Path) -> list[str]:
    """What lies beside a path that is not there, spelled most like it."""
    if not path.parent.is_dir():
        return []
    return nearest(path.name, (p.name for p in path.parent.iterdir()))


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


# --- what contradicts itself ------------------------------------------------------------------


def _contradictions(recipe: Recipe, book: _Book) -> list[RecipeError]:
    """Mistakes that no single value shows. A missing file of the data is noted in the book."""
    found: list[RecipeError] = []
    for check in (_model, _data, _steps, _schedule, _sparsity, _shrink, _output):
        found += check(recipe, book)
    return found


def _model(recipe: Recipe, book: _Book) -> Iterator[RecipeError]:
    import transformers

    model, head = recipe.model, TASKS[recipe.task]().head
    if model.source is None and not model.config:
        yield book.mistake(
            ("model",),
            "nothing says which model",
            expected="source, a folder or a Hub id; or [model.config], for a model at random",
        )
    names = [name for name in _flax_classes() if name.endswith(head)]
    if model.cls not in names:
        known = hasattr(transformers, model.cls)
        yield book.mistake(
            ("model", "class"),
            f"{model.cls} has not the head of the task {recipe.task!r}"
            if known
            else f"transformers has no class {model.cls}",
            expected=f"Flax...{head}",
            near=nearest(model.cls, names),
        )
        return
    if not model.config:
        return
    config: Any = getattr(transformers, model.cls).config_class()
    for name in model.config:
        if not hasattr(config, name):
            yield book.mistake(
                ("model", "config", name),
                f"{type(config).__name__} has no key {name!r}",
                near=nearest(name, config.to_dict()),
            )


@functools.cache
def _flax_classes() -> list[str]:
    import transformers

    # Its list of names takes a second to make, each time.
    return [name for name in dir(transformers) if name.startswith("Flax")]


def _data(recipe: Recipe, book: _Book) -> Iterable[RecipeError]:
    for field in dataclasses.fields(recipe.data):
        value = getattr(recipe.data, field.name)
        if isinstance(value, Path) and not value.is_file():
            book.missing.append(
                book.mistake(
                    ("data", field.name),
                    "there is no such file",
                    seen=str(value),
                    near=_beside(value),
                )
            )
    return ()


def _steps(recipe: Recipe, book: _Book) -> Iterator[RecipeError]:
    train = recipe.train
    least = min(train.steps, train.dense_steps or train.steps)
    if train.warmup >= least:
        yield book.mistake(
            ("train", "warmup"),
            "the learning rate would rise to the end",
            seen=f"warmup {train.warmup}",
            expected=f"less than {least} steps",
        )


def _schedule(recipe: Recipe, book: _Book) -> Iterator[RecipeError]:
    pruning, steps = recipe.pruning, recipe.train.steps
    if not recipe.prunes:
        return
    if pruning.schedule == "stepwise":
        for step in pruning.stepwise:
            if not step.isdigit() or int(step) >= steps:
                yield book.mistake(
                    ("pruning", "stepwise", step),
                    "this is no step of the training",
                    seen=repr(step),
                    expected=f'a step from "0" to "{steps - 1}"',
                )
        return
    last = pruning.begin if pruning.schedule == "one_shot" else pruning.end
    name = "begin" if pruning.schedule == "one_shot" else "end"
    if last is None:
        yield book.mistake(
            ("pruning",),
            "pruning.end is missing",
            expected=f"the last step at which channels die, below {steps}",
        )
    elif last < pruning.begin:
        yield book.mistake(
            ("pruning", "end"),
            "the schedule ends before it begins",
            seen=f"begin {pruning.begin}, end {last}",
        )
    elif last >= steps:
        yield book.mistake(
            ("pruning", name),
            "training is over before all channels are dead",
            seen=f"{name} {last}, train.steps {steps}",
            expected=f"{name} below train.steps",
        )
    if pruning.schedule == "exponential" and max(pruning.shares.values()) >= 1:
        yield book.mistake(
            ("pruning", "sparsity"), "an exponential schedule never reaches 1", expected="below 1"
        )


def _sparsity(recipe: Recipe, book: _Book) -> Iterator[RecipeError]:
    pruning = recipe.pruning
    if pruning.schedule == "stepwise" and not pruning.stepwise:
        yield book.mistake(
            ("pruning", "schedule"),
            "a stepwise schedule needs its steps",
            expected='stepwise = { "1000" = 0.3, "2000" = 0.5 }',
        )
    if pruning.stepwise and pruning.schedule != "stepwise":
        yield book.mistake(
            ("pruning", "stepwise"),
            f"a {pruning.schedule} schedule has no steps of its own",
            mend='say schedule = "stepwise", or take them out',
        )
    if isinstance(pruning.sparsity, Mapping):
        for axis in pruning.sparsity.keys() - set(pruning.axes):
            yield book.mistake(
                ("pruning", "sparsity", axis),
                f"spec {pruning.spec!r} has no axis {axis!r}",
                expected=", ".join(pruning.axes)
                + " (f: FFN channels, h: heads; spec says which are pruned)",
            )
    for axis, share in pruning.shares.items():
        if pruning.start > share > 0:
            yield book.mistake(
                ("pruning", "start"),
                "the schedule starts above its end",
                seen=f"start {pruning.start:g}, sparsity {share:g} of {axis}",
            )


def _shrink(recipe: Recipe, book: _Book) -> Iterator[RecipeError]:
    at, steps = recipe.shrink.at, recipe.train.steps
    if list(at) != sorted(set(at)) or (at and at[-1] >= steps):
        yield book.mistake(
            ("shrink", "at"),
            "these are no steps in order",
            seen=list(at),
            expected=f"rising, below train.steps ({steps}); end = true is the last one",
        )


def _output(recipe: Recipe, book: _Book) -> Iterator[RecipeError]:
    folder = recipe.output.folder
    if folder.exists() and not folder.is_dir():
        yield book.mistake(
            ("output", "folder"), "the output is a file", seen=str(folder), mend="name a folder"
        )


# --- writing ----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Plain data for TOML and JSON; what is None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = (
            (field.metadata.get("key", field.name), getattr(value, field.name))
            for field in dataclasses.fields(value)
        )
        return {name: _plain(x) for name, x in pairs if x is not None}
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def _toml(at: Key, tree: Mapping[str, Any]) -> Iterator[str]:
    if at:
        yield f"\n[{'.'.join(at)}]"
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            yield f"{name} = {json.dumps(value)}"
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _toml((*at, name), value)
