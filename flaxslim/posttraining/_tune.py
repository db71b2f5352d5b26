"""A short distillation of what is left against the dense model, on calibration data with no labels.

The model learns to make every linear layer read what it reads in the dense model, and to give the
same outputs. What is read is captured (`_capture`), so that no class need be known. Some of the
batches are held out; the parameters that are best on them are kept, those of the start if need be.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxslim import _tree
from flaxslim._spec import Site
from flaxslim.errors import CalibrationError
from flaxslim.posttraining._calibration import Calibration
from flaxslim.posttraining._capture import inner_axes
from flaxslim.posttraining._distance import Distance
from flaxslim.training._channels import masks

_RATE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune:
    """How long and how hard. A step takes as many samples as a batch of the calibration data.

    Attributes:
      steps: of Adam, at most.
      learning_rate: at its top; it rises in the first tenth of the steps and falls by a cosine.
        None: 0.1 / d, d being what the widest second layer puts out. What is best for Adam falls
        with the width (Yang et al. 2022, arXiv 2203.03466); 0.1 fits models of d = 64 and 384.
      noise: the share of tokens that is replaced by others of the calibration data, anew in each
        step. The dense model says what is right for any text, so that this makes more of them.
      hidden: the weight of what the layers read, against that of the outputs.
      every: steps between two looks at what is held out. The parameters of the best look are kept;
        while the rate is high they may be worse than at the start for long.
    """

    steps: int = 2500
    learning_rate: float | None = None
    noise: float = 0.3
    hidden: float = 1.0
    every: int = 50

    def __post_init__(self) -> None:
        counts = (self.steps, self.every)
        if not all(type(x) is int and x > 0 for x in counts) or self.steps < 2:
            raise CalibrationError(
                "tuning goes on for whole numbers of steps",
                seen=f"steps={self.steps}, every={self.every}",
                expected="1 or more of each, and two steps",
            )
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if not (0 <= self.noise < 1 and rate > 0 and self.hidden >= 0):
            raise CalibrationError(
                "tuning makes no sense like this",
                seen=f"noise={self.noise}, learning_rate={self.learning_rate}, "
                f"hidden={self.hidden}",
                expected="noise from 0 up to, not including, 1; a positive learning rate; hidden "
                "of 0 or more",
            )


def tune(
    calibration: Calibration,
    params: Any,
    dense: Any,
    sites: Sequence[Site],
    alive: Mapping[str, np.ndarray],
    *,
    only: Collection[str] | None = None,
    how: Tune,
    distance: Distance,
    seed: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> tuple[Any, dict[str, float]]:
    """The tuned parameters, and the loss on what is held out: `before`, `after`, at which `step`.

    `alive` are the living channels `(s, f)` of the sites, by the paths of their second kernels; the
    rows of the others stay zero. `only` are the paths of what may be tuned, if not all may.
    """
    fit, held = split(calibration)
    leaves = _tree.flatten(params)
    free = _free(calibration, leaves, fit[0], only)
    living = masks(sites, alive, lambda site: site.reading)

    tx = _optimizer(how, sites)
    # In 16 bits a step would be lost in rounding, and Adam's squares would vanish.
    own = {path: jnp.asarray(leaves[path], _wide(leaves[path].dtype)) for path in free}

    def stored(own: Any) -> Any:
        return {path: x.astype(leaves[path].dtype) for path, x in own.items()}

    def value(own: Any, fixed: Any, dense: Any, batch: Any) -> Any:
        return distance(_tree.replace(fixed, stored(own)), dense, batch, hidden=how.hidden)

    @jax.jit
    def step(own: Any, state: Any, fixed: Any, dense: Any, batch: Any) -> Any:
        grads = jax.grad(value)(own, fixed, dense, batch)
        grads = {p: jnp.where(living[p], g, 0) if p in living else g for p, g in grads.items()}
        updates, state = tx.update(grads, state, own)
        return optax.apply_updates(own, updates), state

    measured = jax.jit(value)

    def held_out(own: Any) -> float:
        return float(np.mean([float(measured(own, params, dense, batch)) for batch in held]))

    batches = _batches(fit, how, np.random.default_rng(seed))

    def following(own: Any, state: Any) -> Any:
        return step(own, state, params, dense, next(batches))

    best, losses = _best(own, tx.init(own), following, held_out, how, told)
    return (_tree.replace(params, stored(best)) if losses["step"] else params), losses


def _best(
    own: Any,
    state: Any,
    following: Callable[[Any, Any], tuple[Any, Any]],
    held_out: Callable[[Any], float],
    how: Tune,
    told: Callable[[int], None],
) -> tuple[Any, dict[str, float]]:
    """What has the least loss on what is held out, of all that was looked at along the steps."""
    start = held_out(own)
    best, least, at = own, start, 0
    for number in range(1, how.steps + 1):
        own, state = following(own, state)
        if number % how.every == 0 or number == how.steps:
            now = held_out(own)
            if now < least:
                best, least, at = own, now, number
            elif not math.isfinite(now):
                break
        told(number)
    return best, {"before": start, "after": least, "step": at}


def _optimizer(how: Tune, sites: Sequence[Site]) -> optax.GradientTransformation:
    top = _RATE / max(map(_outputs, sites)) if how.learning_rate is None else how.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, top, max(how.steps // 10, 1), how.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def check_tunable(calibration: Calibration) -> None:
    """Raise `CalibrationError` if nothing would be held out."""
    if not split(calibration)[1]:
        raise CalibrationError(
            "tuning needs a batch that is held out, and there is one batch in all",
            mend="pass the calibration data in two batches or more, or a preset that does not tune",
        )


def split(calibration: Calibration) -> tuple[list[Any], list[Any]]:
    """The batches to learn by, and those that are held out.

    The latter are half of those that ridges are chosen by: to see which look is best takes fewer,
    and what is learnt by is scarce.
    """
    both = list(zip(calibration.batches, calibration.held_out, strict=True))
    held = [batch for batch, out in both if out]
    return [batch for batch, out in both if not out] + held[1::2], held[::2]


def _free(
    calibration: Calibration, leaves: Mapping[str, Any], batch: Any, only: Collection[str] | None
) -> list[str]:
    """What is tuned: all that is floating but tables that are looked up, which overfit at once."""
    traced = calibration.traced(batch)
    tables = traced.tables - traced.kernels
    collections = any(path.startswith("params/") for path in leaves)
    return [
        path
        for path, leaf in leaves.items()
        if path not in tables
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and (path.startswith("params/") or not collections)  # no running statistics
        and (only is None or path in only)
    ]


def _outputs(site: Site) -> int:
    """How many numbers the second layer puts out."""
    sizes = site.second.axes.sizes(site.second.shape)
    inner = math.prod(sizes[name] for name in inner_axes(site))
    return math.prod(site.second.shape) // (site.rows * inner)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _batches(fit: Sequence[Any], how: Tune, rng: np.random.Generator) -> Iterator[Any]:
    """Batches without end: rows of all batches of one shape, mixed anew, tokens replaced.

    Numbers that a batch has for all of its rows stay with these.
    """
    groups: dict[Any, list[Any]] = {}
    for batch in fit:
        leaves = [np.asarray(x) for x in jax.tree.leaves(batch)]
        alike = tuple(x.shape[1:] if x.ndim else x.item() for x in leaves)
        groups.setdefault((jax.tree.structure(batch), alike), []).append(batch)
    pools = [jax.tree.map(_joined, *own) for own in groups.values()]
    largest = [max(map(_rows, own)) for own in groups.values()]
    sizes = np.array([_rows(pool) for pool in pools])
    replace = _replacing(pools, how.noise)
    while True:
        number = rng.choice(len(pools), p=sizes / sizes.sum())
        pool, rows = pools[number], rng.permutation(sizes[number])[: largest[number]]
        taken = jax.tree.map(lambda x, rows=rows: x[rows] if x.ndim else x, pool)
        yield replace(taken, rng)


def _joined(*parts: Any) -> np.ndarray:
    arrays = [np.asarray(x) for x in parts]
    return np.concatenate(arrays) if arrays[0].ndim else arrays[0]


def _rows(batch: Any) -> int:
    """How many samples there are."""
    return next(len(x) for x in jax.tree.leaves(batch) if np.ndim(x))


def _replacing(pools: Sequence[Any], share: float) -> Callable[[Any, Any], Any]:
    """A function that replaces a share of the tokens of a batch, if it has any.

    What stands in every sample (a first token, a separator) is left alone.
    """
    texts = [p for p in pools if isinstance(p, Mapping) and "input_ids" in p]
    if not share or len(texts) < len(pools):
        return lambda batch, rng: batch
    samples = [set(row.ravel().tolist()) for pool in texts for row in pool["input_ids"]]
    everywhere = np.array(sorted(set.intersection(*samples)), int)
    tokens = np.concatenate([_real(pool) for pool in texts])
    tokens = tokens[~np.isin(tokens, everywhere)]
    if not len(tokens):
        return lambda batch, rng: batch

    def replace(batch: Any, rng: np.random.Generator) -> Any:
        ids = batch["input_ids"].copy()
        mask = batch.get("attention_mask", np.ones_like(ids))
        hit = (rng.random(ids.shape) < share) & (mask > 0) & ~np.isin(ids, everywhere)
        ids[hit] = rng.choice(tokens, int(hit.sum()))
        return {**batch, "input_ids": ids}

    return replace


def _real(pool: Any) -> np.ndarray:
    ids = pool["input_ids"]
    return ids[pool.get("attention_mask", np.ones_like(ids)) > 0]
