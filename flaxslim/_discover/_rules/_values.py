"""What the rules of several kinds of primitives say of a value."""

from collections.abc import Mapping, Sequence

from flaxslim._discover._atoms import Dim, Dims
from flaxslim._discover._trace import OPAQUE, Equation, Value


def moved(x: Value, dims: Dims, axes: Mapping[int, int] | None = None) -> Value:
    """The same entries at other places; `axes`: where each axis that is still one went."""
    axes = axes or {}
    # Shares of the whole: of all axes, or of none.
    shares = frozenset(axes[i] for i in x.shares) if x.shares <= axes.keys() else frozenset()
    return Value(dims, x.node, x.weights, shares)


def without(dims: Dims, axes: Sequence[int]) -> Dims:
    return tuple(dim for i, dim in enumerate(dims) if i not in axes)


def changed(e: Equation, dims: Sequence[Dim], at: Sequence[int], why: str) -> Value:
    """The dimensions, those at `at` blocked and new in the output."""
    e.block([dims[i] for i in at], why)
    return Value(tuple(
        e.fixed(e.shapes[0][i], why=why)[0] if i in at else dim for i, dim in enumerate(dims)
    ), OPAQUE)  # fmt: skip


def times_one(e: Equation) -> Value | None:
    """What is multiplied by one."""
    if e.name not in ("mul", "dot_general"):
        return None
    a, b = e.inputs
    if b.node.kind == "number" and b.node.data == 1:
        return a
    return b if a.node.kind == "number" and a.node.data == 1 else None
