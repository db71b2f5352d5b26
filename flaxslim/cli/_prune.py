"""`flaxslim prune`: read, calibrate, prune, cut, measure, write."""

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flaxslim
from flaxslim import _tree
from flaxslim._prove import Proof
from flaxslim._prove import verify as prove
from flaxslim.checkpoint import save
from flaxslim.checkpoint._atomic import check_target
from flaxslim.checkpoint._names import beside, dotted
from flaxslim.checkpoint._write import check_writable
from flaxslim.cli import _evaluate, _metrics, _table
from flaxslim.cli._calibrated import Data, How, Model, opened, pruned
from flaxslim.cli._console import console, messages
from flaxslim.errors import BudgetError, FlaxslimError
from flaxslim.plots import _style
from flaxslim.plots._widths import by_unit, widths
from flaxslim.posttraining._allocate import Budget
from flaxslim.posttraining._budget import shown
from flaxslim.posttraining._checks import check_share
from flaxslim.posttraining._data import CalibrationData
from flaxslim.posttraining._kept import Kept
from flaxslim.posttraining._report import Report

# By what the library calls them.
_FLAGS = {
    "keep": "--keep",
    "speedup": "--speedup",
    "params": "--max-params",
    "bytes": "--max-bytes",
    "flops": "--max-flops",
    "latency": "--max-latency",
}


def run(
    source: str,
    out: Path,
    data: Data,
    how: How,
    *,
    keep: float | None,
    budget: Mapping[str, Any],
    evaluate: str | None,
    evaluation: Path | None,
    plot: Path | None,
    overwrite: bool,
    revision: str | None,
) -> int:
    """Prune a checkpoint and write it once all is done; returns the exit code."""
    began = time.perf_counter()
    given = {name: value for name, value in budget.items() if value is not None}
    wish = _wish(keep, given)
    measure = _evaluate.metric(evaluate, evaluation)
    if plot is not None:
        _style.check(plot)
    local = Path(source) if os.path.isdir(source) else None
    target = out.expanduser().resolve()
    check_target(target, overwrite=overwrite, source=local)
    model = opened(source, data, revision)
    check_writable(*model.dense, model.source)  # before hours are spent
    stored = _beside(model)
    if isinstance(asked := wish.get("budget"), Budget) and (again := stored.get(next(iter(given)))):
        wish["budget"] = dataclasses.replace(asked, beside=again)
    scores = {}
    if measure is not None:  # first, since it may fail
        with messages.status("measuring the dense model"):
            scores["dense"] = measure(model.cls, *model.dense, model.checkpoint.folder)
    kept = Kept(target.with_name(f"{target.name}.statistics"))
    params, cfg, report = _resumable(model, how, kept, wish)
    console.print(str(report), markup=False, soft_wrap=True)
    with messages.status("measuring both models"):
        proof = prove(
            model.dense,
            (params, cfg),
            model.cls,
            inputs=model.data.batches[0],
            approximate=True,
            repeats=15,
        )
        if measure is not None:
            scores["pruned"] = measure(model.cls, params, cfg, model.checkpoint.folder)
    _say(proof, report, given, scores)
    if again := stored.get("bytes"):
        text = f"besides, the files hold {shown(again, 'bytes')} of tied tensors again, and buffers"
        console.print(text, markup=False, soft_wrap=True)
    with messages.status(f"writing {out}"):
        save(
            out,
            params,
            cfg,
            like=model.source,
            overwrite=overwrite,
            record=_record(source, how, wish, report, scores, model.data, proof),
        )
    kept.clear()
    if plot is not None:
        title = f"{Path(source).name or source}, {how.preset}"
        _style.write(flaxslim.plot_plan(report, title=title), plot)
    messages.print(f"written to {out} in {time.perf_counter() - began:.0f} s", markup=False)
    return 0


