"""The folders of a run: where it writes until all is done, and what it may replace."""

import shutil
from pathlib import Path

from flaxslim._errors import TargetError

PARTIAL, RECIPE, REPORT, MODEL = ".partial", "recipe.toml", "report.json", "model"


def partial_folder(folder: Path) -> Path:
    """Where a run writes until it is done."""
    return folder.with_name(folder.name + PARTIAL)


def fresh_partial(folder: Path, *, overwrite: bool) -> Path:
    """An empty folder to write to. Only what a run has made is replaced."""
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise TargetError(
                "the output folder exists",
                path=str(folder),
                mend="name another (--out FOLDER), or replace it with --overwrite",
            )
        _refuse_foreign(folder, REPORT)
    partial = partial_folder(folder)
    if partial.exists():
        _refuse_foreign(partial, RECIPE)
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise TargetError(
            "the output folder cannot be made", path=str(partial), seen=error.strerror
        ) from error
    return partial


def _refuse_foreign(folder: Path, mark: str) -> None:
    if not (folder / mark).is_file():
        raise TargetError(
            "the folder holds something else than the output of a run, and is not replaced",
            path=str(folder),
            expected=f"a folder with {mark}",
            mend="name another folder",
        )


def publish(partial: Path, folder: Path) -> None:
    """The model, and beside it the story of its making, under the name that was asked for."""
    model = partial / MODEL
    for path in list(partial.iterdir()):
        if path != model:
            path.rename(model / path.name)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    model.rename(folder)
    partial.rmdir()
    shutil.rmtree(old, ignore_errors=True)
