"""A plan applied to a tree, and to a config."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from flaxslim import _bits, _config, _tree
from flaxslim._activation import ACTIVATIONS
from flaxslim._axes import namespace
from flaxslim._dead import evidence, first_is_constant
from flaxslim._errors import PlanError, nearest
from flaxslim._plan import Cut, Plan
from flaxslim._spec import Tensor


def apply(plan: Plan, tree: Any, *, fold: bool = True) -> Any:
    """The tree with only the channels left that the plan keeps, in a container of the same kind.

    `tree` is any tree with the tensors of the plan at their paths and shapes: the parameters, an
    average of them, their gradients or moments. Leaves that the plan does not touch pass through
    by identity; the others keep their kind (numpy or jax), dtype, device and, where the new size
    divides, sharding.

    The channels that go but put out a constant are folded into the second biases, with the
    constants that follow from the first biases of this tree. Give `fold=False` for a tree that
    holds no parameters: a gradient takes no constants.

    Raises `PlanError` if a tensor is absent or has another shape, or if a channel that should be
    constant is not so in this tree; `NonFiniteError` if a tensor that is cut holds NaN or
    infinity, which must not vanish with a column; `TracedError` under `jax.jit`.

    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    >>> from flaxslim import Pair, Spec, plan
    >>> p = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> apply(p, tree)["up"]["kernel"].shape
    (2, 2)
    """
    leaves = _tree.flatten(tree)
    check_fits(plan, leaves)
    # All folds come before all cuts: a second layer may be the first of another pair.
    new: dict[str, Any] = {}
    for cut in plan.cuts:
        if fold and cut.folds and (bias := cut.site.second_bias):
            old = new.get(bias.path, leaves[bias.path])  # two pairs may share a second bias
            new[bias.path] = _folded(cut, leaves, old)
    for cut in plan.cuts:
        keep = np.asarray(cut.keep, int)
        for tensor in cut.site.cut:
            leaf = new.get(tensor.path, leaves[tensor.path])
            # Right before the cut, so that the second read is from the cache.
            _bits.check_finite(leaf, tensor)
            if cut.removed:
                new[tensor.path] = tensor.axes.take(leaf, cut.site.pair.axis, keep)
    slimmed = _tree.replace(tree, new)
    if isinstance(slimmed, nnx.Module):
        _mend_features(slimmed, new)
    return slimmed


def resized(plan: Plan, cfg: Any) -> Any:
    """The config with the widths of the plan; the same object if none changes.

    Raises `PlanError` if the config does not say the widths that the plan was made for.
    """
    for cut in plan.cuts:
        width = cut.site.pair.width_expression
        if width is not None and (said := width.read(cfg)) != cut.site.size:
            raise PlanError(
                "the plan is for a config with another width",
                path=str(width),
                seen=said,
                expected=cut.site.size,
                mend="pass the config that belongs to these parameters, or make a new plan",
            )
    values = {key: value for resize in plan.resizes for key, value in resize.values.items()}
    return _config.replace(cfg, values) if values else cfg


def check_fits(plan: Plan, leaves: dict[str, Any]) -> None:
    """Raise `PlanError` unless the plan's tensors are there, in the shapes that it knows."""
    for cut in plan.cuts:
        for tensor in cut.site.tensors:
            _check(tensor, leaves)
        _check_biases(cut, leaves)


def _check(tensor: Tensor, leaves: dict[str, Any]) -> None:
    if tensor.path not in leaves:
        raise PlanError(
            "the plan is for a tree with another structure: a tensor is absent",
            path=tensor.path,
            expected=f'{tensor.shape} by pattern "{tensor.axes}"',
            near=nearest(tensor.path, leaves),
            mend="apply a plan to a tree with the structure of the one it was made for",
        )
    shape = tuple(leaves[tensor.path].shape)
    if shape != tensor.shape:
        raise PlanError(
            "the plan is for a tree with other sizes (was it applied before?)",
            path=tensor.path,
            seen=shape,
            expected=f'{tensor.shape} by pattern "{tensor.axes}"',
            mend="make a new plan for this tree",
        )


def _check_biases(cut: Cut, leaves: dict[str, Any]) -> None:
    pair = cut.site.pair
    for tensor, known in zip(cut.site.first, cut.site.first_biases, strict=True):
        path = f"{tensor.path.removesuffix(f'/{pair.kernel}')}/{pair.bias}"
        if known is None and path in leaves:
            raise PlanError(
                "the tree has a bias that the plan does not know",
                path=path,
                mend="make a new plan for this tree",
            )


def _folded(cut: Cut, leaves: dict[str, Any], bias: Any) -> Any:
    """bias + sum over j of constant_j * row_j, in float64, stored as the bias was."""
    tensor, axis = cut.site.second, cut.site.pair.axis
    channels = np.asarray([channel for channel, _ in cut.folds])
    act = ACTIVATIONS.get(cut.activation or "")
    constants = first_is_constant(evidence(cut.site, leaves, act))[channels]
    if np.isnan(constants).any():
        raise PlanError(
            "a channel whose constant is to be folded is not constant in this tree",
            path=cut.site.first[0].path,
            seen=f"channel {channels[np.isnan(constants)][0]} reads its input",
            mend="make a new plan for these parameters; for gradients and moments pass fold=False",
        )
    rows = tensor.axes.take(leaves[tensor.path], axis, channels)
    rows = np.asarray(tensor.axes.split(rows)).astype(np.float64)
    added = np.tensordot(constants, rows, axes=(0, tensor.axes.position(axis)))
    total = np.asarray(bias).astype(np.float64) + added.reshape(bias.shape)
    folded = total.astype(bias.dtype)
    return folded if namespace(bias) is np else jax.device_put(folded, bias.sharding)


def _mend_features(module: nnx.Module, new: dict[str, Any]) -> None:
    """Let `nnx.Linear`s that were cut say their new sizes; nnx itself never checks them."""
    layers = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Linear)
    }
    for path in new:
        layer = layers.get(path.rpartition("/")[0])
        if layer is not None and path.endswith("/kernel"):
            # The last two: a layer made by nnx.vmap has more axes in front.
            layer.in_features, layer.out_features = new[path].shape[-2:]
