"""What lies in a checkpoint's folder: the weights that are taken, and what travels along.

Everything here works on names alone, so that it says the same about a folder on disk and about
the file list of a Hub repository.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from flaxslim.errors import CorruptFileError, FlaxslimError, MissingFileError, UnsafePathError

CONFIG, CARD, RECORD = "config.json", "README.md", "flaxslim.json"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One way in which a folder may hold weights."""

    format: str
    name: str

    @property
    def sharded(self) -> bool:
        return self.name.endswith(".index.json")


# In the order in which transformers' FlaxPreTrainedModel.from_pretrained looks for them.
KNOWN = (
    Weights(format="msgpack", name="flax_model.msgpack"),
    Weights(format="msgpack", name="flax_model.msgpack.index.json"),
    Weights(format="safetensors", name="model.safetensors"),
    Weights(format="safetensors", name="model.safetensors.index.json"),
    Weights(format="bin", name="pytorch_model.bin"),
    Weights(format="bin", name="pytorch_model.bin.index.json"),
)

_WEIGHT = re.compile(
    r"\.(msgpack|safetensors|h5|onnx|onnx_data|ot|pt|pth|ckpt|pkl|pickle|gguf|tflite|mlmodel)$"
    r"|(model|weights|optimizer|scheduler|training_args|random_states).*\.bin$"  # not tok512.bin
    r"|\.index\.json$"
)
# Other exports of the same model and the remains of its training: they would go stale.
_STALE_FOLDER = re.compile(r"(onnx|openvino|coreml|runs|logs|checkpoint-\d+|\..*)$")
# A sentence-transformers module after the encoder ("2_Dense"): its weights are not another format
# of the encoder's, and the folder does not load without them.
_MODULE_FOLDER = re.compile(r"\d+_[A-Z]\w*$")
# What transformers, sentence-transformers and flaxslim name the parts of a checkpoint. `travels`
# errs towards carrying a file along; this errs towards calling it somebody's own.
_PART = re.compile(
    r"(flax_model|model|pytorch_model)-\d+-of-\d+\.(msgpack|safetensors|bin)"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|normalizer|generation_config"
    r"|((image|video)_)?(pre)?processor_config|chat_template|modules|sentence_\w+_config"
    r"|config_sentence_transformers)\.json"
    r"|(vocab|merges|dict|entity_vocab|bpe)\.(json|txt|bpe|codes|spm|model)"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model|(source|target)\.spm"
    r"|chat_template\.jinja|additional_chat_templates/\w+\.jinja"
    r"|(modeling|configuration|tokenization|processing)_\w+\.py"
    r"|(LICENSE|NOTICE)(\.(txt|md))?"
)


def choose(names: Collection[str]) -> list[Weights]:
    """The weights among these file names, the one that is taken first.

    >>> [w.name for w in choose({"model.safetensors", "flax_model.msgpack", "config.json"})]
    ['flax_model.msgpack', 'model.safetensors']
    """
    return [weights for weights in KNOWN if weights.name in names]


def travels(name: str) -> bool:
    """Whether a file goes along when its checkpoint is saved elsewhere.

    >>> travels("tokenizer.json"), travels("1_Pooling/config.json"), travels("tf_model.h5")
    (True, True, False)
    >>> travels("tok512.bin"), travels("pytorch_model-00001-of-00002.bin")
    (True, False)
    """
    *folders, base = name.split("/")
    if base.startswith(".") or any(_STALE_FOLDER.match(folder) for folder in folders):
        return False
    if not folders and base in (CONFIG, CARD, RECORD):
        return False  # written anew
    if folders and _MODULE_FOLDER.match(folders[0]):
        return True
    return not _WEIGHT.search(base)


def side_files(folder: Path) -> dict[str, Path]:
    """The files that travel along, by their names relative to the folder.

    Raises `UnsafePathError` for a link that would not travel, or that leads out of the folder.
    """
    names = []
    for parent, folders, files in os.walk(folder):
        below = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if travels((below / name / "x").as_posix())]
        for name in folders:
            if (folder / below / name).is_symlink():  # its files would be left behind
                raise UnsafePathError(
                    "a folder that belongs to the checkpoint is a link, and is not followed",
                    path=str(folder / below / name),
                    mend="put a copy of the folder in its place",
                )
        names += [(below / name).as_posix() for name in files]
    return {name: inside(folder, name) for name in sorted(names) if travels(name)}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a config, and weights or flaxslim's own record."""
    names = (RECORD, *(weights.name for weights in KNOWN))
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in names)


