"""A plan applied to whatever was made for the parameters: optimizer states, averages, adapters.

Such a tree holds copies of the parameters at places of its own ("0/mu", "opt_state/inner_state",
"params"). A copy is the highest place below which every leaf has the path of a parameter, or
belongs to one: a low-rank matrix, a scale. A leaf of any other path, as another network beside it
would have, is never taken for a parameter, however much its own path ends like one.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from flax import nnx
from jax.tree_util import GetAttrKey, SequenceKey, tree_flatten_with_path

from flaxslim import _bits, _lora, _scales, _tree
from flaxslim._activation import ACTIVATIONS
from flaxslim._apply import check_fits, folded_biases
from flaxslim._dead import mark
from flaxslim._errors import PlanError
from flaxslim._nnx import mended
from flaxslim._plan import Cut, Plan
from flaxslim._spec import Tensor

# The tensors of each path that are cut: one for each axis along which it is.
_Cuts = Mapping[str, Sequence[tuple[Cut, Tensor]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """What a leaf stands for: a parameter, or the matrix or scale of one.

    Attributes:
      parameter: the path of the parameter in the plan.
      matrix: the low-rank matrix that it is.
      scale: whether it is a scale, a zero point or the like.
    """

    parameter: str
    matrix: _lora.Matrix | None = None
    scale: bool = False

    @property
    def is_parameter(self) -> bool:
        return self.matrix is None and not self.scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Copy:
    """A copy of the parameters, or of some of them.

    Attributes:
      path: where it is in the tree.
      places: what its leaves stand for, by their paths in the tree.
      computes: it holds parameters of its own (an average), not moments or gradients.
    """

    path: str
    places: Mapping[str, _Place]
    computes: bool

    @property
    def parameters(self) -> dict[str, str]:
        """The paths in the tree of its parameters, by their paths in the plan."""
        return {p.parameter: path for path, p in self.places.items() if p.is_parameter}


def apply_like(plan: Plan, tree: Any, like: Any, *, fold: bool) -> Any:
    """`apply(plan, tree, like=params)`; see there."""
    params = _tree.flatten(like)
    check_fits(plan, params)
    cuts: dict[str, list[tuple[Cut, Tensor]]] = {}
    for cut in plan.cuts:
        for tensor in cut.site.cut:
            cuts.setdefault(tensor.path, []).append((cut, tensor))
    leaves = _tree.flatten(tree)
    names = _Names(params)
    copies = _copies(tree, leaves, names)
    _refuse_strangers(leaves, copies, cuts, names)
    new: dict[str, Any] = {}
    for copy in copies:
        _check_shapes(copy, leaves, params, cuts)
        cut_along = {
            path: _cut_along(path, place, leaves[path], cuts) for path, place in copy.places.items()
        }
        if copy.computes and fold:
            _check_adapter(plan, copy, params, leaves, cut_along)
            new |= _folded(plan, copy, leaves)
        for path, along in cut_along.items():
            for cut, tensor in along:
                new[path] = _taken(new.get(path, leaves[path]), cut, tensor)
    return _mended(_tree.replace(tree, new), copies, plan)


def _taken(array: Any, cut: Cut, tensor: Tensor) -> Any:
    _bits.check_finite(array, tensor)
    return tensor.axes.take(
        array, cut.site.axis(tensor), cut.indices(tensor), cut.site.second.axes.stack
    )


def _folded(plan: Plan, copy: _Copy, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The biases of a copy that take up constants, by path; a mask takes up none."""
    paths = copy.parameters
    own = {name: leaves[path] for name, path in paths.items() if np.shape(leaves[path])}
    cuts: list[Cut] = []
    for cut in plan.cuts:
        bias = cut.site.second_bias
        if bias is None or not cut.folded.any() or bias.path not in own:
            continue
        if own[bias.path].dtype == bool:
            continue
        if lacking := [t.path for t in cut.site.tensors if t.path not in own]:
            raise PlanError(
                "constants are to be folded into a bias without the tensors that they follow from",
                path=paths[bias.path],
                expected=", ".join(lacking),
                mend="pass the whole copy, or fold=False if it does not hold parameters",
            )
        cuts.append(cut)
    folded = folded_biases(dataclasses.replace(plan, cuts=tuple(cuts)), own)
    return {paths[name]: bias for name, bias in folded.items()}


