"""Primitives that run jaxprs of their own."""

from collections.abc import Sequence

from flaxslim._discover._atoms import Atom, Dim, roots
from flaxslim._discover._rules._table import axis_call
from flaxslim._discover._trace import Equation, Value
from flaxslim._jaxpr import scan_counts

SCANNED = "it is scanned over"


@axis_call("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
           "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "call", "composite",
           "remat_opt", "custom_vmap_call")  # fmt: skip
def call(e: Equation) -> list[Value]:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if key in e.params:
            return e.walk.call(e.params[key], e.inputs, e.eqn, once=True)
    return e.unknown()


@axis_call("cond")
def cond(e: Equation) -> list[Value]:
    runs = [e.walk.call(branch, e.inputs[1:], e.eqn) for branch in e.params["branches"]]
    return [
        Value(
            tuple(e.same(*each) for each in zip(*(value.dims for value in values), strict=True)),
            weights=frozenset.intersection(*(value.weights for value in values)),
        )
        for values in zip(*runs, strict=True)
    ]


@axis_call("while")
def while_(e: Equation) -> list[Value]:
    first, second = e.params["cond_nconsts"], e.params["body_nconsts"]
    e.walk.note_other_uses(e.inputs[first + second :])
    cond_consts, rest = e.inputs[:first], e.inputs[first:]
    body_consts, carry = rest[:second], _carried(rest[second:])
    e.walk.call(e.params["cond_jaxpr"], [*cond_consts, *carry], e.eqn)
    out = e.walk.call(e.params["body_jaxpr"], [*body_consts, *carry], e.eqn)
    return _loop(e, carry, out)


@axis_call("scan")
def scan(e: Equation) -> list[Value]:
    consts, count = scan_counts(e.params)
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
