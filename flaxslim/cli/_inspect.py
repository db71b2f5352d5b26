"""`flaxslim inspect`: what could go, in channels, parameters, bytes and FLOPs."""

import dataclasses
from typing import Any

from flaxslim._apply import resized
from flaxslim._compat import stock_config
from flaxslim._plan import Cut, Plan
from flaxslim._proof import Change
from flaxslim._spec import Spec
from flaxslim._tree import flatten
from flaxslim.checkpoint import Checkpoint, read
from flaxslim.cli import _discover
from flaxslim.cli._console import in_flags
from flaxslim.cli._slim import Choice, is_heads
from flaxslim.errors import FlaxslimError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """A plan that is not carried out, and what it would change.

    `heads` is what would go of the heads: if they were asked for as asked, else if each layer had
    its own. `discovered` is where the spec is from, if it is none of ours.
    """

    source: str
    model_type: str
    files: tuple[str, ...]
    naming: str
    plan: Plan
    heads: tuple[Cut, ...]
    parameters: Change
    bytes: Change
    flops: Change
    notes: tuple[str, ...]
    discovered: _discover.Found | None = None

    @property
    def all_notes(self) -> list[str]:
        """Those of the plan too, as the command line says it."""
        return [in_flags(note) for note in (*self.plan.blocked, *self.plan.notes, *self.notes)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; without the indices that are kept, which `slim` records."""
        return {
            "source": self.source,
            "model_type": self.model_type,
            "files": list(self.files),
            "naming": self.naming,
            "spec": self.plan.spec.name,
            "exact": self.plan.exact,
            "sites": [self._site(cut, "channels") for cut in self.plan.cuts if not is_heads(cut)],
            "heads": [self._site(cut, "heads") for cut in self.heads],
            "widths": {
                r.width: [r.before, r.after if r.least == r.after else [r.least, r.after]]
                for r in self.plan.resizes
            },
            "parameters": [self.parameters.before, self.parameters.after],
            "bytes": [self.bytes.before, self.bytes.after],
            "flops": [self.flops.before, self.flops.after],
            "notes": self.all_notes,
            **({} if self.discovered is None else {"discovered": self.discovered.to_dict()}),
        }

    def _site(self, cut: Cut, what: str) -> dict[str, Any]:
        # Pairs that were discovered may have one root.
        second = {} if self.discovered is None else {"second": cut.site.second.path}
        return {
            "root": cut.site.root,
            **second,
            what: cut.site.size,
            "dead": cut.dead,
            "kept": cut.width,
            "rules": dict(cut.rules),
            "parameters": cut.removed_parameters,
        }


def inspect(
    source: str, choice: Choice, revision: str | None, *, discover: bool = False
) -> Inspection:
    """Read a checkpoint and plan its slimming; nothing is cut.

    `discover`: by the spec that is found in what the class computes, instead of the family's.
    """
    checkpoint = read(source, revision=revision)
    found = _discover.discover(checkpoint) if discover else None
    every = None if found is None else _discover.named(found.spec, checkpoint)
    chosen = choice.plan(checkpoint, every if choice.heads else _without_heads(every))
    heads, notes = _heads(choice, chosen, checkpoint, every)
    leaves = flatten(checkpoint.params)
    gone = sum(
        int(cut.share_gone(t) * leaves[t.path].nbytes) for cut in chosen.cuts for t in cut.site.cut
    )
    count = sum(leaf.size for leaf in leaves.values())
    size = sum(leaf.nbytes for leaf in leaves.values())
    notes += checkpoint.notes
    cost = Change(before=None, after=None)
    try:
        if found is not None and (keyless := _keyless(chosen)):
            notes.append(f"no FLOPs: no key of the config says the width of {keyless}")
        else:
            cost = Change(
                before=_flops(checkpoint.config),
                after=_flops(resized(chosen, checkpoint.config)),
            )
    except FlaxslimError as error:
        notes.append(f"no FLOPs: {error.problem}")
    return Inspection(
        source=source,
        model_type=checkpoint.config.model_type,
        files=checkpoint.weight_files,
        naming=checkpoint.naming,
        plan=chosen,
        heads=heads,
        parameters=Change(before=count, after=count - chosen.removed_parameters),
        bytes=Change(before=size, after=size - gone),
        flops=cost,
        notes=tuple(notes),
        discovered=found,
    )


def _without_heads(spec: Spec | None) -> Spec | None:
    """The pairs of a discovered spec that are no heads, if there are any."""
    pairs = tuple(pair for pair in spec or () if pair.axis != "h")
    return dataclasses.replace(spec, pairs=pairs) if spec is not None and pairs else spec


def _keyless(chosen: Plan) -> str | None:
    """A layer that would lose channels although no config can say its width."""
    cuts = (cut for cut in chosen.cuts if cut.removed and cut.site.pair.width is None)
    return next((cut.site.second.path for cut in cuts), None)


def _heads(
    choice: Choice, chosen: Plan, checkpoint: Checkpoint, spec: Spec | None
) -> tuple[tuple[Cut, ...], list[str]]:
    """What would go of the heads; or why that is not known, where nobody asked."""
    if choice.heads:
        return tuple(filter(is_heads, chosen.cuts)), []
    try:
        return choice.heads_apart(checkpoint, spec), []
    except FlaxslimError as error:
        where = f" ({error.path})" if error.path else ""
        return (), [f"heads are not shown: {error.problem}{where}"]


def _flops(cfg: Any) -> float | None:
    """Floating point operations of one forward pass of the stock class, from shapes alone."""
    from flaxslim._inputs import model_class_for
    from flaxslim._prove import flops

    return flops(*_discover.on_shapes(model_class_for(stock_config(cfg)), cfg))
