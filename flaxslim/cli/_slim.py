"""`flaxslim slim`: read, plan, cut, prove, write."""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import flaxslim
from flaxslim._apply import apply, resized
from flaxslim._draw import plan
from flaxslim._plan import Cut, Plan
from flaxslim._slim import mend_blocked
from flaxslim._spec import Spec
from flaxslim._tree import flatten
from flaxslim.checkpoint import Checkpoint, fetched, read, sent, to_flax
from flaxslim.checkpoint._atomic import check_target
from flaxslim.checkpoint._config import config_text
from flaxslim.checkpoint._folder import side_files
from flaxslim.checkpoint._names import spec_named, unused
from flaxslim.checkpoint._read import config_of
from flaxslim.checkpoint._write import kind_of, refuse_loss, write
from flaxslim.cli import NOT_PROVEN, NOTHING_DEAD, _table
from flaxslim.cli._console import bar, console, in_flags, messages
from flaxslim.cli._verify import Way, prove_checkpoints
from flaxslim.errors import FlaxslimError, UnsupportedFormatError, WidthError

_QUICK = 2 * 10**9  # bytes, read in a second


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The flags that say what is to go."""

    width: str
    heads: bool
    threshold: float
    multiple_of: int
    heads_multiple_of: int

    def plan(self, checkpoint: Checkpoint, spec: Spec | None = None) -> Plan:
        """What would go, in the names that the tensors of a checkpoint have.

        By the spec of its family, unless one is given, in the names of the tensors too.
        """
        return plan(
            checkpoint.params,
            checkpoint.config,
            spec or spec_named(checkpoint.config, self.part, checkpoint.naming),
            width=self.width,
            threshold=self.threshold,
            multiple_of=self.multiples,
        )

    def heads_apart(self, checkpoint: Checkpoint, spec: Spec | None = None) -> tuple[Cut, ...]:
        """What would go of the heads if each layer had its own number of them."""
        spec = spec or spec_named(checkpoint.config, "heads", checkpoint.naming)
        own = dataclasses.replace(self, width="per_layer").plan(checkpoint, spec)
        return tuple(filter(is_heads, own.cuts))

    @property
    def part(self) -> str:
        return "all" if self.heads else "ffn"

    @property
    def multiples(self) -> dict[str, int]:
        return {"f": self.multiple_of, "h": self.heads_multiple_of}


def is_heads(cut: Cut) -> bool:
    return cut.site.pair.axis == "h"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command; see its `--help`."""

    choice: Choice
    format: str
    overwrite: bool
    verify: bool
    proof: Way
    shard_size: int | None
    dry_run: bool
    revision: str | None

    @property
    def given_format(self) -> str | None:
        return None if self.format == "as-read" else self.format


def run(source: str, out: str, config: Path | None, options: Options) -> int:
    """Do it; returns the exit code. Nothing is written unless the proof holds."""
    if config is not None:
        return _orbax(source, out, config, options)
    with fetched(source) as here, sent(out) as there:
        return _run(here, there, options)


def _orbax(source: str, out: str, config: Path, options: Options) -> int:
    """The same for a checkpoint of Orbax, of which no model is run: the rules are its proof."""
    from flaxslim.checkpoint import convert_orbax
    from flaxslim.checkpoint._orbax import check_free
    from flaxslim.specs._libraries import MAXTEXT_FFN

    maxtext = config.suffix in (".yml", ".yaml")
    choice = options.choice
    given = {
        "--dry-run": options.dry_run,
        "--overwrite": options.overwrite,
        "--format": options.format != "as-read",
        "--shard-size": options.shard_size is not None,
        "--revision": options.revision is not None,
        "--whole or --by-layer": options.proof != "auto",
        "--heads": maxtext and choice.heads,
    }
    if wrong := [flag for flag, is_given in given.items() if is_given]:
        raise UnsupportedFormatError(
            "a checkpoint of Orbax is written as it was, to a new place, and no model of it is run "
            "(of MaxText only FFN channels are cut)",
            path=out,
            mend=f"leave out {', '.join(wrong)}",
        )
    beside = Path(f"{out}.json")
    if not maxtext:
        check_free(beside)
    with messages.status(f"slimming {source}"):
        chosen, new = convert_orbax(
            source,
            out,
            MAXTEXT_FFN if maxtext else choice.part,
            config if maxtext else config_of(config),
            width=choice.width,
            multiple_of=choice.multiples,
            threshold=choice.threshold,
        )
    console.print(in_flags(str(chosen)), markup=False, soft_wrap=True)
    if why := chosen.why_nothing:
        messages.print(f"Nothing was written: {in_flags(why)}.", markup=False, soft_wrap=True)
        return NOTHING_DEAD
    if not maxtext:
        beside.write_text(config_text(new), encoding="utf-8")
    messages.print(f"written to {out}; no model was run to prove it", markup=False, soft_wrap=True)
    return 0


