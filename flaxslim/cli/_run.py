"""`flaxslim run`: what a recipe says, from its first batch to a slimmed model that is proven.

    start -> dense steps -> steps while channels die, shrinking on the way -> save -> reload

Everything that depends on the sizes of the model is made anew when it shrinks: a `_Program`.
"""

import dataclasses
import functools
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flaxslim
from flaxslim._compat import shell
from flaxslim._errors import DivergedError, FlaxslimError, TargetError
from flaxslim._proof import Change, Proof
from flaxslim._prove import flops
from flaxslim.cli import _metrics, _plot, _table
from flaxslim.cli._console import messages
from flaxslim.cli._recipe import START, Recipe, Train
from flaxslim.cli._tasks import TASKS, Batch, Logits, Task
from flaxslim.specs import chosen

PARTIAL, RECIPE, REPORT, MODEL = ".partial", "recipe.toml", "report.json", "model"

# What the logits of a teacher for all training examples may take on the host.
_TABLE_BYTES = 2**30

# How long the dense and the slim model are run in turns at the end, in seconds and in calls.
_TIMED, _LEAST, _MOST = 4.0, 5, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunk:
    """One time that dead channels were cut out: after which step, and the proof, if asked for."""

    step: int
    removed: int
    proof: Proof | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to.

    Attributes:
      scores: the metrics of the model "dense", "pruned" and "slimmed, reloaded".
      step_flops: of one training step, by XLA's cost analysis of the compiled program.
      skipped: how many scores were not finite, so that they did not count.
      step_milliseconds, latency: medians, the dense and the slim model in turns. Latency is that
        of one forward pass on the example of the task.
    """

    scores: Mapping[str, Mapping[str, float]]
    parameters: Change
    bytes: Change
    step_flops: Change
    step_milliseconds: Change
    latency: Change
    shrunk: tuple[Shrunk, ...]
    skipped: int
    seconds: float
    folder: Path

    @property
    def predicted(self) -> float | None:
        """The time of a step after / before, as FLOPs say."""
        return self.step_flops.ratio

    @property
    def measured(self) -> float | None:
        """The time of a step after / before, as it is."""
        return self.step_milliseconds.ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = dataclasses.asdict(dataclasses.replace(self, shrunk=()))
        data |= {
            "folder": str(self.folder),
            "predicted": self.predicted,
            "measured": self.measured,
            "shrunk": [
                {
                    "step": one.step,
                    "removed": one.removed,
                    "proof": one.proof and one.proof.to_dict(),
                }
                for one in self.shrunk
            ],
        }
        return _metrics.plain(data)


def run(recipe: Recipe, *, overwrite: bool = False) -> Report:
    """Do what a recipe says. The output folder appears when all is done; until then what there is
    lies beside it, under the same name with ".partial".

    Raises `TargetError` if the folder exists, `DivergedError` if the loss is no number,
    `ProofError` if a shrunk model does not compute the same; and what reading and saving raise.
    """
    began = time.perf_counter()
    partial = _fresh_partial(recipe.output.folder, overwrite=overwrite)
    (partial / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
    with messages.status("reading model and data"):
        kind = TASKS[recipe.task]()
        task = kind.load(recipe.data, recipe.model.source)
        cls, params, cfg = _start(recipe)
    with _metrics.writer(partial, tensorboard=recipe.output.tensorboard) as metrics:
        story = _Story(recipe=recipe, kind=kind, task=task, cls=cls, metrics=metrics)
        ended = story.tell(params, cfg)
    model = partial / MODEL
    with messages.status("saving, reloading, and measuring"):
        flaxslim.save(model, ended.params, ended.cfg, record=_record(story))
        task.save_beside(model)
        reloaded: Any = flaxslim.from_pretrained(cls, model)
        story.scores["slimmed, reloaded" if recipe.prunes else "reloaded"] = story.evaluate(
            reloaded.config, reloaded.params
        )
        report = story.report(ended, time.perf_counter() - began)
    if recipe.output.plot:
        try:
            shrunk = [recipe.train.dense_steps + one.step for one in story.shrunk]
            _plot.plot(metrics.rows, partial / _plot.FILE, title=recipe.task, shrunk=shrunk)
        except FlaxslimError as error:  # all else is there: not worth a failure
            messages.print(f"note: {error}", markup=False, soft_wrap=True)
    (partial / REPORT).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    _publish(partial, recipe.output.folder)
    return report


# --- folders ----------------------------------------------------------------------------------


def partial_folder(folder: Path) -> Path:
    """Where a run writes until it is done."""
    return folder.with_name(folder.name + PARTIAL)


def _fresh_partial(folder: Path, *, overwrite: bool) -> Path:
    """An empty folder to write to. Only what a run has made is replaced."""
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise TargetError(
                "the output folder exists",
                path=str(folder),
                mend="name another (--out FOLDER), or replace it with --overwrite",
            )
        _refuse_foreign(folder, REPORT)
    partial = partial_folder(folder)
    if partial.exists():
        _refuse_foreign(partial, RECIPE)
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise TargetError(
            "the output folder cannot be made", path=str(partial), seen=error.strerror
        ) from error
    return partial


def _refuse_foreign(folder: Path, mark: str) -> None:
    if not (folder / mark).is_file():
        raise TargetError(
            "the folder holds something else than the output of a run, and is not replaced",
            path=str(folder),
            expected=f"a folder with {mark}",
            mend="name another folder",
        )


def _publish(partial: Path, folder: Path) -> None:
    """The model, and beside it the story of its making, under the name that was asked for."""
    model = partial / MODEL
    for path in list(partial.iterdir()):
        if path != model:
            path.rename(model / path.name)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    model.rename(folder)
    partial.rmdir()
    shutil.rmtree(old, ignore_errors=True)


def _record(story: "_Story") -> dict[str, Any]:
    """What `flaxslim.json` of the model keeps."""
    proof = next((one.proof for one in reversed(story.shrunk) if one.proof), None)
    pruned = f"{sum(one.removed for one in story.shrunk):,} channels were removed while training"
    return {
        "flaxslim": flaxslim.__version__,
        "exact": True,
        "proof": proof and proof.to_dict(),
        "card": f"Trained by flaxslim {flaxslim.__version__} on the task "
        f"{story.recipe.task!r}; {pruned}. The recipe is in {RECIPE}, what was measured in "
        f"{REPORT}.",
    }


# --- models -----------------------------------------------------------------------------------


def _class(recipe: Recipe) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return getattr(transformers, recipe.model.cls)


def _start(recipe: Recipe) -> tuple[Any, Any, Any]:
    """The class, parameters and config that a recipe begins with."""
    model, cls = recipe.model, _class(recipe)
    if model.source is None:
        cfg = cls.config_class(**model.config)
        params = cls(cfg, seed=recipe.seed).params
    else:
        revision = {"revision": model.revision} if model.revision else {}
        cfg = cls.config_class.from_pretrained(model.source, **revision)
        cfg.update(dict(model.config))
        loaded: Any = flaxslim.from_pretrained(
            cls, model.source, config=cfg, seed=recipe.seed, **revision
        )
        params = loaded.params
    cfg.architectures = [cls.__name__.removeprefix("Flax")]
    return cls, jax.tree.map(jnp.asarray, params), cfg


def _learning_rate(train: Train, steps: int) -> optax.Schedule:
    """Up from zero in `warmup` steps, and down again."""
    top, left = train.learning_rate, steps - train.warmup
    falls = {
        "linear": lambda: optax.linear_schedule(top, 0.0, left),
        "cosine": lambda: optax.cosine_decay_schedule(top, left),
        "constant": lambda: optax.constant_schedule(top),
    }
    rise = optax.linear_schedule(0.0, top, max(train.warmup, 1))
    fall = falls[train.decay]()
    return optax.join_schedules([rise, fall], [train.warmup]) if train.warmup else fall


def _optimizer(train: Train, rate: optax.Schedule) -> optax.GradientTransformation:
    decay = train.weight_decay
    made = {
        "adamw": lambda: optax.adamw(rate, weight_decay=decay),
        "adam": lambda: _decayed(decay, optax.adam(rate)),
        "lion": lambda: optax.lion(rate, weight_decay=decay),
        "sgd": lambda: _decayed(decay, optax.sgd(rate, momentum=0.9)),
    }[train.optimizer]()
    return optax.chain(optax.clip_by_global_norm(train.clip), made) if train.clip else made


def _decayed(decay: float, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), tx) if decay else tx


def _schedules(recipe: Recipe) -> dict[str, Any]:
    """When channels die, by axis."""
    p = recipe.pruning
    if p.schedule == "stepwise":
        steps = {int(step): share for step, share in p.stepwise.items()}
        return dict.fromkeys(p.axes, flaxslim.stepwise(steps))
    if p.schedule == "one_shot":
        return {axis: flaxslim.one_shot(share, at=p.begin) for axis, share in p.shares.items()}
    ramp = {
        "linear": flaxslim.linear,
        "cubic": flaxslim.cubic,
        "exponential": flaxslim.exponential,
    }[p.schedule]
    assert p.end is not None  # the recipe was checked
    return {
        axis: ramp(min(p.start, share), share, begin=p.begin, end=p.end, every=p.every)
        for axis, share in p.shares.items()
    }


# --- what is compiled -------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True, eq=False)
class _Program:
    """Training and evaluation of a model of one size.

    Attributes:
      step: (params, state, batch, teacher's logits, step) -> (params, state, loss); the first two
        are given up.
      forward: (params, inputs) -> logits.
      compiling: seconds that went into it so far.
    """

    tx: optax.GradientTransformationExtraArgs
    step: Any
    forward: Any
    compiling: float = 0.0
    known: set[Any] = dataclasses.field(default_factory=set)

    def train(self, params: Any, state: Any, batch: Batch, teacher: Logits, step: int) -> Any:
        """One step; the time that a new shape of batch takes to compile is set apart."""
        key = tuple(np.shape(x) for x in jax.tree.leaves((batch, teacher)))
        began = time.perf_counter()
        result = self.step(params, state, batch, teacher, np.int32(step))
        if key not in self.known:
            self.known.add(key)
            jax.block_until_ready(result)
            self.compiling += time.perf_counter() - began
        return result


def _program(recipe: Recipe, kind: type[Task], cls: Any, cfg: Any, tx: Any) -> _Program:
    model = shell(cls, cfg)
    distillation, key = recipe.distillation, jax.random.key(recipe.seed)

    def total(logits: Logits, teacher: Logits, batch: Batch) -> Any:
        loss = kind.loss(logits, batch)
        if distillation is None or not teacher:
            return loss
        other = flaxslim.distill_loss(
            logits, teacher, temperature=distillation.temperature, mask=kind.mask(batch)
        )
        return distillation.task_weight * loss + distillation.weight * other

    def step(params: Any, state: Any, batch: Batch, teacher: Logits, number: Any) -> Any:
        def objective(params: Any) -> Any:
            dropout = jax.random.key_data(jax.random.fold_in(key, number))
            outputs = model(**kind.inputs(batch), params=params, dropout_rng=dropout, train=True)
            return total(kind.logits(outputs), teacher, batch)

        loss, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def forward(params: Any, inputs: Mapping[str, Any]) -> Logits:
        return kind.logits(model(**inputs, params=params, train=False))

    return _Program(
        tx=optax.with_extra_args_support(tx),
        step=jax.jit(step, donate_argnums=(0, 1)),
        forward=jax.jit(forward),
    )


# --- the teacher ------------------------------------------------------------------------------

# The logits of the teacher for a batch; none without distillation.
_Teacher = Callable[[Batch], Logits]


def _no_teacher(batch: Batch) -> Logits:
    return ()


def _teacher(recipe: Recipe, task: Task, cls: Any, params: Any, cfg: Any) -> _Teacher:
    """By a table of all its logits, where it is small and of use, else by running it each time."""
    if (distillation := recipe.distillation) is None:
        return _no_teacher
    if distillation.teacher != START:
        loaded: Any = flaxslim.from_pretrained(cls, distillation.teacher)
        params, cfg = loaded.params, loaded.config
    else:
        params = jax.tree.map(jnp.copy, params)  # the first step gives its own ones up
    kind, size = type(task), recipe.train.batch_size
    forward = functools.partial(_program(recipe, kind, cls, cfg, optax.sgd(0.0)).forward, params)
    batch = next(task.batches(size, np.random.default_rng(0)))
    shapes = jax.eval_shape(forward, kind.inputs(batch))
    each = sum(x.size * x.dtype.itemsize for x in shapes) / size
    if each * task.count <= _TABLE_BYTES and recipe.train.steps * size >= task.count:
        table = task.all_logits(forward, recipe.evaluation.batch_size)
        return lambda batch: kind.rows_of(table, batch)
    return lambda batch: forward(kind.inputs(batch))


# --- the story --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Point:
    """Where a run stands."""

    params: Any
    state: Any
    cfg: Any
    program: _Program


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
    dense: _Program | None = None
    dense_shapes: Any = None

    def tell(self, params: Any, cfg: Any) -> _Point:
        """Train, dense and while channels die; returns the model at the end."""
        train = self.recipe.train
        if train.dense_steps:
            point = self._begin(params, cfg, train.dense_steps, prunes=False)
            with _table.training("dense", train.dense_steps) as said:
                point = self._steps(point, train.dense_steps, _no_teacher, said, dense=True)
            params = point.params
        if self.recipe.evaluation.dense:
            self.scores["dense"] = self.evaluate(cfg, params)
        teacher = _no_teacher
        if self.recipe.distillation is not None:
            with messages.status("asking the teacher"):
                teacher = _teacher(self.recipe, self.task, self.cls, params, cfg)
        self.dense_shapes = jax.eval_shape(lambda: params)
        point = self._begin(params, cfg, train.steps, prunes=self.recipe.prunes)
        self.dense = point.program
        what = "pruning" if self.recipe.prunes else "training"
        with _table.training(what, train.steps) as said:
            point = self._steps(point, train.steps, teacher, said, dense=False)
        if self.recipe.prunes:
            self.scores["pruned"] = self.evaluate(point.cfg, point.params)
            if self.recipe.shrink.end:
                point = self._shrink(point, train.steps)
        return point

    def evaluate(self, cfg: Any, params: Any) -> dict[str, float]:
        """The metrics of a model."""
        program = _program(self.recipe, self.kind, self.cls, cfg, optax.sgd(0.0))
        forward = functools.partial(program.forward, params)
        with messages.status("evaluating"):
            return self.task.evaluate(forward, self.recipe.evaluation.batch_size)

    # --- training -----------------------------------------------------------------------------

    def _begin(self, params: Any, cfg: Any, steps: int, *, prunes: bool) -> _Point:
        program = self._compile(cfg, steps, prunes=prunes)
        state = _owned(program.tx.init(params))
        return _Point(params=params, state=state, cfg=cfg, program=program)

    def _compile(self, cfg: Any, steps: int, *, prunes: bool) -> _Program:
        tx = optimizer(self.recipe, cfg, steps, prunes=prunes)
        return _program(self.recipe, self.kind, self.cls, cfg, tx)

    def _steps(
        self, point: _Point, steps: int, teacher: _Teacher, said: Any, *, dense: bool
    ) -> _Point:
        """Train for so many steps, shrink where the recipe says so, and log."""
        recipe = self.recipe
        at = () if dense or not recipe.prunes else recipe.shrink.at
        before = 0 if dense else recipe.train.dense_steps
        batches = self.task.batches(
            recipe.train.batch_size, np.random.default_rng([recipe.seed, int(dense)])
        )
        rate = _learning_rate(recipe.train, steps)
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
                _check_finite(values, before + step)
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
        removed = _channels(recipe, point.params, point.cfg) - _channels(recipe, params, cfg)
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
        return _Point(params=params, state=_owned(state), cfg=cfg, program=program)

    # --- at the end ---------------------------------------------------------------------------

    def report(self, end: _Point, seconds: float) -> Report:
        """Sizes and speed, of the model as it was and as it is."""
        sizes = [_sizes(self.dense_shapes), _sizes(end.params)]
        batch = next(
            self.task.batches(self.recipe.train.batch_size, np.random.default_rng(self.recipe.seed))
        )
        batch.pop("rows", None)
        assert self.dense is not None
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.dense_shapes)
        runs = [(self.dense, zeros)]
        if self.shrunk:
            runs.append((end.program, end.params))
        steps = [_Stepping.of(program, params, batch) for program, params in runs]
        taken = _in_turns([one.step for one in steps])
        example = self.task.example()
        passes = _in_turns(
            [functools.partial(program.forward, params, example) for program, params in runs]
        )
        return Report(
            scores=self.scores,
            parameters=_change([size for size, _ in sizes]),
            bytes=_change([size for _, size in sizes]),
            step_flops=_change([one.flops for one in steps]),
            step_milliseconds=_change(taken),
            latency=_change(passes),
            shrunk=tuple(self.shrunk),
            skipped=self.skipped,
            seconds=seconds,
            folder=self.recipe.output.folder,
        )


def optimizer(recipe: Recipe, cfg: Any, steps: int, *, prunes: bool) -> Any:
    """The optimizer of a recipe, for a model of these sizes."""
    inner = _optimizer(recipe.train, _learning_rate(recipe.train, steps))
    if not prunes:
        return inner
    p = recipe.pruning
    return flaxslim.pruning(
        inner,
        chosen(p.spec, cfg),
        _schedules(recipe),
        p.score,
        cfg=cfg,
        allocation=p.allocation,
        min_width=p.min_width,
        max_sparsity=p.max_sparsity,
        fade=p.fade,
        regrow=p.regrow,
        seed=recipe.seed,
    )


def _owned(state: Any) -> Any:
    """Each array in a buffer of its own, as giving them up asks; `init` may share its zeros."""
    return jax.tree.map(jnp.copy, state)


def _check_finite(losses: np.ndarray, step: int) -> None:
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        raise DivergedError(
            "the loss is no number any more, so the run stops",
            path=f"step {step - len(losses) + 1 + wrong[0]}",
            seen=losses[wrong[0]],
            mend="lower train.learning_rate, raise train.warmup, or say train.clip=1.0",
        )


def _channels(recipe: Recipe, params: Any, cfg: Any) -> int:
    sites = chosen(recipe.pruning.spec, cfg).sites(params, cfg)
    return sum(site.size * site.rows for site in sites)


def _sizes(tree: Any) -> tuple[int, int]:
    """The number of parameters, and of their bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)


