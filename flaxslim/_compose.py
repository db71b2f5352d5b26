"""Two plans as one, and a plan undone."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _resize, _tree
from flaxslim._apply import check_companions
from flaxslim._bits import check_concrete
from flaxslim._nnx import mended
from flaxslim._plan import Channels, Cut, Plan, Resize, channels, check_is_plan
from flaxslim._spec import Site, Tensor
from flaxslim.errors import PlanError

_IN_TURN = (
    "make the second plan with what the first one leaves, parameters and config: "
    "params, cfg = slim(params, cfg, plan=first); second = plan(params, cfg, ...)"
)


def composed(second: Plan, first: Plan) -> Plan:
    """The plan that does what `first` and then `second` do.

    In a chain of layers the second may find channels dead or constant only because the first cut
    what they read. Such constants cannot be folded in one go, and `apply` refuses; nor does
    `slim(plan=...)` see that such channels are dead. There the plans go one after the other.
    Raises `PlanError` if `second` was not made for what `first` leaves.
    """
    before = {cut.site.second.path: cut for cut in first.cuts}
    after = {cut.site.second.path: cut for cut in second.cuts}
    left = first.shapes
    shapes = {t.path: t.shape for cut in first.cuts for t in cut.site.tensors}
    for path, cut in after.items():
        _check_follows(cut, before.get(path), left)
    cuts = [_both(after[path], cut) if path in after else cut for path, cut in before.items()]
    cuts += [_as_before(cut, shapes) for path, cut in after.items() if path not in before]
    _check_claims(cuts)
    whole = before.keys() <= after.keys()
    resizes = _resizes(cuts, (*first.resizes, *second.resizes))
    values = _resize.joined(first.values, second.values)
    _check_one_width(cuts, values)
    return Plan(
        spec=first.spec + second.spec,
        cuts=tuple(cuts),
        resizes=resizes,
        values=values,
        threshold=max(first.threshold, second.threshold),
        notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
        # Where the second has looked again, only what it says holds.
        blocked=second.blocked if whole else (*first.blocked, *second.blocked),
    )


def _check_follows(second: Cut, first: Cut | None, left: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `PlanError` unless a cut of the second plan finds what the first one leaves."""
    for t in second.site.tensors:
        if t.shape != left.get(t.path, t.shape):
            raise _does_not_follow(t.path, t.shape, left[t.path])
    if first is None:
        return
    path = first.site.second.path
    ours, theirs = ({t.path: str(t.axes) for t in cut.site.tensors} for cut in (second, first))
    if ours != theirs:
        raise _does_not_follow(path, _told(ours), _told(theirs))
    if second.site.groups != first.groups:
        raise _does_not_follow(path, f"groups {second.site.groups}", f"groups {first.groups}")
    both_fold = second.folded.any() and first.folded.any()
    if both_fold and second.activation != first.activation:
        raise _does_not_follow(path, second.activation, first.activation)


def _told(tensors: Mapping[str, str]) -> str:
    return ", ".join(f'{path} "{axes}"' for path, axes in tensors.items())


def _does_not_follow(path: str, seen: Any, expected: Any) -> PlanError:
    return PlanError(
        "the second plan was not made for what the first one leaves",
        path=path,
        seen=seen,
        expected=expected,
        mend=_IN_TURN,
    )


def _check_claims(cuts: Sequence[Cut]) -> None:
    claims = Counter((t.path, t.axes.dimension(c.site.axis(t))) for c in cuts for t in c.site.cut)
    if twice := [path for (path, _), count in claims.items() if count > 1]:
        raise PlanError(
            "the two plans cut the same axis of a tensor for different sites",
            path=twice[0],
            mend="make both by one spec, or apply them one after the other",
        )


def _check_one_width(cuts: Sequence[Cut], values: Mapping[str, Any]) -> None:
    """Raise `PlanError` if one plain key would have to say two widths."""
    plain: dict[str, Cut] = {}
    for cut in cuts:
        expression = cut.site.pair.width_expression
        key = expression and expression.key
        if key in values and _resize.left_plain(values, cut.site):
            other = plain.setdefault(str(key), cut)
            if other.width != cut.width:
                raise _does_not_follow(
                    f"{key} of {cut.site.name}", f"width {cut.width}", f"width {other.width}"
                )


