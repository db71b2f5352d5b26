"""Run a traced function with channels of some groups cut out, in float64 on the host.

`discover` says which axes of which parameters can be cut together. The class that was traced can
often not be built at such widths: its own sizes are in its code. Its jaxpr can be run at them. Each
equation is evaluated in numpy, with the sizes in its parameters replaced by those that the atoms of
its output have after the cut, and the outcome is checked to have the shape that the atoms say.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy_jaxpr import ELEMENTWISE
from strategies import enable_x64

from flaxslim._discover._atoms import Atom, Dim, Dims, roots
from flaxslim._discover._function import Walked
from flaxslim._discover._groups import Group
from flaxslim._discover._place import Place
from flaxslim._discover._rules._elementwise import IDENTITY
from flaxslim._discover._rules._table import CALLS
from flaxslim._discover._trace import Seen, Walk, alive
from flaxslim._jaxpr import scan_counts

Kept = Mapping[Atom, np.ndarray]  # which indices of a class of axes are left


@dataclasses.dataclass(frozen=True, eq=False)
class Array:
    """A value of the cut function: its entries, and its dimensions as the walk saw them."""

    x: np.ndarray
    dims: Dims


# --- the jaxpr with the dimensions of all values ----------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    eqn: Any
    dims: tuple[Dims, ...]
    inner: "tuple[Block, ...]"


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    jaxpr: Any
    consts: tuple[Any, ...]
    steps: tuple[Step, ...]


def annotated(walked: Walked) -> Block:
    """The jaxpr with the dimensions of each output, in the order in which the walk saw them."""
    seen = iter(walked.walk.seen)
    block = _block(walked.closed, seen)
    assert next(seen, None) is None, "the walk saw more than there is"
    return block


def _block(closed: Any, seen: Iterator[Seen]) -> Block:
    jaxpr = getattr(closed, "jaxpr", closed)
    steps = []
    for eqn in alive(jaxpr):
        inner = tuple(_block(body, seen) for body in _bodies(eqn))
        steps.append(Step(eqn, tuple(next(seen).dims for _ in eqn.outvars), inner))
    return Block(jaxpr, tuple(getattr(closed, "consts", ())), tuple(steps))


def _bodies(eqn: Any) -> Sequence[Any]:
    """The jaxprs of an equation, in the order in which the walk goes through them."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return params["branches"]
    if name == "while":
        return params["cond_jaxpr"], params["body_jaxpr"]
    if name not in CALLS:
        return ()
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
    return [next(params[key] for key in keys if key in params)]


# --- parameters -------------------------------------------------------------------------------


def zeroed(
    params: Mapping[str, np.ndarray], groups: Sequence[Group], kept: Kept
) -> dict[str, np.ndarray]:
    """The parameters with what reads the channels set to zero at those that are not kept."""
    new = {path: np.array(x) for path, x in params.items()}
    for group in groups:
        gone = np.setdiff1d(np.arange(group.size), kept[group.atom])
        for member in group.members:
            if member.path in group.seconds:
                view, at = _split(new, group, member.path, member.dimension, member.factor)
                view[(slice(None),) * at + (gone,)] = 0
    return new


def _split(
    params: Mapping[str, np.ndarray], group: Group, path: str, dimension: int, factor: int
) -> tuple[np.ndarray, int]:
    """A view of a tensor with a dimension split into its factors, and where the axis is in it."""
    x, sizes = params[path], [atom.size for atom in group.factors[path, dimension]]
    view = x.view()
    view.shape = (*x.shape[:dimension], *sizes, *x.shape[dimension + 1 :])
    return view, dimension + factor


def cut(x: np.ndarray, dims: Dims, kept: Kept) -> np.ndarray:
    """A tensor with what is not kept taken out along all of its axes."""
    for number, dim in enumerate(dims):
        atoms = roots(dim)
        for factor, atom in enumerate(atoms):
            if atom in kept:
                sizes = [_size(a, kept) if a in atoms[:factor] else a.size for a in atoms]
                y = x.reshape(*x.shape[:number], *sizes, *x.shape[number + 1 :])
                y = np.take(y, kept[atom], axis=number + factor)
                x = y.reshape(*x.shape[:number], -1, *x.shape[number + 1 :])
    return x


