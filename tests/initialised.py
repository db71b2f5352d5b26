"""Random weights of transformers' Flax classes without a run of the model.

`FlaxBertModel(cfg)` runs the model once, op by op, and compiles each of some hundred operations on
its way: four seconds for a tiny one, and the tests make hundreds of them. Which weights they start
from is of no account, so here numpy draws them, in the shapes that the class says.
"""

import dataclasses
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import path_aware_map
from jax.core import Tracer

from flaxslim import _intercept
from flaxslim._compat import parameter_shapes

_init = nn.Module.init
_shapes: dict[Any, Any] = {}


def drawn(cls: Any, cfg: Any, *, dtype: Any = np.float32) -> Any:
    """Parameters of a class of transformers, all entries of which are normal."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), parameter_shapes(cls, cfg)
    )


def initialised_by_numpy() -> None:
    """From now on the classes of transformers are; all other modules draw their own weights."""
    nn.Module.init = init  # pyright: ignore[reportAttributeAccessIssue]


def init(self: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `nn.Module.init`: what is traced are shapes, and the same ones once."""
    if not type(self).__module__.startswith("transformers."):
        return _init(self, rngs, *args, **kwargs)
    same = _what_shapes_depend_on(self, args, kwargs)
    if same is None or (shapes := _shapes.get(same)) is None:
        shapes = jax.eval_shape(lambda rngs: _init(self, rngs, *args, **kwargs), rngs)
        if same is not None:
            _shapes[same] = shapes
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((rngs, args))):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    key = rngs["params"] if isinstance(rngs, dict) else rngs
    seed = jax.random.key_data(key).ravel().tolist()
    deviation = getattr(getattr(self, "config", None), "initializer_range", None)

    def draw(path: Any, leaf: Any) -> Any:
        rng = np.random.default_rng([*seed, zlib.crc32("/".join(path).encode())])
        return jax.device_put(_draw(path[-1], leaf, deviation, rng))

    return path_aware_map(draw, shapes)


def _what_shapes_depend_on(self: Any, args: Any, kwargs: Any) -> Any:
    """To be compared; None where that is a layout which no config says."""
    contexts = _intercept._running.stack
    if contexts and not contexts[-1].by_config:
        return None
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    if (config := fields.get("config")) is None:
        return None
    fields["config"] = config.to_json_string(use_diff=False)
    given = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), args)
    settings = len(contexts), jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return type(self), repr((fields, given, kwargs, settings))


def _draw(name: str, leaf: Any, deviation: float | None, rng: np.random.Generator) -> np.ndarray:
    if not np.issubdtype(leaf.dtype, np.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    if name in ("bias", "mean"):
        return np.zeros(leaf.shape, leaf.dtype)
    if name in ("scale", "var") or (name == "weight" and len(leaf.shape) == 1):
        return np.ones(leaf.shape, leaf.dtype)
    if deviation is None:
        inputs = math.prod(leaf.shape[:-1]) if name == "kernel" else 1
        deviation = 1 / math.sqrt(max(inputs, 1))
    return (deviation * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
