"""How many channels are dead when: sparsity (the share that is dead) as a function of the step.

A `Schedule` says both: the sparsity after each step, and the steps at which channels die. What lies
between these costs nothing. Any `optax.Schedule` will do as well; `scheduled` says how often it is
looked at.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxslim._kinds import is_number, is_whole
from flaxslim.errors import TrainingError

# The share that is dead after a step, which may be traced.
SparsityFn = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sparsity as a function of the step, and the steps at which channels die.

    Attributes:
      sparsity: step -> share of the channels that is dead after it, once some have died.
      begin, end, every: channels die at step `begin`, each `every` steps after it, and at `end`;
        then the model only trains on (it cools down).
      at: or at these steps.
    """

    sparsity: SparsityFn
    begin: int = 0
    end: int | None = None
    every: int = 1
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.sparsity):
            raise TrainingError(
                "the sparsity of a schedule is a function of the step",
                seen=repr(self.sparsity),
                mend="for a share that stays the same one_shot(0.5)",
            )
        _check_span(self.begin, self.end, self.every)
        if not isinstance(self.at, Iterable):
            raise TrainingError(
                "at= is no sequence of steps", seen=repr(self.at), expected="(10, 20)"
            )
        for step in self.at:
            _check_step("a step of the schedule", step)
        object.__setattr__(self, "at", tuple(sorted(self.at)))

    def __call__(self, step: Any) -> Any:
        return self.sparsity(step)

    def is_due(self, step: Any) -> Any:
        """Whether channels die at this step, a bool that may be traced."""
        if self.at:
            return (jnp.asarray(self.at) == step).any()
        due = (step >= self.begin) & ((step - self.begin) % self.every == 0)
        return due if self.end is None else (due & (step <= self.end)) | (step == self.end)

    def since(self, step: Any) -> Any:
        """Steps since channels died last, 0 in that step; before the first one it means nothing."""
        if self.at:
            at = jnp.asarray(self.at)
            return step - jnp.where(at <= step, at, self.at[0]).max()
        since = (step - self.begin) % self.every
        return since if self.end is None else jnp.where(step >= self.end, step - self.end, since)

    @property
    def gap(self) -> float:
        """The fewest steps between two times at which channels die."""
        if self.at:
            return min(np.diff(self.at).tolist(), default=math.inf)
        if self.end is None:
            return self.every
        span = self.end - self.begin
        last = span % self.every or self.every
        return min(self.every, last) if span else math.inf


def one_shot(sparsity: float, *, at: int = 0) -> Schedule:
    """All at once.

    >>> [float(one_shot(0.5, at=10)(step)) for step in (9, 10)]
    [0.0, 0.5]
    """
    return stepwise({at: sparsity})


def stepwise(sparsities: Mapping[int, float]) -> Schedule:
    """So much from each of some steps on: `{1000: 0.3, 2000: 0.5}`.

    >>> schedule = stepwise({1000: 0.3, 2000: 0.5})
    >>> [round(float(schedule(step)), 2) for step in (999, 1000, 1999, 2000)]
    [0.0, 0.3, 0.3, 0.5]
    """
    if not isinstance(sparsities, Mapping) or not sparsities:
        raise TrainingError(
            "a stepwise schedule needs steps",
            seen=repr(sparsities),
            expected="{1000: 0.3, 2000: 0.5}",
        )
    for step, share in sparsities.items():
        _check_step("a step of the schedule", step)
        _check_share("sparsity", share)
    steps = tuple(sorted(sparsities))
    at = np.asarray(steps)
    shares = np.asarray([0.0, *(sparsities[step] for step in steps)], np.float32)
    return Schedule(
        sparsity=lambda step: jnp.asarray(shares)[(at <= jnp.asarray(step)[..., None]).sum(-1)],
        begin=steps[0],
        end=steps[-1],
        at=steps,
    )


def linear(start: float, final: float, *, begin: int, end: int, every: int = 1) -> Schedule:
    """From `start` to `final` in equal parts.

    >>> [float(linear(0.0, 0.5, begin=0, end=100, every=10)(step)) for step in (0, 50, 200)]
    [0.0, 0.25, 0.5]
    """
    return _ramp(lambda x: start + (final - start) * x, start, final, begin, end, every)