def _beside(model: Model) -> dict[str, int]:
    """What PyTorch's files hold besides the Flax tree, by the budget that it counts for."""
    if model.source.naming != "torch":
        return {}
    params, size = beside(_tree.flatten(model.checkpoint.params), dotted(model.source.params))
    return {"params": params, "bytes": size}


def _say(
    proof: Any, report: Report, given: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]
) -> None:
    """What both models take, what was asked for beside what came of it, and the scores."""
    console.print(_table.before_after(proof))
    if report.cost:
        console.print(_said_of_cost(report, given, proof), markup=False, soft_wrap=True)
    for name, found in scores.items():
        console.print(f"{name}: " + ", ".join(f"{key} {x:.4g}" for key, x in found.items()))


def _wish(keep: float | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `prune` is asked for, which is one thing."""
    if keep is not None:
        check_share(keep)
    wished = given if keep is None else {"keep": keep, **given}
    if len(wished) != 1:
        raise BudgetError(
            "how small is it to be?",
            seen=", ".join(_FLAGS[name] for name in wished) or "no wish",
            expected=f"one of {', '.join(_FLAGS.values())}",
            mend="--keep 0.7 keeps 70% of the channels of each layer; --speedup 1.5x makes it 1.5 "
            "times as fast on this machine",
        )
    return {"keep": keep} if keep is not None else {"budget": Budget(**given)}


def _resumable(
    model: Model, how: How, kept: Kept, wish: Mapping[str, Any]
) -> tuple[Any, Any, Report]:
    """`pruned`, which goes on where the same command was stopped."""
    earlier = kept.folder.exists()
    try:
        return pruned(model, how, kept.folder, **wish)
    except KeyboardInterrupt:
        if kept.folder.is_dir():
            text = f"the statistics are kept in {kept.folder}: the same command goes on from there"
            messages.print(text, markup=False, soft_wrap=True)
        raise
    except FlaxslimError:
        if not earlier:  # what a run that was stopped left is not lost by a wrong wish
            kept.clear()
        raise


def _said_of_cost(report: Report, given: Mapping[str, Any], proof: Any) -> str:
    """What was asked, predicted and measured."""
    cost, ms = report.cost, proof.milliseconds
    if not {"latency", "speedup"} & given.keys():
        unit: Any = {"params": "parameters", "bytes": "bytes", "flops": "FLOPs"}[next(iter(given))]
        parts = ("dense", "asked", "predicted")
        return ", ".join(f"{name} {shown(cost[name], unit)}" for name in parts)
    return (
        f"asked {cost['dense'] / cost['asked']:.2f}x, predicted "
        f"{cost['dense'] / cost['predicted']:.2f}x, measured {ms.before / ms.after:.2f}x "
        f"({ms.before:.1f} to {ms.after:.1f} ms a batch)"
    )


def _record(
    source: str,
    how: How,
    wish: Mapping[str, Any],
    report: Report,
    scores: Mapping[str, Any],
    data: CalibrationData,
    proof: Proof,
) -> dict[str, Any]:
    """What `flaxslim.json` keeps, and what the model card says."""
    name = Path(source).name if os.path.isdir(source) else source
    gone = " and ".join(
        f"{sum(site.before - site.after for site in own):,} of "
        f"{sum(site.before for site in own):,} {unit}"
        for unit, own in by_unit(widths(report)).items()
    )
    said = {k: str(v) for k, v in wish.items()}
    return {
        "flaxslim": flaxslim.__version__,
        "exact": False,
        "prune": _metrics.plain(
            {
                "how": dataclasses.asdict(how),
                "wish": said,
                "report": report.to_dict(),
                "scores": dict(scores),
                "calibration": data.source,
                "measured": proof.to_dict(),
            }
        ),
        "card": f"{gone} were cut from `{name}` by flaxslim {flaxslim.__version__} without "
        f"training (preset {how.preset}, {data.samples:,} calibration samples). What it computes "
        "is near what that model does, not the same.",
    }
