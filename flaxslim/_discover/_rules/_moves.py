"""The same entries at other places."""

import dataclasses
from collections.abc import Sequence

from flaxslim._discover._atoms import Atom, roots
from flaxslim._discover._rules._table import axis_rule
from flaxslim._discover._rules._values import changed, moved, without
from flaxslim._discover._trace import OPAQUE, Equation, Node, Value


@axis_rule("transpose")
def transpose(e: Equation) -> list[Value]:
    (x,) = e.inputs
    order = e.params["permutation"]
    value = moved(x, tuple(x.dims[i] for i in order), {old: new for new, old in enumerate(order)})
    # Of queries and keys, which are one class, it could not be told any more which is which.
    last: dict[tuple[Atom, ...], int] = {}
    for i in order:
        axis = tuple(roots(x.dims[i]))
        if axis and last.setdefault(axis, i) > i:
            return [dataclasses.replace(value, node=OPAQUE)]
        last[axis] = i
    return [value]


@axis_rule("reshape")
def reshape(e: Equation) -> list[Value]:
    x, old, new = e.inputs[0], e.in_shapes[0], e.shapes[0]
    # What is behind them as well is as it was.
    kept = {at: at - len(old) + len(new) for at in x.shares if old[at:] == new[at - len(old) :]}
    return [moved(x, e.reshaped(x.dims, new), kept)]


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
    return [moved(x, tuple(dims), kept)]


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
    return [Value(without(v.dims, [at]), v.node, v.weights) for v in pieces]


@axis_rule("tile")
def tile(e: Equation) -> list[Value]:
    x, reps = e.inputs[0], e.params["reps"]
    new = e.new(*reps[len(reps) - len(x.dims) :])
    dims = tuple(count + dim for count, dim in zip(new, x.dims, strict=True))
    return [moved(x, (*e.new(*reps[: len(reps) - len(x.dims)]), *dims))]


@axis_rule("rev")
def reverse(e: Equation) -> list[Value]:
    return [changed(e, e.inputs[0].dims, e.params["dimensions"], "it is reversed")]


@axis_rule("pad")
def pad(e: Equation) -> list[Value]:
    at = [i for i, sizes in enumerate(e.params["padding_config"]) if any(sizes)]
    return [changed(e, e.inputs[0].dims, at, "it is padded")]