def cubic(start: float, final: float, *, begin: int, end: int, every: int = 1) -> Schedule:
    """Fast at first, then ever slower: `final + (start - final) * (1 - x)^3`, x from 0 to 1.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, formula (1).

    >>> schedule = cubic(0.0, 0.5, begin=200, end=2000, every=50)
    >>> [round(float(schedule(step)), 4) for step in (0, 200, 1100, 2000, 9999)]
    [0.0, 0.0, 0.4375, 0.5, 0.5]
    """
    shape = lambda x: final + (start - final) * (1 - x) ** 3  # noqa: E731
    return _ramp(shape, start, final, begin, end, every)


def exponential(start: float, final: float, *, begin: int, end: int, every: int = 1) -> Schedule:
    """The same share of what is left dies each time: `1 - (1 - start) * r^x`.

    With r = (1 - final) / (1 - start): the density decays exponentially, as it does when a share
    of the living is pruned round after round (Han et al. 2015, Frankle and Carbin 2019).

    >>> schedule = exponential(0.0, 0.75, begin=0, end=2)
    >>> [float(schedule(step)) for step in (0, 1, 2)]
    [0.0, 0.5, 0.75]
    """
    _check_share("start", start)
    _check_share("final", final)
    if start == 1 or final == 1:
        raise TrainingError(
            "an exponential schedule never reaches 1, and starts below it",
            seen=f"start {start}, final {final}",
        )
    left = (1 - final) / (1 - start)
    return _ramp(lambda x: 1 - (1 - start) * left**x, start, final, begin, end, every)


def scheduled(
    sparsity: SparsityFn, *, begin: int = 0, end: int | None = None, every: int = 1
) -> Schedule:
    """Any function of the step, such as an `optax.Schedule`, looked at every so often.

    >>> import optax
    >>> schedule = scheduled(optax.cosine_onecycle_schedule(100, 0.5), every=10)
    >>> bool(schedule.is_due(20)), bool(schedule.is_due(21))
    (True, False)
    """
    return Schedule(sparsity=sparsity, begin=begin, end=end, every=every)


def as_schedule(value: Any) -> Schedule:
    """A schedule from what a user may give for one; a plain function is looked at every step."""
    if isinstance(value, Schedule):
        return value
    if callable(value):
        return scheduled(value)
    if is_number(value):
        return one_shot(float(value))
    raise TrainingError(
        "this is no schedule",
        seen=repr(value),
        expected="cubic(0.0, 0.5, begin=200, end=2000, every=50), one_shot(0.5), or a function of "
        "the step",
    )


def _ramp(
    shape: Callable[[Any], Any], start: float, final: float, begin: int, end: int, every: int
) -> Schedule:
    """A schedule by a function of how far it has come, 0 to 1."""
    _check_share("start", start)
    _check_share("final", final)
    _check_step("end", end)
    _check_span(begin, end, every)

    def sparsity(step: Any) -> Any:
        x = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1), 0.0, 1.0)
        # Exactly the end: what the formula rounds to may be a channel less.
        inside = jnp.where(jnp.asarray(step) >= end, final, shape(x))
        return jnp.where(jnp.asarray(step) >= begin, inside, start)

    return Schedule(sparsity=sparsity, begin=begin, end=end, every=every)


def _check_share(what: str, share: Any) -> None:
    if not is_number(share) or not 0 <= share <= 1:
        raise TrainingError(
            f"{what} is the share of the channels that is dead",
            seen=repr(share),
            expected="a number from 0.0 to 1.0 (50% is 0.5)",
        )


def _check_step(what: str, step: Any) -> None:
    if not is_whole(step) or step < 0:
        raise TrainingError(
            f"{what} is no step", seen=repr(step), expected="a whole number, 0 or more"
        )


def _check_span(begin: int, end: int | None, every: int) -> None:
    _check_step("begin", begin)
    _check_step("every", every)
    if every < 1:
        raise TrainingError("channels cannot die every 0 steps", seen=f"every={every}")
    if end is None:
        return
    _check_step("end", end)
    if end < begin:
        raise TrainingError(
            "the schedule ends before it begins",
            seen=f"begin={begin}, end={end}",
            expected="begin <= end",
        )
