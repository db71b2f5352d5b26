"""Which channels die in a step, fade, or grow again: what `pruning` decides, on rows `(s, f)`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flaxslim._kinds import is_number, is_whole
from flaxslim._spec import Site
from flaxslim.errors import TrainingError
from flaxslim.training._allocation import Allocation, choose, members, regrown
from flaxslim.training._channels import Rows, reading, spread, total
from flaxslim.training._schedule import Schedule
from flaxslim.training._score import Evidence, Score
from flaxslim.training._state import BySite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a step has decided.

    Attributes:
      channels: what is known of them from now on.
      skipped: how many scores were not finite, and so did not count.
      owed: some should have died, but there was no score at all to go by; the next step tries.
    """

    channels: BySite
    skipped: jax.Array
    owed: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decide:
    """By what, when and how many; fade and regrow as in `pruning`."""

    score: Score
    schedules: Mapping[str, Schedule]
    how: Allocation
    fade: int
    regrow: float

    def __post_init__(self) -> None:
        gap = min((schedule.gap for schedule in self.schedules.values()), default=math.inf)
        if not is_whole(self.fade) or not 0 <= self.fade <= gap:
            raise TrainingError(
                "what is doomed must have faded before the next channels die",
                seen=f"fade={self.fade!r}, and channels die {gap} steps apart",
                expected=f"fade from 0 to {gap} steps",
            )
        if not is_number(self.regrow) or not 0 <= self.regrow <= 1:
            raise TrainingError("regrow is a share", seen=repr(self.regrow), expected="0.0 to 1.0")
        if self.regrow and (self.fade or self.how.among_all or not self.schedules):
            raise TrainingError(
                "channels give way to others at once, at each site by itself, and on a schedule",
                seen="regrow= with fade=, with allocation='global', or without a schedule",
                mend="leave out the one or the other",
            )

    def __call__(
        self,
        sites: Sequence[Site],
        evidence: Mapping[str, Evidence],
        channels: BySite,
        count: jax.Array,
        owed: jax.Array,
    ) -> Verdict:
        """Who is alive after this step. What takes time is done only in the steps that are due."""
        due = {
            axis: schedule.is_due(count) | (owed & (count > schedule.begin))
            for axis, schedule in self.schedules.items()
        }
        seen = {site.second.path: site for site in sites if site.pair.axis in due}
        if not seen:
            return Verdict(channels=channels, skipped=jnp.zeros((), jnp.int32), owed=owed)
        evidence = {path: evidence[path] for path in seen}
        now = {path: channels[path]["score"] for path in seen}
        if self.score.adds_up:
            now = self._scores(evidence)

        def some_die() -> tuple[BySite, jax.Array, jax.Array]:
            rows = now if self.score.adds_up else self._scores(evidence)
            known = _counted(channels, rows)
            usable = {path: self._usable(e, rows[path]) for path, e in evidence.items()}
            after = self._chosen([*seen.values()], evidence, known, usable, count, due)
            none = [~(known[p]["alive"] & jnp.isfinite(x)).any() for p, x in usable.items()]
            return after, _not_finite(channels, rows), jnp.stack(none).all()

        def none_dies() -> tuple[BySite, jax.Array, jax.Array]:
            return _counted(channels, now), _not_finite(channels, now), jnp.zeros((), bool)

        any_due = jnp.stack([*due.values()]).any()
        if not isinstance(any_due, Tracer):  # eagerly each cond would be compiled, and kept, anew
            found = some_die() if any_due else none_dies()
        else:
            found = jax.lax.cond(any_due, some_die, none_dies)
        after, skipped, owed = found
        return Verdict(channels=after, skipped=skipped, owed=owed)

    def _scores(self, evidence: Mapping[str, Evidence]) -> dict[str, Rows]:
        return {path: self.score.rows(e) for path, e in evidence.items()}

    def _usable(self, e: Evidence, rows: Rows) -> Rows:
        """What to go by: the score, or what was added up before a step without a finite one."""
        if self.score.adds_up:
            before = jnp.where(e.state != 0, e.state, jnp.nan)
            rows = jnp.where(jnp.isfinite(rows), rows, before)
        if (finish := self.score.finish) is not None:
            return finish(dataclasses.replace(e, state=rows))
        return rows

    def _chosen(
        self,
        sites: Sequence[Site],
        evidence: Mapping[str, Evidence],
        channels: BySite,
        score: Mapping[str, Rows],
        count: jax.Array,
        due: Mapping[str, Any],
    ) -> BySite:
        """Some die, and perhaps others grow again, at the axes that are due."""
        share = {axis: schedule(count) for axis, schedule in self.schedules.items()}
        own = members(sites, score, channels)
        alive = choose(own, share, self.how)
        for m in own if self.regrow else ():
            growth = jnp.stack([_growth(evidence[path]) for path in m.paths]).sum(0)
            part = self.regrow * _half_cosine(self.schedules[m.axis], count)
            rows = regrown(m, alive[m.paths[0]], growth, part)
            alive |= dict.fromkeys(m.paths, rows)
        after = dict(channels)
        for site in sites:
            path, axis = site.second.path, site.pair.axis
            known = channels[path]
            # Of tied sites some may have had dead channels at the start that others have not.
            new = alive[path] if self.regrow else known["alive"] & alive[path]
            new = jnp.where(due[axis], new, known["alive"])
            if self.fade:
                after[path] = known | {"fading": known["fading"] | (known["alive"] & ~new)}
            else:
                after[path] = known | {"alive": new}
            if self.score.anew:
                zero = jnp.zeros_like(known["score"])
                after[path] |= {"score": jnp.where(due[axis], zero, known["score"])}
        return after

    def faded(
        self, sites: Sequence[Site], channels: BySite, count: jax.Array
    ) -> tuple[BySite, dict[str, jax.Array]]:
        """The channels, and by which factor the numbers of each tensor that fades shrink."""
        if not self.fade:
            return channels, {}
        after, factors = dict(channels), {}
        for site in sites:
            if (schedule := self.schedules.get(site.pair.axis)) is None:
                continue
            path, own = site.second.path, channels[site.second.path]
            left = jnp.maximum(self.fade - schedule.since(count), 1)
            last = left == 1
            alive, fading = own["alive"] & ~(own["fading"] & last), own["fading"] & ~last
            after[path] = own | {"alive": alive, "fading": fading}
            for tensor in site.cut:
                # What several heads share fades only when all of them do.
                stays = spread(site, tensor, alive & ~fading)
                doomed = spread(site, tensor, alive) & ~stays
                factor = jnp.where(doomed, (left - 1) / left, 1.0)
                factors[tensor.path] = factors.get(tensor.path, 1.0) * factor
        return after, factors


def _not_finite(channels: BySite, score: Mapping[str, Rows]) -> jax.Array:
    """How many scores of living channels are not finite."""
    counts = [(channels[path]["alive"] & ~jnp.isfinite(x)).sum() for path, x in score.items()]
    return jnp.stack(counts).sum().astype(jnp.int32)


def _counted(channels: BySite, score: Mapping[str, Rows]) -> BySite:
    """The channels with new scores, where these are finite."""
    after = dict(channels)
    for path, rows in score.items():
        old = channels[path]["score"]
        new = rows.astype(old.dtype)  # wider where the parameters are
        after[path] = channels[path] | {"score": jnp.where(jnp.isfinite(new), new, old)}
    return after


def _growth(e: Evidence) -> Rows:
    """The L2 norm of the gradient of what reads each channel, which is zero while it is dead."""
    return jnp.sqrt(total(e.site, jnp.square, e.grads, of=reading(e.site)))


def _half_cosine(schedule: Schedule, count: jax.Array) -> Any:
    """From 1 at the first step to 0 at the end of a schedule (Evci et al. 2020, f_decay)."""
    if not schedule.end:
        return 1.0
    return (1 + jnp.cos(jnp.pi * jnp.minimum(count / schedule.end, 1.0))) / 2
