"""`prune`: a calibration file and a wish in, a smaller model out, without training.

Channels are ranked (`_rank`), their numbers chosen (`_allocate`), the second layers refitted on
those that stay (`_refit`), and what is left may be tuned (`_tune`). All of that happens on
parameters of the dense shapes, in which the rows of what goes are zero; a plan then cuts them.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxslim import _mesh, _tree
from flaxslim._draw import plan
from flaxslim._multiples import with_mesh
from flaxslim._plan import Plan
from flaxslim._slim import carried_out
from flaxslim._spec import Site, SpecLike
from flaxslim.errors import CalibrationError, nearest
from flaxslim.posttraining import _allocate
from flaxslim.posttraining._allocate import Budget
from flaxslim.posttraining._calibration import Calibration, Mask
from flaxslim.posttraining._checks import (
    check_asked,
    check_sayable,
    refuse_adapters,
    refuse_apart,
    shares_of,
)
from flaxslim.posttraining._cost import Whole, within
from flaxslim.posttraining._distance import Distance, Loss
from flaxslim.posttraining._engine import Engine, Progress
from flaxslim.posttraining._function import function_of
from flaxslim.posttraining._gradient import Objective
from flaxslim.posttraining._kept import Kept
from flaxslim.posttraining._latency import default_cache
from flaxslim.posttraining._method import PRESETS, REFERENCES, Method
from flaxslim.posttraining._rank import Ranking
from flaxslim.posttraining._report import Report, Row
from flaxslim.posttraining._tied import tied
from flaxslim.posttraining._tune import check_tunable, split, tune
from flaxslim.specs import chosen

_log = logging.getLogger("flaxslim")


def prune(
    params: Any,
    cfg: Any = None,
    spec: SpecLike = None,
    *,
    model: Any = None,
    batches: Iterable[Any],
    keep: float | Mapping[str, float] | None = None,
    budget: Budget | None = None,
    preset: str | Method = "balanced",
    width: str = "uniform",
    multiple_of: int | Mapping[str, int] = 1,
    mask: Mask | None = None,
    loss: Loss | None = None,
    objective: Objective | None = None,
    low_memory: bool = False,
    statistics: str | os.PathLike | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
    report: Callable[[Report], None] | None = None,
) -> tuple[Any, Any]:
    """Prune a model without training it, by what its layers read on calibration data; then slim.

    Args:
      params, cfg, spec, width, multiple_of: as in `flaxslim.slim`. Not changed.
      model: a Flax class of transformers or an instance; a Linen module; or `fn(params, batch) ->
        outputs`, pure, which is called with parameters of the dense shapes, and of smaller ones
        for a budget of FLOPs or time. May be left out for an nnx module.
      batches: calibration data, some hundred samples: pytrees of arrays whose first axis counts
        samples, such as dicts of `input_ids` and `attention_mask`. By one in four ridges are
        chosen, and by half of these tuning is stopped, which never learns from them.
      keep: the share of the channels that stays at each site, above 0 and up to 1; by axis
        `{"f": 0.7, "h": 0.75}`.
      budget: or what all of the model may cost (`flaxslim.Budget`).
      preset: "fast", "balanced", "best", "fisher", or a `flaxslim.Method`; also "random",
        "magnitude", "wanda", "magnitude+ls", "wanda+ls", "obs", to compare with.
      mask: which positions of a batch count, `mask(batch) -> (b, t)`; by default its
        attention_mask, if it has one.
      loss: what tuning makes small: `loss(dense outputs, outputs, batch) -> scalar`; by default
        the divergence of logits, and the relative squared error of other outputs.
      objective: `objective(outputs, batch) -> scalar`, the loss of which scores by gradient take
        the gradient; by default outputs times random signs.
      low_memory: one site's statistics at a time, at one pass over the data for each site (two
        without a folder for `statistics`).
      statistics: a folder in which they stay, for a call that goes on where this one was stopped,
        or that prunes the same model by the same data to another size. Yours to delete.
      seed: of all that is random. The same seed gives the same bytes.
      progress: is called with what is done, how much of it, and of how much.
      report: is called with the `Report`.

    Returns: `(params, cfg)`, smaller.

    Raises: `CalibrationError` for data or a function from which nothing can be learnt,
    `BudgetError` for a wish that cannot be met, and what `flaxslim.slim` raises. Warns
    (`CalibrationWarning`) of fewer calibration positions than hidden channels.

    >>> import jax
    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
    >>> rng = np.random.default_rng(0)
    >>> params = {"up": {"kernel": rng.normal(size=(4, 8))}, "down": {"kernel": np.ones((8, 2))}}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    >>> batches = [rng.normal(size=(16, 4)) for _ in range(4)]
    >>> small, cfg = prune(params, {"hidden": 8}, MLP, model=fn, batches=batches, keep=0.5)
    >>> small["down"]["kernel"].shape, cfg
    ((4, 2), {'hidden': 4})
    """
    zeroed, told_of = zero(
        params,
        cfg,
        spec,
        model=model,
        batches=batches,
        keep=keep,
        budget=budget,
        method=method_of(preset),
        width=width,
        multiple_of=multiple_of,
        mask=mask,
        loss=loss,
        objective=objective,
        low_memory=low_memory,
        kept=None if statistics is None else Kept(Path(statistics)),
        seed=seed,
        told=progress,
    )
    chosen_plan = plan(zeroed, cfg, spec, width=width, multiple_of=multiple_of)
    told_of = _as_cut(told_of, chosen_plan)
    if report is not None:
        report(told_of)
    _log.info("%s", told_of)
    return carried_out(chosen_plan, zeroed, cfg)


def method_of(preset: str | Method) -> Method:
    """A preset, or a method that is compared with, by its name; raises `CalibrationError`."""
    if isinstance(preset, Method):
        return preset
    known = {**PRESETS, **REFERENCES}
    if not isinstance(preset, str) or preset not in known:
        raise CalibrationError(
            "there is no such preset",
            seen=repr(preset),
            expected=", ".join(known),
            near=nearest(str(preset), known),
            mend="name one of these, or pass a flaxslim.Method",
        )
    return known[preset]


def zero(
    params: Any,
    cfg: Any,
    spec: SpecLike,
    *,
    model: Any,
    batches: Iterable[Any],
    keep: float | Mapping[str, float] | None,
    budget: Budget | None,
    method: Method,
    width: str,
    multiple_of: int | Mapping[str, int],
    mask: Mask | None,
    loss: Loss | None,
    objective: Objective | None,
    low_memory: bool,
    kept: Kept | None,
    seed: int,
    told: Progress,
) -> tuple[Any, Report]:
    """The parameters in their own shapes, with zeros where channels are to go."""
    check_asked(keep, budget, method, objective, seed)
    found = chosen(spec, cfg)
    bound, _ = found.bind(params, cfg)
    sites = tuple(site for site in bound if site.size)
    refuse_adapters(sites)
    refuse_apart(params)
    multiple_of = with_mesh(multiple_of, sites, _tree.flatten(params))
    shares = None if keep is None else shares_of(keep, sites)

    def check(counts: Mapping[str, int]) -> None:
        check_sayable(params, cfg, found, sites, counts, width=width, multiple_of=multiple_of)

    # Before hours are spent on what no config can say.
    first = _allocate.by_share(sites, shares or 0.5, multiple_of=multiple_of)
    check(first)
    tree = _on_device(params)
    calibration = Calibration(
        function_of(model, params, cfg), batches, params=tree, mask=mask, kept=kept
    )
    if method.tune is not None:
        check_tunable(calibration)
    ordered = _in_order(sites, calibration)
    distance = Distance(calibration, ordered, cfg, loss)
    engine = Engine(
        calibration=calibration,
        method=method,
        dense=tree,
        leaves=_tree.flatten(tree),
        objective=objective,
        seed=seed,
        told=told,
        low_memory=low_memory,
        distance=distance if shares is None or method.allocation == "global" else None,
    )
    whole = Whole(model=model, params=params, cfg=cfg, spec=found, batch=calibration.batches[0])
    rankings, counts, cost = _counted(
        engine, ordered, first, shares, budget, whole, width=width, multiple_of=multiple_of
    )
    if counts != first:
        check(counts)
    new, rows = engine.pruned(ordered, rankings, counts)
    new, tuned = _tuned(engine, new, ordered, distance, only=_learnt(params, cfg))
    in_order = [rows[site.second.path] for site in sites]
    report = _report(engine, distance, new, in_order, tuned=tuned, cost=cost)
    return _as_given(params, tree, new), report


# --- what it is made of -------------------------------------------------------------------------


def _counted(
    engine: Engine,
    ordered: Sequence[Site],
    first: Mapping[str, int],
    shares: Mapping[str, float] | None,
    budget: Budget | None,
    whole: Whole,
    *,
    width: str,
    multiple_of: int | Mapping[str, int],
) -> tuple[Mapping[str, Ranking], Mapping[str, int], Mapping[str, float]]:
    """The rankings, how many units stay at each site, and what these cost by the budget.

    `first` are as many as the shares give where each site has the same.
    """
    allocation = engine.method.allocation
    rankings = {}
    if shares is None or allocation == "global" or not engine.in_turn(ordered):
        rankings = engine.rankings(ordered)
    if shares is not None and allocation == "site":
        return rankings, first, {}
    if shares is not None:
        counts = engine.shared(rankings, shares, width=width, multiple_of=multiple_of)
        return rankings, counts, {}
    assert budget is not None
    counts, cost = within(
        budget,
        rankings,
        whole,
        width=width,
        multiple_of=multiple_of,
        told=engine.told,
        cache=default_cache(),
    )
    return rankings, counts, cost


def _tuned(
    engine: Engine,
    new: Any,
    sites: Sequence[Site],
    distance: Distance,
    *,
    only: Collection[str],
) -> tuple[Any, Mapping[str, float]]:
    """As the method says: tuned, with the loss before and after, or as it is."""
    how = engine.method.tune
    if how is None:
        return new, {}
    return tune(
        engine.calibration,
        new,
        engine.dense,
        sites,
        engine.alive,
        only=only,
        how=how,
        distance=distance,
        seed=engine.seed,
        told=lambda done: engine.told("tuning", done, how.steps),
    )


def _report(
    engine: Engine,
    distance: Distance,
    new: Any,
    rows: Sequence[Row],
    *,
    tuned: Mapping[str, float],
    cost: Mapping[str, float],
) -> Report:
    calibration = engine.calibration
    held_out = split(calibration)[1]
    # The refit may know them, too.
    which = "held-out" if held_out and engine.method.holds_out else "calibration"
    return Report(
        rows=tuple(rows),
        samples=calibration.samples,
        positions=engine.positions,
        output_error=distance.mean(new, engine.dense, held_out or calibration.batches),
        measure=f"{distance.measure}, on {which} batches",
        tuned=tuned,
        cost=cost,
    )


def _as_cut(report: Report, cut: Plan) -> Report:
    """With the widths that come of it: other channels may be dead already, or kept to fill up."""
    left = {one.site.second.path: one.width * one.site.rows for one in cut.cuts}
    rows = [dataclasses.replace(row, after=left.get(row.path, row.after)) for row in report.rows]
    return dataclasses.replace(report, rows=tuple(rows), notes=tuple(_notes(rows)))


def _learnt(params: Any, cfg: Any) -> Collection[str]:
    """What may be tuned: of an nnx module what is a parameter, and nowhere what is tied.

    An embedding is no more tuned than other tables; a head of its own is what the config denies.
    """
    module = isinstance(params, nnx.Module)
    leaves = _tree.flatten(nnx.state(params, nnx.Param) if module else params)
    return leaves.keys() - tied(leaves, cfg)


def _notes(rows: Iterable[Row]) -> Iterator[str]:
    whole = [row for row in rows if row.after == row.before]
    if whole:
        yield (
            f"nothing went at {len(whole)} sites (such as {whole[0].path}): the share that goes "
            "is less than one unit of them, or what they lose is missed more than elsewhere"
        )


def _on_device(params: Any) -> Any:
    if isinstance(params, nnx.Module):
        params = nnx.state(params)
    leaves = _tree.flatten(params)
    placed = {path: _mesh.automatic(jnp.asarray(leaf)) for path, leaf in leaves.items()}
    return _tree.replace(params, placed)


def _in_order(sites: Sequence[Site], calibration: Calibration) -> list[Site]:
    """The sites in the order in which the function runs them."""
    order = {path: i for i, path in enumerate(calibration.running)}
    return sorted(sites, key=lambda site: order.get(site.second.path, len(order)))


def _as_given(params: Any, tree: Any, new: Any) -> Any:
    """The new leaves in the container and of the kind that was given; the others by identity."""
    given, before, after = (_tree.flatten(x) for x in (params, tree, new))
    changed = {
        path: _placed_as(given[path], leaf)
        for path, leaf in after.items()
        if leaf is not before[path]
    }
    return _tree.replace(params, changed)


def _placed_as(given: Any, leaf: Any) -> Any:
    if isinstance(given, np.ndarray):
        return np.asarray(leaf, given.dtype)
    # What was tuned comes out of a program as that found best.
    return jax.device_put(leaf, given.sharding) if _mesh.on_mesh(given) else leaf
