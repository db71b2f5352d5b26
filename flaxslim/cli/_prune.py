"""`flaxslim prune` and `flaxslim sweep`: read, calibrate, prune, cut, measure, write."""

import contextlib
import csv
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import flaxslim
from flaxslim._inputs import model_class_for
from flaxslim._prove import Proof
from flaxslim._prove import verify as prove
from flaxslim.checkpoint import Checkpoint, read, save
from flaxslim.checkpoint._atomic import check_target, fresh_file
from flaxslim.checkpoint._names import unused
from flaxslim.checkpoint._write import refuse_loss
from flaxslim.cli import _evaluate, _table
from flaxslim.cli._console import console, in_flags, messages
from flaxslim.cli._report import sizes
from flaxslim.cli._slim import as_flax
from flaxslim.errors import (
    BudgetError,
    CalibrationError,
    CalibrationWarning,
    FlaxslimError,
    TargetError,
)
from flaxslim.plots import _style
from flaxslim.plots._widths import by_unit, widths
from flaxslim.posttraining._allocate import Budget
from flaxslim.posttraining._budget import shown
from flaxslim.posttraining._checks import check_share
from flaxslim.posttraining._data import CalibrationData, read_calibration
from flaxslim.posttraining._kept import Kept
from flaxslim.posttraining._prune import method_of
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The flags that say what to calibrate on."""

    calibration: Path
    samples: int
    length: int
    batch_size: int
    fields: tuple[str, ...]
    packed: str
    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise CalibrationError(
                "a seed is no negative number", seen=f"--seed {self.seed}", expected="0 or more"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """The flags that say how to prune."""

    preset: str
    width: str
    heads: bool
    multiple_of: int
    heads_multiple_of: int
    low_memory: bool
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is pruned: Flax parameters, the class that runs them, and the calibration data."""

    checkpoint: Checkpoint
    cls: Any
    data: CalibrationData

    @property
    def dense(self) -> tuple[Any, Any]:
        return self.checkpoint.params, self.checkpoint.config


def opened(source: str, data: Data, revision: str | None) -> Model:
    """Read the checkpoint and the calibration data of a command."""
    with messages.status(f"reading {source}"):
        before = read(source, revision=revision)
        if before.naming == "torch":
            refuse_loss(unused(before.params, before.config), "flax")
            before = as_flax(before)
        cls = model_class_for(before.config, before.params)
    for note in before.notes:
        messages.print(f"note: {note}", markup=False, soft_wrap=True)
    with messages.status(f"reading {data.calibration}"), _notes():
        found = read_calibration(
            data.calibration,
            folder=before.folder,
            cfg=before.config,
            samples=data.samples,
            length=data.length,
            batch_size=data.batch_size,
            fields=data.fields,
            packed={"auto": None, "yes": True, "no": False}[data.packed],
            seed=data.seed,
        )
    tokens = "" if found.tokens is None else f", {found.tokens:,} tokens"
    text = f"calibration: {found.samples:,} samples{tokens} of {found.source}"
    messages.print(text, markup=False, soft_wrap=True)
    return Model(checkpoint=before, cls=cls, data=found)


def pruned(
    model: Model, how: How, statistics: Path | None = None, **wish: Any
) -> tuple[Any, Any, Report]:
    """The smaller parameters, their config, and what was done."""
    reports: list[Report] = []
    with _progress() as told, _notes():
        params, cfg = flaxslim.prune(
            *model.dense,
            "all" if how.heads else "ffn",
            model=model.cls,
            batches=model.data.batches,
            preset=how.preset,
            width=how.width,
            multiple_of={"f": how.multiple_of, "h": how.heads_multiple_of},
            low_memory=how.low_memory,
            statistics=statistics,
            seed=how.seed,
            progress=told,
            report=reports.append,
            **wish,
        )
    return params, cfg, reports[0]


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
    with messages.status(f"writing {out}"):
        save(
            out,
            params,
            cfg,
            like=model.checkpoint,
            overwrite=overwrite,
            record=_record(source, how, wish, report, scores, model.data, proof),
        )
    kept.clear()
    if plot is not None:
        title = f"{Path(source).name or source}, {how.preset}"
        _style.write(flaxslim.plot_plan(report, title=title), plot)
    messages.print(f"written to {out} in {time.perf_counter() - began:.0f} s", markup=False)
    return 0


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
        "prune": {
            "how": dataclasses.asdict(how),
            "wish": said,
            "report": report.to_dict(),
            "scores": dict(scores),
            "calibration": data.source,
            "measured": proof.to_dict(),
        },
        "card": f"{gone} were cut from `{name}` by flaxslim {flaxslim.__version__} without "
        f"training (preset {how.preset}, {data.samples:,} calibration samples). What it computes "
        "is near what that model does, not the same.",
    }


# --- sweep --------------------------------------------------------------------------------------


def sweep(
    source: str,
    data: Data,
    how: How,
    *,
    keep: str,
    presets: str,
    evaluate: str | None,
    evaluation: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    revision: str | None,
) -> int:
    """Prune at several shares by several presets, and print what each costs and gives."""
    measure = _evaluate.metric(evaluate, evaluation)
    if plot is not None:
        _style.check(plot)
    if csv_file is not None and not csv_file.resolve().parent.is_dir():
        raise TargetError("there is no such folder", path=str(csv_file.resolve().parent))
    shares, names = _shares(keep), [name.strip() for name in presets.split(",")]
    for name in names:
        method_of(name)  # which says what there is, before anything is read
    model = opened(source, data, revision)
    folder = model.checkpoint.folder
    dense = dict(measure(model.cls, *model.dense, folder)) if measure else {}
    rows: list[dict[str, Any]] = [
        {
            "preset": "dense",
            "keep": 1.0,
            "parameters": sizes(model.dense[0])[0],
            "error": 0.0,
            **dense,
        }
    ]
    for preset in names:
        for share in shares:
            params, cfg, report = pruned(model, dataclasses.replace(how, preset=preset), keep=share)
            found = dict(measure(model.cls, params, cfg, folder)) if measure else {}
            rows.append(
                {
                    "preset": preset,
                    "keep": share,
                    "parameters": sizes(params)[0],
                    "error": report.output_error,
                    **found,
                }
            )
    console.print(_table.swept(rows))
    if csv_file is not None:
        with fresh_file(csv_file) as new, new.open("w", newline="", encoding="utf-8") as file:
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, fieldnames=list(names))
            writer.writeheader()
            writer.writerows(rows)
        messages.print(f"written to {csv_file}", markup=False)
    if plot is not None:
        _style.write(flaxslim.plot_sweep(rows, title=Path(source).name or source), plot)
        messages.print(f"written to {plot}", markup=False)
    return 0


def _shares(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise BudgetError(
            "--keep is a list of shares",
            seen=text,
            expected="numbers above 0, up to 1",
            mend="--keep 0.9,0.7,0.5",
        )
    return found


# --- what is seen while it runs -----------------------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage, with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=messages) as progress:
        bars: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield told


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Warnings of the library as notes, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = dict.fromkeys(
        str(w.message)
        for w in caught
        if issubclass(w.category, CalibrationWarning)
        or w.category.__module__.startswith("flaxslim")
    )
    for text in said:
        messages.print(f"note: {in_flags(text)}", markup=False, soft_wrap=True)