def _change(values: Any) -> Change:
    """Before and after; the same where nothing was cut."""
    return Change(before=values[0], after=values[-1])


@dataclasses.dataclass(kw_only=True)
class _Stepping:
    """A training step that is repeated, on the same batch."""

    program: _Program
    params: Any
    state: Any
    batch: Batch
    teacher: Logits
    flops: float | None

    @classmethod
    def of(cls, program: _Program, params: Any, batch: Batch) -> "_Stepping":
        params = jax.tree.map(jnp.copy, params)
        state = _owned(program.tx.init(params))
        return cls(
            program=program,
            params=params,
            state=state,
            batch=batch,
            teacher=(),
            flops=flops(program.step, params, state, batch, (), np.int32(1)),
        )

    def step(self) -> Any:
        self.params, self.state, loss = self.program.step(
            self.params, self.state, self.batch, self.teacher, np.int32(1)
        )
        return loss


def _in_turns(calls: list[Callable[[], Any]]) -> list[float]:
    """Medians in milliseconds, in turns, so that a busy machine slows all of them alike."""
    for call in calls:  # compiles
        jax.block_until_ready(call())
    taken: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for number in range(_MOST):
        if number >= _LEAST and time.perf_counter() - began > _TIMED:
            break
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


# --- a check without files --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """The first training step of a recipe on a random model."""

    parameters: int
    channels: int
    loss: float
    compiling: float
    seconds: float


