"""A plan applied to a tree of parameters, and to a config."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flaxslim import _bits, _lora, _mesh, _processes, _record, _resize, _scales, _tree
from flaxslim._activation import named
from flaxslim._axes import namespace
from flaxslim._config import Width
from flaxslim._dead import evidence, first_is_constant
from flaxslim._folds import added_by_constants
from flaxslim._lazy import Lazy
from flaxslim._nnx import mended
from flaxslim._plan import Cut, Plan, check_is_plan
from flaxslim._spec import Tensor
from flaxslim.errors import NonFiniteError, PlanError, nearest


def apply(plan: Plan, tree: Any, *, fold: bool = True, like: Any = None) -> Any:
    """The tree with only the channels left that the plan keeps, in a container of the same kind.

    `tree` is any tree with the tensors of the plan at their paths and shapes: the parameters, an
    average of them, or, with `fold=False`, their gradients. It is cut by the plan whatever its
    values are: `slim(tree, plan=plan)` checks them, too. Leaves that the plan does not touch pass
    through by identity; the others keep their kind (numpy or jax), dtype, device, mesh and
    `PartitionSpec`. The attributes of an nnx module that hold sizes are mended.

    The channels that go but put out a constant are folded into the second biases, with the
    constants that follow from the first biases of this tree. Give `fold=False` for a tree that
    holds no parameters: a gradient takes no constants, and an adapter in it is not checked.

    With `like=params`, the parameters before the cut, `tree` is anything that was made for them:
    an optimizer state, a `TrainState`, an `nnx.Optimizer`, averages, gradients, low-rank adapters,
    quantised weights with their scales. Every copy of the parameters in it is found by its paths
    and cut. Constants are folded into those that hold parameters, by their places ("ema", a field
    of optax); where that cannot be told and matters, the copy is refused. A leaf that may have
    channels which are cut, and is no parameter, is refused; so is an adapter that adds something
    to a channel that goes. A warning says if an average loses channels that are alive in it.

    Raises `PlanError` if a tensor is absent or has another shape, or if a channel that should be
    constant is not so in this tree; `NonFiniteError` if a tensor that is cut holds NaN or infinity,
    which must not vanish with a column; `ShardingError` if a mesh does not divide what is left (a
    plan that is made for arrays on the mesh rounds up); `TracedError` under `jax.jit`.

    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    >>> from flaxslim import Pair, Spec, plan
    >>> p = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> apply(p, tree)["up"]["kernel"].shape
    (2, 2)
    >>> import jax, optax
    >>> state = optax.adam(1e-3).init(tree)
    >>> apply(p, state, like=tree)[0].mu["up"]["kernel"].shape
    (2, 2)
    """
    check_is_plan(plan)
    if like is not None:
        from flaxslim._states import apply_like

        return apply_like(plan, tree, like, fold=fold)
    leaves = _tree.flatten(tree)
    _processes.agree_on(plan, leaves.values())
    check_fits(plan, leaves)
    slimmed = _tree.replace(tree, cut_leaves(plan, leaves, fold=fold))
    return mended(slimmed, plan)


def cut_leaves(plan: Plan, leaves: Mapping[str, Any], *, fold: bool) -> dict[str, Any]:
    """The leaves that change, by path."""
    # All folds come before all cuts: a second layer may be the first of another pair.
    new = folded_biases(plan, leaves) if fold else {}
    for cut in plan.cuts:
        for tensor in cut.site.cut:
            leaf = taken(new.get(tensor.path, leaves[tensor.path]), cut, tensor)
            if cut.removed:
                new[tensor.path] = leaf
    return new


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CutLater(Lazy):
    """What a cut leaves of a lazy tensor.

    Its blocks raise `NonFiniteError` for NaN or infinity, also in a column that goes.
    """

    leaf: Lazy
    cut: Cut
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        width = self.cut.indices(self.tensor).shape[-1]
        return self.tensor.axes.resized(self.leaf.shape, self._axis, width)

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.leaf.dtype

    @property
    def _axis(self) -> str:
        return self.cut.site.axis(self.tensor)

    def blocks(self) -> Iterator[np.ndarray]:
        keep, axes = self.cut.indices(self.tensor), self.tensor.axes
        if len(keep) > 1:  # each index of a stack loses other channels
            yield taken(np.asarray(self.leaf), self.cut, self.tensor)
            return
        dimension, index = axes.flat(self.leaf.shape, self._axis, keep.reshape(-1))
        at, memory = 0, np.empty(0, self.dtype)
        for block in self.leaf.blocks():
            _bits.check_finite(block, self.tensor)
            own = index
            if dimension == 0:
                own = index[slice(*np.searchsorted(index, (at, at + len(block))))] - at
            shape = (*block.shape[:dimension], len(own), *block.shape[dimension + 1 :])
            if memory.size < block.size:
                memory = np.empty(block.size, self.dtype)
            out = memory[: math.prod(shape)].reshape(shape)
            # With the default mode numpy would write to a copy of `out`.
            yield np.take(block, own, axis=dimension, out=out, mode="clip")
            at += len(block)


def taken(leaf: Any, cut: Cut, tensor: Tensor) -> Any:
    """What a cut leaves of one tensor; of a lazy one, later."""
    if isinstance(leaf, Lazy):
        return CutLater(leaf=leaf, cut=cut, tensor=tensor)
    # Right before the cut, so that the second read is from the cache.
    _bits.check_finite(leaf, tensor)
    if not cut.removed:
        return leaf
    return tensor.axes.take(
        leaf, cut.site.axis(tensor), cut.indices(tensor), cut.site.second.axes.stack
    )


def folded_biases(plan: Plan, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The second biases that take up constants, by path."""
    new: dict[str, Any] = {}
    for cut in plan.cuts:
        if cut.folded.any() and (bias := cut.site.second_bias):
            old = new.get(bias.path, leaves[bias.path])  # two pairs may share a second bias
            new[bias.path] = _folded(cut, leaves, old)
    return new


