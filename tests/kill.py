"""Make channels die: zero rows of the second layers, another random set at each site."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxslim._spec import Site
from flaxslim._tree import flatten, replace


def kill(
    params: Any, sites: Sequence[Site], *, seed: int = 0, low: float = 0.3, high: float = 0.6
) -> tuple[Any, dict[str, np.ndarray]]:
    """The parameters with between `low` and `high` of each site's channels dead, and which."""
    rng = np.random.default_rng(seed)
    leaves = flatten(params)
    new, dead = {}, {}
    for site in sites:
        count = int(rng.uniform(low, high) * site.size)
        dead[site.root] = np.sort(rng.permutation(site.size)[:count])
        second = new.get(site.second.path, leaves[site.second.path])
        new[site.second.path] = site.second.axes.zero(second, site.pair.axis, dead[site.root])
    return replace(params, new), dead
