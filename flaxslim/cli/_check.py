"""`flaxslim run --check`: the first training step of a recipe, without its files."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flaxslim
from flaxslim.cli._build import check_floors, model_class, optimizer, sayable
from flaxslim.cli._program import check_finite, make_program
from flaxslim.cli._recipe import Recipe
from flaxslim.cli._report import channels, sizes
from flaxslim.cli._tasks import TASKS, Logits


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
    kind, cls = TASKS[recipe.task](), model_class(recipe)
    rng = np.random.default_rng(recipe.seed)
    with sayable(recipe):
        cfg = _config(recipe, cls)
        with flaxslim.layout():  # a source may have widths for each layer
            params = cls(cfg, seed=recipe.seed).params
    parameters, prunable = sizes(params)[0], channels(recipe, params, cfg)
    check_floors(recipe, params, cfg)
    batch = kind.random(recipe.data, cfg, min(batch_size, recipe.train.batch_size), rng)
    tx = optimizer(recipe, cfg, recipe.train.steps, prunes=recipe.prunes)
    with sayable(recipe):
        program = make_program(recipe, kind, cls, cfg, tx)
        teacher: Logits = ()
        if recipe.distils:
            shapes = jax.eval_shape(program.forward, params, kind.inputs(batch))
            teacher = tuple(rng.standard_normal(x.shape, np.float32) for x in shapes)
        state = program.tx.init(params)
        params, state, loss = program.train(params, state, batch, teacher, 1)
    compiling, began = program.compiling, time.perf_counter()
    _, _, loss = program.train(params, state, batch, teacher, 2)
    value = np.asarray(loss)
    check_finite(value[None], 1)
    return Checked(
        parameters=parameters,
        channels=prunable,
        loss=float(value),
        compiling=compiling,
        seconds=time.perf_counter() - began,
    )


def _config(recipe: Recipe, cls: Any) -> Any:
    source = recipe.model.source
    if source is None or not (Path(source) / "config.json").is_file():
        return cls.config_class(**recipe.model.config)
    cfg = cls.config_class.from_pretrained(source)
    cfg.update(dict(recipe.model.config))
    return cfg
