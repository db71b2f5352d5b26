"""Which channels of a site contribute nothing: the exactness rules.

A hidden channel j of `y = act(x @ W1 + b1) @ W2 + b2` may be cut when what it adds to y is known
without x. Each rule maps the evidence of a site to one number per channel: the constant that
channel puts into the second layer, or NaN where the rule does not know it. A channel is dead if
any rule knows its constant, and the constant times its second row, where that is not zero, is
folded into b2.

  (i)    every second-layer row that it feeds is zero
  (ii)   gated: its up column and bias are zero, or its gate column and bias are and act(0) = 0
  (iii)  plain: its first column and bias are zero, and act(0) = 0
  (iv)   its first column (gated: both columns) is zero and the bias is b: the constant is act(b)
         (gated: act(b_gate) * b_up), which must be zero if there is no second bias to fold into
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flaxslim import _bits
from flaxslim._activation import Activation
from flaxslim._axes import Axes
from flaxslim._errors import TracedError, UnsupportedDtypeError
from flaxslim._spec import Site, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules may look at; all arrays have shape (f,).

    `first_zero` and `first_bias` have one entry for a plain pair, (gate, up) for a gated one.
    """

    second_zero: np.ndarray
    first_zero: tuple[np.ndarray, ...]
    first_bias: tuple[np.ndarray, ...]
    gated: bool
    activation: Activation | None
    foldable: bool


Rule = Callable[[Evidence], np.ndarray]


def _constant(known: np.ndarray, value: np.ndarray | float = 0.0) -> np.ndarray:
    return np.where(known, value, np.nan)


def second_is_zero(e: Evidence) -> np.ndarray:
    """Rule (i): nothing reads the channel."""
    return _constant(e.second_zero)


def gate_or_up_is_zero(e: Evidence) -> np.ndarray:
    """Rule (ii): one factor of act(gate) * up is zero for every input."""
    if not e.gated:
        return _constant(np.zeros_like(e.second_zero))
    silent = [zero & (bias == 0) for zero, bias in zip(e.first_zero, e.first_bias, strict=True)]
    quiet_gate = silent[0] if _quiet(e.activation) else np.zeros_like(silent[0])
    return _constant(quiet_gate | silent[1])


def first_is_zero(e: Evidence) -> np.ndarray:
    """Rule (iii): the channel is act(0) = 0 for every input."""
    if e.gated or len(e.first_zero) != 1 or not _quiet(e.activation):
        return _constant(np.zeros_like(e.second_zero))
    return _constant(e.first_zero[0] & (e.first_bias[0] == 0))


def first_is_constant(e: Evidence) -> np.ndarray:
    """Rule (iv): the channel is the same constant for every input."""
    plain = not e.gated and len(e.first_zero) == 1
    if e.activation is None or not (plain or e.gated):
        return _constant(np.zeros_like(e.second_zero))
    known = np.logical_and.reduce(e.first_zero)
    if not known.any():
        return _constant(known)
    value = np.zeros(known.shape)
    value[known] = e.activation(e.first_bias[0][known])
    if e.gated:
        value[known] *= e.first_bias[1][known]
    # Without a second bias only a constant of zero may go: a relu of a bias below zero.
    return _constant(known & (e.foldable | (value == 0)), value)


RULES: Mapping[str, Rule] = {
    "i": second_is_zero,
    "ii": gate_or_up_is_zero,
    "iii": first_is_zero,
    "iv": first_is_constant,
}


@functools.cache
def _quiet(activation: Activation | None) -> bool:
    return activation is not None and float(activation(np.zeros(1))[0]) == 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """The verdict on a site: `dead` of shape (f,), who said so, and the constants to fold.

    `rules` counts each dead channel once, under the first rule that knows it; "threshold" are
    those that only a threshold above zero gives up, which are marked `weak` too.
    """

    dead: np.ndarray
    weak: np.ndarray
    constants: np.ndarray
    rules: dict[str, int]


def evidence(site: Site, leaves: Mapping[str, Any], activation: Activation | None) -> Evidence:
    """What a tree says about the channels of a site.

    The second kernel is read once, the first ones hardly at all. Raises `TracedError`,
    `UnsupportedDtypeError`, and `NonFiniteError` for NaN or infinity in the second kernel or a
    bias. The first kernels are not searched for them here: that is done where their columns are
    cut (`apply`), while they are in the cache.
    """
    for tensor in site.tensors:
        _check_dtype(leaves[tensor.path], tensor)
    if site.second_bias is not None:
        _bits.finite_values(leaves[site.second_bias.path], site.second_bias)
    axis = site.pair.axis
    fused = site.pair.gated and len(site.first) == 1
    return Evidence(
        second_zero=_zero_seconds(leaves[site.second.path], site.second, axis),
        first_zero=tuple(
            row for t in site.first for row in _zero_firsts(leaves[t.path], t, axis, fused)
        ),
        first_bias=_biases(site, leaves, fused),
        gated=site.pair.gated,
        activation=activation,
        foldable=site.second_bias is not None,
    )


