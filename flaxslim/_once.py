"""Parameters that are stored once and stand at two paths: a head tied to the embedding."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

_Key = TypeVar("_Key", bound=Hashable)


def once(leaves: Mapping[_Key, Any]) -> dict[_Key, Any]:
    """The leaves without those that are views of all of an earlier one.

    A head that PyTorch ties, and does not store, is in the Flax tree the embedding transposed. A
    vector of zeros that several layers were given is stored for each of them.

    >>> table = np.ones((3, 2))
    >>> list(once({"embedding": table, "head": table.T, "other": np.ones((3, 2))}))
    ['embedding', 'other']
    >>> zeros = np.zeros(3)
    >>> list(once({"bias": zeros, "another": zeros}))
    ['bias', 'another']
    """
    places: set[tuple[int, int]] = set()
    found = {}
    for path, leaf in leaves.items():
        place = _place(leaf)
        if place is None or place not in places:
            found[path] = leaf
        if place is not None:
            places.add(place)
    return found


def _place(leaf: Any) -> tuple[int, int] | None:
    """Where in memory a matrix of numpy is, and how much of it; None for what is elsewhere."""
    if not isinstance(leaf, np.ndarray) or not leaf.size or leaf.ndim < 2:
        return None
    return leaf.__array_interface__["data"][0], leaf.nbytes
