"""Make channels die, another random set at each site: by zero second rows, or in every way."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flaxslim._spec import Site, Tensor
from flaxslim._tree import flatten, replace


def kill(
    params: Any, sites: Sequence[Site], *, seed: int = 0, low: float = 0.3, high: float = 0.6
) -> tuple[Any, dict[str, np.ndarray]]:
    """The parameters with between `low` and `high` of each site's channels dead, and which.

    Only second rows are zeroed, so nothing needs to be known of the activation.
    """
    rng = np.random.default_rng(seed)
    leaves = flatten(params)
    new, dead = {}, {}
    for site in sites:
        dead[site.root] = np.sort(_draw(rng, site, low, high))
        second = new.get(site.second.path, leaves[site.second.path])
        new[site.second.path] = site.second.axes.zero(second, site.pair.axis, dead[site.root])
    return replace(params, new), dead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """How some channels of a site died: the one rule that can know of it, and which they are."""

    rule: str
    channels: np.ndarray


def kill_by_every_rule(
    params: Any, sites: Sequence[Site], *, seed: int = 0, low: float = 0.3, high: float = 0.6
) -> tuple[Any, dict[str, tuple[Death, ...]]]:
    """As `kill`, and as many channels, which die in equal parts in every way open to the site.

    Each channel is dead by one rule only, and gates rest on act(0), so that a plan which knows
    too little of a family finds too few. The leaves that change come back as numpy arrays.
    """
    rng = np.random.default_rng(seed)
    leaves = flatten(params)
    new: dict[str, np.ndarray] = {}
    deaths = {}
    for site in sites:
        for tensor in site.cut:
            new.setdefault(tensor.path, np.array(leaves[tensor.path], order="C"))
        ways = _ways(site)
        shares = np.array_split(_draw(rng, site, low, high), len(ways))
        for way, channels in zip(ways, shares, strict=True):
            for zeroed in _zeroed(site, way, new):
                zeroed[channels] = 0
        deaths[site.root] = tuple(
            Death(rule=way.rule, channels=np.sort(channels))
            for way, channels in zip(ways, shares, strict=True)
        )
    return replace(params, new), deaths


def _draw(rng: np.random.Generator, site: Site, low: float, high: float) -> np.ndarray:
    count = int(rng.uniform(low, high) * site.size)
    return rng.permutation(site.size)[:count]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """What is zeroed for a channel to die; `columns` are parts: 0 is the gate or the only one."""

    rule: str
    rows: bool = False
    columns: tuple[int, ...] = ()
    biases: bool = True


def _ways(site: Site) -> tuple[_Way, ...]:
    rows = _Way(rule="i", rows=True)
    if site.pair.gated:
        silent = (_Way(rule="ii", columns=(1,)), _Way(rule="ii", columns=(0,)))
    else:
        silent = (_Way(rule="iii", columns=(0,)),)
    if None in site.first_biases or site.second_bias is None:
        return (rows, *silent)
    columns = (0, 1) if site.pair.gated else (0,)
    return (rows, *silent, _Way(rule="iv", columns=columns, biases=False))


def _zeroed(site: Site, way: _Way, arrays: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Views into what a way of dying zeroes, channels first."""
    if way.rows:
        yield from _parts(site, (site.second,), arrays, fused=False)
    fused = site.pair.gated and len(site.first) == 1
    biases = filter(None, site.first_biases) if way.biases else ()
    for tensors in (site.first, tuple(biases)):
        parts = list(_parts(site, tensors, arrays, fused=fused))
        yield from (parts[i] for i in way.columns if parts)


def _parts(
    site: Site, tensors: Iterable[Tensor], arrays: dict[str, np.ndarray], *, fused: bool
) -> Iterator[np.ndarray]:
    """A view for each part, channels first; gate and up share a tensor if `fused`."""
    for tensor in tensors:
        factors = [factor for dimension in tensor.axes.dimensions for factor in dimension]
        front = (*([factors.index(2)] if fused else []), factors.index(site.pair.axis))
        view = np.moveaxis(tensor.axes.split(arrays[tensor.path]), front, range(len(front)))
        assert np.shares_memory(view, arrays[tensor.path])
        yield from view if fused else (view,)
