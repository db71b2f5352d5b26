"""`flaxslim demo`, and where the recipes are that come with flaxslim."""

import tempfile
from pathlib import Path

from flaxslim.cli import _recipe_read
from flaxslim.cli._recipe import toml_value
from flaxslim.cli._recipe_book import PACKAGED
from flaxslim.errors import RecipeError, nearest, neighbours


def recipes() -> Path:
    """The folder of the shipped recipes: in the package, or beside it in a working copy."""
    return PACKAGED if PACKAGED.is_dir() else PACKAGED.parents[1] / "configs"


def shipped(name: str) -> Path:
    """The path of a recipe; a bare name that is no file is one of ours.

    Raises `RecipeError` where there is neither.
    """
    path, ours = Path(name), sorted(own.stem for own in recipes().glob("*.toml"))
    if path.is_file():
        return path
    if name in ours:
        return recipes() / f"{name}.toml"
    this = f"flaxslim run {path.stem} runs the one that is shipped; " if path.stem in ours else ""
    raise RecipeError(
        "there is no such recipe",
        path=name,
        near=[*neighbours(path, lambda p: p.suffix == ".toml"), *nearest(path.stem, ours)],
        expected="a TOML file, or the name of a recipe that is shipped",
        mend=f"{this}shipped, and run by their names, are {', '.join(ours)}; their files are in "
        "configs/ of the repository",
    )


def overrides(steps: int) -> list[str]:
    """The shipped recipe, stretched or squeezed to another number of steps.

    >>> overrides(160)[:3]
    ['train.steps=160', 'train.dense_steps=160', 'train.warmup=16']
    """
    tenth, end = steps // 10, 6 * steps // 10
    return [
        f"train.steps={steps}",
        f"train.dense_steps={steps}",
        f"train.warmup={tenth}",
        f"pruning.begin={tenth}",
        f"pruning.end={end}",
        f"pruning.every={max(1, tenth)}",
        f"shrink.at={[end + 1] if end + 1 < steps else []}",
    ]


def run(folder: Path | None = None, *, steps: int = 100) -> int:
    """Run the recipe `digits`; the model is kept if a folder is given. Returns the exit code."""
    from flaxslim.cli import _execute

    with tempfile.TemporaryDirectory() as scratch:
        target = folder or Path(scratch) / "digits"
        said = [*overrides(steps), f"output.folder={toml_value(str(target))}"]
        read = _recipe_read.read(recipes() / "digits.toml", said)
        return _execute.execute(read, kept=folder is not None)
