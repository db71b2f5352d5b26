"""Folders at `gs://`, `s3://` and other addresses of fsspec, by way of a local one.

`fetched` copies one in, `sent` copies one out; what is a local path or a Hub id passes through, so
that a caller need not ask. The rest of this room knows local folders alone. (Orbax needs none of
this: it reads and writes such addresses itself.)
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxslim.checkpoint import _folder
from flaxslim.errors import (
    FlaxslimError,
    MissingFileError,
    TargetError,
    UnsupportedFormatError,
)

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://")


def is_address(place: str | os.PathLike) -> bool:
    """Whether something is an address of fsspec, and no path.

    >>> is_address("gs://bucket/model"), is_address("org/name"), is_address("C:/model")
    (True, False, False)
    """
    return bool(_ADDRESS.match(os.fspath(place)))


@contextmanager
def fetched(source: str) -> Iterator[str]:
    """A local folder with what a checkpoint at an address needs, which goes with the block.

    Config, side files and the one weight format that is read are copied. Anything but an address
    is given back as it is. Raises `MissingFileError`, `CorruptFileError` or `UnsafePathError` for a
    bad index, and `UnsupportedFormatError` for an address whose package is not installed.

    >>> with fetched("s3://bucket/model") as folder:  # doctest: +SKIP
    ...     params, cfg = load(folder)
    """
    if not is_address(source):
        yield source
        return
    fs, root = _file_system(source)
    with tempfile.TemporaryDirectory(prefix="flaxslim-") as top:
        folder = Path(top) / (root.rpartition("/")[2] or "checkpoint")
        folder.mkdir()
        try:
            _fetch(fs, root, folder, source)
        except FlaxslimError:
            raise
        except Exception as error:  # each file system has errors of its own
            what = "the address does not give the checkpoint"
            raise _told(error, MissingFileError, what, source) from error
        yield str(folder)


@contextmanager
def sent(target: str | os.PathLike) -> Iterator[Path]:
    """A local path for a folder that is copied to an address when the block ends well.

    `config.json` is copied last, and without it neither flaxslim nor transformers takes a folder
    for a checkpoint; if something goes wrong before, all that was copied is removed. The address
    must not exist. A path that is no address is given back as it is, and where the block makes no
    folder nothing is copied. Raises `TargetError`, or `UnsupportedFormatError` as `fetched` does.

    >>> with sent("gs://bucket/smaller") as folder:  # doctest: +SKIP
    ...     save(folder, params, cfg)
    """
    if not is_address(target):
        yield Path(target)
        return
    address = os.fspath(target)
    fs, root = _file_system(address)
    if fs.exists(root):
        raise TargetError("the target exists", path=address, mend="name another folder")
    with tempfile.TemporaryDirectory(prefix="flaxslim-") as top:
        folder = Path(top) / (root.rpartition("/")[2] or "checkpoint")
        yield folder
        if folder.is_dir():
            try:
                _send(fs, folder, root)
            except Exception as error:  # each file system has errors of its own
                what = "the checkpoint could not be written; nothing was kept"
                raise _told(error, TargetError, what, address) from error


def _fetch(fs: Any, root: str, folder: Path, source: str) -> None:
    names = {path.removeprefix(root).lstrip("/") for path in fs.find(root)}
    found = _folder.choose(names)
    if not found:
        raise MissingFileError(
            "the folder has no weights that flaxslim reads",
            path=source,
            seen=", ".join(sorted(names)[:8]) or "nothing",
            expected=", ".join(weights.name for weights in _folder.KNOWN),
        )
    taken = found[0]
    own = {_folder.CONFIG, _folder.CARD, _folder.RECORD, taken.name}
    wanted = {name for name in names if name in own or _folder.travels(name)}
    _get(fs, root, folder, wanted)
    if taken.sharded:
        shards = _folder.shard_names(_folder.inside(folder, taken.name))
        _get(fs, root, folder, shards.keys() & names)


def _get(fs: Any, root: str, folder: Path, names: Any) -> None:
    for name in sorted(names):
        path = _folder.inside(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(f"{root}/{name}", str(path))


def _send(fs: Any, folder: Path, root: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path == folder / _folder.CONFIG, path))
    try:
        for path in files:
            to = f"{root}/{path.relative_to(folder).as_posix()}"
            fs.makedirs(to.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(path), to)
    except BaseException:
        if fs.exists(root):
            fs.rm(root, recursive=True)
        raise


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path of the folder in it."""
    mend = "pip install the package that fsspec names: gcsfs for gs://, s3fs for s3://"
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UnsupportedFormatError(
            "there is no file system for this address", path=address, seen=error, mend=mend
        ) from error
    return fs, root.rstrip("/")


def _told(error: Exception, cls: type[FlaxslimError], what: str, address: str) -> FlaxslimError:
    seen = f"{type(error).__name__}: {error}".splitlines()[0]
    return cls(what, path=address, seen=seen)
