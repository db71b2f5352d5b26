"""`flaxslim inspect --discover`: the spec of a checkpoint by what its Flax class computes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flaxslim._compat import parameter_shapes, shell
from flaxslim._discover._discovery import Discovery, discovered
from flaxslim._discover._function import function
from flaxslim._inputs import inputs_for, model_class_for
from flaxslim._spec import Spec
from flaxslim._tree import flatten
from flaxslim.checkpoint import Checkpoint
from flaxslim.checkpoint._names import convert, in_names
from flaxslim.errors import (
    ConfigError,
    DiscoveryError,
    IncompletePairError,
    InputsError,
    NothingMatchedError,
    UnknownFamilyError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What was discovered of the class of a checkpoint, from shapes alone."""

    cls: type
    discovery: Discovery
    spec: Spec

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "class": self.cls.__name__,
            "pairs": [
                {
                    "pair": str(pair),
                    "count": len(groups),
                    "sizes": sorted({group.size for group in groups}),
                    "width": pair.width,
                }
                for pair, groups in self.discovery.pairs
            ],
            "groups": [
                {
                    "verdict": group.verdict.value,
                    "size": group.size,
                    "tensors": list(group.paths),
                    "why": group.reason.why if group.reason else None,
                    "where": (str(group.reason.place) or None) if group.reason else None,
                }
                for group in self.discovery.groups
            ],
            "notes": list(self.discovery.notes),
            "unknown": dict(self.discovery.unknown),
            "report": str(self.discovery),
            "spec": self.spec.to_dict(),
            "source": self.spec.source(),
        }


def on_shapes(cls: type, cfg: Any) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """A stock class as a function of parameters and inputs, the shapes of the first, the second."""
    model: Any = shell(cls, cfg)

    def forward(params: Any, inputs: Any) -> Any:
        return model(**inputs, params=params, train=False)

    return forward, model.params_shape_tree, inputs_for(cls, cfg)


def discover(checkpoint: Checkpoint) -> Found:
    """Trace the stock Flax class of a checkpoint's config; `DiscoveryError` if there is none."""
    cfg = checkpoint.config
    cls = _class_of(checkpoint)
    forward, shapes, inputs = on_shapes(cls, cfg)
    _check_shapes(checkpoint, cls, shapes)
    found = discovered(
        function(forward, shapes, (inputs,)), cfg, lambda other: parameter_shapes(cls, other)
    )
    name = "".join(c if c.isalnum() else "_" for c in cfg.model_type.upper())
    return Found(cls=cls, discovery=found, spec=found.spec(f"{name}_DISCOVERED"))


def named(spec: Spec, checkpoint: Checkpoint) -> Spec:
    """A spec in the names that the tensors of a checkpoint have.

    Raises `DiscoveryError` if the tensors are not those of the class that was traced.
    """
    spec = in_names(spec, checkpoint.naming)
    try:
        spec.sites(checkpoint.params, checkpoint.config)
    except (IncompletePairError, NothingMatchedError) as error:
        raise DiscoveryError(
            "the tensors of the checkpoint are not those of its Flax class",
            path=error.path,
            seen=error.problem,
            near=error.near,
            mend="convert it first: flaxslim.save(out, *flaxslim.load(folder)), and inspect that"
            if checkpoint.naming == "torch"
            else "use the config.json that belongs to these weights (its architectures, its "
            "number of layers)",
        ) from error
    return spec


def _check_shapes(checkpoint: Checkpoint, cls: type, shapes: Any) -> None:
    """Raise `ConfigError` if the class of the config has a tensor in another shape."""
    if checkpoint.naming == "torch":
        convert(checkpoint.params, checkpoint.config, cls)
        return
    wanted = flatten(shapes)
    for path, leaf in flatten(checkpoint.params).items():
        if path in wanted and leaf.shape != wanted[path].shape:
            raise ConfigError(
                "the config contradicts the tensors",
                path=path,
                seen=f"shape {leaf.shape}",
                expected=f"shape {wanted[path].shape}, as {cls.__name__} makes it by the config",
                mend="use the config.json that belongs to these weights",
            )


def _class_of(checkpoint: Checkpoint) -> type:
    cfg = checkpoint.config
    try:
        if checkpoint.naming == "torch":
            return model_class_for(cfg)
        try:
            return model_class_for(cfg, checkpoint.params)
        except InputsError:  # it lacks a pooler, say: the class that the config names
            return model_class_for(cfg)
    except UnknownFamilyError as error:
        raise DiscoveryError(
            "there is no Flax class to trace",
            seen=f"model_type {cfg.model_type!r}" if cfg.model_type else "no model_type",
            near=error.near,
            mend="--discover traces the Flax classes of transformers; in Python any function "
            "will do: flaxslim.discover(fn, params, *inputs)",
        ) from error
