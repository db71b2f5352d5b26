"""Parameters and a config -> a folder that is whole, in the format of the one they came from."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim import _config
from flaxslim._bits import FLOATS
from flaxslim._kinds import is_whole
from flaxslim._processes import written_by_one
from flaxslim._tree import check_living, flatten
from flaxslim.checkpoint import _card, _folder, _msgpack, _safetensors
from flaxslim.checkpoint._atomic import flush, fresh_folder
from flaxslim.checkpoint._config import config_text
from flaxslim.checkpoint._journal import Journal
from flaxslim.checkpoint._leaf import Leaf, Piece
from flaxslim.checkpoint._names import (
    convert,
    dotted,
    naming_of,
    some,
    to_torch,
    to_torch_like,
    warn_of_missing,
    without_place,
)
from flaxslim.checkpoint._pour import Progress, pour
from flaxslim.checkpoint._read import Checkpoint, read, refuse_contradiction
from flaxslim.errors import ConfigError, UnsupportedFormatError, nearest

FORMATS = ("flax", "flax-safetensors", "torch")
_SHARD = 5 * 10**9
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")


def save(
    folder: str | os.PathLike,
    params: Any,
    cfg: Any,
    *,
    like: str | os.PathLike | Checkpoint | None = None,
    format: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    shard_size: int | None = None,
) -> Path:
    """Write a checkpoint that the stock classes load; the folder appears whole or not at all.

    Args:
        folder: the target; it must not exist unless `overwrite`. Then it must be a checkpoint with
            nothing else in its folder, and stays until the new one is complete.
        params: Flax-named parameters, or PyTorch-named ones as `read` gives them.
        cfg: a `PretrainedConfig`, a dict, a dataclass or an `ml_collections.ConfigDict`.
        like: the checkpoint that they came from. Its format is kept, and its tokenizer, processor,
            model card and other side files travel along; so do PyTorch tensors that the Flax class
            has no use for (which would be stale if the cut concerned them), but none of layers that
            `params` no longer has.
        format: "flax" (flax_model.msgpack), "flax-safetensors" or "torch" (safetensors with
            PyTorch names). By default that of `like`; a pickled `.bin` becomes "torch".
        dtype: floating-point tensors are cast to it; by default they stay as they are.
        record: plain data for `flaxslim.json` (plan, version, proof). Its "card", if it has one,
            is the text of the model card's section.
        shard_size: bytes that a weight file may have, but for a single tensor that has more. By
            default weights in shards stay in shards, of at most 5 GB or the largest one of `like`,
            unless one shard is enough, and what is in one file stays in one. What is converted, or
            comes without `like`, is in shards of 5 GB.

    Leaves may be lazy (`read(..., lazy=True)`, and what `apply` makes of these): then no more than
    some rows of a few tensors are in memory. In a job of several processes each of them calls this,
    the first writes, and all wait for it. Returns the folder. Raises `ProcessError` for arrays that
    span processes, `TargetError`, what
    `read(like)` raises, `UnsupportedFormatError` (also if a conversion to Flax would lose tensors;
    see `to_flax`), and `ConfigError` for a config that is no plain data, or that says other sizes
    than the tensors of a known family have (the one from before a cut, say).

    >>> save("smaller", params, cfg, like="bert-base-uncased")  # doctest: +SKIP
    """

    def write_it() -> Path:
        return write(
            folder,
            params,
            cfg,
            source=None if like is None else read(like),
            format=format,
            dtype=dtype,
            overwrite=overwrite,
            record=record,
            shard_size=shard_size,
        )

    written_by_one(flatten(params), write_it)
    return Path(folder)


def write(
    folder: str | os.PathLike,
    params: Any,
    cfg: Any,
    *,
    source: Checkpoint | None,
    format: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    shard_size: int | None = None,
    resume: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """`save`, and how a long run is followed and gone on with.

    Args:
        resume: names what is written, for the same bytes the same. The weight files that a run
            which was killed had finished are then known by their checksums and stay.
        progress: called with each number of bytes of weights that were written, by any thread.
    """
    refuse_contradiction(params, cfg)
    kind = kind_of(format, source, params, shard_size)
    leaves = _leaves(params, cfg, kind, source)
    if dtype is not None:
        cast = _cast(dtype)
        leaves = {
            name: Leaf(array=leaf.array, axes=leaf.axes, cast=cast) for name, leaf in leaves.items()
        }
    text = config_text(cfg, dtype)
    target, old = Path(folder), None if source is None else source.folder
    side, need = {}, sum(leaf.nbytes for leaf in leaves.values()) + 2**20
    with _folder.reading(old or target):
        shards = _shards(leaves, shard_size or _cap(kind, source))
        if old is not None:
            side = _folder.side_files(old)
            for name in source.weight_files if source is not None else ():
                side.pop(name, None)  # a shard of an odd name
            need += sum(path.stat().st_size for path in side.values())
    with fresh_folder(target, need=need, overwrite=overwrite, source=old, resume=resume) as new:
        journal = Journal.of(new, resume)
        for name, path in side.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new / name)
        _write_weights(new, kind, shards, journal, progress)
        if source is not None:
            source.check_unchanged()
        (new / _folder.CONFIG).write_text(text, encoding="utf-8")
        _write_record(new, source, record, _card.how_to_load(cfg, kind))
        journal.end()
    return target


def _cast(dtype: Any) -> np.dtype:
    try:
        cast = np.dtype(dtype)
    except TypeError:
        cast = None
    if cast is None or cast not in FLOATS:
        raise UnsupportedFormatError(
            "weights are only cast to a floating-point dtype",
            seen=f"dtype={dtype!r}",
            expected=", ".join(map(str, FLOATS)),
            near=nearest(str(dtype), map(str, FLOATS)),
            mend="name one of these, or leave dtype out",
        )
    return cast


def kind_of(
    format: str | None, source: Checkpoint | None, params: Any, shard_size: int | None = None
) -> str:
    """The one of `FORMATS` that will be written; raises `UnsupportedFormatError` if none will."""
    kind = _kind(format, source, params)
    if shard_size is not None and (shard_size < 1 or kind == "flax-safetensors"):
        raise UnsupportedFormatError(
            "transformers reads no shards of Flax safetensors"
            if shard_size >= 1
            else "a shard holds at least one byte",
            seen=f"shard_size={shard_size}",
            mend='leave shard_size out, or choose format="flax" or "torch"',
        )
    return kind


def _kind(format: str | None, source: Checkpoint | None, params: Any) -> str:
    if format is None:
        naming = naming_of(flatten(params)) if source is None else source.naming
        if naming == "torch":
            return "torch"
        flax = source is None or source.format == "msgpack"
        return "flax" if flax else "flax-safetensors"
    if format not in FORMATS:
        raise UnsupportedFormatError(
            "there is no such format to write", seen=repr(format), expected=", ".join(FORMATS)
        )
    return format


def _leaves(params: Any, cfg: Any, kind: str, source: Checkpoint | None) -> dict[str, Leaf]:
    """What will be written, by the name that it has in the file."""
    flat = flatten(params)
    check_living(flat)
    torch_named = naming_of(flat) == "torch"
    if kind != "torch":
        if torch_named:
            found = convert(params, cfg)
            refuse_loss(found.unused, kind)
            warn_of_missing(found)
            flat = flatten(found.params)
        elif source is not None and source.naming == "torch":
            refuse_loss(without_place(dotted(source.params), flat), kind)
        if kind == "flax-safetensors":
            flat = {_dot(path): leaf for path, leaf in flat.items()}
        return {name: Leaf(array=_array(leaf)) for name, leaf in flat.items()}
    if torch_named:
        return {name: Leaf(array=_array(leaf)) for name, leaf in dotted(params).items()}
    flat = {path: _array(leaf) for path, leaf in flat.items()}
    like = source is not None and source.naming == "torch"
    if source and like:
        found = to_torch_like(flat, dotted(source.params), layers=_layers_said(source.config))
    else:
        found = to_torch(flat)
    _refuse_untied(found, cfg)
    return found


def _layers_said(cfg: Any) -> int:
    """How many layers a config counts in its longest stack; 0 if it says nothing of any."""
    found = [0]
    for key in _config.keys(cfg):
        value = None if "." in key else _config.read(cfg, key)
        if value is None:
            continue
        if "layer" in key and is_whole(value):
            found.append(int(value))
        elif key.endswith("config"):
            found.append(_layers_said(value))
    return max(found)


def check_writable(params: Any, cfg: Any, source: Checkpoint) -> None:
    """Raise what `write` would of parameters that get other values, but keep their names."""
    _leaves(params, cfg, kind_of(None, source, params), source)


def _refuse_untied(leaves: Mapping[str, Leaf], cfg: Any) -> None:
    """Raise `ConfigError` for a head of its own that PyTorch would tie to the embedding.

    The Flax classes of LLaMA and Mistral do not look at `tie_word_embeddings`.
    """
    key = "tie_word_embeddings"
    if not (_config.has(cfg, key) and _config.read(cfg, key)):
        return
    for name, head in leaves.items():
        if not name.endswith("lm_head.weight"):
            continue
        for other, leaf in leaves.items():
            if other.endswith(_EMBEDDINGS) and leaf.shape == head.shape:
                if not np.array_equal(leaf.numpy(), head.numpy()):
                    raise ConfigError(
                        "the config ties the head to the embedding, and they differ: PyTorch would "
                        "take the embedding for both",
                        path=name,
                        seen=f"{key} is true, and other values than in {other}",
                        mend=f"set {key} to false in the config, which is what the Flax class does",
                    )
                return


def refuse_loss(names: tuple[str, ...], kind: str) -> None:
    """Raise `UnsupportedFormatError` if a conversion to Flax would leave tensors behind."""
    if names:
        raise UnsupportedFormatError(
            "the Flax tree has no place for tensors of the PyTorch checkpoint, which would be lost",
            seen=f"{len(names)} of them: {some(names)}",
            mend=f'keep the PyTorch format in place of format="{kind}"; or name the Flax class of '
            "the family that has them (cfg.architectures), or drop them from the tree first",
        )


def _array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)


def _dot(path: str) -> str:
    if "." in path:
        raise UnsupportedFormatError(
            "Flax safetensors join names by dots, and this name has one of its own",
            path=path,
            mend='use format="flax" (msgpack)',
        )
    return path.replace("/", ".")


# --- weights ----------------------------------------------------------------------------------


def _cap(kind: str, source: Checkpoint | None) -> int | None:
    """Bytes that a weight file may have; None if it may have any number."""
    if kind == "flax-safetensors":
        return None  # transformers reads no shards of these
    if source is None:
        return _SHARD
    if not source.sharded:
        # One file stays one file. A conversion is a new choice, made as transformers makes it.
        return None if kind_of(None, source, source.params) == kind else _SHARD
    largest = max((source.folder / name).stat().st_size for name in source.weight_files)
    return min(_SHARD, largest)


def _shards(leaves: Mapping[str, Leaf], cap: int | None) -> list[dict[str, Leaf]]:
    shards: list[dict[str, Leaf]] = [{}]
    room = cap
    for name, leaf in leaves.items():
        if cap is not None and room is not None:
            if leaf.nbytes > room and shards[-1]:
                shards.append({})
                room = cap
            room -= leaf.nbytes
        shards[-1][name] = leaf
    return shards


def _pieces(kind: str, leaves: Mapping[str, Leaf]) -> Sequence[Piece]:
    if kind == "flax":
        return tuple(_msgpack.pieces(leaves))
    return _safetensors.pieces(leaves, {"format": "pt" if kind == "torch" else "flax"})


def _write_weights(
    folder: Path,
    kind: str,
    shards: list[dict[str, Leaf]],
    journal: Journal,
    progress: Progress | None,
) -> None:
    stem, suffix = ("flax_model", "msgpack") if kind == "flax" else ("model", "safetensors")
    progress = progress or (lambda count: None)
    count = len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.{suffix}"]
    with ThreadPoolExecutor(1) as pool:
        flushed = []  # while the next one is written
        for name, leaves in zip(names, shards, strict=True):
            pieces = _pieces(kind, leaves)
            if journal.has(name, pieces):
                progress(sum(piece.nbytes for piece in pieces))
                continue
            journal.add(name, pour(folder / name, pieces, progress))
            flushed.append(pool.submit(flush, folder / name))
        for future in flushed:
            future.result()
    if count > 1:
        weight_map = {
            tensor: name for name, leaves in zip(names, shards, strict=True) for tensor in leaves
        }
        total = sum(leaf.nbytes for leaves in shards for leaf in leaves.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.{suffix}.index.json", index)


# --- everything else --------------------------------------------------------------------------


def _write_record(
    folder: Path, source: Checkpoint | None, record: Mapping[str, Any] | None, how_to_load: str
) -> None:
    card = "" if source is None else _card_of(source.folder)
    if record is not None:
        _write_json(folder / _folder.RECORD, dict(record))
    if record is not None or how_to_load:
        parts = (_card.section(record) if record is not None else "", how_to_load)
        card = _card.with_section(card, "\n\n".join(filter(None, parts)))
    if card:
        (folder / _folder.CARD).write_text(card, encoding="utf-8")


def _card_of(folder: Path) -> str:
    path = _folder.inside(folder, _folder.CARD)
    # A card is for people: a byte that is no UTF-8 must not stand in the way of the weights.
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
