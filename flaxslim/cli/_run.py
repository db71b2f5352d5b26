"""`flaxslim run`: what a recipe says, from its first batch to a slimmed model that is proven.

    start -> dense steps -> steps while channels die, shrinking on the way -> save -> reload

Everything that depends on the sizes of the model is made anew when it shrinks: a `Program`.
"""

import dataclasses
import functools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flaxslim
from flaxslim.cli import _build, _metrics, _output, _table
from flaxslim.cli._console import messages
from flaxslim.cli._program import (
    Program,
    Teacher,
    check_finite,
    make_program,
    make_teacher,
    no_teacher,
)
from flaxslim.cli._recipe import Recipe
from flaxslim.cli._report import Report, Shrunk, change, channels, sizes, speed
from flaxslim.cli._tasks import TASKS, Task
from flaxslim.errors import FlaxslimError
from flaxslim.plots import _style
from flaxslim.specs import chosen


def run(recipe: Recipe, *, overwrite: bool = False) -> Report:
    """Do what a recipe says. The output folder appears when all is done; until then what there is
    lies beside it, under the same name with ".partial".

    Raises `TargetError` if the folder exists, `DivergedError` if the loss is no number,
    `ProofError` if a shrunk model does not compute the same; and what reading and saving raise.
    """
    with _output.fresh_partial(recipe.output.folder, overwrite=overwrite) as partial:
        report = _told(recipe, partial)
        _output.publish(partial, recipe.output.folder)
    return report


