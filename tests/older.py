"""What older releases lack that the tests use: by its older name, or whether it is there."""

from typing import Any

import jax
from flax import nnx

List: Any = getattr(nnx, "List", list)  # before flax 0.12 plain lists are what it is now
data: Any = getattr(nnx, "data", lambda x: x)
set_mesh: Any = getattr(jax, "set_mesh", None) or getattr(jax.sharding, "use_mesh", None)
EXPLICIT = hasattr(jax, "set_mesh")  # meshes with explicit axes were an experiment before