def _mended(tree: Any, copies: Sequence[_Copy], plan: Plan) -> Any:
    """The tree, where the nnx modules that are copies say their new sizes."""
    places = {copy.path for copy in copies}
    graphs = (nnx.Module, nnx.Optimizer)
    pairs, _ = tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, graphs))
    for keys, graph in pairs:
        for names, node in nnx.iter_graph(graph) if isinstance(graph, graphs) else ():
            at = "/".join(filter(None, (_tree.name_of(keys), *map(str, names))))
            if isinstance(node, nnx.Module) and at in places:
                mended(node, plan)
    return tree


# --- which parameter a leaf stands for --------------------------------------------------------


class _Names:
    """The paths of the parameters: whole, and without the collection ("params") in front."""

    def __init__(self, params: Mapping[str, Any]):
        self.parameters = {path: path for path in params}
        if any(path.startswith("params/") for path in params):
            for path in sorted(params, key=lambda path: not path.startswith("params/")):
                self.parameters.setdefault(path.partition("/")[2], path)
        self._kernels = _lora.kernels({name: params[p] for name, p in self.parameters.items()})

    def place(self, name: str) -> _Place | None:
        """What a leaf stands for, by its path in a copy."""
        if (parameter := self.parameters.get(name)) is not None:
            return _Place(parameter=parameter)
        if (match := _scales.PART.fullmatch(name)) and match["kernel"] in self.parameters:
            kernel = self.parameters[match["kernel"]]
            return _Place(parameter=kernel, scale=match["part"] != "qvalue")
        if (m := _lora.matrix(name)) is not None:
            kernel = _lora.owner(m.kernel, self._kernels.get(m.folder, ()))
            return _Place(parameter=self.parameters[kernel], matrix=m) if kernel else None
        folder, _, last = name.rpartition("/")
        if match := _scales.COMPANION.fullmatch(last):
            kernel = _lora.owner(match["kernel"] or "", self._kernels.get(folder, ()))
            return _Place(parameter=self.parameters[kernel], scale=True) if kernel else None
        return None


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """All ways to part a path in two, the first part growing.

    >>> list(_splits("0/mu"))
    [('', '0/mu'), ('0', 'mu')]
    """
    names = path.split("/")
    for i in range(len(names)):
        yield "/".join(names[:i]), "/".join(names[i:])


def _copies(tree: Any, leaves: Mapping[str, Any], names: _Names) -> list[_Copy]:
    """The copies of the parameters in a tree."""
    found: dict[str, dict[str, _Place]] = {}
    places = {path: [(at, names.place(rest)) for at, rest in _splits(path)] for path in leaves}
    # A number for the whole tensor, or a count, is at home anywhere.
    strange = {
        at
        for path, own in places.items()
        for at, place in own
        if place is None and np.shape(leaves[path])
    }
    for path, own in places.items():
        for at, place in own:
            if place is not None and at not in strange:
                found.setdefault(at, {})[path] = place
                break
    states = _states(tree)
    return [
        _Copy(path=at, places=own, computes=not _is_state(at, states)) for at, own in found.items()
    ]


# Names by which optimizers and their users call what is no parameter.
_STATE = re.compile(r"mu|nu|nu_max|trace|.*(opt_state|optim_state|grad|moment).*")


def _is_state(path: str, states: Sequence[str]) -> bool:
    return any(map(_STATE.fullmatch, path.split("/"))) or any(
        f"{path}/".startswith(f"{state}/") for state in states
    )


def _states(tree: Any) -> list[str]:
    """The places where named tuples hold what is no parameter: optimizers say their states so."""

    def is_named(x: Any) -> bool:
        return isinstance(x, tuple) and hasattr(x, "_fields")

    def visit(node: Any, at: tuple[Any, ...]) -> Iterator[str]:
        for keys, child in tree_flatten_with_path(node, is_leaf=is_named)[0]:
            for name in child._fields if is_named(child) else ():
                below = (*at, *keys, GetAttrKey(name))
                if _holds_parameters(child, name, keys):
                    yield from visit(getattr(child, name), below)
                else:
                    yield _tree.name_of(below)

    return list(visit(tree, ()))


def _holds_parameters(state: Any, field: str, keys: tuple[Any, ...]) -> bool:
    """Whether a field of a named tuple holds parameters, not what an optimizer made of them."""
    if isinstance(state, optax.EmaState):
        # In a chain, which is a tuple, it averages updates; elsewhere it was fed parameters.
        return not (keys and isinstance(keys[-1], SequenceKey))
    if isinstance(state, optax.contrib.ScheduleFreeState) and field == "z":
        return True
    return "param" in field or "param" in type(state).__name__.lower()


