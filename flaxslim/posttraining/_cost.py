"""What a model costs at any widths: parameters, bytes, FLOPs and milliseconds, of each site."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxslim import _mesh, _tree
from flaxslim._once import once
from flaxslim._prove import flops
from flaxslim._slim import slim
from flaxslim._spec import Site, Spec
from flaxslim.errors import BudgetError, CalibrationError
from flaxslim.posttraining import _allocate, _latency
from flaxslim.posttraining._allocate import Budget
from flaxslim.posttraining._function import function_of
from flaxslim.posttraining._kept import digest
from flaxslim.posttraining._rank import Ranking, alive_of, count_of
from flaxslim.training._channels import masks

_GRID = 6  # widths of each group that are timed
_CHECKS = 4  # widths that are tried before the nearest are taken
_NEAR = 0.02  # of the limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole model, and a batch to run it on. `model` as in `prune`."""

    model: Any
    params: Any
    cfg: Any
    spec: Spec
    batch: Any

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all that it computes: a function of the same name may be another by now."""
        fn = function_of(self.model, self.params, self.cfg)
        closed = jax.make_jaxpr(fn)(_state(self.params), self.batch)
        return digest(str(closed.jaxpr), closed.consts)

    def check_runs_smaller(self, sites: Sequence[Site]) -> None:
        """Raise `CalibrationError` if the function cannot be counted or timed at other sizes."""
        fn, params = self.at(_allocate.by_share(sites, 0.5), sites)
        try:
            jax.eval_shape(fn, params, self.batch)
        except Exception as error:
            raise CalibrationError(
                "the model cannot run smaller parameters, by which FLOPs and time are measured",
                seen=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}",
                expected="model=FlaxBertModel, a Linen module, or a function of any sizes",
                mend="pass the class or the module itself; or give a budget of parameters",
            ) from error

    def at(self, counts: Mapping[str, int], sites: Sequence[Site]) -> tuple[Any, Any]:
        """The function, and parameters, with the first units only of each site, by path."""
        zeroed = first_units(self.params, sites, counts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small, new = slim(zeroed, self.cfg, self.spec, width="per_layer")
        return function_of(self.model, small, new), _state(small)


def _state(params: Any) -> Any:
    return nnx.state(params) if isinstance(params, nnx.Module) else params


def first_units(params: Any, sites: Sequence[Site], counts: Mapping[str, int]) -> Any:
    """The parameters with only the first units of each site alive, by path; no matter which."""
    alive = {
        site.second.path: alive_of(site, [np.arange(counts[site.second.path])] * site.rows)
        for site in sites
    }
    leaves = _tree.flatten(params)
    living = masks(sites, alive, lambda site: site.reading)
    # Ones and zeros, since what is cut already may be zero, too.
    zeroed = {path: _filled(mask, leaves[path]) for path, mask in living.items()}
    return _tree.replace(params, zeroed)


def _filled(mask: Any, leaf: Any) -> Any:
    """A mask that broadcasts, in the shape and in the shards of an array."""
    shape, dtype = np.shape(leaf), leaf.dtype
    if not _mesh.on_mesh(leaf):
        return jnp.broadcast_to(mask, shape).astype(dtype)
    fill = jax.jit(
        lambda mask: jnp.broadcast_to(mask, shape).astype(dtype), out_shardings=leaf.sharding
    )
    return fill(np.asarray(mask))


def within(
    budget: Budget,
    rankings: Mapping[str, Ranking],
    whole: Whole,
    *,
    width: str,
    multiple_of: int | Mapping[str, int],
    told: Callable[[str, int, int], None],
    cache: Path | None = None,
) -> tuple[dict[str, int], dict[str, float]]:
    """How many units each site keeps so that the whole meets a budget at the least error.

    Returns the counts by path and what was asked, predicted, and is the cost of the dense model.
    Raises `BudgetError` if it cannot be met.
    """
    sites = [ranking.site for ranking in rankings.values()]
    leaves = _tree.flatten(whole.params)
    if budget.params is None and budget.bytes is None:
        whole.check_runs_smaller(sites)
    if budget.params is not None or budget.bytes is not None:
        sizes = {path: int(np.prod(np.shape(leaf))) for path, leaf in once(leaves).items()}
        widths = {path: leaf.dtype.itemsize for path, leaf in leaves.items()}
        of_bytes = budget.bytes is not None
        each = {
            site.second.path: _allocate.parameters_of(site, widths if of_bytes else None)
            for site in sites
        }
        dense = float(sum(n * widths[p] if of_bytes else n for p, n in sizes.items()))
        dense += budget.beside
        limit, unit = (
            float(budget.bytes or budget.params or 0),
            "bytes" if of_bytes else "parameters",
        )
    elif budget.flops is not None:
        each, dense = _flops(whole, sites)
        limit, unit = budget.flops * dense, "FLOPs"
    else:
        return _in_time(budget, rankings, whole, width, multiple_of, told, cache)
    gone = sum(each[site.second.path] * count_of(site) for site in sites)
    counts, cost = _allocate.by_budget(
        rankings,
        limit=limit,
        fixed=dense - gone,
        cost=lambda site, numbers: each[site.second.path] * numbers,
        unit=unit,
        width=width,
        multiple_of=multiple_of,
    )
    return counts, {"asked": limit, "predicted": cost, "dense": dense}


def _grouped(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites of one kind, which take the same time: by axis and by the shapes of their tensors."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        shapes = "/".join("x".join(map(str, t.shape)) for t in (*site.first, site.second))
        groups.setdefault(f"{site.pair.axis} {shapes}", []).append(site)
    return groups


def _counts(groups: Mapping[str, Sequence[Site]], widths: Mapping[str, int]) -> dict[str, int]:
    return {site.second.path: widths[name] for name, own in groups.items() for site in own}


def _flops(whole: Whole, sites: Sequence[Site]) -> tuple[dict[str, float], float]:
    """FLOPs of one unit of each site, and of the whole: they grow in proportion."""
    groups = _grouped(sites)
    full = {name: count_of(own[0]) for name, own in groups.items()}

    def at(widths: Mapping[str, int]) -> float:
        fn, params = whole.at(_counts(groups, widths), sites)
        found = flops(fn, params, whole.batch)
        if found is None:
            raise CalibrationError(
                "this backend does not count FLOPs",
                seen=jax.default_backend(),
                mend="give a budget of parameters, or of time",
            )
        return found

    dense, each = at(full), {}
    for name, own in groups.items():
        less = max(1, full[name] // 2)
        unit = (dense - at({**full, name: less})) / max(full[name] - less, 1) / len(own)
        each |= {site.second.path: unit for site in own}
    return each, dense


def _in_time(
    budget: Budget,
    rankings: Mapping[str, Ranking],
    whole: Whole,
    width: str,
    multiple_of: int | Mapping[str, int],
    told: Callable[[str, int, int], None],
    cache: Path | None,
) -> tuple[dict[str, int], dict[str, float]]:
    sites = [ranking.site for ranking in rankings.values()]
    groups = _grouped(sites)
    table = timetable(whole, groups, multiple_of=multiple_of, told=told, cache=cache)
    limit = budget.latency if budget.speedup is None else table.base / float(budget.speedup)
    names = {site.second.path: name for name, own in groups.items() for site in own}

    def cost(site: Site, numbers: np.ndarray) -> np.ndarray:
        name = names[site.second.path]
        return np.asarray(table.costs(name, numbers, len(groups[name])))

    full = {name: [count_of(site) for site in own] for name, own in groups.items()}
    fixed = table.predict(full) - sum(
        float(cost(site, np.array([count_of(site)]))[0]) for site in sites
    )
    limit, tried = float(limit or 0), []
    aim = limit
    # Savings do not quite add up, so widths that should do are timed together, and what the table
    # was wrong by is asked for on top.
    for _ in range(_CHECKS):
        try:
            counts, predicted = _allocate.by_budget(
                rankings,
                limit=aim,
                fixed=fixed,
                cost=cost,
                unit="ms",
                width=width,
                multiple_of=multiple_of,
            )
        except BudgetError:
            if not tried:
                raise
            break
        seen = table.base * share_of_time(whole, counts, sites, told=told, cache=cache)
        tried.append((abs(seen - limit), seen, counts))
        if abs(seen - limit) <= _NEAR * limit or (seen < limit and predicted >= table.base):
            break
        aim += limit - seen
    _, seen, counts = min(tried, key=lambda one: one[0])
    return counts, {"asked": limit, "predicted": seen, "dense": table.base}


def share_of_time(
    whole: Whole,
    counts: Mapping[str, int],
    sites: Sequence[Site],
    *,
    told: Callable[[str, int, int], None],
    cache: Path | None,
) -> float:
    """The time of the whole with so many units at each site, as a share of the dense one's."""
    dense = {site.second.path: count_of(site) for site in sites}
    found = _timed(
        whole,
        lambda widths: dense if widths["kept"] else counts,
        sites,
        {"kept": 1},
        {"kept": [0]},
        told=told,
        cache=cache,
        key=str(counts),
    )
    return found.curves["kept"].ms[0] / found.base


