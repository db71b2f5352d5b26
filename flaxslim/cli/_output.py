"""The folders of a run: where it writes until all is done, and what it may replace."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flaxslim.checkpoint._atomic import alone, explain, recover_folder, remove, replace_folder
from flaxslim.errors import FlaxslimError, TargetError

PARTIAL, RECIPE, REPORT, MODEL = ".partial", "recipe.toml", "report.json", "model"
PICTURE = "training.png"


def partial_folder(folder: Path) -> Path:
    """Where a run writes until it is done."""
    return folder.with_name(folder.name + PARTIAL)


@contextmanager
def fresh_partial(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write to, which no other run uses meanwhile.

    Only what a run has made is replaced. Raises `TargetError`, also if the disk takes no more.
    """
    _check(folder, overwrite=overwrite)
    partial = partial_folder(folder)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with alone(partial, folder):
            recover_folder(folder)
            _check(folder, overwrite=overwrite)
            if any(partial.iterdir()):
                _refuse_foreign(partial, RECIPE)
            _empty(partial)
            yield partial
    except FlaxslimError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or str(error.filename or "").startswith(str(partial)):
            raise explain(folder, error) from error
        raise


def _check(folder: Path, *, overwrite: bool) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise TargetError(
                "the output folder exists",
                path=str(folder),
                mend="name another (--out FOLDER), or replace it with --overwrite",
            )
        _refuse_foreign(folder, REPORT)


def _empty(partial: Path) -> None:
    """Removes the recipe last, by which the rest is known for a run's."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name == RECIPE):
        remove(path)


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
    shutil.copyfile(partial / RECIPE, model / RECIPE)
    for path in list(partial.iterdir()):
        if path.name not in (MODEL, RECIPE):
            path.rename(model / path.name)
    replace_folder(model, folder)
    _empty(partial)
    partial.rmdir()
