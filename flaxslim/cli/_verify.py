"""The proof for two checkpoints: of `flaxslim verify`, and of `slim` before it writes."""

import warnings
import zlib
from typing import Any

import numpy as np

from flaxslim._compat import parameter_shapes
from flaxslim._inputs import model_class_for
from flaxslim._prove import Proof
from flaxslim._prove import verify as prove
from flaxslim._tree import flatten
from flaxslim.checkpoint import Checkpoint, read, to_flax
from flaxslim.checkpoint._folder import RECORD, read_json
from flaxslim.checkpoint._leaf import nest
from flaxslim.cli._console import messages
from flaxslim.specs import spec_for


def verify(before: str, after: str) -> Proof:
    """Read both and compare; a cut recorded as approximate is only measured."""
    old, new = read(before), read(after)
    record = new.folder / RECORD
    # Without a record it must be exact.
    exact = not record.is_file() or bool(read_json(record).get("exact", True))
    return prove_checkpoints(old, new, exact=exact)


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* are not in the files and are left out")
        params = to_flax(checkpoint.params, cfg, cls)
    wanted, have = flatten(shapes), flatten(params)
    missing = sorted(wanted.keys() - have.keys())
    spec = spec_for(cfg)
    whole = not missing or {s.root for s in spec.sites(shapes)} == {
        s.root for s in spec.sites(params)
    }
    if not missing or have.keys() - wanted.keys() or not whole:
        return params  # `verify` looks for another class of the family, or says what is wrong
    if announce:
        names = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        messages.print(
            f"note: the checkpoint lacks {len(missing)} tensors of {cls.__name__} ({names}); the "
            "proof fills them with the same random numbers before and after",
            markup=False,
            soft_wrap=True,
        )
    for path in missing:
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        have[path] = 0.02 * rng.standard_normal(wanted[path].shape, np.float32)
    return nest(have, "/")
