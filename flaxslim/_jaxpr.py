"""What is told apart in jaxprs, in the words of each release of JAX."""

from collections.abc import Mapping
from typing import Any


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a `scan` are constants, and how many are carried; slices follow.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.ones(3)
    >>> step = lambda carry, x: (carry * w + x, carry)
    >>> jaxpr = jax.make_jaxpr(lambda xs: jax.lax.scan(step, w, xs))(jnp.ones((2, 3)))
    >>> scan_counts(jaxpr.jaxpr.eqns[-1].params)
    (1, 1)
    """
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
