"""Follow every axis of every parameter through a jaxpr.

Each variable becomes a `Value`: its dimensions as atoms (`_atoms`), and how it came about as a
`Node`, by which `_formula` finds the activation of a pair. What a primitive does to axes is said by
the table in `_rules`; here are the walk through the equations and the calls into other jaxprs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim._discover._atoms import (
    Atom,
    Dim,
    Dims,
    Reason,
    all_roots,
    regroup,
    roots,
    take_front,
    unify,
)
from flaxslim._discover._place import Place, is_library
from flaxslim.errors import DiscoveryError


# Without a repr: nodes share others, and one written out in full fills the memory.
@dataclasses.dataclass(frozen=True, eq=False, slots=True, repr=False)
class Node:
    """How a value came about, without what only moves its entries: those share one node.

    `kind` is "param" (`data` is its path), "number" (the number), "sum" (the `Sum`), "part" (which
    `Part` of an axis was taken), "pick" (the value of which rows are picked by index), "opaque", or
    an elementwise primitive (its params).
    """

    kind: str
    args: "tuple[Node, ...]" = ()
    data: Any = None


OPAQUE = Node("opaque")


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A variable of the jaxpr.

    Attributes:
      dims: its dimensions.
      node: how it came about.
      weights: paths of parameters of which it is a view, perhaps scaled: where one of them is
        zero, so is the value.
      shares: the axes along which its entries sum to one, as those of a softmax do.
    """

    dims: Dims
    node: Node = OPAQUE
    weights: frozenset[str] = frozenset()
    shares: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """A sum over axes: a contraction of two values, or the reduction of one.

    `plain`: every entry of the output sums over the whole axis and nothing else, so that a channel
    that is constant adds a constant; not so for a convolution that pads. `axes` are those of each
    of `args`, where they are known.
    """

    dims: Dims
    args: tuple[Value, ...]
    place: Place
    order: int
    plain: bool
    axes: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One of the parts of an axis, such as gate or up; `axis` counts them."""

    index: int
    axis: Dim


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """A value that occurred, and the scanned axes around it, which it has without showing them."""

    dims: Dims
    around: Dim


class Walk:
    """The state of one walk through a jaxpr: what was seen so far."""

    def __init__(self) -> None:
        self.sums: list[Sum] = []
        self.seen: list[Seen] = []
        self.unknown: dict[str, Place] = {}
        self.uses: dict[Sum, list[str | None]] = {}  # what is added to a Sum; None: another use
        self.added: dict[str, list[Sum | None]] = {}  # to which a parameter is added; None: as well
        self.looked: list[tuple[Dim, int, Place]] = []  # axes whose entries met, and their sizes
        self.scaled: dict[Sum, list[tuple[float, Place]]] = {}  # by what a Sum is scaled
        self.order = 0
        self.spread = False  # over devices: a sum is only part of one
        self._around: Dim = ()
        self._library: Any = None  # the call into JAX's own code that is being walked

    # --- values ---------------------------------------------------------------------------

    def fixed(self, shape: Iterable[int], why: str, place: Place) -> Dims:
        """Dimensions of a value along which no index can go."""
        reason = Reason(why=why, place=place, order=self.order)
        return tuple((Atom(size, reason),) if size != 1 else () for size in shape)

    def constant(self, x: Any, place: Place) -> Value:
        """A literal, or an array that is part of the code; along an axis it may be the same."""
        shape = tuple(np.shape(x))
        if not shape:
            return Value((), _number(x))
        array = np.asarray(x) if is_readable(x) else None
        dims = []
        for axis, size in enumerate(shape):
            if size != 1 and array is not None and _is_uniform(array, axis):
                dims.append((Atom(size, uniform=True),))
            else:
                dims += self.fixed([size], "a constant in the code has an entry for each", place)
        uniform = array is not None and array.size and bool((array == array.flat[0]).all())
        return Value(tuple(dims), _number(array.flat[0]) if uniform else OPAQUE)  # pyright: ignore

    # --- the walk -------------------------------------------------------------------------

    def run(
        self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], around: Dim = ()
    ) -> list[Value]:
        """The outputs of an open jaxpr on some values; `around` are axes scanned around it."""
        from flaxslim._discover._rules import call_for, rule_for
        from flaxslim._discover._rules._looked_along import looked_along

        outer, self._around = self._around, (*self._around, *around)
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in alive(jaxpr):
            self.order += 1
            source = self._library or eqn
            place = Place(primitive=eqn.primitive.name, source=source.source_info)
            inputs = tuple(self._read(env, var, place) for var in eqn.invars)
            equation = Equation(self, eqn, inputs, place)
            if (call := call_for(equation.name)) is not None:
                outputs = call(equation)
            else:
                for at, axis in looked_along(equation):
                    dim, size = inputs[at].dims[axis], equation.in_shapes[at][axis]
                    self.looked.append((dim, size, place))
                outputs = _values_of(equation, rule_for(equation.name)(equation))
                self._note_uses(equation, outputs)
            for var, value in zip(eqn.outvars, outputs, strict=True):
                env[var] = value
                self.seen.append(Seen(value.dims, self._around))
        outputs = [self._read(env, var, Place(primitive="output")) for var in jaxpr.outvars]
        self._around = outer
        return outputs

    def _note_uses(self, e: "Equation", outputs: Sequence[Value]) -> None:
        """What becomes of a sum and of a parameter: one is added to the other, or anything else."""
        used = [v for v in e.inputs if not any(out.node is v.node for out in outputs)]
        if e.name in ("add", "add_any") and len(used) == 2:
            for total, bias in (used, used[::-1]):
                if total.node.kind == "sum" and bias.node.kind == "param" and _fits(total, bias):
                    self.uses.setdefault(total.node.data, []).append(bias.node.data)
                    self.added.setdefault(bias.node.data, []).append(total.node.data)
                    return
        self.note_other_uses(used)

    def _read(self, env: Mapping[Any, Value], var: Any, place: Place) -> Value:
        # A literal has a value; a variable has none.
        return self.constant(var.val, place) if hasattr(var, "val") else env[var]

    def call(
        self,
        closed: Any,
        args: Sequence[Value],
        eqn: Any,
        around: Dim = (),
        *,
        once: bool = False,
    ) -> list[Value]:
        """The outputs of a jaxpr that an equation calls, open or closed.

        `once`: it is run once, and what goes in and comes out is what is inside.
        """
        jaxpr = getattr(closed, "jaxpr", closed)
        outer = self._library
        # The trace of a function of JAX is cached: its lines may be those of another caller.
        if outer is None and is_library(jaxpr):
            self._library = eqn
        place = Place(primitive=eqn.primitive.name, source=(self._library or eqn).source_info)
        consts = [self.constant(x, place) for x in getattr(closed, "consts", ())]
        outputs = self.run(jaxpr, consts, args, around)
        self._library = outer
        if not once:
            # What becomes of a parameter inside is seen there.
            self.note_other_uses([*(v for v in args if v.node.kind == "sum"), *outputs])
        return outputs

    def note_other_uses(self, values: Iterable[Value]) -> None:
        """These values go where they are not followed: to an output, or round a loop."""
        for value in values:
            if value.node.kind == "sum":
                self.uses.setdefault(value.node.data, []).append(None)
            elif value.node.kind == "param":
                self.added.setdefault(value.node.data, []).append(None)


class Equation:
    """One equation, as a rule of `_rules` sees it."""

    def __init__(self, walk: Walk, eqn: Any, inputs: tuple[Value, ...], place: Place):
        self.walk, self.eqn, self.inputs, self.place = walk, eqn, inputs, place
        self.name: str = eqn.primitive.name
        self.params: Mapping[str, Any] = eqn.params

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the outputs."""
        return [tuple(getattr(var.aval, "shape", ())) for var in self.eqn.outvars]

    @property
    def in_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(getattr(var.aval, "shape", ())) for var in self.eqn.invars]

    # --- what a rule may say ------------------------------------------------------------------

    def block(self, dims: Iterable[Dim], why: str) -> None:
        """No index along these dimensions can go."""
        reason = Reason(why=why, place=self.place, order=self.walk.order)
        for atom in all_roots(dims):
            atom.block(reason)

    def fixed(self, *sizes: int, why: str) -> Dims:
        """New dimensions, along which no index can go."""
        return self.walk.fixed(sizes, why, self.place)

    def new(self, *sizes: int) -> Dims:
        """New dimensions along which all entries are the same."""
        return tuple((Atom(size, uniform=True),) if size != 1 else () for size in sizes)

    def same(self, *dims: Dim) -> Dim:
        """One axis: what goes at an index of one of these dimensions goes there in all."""
        first, *others = dims
        for other in others:
            joined = unify(first, other)
            if joined is None:
                self.block([first, other], "it is joined with an axis that is split otherwise")
            else:
                first = joined
        return first

    def sum(
        self,
        dims: Iterable[Dim],
        *args: Value,
        plain: bool = True,
        axes: Sequence[Sequence[int]] = (),
    ) -> Sum:
        """Note a sum over these dimensions, in which each index is a term of its own."""
        plain = plain and not self.walk.spread
        along = tuple(map(tuple, axes))
        total = Sum(tuple(dims), args, self.place, self.walk.order, plain, along)
        if any(total.dims):
            self.walk.sums.append(total)
        return total

    def part(self, dim: Dim, start: int, size: int, whole: int) -> tuple[Dim, Part | None]:
        """A range of an axis; and which part it is, if the axis falls into parts of its size.

        The axis becomes (parts, unit), of which only the units can be cut, in all parts alike.
        """
        if size == whole:
            return dim, None
        if not size:  # nothing of it
            return self.fixed(0, why="a range of it is taken")[0], None
        unit = math.gcd(math.gcd(start, size), whole)
        why = "a range of it is taken"
        taken = take_front(dim, whole // unit) if whole // unit <= _PARTS else None
        if taken is None:
            self.block([dim], why)
            return self.fixed(size, why=why)[0], None
        front, rest = taken
        self.block([front], "it is taken apart")
        for atom in roots(front):
            atom.literal = True
        return self._parts(size // unit) + rest, Part(
            start // unit, front
        ) if size == unit else None

    def joined(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """Axes laid end to end: an axis of (parts, unit), see `part`."""
        unit, whole = math.gcd(*sizes), sum(sizes)
        splits = [take_front(d, n // unit) for d, n in zip(dims, sizes, strict=True)]
        if whole // unit > _PARTS or None in splits:
            why = f"it is laid end to end with others, {' + '.join(map(str, sizes))}"
            self.block(dims, why)
            return self.fixed(whole, why=why)[0]
        fronts = [split[0] for split in splits if split is not None]
        self.block(fronts, "it is laid end to end with others")
        unit_dim = self.same(*(split[1] for split in splits if split is not None))
        return self._parts(whole // unit) + unit_dim

    def _parts(self, count: int) -> Dim:
        reason = Reason(
            why="each part has a meaning of its own", place=self.place, order=self.walk.order
        )
        return (Atom(count, reason, literal=True),) if count > 1 else ()

    def reshaped(self, dims: Sequence[Dim], shape: Sequence[int]) -> Dims:
        new = regroup(dims, shape)
        if new is None:
            why = "it is reshaped across the bounds of another axis"
            self.block(dims, why)
            return self.fixed(*shape, why=why)
        return new

    def unknown(self) -> list[Value]:
        """Everything that enters is blocked, and the primitive is named."""
        why = f"no rule is known for {self.name}"
        self.walk.unknown.setdefault(self.name, self.place)
        self.block([dim for value in self.inputs for dim in value.dims], why)
        return [Value(self.fixed(*shape, why=why)) for shape in self.shapes]


# No axis is taken into more parts than this: a sequence with one token cut off is not one of parts.
_PARTS = 16

# Of each output the dimensions, or a Value where more is known of it.
Rule = Callable[[Equation], Sequence[Value | Dims]]
Call = Callable[[Equation], Sequence[Value]]


def alive(jaxpr: Any) -> list[Any]:
    """The equations on which an output depends, or that have an effect."""
    needed = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    alive = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(var for var in eqn.invars if not hasattr(var, "val"))
            alive.append(eqn)
    return alive[::-1]


def _values_of(e: Equation, outputs: Any) -> list[Value]:
    """What a rule, perhaps a user's own, returns: for each output a Value, or its dimensions."""
    found = outputs if isinstance(outputs, list | tuple) else ()
    values = [value if isinstance(value, Value) else Value(tuple(value)) for value in found]
    if [len(value.dims) for value in values] != [len(shape) for shape in e.shapes]:
        raise DiscoveryError(
            f"the rule for {e.name} does not return the dimensions of each output",
            seen=[len(value.dims) for value in values] or type(outputs).__name__,
            expected=f"a list of {len(e.shapes)}, with as many dimensions as the shapes {e.shapes}",
            mend="correct the function under @axis_rule",
        )
    return values


def _fits(total: Value, bias: Value) -> bool:
    """Whether a bias lies along what a parameter's factor of a sum puts out, and nothing else."""
    if not total.dims or len(total.dims) != len(bias.dims):
        return False
    wide = [any(not atom.uniform for atom in roots(dim)) for dim in bias.dims]
    along = [roots(dim) for dim, own in zip(total.dims, wide, strict=True) if own]
    weights = [arg for arg in total.node.data.args if arg.weights]
    outs = [[roots(dim) for dim in arg.dims] for arg in weights]
    return any(along == [dim for dim in out if dim in along] for out in outs)


def _number(x: Any) -> Node:
    if is_readable(x) and np.asarray(x).dtype.kind in "biuf":
        return Node("number", data=float(np.asarray(x)))
    return OPAQUE


def is_readable(x: Any) -> bool:
    """Whether it has entries to look at: random keys have none."""
    dtype = getattr(x, "dtype", None)
    return dtype is None or not jnp.issubdtype(dtype, jax.dtypes.extended)


def _is_uniform(array: np.ndarray, axis: int) -> bool:
    first = array.take([0], axis=axis) if array.shape[axis] else array
    return bool((array == first).all())
