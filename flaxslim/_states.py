"""A plan applied to whatever was made for the parameters: optimizer states, averages, adapters.

Such a tree holds copies of the parameters at places of its own ("0/mu", "opt_state/inner_state",
"params"). A copy is the highest place below which every leaf has the path of a parameter, or
belongs to one: a low-rank matrix, a scale. A leaf of any other path is never taken for a parameter,
however much its own path ends like one. But a second network with the same paths and shapes cannot
be told from a copy, and is cut as one.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _bits, _lora, _mesh, _processes, _scales, _tree
from flaxslim._activation import named
from flaxslim._apply import check_fits, folded_biases, taken
from flaxslim._axes import namespace
from flaxslim._copies import Copy, Names, Place, copies, splits
from flaxslim._dead import evidence, first_is_constant, mark
from flaxslim._folds import added_by_constants
from flaxslim._nnx import mended
from flaxslim._plan import Cut, Plan
from flaxslim._spec import Tensor
from flaxslim._state_kinds import Kind
from flaxslim.errors import PlanError

# The tensors of each path that are cut: one for each axis along which it is.
_Cuts = Mapping[str, Sequence[tuple[Cut, Tensor]]]


def apply_like(plan: Plan, tree: Any, like: Any, *, fold: bool) -> Any:
    """`apply(plan, tree, like=params)`: each copy of the parameters in a tree is cut as they are.

    What goes by the norm of a whole tensor or by its shape (lamb, muon) is cut rightly, but trains
    on a little differently: a smaller tensor has another norm, with constants folded or without.
    """
    params = _tree.flatten(like)
    _check_like(plan, params)
    cuts: dict[str, list[tuple[Cut, Tensor]]] = {}
    for cut in plan.cuts:
        for tensor in cut.site.cut:
            cuts.setdefault(tensor.path, []).append((cut, tensor))
    leaves = _tree.flatten(tree)
    _processes.agree_on(plan, leaves.values())
    names = Names(params)
    found = copies(tree, leaves, names, fold=fold)
    _refuse_strangers(leaves, found, cuts, names)
    new: dict[str, Any] = {}
    for copy in found:
        _check_shapes(copy, leaves, params, cuts)
        cut_along = {
            path: _cut_along(path, place, leaves[path], cuts) for path, place in copy.places.items()
        }
        if copy.kind is not Kind.STATE:
            _check_adapter(plan, copy, params, leaves, cut_along)
            new |= _folded(plan, copy, leaves) if fold else {}
        for path, along in cut_along.items():
            for cut, tensor in along:
                new[path] = taken(new.get(path, leaves[path]), cut, tensor)
        new |= _channels(plan, copy, leaves)
        if copy.kind is not Kind.STATE:
            _warn_of_living(plan, copy, leaves, fold=fold)
    return mended(_tree.replace(tree, new), plan, places={copy.path for copy in found})


def _channels(plan: Plan, copy: Copy, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What `flaxslim.pruning` knows of the channels that stay, and how many are gone, by path."""
    cuts = {cut.site.second.path: cut for cut in plan.cuts if cut.removed}
    new: dict[str, Any] = {}
    for path, place in copy.places.items():
        if not place.channels or (cut := cuts.get(place.parameter)) is None:
            continue
        x = leaves[path]
        if place.channels == "gone":
            new[path] = x + (cut.site.size - cut.width)
        elif np.shape(x) != (cut.site.rows, cut.site.size):
            raise PlanError(
                "what is known of the channels of a site does not fit their number",
                path=path,
                seen=np.shape(x),
                expected=(cut.site.rows, cut.site.size),
                mend="give as like= the parameters that this state was made for",
            )
        elif _mesh.on_mesh(x):
            new[path] = _mesh.put(np.take_along_axis(_mesh.host(x), cut.kept, axis=-1), like=x)
        else:
            new[path] = namespace(x).take_along_axis(x, cut.kept, axis=-1)
    return new


