"""What older releases lack that the tests use: by its older name, or whether it is there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

List: Any = getattr(nnx, "List", list)  # before flax 0.12 plain lists are what it is now
data: Any = getattr(nnx, "data", lambda x: x)
set_mesh: Any = getattr(jax, "set_mesh", None) or getattr(jax.sharding, "use_mesh", None)
EXPLICIT = hasattr(jax, "set_mesh")  # meshes with explicit axes were an experiment before


@functools.cache
def tracers_split() -> bool:
    """Whether `x.split(2)` works under `jit`, as some classes of transformers have it."""
    try:
        jax.eval_shape(lambda x: x.split(2), jnp.zeros(2))
    except AttributeError:
        return False
    return True
