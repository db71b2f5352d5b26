"""The proof for two checkpoints: of `flaxslim verify`, and of `slim` before it writes."""

import contextlib
import re
import zlib
from typing import Any

import numpy as np

from flaxslim._compat import parameter_shapes
from flaxslim._errors import ConfigError, FlaxslimError, InputsError
from flaxslim._inputs import model_class_for
from flaxslim._prove import Proof
from flaxslim._prove import verify as prove
from flaxslim._tree import flatten
from flaxslim.checkpoint import Checkpoint, read
from flaxslim.checkpoint._folder import RECORD, read_json
from flaxslim.checkpoint._leaf import nest
from flaxslim.checkpoint._names import convert, some, unused
from flaxslim.cli._console import messages
from flaxslim.specs import spec_for


def verify(before: str, after: str, *, approximate: bool = False) -> tuple[Proof, str | None]:
    """Read both and compare; and what to say besides if the proof fails.

    What the record of the cut says waives nothing: it lies beside the weights that are judged.
    """
    old, new = read(before), read(after)
    if note := uncovered(old):
        messages.print(f"note: {note}", markup=False, soft_wrap=True)
    proof = prove_checkpoints(old, new, exact=not approximate)
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


def prove_checkpoints(before: Checkpoint, after: Checkpoint, *, exact: bool) -> Proof:
    """Run both in the stock Flax class."""
    return prove(
        (_runnable(before, announce=True), before.config),
        (_runnable(after), after.config),
        approximate=not exact,
    )


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
