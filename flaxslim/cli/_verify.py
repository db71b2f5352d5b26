"""The proof for two checkpoints: of `flaxslim verify`, and of `slim` before it writes."""

import contextlib
import dataclasses
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxslim import _record
from flaxslim._by_layer import changed, equal, fault, verify_by_layer
from flaxslim._compat import parameter_shapes
from flaxslim._inputs import model_class_for
from flaxslim._proof import OutputRow, Proof
from flaxslim._prove import verify as prove
from flaxslim._record import LAYOUT, PER_LAYER
from flaxslim._spec import SpecLike
from flaxslim._tree import flatten, replace
from flaxslim.checkpoint import Checkpoint, read, to_flax
from flaxslim.checkpoint._config import config_text
from flaxslim.checkpoint._folder import RECORD, read_json
from flaxslim.checkpoint._leaf import nest
from flaxslim.checkpoint._names import convert, some, spec_named, unused
from flaxslim.cli._console import bar, messages
from flaxslim.errors import ConfigError, FlaxslimError, InputsError
from flaxslim.specs import spec_for

Way = Literal["auto", "whole", "by-layer"]


def verify(
    before: str,
    after: str,
    *,
    approximate: bool = False,
    way: Way = "auto",
    revision: str | None = None,
) -> tuple[Proof, str | None]:
    """Read both and compare; and what to say besides if the proof fails. `revision` is of `before`.

    What the record of the cut says waives nothing: it lies beside the weights that are judged.
    """
    old, new = read(before, revision=revision, lazy=True), read(after, lazy=True)
    proof = prove_checkpoints(old, new, exact=not approximate, way=way)
    hint = None
    if not proof.ok and not approximate and _recorded_as_approximate(new):
        hint = (
            f"{RECORD} of {after} says that this cut is approximate, so a difference is to be "
            "expected: --approximate only measures it"
        )
    return proof, hint


def _recorded_as_approximate(checkpoint: Checkpoint) -> bool:
    record = checkpoint.folder / RECORD
    with contextlib.suppress(FlaxslimError):  # a broken record changes no verdict
        return record.is_file() and read_json(record).get("exact") is False
    return False


def uncovered(checkpoint: Checkpoint, *, written: bool = False) -> str | None:
    """A sentence on the tensors in PyTorch's names that the Flax class, and so no proof, runs."""
    names = unused(checkpoint.params, checkpoint.config)
    if not names:
        return None
    have, they, them = ("has", "it is", "it") if len(names) == 1 else ("have", "they are", "them")
    return (
        f"{len(names)} tensor{'s' * (len(names) != 1)} ({some(names)}) {have} no place in "
        f"{model_class_for(checkpoint.config).__name__}: "
        f"{f'{they} written unchanged, and ' if written else ''}the proof does not cover {them}"
    )


def prove_checkpoints(
    before: Checkpoint,
    after: Checkpoint,
    *,
    exact: bool,
    way: Way = "auto",
    spec: SpecLike = None,
    written: bool = False,
) -> Proof:
    """Run both in the stock Flax class; or one layer at a time, if they are too large for that.

    `spec` is the one that the cut was made by, in the names of the tensors; `written`: the second
    is about to be written.
    """
    if way == "by-layer" or (way == "auto" and _too_large(before, after)):
        if before.naming != after.naming:
            before, after = _in_flax(before), _in_flax(after)
        spec = spec or spec_named(before.config, "all", before.naming)
        with bar("proof, layer by layer", "sites") as progress:
            proof = verify_by_layer(
                (before.params, before.config),
                (after.params, after.config),
                spec=spec,
                approximate=not exact,
                progress=progress,
            )
        return _with_rows(proof, _settings(before.config, after.config))
    if note := uncovered(before, written=written):
        messages.print(f"note: {note}", markup=False, soft_wrap=True)
    with messages.status("proof: running both models on the same inputs"):
        proof = prove(
            (_runnable(_in_memory(before), announce=True), before.config),
            (_runnable(_in_memory(after)), after.config),
            approximate=not exact,
        )
    if written or not exact or before.naming != after.naming:
        return proof
    return _with_rows(proof, _unseen(before, after))


# What a cut writes into a config, and what says nothing of the function.
_OF_A_CUT = {LAYOUT, PER_LAYER}
_OF_THE_FILE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"}


