"""What each primitive does to the axes of its inputs: a table, to which others can add.

    @axis_rule("rev")
    def reverse(e):
        ...
        return [dims]

A rule gets an `Equation` and returns for each output its dimensions, or a `Value` where it knows
how that came about. It joins dimensions that are the same axis (`e.same`), notes sums (`e.sum`),
and blocks what cannot be cut (`e.block`); dimensions of an output along which indices are no longer
those of an input are new (`e.fixed`, or `e.new` where all entries are the same). What has no rule
blocks everything that enters it and is named.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from flaxslim._discover._atoms import Atom, Dim, Dims, roots, size_of
from flaxslim._discover._trace import OPAQUE, Call, Equation, Node, Rule, Sum, Value

WINDOW = "it is the window of a convolution"
SCANNED = "it is scanned over"

_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[str, Rule] = {}
CALLS: dict[str, Call] = {}


def axis_rule(*primitives: str) -> Callable[[_Rule], _Rule]:
    """Teach `discover` and `explain` primitives by name; a later rule replaces an earlier one.

    The decorated function takes an equation and returns the dimensions of each output, as
    CONTRIBUTING.md shows. The decorator gives it back as it is.

    >>> @axis_rule("my_negation")
    ... def my_negation(e):
    ...     return [e.inputs[0].dims]
    """

    def register(rule: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def _call(*primitives: str) -> Callable[[Call], Call]:
    def register(rule: Call) -> Call:
        CALLS.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def rule_for(primitive: str) -> Rule:
    return RULES.get(primitive, Equation.unknown)


# --- which axes are looked along --------------------------------------------------------------


def looked_along(e: Equation) -> list[tuple[int, int]]:
    """The axes, as (input, axis), of which something other than an axis comes out.

    Their entries are summed, or some are picked: what comes out may tell how many there were.
    """
    p, shapes = e.params, e.in_shapes
    if e.name in _AXES_STAY:
        return []
    if e.name == "dot_general":
        (left, right), _ = p["dimension_numbers"]
        return [*((0, i) for i in left), *((1, i) for i in right)]
    if e.name in ("slice", "dynamic_slice"):
        sizes = zip(shapes[0], e.shapes[0], strict=True)
        return [(0, i) for i, (before, after) in enumerate(sizes) if before != after]
    if e.name == "gather":
        picked = p["dimension_numbers"].start_index_map
        whole = zip(shapes[0], p["slice_sizes"], strict=True)
        return [(0, i) for i, (a, b) in enumerate(whole) if a != b or i in picked]
    if e.name in ("split", "unstack"):
        return [(0, p["axis"])]
    if e.name.startswith(("reduce_", "arg")) and "axes" in p:
        return [(0, i) for i in p["axes"]]
    return [(at, axis) for at, shape in enumerate(shapes) for axis in range(len(shape))]


_KEEP = (
    "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "concatenate", "stack",
    "tile", "rev", "pad", "iota", "dynamic_update_slice", "cumsum", "cumprod", "cummax", "cummin",
    "cumlogsumexp", "sort", "fft",
)  # fmt: skip
_RANDOM = (
    "random_seed", "random_wrap", "random_unwrap", "random_bits", "random_fold_in",
    "random_split", "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform",
    "random_clone", "threefry4x32", "philox2x32", "philox4x32",
)  # fmt: skip
_SCATTER = (
    "scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max",
    "scatter_sub", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub",
)  # fmt: skip

# --- each entry by itself ---------------------------------------------------------------------

# fmt: off
_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex",
    "conj", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "lgamma",
    "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or",
    "polygamma", "population_count", "pow", "real", "regularized_incomplete_beta", "rem", "round",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
    "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor", "zeta",
)
_IDENTITY = (
    "copy", "copy_p", "device_put", "mesh_cast", "name", "optimization_barrier", "pbroadcast",
    "pvary", "reshard", "sharding_constraint", "stop_gradient",
)
# Entries stay in their places, and zeros stay zeros, but a number may become another.
_OTHERWISE = (
    "bitcast_convert_type", "convert_element_type", "pmax", "pmin", "ppermute", "psum", "psum2",
    "psum_invariant", "reduce_precision",
)
# fmt: on
_AXES_STAY = frozenset((*_ELEMENTWISE, *_IDENTITY, *_OTHERWISE, *_RANDOM, *_KEEP, *_SCATTER))


@axis_rule(*_ELEMENTWISE)
def elementwise(e: Equation) -> list[Value]:
    arrays = [value for value in e.inputs if value.dims]
    dims = tuple(_broadcast(e, each) for each in zip(*(v.dims for v in arrays), strict=True))
    if (one := _scaled(e)) is not None and len(one.dims) == len(dims):
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


def _scaled(e: Equation) -> Value | None:
    """What is multiplied by one."""
    if e.name not in ("mul", "dot_general"):
        return None
    a, b = e.inputs
    if b.node.kind == "number" and b.node.data == 1:
        return a
    return b if a.node.kind == "number" and a.node.data == 1 else None


def _note_scale(e: Equation) -> None:
    """By which number a sum is scaled: it may be that of the channels, as in a mean."""
    for one, other in (e.inputs, e.inputs[::-1]):
        if one.node.kind == "sum" and other.node.kind == "number":
            scales = e.walk.scaled.setdefault(one.node.data, [])
            scales.append((other.node.data, e.place))


@axis_rule(*_IDENTITY)
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
    return [Value(_without(value.dims, gone), OPAQUE, value.weights) for value in e.inputs]


@axis_rule("bitcast_convert_type")
def bitcast(e: Equation) -> list[Value]:
    (x,) = e.inputs
    if e.in_shapes == e.shapes:
        return [Value(x.dims)]
    why = "its bits are taken apart"
    e.block(x.dims, why)
    return [Value(e.fixed(*e.shapes[0], why=why))]


@axis_rule(*_RANDOM)
def random(e: Equation) -> list[Value]:
    return [Value(e.fixed(*shape, why="random numbers are drawn for each")) for shape in e.shapes]


@axis_rule("iota")
def iota(e: Equation) -> list[Value]:
    dims = list(e.new(*e.shapes[0]))
    at = e.params["dimension"]
    dims[at] = e.fixed(e.shapes[0][at], why="each is known by its number")[0]
    return [Value(tuple(dims))]


# --- the same entries at other places ---------------------------------------------------------


@axis_rule("transpose")
def transpose(e: Equation) -> list[Value]:
    (x,) = e.inputs
    order = e.params["permutation"]
    moved = _moved(x, tuple(x.dims[i] for i in order), {old: new for new, old in enumerate(order)})
    # Of queries and keys, which are one class, it could not be told any more which is which.
    last: dict[tuple[Atom, ...], int] = {}
    for i in order:
        axis = tuple(roots(x.dims[i]))
        if axis and last.setdefault(axis, i) > i:
            return [dataclasses.replace(moved, node=OPAQUE)]
        last[axis] = i
    return [moved]


@axis_rule("reshape")
def reshape(e: Equation) -> list[Value]:
    x, old, new = e.inputs[0], e.in_shapes[0], e.shapes[0]
    # What is behind them as well is as it was.
    kept = {at: at - len(old) + len(new) for at in x.shares if old[at:] == new[at - len(old) :]}
    return [_moved(x, e.reshaped(x.dims, new), kept)]


@axis_rule("squeeze", "expand_dims")
def squeeze(e: Equation) -> Sequence[Value]:
    return reshape(e)


@axis_rule("broadcast_in_dim")
def broadcast_in_dim(e: Equation) -> list[Value]:
    x, shape = e.inputs[0], e.shapes[0]
    dims, kept = list(e.new(*shape)), {}
    places = zip(x.dims, e.in_shapes[0], e.params["broadcast_dimensions"], strict=True)
    for axis, (dim, size, at) in enumerate(places):
        if size == shape[at]:
            dims[at], kept[axis] = dim, at
    return [_moved(x, tuple(dims), kept)]


@axis_rule("split")
def split(e: Equation) -> list[Value]:
    (x,), at, start = e.inputs, e.params["axis"], 0
    pieces = []
    for size in map(int, e.params["sizes"]):
        pieces.append(_range(e, x, {at: (start, size)}))
        start += size
    return pieces


@axis_rule("slice")
def slice_(e: Equation) -> list[Value]:
    x, shape = e.inputs[0], e.in_shapes[0]
    starts, limits = e.params["start_indices"], e.params["limit_indices"]
    strides = e.params["strides"] or (1,) * len(shape)
    ranges = {}
    for at, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if stride != 1:
            return [_strided(e, x)]
        if limit - start != shape[at]:
            ranges[at] = (start, limit - start)
    return [_range(e, x, ranges)]


def _strided(e: Equation, x: Value) -> Value:
    dims = list(x.dims)
    for at, (old, new) in enumerate(zip(e.in_shapes[0], e.shapes[0], strict=True)):
        if old != new:
            why = "every other index of it is taken"
            e.block([dims[at]], why)
            dims[at] = e.fixed(new, why=why)[0]
    return Value(tuple(dims))


def _range(e: Equation, x: Value, ranges: dict[int, tuple[int, int]]) -> Value:
    """A range along some axes."""
    dims, parts = list(x.dims), []
    for at, (start, size) in ranges.items():
        dims[at], part = e.part(dims[at], start, size, e.in_shapes[0][at])
        parts.append(part)
    node = x.node
    if parts and x.node.kind != "number":
        known = len(parts) == 1 and parts[0] is not None
        node = Node("part", (x.node,), parts[0]) if known else OPAQUE
    return Value(tuple(dims), node, x.weights)


@axis_rule("concatenate")
def concatenate(e: Equation) -> list[Value]:
    at = e.params["dimension"]
    full = [i for i, shape in enumerate(e.in_shapes) if shape[at]] or [0]
    if len(full) == 1:
        return [e.inputs[full[0]]]
    sizes = [e.in_shapes[i][at] for i in full]
    dims = [
        e.joined(each, sizes) if axis == at else e.same(*each)
        for axis, each in enumerate(zip(*(e.inputs[i].dims for i in full), strict=True))
    ]
    return [Value(tuple(dims), weights=frozenset())]


@axis_rule("stack")
def stack(e: Equation) -> list[Value]:
    dims = [e.same(*each) for each in zip(*(v.dims for v in e.inputs), strict=True)]
    dims.insert(e.params["axis"], e.fixed(len(e.inputs), why="it was stacked")[0])
    return [Value(tuple(dims))]


@axis_rule("unstack")
def unstack(e: Equation) -> list[Value]:
    x, at = e.inputs[0], e.params["axis"]
    whole = e.in_shapes[0][at]
    pieces = [_range(e, x, {at: (i, 1)}) for i in range(whole)]
    return [Value(_without(v.dims, [at]), v.node, v.weights) for v in pieces]


@axis_rule("tile")
def tile(e: Equation) -> list[Value]:
    x, reps = e.inputs[0], e.params["reps"]
    new = e.new(*reps[len(reps) - len(x.dims) :])
    dims = tuple(count + dim for count, dim in zip(new, x.dims, strict=True))
    return [_moved(x, (*e.new(*reps[: len(reps) - len(x.dims)]), *dims))]


@axis_rule("rev")
def reverse(e: Equation) -> list[Value]:
    return [_changed(e, e.inputs[0].dims, e.params["dimensions"], "it is reversed")]


@axis_rule("pad")
def pad(e: Equation) -> list[Value]:
    at = [i for i, sizes in enumerate(e.params["padding_config"]) if any(sizes)]
    return [_changed(e, e.inputs[0].dims, at, "it is padded")]


@axis_rule("gather")
def gather(e: Equation) -> list[Value]:
    x, indices = e.inputs
    numbers, sizes = e.params["dimension_numbers"], e.params["slice_sizes"]
    batch = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batch = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    index_dims = list(indices.dims[:-1])
    for at, index_at in zip(batch, index_batch, strict=True):
        index_dims[index_at] = e.same(x.dims[at], index_dims[index_at])
    kept = []
    for at, (dim, size) in enumerate(zip(x.dims, e.in_shapes[0], strict=True)):
        if at in batch:
            continue
        whole = sizes[at] == size
        if not whole or (at in numbers.start_index_map and size > 1):
            e.block([dim], "entries of it are picked by an index")
        if at not in numbers.collapsed_slice_dims:
            whole = whole and (size == 1 or at not in numbers.start_index_map)
            kept.append(dim if whole else e.fixed(sizes[at], why="they were picked by an index")[0])
    index, window = iter(index_dims), iter(kept)
    dims = [
        next(window) if at in numbers.offset_dims else next(index) for at in range(len(e.shapes[0]))
    ]
    # Where there is no such row, it may be another number.
    filled = e.params.get("fill_value") not in (None, 0)
    return [Value(tuple(dims), OPAQUE if filled else Node("pick", (x.node,), x))]


@axis_rule("dynamic_slice")
def dynamic_slice(e: Equation) -> list[Value]:
    x, sizes = e.inputs[0], e.params["slice_sizes"]
    at = [i for i, size in enumerate(e.in_shapes[0]) if size != sizes[i]]
    value = _changed(e, x.dims, at, "a range of it is taken that depends on the data")
    return [Value(value.dims, x.node if not at else OPAQUE, x.weights)]


@axis_rule("dynamic_update_slice")
def dynamic_update_slice(e: Equation) -> list[Value]:
    x, update = e.inputs[:2]
    return [_updated(e, x, update, e.in_shapes[1], range(len(x.dims)))]


@axis_rule(*_SCATTER)
def scatter(e: Equation) -> list[Value]:
    x, _, update = e.inputs
    numbers = e.params["dimension_numbers"]
    apart = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    window = [i for i in range(len(x.dims)) if i not in apart]
    e.block([x.dims[i] for i in apart], "entries of it are written by an index")
    others = [d for i, d in enumerate(update.dims) if i not in numbers.update_window_dims]
    e.block(others, "they are written to places that depend on an index")
    picked = Value(tuple(update.dims[i] for i in numbers.update_window_dims))
    shape = [e.in_shapes[2][i] for i in numbers.update_window_dims]
    moved = {*numbers.scatter_dims_to_operand_dims}
    return [_updated(e, x, picked, shape, window, moved)]


def _updated(
    e: Equation,
    x: Value,
    update: Value,
    shape: Sequence[int],
    at: Sequence[int],
    moved: set[int] | None = None,
) -> Value:
    """`x` with a window written over; only where that is as wide as `x` is it the same axis."""
    dims = list(x.dims)
    for dim, size, i in zip(update.dims, shape, at, strict=True):
        whole = size == e.in_shapes[0][i]
        if whole and size > 1 and not (moved and i in moved):
            dims[i] = e.same(dims[i], dim)
        elif size != 1 or not whole:
            why = "a range of it is written over"
            e.block([dims[i], dim], why)
            dims[i] = e.fixed(e.in_shapes[0][i], why=why)[0]
    return Value(tuple(dims))


# --- sums -------------------------------------------------------------------------------------


@axis_rule("dot_general")
def dot_general(e: Equation) -> list[Value]:
    (left_sum, right_sum), (left_batch, right_batch) = e.params["dimension_numbers"]
    return [_contraction(e, left_sum, right_sum, left_batch, right_batch)]


def _contraction(
    e: Equation,
    left_sum: Sequence[int],
    right_sum: Sequence[int],
    left_batch: Sequence[int],
    right_batch: Sequence[int],
    right_gone: Sequence[int] = (),
) -> Value:
    a, b = e.inputs[:2]
    batch = [e.same(a.dims[i], b.dims[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    summed = [e.same(a.dims[i], b.dims[j]) for i, j in zip(left_sum, right_sum, strict=True)]
    gone = (*right_sum, *right_batch, *right_gone)
    left = [i for i in range(len(a.dims)) if i not in (*left_sum, *left_batch)]
    right = [i for i in range(len(b.dims)) if i not in gone]
    dims = (*batch, *(a.dims[i] for i in left), *(b.dims[i] for i in right))
    total = e.sum(summed, a, b, axes=(left_sum, right_sum))
    if any(summed) or (one := _scaled(e)) is None:
        return Value(dims, _sum_node(total))
    # Multiplied by ones, as einsum("bhqk,h->bhqk") does with a mask of heads.
    own = [*left_batch, *left] if one is a else [*right_batch, *[-1] * len(left), *right]
    return _moved(
        Value(one.dims, one.node, shares=one.shares), dims, {i: n for n, i in enumerate(own)}
    )


@axis_rule("ragged_dot", "ragged_dot_general")
def ragged_dot(e: Equation) -> list[Value]:
    """Experts, each on a range of the tokens; tokens must be rows of the left operand."""
    numbers = e.params["ragged_dot_dimension_numbers"]
    (left_sum, right_sum), (left_batch, right_batch) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if {*numbers.lhs_ragged_dimensions} & {*left_sum, *left_batch} or not groups:
        return e.unknown()
    e.block([e.inputs[1].dims[i] for i in groups], "each belongs to a range of the tokens")
    e.block([e.inputs[0].dims[i] for i in numbers.lhs_ragged_dimensions], "it is in ranges")
    return [_contraction(e, left_sum, right_sum, left_batch, right_batch, groups)]


@axis_rule("conv_general_dilated")
def conv_general_dilated(e: Equation) -> list[Value]:
    p, (x, kernel) = e.params, e.inputs
    if p["batch_group_count"] != 1:
        return e.unknown()
    left, right, out = (p["dimension_numbers"][i] for i in range(3))
    groups, windows = p["feature_group_count"], [e.in_shapes[1][i] for i in right[2:]]
    features, inputs, outputs = x.dims[left[1]], kernel.dims[right[1]], kernel.dims[right[0]]
    if groups > 1:
        in_group = e.reshaped([features], (groups, e.in_shapes[0][left[1]] // groups))
        out_group = e.reshaped([outputs], (groups, e.in_shapes[1][right[0]] // groups))
        features, outputs = in_group[1], (*e.same(in_group[0], out_group[0]), *out_group[1])
    e.block([kernel.dims[i] for i in right[2:]], WINDOW)
    # Of a window that reaches over the edge only a part is summed over.
    plain = not any(map(any, p["padding"])) and all(step == 1 for step in p["lhs_dilation"])
    still = plain and all(size == 1 for size in windows)
    summed = e.sum([e.same(features, inputs), *(kernel.dims[i] for i in right[2:])], x, kernel,
                   plain=plain)  # fmt: skip
    dims: list[Dim] = [()] * len(out)
    dims[out[0]], dims[out[1]] = x.dims[left[0]], outputs
    for old, new in zip(left[2:], out[2:], strict=True):
        if still and e.in_shapes[0][old] == e.shapes[0][new]:
            dims[new] = x.dims[old]
        else:
            e.block([x.dims[old]], "a convolution slides along it")
            dims[new] = e.fixed(e.shapes[0][new], why="a convolution slid along it")[0]
    return [Value(tuple(dims), _sum_node(summed))]


@axis_rule("reduce_sum")
def reduce_sum(e: Equation) -> list[Value]:
    (x,), axes = e.inputs, e.params["axes"]
    total = e.sum([x.dims[i] for i in axes], x, axes=(axes,))
    return [Value(_without(x.dims, axes), _sum_node(total))]


def _sum_node(total: Sum) -> Node:
    return Node("sum", tuple(value.node for value in total.args), total)


# --- what looks along an axis -----------------------------------------------------------------


@axis_rule("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor",
           "argmax", "argmin")  # fmt: skip
def reduce(e: Equation) -> list[Value]:
    (x,), axes = e.inputs, e.params["axes"]
    what = {"argmax": "the largest", "argmin": "the smallest"}.get(e.name, f"the {e.name[7:]}")
    e.block([x.dims[i] for i in axes], f"{what} over it is taken")
    return [Value(_without(x.dims, axes))]


@axis_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(e: Equation) -> list[Value]:
    return [_changed(e, e.inputs[0].dims, [e.params["axis"]], "it is summed up along")]


@axis_rule("sort")
def sort(e: Equation) -> list[Value]:
    dims = [e.same(*each) for each in zip(*(v.dims for v in e.inputs), strict=True)]
    value = _changed(e, dims, [e.params["dimension"]], "it is sorted")
    return [value] * len(e.inputs)


@axis_rule("top_k", "approx_top_k")
def top_k(e: Equation) -> list[Value]:
    (x,), at = e.inputs, e.params.get("axis", e.params.get("reduction_dimension", -1))
    return [_changed(e, x.dims, [at % len(x.dims)], "the largest along it are picked")] * 2


@axis_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def reduce_window(e: Equation) -> list[Value]:
    p = e.params
    if len(e.shapes) != 1:
        return e.unknown()
    still = (1, 1, 1, 1, (0, 0))
    keys = ("window_dimensions", "window_strides", "base_dilation", "window_dilation", "padding")
    at = [i for i, own in enumerate(zip(*(p[key] for key in keys), strict=True)) if own != still]
    return [_changed(e, e.inputs[0].dims, at, "a window slides along it")]


@axis_rule("fft")
def fft(e: Equation) -> list[Value]:
    (x,), count = e.inputs, len(e.params["fft_lengths"])
    at = range(len(x.dims) - count, len(x.dims))
    return [_changed(e, x.dims, at, "it is Fourier transformed")]


# --- across devices ---------------------------------------------------------------------------


@axis_rule("axis_index")
def axis_index(e: Equation) -> list[Value]:
    return [Value(())]


@axis_rule("all_gather", "all_gather_invariant")
def all_gather(e: Equation) -> list[Value]:
    (x,), at = e.inputs, e.params["all_gather_dimension"]
    devices = e.fixed(e.params["axis_size"], why="it is spread over devices")[0]
    dims = list(x.dims)
    if e.params["tiled"]:
        dims[at] = devices + dims[at]
    else:
        dims.insert(at, devices)
    return [Value(tuple(dims))]


@axis_rule("reduce_scatter", "psum_scatter")
def reduce_scatter(e: Equation) -> list[Value]:
    (x,), at = e.inputs, e.params["scatter_dimension"]
    if not e.params["tiled"]:
        return e.unknown()
    count = e.in_shapes[0][at] // max(e.shapes[0][at], 1)
    return [Value((*x.dims[:at], _local(e, x.dims[at], count), *x.dims[at + 1 :]))]


def _local(e: Equation, dim: Dim, devices: int) -> Dim:
    """What one device has of an axis that is spread over some."""
    if devices == 1:
        return dim
    front, rest = e.reshaped([dim], (devices, size_of(dim) // devices))
    e.block([front], "it is spread over devices")
    for atom in roots(front):
        atom.literal = True
    return rest


# --- calls ------------------------------------------------------------------------------------


@_call("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
       "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "call", "composite",
       "remat_opt", "custom_vmap_call")  # fmt: skip
def call(e: Equation) -> list[Value]:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if key in e.params:
            return e.walk.call(e.params[key], e.inputs, e.eqn, once=True)
    return e.unknown()


@_call("cond")
def cond(e: Equation) -> list[Value]:
    runs = [e.walk.call(branch, e.inputs[1:], e.eqn) for branch in e.params["branches"]]
    return [
        Value(
            tuple(e.same(*each) for each in zip(*(value.dims for value in values), strict=True)),
            weights=frozenset.intersection(*(value.weights for value in values)),
        )
        for values in zip(*runs, strict=True)
    ]


@_call("while")
def while_(e: Equation) -> list[Value]:
    first, second = e.params["cond_nconsts"], e.params["body_nconsts"]
    e.walk.note_other_uses(e.inputs[first + second :])
    cond_consts, rest = e.inputs[:first], e.inputs[first:]
    body_consts, carry = rest[:second], _carried(rest[second:])
    e.walk.call(e.params["cond_jaxpr"], [*cond_consts, *carry], e.eqn)
    out = e.walk.call(e.params["body_jaxpr"], [*body_consts, *carry], e.eqn)
    return _loop(e, carry, out)


@_call("scan")
def scan(e: Equation) -> list[Value]:
    consts, count = e.params["num_consts"], e.params["num_carry"]
    e.walk.note_other_uses(e.inputs[consts : consts + count])
    carry, xs = _carried(e.inputs[consts : consts + count]), e.inputs[consts + count :]
    layers = e.fixed(e.params["length"], why=SCANNED)[0]
    for x in xs:
        layers = e.same(x.dims[0], layers)
    rows = [Value(x.dims[1:], x.node, x.weights) for x in xs]
    out = e.walk.call(e.params["jaxpr"], [*e.inputs[:consts], *carry, *rows], e.eqn, around=layers)
    stacked = [Value((layers, *value.dims)) for value in out[count:]]
    return [*_loop(e, carry, out[:count]), *stacked]


def _carried(values: Sequence[Value]) -> list[Value]:
    """What is carried is another value in each round: nothing is known but its axes."""
    return [Value(tuple(map(_varied, value.dims))) for value in values]


def _varied(dim: Dim) -> Dim:
    """What begins uniform need not stay so."""
    return tuple(Atom(atom.size) if atom.uniform else atom for atom in roots(dim))


def _loop(e: Equation, before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
    return [
        Value(tuple(e.same(*pair) for pair in zip(one.dims, other.dims, strict=True)))
        for one, other in zip(before, after, strict=True)
    ]


@_call("shard_map")
def shard_map(e: Equation) -> list[Value]:
    mesh = dict(e.params["mesh"].shape)
    spread = [_spread(names, mesh) for names in e.params.get("in_specs", e.params.get("in_names"))]
    inputs = []
    for value, counts in zip(e.inputs, spread, strict=True):
        dims = tuple(_local(e, dim, counts.get(i, 1)) for i, dim in enumerate(value.dims))
        inputs.append(Value(dims, value.node, value.weights))
    before, e.walk.spread = e.walk.spread, True
    out = e.walk.call(e.params["jaxpr"], inputs, e.eqn)
    e.walk.spread = before
    counts = [
        _spread(names, mesh) for names in e.params.get("out_specs", e.params.get("out_names"))
    ]
    return [
        Value(tuple(
            e.fixed(own.get(i, 1), why="it is spread over devices")[0] + dim
            for i, dim in enumerate(value.dims)
        ))
        for value, own in zip(out, counts, strict=True)
    ]  # fmt: skip


def _spread(spec: Any, mesh: dict[Any, int]) -> dict[int, int]:
    """Over how many devices each dimension is spread: of a PartitionSpec, or of names by number."""
    pairs = spec.items() if isinstance(spec, dict) else enumerate(spec)
    counts = {}
    for at, names in pairs:
        for name in (names,) if isinstance(names, str) else names or ():
            counts[at] = counts.get(at, 1) * mesh[name]
    return counts


# --- shared -----------------------------------------------------------------------------------


def _moved(x: Value, dims: Dims, axes: Mapping[int, int] | None = None) -> Value:
    """The same entries at other places; `axes`: where each axis that is still one went."""
    axes = axes or {}
    # Shares of the whole: of all axes, or of none.
    shares = frozenset(axes[i] for i in x.shares) if x.shares <= axes.keys() else frozenset()
    return Value(dims, x.node, x.weights, shares)


def _without(dims: Dims, axes: Sequence[int]) -> Dims:
    return tuple(dim for i, dim in enumerate(dims) if i not in axes)


def _changed(e: Equation, dims: Sequence[Dim], at: Sequence[int], why: str) -> Value:
    """The dimensions, those at `at` blocked and new in the output."""
    e.block([dims[i] for i in at], why)
    return Value(tuple(
        e.fixed(e.shapes[0][i], why=why)[0] if i in at else dim for i, dim in enumerate(dims)
    ), OPAQUE)  # fmt: skip
