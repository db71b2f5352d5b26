"""Recipes: what a whole training run is told, section by section.

A section is a frozen dataclass; what a key takes is said by the annotation of its field.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from flaxslim.cli._kinds import Checkpoint, Count, Positive, Seed, Share, Steps, Weight

# How a recipe says that the model teaches itself, as it was when its pruning began.
START = "start"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained: a stock Flax class of transformers, from a checkpoint or at random.

    Attributes:
      cls: `class`, with the head of the task, such as "FlaxBertForQuestionAnswering".
      source: a folder or a Hub id. What the head lacks there begins at random.
      revision: branch, tag or commit on the Hub.
      config: values of its config; without a source all that differs from the defaults.
    """

    cls: str = dataclasses.field(metadata={"key": "class"})
    source: Checkpoint | None = None
    revision: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How it is trained.

    Attributes:
      steps: while channels die, and after. All steps of other sections are counted from here.
      dense_steps: before that, without pruning, with a rise and fall of the learning rate.
      warmup: steps in which the learning rate rises from zero.
      decay: how it then falls to zero.
      clip: the largest norm of all gradients together; 0 for any.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    dense_steps: Steps = 0
    optimizer: Literal["adamw", "adam", "lion", "sgd"] = "adamw"
    warmup: Steps = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Weight = 0.0
    clip: Weight = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which channels die, and when.

    Attributes:
      spec: FFN channels, attention heads, or both.
      sparsity: the share that is dead at the end; by axis where they differ: {f = 0.9, h = 0.6}.
        0 trains on without pruning, as what pruning is compared with.
      start: the share that is dead at `begin`.
      begin, end, every: the first and the last step at which channels die, and how often between.
      stepwise: for that schedule: {"1000" = 0.3, "2000" = 0.5}.
      min_width: channels that each site keeps; max_sparsity: the largest share that it loses.
      fade: steps in which the doomed channels fade.
      regrow: the share of the dead that may revive each time.
    """

    sparsity: Share | Mapping[str, Share] = 0.0
    spec: Literal["ffn", "heads", "all"] = "ffn"
    score: Literal[
        "magnitude",
        "magnitude_l1",
        "magnitude_product",
        "snip",
        "snip_momentum",
        "gradient_weight",
        "taylor",
        "fisher",
        "movement",
        "random",
    ] = "magnitude"
    allocation: Literal["site", "global"] = "site"
    schedule: Literal["cubic", "linear", "exponential", "one_shot", "stepwise"] = "cubic"
    start: Share = 0.0
    begin: Steps = 0
    end: Steps | None = None
    every: Count = 1
    stepwise: Mapping[str, Share] = dataclasses.field(default_factory=dict)
    min_width: Steps = 1
    max_sparsity: Share = 1.0
    fade: Steps = 0
    regrow: Share = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """The share that is dead at the end, by axis."""
        if self.schedule == "stepwise":
            return dict.fromkeys(self.axes, max(self.stepwise.values(), default=0.0))
        if isinstance(self.sparsity, Mapping):
            return dict(self.sparsity)
        return dict.fromkeys(self.axes, self.sparsity)

    @property
    def axes(self) -> tuple[str, ...]:
        """The prunable axes of the spec."""
        return {"ffn": ("f",), "heads": ("h",), "all": ("f", "h")}[self.spec]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """What else it learns: to say what a teacher says.

    Attributes:
      teacher: a folder or a Hub id; "start" for the model itself before pruning.
      weight: of the teacher's part of the loss, 0 to do without; task_weight: of the task's own.
    """

    teacher: Checkpoint
    weight: Weight = 1.0
    task_weight: Weight = 1.0
    temperature: Positive = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured: always the model that was saved, loaded again.

    Attributes:
      dense: the model before pruning, too; pruned: and the one with its dead channels in it.
    """

    dense: bool = True
    pruned: bool = True
    batch_size: Count = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink:
    """When dead channels are cut out, for training to go on faster.

    Attributes:
      at: after these steps; end: after the last one.
      width: "uniform" or "per_layer", as for `flaxslim slim`.
      verify: prove each time that nothing else has changed.
    """

    at: tuple[Count, ...] = ()
    end: bool = True
    width: Literal["uniform", "per_layer"] = "uniform"
    multiple_of: Count = 1
    verify: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where the model goes, with the metrics, the plot and the report beside it."""

    folder: Path
    log_every: Count = 10
    plot: bool = True
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `data` is of the class that the task says (`Task.Data`)."""

    task: str
    model: Model
    data: Any
    train: Train
    output: Output
    seed: Seed = 0
    pruning: Pruning = dataclasses.field(default_factory=Pruning)
    distillation: Distillation | None = None
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    shrink: Shrink = dataclasses.field(default_factory=Shrink)

    @property
    def prunes(self) -> bool:
        """Whether any channel is to die."""
        return any(self.pruning.shares.values())

    @property
    def distils(self) -> bool:
        """Whether there is a teacher to be heard."""
        return self.distillation is not None and self.distillation.weight > 0

    def to_toml(self) -> str:
        """The recipe with all its defaults."""
        return "\n".join(_toml((), _plain(self))).strip() + "\n"


# --- writing ----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Plain data for TOML and JSON; what is None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = (
            (field.metadata.get("key", field.name), getattr(value, field.name))
            for field in dataclasses.fields(value)
        )
        return {name: _plain(x) for name, x in pairs if x is not None}
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def toml_value(value: Any) -> str:
    """A value as TOML writes it. JSON's escapes are TOML's, but for pairs of surrogates.

    >>> print(toml_value("a'b\\"c"))
    "a'b\\"c"
    """
    return json.dumps(value, ensure_ascii=False)


def _toml(at: tuple[str, ...], tree: Mapping[str, Any]) -> Iterator[str]:
    if at:
        yield f"\n[{'.'.join(at)}]"
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            yield f"{name} = {toml_value(value)}"
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _toml((*at, name), value)
