"""`prune`: a calibration file and a wish in, a smaller model out, without training.

Channels are ranked (`_rank`), their numbers chosen (`_allocate`), the second layers refitted on
those that stay (`_refit`), and what is left may be tuned (`_tune`). All of that happens on
parameters of the dense shapes, in which the rows of what goes are zero; `slim` then cuts them.
"""

import logging
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxslim import _mesh, _tree
from flaxslim._draw import draw
from flaxslim._errors import BudgetError, CalibrationError, WidthError, nearest
from flaxslim._multiples import with_mesh
from flaxslim._plan import PER_LAYER
from flaxslim._slim import mend_blocked, slim
from flaxslim._spec import Site, Spec, SpecLike
from flaxslim.posttraining import _allocate
from flaxslim.posttraining._allocate import Budget
from flaxslim.posttraining._calibration import Calibration, Mask
from flaxslim.posttraining._cost import Whole, first_units, within
from flaxslim.posttraining._distance import Distance, Loss
from flaxslim.posttraining._engine import Engine, Told
from flaxslim.posttraining._function import function_of
from flaxslim.posttraining._gradient import Objective
from flaxslim.posttraining._kept import Kept
from flaxslim.posttraining._latency import default_cache
from flaxslim.posttraining._method import PRESETS, REFERENCES, Method
from flaxslim.posttraining._rank import GRADIENTS, alive_of, takes_gradients
from flaxslim.posttraining._report import Report, Row
from flaxslim.posttraining._tune import split, tune
from flaxslim.specs import chosen

_log = logging.getLogger("flaxslim")


def prune(
    params: Any,
    cfg: Any = None,
    spec: SpecLike = None,
    *,
    fn: Any = None,
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
    statistics: str | Path | None = None,
    seed: int = 0,
    told: Told = lambda what, done, total: None,
    report: Callable[[Report], None] | None = None,
) -> tuple[Any, Any]:
    """Prune a model without training it, by what its layers read on calibration data; then slim.

    Args:
      params, cfg, spec, width, multiple_of: as in `flaxslim.slim`. Not changed.
      fn: `fn(params, batch) -> outputs`, pure, which is called with parameters of the dense
        shapes, and of smaller ones for a budget of FLOPs or time; or what makes one: a Flax class
        of transformers or an instance, or a Linen module. May be left out for an nnx module.
      batches: calibration data, some hundred samples: pytrees of arrays whose first axis counts
        samples, such as dicts of `input_ids` and `attention_mask`. One in four is held out, to
        choose ridges and to stop tuning by.
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
      told: is called with what is done, how much of it, and of how much.
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
    >>> small, cfg = prune(params, {"hidden": 8}, MLP, fn=fn, batches=batches, keep=0.5)
    >>> small["down"]["kernel"].shape, cfg
    ((4, 2), {'hidden': 4})
    """
    zeroed, told_of = zero(
        params,
        cfg,
        spec,
        fn=fn,
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
        told=told,
    )
    if report is not None:
        report(told_of)
    _log.info("%s", told_of)
    return slim(zeroed, cfg, spec, width=width, multiple_of=multiple_of)


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
    fn: Any,
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
    told: Told,
) -> tuple[Any, Report]:
    """The parameters in their own shapes, with zeros where channels are to go."""
    if (keep is None) == (budget is None):
        raise BudgetError(
            "how small is it to be?",
            seen="neither keep= nor budget=" if keep is None else "both keep= and budget=",
            expected="one of them",
            mend="keep=0.7 keeps 70% of the channels of each site; "
            "budget=Budget(speedup=1.5) chooses by what the whole model may cost",
        )
    found = chosen(spec, cfg)
    bound, _ = found.bind(params, cfg)
    sites = tuple(site for site in bound if site.size)
    _refuse(sites)
    _refuse_apart(params)
    multiple_of = with_mesh(multiple_of, sites, _tree.flatten(params))
    shares = None if keep is None else _shares(keep, sites)
    if objective is not None and not takes_gradients(method.score):
        raise CalibrationError(
            "objective= is for scores that take its gradient",
            seen=f"score={method.score!r}",
            expected=", ".join(sorted(GRADIENTS)),
            mend="leave it out; loss= is what tuning makes small",
        )

    def check(counts: Mapping[str, int]) -> None:
        _check_sayable(params, cfg, found, sites, counts, width=width, multiple_of=multiple_of)

    # Before hours are spent on what no config can say.
    first = _allocate.by_share(sites, shares or 0.5, multiple_of=multiple_of)
    check(first)
    tree = _on_device(params)
    calibration = Calibration(
        function_of(fn, params, cfg), batches, params=tree, mask=mask, kept=kept
    )
    ordered = _in_order(sites, calibration)
    engine = Engine(
        calibration=calibration,
        method=method,
        dense=tree,
        leaves=_tree.flatten(tree),
        objective=objective,
        seed=seed,
        told=told,
        low_memory=low_memory,
    )
    cost: Mapping[str, float] = {}
    rankings = {}
    if shares is None or method.allocation == "global" or not engine.in_turn(ordered):
        rankings = engine.rankings(ordered)
    if shares is not None and method.allocation == "site":
        counts = first
    elif shares is not None:
        counts = engine.shared(rankings, shares, width=width, multiple_of=multiple_of)
    else:
        assert budget is not None
        counts, cost = within(
            budget,
            rankings,
            Whole(fn=fn, params=params, cfg=cfg, spec=found, batch=calibration.batches[0]),
            width=width,
            multiple_of=multiple_of,
            told=told,
            cache=default_cache(),
        )
    if counts != first:
        check(counts)
    new, rows = engine.pruned(ordered, rankings, counts)
    distance = Distance(calibration, ordered, cfg, loss)
    tuned: Mapping[str, float] = {}
    if method.tune is not None:
        steps = method.tune.steps
        new, tuned = tune(
            calibration,
            new,
            tree,
            ordered,
            engine.alive,
            only=_parameters(params),
            how=method.tune,
            distance=distance,
            seed=seed,
            told=lambda done: told("tuning", done, steps),
        )
    report = Report(
        rows=tuple(rows[site.second.path] for site in sites),
        samples=calibration.samples,
        positions=engine.positions,
        output_error=distance.mean(new, tree, split(calibration)[1] or calibration.batches),
        tuned=tuned,
        cost=cost,
        notes=tuple(_notes(rows.values())),
    )
    return _as_given(params, tree, new), report