def _both(second: Cut, first: Cut) -> Cut:
    kept = np.take_along_axis(first.kept, second.kept, axis=1)
    folded = first.folded
    np.put_along_axis(folded, first.kept, second.folded, axis=1)
    return dataclasses.replace(
        first,
        keep=_rows(first.site, kept),
        folds=channels(first.site, folded),
        dead=first.removed + second.dead,
        # A dead channel that the first left is found again, and nothing says by which rule it was.
        rules={} if first.removed else second.rules,
        weak=first.weak + second.weak,
        activation=second.activation if second.folded.any() else first.activation,
    )


def _rows(site: Site, kept: np.ndarray) -> Channels:
    rows = tuple(tuple(row) for row in kept.tolist())
    return rows if site.stack else rows[0]


def _as_before(cut: Cut, shapes: Mapping[str, tuple[int, ...]]) -> Cut:
    """A cut that the second plan alone has, with the shapes that its tensors had before."""

    def old(tensor: Any) -> Any:
        if tensor is None:
            return None
        return dataclasses.replace(tensor, shape=shapes.get(tensor.path, tensor.shape))

    site = cut.site
    site = dataclasses.replace(
        site,
        first=tuple(map(old, site.first)),
        first_biases=tuple(map(old, site.first_biases)),
        second=old(site.second),
        second_bias=old(site.second_bias),
        readers=tuple(map(old, site.readers)),
        also=tuple(map(old, site.also)),
    )
    return dataclasses.replace(cut, site=site)


def _resizes(cuts: Sequence[Cut], known: Sequence[Resize]) -> tuple[Resize, ...]:
    """What becomes of each width that either plan speaks of."""
    by_width: dict[str, list[Cut]] = {resize.width: [] for resize in known}
    for cut in cuts:
        if (expression := cut.site.pair.width_expression) is not None:
            by_width.get(expression.label, []).append(cut)
    return tuple(Resize.of(width, own) for width, own in by_width.items() if own)


def expand(plan: Plan, tree: Any) -> Any:
    """A slimmed tree at its full size again: zero where channels were cut.

    The inverse of `apply(plan, ...)` but for what was cut, which is zero now: the function is the
    same. Constants stay folded in the second biases. Of parameters, not of optimizer states; the
    config is the one from before the cut, which is still the caller's, and the attributes of nnx
    modules say their old sizes again. The work is done on the host.
    Raises `PlanError` if the tree is not one that the plan leaves.

    >>> from flaxslim import Pair, Spec, apply, plan
    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    >>> p = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> expand(p, apply(p, tree))["up"]["kernel"]
    array([[1., 0., 1.],
           [1., 0., 1.]])
    """
    check_is_plan(plan)
    leaves = _tree.flatten(tree)
    for path, shape in plan.shapes.items():
        if (seen := getattr(leaves.get(path), "shape", None)) != shape:
            raise PlanError(
                "the tree is not what the plan leaves",
                path=path,
                seen="no such tensor" if seen is None else seen,
                expected=shape,
                mend="give what apply(plan, ...) returned",
            )
    check_companions(plan, leaves)
    new: dict[str, Any] = {}
    for cut in plan.cuts:
        for tensor in cut.site.cut if cut.removed else ():
            new[tensor.path] = _put(new.get(tensor.path, leaves[tensor.path]), tensor, cut)
    full = _tree.replace(tree, new)
    return mended(full, plan, expanded=True)


def _put(array: Any, tensor: Tensor, cut: Cut) -> Any:
    check_concrete(array, tensor)
    axis = cut.site.axis(tensor)
    whole = tensor.axes.sizes(tensor.shape)[axis]
    return tensor.axes.put(array, axis, cut.indices(tensor), whole, cut.site.second.axes.stack)
