"""What `flaxslim run` and `flaxslim demo` print: around the run itself, which is in `_run`."""

import dataclasses
import json as json_module
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxslim.cli import INTERRUPTED, _output, _prune_commands, _recipe_prune, _table
from flaxslim.cli._console import console, messages
from flaxslim.cli._recipe_book import Book
from flaxslim.cli._recipe_read import Read
from flaxslim.cli._tasks import TASKS
from flaxslim.errors import RecipeError


def show(read: Read) -> int:
    """Print the checked recipe, and what it names that is not there."""
    _say_missing(read)
    console.print(read.recipe.to_toml(), markup=False, soft_wrap=True, end="")
    return 0


def check(read: Read, *, json: bool = False) -> int:
    """Take the first step on random numbers, and print what it was."""
    from flaxslim.cli import _check

    _say_missing(read)
    with messages.status("the first training step, on random weights and numbers"):
        found = _check.check(read.recipe)
    if json:
        print(json_module.dumps(dataclasses.asdict(found), indent=1))
        return 0
    console.print(
        f"{read.recipe.model.cls}: {found.parameters:,} parameters, {found.channels:,} channels "
        f"that can die\nfirst step: loss {found.loss:.3f}; compiled and run in "
        f"{found.compiling:.1f} s, again in {found.seconds:.1f} s\nthe recipe is ready to run",
        markup=False,
        soft_wrap=True,
    )
    return 0


def execute(read: Read, *, overwrite: bool = False, json: bool = False, kept: bool = True) -> int:
    """Run it, and print what came of it. `kept` is false if the folder will vanish."""
    from flaxslim.cli import _run

    recipe = read.recipe
    try:
        report = _run.run(recipe, overwrite=overwrite)
    except KeyboardInterrupt:
        partial = _output.partial_folder(recipe.output.folder)
        where = f"; what was measured so far is in {partial}" if kept else ""
        messages.print(f"stopped; no model was written{where}", markup=False, soft_wrap=True)
        return INTERRUPTED
    if json:
        print(json_module.dumps(report.to_dict(), indent=1))
        return 0
    console.print(_table.scores(report.scores, TASKS[recipe.task]().show))
    console.print(_table.trained(report))
    for one in report.shrunk:
        if one.proof is not None:
            what = f"step {one.step}, {one.removed:,} channels cut out: "
            console.print(what + _table.verdict(one.proof), markup=False, soft_wrap=True)
    if text := _table.step_time(report):
        console.print(text, markup=False, soft_wrap=True)
    if report.skipped:
        messages.print(f"note: {report.skipped:,} scores were not finite and did not count")
    where = f", saved in {recipe.output.folder}" if kept else ""
    console.print(f"done in {report.seconds:.0f} s{where}", markup=False, soft_wrap=True)
    return 0


def prune(
    tree: Mapping[str, Any],
    book: Book,
    out: Path | None,
    *,
    overwrite: bool,
    dry_run: bool,
    refused: Sequence[str],
) -> int:
    """Run `flaxslim prune` as a recipe says it, or show the command."""
    import tyro

    if refused:
        raise RecipeError(
            f"{refused[0]} is for recipes that train",
            path=str(book.path),
            mend="--dry-run shows the command that this one stands for",
        )
    if out is not None:
        tree = {**tree, "out": str(out.absolute())}
    given = _recipe_prune.arguments(tree, book, files=not dry_run)
    if overwrite:
        given.append("--overwrite")
    if dry_run:
        _say_missing(book)
        console.print(shlex.join(["flaxslim", *given]), markup=False, soft_wrap=True)
        return 0
    return tyro.cli(_prune_commands.prune, prog="flaxslim prune", args=given[1:])


def _say_missing(read: Read | Book) -> None:
    for missing in read.missing:
        messages.print(f"note: {missing}", markup=False, soft_wrap=True)