def resized(plan: Plan, cfg: Any) -> Any:
    """The config with the widths of the plan; the same object if none changes.

    Raises `PlanError` if the config does not say the widths that the plan was made for, and
    `ConfigError` if it has no place for widths that differ among layers.
    """
    if cfg is None and not plan.values:
        return None
    for cut in plan.cuts if plan.values else ():
        site = cut.site
        said = _record.said(cfg, site.pair, site.name, site.layer)
        if said is not None and said != site.size:
            raise PlanError(
                "the plan is for a config with another width",
                path=f"{site.pair.width_expression} of {site.name}",
                seen=said,
                expected=site.size,
                mend="pass the config that belongs to these parameters, or make a new plan",
            )
    new = _resize.replaced(cfg, plan.values) if plan.values else cfg
    for cut in plan.cuts:
        if plan.values or cut.removed:
            _check_said(cut, new)
    return new


def _check_said(cut: Cut, cfg: Any) -> None:
    """Raise `PlanError` unless a config says the sizes that a cut leaves."""
    pair, site = cut.site.pair, cut.site
    said = _record.said(cfg, pair, site.name, site.layer)
    if said is not None and said != cut.width:
        raise PlanError(
            "the config would not say the widths that the plan leaves (was it made without this "
            "config, or does the config compute the key?)",
            path=f"{pair.width_expression} of {site.name}",
            seen=said,
            expected=cut.width,
            mend="make the plan anew, with the config that belongs to these parameters; if it "
            "computes the key, name the one that it is computed from: Pair(width=...)",
        )
    inside = dict(site.second.axes.known)
    for name, expression in pair.sizes.items() if cut.width else ():
        size = Width(expression=expression, prefix=pair.config).read(cfg)
        if size != inside.get(name):
            raise PlanError(
                f"the config would say another size of axis {name!r} than before the cut",
                path=f"{pair.config}{expression} of {site.name}",
                seen=size,
                expected=inside.get(name),
                mend="the width is tied to other sizes, and only a layout can say it: "
                'Pair(fixed=True), and slim(..., width="per_layer")',
            )


