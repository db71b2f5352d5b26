"""Make channels die, another random set at each site: by zero second rows, or in every way."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flaxslim._spec import Site, Tensor
from flaxslim._tree import flatten, replace


def kill(
    params: Any, sites: Sequence[Site], *, seed: int = 0, low: float = 0.3, high: float = 0.6
) -> tuple[Any, dict[str, np.ndarray]]:
    """The parameters with between `low` and `high` of each site's channels dead, and which.

    By the path of the second kernel. Only second rows are zeroed, so nothing needs to be known of
    the activation. Sites that are tied lose the same channels.
    """
    draw = _Draw(seed, low, high)
    leaves = flatten(params)
    new, dead = {}, {}
    for site in sites:
        path = site.second.path
        dead[path] = np.sort(draw(site))
        second = new.get(path, leaves[path])
        new[path] = site.second.axes.zero(second, site.pair.axis, dead[path])
    return replace(params, new), dead


class _Draw:
    """Random channels of a site, the same for sites that are tied."""

    def __init__(self, seed: int, low: float, high: float):
        self.rng, self.low, self.high = np.random.default_rng(seed), low, high
        self.tied: dict[str, np.ndarray] = {}

    def __call__(self, site: Site) -> np.ndarray:
        count = int(self.rng.uniform(self.low, self.high) * site.size)
        drawn = self.rng.permutation(site.size)[:count]
        return drawn if site.tied is None else self.tied.setdefault(site.tied, drawn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """How some channels of a site died: the one rule that can know of it, and which they are."""

    rule: str
    channels: np.ndarray


def kill_by_every_rule(
    params: Any,
    sites: Sequence[Site],
    *,
    seed: int = 0,
    low: float = 0.3,
    high: float = 0.6,
    folds: Callable[[Site], bool] = lambda site: True,
) -> tuple[Any, dict[str, tuple[Death, ...]]]:
    """As `kill`, and as many channels, which die in equal parts in every way open to the site.

    `folds` says of a site with the biases for it whether a constant may be folded there.

    Each channel is dead by one rule only, and gates rest on act(0), so that a plan which knows
    too little of a family finds too few. The leaves that change come back as numpy arrays.
    """
    draw = _Draw(seed, low, high)
    leaves = flatten(params)
    new: dict[str, np.ndarray] = {}
    deaths = {}
    for site in sites:
        for tensor in site.cut:
            new.setdefault(tensor.path, np.array(leaves[tensor.path], order="C"))
        ways = _ways(site, folds(site))
        shares = np.array_split(draw(site), len(ways))
        for way, channels in zip(ways, shares, strict=True):
            for zeroed in _zeroed(site, way, new):
                zeroed[channels] = 0
        deaths[site.second.path] = tuple(
            Death(rule=way.rule, channels=np.sort(channels))
            for way, channels in zip(ways, shares, strict=True)
        )
    return replace(params, new), deaths


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """What is zeroed for a channel to die; `columns` are parts: 0 is the gate or the only one."""

    rule: str
    rows: bool = False
    columns: tuple[int, ...] = ()
    biases: bool = True


def _ways(site: Site, folds: bool) -> tuple[_Way, ...]:
    rows = _Way(rule="i", rows=True)
    if any(size > 1 for size in site.groups):
        return (rows,)  # the values of a head are those of its group
    if site.pair.gated:
        silent = (_Way(rule="ii", columns=(1,)), _Way(rule="ii", columns=(0,)))
    else:
        silent = (_Way(rule="iii", columns=(0,)),)
    if None in site.first_biases or site.second_bias is None or not folds:
        return (rows, *silent)
    columns = (0, 1) if site.pair.gated else (0,)
    return (rows, *silent, _Way(rule="iv", columns=columns, biases=False))


def _zeroed(site: Site, way: _Way, arrays: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Views into what a way of dying zeroes, channels first."""
    if way.rows:
        yield _channels_first(site, site.second, arrays)
    biases = filter(None, site.first_biases) if way.biases else ()
    for tensors in (site.first, tuple(biases)):
        parts = list(_parts(site, tensors, arrays))
        yield from (parts[i] for i in way.columns if parts)


def _parts(
    site: Site, tensors: Iterable[Tensor], arrays: dict[str, np.ndarray]
) -> Iterator[np.ndarray]:
    """A view for each factor of the hidden value, channels first; they may share a tensor."""
    fused = site.pair.parts or ((0, 1) if site.pair.gated and len(site.first) == 1 else ())
    for tensor in tensors:
        view = _channels_first(site, tensor, arrays, fused=bool(fused))
        yield from (view[part] for part in fused) if fused else (view,)


def _channels_first(
    site: Site, tensor: Tensor, arrays: dict[str, np.ndarray], *, fused: bool = False
) -> np.ndarray:
    factors = tensor.axes.factors
    literal = [i for i, factor in enumerate(factors) if isinstance(factor, int)]
    front = (*(literal[:1] if fused else []), factors.index(site.axis(tensor)))
    view = np.moveaxis(tensor.axes.split(arrays[tensor.path]), front, range(len(front)))
    assert np.shares_memory(view, arrays[tensor.path])
    return view