def mark(
    site: Site,
    leaves: Mapping[str, Any],
    activation: Activation | None,
    threshold: float = 0.0,
) -> Marks:
    """The dead channels of a site; raises as `evidence` does."""
    seen = evidence(site, leaves, activation)
    dead = np.zeros(site.size, bool)
    constants = np.zeros(site.size)
    rules = dict.fromkeys(RULES, 0)
    for name, rule in RULES.items():
        value = rule(seen)
        new = ~np.isnan(value) & ~dead
        constants[new] = value[new]
        rules[name] = int(new.sum())
        dead |= new
    weak = np.zeros(site.size, bool)
    if threshold > 0:
        norm = site.second.axes.norm(leaves[site.second.path], site.pair.axis)
        weak = (norm <= threshold * norm.max(initial=0.0)) & ~dead
        rules["threshold"] = int(weak.sum())
        dead |= weak
    return Marks(dead=dead, weak=weak, constants=constants, rules=rules)


def _check_dtype(leaf: Any, tensor: Tensor) -> None:
    if isinstance(leaf, Tracer):
        raise TracedError(
            "the parameters are tracers: which channels are dead depends on their values",
            path=tensor.path,
            seen=str(leaf),
            mend="call this outside of jax.jit, jax.grad and jax.vmap; under jit, masks keep "
            "shapes as they are",
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TracedError(
            "the parameters are shapes without values",
            path=tensor.path,
            seen=str(leaf),
            mend="pass the arrays themselves, not what jax.eval_shape gives",
        )
    if leaf.dtype not in _bits.FLOATS:
        raise UnsupportedDtypeError(
            "the tensor is not of a floating point type that can be judged (quantised weights?)",
            path=tensor.path,
            seen=f"{leaf.dtype} {tuple(leaf.shape)}",
            expected=f"one of {', '.join(map(str, _bits.FLOATS))}",
            mend="slim before quantising, or dequantise first",
        )


# How many entries of a channel are looked at before all of them are.
_SAMPLE = 16


def _zero_seconds(leaf: Any, tensor: Tensor, axis: str) -> np.ndarray:
    """Which channels nothing reads: bool of shape (f,)."""
    bits = tensor.axes.split(_bits.unsigned(leaf))
    found = _bits.any_set(bits, tensor.axes.others(axis))
    _bits.check_finite(leaf, tensor, found)
    return found == 0


def _zero_firsts(leaf: Any, tensor: Tensor, axis: str, fused: bool) -> np.ndarray:
    """Which channels read nothing: bool of shape (1, f), or (2, f) if gate and up are fused."""
    axes = tensor.axes
    bits = axes.split(_bits.unsigned(leaf))
    others = axes.others(axis)
    if fused:
        others = tuple(i for i in others if i != _literal_two(axes))
    # A channel that reads something nearly always shows it in its first entries; only where one
    # does not is the whole kernel looked at.
    sample = tuple(slice(_SAMPLE) if i in others else slice(None) for i in range(bits.ndim))
    found = _bits.any_set(bits[sample], others)
    if not found.all():
        found = _bits.any_set(bits, others)
    if fused and _literal_two(axes) > axes.position(axis):
        found = found.T
    return (found == 0).reshape(2 if fused else 1, -1)


def _literal_two(axes: Axes) -> int:
    return [factor for dim in axes.dimensions for factor in dim].index(2)


def _biases(site: Site, leaves: Mapping[str, Any], fused: bool) -> tuple[np.ndarray, ...]:
    """The first bias of each channel, one array for each part; zeros where there is none.

    NaN is a bias that is not one number, which no rule takes for zero or for a constant.
    """
    rows: list[np.ndarray] = []
    count = 2 if fused else 1
    for tensor in site.first_biases:
        if tensor is None:
            rows += [np.zeros(site.size)] * count
            continue
        axes = tensor.axes
        values = axes.split(_bits.finite_values(leaves[tensor.path], tensor).astype(np.float64))
        front = (_literal_two(axes),) if fused else ()
        front = (*front, axes.position(site.pair.axis))
        values = np.moveaxis(values, front, range(len(front))).reshape(count, site.size, -1)
        # In a stack of layers or experts, a channel has a bias in each: NaN if they differ.
        same = (values == values[..., :1]).all(axis=-1)
        rows += list(np.where(same, values[..., 0], np.nan))
    return tuple(rows)
