"""A folder, or a file, that appears whole or not at all."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flaxslim.checkpoint import _folder
from flaxslim.checkpoint._journal import Journal
from flaxslim.errors import FlaxslimError, TargetError

try:
    import fcntl
except ImportError:
    fcntl = None


@contextmanager
def fresh_folder(
    target: Path,
    *,
    need: int,
    overwrite: bool,
    source: Path | None = None,
    resume: str | None = None,
) -> Iterator[Path]:
    """A new, empty folder beside `target`, which becomes `target` when the block ends well.

    `need` is the number of bytes that will be written. Whatever goes wrong, neither a part of the
    new folder nor a temporary one stays behind, and an old target is where it was until the new
    folder, complete and flushed, takes its place. Only a process that is killed leaves the new
    folder behind; the next one clears it away, or goes on with it if its `Journal` says `resume`.
    Raises what `check_target` raises, and `TargetError` if the disk does not take it, or if
    another process is writing the same target.
    """
    # A link to a folder is followed, so that the folder is replaced and not the link.
    target = target.expanduser().resolve()
    check_target(target, overwrite=overwrite, source=source)
    made = _make_parents(target.parent)
    new, old = (target.parent / f".{target.name}.{word}" for word in ("new", "old"))
    try:
        with alone(new, target):
            _recover(old, target)
            if not Journal.of(new, resume).found:
                _empty(new)
            try:
                _check_room(new, need - _bytes_in(new))
                yield new
                _flush(new)
                check_target(target, overwrite=overwrite, source=source)
                _put_in_place(new, old, target)
            except BaseException:
                # Also for KeyboardInterrupt: an interrupted run leaves what was there before.
                _recover(old, target)
                shutil.rmtree(new, ignore_errors=True)
                raise
    except FlaxslimError:
        raise
    except OSError as error:
        raise explain(target, error, need) from error
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def alone(new: Path, target: Path, make: Callable[..., None] = Path.mkdir) -> Iterator[None]:
    """Makes a folder, or a file, for what will be `target`, and holds it against other processes.

    The system lets go of a dead one's. Raises `TargetError` if another one has it.
    """
    make(new, exist_ok=True)
    with _held(new) as held:
        if not held:
            raise TargetError(
                "another process is writing this target",
                path=str(target),
                seen=str(new),
                mend="wait until it has ended, or name another folder",
            )
        yield


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """A lock on a folder or a file; False if another process has it, or has put it elsewhere."""
    if fcntl is None:  # on Windows two runs into one target are not kept apart
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(handle), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def _recover(old: Path, target: Path) -> None:
    """What a process that was killed between two renames had put aside goes back, or away."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        remove(entry)


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace_folder(new: Path, target: Path) -> None:
    """A folder that is whole becomes `target`, at once where the system can do that."""
    _flush(new)
    _put_in_place(new, target.with_name(f".{target.name}.old"), target)


def recover_folder(target: Path) -> None:
    """What `replace_folder` of a process that was killed had put aside goes back, or away."""
    _recover(target.with_name(f".{target.name}.old"), target)


def _put_in_place(new: Path, old: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        _flush_entry(target.parent)
        return
    with _held(target):  # or another process would take what is at `new` then for its own
        if not _exchange(new, target):
            target.rename(old)
            new.rename(target)
        _flush_entry(target.parent)
        for stale in (new, old):
            shutil.rmtree(stale, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change places at once (Linux: man 2 renameat2); False where that is unknown."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Raise `TargetError` if a checkpoint may not be written there.

    Only a checkpoint is replaced, and only if nothing else lies in its folder. `source` is the
    folder that the new one comes from: it may be replaced itself, but neither may lie inside the
    other, and files of the names that travel along from it count as parts of a checkpoint. Raises
    `UnsafePathError` if one of these is a link that leads out of it.
    """
    side = {}
    if source is not None:
        _check_apart(target, source)
        side = _folder.side_files(source)
    if not target.exists():
        return
    if not target.is_dir():
        raise TargetError(
            "the target is a file", path=str(target), mend="name a folder that does not exist yet"
        )
    if not overwrite:
        raise TargetError(
            "the target exists",
            path=str(target),
            mend="name another folder, or replace this one with overwrite=True (--overwrite)",
        )
    if not any(target.iterdir()):
        return
    if not _folder.is_checkpoint(target):
        raise TargetError(
            "the target holds something else than a checkpoint, and is not replaced",
            path=str(target),
            seen=_folder.listing(target, 5),
            expected=f"a folder with a {_folder.CONFIG} and weights",
            mend="name another folder",
        )
    foreign = _folder.foreign(target, side)
    if foreign:
        raise TargetError(
            "the target holds more than a checkpoint, and is not replaced",
            path=str(target),
            seen=", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if foreign[4:] else ""),
            mend="name another folder, or move these away",
        )


def _check_apart(target: Path, source: Path) -> None:
    new, old = target.expanduser().resolve(), source.resolve()
    if new in old.parents:
        raise TargetError(
            "the source lies inside the target, which would be replaced",
            path=str(target),
            seen=str(source),
            mend="name another folder",
        )
    if old in new.parents:
        raise TargetError(
            "the target lies inside the source",
            path=str(target),
            seen=str(source),
            mend="name a folder beside the source",
        )


def check_file(target: Path, *, overwrite: bool, ours: Callable[[Path], bool], what: str) -> None:
    """Raise `TargetError` if a file may not be written there.

    Only an earlier file of the same kind is replaced: `ours` knows it, `what` is its name.
    """
    if not target.exists():
        return
    if target.is_dir():
        raise TargetError("the target is a folder", path=str(target), mend="name a file")
    if not overwrite:
        raise TargetError(
            "the target exists",
            path=str(target),
            mend="name another file, or replace this one with overwrite=True (--overwrite)",
        )
    if not ours(target):
        raise TargetError(
            f"the target is something else than {what}, and is not replaced",
            path=str(target),
            mend="name another file",
        )


@contextmanager
def fresh_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its place when the block ends well.

    What went wrong leaves no file behind, and the old one as it was. Only a process that is killed
    leaves the new one, which the next one writes over. Raises `TargetError` if the disk does not
    take it, or if another process is writing the same target.
    """
    target = target.expanduser().resolve()
    new = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(new, target, Path.touch):
            try:
                yield new
                flush(new)
                new.replace(target)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
        _flush_entry(target.parent)
    except FlaxslimError:
        raise
    except OSError as error:
        raise explain(target, error) from error


def _make_parents(parent: Path) -> list[Path]:
    """Make the folders above the target; return those that were made, the deepest first."""
    missing = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(parent, error, 0) from error
    return missing


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise TargetError(
            "the disk has no room for the checkpoint",
            path=str(folder.parent),
            seen=f"{_size(free)} free",
            expected=f"{_size(need)}",
            mend="free some space, or name a folder on another disk",
        )


def explain(target: Path, error: OSError, need: int = 0) -> TargetError:
    """What the system said, in our words; `need` is the number of bytes that were to be written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetError(
            "the disk ran full; nothing was kept",
            path=str(target),
            seen=reason,
            expected=f"{_size(need)} for the checkpoint" if need else None,
            mend="free some space, or name a folder on another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TargetError(
            "the target cannot be written",
            path=str(target),
            seen=reason,
            mend="name a folder in a place that you may write to",
        )
    return TargetError(
        "the target could not be written; nothing was kept", path=str(target), seen=reason
    )


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _flush(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            flush(Path(parent, name))
        _flush_entry(Path(parent))


def flush(path: Path) -> None:
    """What was written to a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_entry(folder: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened, hence not flushed, on Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