# --- what it is made of -------------------------------------------------------------------------


def _check_sayable(
    params: Any,
    cfg: Any,
    spec: Spec,
    sites: Sequence[Site],
    counts: Mapping[str, int],
    *,
    width: str,
    multiple_of: int | Mapping[str, int],
) -> None:
    """Raise `WidthError` unless so many units of each site can be cut, and the config say so.

    And whatever `slim` refuses: a config that contradicts the tensors, quantised kernels.
    """
    trial = draw(
        first_units(params, sites, counts), cfg, spec, width=width, multiple_of=multiple_of
    )
    if trial.blocked:
        raise WidthError("; ".join(trial.blocked), mend=mend_blocked(trial))
    by_path = {site.second.path: site for site in sites}
    for cut in trial.cuts:
        if (site := by_path.get(cut.site.second.path)) is None:
            continue
        wanted = int(alive_of(site, [np.arange(counts[site.second.path])])[0].sum())
        if cut.width > wanted:  # fewer, where some are dead already
            raise WidthError(
                f"{wanted} of {site.size} {site.pair.unit} cannot be said here, {cut.width} can",
                path=site.second.path,
                seen=f"width={width!r}, multiple_of={multiple_of!r}",
                mend=f"multiple_of={{{site.pair.axis!r}: ...}} that gives such a number, "
                f"or {PER_LAYER}",
            )


def _parameters(params: Any) -> Collection[str] | None:
    """What of an nnx module is a parameter; None for trees that hold nothing else."""
    if not isinstance(params, nnx.Module):
        return None
    return _tree.flatten(nnx.state(params, nnx.Param)).keys()


def _notes(rows: Iterable[Row]) -> Iterator[str]:
    whole = [row for row in rows if row.after == row.before]
    if whole:
        yield (
            f"nothing went at {len(whole)} sites (such as {whole[0].path}): the share that goes "
            "is less than one unit of them, or what they lose is missed more than elsewhere"
        )


def _refuse(sites: Sequence[Site]) -> None:
    for site in sites:
        if site.lora:
            raise CalibrationError(
                "a kernel of this site has a low-rank matrix beside it",
                path=site.lora[0][1].path,
                mend="merge the adapters into the kernels first",
            )


def _refuse_apart(params: Any) -> None:
    """Raise `CalibrationError` for arrays that no process sees all of."""
    for path, leaf in _tree.flatten(params).items():
        if _mesh.is_apart(leaf):
            raise CalibrationError(
                "pruning without training refits layers on one host, and this array spans several",
                path=path,
                seen=_mesh.told(leaf),
                mend="prune in one process, with the model on its own devices or in its memory; "
                "slim, plan, apply, shrink and pruning run across processes",
            )


def _shares(keep: float | Mapping[str, float], sites: Sequence[Site]) -> dict[str, float]:
    axes = list(dict.fromkeys(site.pair.axis for site in sites))
    given = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(axes, keep)
    for axis, share in given.items():
        if axis not in axes:
            raise BudgetError(
                "keep= names an axis that the spec does not prune",
                seen=repr(axis),
                expected=" or ".join(map(repr, axes)),
                mend='pass spec="all" for the heads ("h") too',
            )
        if not isinstance(share, numbers.Real) or not 0 < float(share) <= 1:
            raise BudgetError(
                "keep= is the share of the channels that stays",
                seen=repr(share),
                expected="above 0, up to 1; 0.7 keeps 70%",
                mend="for 30% keep=0.3; to keep a percentage, divide it by 100",
            )
    return {axis: float(given.get(axis, 1.0)) for axis in axes}


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