def timetable(
    whole: Whole,
    groups: Mapping[str, Sequence[Site]],
    *,
    multiple_of: int | Mapping[str, int] = 1,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
    cache: Path | None = None,
) -> _latency.Table:
    """How long the whole takes at some widths of each kind of site, on this device."""
    sites = [site for own in groups.values() for site in own]
    dense = {name: count_of(own[0]) for name, own in groups.items()}
    grid = {}
    for name, own in groups.items():
        allowed = _allocate.allowed(own[0], multiple_of)
        at = np.linspace(0, len(allowed) - 1, min(_GRID, len(allowed))).round().astype(int)
        grid[name] = [int(allowed[i]) for i in np.unique(at)]

    return _timed(whole, lambda w: _counts(groups, w), sites, dense, grid, told=told, cache=cache)


def _timed(
    whole: Whole,
    counts: Callable[[Mapping[str, int]], Mapping[str, int]],
    sites: Sequence[Site],
    dense: Mapping[str, int],
    grid: Mapping[str, Sequence[int]],
    *,
    told: Callable[[str, int, int], None],
    cache: Path | None,
    key: str = "",
) -> _latency.Table:
    """The whole timed at widths of any names, of which `counts` makes units by path."""

    def run(widths: Mapping[str, int]) -> Callable[[], Any]:
        fn, params = whole.at(counts(widths), sites)
        params, batch = jax.device_put(params), jax.device_put(whole.batch)
        call = jax.jit(fn)
        return lambda: jax.block_until_ready(call(params, batch))

    leaves = jax.tree.leaves(whole.batch)
    shapes = ", ".join(f"{np.result_type(x)}{tuple(np.shape(x))}" for x in leaves)
    dtypes = [x.dtype for x in _tree.flatten(whole.params).values()]
    return _latency.measure(
        run,
        dense,
        grid,
        cache=cache,
        shapes=shapes,
        dtype=str(jnp.result_type(*(t for t in dtypes if jnp.issubdtype(t, jnp.floating)))),
        key=f"{whole.fingerprint} {whole.cfg} {key}" if cache is not None else "",
        told=lambda done, total: told("timing", done, total),
    )
