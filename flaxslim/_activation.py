"""Activations by their Hugging Face names or as expressions, in float64 on the host.

Only their values at single points matter here: act(0) for the rules that need a silent channel,
and act(b) for the constant that a channel with bias b and no input puts out.

An expression is arithmetic (`+ - * / **`), one comparison at a time, and functions of `x` by their
names in JAX: `"x * tanh(log1p(exp(x)))"`, `"where(x > 0, x, 0.01 * x)"`. A comparison is 1 or 0.
It is read as a tree and never run as Python.
"""

import ast
import difflib
import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from flaxslim import _config
from flaxslim.errors import ConfigError, SpecError, nearest

Activation = Callable[[np.ndarray], np.ndarray]

_erf = np.vectorize(math.erf, otypes=[np.float64])
_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # no overflow at either end


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def _elu(x: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


# The names of transformers' ACT2FN that mean the same function in Flax and in PyTorch.
ACTIVATIONS: dict[str, Activation] = {
    "celu": _elu,
    "elu": _elu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "identity": lambda x: x,
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0.0)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": _relu,
    "relu2": lambda x: _relu(x) ** 2,
    "relu6": lambda x: np.minimum(_relu(x), 6.0),
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": lambda x: np.logaddexp(x, 0.0),
    "swish": _silu,
    "tanh": np.tanh,
}


# Under these a channel's value depends on the others, so that no rule knows what it puts out.
_MIXING = re.compile(
    r"(log_?)?soft(max|min)|sparsemax|hardmax|maxout|glu|standardize|normalize|(layer|group)_?norm",
    re.IGNORECASE,
)
_MIXES = "this activation mixes the channels: without one the others have other values"
_MEND_MIXING = (
    "no channel before it can go exactly; of a gated linear unit with two layers (or halves) it is "
    'gated=True, activation="sigmoid"'
)

# The names in `jax.nn` that mean another function than they do in transformers.
_OF_JAX = {"gelu": "gelu_pytorch_tanh"}


def activation_name(where: str | None, cfg: Any, prefix: str = "") -> str | None:
    """The name of a pair's activation: given as it is, or as where the config holds it.

    `where` is a name ("relu"), a key ("config.hidden_act"), or a key and what its None stands
    for ("config.hidden_activation or gelu_pytorch_tanh"). With "jax." in front the config holds
    a name in `jax.nn`, whose gelu is the approximate one. Of several (MaxText's
    `["silu", "linear"]`) the first is meant, and the others must be linear, as they are for an up
    layer; `ConfigError` if they are not. None if it cannot be told.

    >>> activation_name("config.hidden_act", {"hidden_act": "gelu"})
    'gelu'
    >>> activation_name("jax.config.mlp_activations", {"mlp_activations": ["gelu", "linear"]})
    'gelu_pytorch_tanh'
    """
    if where is not None and where.startswith("jax."):
        name = activation_name(where.removeprefix("jax."), cfg, prefix)
        return _OF_JAX.get(name or "", name)
    if where is None or not where.startswith("config."):
        return where
    key, _, default = where.removeprefix("config.").partition(" or ")
    value = _config.read(cfg, prefix + key) if _config.has(cfg, prefix + key) else None
    if isinstance(value, list | tuple) and value:
        value, *others = value
        if any(other not in ("linear", "identity") for other in others):
            raise ConfigError(
                "more than one factor of the hidden value has an activation",
                path=prefix + key,
                seen=repr([value, *others]),
                expected=f"one, and then linear: {[value, *['linear'] * len(others)]!r}",
                mend="cut by a spec of your own without activation= and gated=: then only channels "
                "that nothing reads go",
            )
    name = value if isinstance(value, str) else default or None
    if name is not None and _MIXING.fullmatch(name):
        raise ConfigError(_MIXES, path=prefix + key, seen=repr(name), mend=_MEND_MIXING)
    return name


def activation(where: str | None, cfg: Any, prefix: str = "") -> Activation | None:
    """The function behind `activation_name`, or None if it is unknown."""
    return named(activation_name(where, cfg, prefix))


@functools.cache
def named(name: str | None) -> Activation | None:
    """The function of a name, or of an expression; None if it is unknown.

    >>> named("relu2")(np.array([3.0])), named("where(x > 1, x, -x)")(np.array([3.0, 0.5]))
    (array([9.]), array([ 3. , -0.5]))
    """
    if name is None or name in ACTIVATIONS or not is_expression(name):
        return ACTIVATIONS.get(name or "")
    try:
        return compiled(name)
    except SpecError:  # a name in a config with characters of its own: "quick-gelu"
        return None


def check(where: str | None) -> None:
    """Raise `SpecError` if the activation of a pair is misspelt, or cannot be read.

    A name of one's own may stand there, as long as no known one is to be confused with it.
    """
    if where is not None and where.startswith("jax."):
        where = where.removeprefix("jax.")
    if where is not None and where.startswith("config."):
        where = where.partition(" or ")[2] or None
    if where is None or where in ACTIVATIONS:
        return
    if _MIXING.fullmatch(where):
        raise SpecError(_MIXES, seen=f"activation={where!r}", mend=_MEND_MIXING)
    if is_expression(where):
        compiled(where)
    elif difflib.get_close_matches(where, ACTIVATIONS, cutoff=_MISSPELT):
        raise _unknown(where, where, [*ACTIVATIONS])