def _told(recipe: Recipe, partial: Path) -> Report:
    """Do it in a folder."""
    began = time.perf_counter()
    (partial / _output.RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
    with messages.status("reading model and data"):
        kind = TASKS[recipe.task]()
        task = kind.load(recipe.data, recipe.model.source)
        cls, params, cfg = _build.start(recipe)
        task.check(cfg)
        _build.check_widths(recipe, cfg)
        _build.check_floors(recipe, params, cfg)
    with _metrics.writer(partial, tensorboard=recipe.output.tensorboard) as metrics:
        story = _Story(recipe=recipe, kind=kind, task=task, cls=cls, metrics=metrics)
        ended = story.tell(params, cfg)
    model = partial / _output.MODEL
    with messages.status("saving, reloading, and measuring"):
        flaxslim.save(model, ended.params, ended.cfg, record=_record(story, ended))
        task.save_beside(model)
        reloaded: Any = flaxslim.from_pretrained(cls, model)
        story.scores["slimmed, reloaded" if recipe.prunes else "reloaded"] = story.evaluate(
            reloaded.config, reloaded.params
        )
        report = story.report(ended, time.perf_counter() - began)
    if recipe.output.plot:
        try:
            shrunk = [recipe.train.dense_steps + one.step for one in story.shrunk]
            rows = [dataclasses.asdict(row) for row in metrics.rows]
            figure = flaxslim.plot_training(rows, shrunk=shrunk, title=recipe.task)
            _style.write(figure, partial / _output.PICTURE)
        except FlaxslimError as error:  # all else is there: not worth a failure
            messages.print(f"note: {error}", markup=False, soft_wrap=True)
    (partial / _output.REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    return report


def _record(story: "_Story", ended: "_Point") -> dict[str, Any]:
    """What `flaxslim.json` of the model keeps."""
    proof = next((one.proof for one in reversed(story.shrunk) if one.proof), None)
    pruned = f"{sum(one.removed for one in story.shrunk):,} channels were removed while training"
    return {
        "flaxslim": flaxslim.__version__,
        "exact": True,
        "proof": proof and proof.to_dict(),
        "sites": _widths(story, ended),
        "card": f"Trained by flaxslim {flaxslim.__version__} on the task "
        f"{story.recipe.task!r}; {pruned}. The recipe is in {_output.RECIPE}, what was measured in "
        f"{_output.REPORT}.",
    }


def _widths(story: "_Story", ended: "_Point") -> list[dict[str, Any]]:
    """Each site by the path of its second kernel, with its width at first and at the end."""
    spec = chosen(story.recipe.pruning.spec, ended.cfg)
    after = {site.second.path: site.size for site in spec.sites(ended.params, ended.cfg)}
    return [
        {
            "path": (path := site.second.path),
            "unit": site.pair.unit,
            "before": site.size,
            "after": after.get(path, 0),
        }
        for site in spec.sites(story.dense_shapes, story.dense_cfg)
    ]


# --- the story --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Point:
    """Where a run stands."""

    params: Any
    state: Any
    cfg: Any
    program: Program


@dataclasses.dataclass(kw_only=True)
class _Story:
    """One run: what it was told, and what has come of it so far."""

    recipe: Recipe
    kind: type[Task]
    task: Task
    cls: Any
    metrics: _metrics.Writer
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    shrunk: list[Shrunk] = dataclasses.field(default_factory=list)
    skipped: int = 0
    dense: Program | None = None
    dense_shapes: Any = None
    dense_cfg: Any = None

    def tell(self, params: Any, cfg: Any) -> _Point:
        """Train, dense and while channels die; returns the model at the end."""
        train = self.recipe.train
        if train.dense_steps:
            point = self._begin(params, cfg, train.dense_steps, prunes=False)
            with _table.training("dense", train.dense_steps) as said:
                point = self._steps(point, train.dense_steps, no_teacher, said, dense=True)
            params = point.params
        if self.recipe.evaluation.dense:
            self.scores["dense"] = self.evaluate(cfg, params)
        teacher = no_teacher
        if self.recipe.distils:
            with messages.status("asking the teacher"):
                teacher = make_teacher(self.recipe, self.task, self.cls, params, cfg)
        self.dense_shapes, self.dense_cfg = jax.eval_shape(lambda: params), cfg
        point = self._begin(params, cfg, train.steps, prunes=self.recipe.prunes)
        self.dense = point.program
        what = "pruning" if self.recipe.prunes else "training"
        with _table.training(what, train.steps) as said:
            point = self._steps(point, train.steps, teacher, said, dense=False)
        if self.recipe.prunes:
            if self.recipe.evaluation.pruned:
                self.scores["pruned"] = self.evaluate(point.cfg, point.params)
            if self.recipe.shrink.end:
                point = self._shrink(point, train.steps)
        return point

    def evaluate(self, cfg: Any, params: Any) -> dict[str, float]:
        """The metrics of a model."""
        program = make_program(self.recipe, self.kind, self.cls, cfg, optax.sgd(0.0))
        forward = functools.partial(program.forward, params)
        with messages.status("evaluating"):
            return self.task.evaluate(forward, self.recipe.evaluation.batch_size)

    # --- training -----------------------------------------------------------------------------

    def _begin(self, params: Any, cfg: Any, steps: int, *, prunes: bool) -> _Point:
        program = self._compile(cfg, steps, prunes=prunes)
        state = program.tx.init(params)
        return _Point(params=params, state=state, cfg=cfg, program=program)

    def _compile(self, cfg: Any, steps: int, *, prunes: bool) -> Program:
        tx = _build.optimizer(self.recipe, cfg, steps, prunes=prunes)
        return make_program(self.recipe, self.kind, self.cls, cfg, tx)

    def _steps(
        self, point: _Point, steps: int, teacher: Teacher, said: Any, *, dense: bool
    ) -> _Point:
        """Train for so many steps, shrink where the recipe says so, and log."""
        recipe = self.recipe
        at = () if dense or not recipe.prunes else recipe.shrink.at
        before = 0 if dense else recipe.train.dense_steps
        batches = self.task.batches(
            recipe.train.batch_size, np.random.default_rng([recipe.seed, int(dense)])
        )
        rate = _build.learning_rate(recipe.train, steps)
        losses: list[Any] = []
        began, lost = time.perf_counter(), point.program.compiling
        for step in range(1, steps + 1):
            batch = next(batches)
            logits = teacher(batch)
            batch = {name: x for name, x in batch.items() if name != "rows"}
            params, state, loss = point.program.train(
                point.params, point.state, batch, logits, before + step
            )
            point = dataclasses.replace(point, params=params, state=state)
            losses.append(loss)
            said(step)
            if step % recipe.output.log_every == 0 or step == steps or step in at:
                values = np.asarray(jax.device_get(losses))  # waits for them
                taken = time.perf_counter() - began - (point.program.compiling - lost)
                check_finite(values, before + step)
                row = _metrics.Row(
                    step=before + step,
                    loss=float(values.mean()),
                    ms_per_step=1e3 * taken / len(losses),
                    learning_rate=float(np.asarray(rate(step - 1))),
                    **self._census(point),
                )
                self.metrics.add(row)
                said(step, row)
                losses = []
                if step in at:
                    point = self._shrink(point, step)
                began, lost = time.perf_counter(), point.program.compiling
        return point

    def _census(self, point: _Point) -> dict[str, Any]:
        """Sparsity and living widths; of the FFNs, where heads are pruned as well."""
        spec = chosen(self.recipe.pruning.spec, point.cfg)
        sites = spec.sites(point.params, point.cfg)
        axis = "f" if any(site.pair.axis == "f" for site in sites) else "h"
        widths = {site.second.path: site.size for site in sites if site.pair.axis == axis}
        total = 0.0
        if hasattr(point.state, "channels"):
            found = flaxslim.sparsity(point.state)
            total, self.skipped = float(found.total), found.skipped
            widths = {path: found.widths.get(path, size) for path, size in widths.items()}
        return {
            "sparsity": total,
            "width_min": min(widths.values()),
            "width_max": max(widths.values()),
        }

    def _shrink(self, point: _Point, step: int) -> _Point:
        """Cut out what is dead, prove it, and compile anew for what is left."""
        recipe, shrink = self.recipe, self.recipe.shrink
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            params, state, cfg = flaxslim.shrink(
                point.params,
                point.state,
                point.cfg,
                spec=chosen(recipe.pruning.spec, point.cfg),
                width=shrink.width,
                multiple_of=shrink.multiple_of,
            )
        for warning in caught:
            # After an earlier time it is no news that nothing more has died.
            silent = self.shrunk and warning.category is flaxslim.NothingRemovedWarning
            if issubclass(warning.category, UserWarning) and not silent:
                messages.print(f"note: {warning.message}", markup=False, soft_wrap=True)
        removed = channels(recipe, point.params, point.cfg) - channels(recipe, params, cfg)
        if not removed:
            return point
        proof = None
        if shrink.verify:
            proof = flaxslim.verify(
                (point.params, point.cfg),
                (params, cfg),
                self.cls,
                inputs=self.task.example(),
                spec=chosen(recipe.pruning.spec, point.cfg),
                repeats=0,
            )
            proof.raise_if_failed()
        self.shrunk.append(Shrunk(step=step, removed=removed, proof=proof))
        program = self._compile(cfg, recipe.train.steps, prunes=True)
        return _Point(params=params, state=state, cfg=cfg, program=program)

    # --- at the end ---------------------------------------------------------------------------

    def report(self, end: _Point, seconds: float) -> Report:
        """Sizes and speed, of the model as it was and as it is."""
        both = [sizes(self.dense_shapes), sizes(end.params)]
        batch = next(
            self.task.batches(self.recipe.train.batch_size, np.random.default_rng(self.recipe.seed))
        )
        batch.pop("rows", None)
        assert self.dense is not None
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.dense_shapes)
        runs = [(self.dense, zeros)]
        if self.shrunk:
            runs.append((end.program, end.params))
        step_flops, taken, latency = speed(runs, batch, self.task.example())
        return Report(
            scores=self.scores,
            parameters=change([count for count, _ in both]),
            bytes=change([size for _, size in both]),
            step_flops=step_flops,
            step_milliseconds=taken,
            latency=latency,
            shrunk=tuple(self.shrunk),
            skipped=self.skipped,
            seconds=seconds,
            folder=self.recipe.output.folder,
        )