# --- the run ----------------------------------------------------------------------------------


def run(
    walked: Walked,
    params: Mapping[str, np.ndarray],
    inputs: Sequence[np.ndarray],
    kept: Kept | None = None,
    block: Block | None = None,
) -> list[np.ndarray]:
    """The outputs of the function on these parameters, from which all but `kept` was cut."""
    kept = kept or {}
    args = [
        Array(cut(_wide(params[path]), dims, kept), dims)
        for path in walked.function.params
        for dims in [walked.dims.get(path) or _fixed(np.shape(params[path]))]
    ]
    args += [Array(_wide(x), _fixed(np.shape(x))) for x in inputs]
    with np.errstate(all="ignore"):  # a case that is not selected may be log(0)
        return [out.x for out in _run(block or annotated(walked), args, kept)]


def _run(block: Block, args: Sequence[Array], kept: Kept) -> list[Array]:
    env: dict[Any, Array] = {}
    env.update(zip(block.jaxpr.constvars, map(_constant, block.consts), strict=True))
    env.update(zip(block.jaxpr.invars, args, strict=True))

    def read(var: Any) -> Array:
        return _constant(var.val) if hasattr(var, "val") else env[var]

    for step in block.steps:
        outs = _step(step, [read(var) for var in step.eqn.invars], kept)
        for var, x, dims in zip(step.eqn.outvars, outs, step.dims, strict=True):
            shape = _shape(dims, kept)
            x, kind = np.asarray(x), np.dtype(_dtype(var.aval.dtype)).kind
            assert (x.shape, x.dtype.kind) == (shape, kind), step.eqn
            env[var] = Array(x, dims)
    return [read(var) for var in block.jaxpr.outvars]


def _step(step: Step, args: list[Array], kept: Kept) -> Sequence[Any]:
    name = step.eqn.primitive.name
    if name in _LOOPS:
        return _LOOPS[name](step, args, kept)
    if step.inner:
        (block,) = step.inner
        return [array.x for array in _run(block, args, kept)]
    op = Op(step, args, kept)
    if name in ELEMENTWISE:
        return [ELEMENTWISE[name](*op.aligned())]
    if name in _RULES:
        return _RULES[name](op)
    if name in IDENTITY:
        return [array.x for array in args]
    return _by_jax(step.eqn, [array.x for array in args], {})


def _by_jax(eqn: Any, args: Sequence[Any], changed: Mapping[str, Any]) -> list[np.ndarray]:
    """The equation as JAX evaluates it, in float64."""
    params = {**eqn.params, **changed}
    if "preferred_element_type" in params:
        params["preferred_element_type"] = None
    with enable_x64():
        outs = eqn.primitive.bind(*map(jax.numpy.asarray, args), **params)
        return [np.asarray(x) for x in (outs if eqn.primitive.multiple_results else [outs])]


def _constant(x: Any) -> Array:
    """With its axes along which it is the same everywhere, as the walk reads it."""
    return Array(_wide(x), Walk().constant(x, Place(primitive="constant")).dims)


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64) if jax.numpy.issubdtype(x.dtype, np.floating) else x


def _fixed(shape: Sequence[int]) -> Dims:
    return tuple((Atom(size),) if size != 1 else () for size in shape)


# --- sizes ------------------------------------------------------------------------------------


def _size(atom: Atom, kept: Kept) -> int:
    return len(kept[atom]) if atom in kept else atom.size


def _length(dim: Dim, kept: Kept) -> int:
    return math.prod(_size(atom, kept) for atom in roots(dim))


def _shape(dims: Dims, kept: Kept) -> tuple[int, ...]:
    return tuple(_length(dim, kept) for dim in dims)