# --- expressions ------------------------------------------------------------------------------

_FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "abs": (1, np.abs),
    "atan": (1, np.arctan),
    "cbrt": (1, np.cbrt),
    "ceil": (1, np.ceil),
    "cos": (1, np.cos),
    "cosh": (1, np.cosh),
    "erf": (1, _erf),
    "erfc": (1, _erfc),
    "exp": (1, np.exp),
    "exp2": (1, np.exp2),
    "expm1": (1, np.expm1),
    "floor": (1, np.floor),
    "is_finite": (1, np.isfinite),
    "isnan": (1, np.isnan),
    "log": (1, np.log),
    "log1p": (1, np.log1p),
    "logaddexp": (2, np.logaddexp),
    "logistic": (1, _sigmoid),
    "maximum": (2, np.maximum),
    "minimum": (2, np.minimum),
    "round": (1, np.round),  # halves to even
    "rsqrt": (1, lambda x: 1 / np.sqrt(x)),
    "sign": (1, np.sign),
    "sin": (1, np.sin),
    "sinh": (1, np.sinh),
    "sqrt": (1, np.sqrt),
    "square": (1, np.square),
    "tan": (1, np.tan),
    "tanh": (1, np.tanh),
    "where": (3, lambda condition, a, b: np.where(condition != 0, a, b)),
}
_NUMBERS = {"inf": math.inf, "nan": math.nan, "pi": math.pi}
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_MISSPELT = 0.8  # as alike as that are "sillu" and "silu"
_ALLOWED = (
    'the name of an activation, or an expression ("x * tanh(log1p(exp(x)))") of x, numbers, '
    f"+ - * / **, one comparison at a time, and {', '.join(_FUNCTIONS)}"
)


def is_expression(name: str) -> bool:
    """Whether an activation is said by an expression, and not by a name.

    >>> is_expression("x"), is_expression("2 * x"), is_expression("gelu_new")
    (True, True, False)
    """
    return name == "x" or not name.isidentifier()


@functools.cache
def compiled(text: str) -> Activation:
    """An expression in `x` as a function of a float64 array.

    Raises `SpecError`, with what it does not know, if it cannot be read.
    """
    try:
        body = ast.parse(text.strip(), mode="eval").body
        _check(body, text)
    except (SyntaxError, ValueError, MemoryError, OverflowError, RecursionError) as error:
        raise _unreadable(text, f"{type(error).__name__}: {error}") from error

    def function(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        with np.errstate(all="ignore"):  # the branch of a `where` that is not taken may overflow
            value = _value(body, x)
        return np.array(np.broadcast_to(value, x.shape))

    return function


def _check(node: ast.expr, text: str) -> None:
    """Raise `SpecError` unless a part of an expression, and all below it, can be read."""
    match node:
        case ast.Name(id=name):
            if name != "x" and name not in _NUMBERS:
                raise _unknown(text, name, ["x", *_NUMBERS])
        case ast.Constant(value=value):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise _unreadable(text, repr(value))
            float(value)  # which no whole number beyond 1e308 is
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords):
            if name not in _FUNCTIONS:
                raise _unknown(text, name, [*_FUNCTIONS, *ACTIVATIONS])
            count = _FUNCTIONS[name][0]
            if len(arguments) != count or keywords:
                raise _unreadable(text, f"{ast.unparse(node)}; {name} takes {count} values")
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.Compare(ops=[op]) if (
            type(op) in _OPERATORS
        ):
            pass
        case _:
            if isinstance(node, ast.Call):
                node = node.func
            raise _unreadable(text, ast.unparse(node))
    for child in _operands(node):
        _check(child, text)


def _operands(node: ast.expr) -> list[ast.expr]:
    match node:
        case ast.Call(args=arguments):
            return arguments
        case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
            return [left, right]
        case ast.UnaryOp(operand=operand):
            return [operand]
        case _:
            return []


def _value(node: ast.expr, x: np.ndarray) -> Any:
    """What a part of an expression that was checked comes to, in float64."""
    operands = [_value(child, x) for child in _operands(node)]
    match node:
        case ast.Name(id=name):
            return x if name == "x" else np.float64(_NUMBERS[name])
        case ast.Constant(value=value):
            return np.float64(value)  # pyright: ignore[reportArgumentType]
        case ast.Call(func=ast.Name(id=name)):
            result = _FUNCTIONS[name][1](*operands)
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.Compare(ops=[op]):
            result = _OPERATORS[type(op)](*operands)
        case _:
            raise AssertionError(ast.dump(node))
    return np.asarray(result, np.float64)  # of bools, too


def _unknown(text: str, name: str, known: list[str]) -> SpecError:
    return SpecError(
        f"the activation of a pair names {name!r}, which is unknown",
        seen=f"activation={text!r}",
        expected=_ALLOWED,
        near=nearest(name, known),
    )


def _unreadable(text: str, what: str) -> SpecError:
    return SpecError(
        f"the activation of a pair cannot be read: {what}",
        seen=f"activation={text!r}",
        expected=_ALLOWED,
        near=nearest(text, ACTIVATIONS),
    )
