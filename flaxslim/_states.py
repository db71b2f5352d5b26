"""A plan applied to whatever was made for the parameters: optimizer states, averages, adapters.

Such a tree holds copies of the parameters' structure at places of its own ("0/mu/...",
"opt_state/inner_state/...", "params/..."). A leaf belongs to a copy if the end of its path is the
path of a parameter, the longest that fits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxslim import _bits, _tree
from flaxslim._apply import check_fits, folded_biases
from flaxslim._axes import Axes
from flaxslim._draw import COMPANION
from flaxslim._errors import PlanError
from flaxslim._lora import axes_of, side
from flaxslim._plan import Cut, Plan
from flaxslim._spec import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A leaf of the state: in which copy it is, and which parameter it stands for."""

    path: str
    copy: str
    parameter: str
    array: Any


def apply_like(plan: Plan, tree: Any, like: Any, *, fold: bool) -> Any:
    """`apply(plan, tree, like=params)`; see there."""
    params = _tree.flatten(like)
    check_fits(plan, params)
    cuts = {t.path: (cut, t) for cut in plan.cuts for t in cut.site.cut}
    leaves = _tree.flatten(tree)
    new: dict[str, Any] = {}
    refused: list[str] = []
    copies: dict[str, dict[str, Any]] = {}
    recognised = 0
    for path, array in leaves.items():
        leaf = _placed(path, array, params)
        if leaf is not None:
            copies.setdefault(leaf.copy, {})[leaf.parameter] = array
            recognised += leaf.parameter in cuts
            if leaf.parameter in cuts and np.ndim(array):
                new |= _cut(leaf, *cuts[leaf.parameter])
        elif (beside := _beside(path, array, plan)) is not None:
            new |= beside
            recognised += 1
        elif _looks_like(array, cuts):
            refused.append(path)
    if refused:
        raise PlanError(
            f"{len(refused)} leaves have the shape of a parameter that is cut, and none's path",
            path=refused[0],
            seen=", ".join(f"{p} {tuple(leaves[p].shape)}" for p in refused[:8]),
            expected="paths that end in those of the parameters: " + ", ".join(list(cuts)[:3]),
            mend="apply the plan to the parts of this tree that follow the parameters, and make "
            "the others anew",
        )
    if not recognised:
        raise PlanError(
            "nothing in this tree follows the parameters that are cut",
            seen=f"{len(leaves)} leaves: {', '.join(list(leaves)[:4])}",
            expected="paths that end in those of the parameters: " + ", ".join(list(cuts)[:3]),
            mend="give the parameters before the cut as like=, and a state made for them",
        )
    if fold:
        states = _optimizer_states(tree)
        for copy, own in copies.items():
            if not any(f"{copy}/".startswith(f"{state}/") for state in states):
                folded = folded_biases(plan, own)
                new |= {f"{copy}/{p}" if copy else p: bias for p, bias in folded.items()}
    return _tree.replace(tree, new)


# --- which parameter a leaf stands for --------------------------------------------------------


def _placed(path: str, array: Any, params: Mapping[str, Any]) -> _Leaf | None:
    names = path.split("/")
    for i in range(len(names)):
        end = "/".join(names[i:])
        for name in (end, f"params/{end}"):
            if name in params:
                copy = "/".join(names[:i])
                return _Leaf(path=path, copy=copy, parameter=name, array=array)
    return None


def _optimizer_states(tree: Any) -> list[str]:
    """The paths of optimizer states in a tree: named tuples, and whatever is called `opt_state`."""

    def is_state(x: Any) -> bool:
        return isinstance(x, tuple) and hasattr(x, "_fields")

    found = set()
    for path in _tree.flatten(tree):
        names = path.split("/")
        if "opt_state" in names:
            found.add("/".join(names[: names.index("opt_state") + 1]))
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_state)
    found |= {_tree.name_of(keys) for keys, node in pairs if is_state(node)}
    return sorted(found)