def _folded(plan: Plan, copy: Copy, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The biases of a copy that take up constants, by path; a mask takes up none."""
    own = copy.arrays(leaves)
    cuts: list[Cut] = []
    for cut in plan.cuts:
        bias = cut.site.second_bias
        if bias is None or not cut.folded.any() or bias.path not in own:
            continue
        if leaves[own[bias.path]].dtype == bool:
            continue
        if lacking := [t.path for t in cut.site.tensors if t.path not in own]:
            raise PlanError(
                "constants are to be folded into a bias without the tensors that they follow from",
                path=own[bias.path],
                expected=", ".join(lacking),
                mend="pass the whole copy, or fold=False if it does not hold parameters",
            )
        cuts.append(_moved(cut, own))
    if copy.kind is Kind.UNKNOWN:
        for cut in cuts:
            _refuse_unknown(copy, cut, leaves)
        return {}
    return folded_biases(dataclasses.replace(plan, cuts=tuple(cuts)), leaves)


def _moved(cut: Cut, paths: Mapping[str, str]) -> Cut:
    """A cut of a copy: its tensors have the paths of the copy."""

    def moved(tensor: Any) -> Any:
        return tensor and dataclasses.replace(tensor, path=paths[tensor.path])

    site = dataclasses.replace(
        cut.site,
        first=tuple(map(moved, cut.site.first)),
        first_biases=tuple(map(moved, cut.site.first_biases)),
        second=moved(cut.site.second),
        second_bias=moved(cut.site.second_bias),
        readers=tuple(map(moved, cut.site.readers)),
        also=tuple(map(moved, cut.site.also)),
        lora=tuple((paths[kernel], moved(matrix)) for kernel, matrix in cut.site.lora),
    )
    return dataclasses.replace(cut, site=site)


# --- what is refused --------------------------------------------------------------------------

_ANEW = "start the optimizer anew, tx.init(slimmed), or train with adamw, lion or sgd"


def _check_like(plan: Plan, params: Mapping[str, Any]) -> None:
    try:
        check_fits(plan, params)
    except PlanError as e:
        raise PlanError(
            f"like=: {e.problem}",
            path=e.path,
            seen=e.seen,
            expected=e.expected,
            near=e.near,
            mend="give as like= the parameters before the cut, in the very tree that the plan was "
            "made for",
        ) from e


def _refuse_strangers(
    leaves: Mapping[str, Any], found: Sequence[Copy], cuts: _Cuts, names: Names
) -> None:
    """Raise `PlanError` for leaves that may need the cut and stand for no parameter."""
    placed = {path for copy in found for path in copy.places}
    others = {path: leaves[path] for path in leaves if path not in placed}
    shapes = _shapes(cuts)
    refused = [
        path
        for path, x in others.items()
        if np.shape(x)
        and (
            _is_alike(x, shapes)
            or (shapes and np.shape(x) == (names.total,))
            or _is_below(path, cuts, names)
        )
    ]
    if refused:
        raise PlanError(
            f"{len(refused)} {'leaf' if len(refused) == 1 else 'leaves'} may follow a parameter "
            "that is cut, and it is not known how",
            path=refused[0],
            seen=f"\n{' ' * 12}".join(f"{path} {np.shape(leaves[path])}" for path in refused),
            expected="copies of the parameters, with leaves at none but their paths"
            + _why_not(refused[0], leaves, names),
            mend="give in like= the tree that these leaves are a copy of, or apply the plan to "
            "the other parts of this tree alone; where an optimizer keeps several arrays for a "
            f"parameter (sm3, shampoo), {_ANEW}",
        )
    if not placed and any(np.shape(x) for x in leaves.values()):
        raise PlanError(
            "nothing in this tree follows the parameters",
            seen=f"{len(leaves)} leaves: {', '.join(list(leaves)[:4])}",
            expected="paths that end in those of the parameters: " + ", ".join(list(cuts)[:3]),
            mend="give the parameters before the cut as like=, and a tree made for them",
        )


def _shapes(cuts: _Cuts) -> set[tuple[int, ...]]:
    """The shapes of what is cut, of tensors or a number for each channel or group; all sorted."""
    found: set[tuple[int, ...]] = set()
    for cut, tensor in (pair for own in cuts.values() for pair in own if pair[0].removed):
        site = cut.site
        found |= {tensor.shape, (site.size,), (*site.stack, site.size)}
        if len(cut.groups) < len(site.groups):
            found.add((len(site.groups),))
    return {tuple(sorted(shape)) for shape in found}


def _is_alike(x: Any, shapes: set[tuple[int, ...]]) -> bool:
    """Whether an array has the shape of what is cut, transposed perhaps, or is a stack of it."""
    shape: tuple[int, ...] = np.shape(x)
    if getattr(x, "dtype", None) == np.uint32 and len(shape) < 3 and shape[-1:] in ((2,), (4,)):
        return False  # raw keys of random numbers
    stacked = len(shape) > 2 and tuple(sorted(shape[1:])) in shapes
    return stacked or tuple(sorted(shape)) in shapes


def _is_below(path: str, cuts: _Cuts, names: Names) -> bool:
    """Whether a path goes on where that of a parameter which is cut ends."""
    return any(
        names.parameters.get(name) in cuts for _, rest in splits(path) for name, _ in splits(rest)
    )


def _why_not(path: str, leaves: Mapping[str, Any], names: Names) -> str:
    """The first leaf for which the place of another is no copy, as a clause."""
    for at, rest in splits(path):
        if names.place(rest) is not None:
            prefix = f"{at}/" if at else ""
            for other in leaves:
                if other.startswith(prefix) and names.place(other[len(prefix) :]) is None:
                    return f"; {at or 'the tree'} also has {other[len(prefix) :]}"
    return ""


def _check_shapes(
    copy: Copy, leaves: Mapping[str, Any], params: Mapping[str, Any], cuts: _Cuts
) -> None:
    """Raise `PlanError` unless the parameters in a copy have their shapes, or are one number."""
    if cuts.keys().isdisjoint(copy.parameters):
        return
    for name, path in copy.parameters.items():
        shape, expected = np.shape(leaves[path]), np.shape(params[name])
        if shape not in ((), expected):
            raise PlanError(
                "a leaf follows a parameter, but not its shape",
                path=path,
                seen=shape,
                expected=expected,
                mend="likely (a) it was cut already: a plan cannot be applied twice; (b) it was "
                "made for another model: give that one's parameters as like=; (c) its optimizer "
                "goes by means over rows, columns or whole tensors (adafactor), which a cut "
                f"changes, or keeps a history: {_ANEW}, whose states can be cut; (d) it is "
                "replicated, one for each device: flax.jax_utils.unreplicate it first",
            )


def _check_adapter(
    plan: Plan,
    copy: Copy,
    params: Mapping[str, Any],
    leaves: Mapping[str, Any],
    cut_along: Mapping[str, Sequence[tuple[Cut, Tensor]]],
) -> None:
    """Raise `PlanError` if a channel that goes is alive by what a low-rank matrix adds to it."""
    for cut in plan.cuts:
        lora = tuple(
            (copy.places[path].parameter, tensor)
            for path, along in cut_along.items()
            if copy.places[path].matrix is not None
            for other, tensor in along
            if other is cut
        )
        if not lora or not cut.removed:
            continue
        act, foldable = named(cut.activation), bool(cut.folded.any())
        site = dataclasses.replace(cut.site, lora=(*cut.site.lora, *lora))
        alone = mark(cut.site, params, act, plan.threshold, foldable=foldable)
        adapted = {path: leaves[path] for path, p in copy.places.items() if p.matrix is not None}
        with_it = mark(site, {**params, **adapted}, act, plan.threshold, foldable=foldable)
        alive = alone.dead & ~with_it.dead & _gone(cut)
        if alive.any():
            raise PlanError(
                f"low-rank matrices make {int(alive.sum())} channels alive that the plan cuts",
                path=lora[0][1].path,
                seen=f"channel {int(np.argwhere(alive)[0][-1])} of {cut.site.second.path}, by "
                + ", ".join(tensor.path for _, tensor in lora),
                mend="zero what they add to these channels (columns of B at the first layer, rows "
                "of A at the second), or make the plan for the tree with the adapter in it",
            )


def _gone(cut: Cut) -> np.ndarray:
    """The channels that go, `(s, f)`."""
    gone = np.ones((cut.site.rows, cut.site.size), bool)
    np.put_along_axis(gone, cut.kept, False, axis=1)
    return gone


def _refuse_unknown(copy: Copy, cut: Cut, leaves: Mapping[str, Any]) -> None:
    """Raise `PlanError` if it matters whether a copy holds parameters: for a constant in it."""
    site, bias = cut.site, cut.site.second_bias
    assert bias is not None
    seen = evidence(site, leaves, named(cut.activation))
    constant = cut.folded & first_is_constant(seen)
    if not constant.any():
        return
    second = leaves[site.second.path]
    if added_by_constants(seen, site, second, leaves[bias.path], constant).any():
        raise PlanError(
            "a constant belongs into a bias if this copy holds parameters, and its place does not "
            "tell whether it does",
            path=copy.path,
            seen=f"{int(constant.sum())} constant channels for {bias.path}",
            mend="apply the plan to this copy alone: apply(plan, copy, like=params) if it holds "
            "parameters, with fold=False if gradients or moments; or name its place so: "
            '"ema_params", "opt_state"',
        )


def _warn_of_living(plan: Plan, copy: Copy, leaves: Mapping[str, Any], *, fold: bool) -> None:
    """Warn if a copy that computes loses channels that are alive in it."""
    own = copy.arrays(leaves)
    living = 0
    for cut in plan.cuts:
        paths = [own.get(tensor.path) for tensor in cut.site.tensors]
        if not cut.removed or not all(p and leaves[p].dtype in _bits.FLOATS for p in paths):
            continue
        act, folded = named(cut.activation), cut.folded
        foldable = fold and bool(folded.any())
        marks = mark(_moved(cut, own).site, leaves, act, plan.threshold, foldable=foldable)
        living += int(((~marks.dead | (marks.folded & ~folded)) & _gone(cut)).sum())
    if living:
        because = "" if fold else " (fold=False: it takes no constants)"
        if copy.kind is Kind.UNKNOWN:
            because = (
                '; if it holds gradients or moments, name its place so ("opt_state"), or apply the '
                "plan to it alone, with fold=False"
            )
        warnings.warn(
            f"{living} channels that the plan cuts are alive in {copy.path or 'this tree'}: what "
            "it computes changes; make a plan for it, or start it anew from the slimmed parameters"
            + because,
            stacklevel=4,
        )


# --- along which axes a leaf is cut -----------------------------------------------------------


def _cut_along(path: str, place: Place, array: Any, cuts: _Cuts) -> list[tuple[Cut, Tensor]]:
    """The cuts that a leaf needs, with its own tensor."""
    shape = np.shape(array)
    found: list[tuple[Cut, Tensor]] = []
    for cut, tensor in cuts.get(place.parameter, ()) if shape else ():
        if not cut.removed:
            continue
        if place.channels:
            continue
        if place.is_parameter:
            found.append((cut, dataclasses.replace(tensor, path=path)))
        elif place.matrix is not None:
            if place.matrix.has_axis(reads=cut.site.reads(tensor)):
                matrix = _lora.tensor_of(place.matrix, shape, tensor, cut.site.pair)
                found.append((cut, dataclasses.replace(matrix, path=path)))
        elif (own := _scales.tensor_of(path, shape, tensor, cut)) is not None:
            found.append((cut, own))
    return found
