"""Whether an argument is a number at all, before it is compared with one."""

import numbers
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

MOST_SEED = 2**63 - 1  # JAX takes no more bits


def is_number(value: Any) -> bool:
    """A real number, of Python, numpy, or an array without dimensions; True is none, nor is NaN.

    >>> [is_number(x) for x in (0.5, 3, np.array(0.5), "0.5", True, None, float("nan"))]
    [True, True, True, False, False, False, False]
    """
    value = _one(value)
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def is_whole(value: Any) -> bool:
    """A whole number, of Python or numpy; True is none.

    >>> [is_whole(x) for x in (3, 3.0, "3", True)]
    [True, False, False, False]
    """
    value = _one(value)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _one(value: Any) -> Any:
    """What an array without dimensions holds; anything else as it is."""
    array = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)
    return value.item() if array and not value.shape else value