# --- what is refused --------------------------------------------------------------------------

_ANEW = "start the optimizer anew, tx.init(slimmed), or train with adamw, lion or sgd"


def _refuse_strangers(
    leaves: Mapping[str, Any], copies: Sequence[_Copy], cuts: _Cuts, names: _Names
) -> None:
    """Raise `PlanError` for leaves that may need the cut and stand for no parameter."""
    placed = {path for copy in copies for path in copy.places}
    others = {path: leaves[path] for path in leaves if path not in placed}
    shapes = {t.shape for own in cuts.values() for cut, t in own if cut.removed}
    refused = [
        path
        for path, x in others.items()
        if np.shape(x) and (_is_alike(x, shapes) or _is_below(path, cuts, names))
    ]
    if refused:
        raise PlanError(
            f"{len(refused)} leaves may follow a parameter that is cut, and it is not known how",
            path=refused[0],
            seen=", ".join(f"{path} {np.shape(leaves[path])}" for path in refused),
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


def _is_alike(x: Any, shapes: set[tuple[int, ...]]) -> bool:
    # Raw keys of random numbers are arrays of this type.
    return np.shape(x) in shapes and getattr(x, "dtype", None) != np.uint32


def _is_below(path: str, cuts: _Cuts, names: _Names) -> bool:
    """Whether a path goes on where that of a parameter which is cut ends."""
    return any(
        names.parameters.get(name) in cuts for _, rest in _splits(path) for name, _ in _splits(rest)
    )


def _why_not(path: str, leaves: Mapping[str, Any], names: _Names) -> str:
    """The first leaf for which the place of another is no copy, as a clause."""
    for at, rest in _splits(path):
        if names.place(rest) is not None:
            prefix = f"{at}/" if at else ""
            for other in leaves:
                if other.startswith(prefix) and names.place(other[len(prefix) :]) is None:
                    return f"; {at or 'the tree'} also has {other[len(prefix) :]}"
    return ""


def _check_shapes(
    copy: _Copy, leaves: Mapping[str, Any], params: Mapping[str, Any], cuts: _Cuts
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
                f"changes, or keeps a history: {_ANEW}, whose states can be cut",
            )


def _check_adapter(
    plan: Plan,
    copy: _Copy,
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
        act, foldable = ACTIVATIONS.get(cut.activation or ""), bool(cut.folded.any())
        site = dataclasses.replace(cut.site, lora=(*cut.site.lora, *lora))
        alone = mark(cut.site, params, act, plan.threshold, foldable=foldable)
        adapted = {path: leaves[path] for path, p in copy.places.items() if p.matrix is not None}
        with_it = mark(site, {**params, **adapted}, act, plan.threshold, foldable=foldable)
        alive = alone.dead & ~with_it.dead
        alive[np.arange(len(alive))[:, None], cut.kept] = False
        if alive.any():
            raise PlanError(
                f"low-rank matrices make {int(alive.sum())} channels alive that the plan cuts",
                path=lora[0][1].path,
                seen=f"channel {int(np.argwhere(alive)[0][-1])} of {cut.site.second.path}, by "
                + ", ".join(tensor.path for _, tensor in lora),
                mend="zero what they add to these channels (columns of B at the first layer, rows "
                "of A at the second), or make the plan for the tree with the adapter in it",
            )


# --- along which axes a leaf is cut -----------------------------------------------------------


def _cut_along(path: str, place: _Place, array: Any, cuts: _Cuts) -> list[tuple[Cut, Tensor]]:
    """The cuts that a leaf needs, with its own tensor."""
    shape = np.shape(array)
    found: list[tuple[Cut, Tensor]] = []
    for cut, tensor in cuts.get(place.parameter, ()) if shape else ():
        if not cut.removed:
            continue
        if place.is_parameter:
            found.append((cut, dataclasses.replace(tensor, path=path)))
        elif place.matrix is not None:
            if place.matrix.side == ("a" if tensor is cut.site.second else "b"):
                matrix = _lora.tensor_of(place.matrix, shape, tensor, cut.site.pair)
                found.append((cut, dataclasses.replace(matrix, path=path)))
        elif (own := _scales.tensor_of(path, shape, tensor, cut)) is not None:
            found.append((cut, own))
    return found
