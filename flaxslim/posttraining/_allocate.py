"""How many units each site keeps: by a share of each, or by what the whole model may cost."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _widths
from flaxslim._spec import Site
from flaxslim.errors import BudgetError
from flaxslim.posttraining._budget import (
    Item,
    Unit,
    parse_bytes,
    parse_count,
    parse_ms,
    parse_speedup,
    solve,
)
from flaxslim.posttraining._rank import Ranking, count_of
from flaxslim.training._channels import together

_GRID = 48  # widths of an item that are looked at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What the whole model may cost; exactly one of these is given.

    Attributes:
      params: how many parameters, 15_000_000 or "15M".
      bytes: how many bytes they take as they are stored, or "30MB".
      flops: the share of the dense model's FLOPs on a calibration batch, 0.6.
      latency: milliseconds of one call on a batch, 4.0 or "4ms".
      speedup: how many times as fast as the dense model, 1.5 or "1.5x"; measured as latency is.
      beside: parameters (or bytes, for a budget of these) that are stored besides those that are
        pruned, and count too: second copies of an embedding in a PyTorch file.

    Raises `BudgetError` for none or several, or for a number that makes no sense.

    >>> Budget(params="15M").params
    15000000
    """

    params: int | str | None = None
    bytes: int | str | None = None
    flops: float | None = None
    latency: float | str | None = None
    speedup: float | str | None = None
    beside: int = 0

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None and k != "beside"}
        if len(given) != 1:
            raise BudgetError(
                "a budget is one number",
                seen=", ".join(f"{name}={value!r}" for name, value in given.items()) or "none",
                expected="one of params, bytes, flops, latency, speedup",
            )
        parsers = {
            "params": parse_count,
            "bytes": parse_bytes,
            "latency": parse_ms,
            "speedup": parse_speedup,
        }
        ((name, value),) = given.items()
        if name in parsers:
            object.__setattr__(self, name, parsers[name](value))
        elif not isinstance(value, int | float) or not 0 < value <= 1:
            raise BudgetError(
                "FLOPs are a share of the dense model's", seen=value, expected="above 0, up to 1"
            )


def by_share(
    sites: Sequence[Site],
    shares: float | Mapping[str, float],
    *,
    multiple_of: int | Mapping[str, int] = 1,
) -> dict[str, int]:
    """How many units stay at each site, by a share or that of its axis; one or more, rounded up."""
    counts = {}
    for site in sites:
        share = shares[site.pair.axis] if isinstance(shares, Mapping) else shares
        wish = share * count_of(site)
        numbers = allowed(site, multiple_of)
        least = min(max(1, math.ceil(wish - 1e-9)), numbers[-1])
        counts[site.second.path] = int(numbers[numbers >= least][0])
    return counts


def allowed(site: Site, multiple_of: int | Mapping[str, int]) -> np.ndarray:
    """The numbers of units that a site may keep, ascending, none left out; the last is all."""
    count, multiple = count_of(site), _widths.multiple_for(site, multiple_of)
    each = max(site.groups, default=1)
    numbers = np.arange(1, count + 1)
    return numbers[(numbers * each % multiple == 0) | (numbers == count)]


def items_of(
    rankings: Mapping[str, Ranking],
    *,
    width: str,
    multiple_of: int | Mapping[str, int],
) -> list[tuple[tuple[Site, ...], np.ndarray, np.ndarray]]:
    """What gets one number of units: (sites, numbers that are possible, error at each).

    Sites that share a width get one number under `width="uniform"`, else only those that are tied.
    Errors are those of the model's outputs, as far as the rankings know (`Ranking.effects`).
    """
    groups: dict[Any, list[Site]] = {}
    for own in together([ranking.site for ranking in rankings.values()]):
        site = own[0]
        expression = site.pair.width_expression
        shared = expression.label if expression else site.pair
        key = (shared, site.size) if width == "uniform" else site.second.path
        groups.setdefault(key, []).extend(own)
    found = []
    for own in groups.values():
        numbers = allowed(own[0], multiple_of)
        step = max(1, math.ceil(len(numbers) / _GRID))
        grid = numbers[::-step][::-1]
        errors = np.zeros(len(grid))
        for site in own:
            errors += rankings[site.second.path].effects[count_of(site) - grid]
        found.append((tuple(own), grid, errors))
    return found


def parameters_of(site: Site, itemsize: Mapping[str, int] | None = None) -> float:
    """How many parameters (or bytes) go with one unit of a site."""
    return sum(
        math.prod(t.shape) * (1 if itemsize is None else itemsize[t.path]) for t in site.cut
    ) / count_of(site)


def by_budget(
    rankings: Mapping[str, Ranking],
    *,
    limit: float,
    fixed: float,
    cost: Callable[[Site, np.ndarray], np.ndarray],
    unit: Unit,
    width: str,
    multiple_of: int | Mapping[str, int],
) -> tuple[dict[str, int], float]:
    """How many units stay at each site, and what the model then costs.

    `cost(site, numbers)` is what a site costs at each number of units, `fixed` all else. Raises
    `BudgetError` if the limit cannot be met.
    """
    made = items_of(rankings, width=width, multiple_of=multiple_of)
    items = [
        Item(
            name=own[0].second.path,
            widths=grid,
            errors=np.minimum.accumulate(errors),
            costs=np.sum([cost(site, grid) for site in own], axis=0),
        )
        for own, grid, errors in made
    ]
    picked = solve(items, limit, fixed=fixed, unit=unit)
    counts = {
        site.second.path: int(grid[i])
        for (own, grid, _), i in zip(made, picked, strict=True)
        for site in own
    }
    return counts, fixed + sum(float(item.costs[i]) for item, i in zip(items, picked, strict=True))
