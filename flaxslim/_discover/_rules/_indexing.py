"""Entries that are picked or written by an index which depends on the data."""

from collections.abc import Sequence

from flaxslim._discover._rules._table import axis_rule
from flaxslim._discover._rules._values import changed
from flaxslim._discover._trace import OPAQUE, Equation, Node, Value

SCATTER = (
    "scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max",
    "scatter_sub", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub",
)  # fmt: skip


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
    value = changed(e, x.dims, at, "a range of it is taken that depends on the data")
    return [Value(value.dims, x.node if not at else OPAQUE, x.weights)]


@axis_rule("dynamic_update_slice")
def dynamic_update_slice(e: Equation) -> list[Value]:
    x, update = e.inputs[:2]
    return [_updated(e, x, update, e.in_shapes[1], range(len(x.dims)))]


@axis_rule(*SCATTER)
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
