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
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxslim._activation import Activation
from flaxslim._axes import Axes
from flaxslim._errors import NonFiniteError, TracedError, UnsupportedDtypeError
from flaxslim._spec import Site, Tensor

# The unsigned integer of each width, by which bit patterns are compared.
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Not among them: types whose NaN is the pattern of minus zero, and would read as zero.
_FLOATS = tuple(
    jnp.dtype(name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
)


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


def mark(
    site: Site,
    leaves: Mapping[str, Any],
    activation: Activation | None,
    threshold: float = 0.0,
) -> Marks:
    """The dead channels of a site. Each kernel is read once.

    Raises `TracedError`, `UnsupportedDtypeError`, and `NonFiniteError` for NaN or infinity
    anywhere in the site, also in columns that would go.
    """
    for tensor in site.tensors:
        _check_dtype(leaves[tensor.path], tensor)
    if site.second_bias is not None:
        _finite(leaves[site.second_bias.path], site.second_bias)
    axis = site.pair.axis
    fused = site.pair.gated and len(site.first) == 1
    second = leaves[site.second.path]
    evidence = Evidence(
        second_zero=_zero_seconds(second, site.second, axis),
        first_zero=tuple(
            row for t in site.first for row in _zero_firsts(leaves[t.path], t, axis, fused)
        ),
        first_bias=_biases(site, leaves, fused),
        gated=site.pair.gated,
        activation=activation,
        foldable=site.second_bias is not None,
    )
    dead = np.zeros(site.size, bool)
    constants = np.zeros(site.size)
    rules = dict.fromkeys(RULES, 0)
    for name, rule in RULES.items():
        value = rule(evidence)
        new = ~np.isnan(value) & ~dead
        constants[new] = value[new]
        rules[name] = int(new.sum())
        dead |= new
    weak = np.zeros(site.size, bool)
    if threshold > 0:
        norm = site.second.axes.norm(second, axis)
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
    if leaf.dtype not in _FLOATS:
        raise UnsupportedDtypeError(
            "the tensor is not of a floating point type that can be judged (quantised weights?)",
            path=tensor.path,
            seen=f"{leaf.dtype} {tuple(leaf.shape)}",
            expected=f"one of {', '.join(map(str, _FLOATS))}",
            mend="slim before quantising, or dequantise first",
        )


# --- zero, and not finite ---------------------------------------------------------------------
#
# Both are read off bit patterns without their sign. Zero is the pattern 0: a comparison of floats
# would take subnormal numbers for zero in XLA's CPU code. And the patterns of infinity and NaN are
# above that of the largest number, so one pass over a kernel answers both questions.

_SAMPLE = 16


def _unsigned(leaf: Any) -> Any:
    """The bits of an array, without its signs, where the array is; no copy."""
    if isinstance(leaf, jax.Array) and all(d.platform != "cpu" for d in leaf.devices()):
        return _device_bits(leaf)
    # A view, of an array on a CPU device as well: numpy reads it at the speed of memory, XLA at
    # half of it.
    return np.asarray(leaf).view(_UNSIGNED[leaf.dtype.itemsize])


@jax.jit
def _device_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])


def _any_bits(bits: Any, axes: tuple[int, ...] | None) -> np.ndarray:
    """The bits that are set in any entry along some axes, but for the sign: 0 if all are zero."""
    sign_off = np.iinfo(bits.dtype).max >> 1
    if isinstance(bits, np.ndarray):
        return np.bitwise_or.reduce(bits, axis=axes) & sign_off
    return np.asarray(_device_or(bits, axes)) & sign_off


@functools.partial(jax.jit, static_argnums=1)
def _device_or(bits: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    axes = tuple(range(bits.ndim)) if axes is None else axes
    return jax.lax.reduce(bits, np.zeros((), bits.dtype), jax.lax.bitwise_or, axes)


def _zero_seconds(leaf: Any, tensor: Tensor, axis: str) -> np.ndarray:
    """Which channels nothing reads: bool of shape (f,)."""
    bits = tensor.axes.split(_unsigned(leaf))
    found = _any_bits(bits, tensor.axes.others(axis))
    _check_finite(found, leaf, tensor)
    return found == 0


def _zero_firsts(leaf: Any, tensor: Tensor, axis: str, fused: bool) -> np.ndarray:
    """Which channels read nothing: bool of shape (1, f), or (2, f) if gate and up are fused."""
    axes = tensor.axes
    bits = axes.split(_unsigned(leaf))
    _check_finite(_any_bits(bits, None), leaf, tensor)
    others = axes.others(axis)
    if fused:
        others = tuple(i for i in others if i != _literal_two(axes))
    # A channel that reads something nearly always shows it in its first entries; only where one
    # does not is the whole kernel looked at.
    sample = tuple(slice(_SAMPLE) if i in others else slice(None) for i in range(bits.ndim))
    found = _any_bits(bits[sample], others)
    if not found.all():
        found = _any_bits(bits, others)
    if fused and _literal_two(axes) > axes.position(axis):
        found = found.T
    return (found == 0).reshape(2 if fused else 1, -1)


def _literal_two(axes: Axes) -> int:
    return [factor for dim in axes.dimensions for factor in dim].index(2)


@functools.cache
def _largest(dtype: Any) -> int:
    """The bits of the largest number of a type; those of infinity and NaN are above."""
    return int(np.array(jnp.finfo(dtype).max, dtype).view(_UNSIGNED[dtype.itemsize]))


def _check_finite(found: np.ndarray, leaf: Any, tensor: Tensor) -> None:
    largest = _largest(leaf.dtype)
    # The bits of several finite numbers may together look like infinity: then look closely.
    if found.max(initial=0) > largest:
        _finite(leaf, tensor)


def _finite(leaf: Any, tensor: Tensor) -> np.ndarray:
    """The values on the host; raises unless all are finite."""
    values = np.asarray(leaf)
    if not (finite := np.isfinite(values)).all():
        where = np.argwhere(~finite)[0].tolist()
        raise NonFiniteError(
            "a tensor holds NaN or infinity, so no channel can be said to contribute nothing",
            path=tensor.path,
            seen=f"{values[tuple(where)]} at index {where} of {values.shape}",
            mend="repair or reload the checkpoint; a diverged training run leaves such values",
        )
    return values


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
        values = axes.split(_finite(leaves[tensor.path], tensor).astype(np.float64))
        front = (_literal_two(axes),) if fused else ()
        front = (*front, axes.position(site.pair.axis))
        values = np.moveaxis(values, front, range(len(front))).reshape(count, site.size, -1)
        # In a stack of layers or experts, a channel has a bias in each: NaN if they differ.
        same = (values == values[..., :1]).all(axis=-1)
        rows += list(np.where(same, values[..., 0], np.nan))
    return tuple(rows)
