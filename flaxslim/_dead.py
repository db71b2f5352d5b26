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
         (gated: act(b_gate) * b_up), foldable only if there is a second bias
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim._activation import Activation
from flaxslim._axes import Axes, namespace
from flaxslim._errors import NonFiniteError, TracedError, UnsupportedDtypeError
from flaxslim._spec import Site, Tensor

# The unsigned integer of each width, by which bit patterns are compared.
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Not among them: types whose NaN is the pattern of minus zero, and would read as zero.
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


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
    if e.activation is None or not e.foldable or not (plain or e.gated):
        return _constant(np.zeros_like(e.second_zero))
    known = np.logical_and.reduce(e.first_zero)
    value = np.zeros(known.shape)
    value[known] = e.activation(e.first_bias[0][known])
    if e.gated:
        value[known] *= e.first_bias[1][known]
    return _constant(known, value)


RULES: Mapping[str, Rule] = {
    "i": second_is_zero,
    "ii": gate_or_up_is_zero,
    "iii": first_is_zero,
    "iv": first_is_constant,
}


def _quiet(activation: Activation | None) -> bool:
    return activation is not None and float(activation(np.zeros(1))[0]) == 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """The verdict on a site: `dead` of shape (f,), who said so, and the constants to fold.

    `rules` counts each dead channel once, under the first rule that knows it; "threshold" are
    those that only a threshold above zero gives up.
    """

    dead: np.ndarray
    constants: np.ndarray
    rules: dict[str, int]


def mark(
    site: Site,
    leaves: Mapping[str, Any],
    activation: Activation | None,
    threshold: float = 0.0,
) -> Callable[[], Marks]:
    """Start to look for the dead channels of a site; the call of the result waits for them.

    In two steps so that the reductions of all sites are under way before the first is read: each
    kernel is read once, whichever rules apply.

    Raises `TracedError`, `UnsupportedDtypeError`, and `NonFiniteError` for NaN or infinity
    anywhere in the site, also in columns that would go.
    """
    for tensor in site.tensors:
        _check_dtype(leaves[tensor.path], tensor)
    second = _bits(leaves[site.second.path], site.second.axes, site.pair.axis, parts=False)
    parts = site.pair.gated and len(site.first) == 1
    first = [_bits(leaves[t.path], t.axes, site.pair.axis, parts=parts) for t in site.first]

    def finish() -> Marks:
        evidence = Evidence(
            second_zero=_zero(second, leaves[site.second.path], site.second)[0],
            first_zero=tuple(
                row
                for bits, t in zip(first, site.first, strict=True)
                for row in _zero(bits, leaves[t.path], t)
            ),
            first_bias=_biases(site, leaves, parts),
            gated=site.pair.gated,
            activation=activation,
            foldable=site.second_bias is not None,
        )
        if site.second_bias is not None:
            _host(leaves[site.second_bias.path], site.second_bias)
        dead = np.zeros(site.size, bool)
        constants = np.zeros(site.size)
        rules = dict.fromkeys(RULES, 0)
        for name, rule in RULES.items():
            value = rule(evidence)
            new = ~np.isnan(value) & ~dead
            constants[new] = value[new]
            rules[name] = int(new.sum())
            dead |= new
        if threshold > 0:
            norm = site.second.axes.norm(leaves[site.second.path], site.pair.axis)
            weak = (norm <= threshold * norm.max(initial=0.0)) & ~dead
            rules["threshold"] = int(weak.sum())
            dead |= weak
        return Marks(dead=dead, constants=constants, rules=rules)

    return finish


def _check_dtype(leaf: Any, tensor: Tensor) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise TracedError(
            "the parameters are tracers: which channels are dead depends on their values",
            path=tensor.path,
            seen=str(leaf),
            mend="call this outside of jax.jit, jax.grad and jax.vmap; under jit, masks keep "
            "shapes as they are",
        )
    if str(leaf.dtype) not in _FLOATS:
        raise UnsupportedDtypeError(
            "the tensor is not of a floating point type that can be judged (quantised weights?)",
            path=tensor.path,
            seen=f"{leaf.dtype} {tuple(leaf.shape)}",
            expected=f"one of {', '.join(_FLOATS)}",
            mend="slim before quantising, or dequantise first",
        )


def _literal_two(axes: Axes) -> int:
    return [factor for dim in axes.dimensions for factor in dim].index(2)


def _bits(leaf: Any, axes: Axes, axis: str, *, parts: bool) -> Any:
    """The bit pattern, without its sign, of the largest magnitude in each channel: (f,), (2, f).

    Magnitudes of floats order as their bit patterns do, with infinity and NaN on top: one
    integer reduction tells zero from non-zero and finite from not, and unlike a comparison of
    floats it does not take subnormal numbers for zero (XLA's CPU code does).
    """
    others = axes.others(axis)
    if parts:
        two = _literal_two(axes)
        others = tuple(i for i in others if i != two)
    x = axes.split(leaf)
    if namespace(x) is np:
        unsigned = _UNSIGNED[x.dtype.itemsize]
        bits = (x.view(unsigned) & (np.iinfo(unsigned).max >> 1)).max(axis=others, initial=0)
    else:
        bits = _device_bits(x, others)
    return bits if not parts or _literal_two(axes) < axes.position(axis) else bits.T


@functools.partial(jax.jit, static_argnums=1)
def _device_bits(x: jax.Array, others: tuple[int, ...]) -> jax.Array:
    # Signed, since no sign bit is left and signed comparisons vectorise everywhere.
    signed = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, signed) & jnp.iinfo(signed).max
    return bits.max(axis=others, initial=0)


def _zero(bits: Any, leaf: Any, tensor: Tensor) -> np.ndarray:
    """Which channels are zero throughout, one row for each part; raises for NaN and infinity."""
    bits = np.asarray(bits)
    largest = np.array(jnp.finfo(leaf.dtype).max, leaf.dtype).view(_UNSIGNED[leaf.dtype.itemsize])
    bits = bits.reshape(-1, bits.shape[-1])
    if (bad := bits > largest).any():
        raise _non_finite(tensor, int(bad.any(axis=0).argmax()))
    return bits == 0


def _non_finite(tensor: Tensor, channel: int) -> NonFiniteError:
    return NonFiniteError(
        "a tensor holds NaN or infinity, so no channel can be said to contribute nothing",
        path=tensor.path,
        seen=f"the first bad entry is at index {channel} of the last axis that is cut",
        mend="repair or reload the checkpoint; a diverged training run leaves such values",
    )


def _host(leaf: Any, tensor: Tensor) -> np.ndarray:
    values = np.asarray(leaf).astype(np.float64)
    if not np.isfinite(values).all():
        raise _non_finite(tensor, int((~np.isfinite(values)).ravel().argmax()))
    return values


def _biases(site: Site, leaves: Mapping[str, Any], parts: bool) -> tuple[np.ndarray, ...]:
    """The first bias of each channel, one array for each part; zeros where there is none."""
    rows: list[np.ndarray] = []
    count = 2 if parts else 1
    for tensor in site.first_biases:
        if tensor is None:
            rows += [np.zeros(site.size)] * count
            continue
        values = tensor.axes.split(_host(leaves[tensor.path], tensor))
        if parts:
            values = np.moveaxis(values, _literal_two(tensor.axes), 0)
        values = values.reshape(count, -1)
        rows += list(values)
    return tuple(rows)
