"""`pruning`: any Optax optimizer, under which channels die on a schedule.

Under `optax.apply_updates` a dead channel is exactly zero, since its update is minus what it is:
p + (-p) = 0 in every floating point type. So a loop needs no mask and no word of pruning. The state
is one bool and one float32 for each channel, beside the state of the inner optimizer, whose moments
are held at zero where channels are dead. These are selections on arrays that the optimizer reads or
writes anyway, so that XLA makes them part of the same pass; what decides who dies runs under
`lax.cond`, in the steps in which some do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from flaxslim import _tree
from flaxslim._kinds import is_number, is_whole
from flaxslim._spec import Site, Spec, SpecLike, Tensor
from flaxslim.errors import TrainingError, nearest
from flaxslim.specs import chosen
from flaxslim.training._allocation import Allocation
from flaxslim.training._channels import masks, read, reading
from flaxslim.training._decide import Decide
from flaxslim.training._inner import all_placed, held, selected, steps_of
from flaxslim.training._pruning_checks import (
    check_gradients,
    check_state,
    warn_of_idle,
    warn_of_locked,
)
from flaxslim.training._schedule import Schedule, as_schedule
from flaxslim.training._score import Evidence, ScoreFn, as_score
from flaxslim.training._state import BySite, PruningState, by_site, nested

# The largest count that the state can hold.
_MOST = np.iinfo(np.int32).max

# A Schedule, a function of the step, a share; or these by axis: {"f": ..., "h": ...}.
ScheduleLike = Any


def pruning(
    inner: Any,
    spec: SpecLike,
    schedule: ScheduleLike = None,
    score: str | ScoreFn = "magnitude",
    *,
    cfg: Any = None,
    allocation: str = "site",
    min_width: int | Mapping[str, int] = 1,
    max_sparsity: float | Mapping[str, float] = 1.0,
    lock: bool = False,
    fade: int = 0,
    regrow: float = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under which the channels of a spec die on a schedule, exactly to zero.

    Args:
      inner: the optimizer, of Optax or of its kind. `optax.MultiSteps` may stand inside or around.
        Inside, the schedule counts the small steps, around the large ones.
        `pruning` goes outermost, or last in a chain: whatever came after it (or around it, as
        `optax.lookahead`) would change the updates that make dead channels zero.
      spec: where the channels are, as in `flaxslim.plan`.
      schedule: when how many are dead: `flaxslim.cubic`, `linear`, `exponential`, `stepwise`,
        `one_shot`, `scheduled`, or a function of the step such as an Optax schedule. For each axis
        its own, if a mapping: `{"f": cubic(...), "h": cubic(...)}`. None: nothing dies.
      score: by what; the smallest die first. "magnitude_l1", "magnitude" and "magnitude_product" go
        by the weights of a channel, "snip", "snip_momentum", "gradient_weight", "taylor", "fisher"
        and "movement" by these and their gradients, "activation" and "wanda" by hidden values that
        the loop hands to `update` as `activations=`, "random" by nothing. Their formulas and
        sources: docs/reference/training.md. Or `fn(params, grads, state)`, called for each site in
        each step with the numbers of its channels, `(s, f, n)` for each tensor, and the score so
        far. It returns the new one, `(s, f)`.
      cfg: the config, which tells the size of heads that lie side by side. Once heads were cut,
        call `pruning` again with the new one; the state stays.
      allocation: "site": the same share at each site. "global": the smallest scores among all.
      min_width, max_sparsity: so many channels live on at each site; no larger share of it dies.
        Each may be by axis: `{"f": 128, "h": 2}`.
      lock: what is dead at the start (nothing reads it) stays dead. A `TrainingWarning` names sites
        that are dead as a whole, such as one whose second layer starts at zero.
      fade: over how many steps what is doomed goes to zero, in equal parts; 0 is at once.
      regrow: which share of the living gives way to dead channels with larger gradients, each time
        (RigL, Evci et al. 2020), less and less until the schedule ends. Only what reads a dead
        channel is zero then; what writes it stays as it was, or no gradient would tell its worth.
        What `shrink` has cut does not grow again.
      seed: of the score "random".

    Returns: the optimizer. Its `update` needs `params`, and its state is a `PruningState`.

    Raises `TrainingError` for what cannot be; `init` and `update` raise what `Spec.sites` does, and
    `update` a `TrainingError` for parameters, gradients or a state that do not belong together.

    >>> import jax
    >>> import numpy as np
    >>> from flaxslim import Pair, Spec, one_shot, pruning
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.diag([1.0, 2.0])}, "down": {"kernel": np.ones((2, 3))}}
    >>> tx = pruning(optax.sgd(0.1), MLP, one_shot(0.5))
    >>> grads = jax.tree.map(np.ones_like, params)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["down"]["kernel"])
    [[0.  0.  0. ]
     [0.9 0.9 0.9]]
    """
    found = chosen(spec, cfg)
    p = Pruning(
        inner=_transformation(inner),
        spec=found,
        cfg=cfg,
        decide=Decide(
            score=as_score(score),
            schedules=_by_axis(schedule, found),
            how=_allocation(allocation, min_width, max_sparsity, found),
            fade=fade,
            regrow=regrow,
        ),
        lock=lock,
        seed=seed,
    )
    return optax.GradientTransformationExtraArgs(p.init, p.update)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """What `pruning` was told; `init` and `update` are the transformation."""

    inner: optax.GradientTransformationExtraArgs
    spec: Spec
    cfg: Any
    decide: Decide
    lock: bool
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.lock, bool | np.bool_) or not is_whole(self.seed):
            raise TrainingError(
                "lock= is True or False, and seed= a whole number",
                seen=f"lock={self.lock!r}, seed={self.seed!r}",
            )
        if not self.decide.schedules and not self.lock:
            raise TrainingError(
                "nothing would ever die",
                seen="no schedule, and lock=False",
                mend="schedule=flaxslim.cubic(0.0, 0.5, begin=200, end=2000, every=50), or "
                "lock=True to keep dead what is dead at the start",
            )
        if self.lock and self.decide.regrow:
            raise TrainingError(
                "what is locked cannot grow again",
                seen="lock=True with regrow=",
                mend="leave out the one or the other",
            )

    def init(self, params: Any) -> PruningState:
        leaves = _tree.flatten(params)
        _tree.check_living(leaves)
        channels: BySite = {}
        sites = self.spec.sites(params, self.cfg)
        warn_of_idle(self.decide, self.spec, sites)
        for site in sites:
            alive = read(site, leaves) if self.lock else jnp.ones((site.rows, site.size), bool)
            own = {
                "alive": alive,
                "score": jnp.zeros(alive.shape, jnp.float32),
                "gone": jnp.zeros((), jnp.int32),
            }
            if self.decide.fade:
                own["fading"] = jnp.zeros(alive.shape, bool)
            channels[site.second.path] = own
        if self.lock:
            warn_of_locked(sites, channels)
        # Arrays of their own, or a step function could not be given all of them to overwrite.
        count, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        owed = jnp.zeros((), bool)
        return PruningState(self.inner.init(params), count, skipped, owed, nested(channels))

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, PruningState]:
        if params is None:
            raise TrainingError(
                "pruning needs the parameters", mend="tx.update(grads, state, params)"
            )
        if not isinstance(state, PruningState):
            raise TrainingError(
                "this is no state of pruning",
                seen=f"a {type(state).__name__}",
                mend="tx.init(params) makes one; flax.serialization.from_bytes(tx.init(params), "
                "data) restores one that was saved",
            )
        sites = self.spec.sites(params, self.cfg)
        leaves, grads = _tree.flatten(params), _tree.flatten(updates)
        check_gradients(sites, grads)
        channels = by_site(state.channels)
        check_state(sites, channels, self.decide.fade)
        activations = extra.pop("activations", {})

        evidence = {
            site.second.path: Evidence(
                site=site,
                params=leaves,
                grads=grads,
                state=channels[site.second.path]["score"],
                activations=activations,
                seed=self.seed,
            )
            for site in sites
        }
        verdict = self.decide(sites, evidence, channels, state.count, state.owed)
        channels, factors = self.decide.faded(sites, verdict.channels, state.count)

        alive = {path: own["alive"] for path, own in channels.items()}
        zero = all_placed(masks(sites, alive, self._zeroed), leaves)
        frozen = all_placed(masks(sites, alive), leaves) if self.decide.regrow else {}
        living = zero | frozen
        # The inner optimizer sees zeros in place of what is dead, in all that it reads, so what it
        # writes is zero there. Selected on the way in this costs nothing; on the way out it would
        # be another pass over each array.
        new, inner = self.inner.update(
            _tree.replace(updates, selected(living, grads)),
            held(state.inner_state, leaves, living, zero),
            _tree.replace(params, selected(living, leaves)),
            **extra,
        )
        steps = steps_of(_tree.flatten(new), leaves, frozen=frozen, factors=factors, zero=zero)
        new = _tree.replace(new, {path: steps[path] for path in living})
        count = jnp.asarray(optax.safe_increment(state.count))
        skipped = state.skipped + jnp.minimum(verdict.skipped, _MOST - state.skipped)
        return new, PruningState(inner, count, skipped, verdict.owed, nested(channels))

    def _zeroed(self, site: Site) -> tuple[Tensor, ...]:
        """The tensors in which what is dead is zero."""
        return reading(site) if self.decide.regrow else site.cut


