"""An Orbax checkpoint as a tree of lazy leaves: metadata now, and values when asked for."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxslim._tree import flatten, name_of
from flaxslim.checkpoint._chunks import Stored
from flaxslim.checkpoint._folder import read_json
from flaxslim.errors import (
    CorruptFileError,
    FlaxslimError,
    MissingFileError,
    UnsupportedFormatError,
)

_ITEMS = ("params", "items", "default", "state")  # as CheckpointManagers call what they save
_METADATA = "_METADATA"
_CHUNK = 2**20  # bytes; up to here a chunk may be larger than what lies in it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredTree:
    """The item of an Orbax checkpoint: its tree, with lazy leaves, and how it is stored."""

    folder: Any
    tree: Any
    ocdbt: bool
    zarr3: bool
    custom: Any


def read_orbax(source: str | os.PathLike) -> StoredTree:
    """The metadata of a checkpoint as a tree of lazy leaves (numbers and texts are read).

    Raises `MissingFileError` if there is none, or several to choose from.
    """
    folder = item_folder(address(source))
    if os.path.isdir(folder):
        for path in (*Path(folder).glob("*/.zarray"), *Path(folder).glob("*/zarr.json")):
            read_json(path)  # TensorStore ends the process where one is nested too deep
    try:
        return _read(folder)
    except FlaxslimError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever a file leads them to
        raise CorruptFileError(
            "Orbax cannot read the metadata of the checkpoint",
            path=str(folder),
            seen=(str(error).splitlines() or [type(error).__name__])[0],
            mend="copy the checkpoint again",
        ) from error


def _read(folder: Any) -> StoredTree:
    import orbax.checkpoint as ocp

    metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
    ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(folder)
    context = ocp.type_handlers.get_ts_context(use_ocdbt=ocdbt)

    texts = _texts(ocp, folder, metadata.tree)

    def leaf(keys: Any, entry: Any) -> Any:
        path = name_of(keys)
        if isinstance(entry, ocp.metadata.ArrayMetadata):
            store = _opened(entry.name, folder, ocdbt, bool(metadata.use_zarr3), context)
            lazy = Stored(store=store, path=f"{folder}: {path}")
            number = isinstance(entry, ocp.metadata.ScalarMetadata)
            return np.asarray(lazy).item() if number else lazy
        if isinstance(entry, ocp.metadata.StringMetadata):
            return texts[path]
        raise UnsupportedFormatError(
            "the checkpoint holds something that is no array",
            path=f"{folder}: {path}",
            seen=type(entry).__name__,
            mend="save the parameters alone, and slim those",
        )

    return StoredTree(
        folder=folder,
        tree=jax.tree_util.tree_map_with_path(leaf, metadata.tree),
        ocdbt=ocdbt,
        zarr3=bool(metadata.use_zarr3),
        custom=metadata.custom_metadata,
    )


def _texts(ocp: Any, folder: Any, tree: Any) -> dict[str, str]:
    """The strings among the leaves, by path."""

    def is_text(entry: Any) -> bool:
        return isinstance(entry, ocp.metadata.StringMetadata)

    if not any(map(is_text, jax.tree.leaves(tree))):
        return {}
    wanted = jax.tree.map(lambda entry: "" if is_text(entry) else ocp.PLACEHOLDER, tree)
    found = ocp.PyTreeCheckpointHandler().restore(folder, args=ocp.args.PyTreeRestore(wanted))
    return {path: leaf for path, leaf in flatten(found).items() if isinstance(leaf, str)}


def _opened(name: str, folder: Any, ocdbt: bool, zarr3: bool, context: Any) -> Any:
    import orbax.checkpoint as ocp
    import tensorstore

    info = ocp.type_handlers.ParamInfo(
        name=name,
        parent_dir=folder,
        is_ocdbt_checkpoint=ocdbt,
        use_zarr3=zarr3,
        ts_context=context,
    )
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=ocdbt)
    opening = tensorstore.open(tensorstore.Spec(spec), open=True, read=True, context=context)
    return _checked(opening.result(), f"{folder}: {name}")


def _checked(store: Any, path: str) -> Any:
    """Refuse chunks that no array has; TensorStore ends the process where one finds no memory."""
    chunk, shape = store.chunk_layout.read_chunk.shape or (), tuple(store.shape)
    itemsize = store.dtype.numpy_dtype.itemsize
    if itemsize * math.prod(chunk) > max(2 * itemsize * math.prod(shape), _CHUNK):
        raise CorruptFileError(
            "the chunks of an array are larger than the array",
            path=path,
            seen=f"chunks of {tuple(chunk)} for an array of {shape}",
            mend="copy the checkpoint again",
        )
    return store


def is_orbax(source: str | os.PathLike) -> bool:
    """Whether a local folder is a checkpoint of Orbax, or a step that has one."""
    folder = Path(source)
    return (folder / _METADATA).is_file() or any(folder.glob(f"*/{_METADATA}"))


def item_folder(folder: Any) -> Any:
    """Where the tree is stored: the folder itself, or the item of a step of a CheckpointManager.

    Raises `MissingFileError` if there is none, or several to choose from.
    """
    if (folder / _METADATA).exists():
        return folder
    if not folder.exists():
        raise MissingFileError("there is no such folder", path=str(folder))
    items = [entry for entry in folder.iterdir() if (entry / _METADATA).exists()]
    by_name = {entry.name: entry for entry in items}
    known = [by_name[name] for name in _ITEMS if name in by_name]
    if len(items) == 1:
        return items[0]
    if len(known) == 1:
        return known[0]
    names = sorted(entry.name for entry in items or folder.iterdir())
    raise MissingFileError(
        "this is a step with several items" if items else "this is no checkpoint of Orbax",
        path=str(folder),
        seen=", ".join(names[:6]) or "nothing",
        expected=f"a folder with {_METADATA}",
        mend="name the item: .../100/params"
        if items
        else "name the step, and its item: .../100/default",
    )


def address(place: str | os.PathLike) -> Any:
    """A path or an address (`gs://...`) as Orbax takes it: absolute, by etils.

    Raises `UnsupportedFormatError` where Orbax is not installed.
    """
    try:
        import orbax.checkpoint  # noqa: F401
        from etils import epath
    except ImportError as error:
        raise UnsupportedFormatError(
            "Orbax checkpoints are read by orbax-checkpoint, which is not installed",
            mend="pip install 'flaxslim[orbax]'",
        ) from error
    path = epath.Path(os.fspath(place)).expanduser()
    return path if "://" in os.fspath(path) else path.absolute()
