"""The method of Kwon et al. 2022 (arXiv 2204.09656), "A fast post-training pruning framework".

Every unit j has a mask m_j = 1, by which its row of the second layer is multiplied. With g the
gradient of the loss by the masks on one sample, the Fisher matrix I = mean of g g^T says what a
change of the masks costs, (m - 1)^T I (m - 1) / 2. Three steps:

1. search: by its diagonal, the units that cost the least go (section 4.1; the budget is met by the
   dynamic program of `_budget` instead of their loop over the number of heads: the same objective,
   solved to the end).
2. rearrangement: site by site, units that stay are exchanged for units that go while the cost by
   the block of I of that site falls, with as many of each as before (section 4.2).
3. tuning: the masks that stay become numbers, by least squares against the output of the dense
   layer (section 4.3; `scaled`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from flaxslim import _tree
from flaxslim._spec import Site
from flaxslim.errors import CalibrationError
from flaxslim.posttraining._calibration import Calibration
from flaxslim.posttraining._gradient import Objective, value_of
from flaxslim.posttraining._rank import Ranking, count_of, units_of
from flaxslim.posttraining._refit import Moments
from flaxslim.posttraining._removal import ridged
from flaxslim.training._channels import total

_LARGEST = 10.0  # no mask becomes larger: what least squares wants then is noise (their 4.3)


def mask_gradients(
    calibration: Calibration,
    params: Any,
    sites: Sequence[Site],
    objective: Objective | None = None,
    *,
    seed: int = 0,
    told: Any = lambda done: None,
) -> dict[str, np.ndarray]:
    """The gradient by the masks of each sample, `(n, s, u)`, by the path of the second kernel."""
    paths = list(dict.fromkeys(t.path for site in sites for t in site.reading))

    def of_sample(own: Any, params: Any, batch: Any, key: Any) -> Any:
        def value(own: Any) -> Any:
            return value_of(calibration, objective, _tree.replace(params, own), batch, key)

        grads, leaves = jax.grad(value)(own), _tree.flatten(params)
        return {
            site.second.path: _by_unit(
                site, total(site, lambda w, g: w * g, leaves, grads, of=site.reading)
            )
            for site in sites
        }

    @jax.jit
    def of_batch(own: Any, params: Any, batch: Any, key: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        samples = [x for x in leaves if x.ndim]  # a number is one for all of them

        def one(given: Any) -> Any:
            rest = iter(given[0])
            alone = [next(rest)[None] if x.ndim else x for x in leaves]
            return of_sample(own, params, jax.tree.unflatten(structure, alone), given[1])

        return jax.lax.map(one, (samples, jax.random.split(key, len(samples[0]))))

    found: dict[str, list[np.ndarray]] = {}
    own = {path: _tree.flatten(params)[path] for path in paths}
    for number, batch in enumerate(calibration.batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        for path, rows in of_batch(own, params, batch, key).items():
            found.setdefault(path, []).append(np.asarray(rows, np.float64))
        told(number + 1)
    whole = {path: np.concatenate(parts) for path, parts in found.items()}
    for path, rows in whole.items():
        if not np.isfinite(rows).all():
            raise CalibrationError(
                "the gradient of the objective on the calibration data is not finite", path=path
            )
    return whole


def _by_unit(site: Site, rows: Any) -> Any:
    """Sums over the heads of each key/value group."""
    if not site.groups:
        return rows
    return jnp.stack([rows[:, site.owners == g].sum(1) for g in range(len(site.groups))], 1)


def search(site: Site, gradients: np.ndarray, orders: np.ndarray | None = None) -> Ranking:
    """The ranking by the diagonal of the Fisher matrix; its errors are absolute costs.

    `orders` as of `rank`.
    """
    costs = (gradients**2).mean(0) / 2
    if orders is None:
        orders = np.argsort(costs, axis=1, kind="stable")
    lost = np.take_along_axis(costs, orders, axis=1).cumsum(1).sum(0)
    return Ranking(site=site, orders=orders, errors=np.r_[0.0, lost], energy=1.0)


def rearranged(ranking: Ranking, gradients: np.ndarray, count: int) -> Ranking:
    """The same number of units in each row, exchanged one for one while that costs less."""
    orders = ranking.orders.copy()
    gone = count_of(ranking.site) - count
    for row, g in zip(orders, gradients.transpose(1, 0, 2), strict=True):
        dead, living = list(row[:gone]), list(row[gone:])
        if not dead or not living:
            continue
        fisher = g.T @ g / len(g)
        for _ in range(len(row)):
            # The cost of a set D is the sum of its block; out goes a, in comes b.
            pull = fisher[:, dead].sum(1)
            change = (
                -2 * pull[dead][:, None]
                + np.diag(fisher)[dead][:, None]
                + 2 * pull[living][None]
                + np.diag(fisher)[living][None]
                - 2 * fisher[np.ix_(dead, living)]
            )
            a, b = np.unravel_index(change.argmin(), change.shape)
            if change[a, b] >= -1e-12 * abs(fisher[np.ix_(dead, dead)].sum()):
                break
            dead[a], living[b] = living[b], dead[a]
        row[:] = [*dead, *living]
    return Ranking(site=ranking.site, orders=orders, errors=ranking.errors, energy=ranking.energy)


def scaled(
    moments: Moments, w: np.ndarray, site: Site, kept: np.ndarray, *, ridge: float
) -> np.ndarray:
    """`(m, o)`: the rows of the units that stay, each times the number that fits best.

    Minimises mean |x diag(m) W - y W|^2 + r |m - 1|^2 over the masks m of units, a small least
    squares problem in their number. Where a mask would leave [-10, 10], all stay as they are.
    """
    units, count = units_of(site), count_of(site)
    rows = np.zeros((count, len(units)))
    rows[units, np.arange(len(units))] = 1
    dots = w @ w.T
    xy = moments.xx if moments.xy is None else moments.xy
    normal = rows @ (moments.xx * dots) @ rows.T
    target = (rows @ (xy * dots)).sum(1)
    new = np.zeros_like(w)
    if not len(kept):
        return new
    inside = normal[np.ix_(kept, kept)]
    lacking = target[kept] - inside.sum(1)
    masks = 1 + linalg.solve(ridged(inside, ridge), lacking, assume_a="pos")
    if not (np.abs(masks) <= _LARGEST).all():
        masks = np.ones(len(kept))
    scale = np.zeros(count)
    scale[kept] = masks
    return w * scale[units][:, None]
