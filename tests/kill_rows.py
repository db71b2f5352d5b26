"""Make channels die in stacked layers and experts, each row another random set; what is left then.

Where `kill` lets all rows of a site lose the same channels, here each has its own, and whole
key/value groups fall silent too.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flaxslim._spec import Site, Tensor


@dataclasses.dataclass
class Dead:
    """Which channels of a site died, `(s, f)`, and how many by each rule."""

    mask: np.ndarray
    rules: dict[str, int]


def kill_rows(
    tree: dict[str, np.ndarray], sites: Sequence[Site], rng: np.random.Generator
) -> dict[str, Dead]:
    """Let a random set of each row die, in each of the ways open to the site; in place."""
    return {site.second.path: _kill_site(tree, site, rng) for site in sites}


def _kill_site(tree: dict[str, np.ndarray], site: Site, rng: np.random.Generator) -> Dead:
    ways = _ways(site)
    dead = Dead(mask=np.zeros((site.rows, site.size), bool), rules={})
    share = rng.uniform(0.5, 1)
    for row, index in enumerate(np.ndindex(*site.stack)):
        for channel in np.flatnonzero(rng.random(site.size) < share).tolist():
            rule = str(rng.choice(ways))
            members = [channel]
            if site.groups and rule != "i":  # values belong to a group
                members = np.flatnonzero(site.owners == site.owners[channel])
            if dead.mask[row, members].any():
                continue
            _zero(tree, site, index, rule, channel, rng)
            dead.mask[row, members] = True
            dead.rules[rule] = dead.rules.get(rule, 0) + len(members)
    return dead


def _ways(site: Site) -> list[str]:
    pair = site.pair
    if pair.activation is None:
        return ["i"]
    biased = None not in (*site.first_biases, site.second_bias)
    return ["i", "ii" if pair.gated else "iii", *(["iv"] if biased else [])]


def _zero(tree, site: Site, index, rule: str, channel: int, rng: np.random.Generator) -> None:
    if rule == "i":
        by_row(tree, site, site.second)[index][channel] = 0
        return
    if site.groups:
        channel = int(site.owners[channel])
    biases = site.first_biases if rule != "iv" else ()
    zeroed = [*_parts(tree, site, site.first)], [*_parts(tree, site, biases)]
    if rule == "ii":
        part = int(rng.integers(2))
        zeroed = tuple(views[part : part + 1] for views in zeroed)
    for rows in (*zeroed[0], *zeroed[1]):
        rows[index][channel] = 0


def _parts(tree, site: Site, tensors) -> Iterator[np.ndarray]:
    parts = site.pair.parts or ((0, 1) if site.pair.gated and len(site.first) == 1 else ())
    for tensor in filter(None, tensors):
        view = by_row(tree, site, tensor, fused=bool(parts))
        yield from (view[part] for part in parts) if parts else (view,)


def by_row(tree, site: Site, tensor: Tensor, *, fused: bool = False) -> np.ndarray:
    """A view: (parts if fused,) the stack, the channels, the rest."""
    factors = tensor.axes.factors
    literal = [i for i, factor in enumerate(factors) if isinstance(factor, int)]
    stack = [factors.index(name) for name in site.second.axes.stack]
    front = [*(literal if fused else []), *stack, factors.index(site.axis(tensor))]
    view = np.moveaxis(tensor.axes.split(tree[tensor.path]), front, range(len(front)))
    assert np.shares_memory(view, tree[tensor.path])
    return view


def need(sites: Sequence[Site], dead: Mapping[str, Dead], least: int) -> int:
    """The width that the widest row of these sites needs."""
    rows = [(site, row) for site in sites for row in ~dead[site.second.path].mask]
    if not sites[0].groups:
        return max(least, *(int(row.sum()) for _, row in rows))
    counts = [[int(row[s.owners == g].sum()) for g in range(len(s.groups))] for s, row in rows]
    groups = max(least, *(sum(c > 0 for c in count) for count in counts))
    return groups * max(least, *(max(count) for count in counts))