def _settings(before: Any, after: Any) -> list[OutputRow]:
    """Keys of the two configs that differ, but for widths: no layer alone would show it."""
    old, new = (json.loads(config_text(cfg)) for cfg in (before, after))
    pairs = tuple(_record.spec_of(before) or ())
    widths = {
        width.key
        for pair in pairs
        for width in (pair.width_expression, pair.group_expression)
        if width is not None
    }
    return [
        fault(f"config.json: {key}", f"{ours!r} before and {theirs!r} after")
        for key, ours, theirs in _differing(old, new)
        if key not in widths and {*key.split(".")}.isdisjoint(_OF_A_CUT | _OF_THE_FILE)
    ]


def _differing(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differing(old.get(name), new.get(name), f"{at}.{name}".strip("."))
    elif old != new:
        yield at, old, new


def _unseen(before: Checkpoint, after: Checkpoint) -> list[OutputRow]:
    """Tensors that no cut explains and that differ: the inputs may not reach where they do."""
    old, new = flatten(before.params), flatten(after.params)
    try:
        spec = spec_named(before.config, "all", before.naming)
        sites = spec.sites(before.params, before.config)
    except FlaxslimError:  # of no family with a spec: then nothing tells what a cut explains
        return []
    inside = {tensor.path for site in sites for tensor in site.tensors}
    return [
        changed(path)
        for path in sorted({*old} & {*new} - inside)
        if old[path].dtype == new[path].dtype and not equal(old[path], new[path])
    ]


def _with_rows(proof: Proof, rows: Sequence[OutputRow]) -> Proof:
    return dataclasses.replace(proof, outputs=(*proof.outputs, *rows))


# Both models on the host and on the device (on CPU that is the same memory), and what they compute.
_COPIES = 3


def _too_large(before: Checkpoint, after: Checkpoint) -> bool:
    need = _COPIES * sum(x.nbytes for c in (before, after) for x in flatten(c.params).values())
    free = _free_memory()
    if free is None or need <= free:
        return False
    messages.print(
        f"note: to run both models takes about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} "
        "GB are free, so the proof goes layer by layer; --whole runs them all the same",
        markup=False,
        soft_wrap=True,
    )
    return True


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _in_memory(checkpoint: Checkpoint) -> Checkpoint:
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(checkpoint.params).items()}
    return dataclasses.replace(checkpoint, params=replace(checkpoint.params, leaves))


def _in_flax(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint = _in_memory(checkpoint)
    return dataclasses.replace(checkpoint, params=to_flax(checkpoint), naming="flax")


def _runnable(checkpoint: Checkpoint, *, announce: bool = False) -> Any:
    """Flax parameters, with what the stock class needs besides.

    Checkpoints often lack a pooler, or the head that their config names. These tensors have no
    part in the cut: they are the same random numbers before and after, for the proof alone.
    """
    cfg = checkpoint.config
    cls = model_class_for(cfg)
    shapes = parameter_shapes(cls, cfg)
    params = checkpoint.params
    if checkpoint.naming == "torch":
        params = convert(params, cfg, cls).params
    wanted, have = flatten(shapes), flatten(params)
    missing = sorted(wanted.keys() - have.keys())
    whole = not missing or _roots(shapes, cfg) == _roots(params, cfg)
    if not missing:
        return params
    if have.keys() - wanted.keys() or not whole:
        _check_some_class(params, cfg, missing)
        return params  # `verify` takes the same class
    if announce:
        messages.print(
            f"note: the checkpoint lacks {len(missing)} tensors of {cls.__name__} "
            f"({some(missing)}); the proof fills them with the same random numbers before and "
            "after",
            markup=False,
            soft_wrap=True,
        )
    for path in missing:
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        have[path] = 0.02 * rng.standard_normal(wanted[path].shape, np.float32)
    return nest(have, "/")


def _check_some_class(params: Any, cfg: Any, missing: list[str]) -> None:
    """Another class of the family may do with these parameters; if none does, say what lacks."""
    try:
        model_class_for(cfg, params)
    except InputsError as error:
        layers = _roots(parameter_shapes(model_class_for(cfg), cfg), cfg) - _roots(params, cfg)
        among = ""
        if layers:
            roots = sorted(layers, key=lambda root: [int(n) for n in re.findall(r"\d+", root)])
            among = f", among them FFN layers ({some(roots)})"
        raise ConfigError(
            f"the config says {len(missing)} tensors that the checkpoint lacks{among}",
            path=next((path for path in missing if path.startswith(tuple(layers))), missing[0]),
            seen=error.seen,
            mend="use the config.json that belongs to these weights (its number of layers, say)",
        ) from error


def _roots(params: Any, cfg: Any) -> set[str]:
    return {site.root for site in spec_for(cfg).sites(params)}