def _blocks(one: Dim, other: Dim) -> Iterator[tuple[list[Atom], list[Atom]]]:
    """Two dimensions of one size in pieces of one size, as finely as both are split."""
    left, right = roots(one)[::-1], roots(other)[::-1]
    while left:
        own, others = [left.pop()], [right.pop()]
        while (a := math.prod(x.size for x in own)) != (b := math.prod(x.size for x in others)):
            own, others = (own, [*others, right.pop()]) if a > b else ([*own, left.pop()], others)
        yield own, others


def _fit(array: Array, axis: int, target: Dim, kept: Kept) -> Array:
    """Where all entries are the same along an axis, as many as the axis has that it meets."""
    dim = array.dims[axis]
    if _length(dim, kept) == _length(target, kept) or not roots(dim):
        return array
    own, new = [], []
    for mine, theirs in _blocks(dim, target):
        own.append(math.prod(_size(a, kept) for a in mine))
        new.append(math.prod(_size(a, kept) for a in theirs))
        assert own[-1] == new[-1] or all(a.uniform for a in mine), "axes of two sizes meet"
    shape = array.x.shape
    y = array.x.reshape(*shape[:axis], *own, *shape[axis + 1 :])
    y = y[(slice(None),) * axis + tuple(slice(n) for n in new)]
    y = y.reshape(*shape[:axis], math.prod(new), *shape[axis + 1 :])
    return Array(y, (*array.dims[:axis], target, *array.dims[axis + 1 :]))


