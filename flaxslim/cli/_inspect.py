"""`flaxslim inspect`: what could go, in channels, parameters, bytes and FLOPs."""

import dataclasses
from typing import Any

from flaxslim._apply import resized
from flaxslim._compat import stock_config
from flaxslim._draw import plan
from flaxslim._errors import FlaxslimError
from flaxslim._plan import Plan
from flaxslim._proof import Change
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.cli._slim import spec_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """A plan that is not carried out, and what it would change."""

    source: str
    model_type: str
    files: tuple[str, ...]
    naming: str
    plan: Plan
    parameters: Change
    bytes: Change
    flops: Change
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; without the indices that are kept, which `slim` records."""
        return {
            "source": self.source,
            "model_type": self.model_type,
            "files": list(self.files),
            "naming": self.naming,
            "spec": self.plan.spec.name,
            "exact": self.plan.exact,
            "sites": [
                {
                    "root": cut.site.root,
                    "channels": cut.site.size,
                    "dead": cut.dead,
                    "kept": len(cut.keep),
                    "rules": dict(cut.rules),
                    "parameters": cut.removed * cut.site.per_channel,
                }
                for cut in self.plan.cuts
            ],
            "widths": {r.width: [r.before, r.after] for r in self.plan.resizes},
            "parameters": [self.parameters.before, self.parameters.after],
            "bytes": [self.bytes.before, self.bytes.after],
            "flops": [self.flops.before, self.flops.after],
            "notes": [*self.plan.blocked, *self.plan.notes, *self.notes],
        }


def inspect(source: str, threshold: float, multiple_of: int, revision: str | None) -> Inspection:
    """Read a checkpoint and plan its slimming; nothing is cut."""
    checkpoint = read(source, revision=revision)
    chosen = plan(
        checkpoint.params,
        checkpoint.config,
        spec_of(checkpoint),
        threshold=threshold,
        multiple_of=multiple_of,
    )
    leaves = flatten(checkpoint.params)
    gone = sum(
        cut.removed * leaves[t.path].nbytes // cut.site.size
        for cut in chosen.cuts
        for t in cut.site.cut
    )
    count = sum(leaf.size for leaf in leaves.values())
    size = sum(leaf.nbytes for leaf in leaves.values())
    notes = list(checkpoint.notes)
    try:
        cost = Change(
            before=_flops(checkpoint.config),
            after=_flops(resized(chosen, checkpoint.config)),
        )
    except FlaxslimError as error:
        cost = Change(before=None, after=None)
        notes.append(f"no FLOPs: {error.problem}")
    return Inspection(
        source=source,
        model_type=checkpoint.config.model_type,
        files=checkpoint.weight_files,
        naming=checkpoint.naming,
        plan=chosen,
        parameters=Change(before=count, after=count - chosen.removed_parameters),
        bytes=Change(before=size, after=size - gone),
        flops=cost,
        notes=tuple(notes),
    )


def _flops(cfg: Any) -> float | None:
    """Floating point operations of one forward pass of the stock class, from shapes alone."""
    from flaxslim._compat import shell
    from flaxslim._inputs import inputs_for, model_class_for
    from flaxslim._prove import flops

    cls = model_class_for(stock_config(cfg))
    model = shell(cls, cfg)
    inputs = inputs_for(cls, cfg)

    def forward(params: Any, inputs: Any) -> Any:
        return model(**inputs, params=params, train=False)

    return flops(forward, model.params_shape_tree, inputs)
