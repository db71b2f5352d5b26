"""What `pruning` refuses, and of what it warns, once it sees the parameters, gradients or state."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flaxslim._spec import Site, Spec
from flaxslim.errors import TrainingError, TrainingWarning, nearest
from flaxslim.training._decide import Decide
from flaxslim.training._schedule import Schedule
from flaxslim.training._state import BySite

_ROUNDING = 1e-6  # that a share may be beyond 0 or 1 by


def warn_of_idle(decide: Decide, spec: Spec, sites: Sequence[Site]) -> None:
    """Warn of schedules that cannot do what they say."""
    for axis, schedule in decide.schedules.items():
        own = [site for site in sites if site.pair.axis == axis]
        if not own:
            warnings.warn(
                f"the schedule of axis {axis!r} has nothing to prune: {spec.name} has no "
                "site with it in these parameters",
                TrainingWarning,
                stacklevel=3,
            )
            continue
        _check_shares(axis, schedule)
        if schedule.end is None:
            continue
        how = decide.how
        with jax.ensure_compile_time_eval():  # `init` may be traced
            target = float(schedule(schedule.end))
            most = [1 - float(how.floor(axis, site.size)) / max(site.size, 1) for site in own]
        sizes = [site.size * site.rows for site in own]
        most = [max(share, 0.0) for share in most]  # narrower than min_width
        reach = float(np.dot(most, sizes)) / max(sum(sizes), 1)
        if not how.among_all:
            reach = min(most)
        if reach < target - 0.5 / max(min(site.size for site in own), 1):
            warnings.warn(
                f"no more than {reach:.0%} of the channels of axis {axis!r} can die at some "
                f"site, and the schedule ends at {target:.0%}: lower min_width "
                f"({how.min_width}) or raise max_sparsity ({how.max_sparsity}); both may be "
                'by axis: {"f": 128, "h": 2}',
                TrainingWarning,
                stacklevel=3,
            )


def _check_shares(axis: str, schedule: Schedule) -> None:
    """Raise `TrainingError` unless a schedule begins and ends with a share."""
    for step in (schedule.begin, schedule.end):
        if step is None:
            continue
        with jax.ensure_compile_time_eval():
            share = float(schedule(step))
        if not -_ROUNDING <= share <= 1 + _ROUNDING:
            raise TrainingError(
                f"the sparsity of axis {axis!r} is no share",
                seen=f"{share} at step {step}",
                expected="0.0 to 1.0: 0.5 is half of the channels",
            )


def warn_of_locked(sites: Sequence[Site], channels: BySite) -> None:
    """Warn of sites that are dead as a whole: a second layer that starts at zero looks the same."""
    frozen = []
    for site in sites:
        alive = channels[site.second.path]["alive"]
        # Under `jit` and across processes there are no values to look at.
        if isinstance(alive, Tracer) or not alive.is_fully_addressable or not site.size:
            continue
        rows = np.flatnonzero(~np.asarray(alive).any(axis=-1))
        if rows.size:
            which = f", in {rows.tolist()} of its stack" if site.rows > 1 else ""
            frozen.append(f"{site.second.path} ({site.size} channels{which})")
    if frozen:
        more = f" and of {len(frozen) - 4} more" if len(frozen) > 4 else ""
        warnings.warn(
            f"all channels of {', '.join(frozen[:4])}{more} are dead already, since nothing reads "
            "them, and lock=True (keep_dead) keeps them so: these layers never train. If they "
            "start at zero (kernel_init=zeros), take the first steps without it and call init "
            "then, or leave their pair out of the spec; if they were pruned, all is well",
            TrainingWarning,
            stacklevel=3,
        )


def check_gradients(sites: Sequence[Site], grads: Mapping[str, Any]) -> None:
    for site in sites:
        for tensor in site.cut:
            if tensor.path not in grads:
                raise TrainingError(
                    "a tensor of a pair that is pruned has no gradient",
                    path=tensor.path,
                    near=nearest(tensor.path, grads),
                    mend="take the gradient by all parameters that the spec names; where others "
                    "are frozen, give pruning only the subtree that is trained",
                )
            if np.shape(grads[tensor.path]) != tensor.shape:
                raise TrainingError(
                    "a gradient has not the shape of its parameter",
                    path=tensor.path,
                    seen=np.shape(grads[tensor.path]),
                    expected=tensor.shape,
                )


def check_state(sites: Sequence[Site], channels: BySite, fade: int) -> None:
    paths = {site.second.path for site in sites}
    if strange := sorted(paths ^ channels.keys()):
        raise TrainingError(
            "the state was made for another spec, or for other parameters",
            path=strange[0],
            seen="in the state only" if strange[0] in channels else "in the parameters only",
            expected=f"the {len(paths)} sites of the spec",
            mend="resume with the spec that the state was saved with, or start anew: "
            "tx.init(params)",
        )
    for site in sites:
        own = channels[site.second.path]
        if own["alive"].shape != (site.rows, site.size):
            raise TrainingError(
                "the state has another number of channels than the parameters",
                path=site.second.path,
                seen=own["alive"].shape,
                expected=(site.rows, site.size),
                mend="cut both in one call: params, opt_state, cfg = flaxslim.shrink(params, "
                "opt_state, cfg, spec=...)",
            )
        if bool(fade) != ("fading" in own):
            raise TrainingError(
                "either the state or the optimizer has fade=, and the other has not",
                path=site.second.path,
                mend="resume with the settings that the state was made with",
            )
