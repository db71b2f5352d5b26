"""A function of the first layers as an expression, and which activation it is.

It is recognised by its values as one with a name, or is written out:
`"x * tanh(log1p(exp(x)))"`.
"""

import ast
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.lax import RoundingMethod

from flaxslim._activation import ACTIVATIONS, compiled
from flaxslim._discover._atoms import Dim
from flaxslim._discover._trace import Node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The output of a first layer: of a fused one, its part; with the bias that is added to it.

    `parts` is the axis that counts the parts.
    """

    path: str
    part: int | None = None
    bias: str | None = None
    parts: Dim = dataclasses.field(default=(), compare=False, repr=False)


class UnclearError(Exception):
    """A value is no function of the first layers alone."""


# A call of a primitive on others, the output of a first layer, or a number.
Tree = tuple[object, ...] | Source | float

BINARY: Mapping[str, type[ast.operator]] = {
    "add": ast.Add, "add_any": ast.Add, "sub": ast.Sub, "mul": ast.Mult, "div": ast.Div,
    "pow": ast.Pow,
}  # fmt: skip
COMPARE: Mapping[str, type[ast.cmpop]] = {
    "lt": ast.Lt, "le": ast.LtE, "gt": ast.Gt, "ge": ast.GtE, "eq": ast.Eq, "ne": ast.NotEq,
}  # fmt: skip
CALLS = {name: name for name in (
    "abs", "atan", "cbrt", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "floor",
    "is_finite", "log", "log1p", "logistic", "round", "rsqrt", "sign", "sin", "sinh", "sqrt",
    "square", "tan", "tanh",
)} | {"max": "maximum", "min": "minimum"}  # fmt: skip
SIZE = 200  # of a formula, in operations


def symbols(tree: Tree) -> set[Source]:
    return {one for one in _leaves(tree) if isinstance(one, Source)}


def _leaves(tree: Tree) -> Iterator[Source | float]:
    """The first layers and the numbers in a formula; what is used often is looked at once."""
    seen: set[int] = set()
    stack: list[Any] = [tree]
    while stack:
        one = stack.pop()
        if not isinstance(one, tuple):
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            stack += one[1:]


# --- which function it is ---------------------------------------------------------------------

# Those that go by several names by the one that is the best known.
_NAMES = (
    "identity", "relu", "gelu", "gelu_pytorch_tanh", "silu", "quick_gelu", "tanh", "sigmoid",
    "relu2", "relu6", "softplus",
)  # fmt: skip
# On no grid, on which what rounds would round nothing, and of all sizes.
_SIZES = np.geomspace(1.03e-9, 7.7e8, 307)
_POINTS = np.concatenate([-_SIZES, [0.0], _SIZES])


def _points(numbers: Iterable[float]) -> np.ndarray:
    """Where to look at a function with these numbers: it may change its form around each."""
    known = [abs(number) for number in numbers if number and np.isfinite(number)]
    around = [scale * x for x in known for scale in (0.5, 0.9999, 1.0, 1.0001, 2.0)]
    return np.concatenate([_POINTS, around, np.negative(around)])


def named(tree: Tree, names: Mapping[Source, str | float]) -> str | None:
    """The name of a function, or itself as an expression in x; None if it cannot be written."""
    text = _text(tree, names)
    if text is None:
        return None
    points = _points(_numbers(tree))
    values = compiled(text)(points)
    with np.errstate(all="ignore"):  # of some, -1.8e308 times nothing
        return next((n for n in _NAMES if _close(values, ACTIVATIONS[n](points), points)), text)


def _close(one: np.ndarray, other: np.ndarray, points: np.ndarray) -> bool:
    """Whether they are one function, whose constants a program has rounded to float32."""
    zero = points == 0  # a channel is silent only where this is exactly zero
    return bool(
        np.array_equal(one[zero] == 0, other[zero] == 0)
        and np.allclose(one, other, rtol=3e-6, atol=1e-9, equal_nan=True)
    )


def is_linear(tree: Tree, gate: Source, up: Source) -> bool:
    """Whether a function of two values is a function of the first, times the second."""
    points = _points(_numbers(tree))
    one = _values(tree, {gate: "x", up: 1.0}, points)
    if one is None or not _is_product(tree, gate, up, bool(one[points == 0].any())):
        return False
    for factor in (-2.317, 0.7143, 11.083, -3.1e5, *points[len(_POINTS) :]):
        value = _values(tree, {gate: "x", up: float(factor)}, points)
        with np.errstate(all="ignore"):
            expected = factor * one
        if value is None or not np.allclose(value, expected, rtol=1e-9, atol=0, equal_nan=True):
            return False
    return True


def _is_product(tree: Tree, gate: Source, up: Source, loud: bool) -> bool:
    """Whether a function is zero where one of two values is, wherever it takes the other from.

    In a formula what was moved, or averaged, is the same value, and h - h.T is nothing. `loud`: it
    is not zero where the gate is, nor claimed to be.
    """
    pairs = [(up, gate)] if loud else [(up, gate), (gate, up)]
    for silent, other in pairs:
        points = _POINTS[np.abs(_POINTS) < 6]
        values = _values(tree, {silent: 0.0, other: _different()}, points)
        if values is None or not (np.isnan(values) | (values == 0)).all():
            return False
    return True


def _different() -> Iterator[ast.expr]:
    """Another value of x each time."""
    for number in itertools.count(1):
        yield ast.parse(f"({0.37 * number % 1 + 0.1} * x + {0.61 * number % 1})", mode="eval").body


def _numbers(tree: Tree) -> set[float]:
    return {one for one in _leaves(tree) if isinstance(one, float)}


# --- as Python --------------------------------------------------------------------------------

# What stands for a value in an expression: x, a number, or something else each time.
_Name = str | float | Iterator[ast.expr]


def _values(tree: Tree, names: Mapping[Source, _Name], points: np.ndarray) -> np.ndarray | None:
    text = _text(tree, names)
    return None if text is None else compiled(text)(points)


def _text(tree: Tree, names: Mapping[Source, _Name]) -> str | None:
    try:
        return ast.unparse(_expression(tree, names, [SIZE]))
    except UnclearError:
        return None


def _expression(tree: Tree, names: Mapping[Source, _Name], left: list[int]) -> ast.expr:
    left[0] -= 1
    if left[0] < 0:  # a value that is used often is written out each time
        raise UnclearError
    if isinstance(tree, Source):
        value = names[tree]
        if isinstance(value, Iterator):
            return next(value)
        return ast.Name(id=value) if isinstance(value, str) else _constant(value, exact=True)
    if not isinstance(tree, tuple):
        return _constant(tree)
    node = tree[0]
    assert isinstance(node, Node)
    args = [_expression(arg, names, left) for arg in tree[1:]]  # pyright: ignore
    kind = node.kind
    if kind in BINARY:
        return _folded(ast.BinOp(left=args[0], op=BINARY[kind](), right=args[1]))
    if kind in COMPARE:
        # To the last digit: on one side of a number or the other is no matter of rounding.
        args = [
            _constant(arg, exact=True) if isinstance(arg, float) else text
            for arg, text in zip(tree[1:], args, strict=True)
        ]
        return ast.Compare(left=args[0], ops=[COMPARE[kind]()], comparators=args[1:])
    if kind == "neg":
        return ast.UnaryOp(op=ast.USub(), operand=args[0])
    if kind == "integer_pow":
        return ast.BinOp(left=args[0], op=ast.Pow(), right=_constant(float(node.data["y"])))
    if kind == "select_n" and len(args) == 3:
        if _is_nan_test(args[0]):
            return args[1]
        return _called("where", [args[0], args[2], args[1]])
    if kind == "clamp":
        return _called("minimum", [_called("maximum", [args[1], args[0]]), args[2]])
    if kind == "round" and node.data["rounding_method"] != RoundingMethod.TO_NEAREST_EVEN:
        raise UnclearError
    if kind in CALLS:
        return _called(CALLS[kind], args)
    raise UnclearError


def _folded(op: ast.BinOp) -> ast.expr:
    """Without a factor of one, or a term of zero."""
    if isinstance(op.op, ast.Mult | ast.Add):
        neutral = 1 if isinstance(op.op, ast.Mult) else 0
        if _is_number(op.left, neutral):
            return op.right
        return op.left if _is_number(op.right, neutral) else op
    return op.left if isinstance(op.op, ast.Sub) and _is_number(op.right, 0) else op


def _is_number(expr: ast.expr, value: float) -> bool:
    return isinstance(expr, ast.Constant) and expr.value == value


def _is_nan_test(test: ast.expr) -> bool:
    """`x != x`, which of finite numbers is never true."""
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.NotEq):
        return False
    return ast.dump(test.left) == ast.dump(test.comparators[0])


def _called(name: str, args: list[ast.expr]) -> ast.expr:
    return ast.Call(func=ast.Name(id=name), args=args, keywords=[])


def _constant(value: float, *, exact: bool = False) -> ast.expr:
    """A number, as short as float32 can tell it, if it is one of these."""
    if not np.isfinite(value):
        return ast.Name(id="nan") if np.isnan(value) else _signed(ast.Name(id="inf"), value)
    with np.errstate(over="ignore"):
        single = np.float32(value)
    value = float(str(single)) if float(single) == value and not exact else value
    number = int(value) if value == int(value) and abs(value) < 1e6 else value
    return _signed(ast.Constant(value=abs(number)), value)


def _signed(expr: ast.expr, value: float) -> ast.expr:
    return ast.UnaryOp(op=ast.USub(), operand=expr) if value < 0 else expr
