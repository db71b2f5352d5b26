"""What a run came to: sizes, and the speed of the dense and the slim model, measured in turns."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim._once import once
from flaxslim._proof import Change, Proof
from flaxslim._prove import flops
from flaxslim.cli import _metrics
from flaxslim.cli._program import Program
from flaxslim.cli._recipe import Recipe
from flaxslim.cli._tasks import Batch, Logits
from flaxslim.specs import chosen

# How long the dense and the slim model are run in turns at the end, in seconds and in calls.
_TIMED, _LEAST, _MOST = 4.0, 5, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunk:
    """One time that dead channels were cut out: after which step, and the proof, if asked for."""

    step: int
    removed: int
    proof: Proof | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to.

    Attributes:
      scores: the metrics of the model "dense", "pruned" and "slimmed, reloaded".
      step_flops: of one training step, by XLA's cost analysis of the lowered program.
      skipped: how many scores were not finite, so that they did not count.
      step_milliseconds, latency: medians, the dense and the slim model in turns. Latency is that
        of one forward pass on the example of the task.
    """

    scores: Mapping[str, Mapping[str, float]]
    parameters: Change
    bytes: Change
    step_flops: Change
    step_milliseconds: Change
    latency: Change
    shrunk: tuple[Shrunk, ...]
    skipped: int
    seconds: float
    folder: Path

    @property
    def predicted(self) -> float | None:
        """The time of a step after / before, as FLOPs say."""
        return self.step_flops.ratio

    @property
    def measured(self) -> float | None:
        """The time of a step after / before, as it is."""
        return self.step_milliseconds.ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = dataclasses.asdict(dataclasses.replace(self, shrunk=()))
        data |= {
            "folder": str(self.folder),
            "predicted": self.predicted,
            "measured": self.measured,
            "shrunk": [
                {
                    "step": one.step,
                    "removed": one.removed,
                    "proof": one.proof and one.proof.to_dict(),
                }
                for one in self.shrunk
            ],
        }
        return _metrics.plain(data)


# --- sizes ------------------------------------------------------------------------------------


def channels(recipe: Recipe, params: Any, cfg: Any) -> int:
    """How many channels there are that can die."""
    sites = chosen(recipe.pruning.spec, cfg).sites(params, cfg)
    return sum(site.size * site.rows for site in sites)


def sizes(tree: Any) -> tuple[int, int]:
    """The number of parameters, and of their bytes; what is tied counts once."""
    leaves = once(dict(enumerate(jax.tree.leaves(tree)))).values()
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)


def change(values: Any) -> Change:
    """Before and after; the same where nothing was cut."""
    return Change(before=values[0], after=values[-1])


# --- speed ------------------------------------------------------------------------------------


def speed(
    runs: Sequence[tuple[Program, Any]], batch: Batch, example: Mapping[str, Any]
) -> tuple[Change, Change, Change]:
    """FLOPs and milliseconds of a training step, and the latency, of one or two models.

    Each is a program with its parameters, the dense one first.
    """
    steps = [_Stepping.of(program, params, batch) for program, params in runs]
    taken = _in_turns([one.step for one in steps])
    passes = _in_turns(
        [functools.partial(program.forward, params, example) for program, params in runs]
    )
    return change([one.flops for one in steps]), change(taken), change(passes)


@dataclasses.dataclass(kw_only=True)
class _Stepping:
    """A training step that is repeated, on the same batch."""

    program: Program
    params: Any
    state: Any
    batch: Batch
    teacher: Logits
    flops: float | None

    @classmethod
    def of(cls, program: Program, params: Any, batch: Batch) -> "_Stepping":
        params = jax.tree.map(jnp.copy, params)
        state = program.tx.init(params)
        return cls(
            program=program,
            params=params,
            state=state,
            batch=batch,
            teacher=(),
            flops=flops(program.step, params, state, batch, (), np.int32(1)),
        )

    def step(self) -> Any:
        self.params, self.state, loss = self.program.step(
            self.params, self.state, self.batch, self.teacher, np.int32(1)
        )
        return loss


def _in_turns(calls: list[Callable[[], Any]]) -> list[float]:
    """Medians in milliseconds, in turns, so that a busy machine slows all of them alike."""
    for call in calls:  # compiles
        jax.block_until_ready(call())
    taken: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for number in range(_MOST):
        if number >= _LEAST and time.perf_counter() - began > _TIMED:
            break
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]
