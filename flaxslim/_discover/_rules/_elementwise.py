"""Each entry by itself: the axes stay, and other numbers stand along them."""

from collections.abc import Sequence

import jax.numpy as jnp

from flaxslim._discover._atoms import Dim, roots
from flaxslim._discover._rules._table import axis_rule
from flaxslim._discover._rules._values import times_one, without
from flaxslim._discover._trace import OPAQUE, Equation, Node, Sum, Value

# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex",
    "conj", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "lgamma",
    "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or",
    "polygamma", "population_count", "pow", "real", "regularized_incomplete_beta", "rem", "round",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
    "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor", "zeta",
)
IDENTITY = (
    "copy", "copy_p", "device_put", "mesh_cast", "name", "optimization_barrier", "pbroadcast",
    "pvary", "reshard", "sharding_constraint", "stop_gradient",
)
# Entries stay in their places, and zeros stay zeros, but a number may become another.
OTHER_NUMBERS = (
    "bitcast_convert_type", "convert_element_type", "pmax", "pmin", "ppermute", "psum", "psum2",
    "psum_invariant", "reduce_precision",
)
RANDOM = (
    "random_seed", "random_wrap", "random_unwrap", "random_bits", "random_fold_in",
    "random_split", "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform",
    "random_clone", "threefry4x32", "philox2x32", "philox4x32",
)
# fmt: on


@axis_rule(*ELEMENTWISE)
def elementwise(e: Equation) -> list[Value]:
    arrays = [value for value in e.inputs if value.dims]
    dims = tuple(_broadcast(e, each) for each in zip(*(v.dims for v in arrays), strict=True))
    if (one := times_one(e)) is not None and len(one.dims) == len(dims):
        shares = one.shares if e.in_shapes[e.inputs.index(one)] == e.shapes[0] else frozenset()
        return [Value(dims, one.node, _weights(e), shares)]
    node = Node(e.name, tuple(value.node for value in e.inputs), e.params)
    if e.name in ("mul", "div"):
        _note_scale(e)
    return [Value(dims, node, _weights(e), _shares(e))]


def _broadcast(e: Equation, dims: Sequence[Dim]) -> Dim:
    """One axis of several, of which some may be of size 1."""
    wide = [dim for dim in dims if dim]
    return e.same(*wide) if wide else ()


def _weights(e: Equation) -> frozenset[str]:
    """The parameters whose zeros are zeros of the output."""
    if e.name == "mul":
        return e.inputs[0].weights | e.inputs[1].weights
    if e.name in ("div", "neg"):
        return e.inputs[0].weights
    if e.name == "select_n":
        return frozenset.intersection(*(value.weights for value in e.inputs[1:]))
    return frozenset()


def _shares(e: Equation) -> frozenset[int]:
    """Of x / sum(x) the axes that were summed: a softmax.

    What is divided is what was summed, entry by entry, and the sums are laid along the other axes.
    """
    if e.name != "div" or e.inputs[1].node.kind != "sum" or e.in_shapes[0] != e.shapes[0]:
        return frozenset()
    x, by = e.inputs
    total: Sum = by.node.data
    if x.node.kind == "opaque" or len(total.args) != 1 or total.args[0].node is not x.node:
        return frozenset()
    axes = frozenset(total.axes[0])
    for axis, (own, other) in enumerate(zip(x.dims, by.dims, strict=True)):
        if not (all(a.uniform for a in roots(other)) if axis in axes else own == other):
            return frozenset()
    return axes if total.args[0].dims == x.dims else frozenset()


def _note_scale(e: Equation) -> None:
    """By which number a sum is scaled: it may be that of the channels, as in a mean."""
    for one, other in (e.inputs, e.inputs[::-1]):
        if one.node.kind == "sum" and other.node.kind == "number":
            scales = e.walk.scaled.setdefault(one.node.data, [])
            scales.append((other.node.data, e.place))


@axis_rule(*IDENTITY)
def identity(e: Equation) -> Sequence[Value]:
    return e.inputs


@axis_rule("convert_element_type", "reduce_precision")
def converted(e: Equation) -> Sequence[Value]:
    (x,) = e.inputs
    whole = x.node.kind == "number" and x.node.data in (0, 1)  # as every type can say
    return e.inputs if whole or _is_rounded(e) else other_numbers(e)


def _is_rounded(e: Equation) -> bool:
    """Whether a conversion does no more to a number than round it as a network may."""
    if e.name == "reduce_precision":
        return e.params["mantissa_bits"] >= _MANTISSA
    old, new = e.eqn.invars[0].aval.dtype, e.params["new_dtype"]
    if old in (new, jnp.dtype(bool)):
        return True
    known = jnp.issubdtype(old, jnp.floating) or jnp.issubdtype(old, jnp.integer)
    return known and jnp.issubdtype(new, jnp.floating) and jnp.finfo(new).nmant >= _MANTISSA


_MANTISSA = 7  # of bfloat16


@axis_rule("pmax", "pmin", "ppermute", "psum", "psum2", "psum_invariant")
def other_numbers(e: Equation) -> list[Value]:
    """Entries in their places, but other numbers: of a sum over devices, or whole ones.

    What was mapped over is an axis by its place, which is gone.
    """
    gone = [axis for axis in e.params.get("axes", ()) if isinstance(axis, int)]
    e.block([value.dims[axis] for value in e.inputs for axis in gone], "it is reduced over")
    return [Value(without(value.dims, gone), OPAQUE, value.weights) for value in e.inputs]


@axis_rule("bitcast_convert_type")
def bitcast(e: Equation) -> list[Value]:
    (x,) = e.inputs
    if e.in_shapes == e.shapes:
        return [Value(x.dims)]
    why = "its bits are taken apart"
    e.block(x.dims, why)
    return [Value(e.fixed(*e.shapes[0], why=why))]


@axis_rule(*RANDOM)
def random(e: Equation) -> list[Value]:
    return [Value(e.fixed(*shape, why="random numbers are drawn for each")) for shape in e.shapes]


@axis_rule("iota")
def iota(e: Equation) -> list[Value]:
    dims = list(e.new(*e.shapes[0]))
    at = e.params["dimension"]
    dims[at] = e.fixed(e.shapes[0][at], why="each is known by its number")[0]
    return [Value(tuple(dims))]
