"""What contradicts itself in a recipe, though each value is right alone."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flaxslim.cli._recipe import Recipe
from flaxslim.cli._recipe_book import Book
from flaxslim.cli._tasks import TASKS
from flaxslim.errors import RecipeError, nearest, neighbours


def contradictions(recipe: Recipe, book: Book) -> list[RecipeError]:
    """Mistakes that no single value shows. A missing file of the data is noted in the book."""
    found: list[RecipeError] = []
    for check in (_model, _data, _steps, _schedule, _sparsity, _moves, _shrink, _output):
        found += check(recipe, book)
    return found


def _model(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    import transformers

    model, head = recipe.model, TASKS[recipe.task]().head
    if model.source is None and not model.config:
        yield book.mistake(
            ("model",),
            "nothing says which model",
            expected="source, a folder or a Hub id; or [model.config], for a model at random",
        )
    if model.revision is not None and (model.source is None or os.path.isdir(model.source)):
        yield book.mistake(
            ("model", "revision"),
            "only a repository on the Hub has revisions",
            seen=f"source {model.source!r}",
            mend="leave it out, or name a Hub id as source",
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


def _data(recipe: Recipe, book: Book) -> Iterable[RecipeError]:
    for field in dataclasses.fields(recipe.data):
        value = getattr(recipe.data, field.name)
        if isinstance(value, Path) and not os.path.isfile(value):
            book.missing.append(
                book.mistake(
                    ("data", field.name),
                    "there is no such file",
                    seen=str(value),
                    near=neighbours(value),
                )
            )
    return ()


def _steps(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    train = recipe.train
    least = min(train.steps, train.dense_steps or train.steps)
    if train.warmup >= least:
        yield book.mistake(
            ("train", "warmup"),
            "the learning rate would rise to the end",
            seen=f"warmup {train.warmup}",
            expected=f"less than {least} steps",
        )


def _schedule(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    pruning, steps = recipe.pruning, recipe.train.steps
    if not recipe.prunes:
        return
    yield from _idle(recipe, book)
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


def _idle(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    """What a schedule does not look at; but another one may be tried by the command line."""
    pruning, said = recipe.pruning, ("pruning", "schedule") in book.said
    idle = {"one_shot": ("start", "end", "every"), "stepwise": ("start", "begin", "end", "every")}
    usual = type(pruning)()
    for key in () if said else idle.get(pruning.schedule, ()):
        if getattr(pruning, key) != getattr(usual, key):
            yield book.mistake(
                ("pruning", key),
                f"a {pruning.schedule} schedule has no {key}",
                seen=f"{key} {getattr(pruning, key)!r}",
                mend="leave it out, or choose another schedule",
            )


def _sparsity(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    pruning = recipe.pruning
    if pruning.schedule == "stepwise" and not pruning.stepwise:
        yield book.mistake(
            ("pruning", "schedule"),
            "a stepwise schedule needs its steps",
            expected='stepwise = { "1000" = 0.3, "2000" = 0.5 }',
        )
    if pruning.schedule == "stepwise" and pruning.sparsity:
        yield book.mistake(
            ("pruning", "sparsity"),
            "a stepwise schedule says its shares by itself",
            seen=f"sparsity {pruning.sparsity!r}, stepwise {dict(pruning.stepwise)!r}",
            mend="leave sparsity out",
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


def _moves(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    """Channels that fade or grow again, as far as the schedule leaves room."""
    from flaxslim.cli._build import schedules

    pruning = recipe.pruning
    if not recipe.prunes or any(_schedule(recipe, book)):
        return
    if pruning.regrow and (pruning.fade or pruning.allocation == "global"):
        yield book.mistake(
            ("pruning", "regrow"),
            "channels give way to others at once, and at each site by itself",
            seen=f"regrow {pruning.regrow:g}, fade {pruning.fade}, allocation {pruning.allocation}",
            mend="leave out regrow, or fade and allocation",
        )
    gap = min(schedule.gap for schedule in schedules(recipe).values())
    if pruning.fade > gap:
        yield book.mistake(
            ("pruning", "fade"),
            "what is doomed must have faded before the next channels die",
            seen=f"fade {pruning.fade}, and channels die {gap:g} steps apart",
            expected=f"at most {gap:g} steps; or raise pruning.every",
        )


def _shrink(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    at, steps = recipe.shrink.at, recipe.train.steps
    if list(at) != sorted(set(at)) or (at and at[-1] >= steps):
        yield book.mistake(
            ("shrink", "at"),
            "these are no steps in order",
            seen=list(at),
            expected=f"rising, below train.steps ({steps}); end = true is the last one",
        )


def _output(recipe: Recipe, book: Book) -> Iterator[RecipeError]:
    folder = recipe.output.folder
    if os.path.exists(folder) and not os.path.isdir(folder):
        yield book.mistake(
            ("output", "folder"), "the output is a file", seen=str(folder), mend="name a folder"
        )
