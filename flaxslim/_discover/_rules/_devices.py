"""Axes that are spread over devices."""

from typing import Any

from flaxslim._discover._atoms import Dim, roots, size_of
from flaxslim._discover._rules._table import axis_call, axis_rule
from flaxslim._discover._trace import Equation, Value


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
    return [Value((*x.dims[:at], on_one_device(e, x.dims[at], count), *x.dims[at + 1 :]))]


def on_one_device(e: Equation, dim: Dim, devices: int) -> Dim:
    """What one device has of an axis that is spread over some."""
    if devices == 1:
        return dim
    front, rest = e.reshaped([dim], (devices, size_of(dim) // devices))
    e.block([front], "it is spread over devices")
    for atom in roots(front):
        atom.literal = True
    return rest


@axis_call("shard_map")
def shard_map(e: Equation) -> list[Value]:
    mesh = dict(e.params["mesh"].shape)
    spread = [_spread(names, mesh) for names in e.params.get("in_specs", e.params.get("in_names"))]
    inputs = []
    for value, counts in zip(e.inputs, spread, strict=True):
        dims = tuple(on_one_device(e, dim, counts.get(i, 1)) for i, dim in enumerate(value.dims))
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