def foreign(folder: Path, carried: Collection[str] = ()) -> list[str]:
    """What in a checkpoint's folder is no part of a checkpoint, the names of folders with a slash.

    `carried` are names of files that are taken for parts too.
    """
    own = {CONFIG, CARD, RECORD, *(weights.name for weights in KNOWN), *carried}
    found = []
    for parent, folders, files in os.walk(folder):
        below = Path(parent).relative_to(folder)
        for name in list(folders):
            path = (below / name).as_posix()
            # Not looked into: a history or a training run has thousands of files.
            if not travels(f"{path}/x") or (folder / path).is_symlink():
                folders.remove(name)
                found.append(f"{path}/")
        for name in files:
            path = (below / name).as_posix()
            part = _PART.fullmatch(path) or _MODULE_FOLDER.match(path.partition("/")[0])
            if path not in own and not part:
                found.append(path)
    return sorted(found)


def listing(folder: Path, count: int) -> str:
    """The first names in a folder, those of folders with a slash, for messages."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return ", ".join(names[:count]) or "nothing"


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """An `OSError` within becomes `MissingFileError` or `CorruptFileError` about that path."""
    try:
        yield
    except FlaxslimError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            "a file is missing, or is a link to nothing",
            path=str(error.filename or path),
            mend="download or copy it into the folder",
        ) from error
    except OSError as error:
        raise CorruptFileError(
            "a file cannot be read",
            path=str(error.filename or path),
            seen=error.strerror or error,
            expected="a plain file that you may read",
            mend="correct its permissions, or download or copy it again",
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in the folder, be it there or not.

    Raises `UnsafePathError` if the name, or the link that lies there, leads out of the folder. The
    links of a Hub cache into the blobs of the same repository are allowed.
    """
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.anchor or ".." in windows.parts:
        raise UnsafePathError(
            "a file name leads out of the checkpoint's folder",
            path=str(folder),
            seen=repr(name),
            expected="a name relative to the folder, without '..'",
            mend="correct the index; if it came from the Hub, do not trust that repository",
        )
    path, root = folder / name, folder.resolve()
    try:
        real = path.resolve()
    except (ValueError, RuntimeError) as error:  # a NUL or half a character; links in a circle
        raise CorruptFileError(
            "a name leads to no file",
            path=str(folder),
            seen=f"{name!r}: {error}",
            mend="correct the index, or copy the folder again",
        ) from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UnsafePathError(
            "a link leads out of the checkpoint's folder",
            path=str(path),
            seen=f"a link to {real}",
            mend="copy the file into the folder in place of the link",
        )
    return path


def refuse_pointer(path: Path) -> None:
    """Raise `CorruptFileError` for what Git LFS puts in the place of a large file."""
    with path.open("rb") as file:
        if file.read(8) != b"version ":
            return
    raise CorruptFileError(
        "a Git LFS pointer lies where the weights should be",
        path=str(path),
        mend="run `git lfs pull` in that folder",
    ) from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; `CorruptFileError` if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            "not JSON", path=str(path), seen=str(error), mend="download or copy the file again"
        ) from None
    if not isinstance(value, dict):
        raise CorruptFileError("not a JSON object", path=str(path), seen=type(value).__name__)
    return value


def _check_depth(value: Any) -> None:
    """Raise `ValueError` for what those who look into it, or copy it, would not come to the end of.

    The limit is that of the safetensors library for its headers.
    """
    nodes = [value]
    for _ in range(128):
        inner = [node for node in nodes if isinstance(node, dict | list)]
        nodes = [x for node in inner for x in (node.values() if isinstance(node, dict) else node)]
        if not nodes:
            return
    raise ValueError("it is nested more than 128 deep")


def shards(folder: Path, index: str) -> dict[str, list[str]]:
    """Tensor names by shard file, as an index says it; every shard is there.

    Raises `CorruptFileError`, `UnsafePathError`, or `MissingFileError` for an absent shard.
    """
    by_file = shard_names(inside(folder, index))
    absent = [name for name in by_file if not inside(folder, name).is_file()]
    if absent:
        raise MissingFileError(
            f"{len(absent)} of {len(by_file)} shards are missing",
            path=str(folder / index),
            seen="no " + ", ".join(absent[:3]) + (" ..." if absent[3:] else ""),
            mend="download or copy the missing files into the folder",
        )
    return by_file


def shard_names(index: Path) -> dict[str, list[str]]:
    """Tensor names by shard file, whether the files are there or not."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CorruptFileError(
            "the index has no weight_map", path=str(index), expected="tensor name -> shard file"
        )
    by_file: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        inside(index.parent, name)
        by_file.setdefault(name, []).append(tensor)
    return dict(sorted(by_file.items()))