# --- what is refused --------------------------------------------------------------------------


def _transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
        raise TrainingError(
            "this is no optimizer",
            seen=repr(inner),
            expected="an optax.GradientTransformation",
            mend="pruning(optax.adamw(3e-5), spec, schedule)",
        )
    return optax.with_extra_args_support(inner)


def _by_axis(schedule: ScheduleLike, spec: Spec) -> dict[str, Schedule]:
    axes = dict.fromkeys(pair.axis for pair in spec)
    if schedule is None:
        return {}
    if not isinstance(schedule, Mapping):
        return dict.fromkeys(axes, as_schedule(schedule))
    _check_axes("the schedule", schedule, spec)
    return {axis: as_schedule(own) for axis, own in schedule.items()}


def _check_axes(what: str, by_axis: Any, spec: Spec) -> None:
    """Raise `TrainingError` for a mapping with an axis that the spec does not prune."""
    axes = dict.fromkeys(pair.axis for pair in spec)
    unknown = [axis for axis in by_axis if axis not in axes] if isinstance(by_axis, Mapping) else ()
    if unknown:
        raise TrainingError(
            f"{what} is for an axis that {spec.name} does not prune",
            seen=", ".join(map(repr, unknown)),
            expected=" or ".join(map(repr, axes)),
            near=nearest(str(unknown[0]), axes),
            mend="pass a spec with heads, such as BERT_FFN + BERT_HEADS, for an axis 'h'",
        )


def _allocation(name: str, min_width: Any, max_sparsity: Any, spec: Spec) -> Allocation:
    if name not in ("site", "global"):
        raise TrainingError(
            "there is no such allocation", seen=repr(name), expected='"site" or "global"'
        )
    _check_axes("min_width", min_width, spec)
    _check_axes("max_sparsity", max_sparsity, spec)
    widths, shares = (
        [*value.values()] if isinstance(value, Mapping) else [value]
        for value in (min_width, max_sparsity)
    )
    sound = all(is_whole(width) and width >= 0 for width in widths)
    if not sound or not all(is_number(share) and 0 <= share <= 1 for share in shares):
        raise TrainingError(
            "no site can have so many channels",
            seen=f"min_width={min_width!r}, max_sparsity={max_sparsity!r}",
            expected="min_width a whole number of 0 or more, max_sparsity from 0.0 to 1.0; "
            'either may be by axis: {"f": 128, "h": 2}',
        )
    return Allocation(among_all=name == "global", min_width=min_width, max_sparsity=max_sparsity)
