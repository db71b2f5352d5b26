"""What the inner optimizer sees and writes: zeros in place of what is dead."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxslim import _tree
from flaxslim._copies import Names, copies
from flaxslim._state_kinds import Kind
from flaxslim.training._channels import placed


def selected(living: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {path: jnp.where(mask, leaves[path], 0) for path, mask in living.items()}


def all_placed(found: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {path: placed(mask, leaves[path]) for path, mask in found.items()}


def held(
    inner: Any, leaves: Mapping[str, Any], living: Mapping[str, Any], zero: Mapping[str, Any]
) -> Any:
    """The inner state with zero wherever it follows a number of a dead channel.

    Copies of the parameters themselves (of a schedule-free optimizer) hold what is dead as it is.
    """
    own, new = _tree.flatten(inner), {}
    for copy in copies(inner, own, Names(leaves), fold=True):
        for name, path in copy.arrays(own).items():
            x = own[path]
            if name not in living or np.shape(x) != np.shape(leaves[name]):
                continue  # what an optimizer sums up over rows or columns follows no channel
            dead: Any = jnp.zeros_like(x)
            if copy.kind is Kind.PARAMETERS and name not in zero:
                dead = jnp.asarray(leaves[name]).astype(x.dtype)
            new[path] = jnp.where(living[name], x, dead)
    return _tree.replace(inner, new)


def steps_of(
    steps: dict[str, Any],
    leaves: Mapping[str, Any],
    *,
    zero: Mapping[str, Any],
    frozen: Mapping[str, Any],
    factors: Mapping[str, Any],
) -> dict[str, Any]:
    """The updates, by which what is dead becomes zero or stays, and what fades shrinks."""
    steps = dict(steps)
    for path, mask in frozen.items():
        steps[path] = jnp.where(mask, steps[path], 0)
    for path, factor in factors.items():
        p, factor = leaves[path], placed(factor, leaves[path])
        faded = ((p + steps[path]) * factor - p).astype(steps[path].dtype)
        steps[path] = jnp.where(factor < 1, faded, steps[path])
    for path, mask in zero.items():
        # In the wider of the two types, or it would not be minus what it is.
        steps[path] = jnp.where(mask, steps[path], -leaves[path])
    return steps
