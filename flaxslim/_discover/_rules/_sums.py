"""Sums: contractions, convolutions, and what is summed along an axis of one array."""

from collections.abc import Sequence

from flaxslim._discover._atoms import Dim
from flaxslim._discover._rules._table import axis_rule
from flaxslim._discover._rules._values import moved, times_one, without
from flaxslim._discover._trace import Equation, Node, Sum, Value

WINDOW = "it is the window of a convolution"


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
    if any(summed) or (one := times_one(e)) is None:
        return Value(dims, _sum_node(total))
    # Multiplied by ones, as einsum("bhqk,h->bhqk") does with a mask of heads.
    own = [*left_batch, *left] if one is a else [*right_batch, *[-1] * len(left), *right]
    return moved(
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
    return [Value(without(x.dims, axes), _sum_node(total))]


def _sum_node(total: Sum) -> Node:
    return Node("sum", tuple(value.node for value in total.args), total)
