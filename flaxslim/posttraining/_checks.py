"""What `prune` refuses before it computes anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _mesh, _tree
from flaxslim._draw import draw
from flaxslim._kinds import MOST_SEED, is_number, is_whole
from flaxslim._plan import PER_LAYER
from flaxslim._slim import mend_blocked
from flaxslim._spec import Site, Spec
from flaxslim.errors import BudgetError, CalibrationError, WidthError
from flaxslim.posttraining._allocate import Budget
from flaxslim.posttraining._cost import first_units
from flaxslim.posttraining._gradient import Objective
from flaxslim.posttraining._method import Method
from flaxslim.posttraining._rank import GRADIENTS, alive_of, takes_gradients


def check_asked(
    keep: float | Mapping[str, float] | None,
    budget: Budget | None,
    method: Method,
    objective: Objective | None,
    seed: int,
) -> None:
    """One wish, no objective where nothing takes its gradient, and a seed that JAX takes."""
    if not is_whole(seed) or not 0 <= seed <= MOST_SEED:
        raise CalibrationError(
            "the seed is no whole number of 63 bits", seen=repr(seed), expected="0 to 2**63 - 1"
        )
    if (keep is None) == (budget is None):
        raise BudgetError(
            "how small is it to be?",
            seen="neither keep= nor budget=" if keep is None else "both keep= and budget=",
            expected="one of them",
            mend="keep=0.7 keeps 70% of the channels of each site; "
            "budget=Budget(speedup=1.5) chooses by what the whole model may cost",
        )
    if objective is not None and not takes_gradients(method.score):
        raise CalibrationError(
            "objective= is for scores that take its gradient",
            seen=f"score={method.score!r}",
            expected=", ".join(sorted(GRADIENTS)),
            mend="leave it out; loss= is what tuning makes small",
        )


def shares_of(keep: float | Mapping[str, float], sites: Sequence[Site]) -> dict[str, float]:
    """The share of the units that stays, by axis."""
    axes = list(dict.fromkeys(site.pair.axis for site in sites))
    given = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(axes, keep)
    for axis, share in given.items():
        if axis not in axes:
            raise BudgetError(
                "keep= names an axis that the spec does not prune",
                seen=repr(axis),
                expected=" or ".join(map(repr, axes)),
                mend='pass spec="all" for the heads ("h") too',
            )
        check_share(share)
    return {axis: float(given.get(axis, 1.0)) for axis in axes}


def check_share(share: Any) -> None:
    """Raise `BudgetError` unless it is a share of the channels that can stay."""
    known = is_number(share)
    if known and 0 < float(share) <= 1:
        return
    percent = float(share) if known and 1 < float(share) <= 100 else 30.0
    raise BudgetError(
        "keep= is the share of the channels that stays",
        seen=repr(share),
        expected="above 0, up to 1; 0.7 keeps 70%",
        mend=f"for {percent:g}% keep={percent / 100:g}; to keep a percentage, divide it by 100",
    )


def refuse_adapters(sites: Sequence[Site]) -> None:
    """Raise `CalibrationError` for low-rank matrices beside a kernel, which no refit reaches."""
    for site in sites:
        if site.lora:
            raise CalibrationError(
                "a kernel of this site has a low-rank matrix beside it",
                path=site.lora[0][1].path,
                mend="merge the adapters into the kernels first",
            )


def refuse_apart(params: Any) -> None:
    """Raise `CalibrationError` for arrays that no process sees all of; `TracedError` without."""
    leaves = _tree.flatten(params)
    _tree.check_living(leaves)
    for path, leaf in leaves.items():
        if _mesh.is_apart(leaf):
            raise CalibrationError(
                "pruning without training refits layers on one host, and this array spans several",
                path=path,
                seen=_mesh.told(leaf),
                mend="prune in one process, with the model on its own devices or in its memory; "
                "slim, plan, apply, shrink and pruning run across processes",
            )


def check_sayable(
    params: Any,
    cfg: Any,
    spec: Spec,
    sites: Sequence[Site],
    counts: Mapping[str, int],
    *,
    width: str,
    multiple_of: int | Mapping[str, int],
) -> None:
    """Raise `WidthError` unless so many units of each site can be cut, and the config say so.

    And whatever `slim` refuses: a config that contradicts the tensors, quantised kernels.
    """
    trial = draw(
        first_units(params, sites, counts), cfg, spec, width=width, multiple_of=multiple_of
    )
    if trial.blocked:
        raise WidthError("; ".join(trial.blocked), mend=mend_blocked(trial))
    by_path = {site.second.path: site for site in sites}
    for cut in trial.cuts:
        if (site := by_path.get(cut.site.second.path)) is None:
            continue
        wanted = int(alive_of(site, [np.arange(counts[site.second.path])])[0].sum())
        if cut.width > wanted:  # fewer, where some are dead already
            raise WidthError(
                f"{wanted} of {site.size} {site.pair.unit} cannot be said here, {cut.width} can",
                path=site.second.path,
                seen=f"width={width!r}, multiple_of={multiple_of!r}",
                mend=f"multiple_of={{{site.pair.axis!r}: ...}} that gives such a number, "
                f"or {PER_LAYER}",
            )
