"""Run a jaxpr by numpy in float64: at sizes as small as a test's, compiling takes far longer.

What numpy has no word for is left to JAX, one primitive at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special

from flaxslim._jaxpr import scan_counts

Arrays = Sequence[Any]


class Evaluated:
    """A function that is traced once for all arguments of the same shapes, and run by numpy."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self._traced: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> list[np.ndarray]:
        """The arrays that it returns."""
        leaves = jax.tree.leaves(args)
        key = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._traced:
            self._traced[key] = jax.make_jaxpr(self.fn)(*jax.tree.map(_shape, args))
        closed = self._traced[key]
        return [np.asarray(value) for value in run(closed.jaxpr, closed.consts, leaves)]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def run(jaxpr: Any, consts: Arrays, args: Arrays) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(var: Any) -> Any:
        return np.asarray(var.val) if hasattr(var, "val") else env[var]

    with np.errstate(all="ignore"):
        for eqn in jaxpr.eqns:
            values = [read(var) for var in eqn.invars]
            for var, value in zip(eqn.outvars, _equation(eqn, values), strict=True):
                env[var] = _plain(value, var.aval)
    return [read(var) for var in jaxpr.outvars]


def _plain(value: Any, aval: Any) -> Any:
    if jax.numpy.issubdtype(aval.dtype, jax.dtypes.extended):
        return value  # a random key
    return np.asarray(value, dtype=aval.dtype)


def _equation(eqn: Any, values: Arrays) -> Arrays:
    name, params = eqn.primitive.name, eqn.params
    if name in ELEMENTWISE:
        return [ELEMENTWISE[name](*values)]
    if name in _OTHERS:
        return [_OTHERS[name](values, params)]
    if name in _CONTROL:
        return _CONTROL[name](values, params)
    out = eqn.primitive.bind(*values, **params)
    return out if eqn.primitive.multiple_results else [out]


# --- each entry by itself ---------------------------------------------------------------------


def _select(which: Any, *cases: Any) -> Any:
    if len(cases) == 2:
        return np.where(np.asarray(which, bool), cases[1], cases[0])
    return np.choose(which, cases)


def _divide(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind in "iu":  # towards zero
        return np.trunc(a / b).astype(np.asarray(a).dtype)
    return np.divide(a, b)


ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (
        "abs", "add", "cbrt", "ceil", "cos", "cosh", "exp", "exp2", "expm1", "floor", "log",
        "log1p", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
    )},
    **dict.fromkeys(("copy", "copy_p", "name", "stop_gradient"), lambda x: x),
    "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": np.fmod,
    "neg": np.negative, "max": np.maximum, "min": np.minimum, "pow": np.power,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "erf": special.erf, "erfc": special.erfc, "logistic": special.expit,
    "rsqrt": lambda x: 1 / np.sqrt(x), "is_finite": np.isfinite, "round": np.round,
    "select_n": _select, "clamp": lambda low, x, high: np.clip(x, low, high),
}  # fmt: skip


# --- along axes -------------------------------------------------------------------------------


def _broadcast(values: Arrays, params: Mapping[str, Any]) -> Any:
    (x,), shape = values[:1], params["shape"]
    between = [1] * len(shape)
    for size, at in zip(x.shape, params["broadcast_dimensions"], strict=True):
        between[at] = size
    return np.broadcast_to(x.reshape(between), shape)


def _slice(values: Arrays, params: Mapping[str, Any]) -> Any:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or [None] * len(starts)
    return values[0][tuple(map(slice, starts, limits, strides))]


def _iota(values: Arrays, params: Mapping[str, Any]) -> Any:
    shape, at = params["shape"], params["dimension"]
    along = [size if i == at else 1 for i, size in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[at]).reshape(along), shape)


def _dot(values: Arrays, params: Mapping[str, Any]) -> Any:
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    a, b = values
    left = list(range(a.ndim))
    right = list(range(a.ndim, a.ndim + b.ndim))
    for i, j in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        right[j] = left[i]
    batch = [left[i] for i in left_batch]
    gone = {*(left[i] for i in left_sum), *batch}
    free = [axis for axis in (*left, *right) if axis not in gone]
    return np.einsum(a, left, b, right, [*batch, *free])