class Op:
    """An equation on arrays that were cut."""

    def __init__(self, step: Step, args: list[Array], kept: Kept):
        self.eqn, self.params, self.dims = step.eqn, step.eqn.params, step.dims
        self.args, self.kept = args, kept

    @property
    def x(self) -> np.ndarray:
        return self.args[0].x

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output after the cut."""
        return _shape(self.dims[0], self.kept)

    @property
    def old(self) -> tuple[int, ...]:
        """The shape of the first input before the cut."""
        return self.eqn.invars[0].aval.shape

    def aligned(self) -> list[np.ndarray]:
        """The inputs of an operation on each entry by itself."""
        arrays = []
        for array in self.args:
            for axis in range(array.x.ndim):
                array = _fit(array, axis, self.dims[0][axis], self.kept)
            arrays.append(array.x)
        return arrays

    def fitted(self, number: int, axis: int, other: Dim) -> None:
        self.args[number] = _fit(self.args[number], axis, other, self.kept)

    def met(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """Axis of one input and axis of another are the same."""
        (i, a), (j, b) = one, other
        for mine, theirs in ((one, other), (other, one)):
            dim = self.args[mine[0]].dims[mine[1]]
            if any(atom.uniform for atom in roots(dim)):
                self.fitted(*mine, self.args[theirs[0]].dims[theirs[1]])
        assert self.args[i].x.shape[a] == self.args[j].x.shape[b]

    def scaled(self, axis: int, size: int) -> int:
        """A place or a size along an axis of the first input, after the cut."""
        return size * self.x.shape[axis] // self.old[axis] if self.old[axis] else size


# --- operations -------------------------------------------------------------------------------


def _dtype(dtype: Any) -> Any:
    return np.float64 if jax.numpy.issubdtype(dtype, np.floating) else dtype


def _broadcast(op: Op) -> list[Any]:
    shape = [1] * len(op.shape)
    for size, at in zip(op.x.shape, op.params["broadcast_dimensions"], strict=True):
        shape[at] = size
    return [np.broadcast_to(op.x.reshape(shape), op.shape)]


def _iota(op: Op) -> list[Any]:
    shape, at = op.shape, op.params["dimension"]
    counted = np.arange(shape[at], dtype=_dtype(op.params["dtype"]))
    return [np.broadcast_to(counted.reshape([-1 if i == at else 1 for i in range(len(shape))]),
                            shape)]  # fmt: skip


def _slice(op: Op) -> list[Any]:
    p = op.params
    strides = p["strides"] or (1,) * op.x.ndim
    where = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [op.x[tuple(
        slice(op.scaled(i, start), op.scaled(i, limit), stride)
        for i, (start, limit, stride) in enumerate(where)
    )]]  # fmt: skip


def _split_up(op: Op) -> list[Any]:
    axis = op.params["axis"]
    ends = np.cumsum([op.scaled(axis, int(size)) for size in op.params["sizes"]])
    return np.split(op.x, ends[:-1], axis=axis)


def _concatenate(op: Op) -> list[Any]:
    at = op.params["dimension"]
    _fit_others(op, at)
    return [np.concatenate([array.x for array in op.args], axis=at)]


def _stack(op: Op) -> list[Any]:
    rest = [dim for i, dim in enumerate(op.dims[0]) if i != op.params["axis"]]
    for number, array in enumerate(op.args):
        for axis in range(array.x.ndim):
            op.fitted(number, axis, rest[axis])
    return [np.stack([array.x for array in op.args], axis=op.params["axis"])]


def _unstack(op: Op) -> list[Any]:
    return list(np.moveaxis(op.x, op.params["axis"], 0))


def _fit_others(op: Op, at: int) -> None:
    for number, array in enumerate(op.args):
        for axis in range(array.x.ndim):
            if axis != at:
                op.fitted(number, axis, op.dims[0][axis])


def _dot(op: Op) -> list[Any]:
    (left, right), (left_batch, right_batch) = op.params["dimension_numbers"]
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        op.met((0, i), (1, j))
    a, b = (array.x for array in op.args)
    free_a = [i for i in range(a.ndim) if i not in (*left, *left_batch)]
    free_b = [i for i in range(b.ndim) if i not in (*right, *right_batch)]
    batch = [a.shape[i] for i in left_batch]
    summed = math.prod(a.shape[i] for i in left)
    one = a.transpose(*left_batch, *free_a, *left).reshape(*batch, -1, summed)
    two = b.transpose(*right_batch, *right, *free_b).reshape(*batch, summed, -1)
    shape = [*batch, *(a.shape[i] for i in free_a), *(b.shape[i] for i in free_b)]
    return [(one @ two).reshape(shape)]


def _conv(op: Op) -> list[Any]:
    left, right, _ = (op.params["dimension_numbers"][i] for i in range(3))
    if op.params["feature_group_count"] == 1:
        op.met((0, left[1]), (1, right[1]))
    x, kernel = (array.x for array in op.args)
    groups = x.shape[left[1]] // max(kernel.shape[right[1]], 1)
    return _by_jax(op.eqn, (x, kernel), {"feature_group_count": groups})


def _gather(op: Op) -> list[Any]:
    """Each slice by index arrays; an index outside is clipped, and in a fill it would be NaN."""
    numbers, indices = op.params["dimension_numbers"], op.args[1].x
    batch = dict(zip(getattr(numbers, "operand_batching_dims", ()),
                     getattr(numbers, "start_indices_batching_dims", ()), strict=True))  # fmt: skip
    for at, other in batch.items():
        op.met((0, at), (1, other))
    x, indices = op.x, op.args[1].x
    sizes = [
        x.shape[i] if size == op.old[i] else size for i, size in enumerate(op.params["slice_sizes"])
    ]
    outer = indices.ndim - 1
    gone = {*numbers.collapsed_slice_dims, *batch}
    window = [i for i in range(x.ndim) if i not in gone]
    picks = []
    for i in range(x.ndim):
        start = np.zeros(indices.shape[:-1], np.int64)
        if i in numbers.start_index_map:
            start = indices[..., numbers.start_index_map.index(i)]
            start = np.clip(start, 0, x.shape[i] - sizes[i])
        elif i in batch:
            shape = [-1 if j == batch[i] else 1 for j in range(outer)]
            start = start + np.arange(x.shape[i]).reshape(shape)
        start = start.reshape(*start.shape, *[1] * len(window))
        if i in window:
            shape = [-1 if j == window.index(i) else 1 for j in range(len(window))]
            start = start + np.arange(sizes[i]).reshape([1] * outer + shape)
        picks.append(start)
    y = x[tuple(picks)]
    return [np.moveaxis(y, range(outer, y.ndim), numbers.offset_dims)]


def _dynamic_slice(op: Op) -> list[Any]:
    where = []
    for i, (start, size) in enumerate(zip(op.args[1:], op.params["slice_sizes"], strict=True)):
        size = op.x.shape[i] if size == op.old[i] else size
        first = int(np.clip(start.x, 0, op.x.shape[i] - size))
        where.append(slice(first, first + size))
    return [op.x[tuple(where)]]


def _over_axes(reduce: Any) -> Callable[[Op], list[Any]]:
    return lambda op: [reduce(op.x, axis=tuple(op.params["axes"]))]


def _cumsum(op: Op) -> list[Any]:
    axis, back = op.params["axis"], op.params["reverse"]
    y = np.flip(op.x, axis) if back else op.x
    y = np.cumsum(y, axis=axis, dtype=op.x.dtype)
    return [np.flip(y, axis) if back else y]


_RULES: Mapping[str, Callable[[Op], Sequence[Any]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": lambda op: [op.x.astype(_dtype(op.params["new_dtype"]))],
    "cumsum": _cumsum,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": lambda op: [op.x.reshape(op.shape)],
    "gather": _gather,
    "integer_pow": lambda op: [op.x ** op.params["y"]],
    "iota": _iota,
    "argmax": lambda op: [np.argmax(op.x, axis=op.params["axes"][0]).astype(np.int32)],
    "reduce_and": _over_axes(np.all),
    "reduce_max": _over_axes(np.max),
    "reduce_min": _over_axes(np.min),
    "reduce_or": _over_axes(np.any),
    "reduce_prod": _over_axes(np.prod),
    "reduce_sum": _over_axes(np.sum),
    "reshape": lambda op: [op.x.reshape(op.shape)],
    "rev": lambda op: [np.flip(op.x, op.params["dimensions"])],
    "slice": _slice,
    "split": _split_up,
    "squeeze": lambda op: [op.x.reshape(op.shape)],
    "stack": _stack,
    "tile": lambda op: [np.tile(op.x, op.params["reps"])],
    "transpose": lambda op: [op.x.transpose(op.params["permutation"])],
    "unstack": _unstack,
}


# --- loops ------------------------------------------------------------------------------------


def _carried(args: Sequence[Array], step: Step, kept: Kept) -> list[Array]:
    """What goes in first, as wide as what comes out."""
    carry = []
    for array, dims in zip(args, step.dims, strict=False):
        for axis, dim in enumerate(dims):
            array = _fit(array, axis, dim, kept)
        carry.append(Array(array.x, dims))
    return carry


def _cond(step: Step, args: list[Array], kept: Kept) -> Sequence[Any]:
    branch = int(np.clip(int(args[0].x), 0, len(step.inner) - 1))
    outs = _run(step.inner[branch], args[1:], kept)
    return [array.x for array in _carried(outs, step, kept)]


def _while(step: Step, args: list[Array], kept: Kept) -> Sequence[Any]:
    first, second = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
    tests, consts = args[:first], args[first : first + second]
    carry = _carried(args[first + second :], step, kept)
    cond, body = step.inner
    while bool(_run(cond, [*tests, *carry], kept)[0].x):
        carry = _carried(_run(body, [*consts, *carry], kept), step, kept)
    return [array.x for array in carry]


def _scan(step: Step, args: list[Array], kept: Kept) -> Sequence[Any]:
    p = step.eqn.params
    consts, count = scan_counts(p)
    carry = _carried(args[consts : consts + count], step, kept)
    rows, outs = args[consts + count :], []
    order = range(p["length"])
    for i in reversed(order) if p["reverse"] else order:
        row = [Array(array.x[i], array.dims[1:]) for array in rows]
        out = _run(step.inner[0], [*args[:consts], *carry, *row], kept)
        carry = _carried(out[:count], step, kept)
        outs.append([array.x for array in out[count:]])
    outs = outs[::-1] if p["reverse"] else outs
    return [*(array.x for array in carry), *map(np.stack, zip(*outs, strict=True))]


_LOOPS = {"cond": _cond, "while": _while, "scan": _scan}
