"""Whether an argument is a number at all, before it is compared with one."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_number(value: Any) -> bool:
    """A real number, of Python, numpy, or an array without dimensions; True is none, nor is NaN.

    >>> [is_number(x) for x in (0.5, 3, jnp.array(0.5), "0.5", True, None, float("nan"))]
    [True, True, True, False, False, False, False]
    """
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and not value.shape:
        value = value.item() if jnp.issubdtype(value.dtype, jnp.number) else None
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def is_whole(value: Any) -> bool:
    """A whole number, of Python or numpy; True is none.

    >>> [is_whole(x) for x in (3, 3.0, "3", True)]
    [True, False, False, False]
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
