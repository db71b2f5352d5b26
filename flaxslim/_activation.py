"""Activations by their Hugging Face names, in float64 on the host.

Only their values at single points matter here: act(0) for the rules that need a silent channel,
and act(b) for the constant that a channel with bias b and no input puts out.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from flaxslim import _config

Activation = Callable[[np.ndarray], np.ndarray]

_erf = np.vectorize(math.erf, otypes=[np.float64])


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


# The names of transformers' ACT2FN that mean the same function in Flax and in PyTorch.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "identity": lambda x: x,
    "linear": lambda x: x,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": _relu,
    "relu2": lambda x: _relu(x) ** 2,
    "relu6": lambda x: np.minimum(_relu(x), 6.0),
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": lambda x: np.logaddexp(x, 0.0),
    "swish": _silu,
    "tanh": np.tanh,
}


# The names in `jax.nn` that mean another function than they do in transformers.
_OF_JAX = {"gelu": "gelu_pytorch_tanh"}


def activation_name(where: str | None, cfg: Any, prefix: str = "") -> str | None:
    """The name of a pair's activation: given as it is, or as where the config holds it.

    `where` is a name ("relu"), a key ("config.hidden_act"), or a key and what its None stands
    for ("config.hidden_activation or gelu_pytorch_tanh"). With "jax." in front the config holds
    a name in `jax.nn`, whose gelu is the approximate one. Of several (MaxText's
    `["silu", "linear"]`) the first is meant. None if it cannot be told.

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
        value = value[0]
    return value if isinstance(value, str) else default or None


def activation(where: str | None, cfg: Any, prefix: str = "") -> Activation | None:
    """The function behind `activation_name`, or None if it is unknown."""
    return ACTIVATIONS.get(activation_name(where, cfg, prefix) or "")
