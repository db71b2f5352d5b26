"""What is compiled: training and evaluation of a model of one size, and what its teacher says."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flaxslim
from flaxslim._compat import shell
from flaxslim.cli._recipe import START, Recipe
from flaxslim.cli._tasks import Batch, Logits, Task
from flaxslim.errors import DivergedError


@dataclasses.dataclass(kw_only=True, eq=False)
class Program:
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


def make_program(recipe: Recipe, kind: type[Task], cls: Any, cfg: Any, tx: Any) -> Program:
    """The program for a model of these sizes."""
    model = shell(cls, cfg)
    distillation = recipe.distillation if recipe.distils else None
    key = jax.random.key(recipe.seed)

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

    return Program(
        tx=optax.with_extra_args_support(tx),
        step=jax.jit(step, donate_argnums=(0, 1)),
        forward=jax.jit(forward),
    )


def check_finite(losses: np.ndarray, step: int) -> None:
    """Raises `DivergedError` if one of the losses up to this step is no number."""
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        raise DivergedError(
            "the loss is no number any more, so the run stops",
            path=f"step {step - len(losses) + 1 + wrong[0]}",
            seen=losses[wrong[0]],
            mend="lower train.learning_rate, raise train.warmup, or say train.clip=1.0",
        )


# --- the teacher ------------------------------------------------------------------------------

# What the logits of a teacher for all training examples may take on the host.
_TABLE_BYTES = 2**30

# The logits of the teacher for a batch; none without distillation.
Teacher = Callable[[Batch], Logits]


def no_teacher(batch: Batch) -> Logits:
    """Nobody is heard."""
    return ()


def make_teacher(recipe: Recipe, task: Task, cls: Any, params: Any, cfg: Any) -> Teacher:
    """By a table of all its logits, where it is small and of use, else by running it each time."""
    distillation = recipe.distillation
    assert distillation is not None
    if distillation.teacher != START:
        loaded: Any = flaxslim.from_pretrained(cls, distillation.teacher)
        params, cfg = loaded.params, loaded.config
    else:
        params = jax.tree.map(jnp.copy, params)  # the first step gives its own ones up
    kind, size = type(task), recipe.train.batch_size
    forward = functools.partial(
        make_program(recipe, kind, cls, cfg, optax.sgd(0.0)).forward, params
    )
    batch = next(task.batches(size, np.random.default_rng(0)))
    shapes = jax.eval_shape(forward, kind.inputs(batch))
    each = sum(x.size * x.dtype.itemsize for x in shapes) / size
    if each * task.count <= _TABLE_BYTES and recipe.train.steps * size >= task.count:
        table = task.all_logits(forward, recipe.evaluation.batch_size)
        return lambda batch: kind.rows_of(table, batch)
    return lambda batch: forward(kind.inputs(batch))