def _cut(leaf: _Leaf, cut: Cut, tensor: Tensor) -> dict[str, Any]:
    shape = tuple(leaf.array.shape)
    if shape == tensor.shape:
        if not cut.removed:
            return {}
        _bits.check_finite(leaf.array, tensor)
        taken = tensor.axes.take(
            leaf.array, cut.site.axis(tensor), cut.indices(tensor), cut.site.second.axes.stack
        )
        return {leaf.path: taken}
    size = tensor.axes.sizes(tensor.shape)[cut.site.axis(tensor)]
    if size not in shape and int(np.prod(shape)) <= 1:
        return {}  # one number for the whole tensor
    raise PlanError(
        "a leaf follows a parameter that is cut, but not its shape",
        path=leaf.path,
        seen=shape,
        expected=tensor.shape,
        mend="(a) a plan cannot be applied twice; (b) factored moments (adafactor, sm3, shampoo) "
        "mix the channels of a row: start the optimizer anew, tx.init(slimmed), or train with "
        "adamw, lion or sgd, whose states can be cut",
    )


def _looks_like(array: Any, cuts: Mapping[str, tuple[Cut, Tensor]]) -> bool:
    shape = tuple(getattr(array, "shape", ()))
    return bool(shape) and any(
        shape == tensor.shape for cut, tensor in cuts.values() if cut.removed
    )


# --- what stands beside a kernel --------------------------------------------------------------


def _beside(path: str, array: Any, plan: Plan) -> dict[str, Any] | None:
    """A low-rank matrix or a scale beside a kernel that is cut, cut; None for anything else."""
    shape = tuple(getattr(array, "shape", ()))
    for cut in plan.cuts:
        for kernel in cut.site.cut:
            folder = kernel.path.rpartition("/")[0]
            _, found, name = f"/{path}".rpartition(f"/{folder}/")
            if not folder or not found or len(kernel.shape) < 2:
                continue
            if side(name) is not None:
                axes = _axes_of_matrix(path, name, shape, cut, kernel)
            elif COMPANION.fullmatch(name):
                axes = _axes_of_scale(path, shape, cut, kernel)
            else:
                continue
            if axes is None or not cut.removed:
                return {}
            if side(name) is not None and kernel is cut.site.second:
                _check_dead_rows(path, array, axes, cut)
            return {path: axes.take(array, cut.site.axis(kernel), cut.indices(kernel))}
    return None


def _axes_of_matrix(
    path: str, name: str, shape: tuple[int, ...], cut: Cut, kernel: Tensor
) -> Axes | None:
    """The pattern of a low-rank matrix; None for the side that has no channels."""
    reads = kernel is cut.site.second
    if side(name) != ("a" if reads else "b"):
        return None
    axes = axes_of(kernel, cut.site.pair, shape, reads=reads)
    if axes is None:
        raise PlanError(
            "a low-rank matrix does not fit the kernel beside it",
            path=path,
            seen=shape,
            expected=f"the {'inputs' if reads else 'outputs'} of {kernel.path} {kernel.shape}, and "
            "a rank",
            mend="merge the adapter into the kernel first",
        )
    return axes


def _check_dead_rows(path: str, array: Any, axes: Axes, cut: Cut) -> None:
    """What a low-rank matrix adds to a row that goes must be nothing, too."""
    gone = np.setdiff1d(np.arange(cut.site.size), cut.kept[0])
    if np.any(np.asarray(axes.take(array, cut.site.pair.axis, gone)) != 0):
        raise PlanError(
            "a low-rank matrix adds to rows that the plan cuts, so these channels are alive",
            path=path,
            mend="merge the adapter into the kernel before the plan is made, or make the plan for "
            "a tree that holds the adapter too",
        )


def _axes_of_scale(path: str, shape: tuple[int, ...], cut: Cut, kernel: Tensor) -> Axes | None:
    """The pattern of a scale; None for one that does not run along the axis."""
    axis = cut.site.axis(kernel)
    number = kernel.axes.dimension(axis)
    size = kernel.shape[number]
    if len(shape) == len(kernel.shape):
        if shape[number] not in (1, size):
            raise PlanError(
                "a scale holds for blocks of channels, so that single ones cannot be cut",
                path=path,
                seen=f"{shape[number]} blocks for {size} channels",
                mend="dequantise first, or quantise again after the cut",
            )
        return kernel.axes.alone(axis) if shape[number] == size else None
    if shape == (size,) and kernel.shape.count(size) > 1:
        raise PlanError(
            "a scale could belong to the inputs or to the outputs of its kernel",
            path=path,
            seen=f"shape {shape} beside a kernel of {kernel.shape}",
            mend="give it as many dimensions as the kernel has: (1, outputs)",
        )
    return kernel.axes.only({axis}) if shape == (size,) else None