def check(recipe: Recipe, *, batch_size: int = 2) -> Checked:
    """Take the first training step with random weights and numbers; no file and no network.

    The config is that of the source, if it is a folder that is there; else what the recipe says
    of it, and the defaults of its class.
    """
    kind, cls = TASKS[recipe.task](), _class(recipe)
    source = recipe.model.source
    if source is not None and (Path(source) / "config.json").is_file():
        cfg = cls.config_class.from_pretrained(source)
        cfg.update(dict(recipe.model.config))
    else:
        cfg = cls.config_class(**recipe.model.config)
    params = cls(cfg, seed=recipe.seed).params
    parameters, channels = _sizes(params)[0], _channels(recipe, params, cfg)
    rng = np.random.default_rng(recipe.seed)
    batch = kind.random(recipe.data, cfg, min(batch_size, recipe.train.batch_size), rng)
    tx = optimizer(recipe, cfg, recipe.train.steps, prunes=recipe.prunes)
    program = _program(recipe, kind, cls, cfg, tx)
    teacher: Logits = ()
    if recipe.distillation is not None:
        shapes = jax.eval_shape(program.forward, params, kind.inputs(batch))
        teacher = tuple(rng.standard_normal(x.shape, np.float32) for x in shapes)
    state = _owned(program.tx.init(params))
    params, state, loss = program.train(params, state, batch, teacher, 1)
    compiling, began = program.compiling, time.perf_counter()
    _, _, loss = program.train(params, state, batch, teacher, 2)
    value = np.asarray(loss)
    _check_finite(value[None], 1)
    return Checked(
        parameters=parameters,
        channels=channels,
        loss=float(value),
        compiling=compiling,
        seconds=time.perf_counter() - began,
    )
