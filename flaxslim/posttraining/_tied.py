"""Heads that are the embedding again, which tuning must leave as they are."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxslim import _config
from flaxslim._once import once

_KEY = "tie_word_embeddings"
_HEAD = "lm_head/kernel"


def tied(leaves: Mapping[str, Any], cfg: Any) -> set[str]:
    """Paths of what is stored under another path too, or is the embedding by the config.

    The Flax classes of LLaMA and Mistral hold the head that the config ties as a tensor of its own.
    """
    backwards = dict(reversed(list(leaves.items())))
    found = leaves.keys() - (once(leaves).keys() & once(backwards).keys())
    if not (_config.has(cfg, _KEY) and _config.read(cfg, _KEY)):
        return found
    tables = [leaf for path, leaf in leaves.items() if path.endswith("/embedding")]
    heads = (path for path in leaves if path.endswith(_HEAD))
    return found | {path for path in heads if any(_is(leaves[path], x) for x in tables)}


def _is(head: Any, table: Any) -> bool:
    """Whether a head is a table transposed; of arrays that span processes nothing is known."""
    if np.shape(head) != np.shape(table)[::-1]:
        return False
    local = all(x.is_fully_addressable for x in (head, table) if isinstance(x, jax.Array))
    return local and np.array_equal(np.asarray(head).T, np.asarray(table))
