"""The state of `flaxslim.pruning`, and how it is saved.

It survives a resume whole or not at all: flax would restore a state into one that was made for
fewer sites and drop the others without a word, so that what is dead there trained on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import serialization
from flax.traverse_util import unflatten_dict
from jax.tree_util import DictKey

from flaxslim import _tree
from flaxslim.errors import TrainingError
from flaxslim.training._channels import whole

# What is known of the channels of each site, by the path of its second kernel.
BySite = dict[str, dict[str, jax.Array]]


class Channels(dict[str, Any]):
    """What is known of the channels of all sites, nested as their second kernels are."""


class PruningState(NamedTuple):
    """The state of `pruning`.

    Attributes:
      inner_state: of the inner optimizer.
      count: how many updates there were.
      skipped: how many scores were not finite, so that they did not count and nothing died by them.
      owed: some should have died in the last step, and no score was finite.
      channels: nested like the parameters; at the place of each second kernel `alive` (bool) and
        `score` (float32) of its channels `(s, f)`, and `gone`, how many of each row `shrink` has
        cut. With fade= also `fading` (bool).
    """

    inner_state: Any
    count: jax.Array
    skipped: jax.Array
    owed: jax.Array
    channels: Any


def by_site(channels: Any) -> BySite:
    """What is known of the channels of each site, from the nested dict of a state."""
    found: BySite = {}
    for path, leaf in _tree.flatten(channels).items():
        site, _, name = path.rpartition("/")
        found.setdefault(site, {})[name] = whole(jnp.asarray(leaf))
    return found


def nested(channels: BySite) -> Channels:
    """The inverse of `by_site`."""
    return Channels(unflatten_dict({tuple(path.split("/")): own for path, own in channels.items()}))


def _flatten(channels: Channels) -> tuple[list[Any], tuple[str, ...]]:
    keys = tuple(sorted(channels))
    return [(DictKey(key), channels[key]) for key in keys], keys


def _restored(target: Channels, saved: dict[str, Any]) -> Channels:
    expected, found = _tree.flatten(dict(target)), _tree.flatten(saved)
    if strange := sorted(expected.keys() ^ found.keys()):
        raise TrainingError(
            "the saved state of pruning is of another spec, or of other settings",
            path=strange[0],
            seen="only in what was saved" if strange[0] in found else "only in this optimizer",
            mend="resume with the spec and the settings that it was saved with",
        )
    return Channels(serialization.from_state_dict(dict(target), saved))


jax.tree_util.register_pytree_with_keys(
    Channels, _flatten, lambda keys, leaves: Channels(zip(keys, leaves, strict=True))
)
serialization.register_serialization_state(
    Channels, lambda channels: serialization.to_state_dict(dict(channels)), _restored
)
