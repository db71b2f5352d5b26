"""`slim`: find, mark, plan and apply, composed."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from flaxslim._apply import apply, check_fits, resized
from flaxslim._draw import check_dead, check_finite, check_whole, draw
from flaxslim._nnx import check_shapes, modules, told_before
from flaxslim._plan import PER_LAYER, Plan
from flaxslim._resize import untold
from flaxslim._spec import SpecLike
from flaxslim._tree import flatten
from flaxslim.errors import (
    ConfigKeptWarning,
    DeadKeptWarning,
    NothingRemovedWarning,
    PlanError,
    WidthError,
)

_log = logging.getLogger("flaxslim")


def slim(
    params: Any,
    cfg: Any = None,
    spec: SpecLike = None,
    *,
    width: str = "uniform",
    multiple_of: int | Mapping[str, int] = 1,
    threshold: float = 0.0,
    plan: Plan | None = None,
) -> tuple[Any, Any]:
    """Cut the channels that contribute nothing; return the smaller parameters and their config.

    Args:
      params: the parameters: dict, FrozenDict, nnx.State, nnx.Module or another pytree of dicts,
        with numpy or jax leaves. Untouched; what comes back is of the same kind. Of an
        nnx.Module all shapes are checked again, since nnx checks none. (Pass the module: a State
        has no attributes to mend, and merged with the old graph it is a wrong model.)
      cfg: the config (Hugging Face, dict, dataclass, ...). Untouched; a new one comes back.
      spec, width, multiple_of, threshold: as in `flaxslim.plan`.
      plan: apply this stored plan instead of making one; then the others must be left out.

    Returns: `(params, cfg)`. If nothing is dead they are the objects that went in, and a
    `NothingRemovedWarning` says so; a `DeadKeptWarning` names what is dead and had to stay, and a
    `ConfigKeptWarning` a pair without a `width`, of which the config says nothing new.
    `flaxslim.verify` proves the two models equal.

    Raises: the errors of `flaxslim.plan`; `WidthError` if channels are dead but the config of the
    stock class can say no smaller width; `PlanError` if a stored plan does not fit these
    parameters, or would cut channels that are alive in them.

    >>> import numpy as np
    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    >>> slimmed, cfg = slim(tree, {"hidden": 3}, spec=MLP)
    >>> slimmed["down"]["kernel"].shape, cfg
    ((2, 3), {'hidden': 2})
    """
    if plan is None:
        plan = draw(params, cfg, spec, width=width, multiple_of=multiple_of, threshold=threshold)
    elif spec is not None or (width, multiple_of, threshold) != ("uniform", 1, 0.0):
        raise PlanError(
            "a stored plan already says which channels stay",
            mend="pass plan= alone, or leave it out",
        )
    elif not isinstance(plan, Plan):
        raise PlanError(
            "plan= is not a Plan",
            seen=f"a {type(plan).__name__}",
            mend="read a stored one: Plan.from_json(text), or Plan.from_dict(data)",
        )
    else:
        leaves = flatten(params)
        check_fits(plan, leaves)
        check_whole(plan, params, cfg)
        check_dead(plan, leaves, cfg)
    return carried_out(plan, params, cfg)


def carried_out(plan: Plan, tree: Any, cfg: Any, *, like: Any = None) -> tuple[Any, Any]:
    """A tree and its config after a plan that fits them, as `slim` gives them back and warns.

    `like` are the parameters, if the tree is more than they are.
    """
    _log.info("%s", plan)
    if plan.why_nothing:
        check_finite(plan, flatten(tree if like is None else like))
        if plan.blocked:
            raise WidthError(plan.why_nothing, mend=mend_blocked(plan))
        warnings.warn(
            f"nothing was removed: {plan.why_nothing}", NothingRemovedWarning, stacklevel=3
        )
        return tree, cfg
    small, new = apply(plan, tree, like=like), resized(plan, cfg)
    if any(modules(small)):
        check_shapes(small, plan, new)
        if attributes := told_before(small, plan):
            warnings.warn(
                f"the module goes on to say the old width: {', '.join(attributes[:4])}. If it "
                "computes with that, a model that is built from the new config computes something "
                "else: prove that one. Pair(modules={'': {'hidden': 'f'}}) sets an attribute "
                "`hidden` of the layer's root",
                ConfigKeptWarning,
                stacklevel=3,
            )
    if cfg is not None and (pairs := untold(plan.cuts, new)):
        warnings.warn(
            f"the config goes on to say the old size of {'; '.join(map(str, pairs))}: name its "
            "key, Pair(width=...), of key/value groups group_width; or discover(..., cfg=cfg)",
            ConfigKeptWarning,
            stacklevel=3,
        )
    if plan.blocked:
        warnings.warn(
            f"some of what is dead was kept: {'; '.join(plan.blocked)}",
            DeadKeptWarning,
            stacklevel=3,
        )
    return small, new


def mend_blocked(plan: Plan) -> str:
    """What to do about a plan that is blocked: a layout says any width, if the class bears it."""
    if any(PER_LAYER in why for why in plan.blocked):
        return f"pass {PER_LAYER}"
    return "keep the model as it is: the class computes something else with fewer"