def _run(source: str, out: Path, options: Options) -> int:
    local = Path(source) if os.path.isdir(source) else None
    target = out.expanduser().resolve()
    if not options.dry_run and (local or not options.overwrite):
        check_target(target, overwrite=options.overwrite, source=local)
    with messages.status(f"reading {source}") as status:
        before = read(source, revision=options.revision, lazy=True)
        if not options.dry_run and not local:  # what travels along is known only now
            check_target(target, overwrite=options.overwrite, source=before.folder)
        if options.format.startswith("flax") and before.naming == "torch":
            # First, so that the recorded plan has the names of what is written.
            refuse_loss(unused(before.params, before.config), options.format)
            before = as_flax(before)
        kind_of(options.given_format, before, before.params, options.shard_size)
        status.update("looking for dead channels")
        chosen = options.choice.plan(before)
        heads = _unasked(options.choice, before)
    _show(before, chosen, heads)
    if why := chosen.why_nothing:
        if chosen.blocked:
            raise WidthError(why, mend=mend_blocked(chosen))
        messages.print(f"Nothing was written: {in_flags(why)}.", markup=False, soft_wrap=True)
        return NOTHING_DEAD
    if options.dry_run:
        messages.print("Dry run: nothing was written.")
        return 0

    with messages.status("cutting"):
        after = dataclasses.replace(
            before,
            params=apply(chosen, before.params),
            config=resized(chosen, before.config),
        )
    proof = None
    if options.verify:
        proof = prove_checkpoints(
            before, after, exact=chosen.exact, way=options.proof, spec=chosen.spec, written=True
        )
        console.print(_table.before_after(proof))
        console.print(_table.verdict(proof), markup=False, soft_wrap=True)
        if not proof.ok:
            text = f"The proof failed, so nothing was written.\n{proof}"
            messages.print(text, markup=False, soft_wrap=True)
            return NOT_PROVEN
    with bar(f"writing {out}") as progress:
        write(
            out,
            after.params,
            after.config,
            source=before,
            format=options.given_format,
            overwrite=options.overwrite,
            record=record(source, chosen, proof),
            shard_size=options.shard_size,
            resume=_name(before, chosen, options),
            progress=_counted(progress, sum(x.nbytes for x in flatten(after.params).values())),
        )
    messages.print(f"written to {out}", markup=False)
    return 0


def _show(before: Checkpoint, chosen: Plan, heads: tuple[Cut, ...]) -> None:
    for note in before.notes:
        messages.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(in_flags(str(chosen)), markup=False, soft_wrap=True)
    if note := _table.heads_note(heads):
        console.print(note, markup=False, soft_wrap=True)


def _unasked(choice: Choice, checkpoint: Checkpoint) -> tuple[Cut, ...]:
    """What of the heads could go, where nobody asked for them; what is wrong there spares all.

    To look reads the attention kernels, which of a large checkpoint `inspect` has the time for.
    """
    if not choice.heads and sum(x.nbytes for x in flatten(checkpoint.params).values()) < _QUICK:
        with contextlib.suppress(FlaxslimError):
            return choice.heads_apart(checkpoint)
    return ()


def _counted(progress: Any, total: int) -> Any:
    """A call with each number of bytes becomes one with all of them so far."""
    done, lock = 0, threading.Lock()

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    return add


def _name(before: Checkpoint, chosen: Plan, options: Options) -> str:
    """What the bytes that are written depend on."""
    parts = (
        flaxslim.__version__,
        str(before.folder.resolve()),
        before.stamps,
        sorted(side_files(before.folder)),
        before.naming,
        chosen.to_dict(),
        options.format,
        options.shard_size,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def as_flax(checkpoint: Checkpoint) -> Checkpoint:
    """The same in Flax names; what `to_flax` warns of becomes a note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = to_flax(checkpoint)
    notes = (str(warning.message) for warning in caught if warning.category is UserWarning)
    return dataclasses.replace(
        checkpoint, params=params, naming="flax", notes=(*checkpoint.notes, *notes)
    )


def _widths(chosen: Plan) -> str:
    said = [
        f"{r.width}: {r.before} to "
        + (f"{r.after}" if r.least == r.after else f"between {r.least} and {r.after}")
        for r in chosen.resizes
    ]
    return f"Widths: {', '.join(said)}. " if said else ""


def record(source: str, chosen: Plan, proof: Any) -> dict[str, Any]:
    """What `flaxslim.json` keeps, and what the model card says."""
    counts = Counter[str]()
    for cut in chosen.cuts:
        counts["attention heads" if cut.site.pair.axis == "h" else "FFN channels"] += cut.removed
    what = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    card = (
        f"{what} ({chosen.removed_parameters:,} parameters) were cut from "
        f"`{Path(source).resolve().name if os.path.isdir(source) else source}` by flaxslim "
        f"{flaxslim.__version__}. {_widths(chosen)}"
    )
    if chosen.exact:
        card += "Every one of them contributed nothing, so the function is the same."
    else:
        card += f"The cut is approximate (threshold {chosen.threshold:g})."
    if proof is not None:
        asked = f"tolerance {proof.tolerance:.1e}, " if proof.exact else ""
        card += (
            f"\n\nMeasured on the same inputs: largest difference relative to the largest output "
            f"{proof.relative:.1e} ({asked}{proof.device})."
        )
    return {
        "flaxslim": flaxslim.__version__,
        "exact": chosen.exact,
        "plan": chosen.to_dict(),
        "proof": None if proof is None else proof.to_dict(),
        "card": card,
    }
