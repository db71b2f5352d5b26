"""Scores by the gradient of a loss on calibration data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _tree
from flaxslim._spec import Site
from flaxslim.errors import CalibrationError
from flaxslim.posttraining._calibration import Calibration, side_of
from flaxslim.training._channels import Rows
from flaxslim.training._score import Evidence, ScoreFn, as_score

# (outputs, batch) -> scalar.
Objective = Callable[[Any, Any], Any]


def gradient_rows(
    calibration: Calibration,
    params: Any,
    sites: Sequence[Site],
    score: str | ScoreFn,
    objective: Objective | None = None,
    *,
    seed: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, np.ndarray]:
    """What the channels of each site score, `(s, f)` by the path of its second kernel.

    A score that adds up goes through the batches one by one, any other takes the mean gradient.
    Without an objective the gradient is that of the outputs times random signs: in expectation its
    square is what a squared error of the outputs has on the diagonal of its Gauss-Newton matrix
    (Hutchinson 1989), so no labels are needed.

    Raises `CalibrationError` if the gradient is not finite.
    """
    known, leaves = as_score(score), _tree.flatten(params)
    paths = [tensor.path for site in sites for tensor in site.cut]

    @jax.jit
    def gradient(own: Any, params: Any, batch: Any, key: Any) -> Any:
        def value(own: Any) -> Any:
            return value_of(calibration, objective, _tree.replace(params, own), batch, key)

        return jax.grad(value)(own)

    def rows(grads: Any, state: Mapping[str, Rows]) -> dict[str, Rows]:
        return {
            site.second.path: known.rows(
                Evidence(
                    site=site,
                    params=leaves,
                    grads=grads,
                    state=state[site.second.path],
                    activations={},
                    seed=seed,
                )
            )
            for site in sites
        }

    own = {path: leaves[path] for path in dict.fromkeys(paths)}
    state: dict[str, Rows] = {
        site.second.path: jnp.zeros((site.rows, site.size), jnp.float32) for site in sites
    }
    mean: Any = None
    for number, batch in enumerate(calibration.batches):
        grads = gradient(own, params, batch, jax.random.fold_in(jax.random.key(seed), number))
        if known.adds_up:
            state = rows(grads, state)
        else:
            mean = grads if mean is None else jax.tree.map(jnp.add, mean, grads)
        told(number + 1)
    if mean is not None:
        state = rows(jax.tree.map(lambda g: g / len(calibration.batches), mean), state)
    found = {path: np.asarray(x, np.float64) for path, x in state.items()}
    for path, x in found.items():
        if not np.isfinite(x).all():
            raise CalibrationError(
                "the gradient of the objective on the calibration data is not finite",
                path=path,
                mend="give an objective=(outputs, batch) -> scalar that is smooth there",
            )
    return found


def value_of(
    calibration: Calibration, objective: Objective | None, params: Any, batch: Any, key: Any
) -> Any:
    """What the gradient is taken of on a batch; `key` is for the random signs."""
    out = calibration.fn(params, batch)
    return _signed(calibration, out, batch, key) if objective is None else objective(out, batch)


def _signed(calibration: Calibration, out: Any, batch: Any, key: Any) -> Any:
    """The outputs that are floating, times random signs, summed over what counts."""
    leaves = jax.tree_util.tree_leaves_with_path(out)
    leaves = [(at, x) for at, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    keys = jax.random.split(key, len(leaves))
    total = jnp.zeros(())
    for (at, x), k in zip(leaves, keys, strict=True):
        counted = calibration.counted(batch, x.shape[:-1], side_of(at)) if x.ndim > 1 else None
        own = x if counted is None else jnp.where(counted[..., None] > 0, x, 0)
        total += (own * jax.random.rademacher(k, x.shape, x.dtype)).sum()
    return total