def _reduction(how: Callable[..., Any]) -> Callable[[Arrays, Mapping[str, Any]], Any]:
    return lambda values, params: how(values[0], axis=tuple(params["axes"]))


def _along(how: Callable[..., Any]) -> Callable[[Arrays, Mapping[str, Any]], Any]:
    def cumulative(values: Arrays, params: Mapping[str, Any]) -> Any:
        (x,), axis = values, params["axis"]
        if params["reverse"]:
            return np.flip(how(np.flip(x, axis), axis=axis), axis)
        return how(x, axis=axis)

    return cumulative


_OTHERS: Mapping[str, Callable[[Arrays, Mapping[str, Any]], Any]] = {
    "argmax": lambda values, params: np.argmax(values[0], axis=params["axes"][0]),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda values, params: np.concatenate(values, axis=params["dimension"]),
    "convert_element_type": lambda values, params: values[0].astype(params["new_dtype"]),
    "cumsum": _along(np.cumsum),
    "dot_general": _dot,
    "expand_dims": lambda values, params: np.expand_dims(values[0], params["dimensions"]),
    "integer_pow": lambda values, params: values[0] ** float(params["y"]),
    "iota": _iota,
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_sum": _reduction(np.sum),
    "reshape": lambda values, params: values[0].reshape(params["new_sizes"]),
    "rev": lambda values, params: np.flip(values[0], params["dimensions"]),
    "slice": _slice,
    "squeeze": lambda values, params: np.squeeze(values[0], tuple(params["dimensions"])),
    "transpose": lambda values, params: values[0].transpose(params["permutation"]),
}


# --- control flow -----------------------------------------------------------------------------


def _closed(closed: Any, args: Arrays) -> list[Any]:
    jaxpr = getattr(closed, "jaxpr", closed)
    return run(jaxpr, getattr(closed, "consts", ()), args)


def _call(values: Arrays, params: Mapping[str, Any]) -> list[Any]:
    key = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
    return _closed(params[key], values)


def _cond(values: Arrays, params: Mapping[str, Any]) -> list[Any]:
    branches = params["branches"]
    at = np.clip(int(values[0]), 0, len(branches) - 1)
    return _closed(branches[at], values[1:])


def _while(values: Arrays, params: Mapping[str, Any]) -> list[Any]:
    first, second = params["cond_nconsts"], params["body_nconsts"]
    cond, body = values[:first], values[first : first + second]
    carry = list(values[first + second :])
    while bool(_closed(params["cond_jaxpr"], [*cond, *carry])[0]):
        carry = _closed(params["body_jaxpr"], [*body, *carry])
    return carry


def _split(values: Arrays, params: Mapping[str, Any]) -> list[Any]:
    return np.split(values[0], np.cumsum(params["sizes"])[:-1], axis=params["axis"])


def _scan(values: Arrays, params: Mapping[str, Any]) -> list[Any]:
    (consts, count), length = scan_counts(params), params["length"]
    carry, xs = list(values[consts : consts + count]), values[consts + count :]
    rows: list[list[Any]] = []
    order = range(length)[::-1] if params["reverse"] else range(length)
    for i in order:
        out = _closed(params["jaxpr"], [*values[:consts], *carry, *(x[i] for x in xs)])
        carry = out[:count]
        rows.append(out[count:])
    rows = rows[::-1] if params["reverse"] else rows
    return [*carry, *(np.stack(column) for column in zip(*rows, strict=True))]


_CONTROL: Mapping[str, Callable[[Arrays, Mapping[str, Any]], Arrays]] = {
    "checkpoint": _call,
    "cond": _cond,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "jit": _call,
    "pjit": _call,
    "remat": _call,
    "remat2": _call,
    "scan": _scan,
    "split": _split,
    "while": _while,
}