def check_fits(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raise `PlanError` unless the plan's tensors are there, in the shapes that it knows.

    And unless they are all that a cut has to take along.
    """
    for cut in plan.cuts:
        for tensor in cut.site.tensors:
            _check(tensor, leaves)
        _check_biases(cut, leaves)
    check_companions(plan, leaves)


def check_companions(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raise `PlanError` if an adapter or a scale that the plan does not know is at a cut kernel."""
    sites = [cut.site for cut in plan.cuts if cut.removed]
    known = {tensor.path for site in sites for tensor in site.tensors}
    unknown = {*_lora.beside(sites, leaves), *_scales.companions(sites, leaves)} - known
    if unknown:
        raise PlanError(
            "the plan does not know what belongs to a kernel that is cut: a low-rank matrix, its "
            "magnitude or a scale",
            path=min(unknown),
            seen=", ".join(sorted(unknown)),
            mend="make the plan for the tree with the adapters in it; or cut all of it by the "
            "parameters alone, apply(plan, tree, like=params_without_them); or merge them into "
            "the kernels first, the only way for magnitudes (DoRA)",
        )


def _check(tensor: Tensor, leaves: Mapping[str, Any]) -> None:
    if tensor.path not in leaves:
        raise PlanError(
            "the plan is for a tree with another structure: a tensor is absent",
            path=tensor.path,
            expected=f'{tensor.shape} by pattern "{tensor.axes}"',
            near=nearest(tensor.path, leaves),
            mend="apply a plan to a tree with the structure of the one it was made for; for an "
            "optimizer state, TrainState or adapters: apply(plan, tree, like=params)",
        )
    shape = np.shape(leaves[tensor.path])
    if shape != tensor.shape:
        raise PlanError(
            "the plan is for a tree with other sizes (was it applied before?)",
            path=tensor.path,
            seen=shape,
            expected=f'{tensor.shape} by pattern "{tensor.axes}"',
            mend="make a new plan for this tree",
        )


def _check_biases(cut: Cut, leaves: Mapping[str, Any]) -> None:
    pair = cut.site.pair
    for tensor, known in zip(cut.site.first, cut.site.first_biases, strict=True):
        path = f"{tensor.path.removesuffix(f'/{pair.kernel}')}/{pair.bias}"
        if known is None and path in leaves:
            raise PlanError(
                "the tree has a bias that the plan does not know",
                path=path,
                mend="make a new plan for this tree",
            )


def _folded(cut: Cut, leaves: Mapping[str, Any], bias: Any) -> Any:
    """bias + sum over folded j of constant_j * row_j, in float64, stored as the bias was."""
    site, folded = cut.site, cut.folded
    seen = evidence(site, leaves, named(cut.activation))
    if (folded & ~first_is_constant(seen)).any():
        channel = np.argwhere(folded & ~first_is_constant(seen))[0][-1]
        raise PlanError(
            "a channel whose constant is to be folded is not constant in this tree",
            path=site.first[0].path,
            seen=f"channel {channel} reads its input",
            mend="if these are gradients or moments, apply the plan to them alone, with "
            "fold=False; if they are parameters, make a new plan for them",
        )
    added = added_by_constants(seen, site, leaves[site.second.path], bias, folded)
    with np.errstate(over="ignore"):
        total = (_mesh.host(bias).astype(np.float64) + added).astype(bias.dtype)
    if not np.isfinite(total.astype(np.float64)).all():
        assert site.second_bias is not None
        raise NonFiniteError(
            f"a bias with the constants folded into it goes beyond what {bias.dtype} can say",
            path=site.second_bias.path,
            seen=f"constants that add up to {np.abs(added).max():.3g}",
            mend="cast the parameters to float32 first",
        )
    return total if namespace(bias) is np else jax.device_put(total, bias.sharding)
