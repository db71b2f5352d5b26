"""`flaxslim demo`, and where the recipes are that come with flaxslim."""

import tempfile
from pathlib import Path

import flaxslim
from flaxslim.cli import _recipe_read


def recipes() -> Path:
    """The folder of the shipped recipes: in the package, or beside it in a working copy."""
    package = Path(flaxslim.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped(name: str) -> Path:
    """The path of a recipe; a bare name that is no file is one of ours."""
    path, ours = Path(name), recipes() / f"{name}.toml"
    return ours if not path.exists() and ours.parent == recipes() and ours.is_file() else path


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
        said = [*overrides(steps), f"output.folder={str(target)!r}"]
        read = _recipe_read.read(recipes() / "digits.toml", said)
        return _execute.execute(read, kept=folder is not None)
