"""A folder or a Hub repository -> what it stores, and the same as Flax parameters."""

import os
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim._draw import check_config
from flaxslim._tree import flatten
from flaxslim.checkpoint import _folder, _msgpack, _safetensors
from flaxslim.checkpoint._leaf import nest
from flaxslim.checkpoint._names import naming_of, spec_named, to_flax
from flaxslim.errors import (
    CorruptFileError,
    FlaxslimError,
    HubError,
    MissingFileError,
    UnsupportedFormatError,
    nearest,
    neighbours,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint as it is stored.

    `params` is a nested dict of numpy arrays with the stored names, axes and dtypes: the Flax tree,
    or PyTorch names split at their dots (`naming` "flax" or "torch"). Leaves of safetensors files
    are read-only views of the mapped file; of a lazy checkpoint, all but those of a `.bin` are
    read when they are turned into arrays. `notes` are sentences for the user.
    """

    params: dict[str, Any] = field(repr=False)
    config: Any = field(repr=False)
    naming: str
    format: str
    folder: Path
    weight_files: tuple[str, ...]
    sharded: bool
    stamps: Mapping[str, tuple[int, ...]] = field(repr=False)
    notes: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raise `CorruptFileError` if a weight file is not the one that was read."""
        for name, stamp in self.stamps.items():
            path = self.folder / name
            if not path.is_file() or _stamp(path) != stamp:
                raise CorruptFileError(
                    "a file of the source was changed while it was in use",
                    path=str(path),
                    mend="let nothing write to the source, and start again",
                )


def read(
    source: str | os.PathLike | Checkpoint,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    lazy: bool = False,
) -> Checkpoint:
    """Read a folder or a Hub repository as it is stored.

    A folder that exists wins over a Hub id of the same name. `revision` and `token` are for the
    Hub; a folder has no revisions. With `lazy`, leaves have a shape and a dtype, and their values
    are read each time when they are turned into arrays (`np.asarray`): so for what does not fit
    into memory. Raises `MissingFileError`, `CorruptFileError`, `UnsafePathError`,
    `UnsupportedFormatError` or `HubError`, all of them `CheckpointError`s.

    >>> checkpoint = read("path/to/folder")  # doctest: +SKIP
    >>> checkpoint.naming, checkpoint.format  # doctest: +SKIP
    ('torch', 'safetensors')
    """
    if isinstance(source, Checkpoint):
        return source
    with _folder.reading(str(source)):
        folder = _locate(source, revision, token)
    with _folder.reading(folder):
        return _read(folder, lazy)


def _read(folder: Path, lazy: bool) -> Checkpoint:
    config = read_config(folder)
    present = [weights.name for weights in _folder.KNOWN if (folder / weights.name).is_file()]
    found = _folder.choose(present)
    if not found:
        raise _no_weights(folder)
    taken, ignored = found[0], found[1:]
    notes = []
    if ignored:
        names = ", ".join(weights.name for weights in ignored)
        notes.append(f"took {taken.name} and left {names}: transformers' Flax classes do the same")
    by_file = _folder.shards(folder, taken.name) if taken.sharded else {taken.name: []}

    flat: dict[str, Any] = {}
    formats: set[str] = set()
    stamps = {}
    for name, promised in by_file.items():
        path = _folder.inside(folder, name)
        with _folder.reading(path):
            stamps[name] = _stamp(path)
            tensors, declared = _READERS[taken.format](path, lazy)
        absent = sorted(set(promised) - set(tensors))
        if absent:
            raise CorruptFileError(
                f"a shard lacks {len(absent)} of the tensors that the index promises",
                path=str(folder / name),
                seen="no " + ", ".join(absent[:3]) + (" ..." if absent[3:] else ""),
                near=nearest(absent[0], tensors),
                mend="download or copy the file again",
            )
        _check_once(tensors, flat, promised, folder / name)
        flat.update(tensors)
        formats.add(declared)
    naming = "flax" if taken.format == "msgpack" else _naming(folder, flat, formats, notes)
    slashes = taken.format == "msgpack" or any("/" in name for name in flat)
    try:
        params = nest(flat, "/" if slashes else ".")
    except ValueError as error:
        raise CorruptFileError(
            "the tensor names contradict each other", path=str(folder), seen=error
        ) from None
    return Checkpoint(
        params=params,
        config=config,
        naming=naming,
        format=taken.format,
        folder=folder,
        weight_files=tuple(by_file),
        sharded=taken.sharded,
        stamps=stamps,
        notes=tuple(notes),
    )


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _check_once(
    tensors: Collection[str], others: Collection[str], promised: Collection[str], path: Path
) -> None:
    """Raise `CorruptFileError` if a shard has tensors of another, or that the index knows not."""
    twice, extra = sorted({*tensors} & {*others}), sorted({*tensors} - {*(promised or tensors)})
    if twice or extra:
        what = "that are in another shard, too" if twice else "that the index does not name"
        raise CorruptFileError(
            f"a shard has {len(twice or extra)} tensors {what}",
            path=str(path),
            seen=", ".join((twice or extra)[:3]) + (" ..." if (twice or extra)[3:] else ""),
            mend="the files are of two different savings: download or copy the whole folder again",
        )


def load(
    source: str | os.PathLike | Checkpoint,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[dict[str, Any], Any]:
    """Parameters with Flax names, whatever lies on disk, and the config.

    The stock Flax class of the config runs them: `model(**inputs, params=params)`. Dtypes are kept.
    Raises as `read` does, and `ConfigError` if the config's sizes contradict the tensors. Of
    PyTorch-named files it warns of tensors that the class needs and they lack (they are left out,
    never made up), and of those that they have and the class has no place for.

    >>> params, cfg = load("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    """
    checkpoint = read(source, revision=revision, token=token)
    if checkpoint.naming == "flax":
        refuse_contradiction(checkpoint.params, checkpoint.config)
        return checkpoint.params, checkpoint.config
    return to_flax(checkpoint.params, checkpoint.config), checkpoint.config


def refuse_contradiction(params: Any, cfg: Any) -> None:
    """Raise `ConfigError` or `SiteShapeError` for a config of other sizes than the tensors have."""
    try:
        sites = spec_named(cfg, "all", naming_of(flatten(params))).sites(params, cfg)
    except FlaxslimError:  # of no known family, or not all of it
        return
    check_config(sites, cfg)


def read_config(folder: Path) -> Any:
    """The config class of the folder's `model_type`; a plain `PretrainedConfig` if it is unknown.

    Made from the JSON and not by `AutoConfig.from_pretrained`, which would guess a missing
    `model_type` from the folder's name and offer to run the repository's own Python code.
    """
    path = _folder.inside(folder, _folder.CONFIG)
    if not path.is_file():
        raise MissingFileError(
            "the folder has no config.json",
            path=str(folder),
            seen=_folder.listing(folder, 6),
            mend="pass the folder that model.save_pretrained(...) wrote",
        )
    return config_of(path)


def config_of(path: Path) -> Any:
    """The config in a JSON file."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with _folder.reading(path):
        values = _folder.read_json(path)
    kind, named = values.get("model_type"), values.get("architectures")
    texts = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if not isinstance(kind, str | None) or not (named is None or texts):
        raise CorruptFileError(
            "the config does not say which model it is of",
            path=str(path),
            seen=f"model_type {kind!r}, architectures {named!r}",
            expected='"bert", and a list such as ["BertModel"]',
            mend="correct the file, or download it again",
        )
    cls = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    try:
        return (cls or PretrainedConfig).from_dict(values)
    except Exception as error:  # its classes raise whatever the values lead to
        raise CorruptFileError(
            "transformers cannot make a config of this file",
            path=str(path),
            seen=error,
            mend="correct the file, or download it again",
        ) from error


def _locate(source: str | os.PathLike, revision: str | None, token: str | bool | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HubError(
                "a folder has no revisions",
                path=str(path),
                seen=f"revision {revision!r}",
                mend="leave the revision out; if the repository of that name on the Hub is meant, "
                "start where there is no such folder",
            )
        return path
    if path.is_file():
        raise MissingFileError(
            "a checkpoint is a folder, and this is a file",
            path=str(path),
            mend="pass the folder in which it lies beside its config.json",
        )
    from flaxslim.checkpoint import _hub

    if not isinstance(source, str) or not _hub.plausible(source):
        raise MissingFileError(
            "there is no such folder, and it cannot be a Hub id",
            path=str(source),
            near=neighbours(path),
            expected="a folder, or 'name' or 'owner/name' on the Hub",
            mend="check the spelling",
        )
    return _hub.fetch(source, revision=revision, token=token)


def _no_weights(folder: Path) -> MissingFileError:
    return MissingFileError(
        "the folder has no weights that flaxslim reads",
        path=str(folder),
        seen=_folder.listing(folder, 8),
        expected=", ".join(weights.name for weights in _folder.KNOWN),
        mend="save the model with model.save_pretrained(folder), which writes one of these",
    )


# --- the three formats ------------------------------------------------------------------------


def _from_msgpack(path: Path, lazy: bool) -> tuple[dict[str, Any], str]:
    tree = _msgpack.stored(path)
    found = flatten(tree) if tree else {}
    return found if lazy else {name: np.asarray(leaf) for name, leaf in found.items()}, "flax"


def _from_safetensors(path: Path, lazy: bool) -> tuple[dict[str, Any], str]:
    tensors, metadata = _safetensors.stored(path)
    found = dict(tensors) if lazy else _safetensors.mapped(tensors)
    return found, str(metadata.get("format", ""))


def _from_bin(path: Path, lazy: bool) -> tuple[dict[str, Any], str]:
    """By `torch.load(weights_only=True)`, which builds tensors and runs nothing."""
    mend = (
        "convert it to safetensors where torch is installed: AutoModel.from_pretrained(folder)"
        ".save_pretrained(new_folder); or look for a revision that has a model.safetensors"
    )
    try:
        import torch
    except ImportError:
        raise UnsupportedFormatError(
            "the weights are a PyTorch pickle, which is only read through torch",
            path=str(path),
            seen="torch is not installed",
            mend=mend,
        ) from None
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        raise UnsupportedFormatError(
            "torch before 2.6 can be made to run code by a pickle, even with weights_only=True",
            path=str(path),
            seen=f"torch {torch.__version__}",
            mend="install torch 2.6 or later, or " + mend,
        )
    _check_records(path, mend)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors for bad files
        raise CorruptFileError(
            "torch does not read this file as plain weights",
            path=str(path),
            seen=str(error).splitlines()[0] if str(error) else type(error).__name__,
            mend=mend,
        ) from error
    if not isinstance(state, Mapping):
        raise CorruptFileError("not a state dict", path=str(path), seen=type(state).__name__)
    for name, tensor in state.items():
        if not isinstance(name, str) or getattr(tensor, "layout", None) != torch.strided:
            raise CorruptFileError(
                "the pickle holds more than weights",
                path=str(path),
                seen=f"{name!r}: a {type(tensor).__name__}",
                expected="dense tensors by their names",
                mend='save these alone: torch.save(checkpoint["model"], path)',
            )
    return {name: _numpy(tensor) for name, tensor in state.items()}, "pt"


def _check_records(path: Path, mend: str) -> None:
    """Refuse an archive with records of which torch reads nothing, and gives what memory held.

    Its zip reader takes a record for a folder by one bit, and skips one that says it has no bytes.
    """
    if not zipfile.is_zipfile(path):
        return  # the format of old: torch reads it whole or fails
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch says what is wrong
    for record in records:
        folder = record.is_dir() or record.external_attr & 0x10
        if record.file_size and (folder or not record.compress_size):
            raise CorruptFileError(
                "the archive has a record without its bytes",
                path=str(path),
                seen=f"{record.filename}: "
                + ("marked as a folder" if folder else f"0 of {record.file_size:,} bytes"),
                mend=mend,
            )


def _numpy(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        own = str(tensor.dtype).removeprefix("torch.")
        return tensor.view(torch.uint8).numpy().view(getattr(ml_dtypes, own))
    return tensor.numpy()


_READERS = {"msgpack": _from_msgpack, "safetensors": _from_safetensors, "bin": _from_bin}


def _naming(
    folder: Path, names: Collection[str], formats: Collection[str], notes: list[str]
) -> str:
    """Whose names these are. They decide over metadata: no PyTorch module names a tensor kernel."""
    if "tf" in formats:
        raise UnsupportedFormatError(
            "the weights have TensorFlow names",
            path=str(folder),
            mend="save the model from its PyTorch or Flax class, and pass that folder",
        )
    last = {name.replace("/", ".").rsplit(".", 1)[-1] for name in names}
    naming = "flax" if last & {"kernel", "embedding"} else "torch"
    if naming == "torch" and "flax" in formats and not last & {"weight"}:
        naming = "flax"
    declared = {"pt": "torch", "flax": "flax"}
    if any(declared.get(format, naming) != naming for format in formats):
        notes.append(f"the metadata says format {', '.join(formats)}, but the names are {naming}'s")
    return naming
