"""Two plans as one, and a plan undone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxslim import _tree
from flaxslim._errors import PlanError
from flaxslim._plan import Channels, Cut, Plan, Resize, channels
from flaxslim._spec import Site, Tensor


def composed(second: Plan, first: Plan) -> Plan:
    """The plan that does what `first` and then `second` do.

    Raises `PlanError` if `second` was not made for what `first` leaves.
    """
    before = {cut.site.second.path: cut for cut in first.cuts}
    after = {cut.site.second.path: cut for cut in second.cuts}
    shapes = {t.path: t.shape for cut in first.cuts for t in cut.site.tensors}
    cuts = [_both(after[path], cut) if path in after else cut for path, cut in before.items()]
    cuts += [_as_before(cut, shapes) for path, cut in after.items() if path not in before]
    return Plan(
        spec=first.spec + second.spec,
        cuts=tuple(cuts),
        resizes=_resizes(first.resizes, second.resizes),
        values={**first.values, **second.values},
        threshold=max(first.threshold, second.threshold),
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
        blocked=second.blocked,
    )


def _both(second: Cut, first: Cut) -> Cut:
    if second.site.size != first.width or second.site.stack != first.site.stack:
        raise PlanError(
            "the second plan was not made for what the first one leaves",
            path=first.site.second.path,
            seen=f"a plan for {second.site.size} channels",
            expected=f"a plan for {first.width} of {first.site.size}",
            mend="make the second plan for apply(first, params): plan(apply(first, params), ...)",
        )
    kept = np.take_along_axis(first.kept, second.kept, axis=1)
    folded = first.folded
    np.put_along_axis(folded, first.kept, second.folded, axis=1)
    return dataclasses.replace(
        first,
        keep=_rows(first.site, kept),
        folds=channels(first.site, folded),
        dead=first.removed + second.dead,
        # What the first found and left is found again by the second.
        rules=second.rules if not first.removed else _sum(first, second),
        weak=first.weak + second.weak,
        activation=first.activation or second.activation,
    )


def _rows(site: Site, kept: np.ndarray) -> Channels:
    rows = tuple(tuple(row) for row in kept.tolist())
    return rows if site.stack else rows[0]


def _sum(first: Cut, second: Cut) -> Mapping[str, int]:
    """How many each rule found, where that is known: the first must have cut all that it found."""
    if first.removed < first.dead:
        return {}
    names = dict.fromkeys((*first.rules, *second.rules))
    return {name: first.rules.get(name, 0) + second.rules.get(name, 0) for name in names}


def _as_before(cut: Cut, shapes: Mapping[str, tuple[int, ...]]) -> Cut:
    """A cut that the second plan alone has, with the shapes that its tensors had before."""

    def old(tensor: Tensor | None) -> Any:
        if tensor is None or tensor.path not in shapes:
            return tensor
        return dataclasses.replace(tensor, shape=shapes[tensor.path])

    site = cut.site
    site = dataclasses.replace(
        site,
        first=tuple(map(old, site.first)),
        first_biases=tuple(map(old, site.first_biases)),
        second=old(site.second),
        second_bias=old(site.second_bias),
        also=tuple(map(old, site.also)),
    )
    return dataclasses.replace(cut, site=site)


def _resizes(first: tuple[Resize, ...], second: tuple[Resize, ...]) -> tuple[Resize, ...]:
    by_width = {resize.width: resize for resize in first}
    for resize in second:
        known = by_width.get(resize.width)
        by_width[resize.width] = (
            resize if known is None else dataclasses.replace(resize, before=known.before)
        )
    return tuple(by_width.values())


def expand(plan: Plan, tree: Any) -> Any:
    """A slimmed tree at its full size again: zero where channels were cut.

    The inverse of `apply(plan, ...)` but for what was cut, which is zero now: so the function is
    the same. Constants stay folded in the second biases.
    Raises `PlanError` if the tree is not one that the plan leaves.

    >>> from flaxslim import Pair, Spec, apply, plan
    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    >>> p = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> expand(p, apply(p, tree))["up"]["kernel"]
    array([[1., 0., 1.],
           [1., 0., 1.]])
    """
    from flax import nnx

    from flaxslim._nnx import mended

    leaves = _tree.flatten(tree)
    new: dict[str, Any] = {}
    for cut in reversed(plan.cuts):
        for tensor in cut.site.cut:
            axis, kept = cut.site.axis(tensor), cut.indices(tensor)
            leaf = new.get(tensor.path, leaves.get(tensor.path))
            shape = None if leaf is None else tuple(leaf.shape)
            whole = tensor.axes.sizes(tensor.shape)[axis]
            if shape is None or _size(tensor, shape, axis) != kept.shape[-1]:
                raise PlanError(
                    "the tree is not what the plan leaves",
                    path=tensor.path,
                    seen=shape,
                    expected=f"{kept.shape[-1]} of {whole} along {axis!r} of "
                    f'{tensor.shape} by pattern "{tensor.axes}"',
                    mend="give what apply(plan, ...) returned",
                )
            if cut.removed:
                new[tensor.path] = tensor.axes.put(
                    leaf, axis, kept, whole, cut.site.second.axes.stack
                )
    full = _tree.replace(tree, new)
    return mended(full, plan, expanded=True) if isinstance(full, nnx.Module) else full


def _size(tensor: Tensor, shape: tuple[int, ...], axis: str) -> int | None:
    if len(shape) != len(tensor.shape):
        return None
    return tensor.axes.sizes(shape).get(axis)
