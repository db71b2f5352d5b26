"""In which order the channels of a site would go, and what is lost with each.

A *unit* is what goes as a whole: a hidden channel, a head, or a key/value group with its heads. Of
every site there is an order of its units, the first to go first, and the error of the output once
so many are gone: mean |h W' - h W|^2 over the calibration data. It is exact for `score="obs"`
(`_removal`), which supposes that the second layer is refitted; for other scores it is the sum of
what each unit loses by itself.

Scores beside those of `flaxslim.training._score` (magnitude_product, wanda, fisher, ...):

obs           greedy removal with exact error        `_removal`, [1]
fisher_mask   square of the gradient by its mask     `_fisher`, [2]
fluctuation   variance of h_j * |W_j|^2               FLAP, An et al. 2024, arXiv 2312.11983, (5)

That, and wanda's sqrt(mean h_j^2) * |W_j|, is of a head the sum over its hidden values j.

[1] Kurtic et al. 2023, arXiv 2302.04089. [2] Kwon et al. 2022, arXiv 2204.09656.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxslim._spec import Site
from flaxslim.errors import CalibrationError, nearest
from flaxslim.posttraining._refit import Moments, read_matrix
from flaxslim.posttraining._removal import removal_errors, removal_order
from flaxslim.training._score import SCORES, Evidence, ScoreFn, as_score

NAMES = (
    "obs",
    "fluctuation",
    "fisher_mask",
    *(n for n in SCORES if n not in ("snip_momentum", "movement")),
)
_SILENT = 1e-30  # the energy of a layer that puts out nothing
# What needs the gradient of a loss.
GRADIENTS = frozenset(
    name for name in NAMES if name == "fisher_mask" or (name in SCORES and SCORES[name].gradients)
)


def units_of(site: Site) -> np.ndarray:
    """The unit of each hidden value, `(m,)`, ascending.

    Heads of one key/value group go together: then every class can say how many are left.
    """
    sizes = site.second.axes.sizes(site.second.shape)
    axis = site.pair.axis
    inside = int(
        np.prod([sizes[n] for n in site.second.axes.names if n in site.pair.inner and n != axis])
    )
    owners = site.owners if site.groups else np.arange(site.size)
    return np.repeat(owners, inside)


def count_of(site: Site) -> int:
    """How many units there are in a row."""
    return len(site.groups) if site.groups else site.size


def alive_of(site: Site, kept: Sequence[np.ndarray]) -> np.ndarray:
    """The mask `(s, f)` of the channels (or heads) of the units that are kept in each row."""
    owners = site.owners if site.groups else np.arange(site.size)
    return np.stack([np.isin(owners, row) for row in kept])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The orders of a site, one for each row, and the errors that they make together.

    Attributes:
      site: whose.
      orders: `(s, u)`: the units of each row, the first to go first.
      errors: `(u + 1,)`: the squared error of the output after 0, 1, ... have gone in every row.
      energy: mean |h W|^2, to which an error is relative.
      effect: the distance of the model's outputs that a relative error of this site makes, for one
        of 1; by it errors of different sites are compared.
    """

    site: Site
    orders: np.ndarray
    errors: np.ndarray
    energy: float
    effect: float = 1.0

    @property
    def effects(self) -> np.ndarray:
        """`(u + 1,)`: what the errors are expected to do to the model's outputs."""
        return self.effect * self.relative

    @property
    def relative(self) -> np.ndarray:
        """`(u + 1,)`: the errors relative to the energy."""
        return relative(self.errors, self.energy)

    def kept(self, count: int) -> list[np.ndarray]:
        """The units that are left in each row when `count` stay, ascending."""
        return [np.sort(order[len(order) - count :]) for order in self.orders]


def relative(error: Any, energy: float) -> Any:
    """A squared error relative to the energy of what is put out.

    Of a layer that puts out nothing nothing is lost: an error is that of the ridge alone.
    """
    return error / energy if energy > _SILENT else 0.0 * error


def rank(
    site: Site,
    moments: Sequence[Moments],
    leaves: Mapping[str, Any],
    *,
    score: str | ScoreFn = "obs",
    ridge: float = 1e-2,
    rows: np.ndarray | None = None,
    orders: np.ndarray | None = None,
    refitted: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> Ranking:
    """The ranking of a site by a score.

    `rows` is what its channels score `(s, f)`, where that is known already (`_gradient`); `orders`
    `(s, u)` are given where other sites have a say, and then the errors are those along them;
    `refitted` are second layers `(m, o)` to start from.
    """
    units, count = units_of(site), count_of(site)
    w = list(read_matrix(site, leaves)) if refitted is None else list(refitted)
    own = [m.centred() if takes_mean(site) else m for m in moments]
    energy = sum(float((a * (m.xx @ a)).sum()) for a, m in zip(w, own, strict=True))
    if score == "obs":
        pairs = list(zip(w, own, strict=True))
        if orders is None:
            found = [removal_order(m.xx, a, units, ridge=ridge) for a, m in pairs]
            orders, lost = np.stack([order.units for order in found]), [o.errors for o in found]
        else:
            lost = [
                removal_errors(m.xx, a, units, order, ridge=ridge)
                for (a, m), order in zip(pairs, orders, strict=True)
            ]
        errors = np.sum(lost, axis=0)
        return Ranking(site=site, orders=orders, errors=np.r_[0.0, errors], energy=energy)
    if orders is None:
        if rows is None:
            rows = _scores(site, moments, leaves, score, seed)
        by_unit = np.stack([np.bincount(_owners(site), row, count) for row in rows])
        orders = np.argsort(by_unit, axis=1, kind="stable")
    lost = [
        np.bincount(units, np.diag(m.xx) * (a * a).sum(1), count)[order]
        for a, m, order in zip(w, own, orders, strict=True)
    ]
    errors = np.cumsum(np.sum(lost, axis=0))
    return Ranking(site=site, orders=orders, errors=np.r_[0.0, errors], energy=energy)


def takes_mean(site: Site) -> bool:
    """Whether the second layer has a bias for each row, into which means can be folded."""
    bias = site.second_bias
    return bias is not None and not site.readers and (site.rows == 1 or bool(bias.axes.stack))


def _owners(site: Site) -> np.ndarray:
    return site.owners if site.groups else np.arange(site.size)


def _scores(
    site: Site,
    moments: Sequence[Moments],
    leaves: Mapping[str, Any],
    score: str | ScoreFn,
    seed: int,
) -> np.ndarray:
    """`(s, f)`, of channels or heads."""
    if score in ("wanda", "fluctuation"):
        pairs = zip(moments, read_matrix(site, leaves), strict=True)
        return np.stack([_by_channel(site, _by_input(score, m, w)) for m, w in pairs])
    zeros = jnp.zeros((site.rows, site.size), jnp.float32)
    rms = np.sqrt(np.stack([_by_channel(site, np.diag(m.xx)) for m in moments]))
    evidence = Evidence(
        site=site,
        params=leaves,
        grads={},
        state=zeros,
        activations={site.second.path: rms.reshape(*site.stack, site.size)},
        seed=seed,
    )
    return np.asarray(as_score(score).rows(evidence), np.float64)


def _by_input(score: str | ScoreFn, moments: Moments, w: np.ndarray) -> np.ndarray:
    """`(m,)`, of each hidden value with its own weights: those of a head are added up afterwards.

    The sums of a head multiplied would be large where it reads much by no weight, and little by
    large ones, and puts out nothing.
    """
    norms = (w * w).sum(1)
    if score == "fluctuation":
        return np.diag(moments.centred().xx) * norms
    return np.sqrt(np.diag(moments.xx) * norms)


def _by_channel(site: Site, values: np.ndarray) -> np.ndarray:
    """Numbers of hidden values as sums over each channel (the dimensions of a head)."""
    return values.reshape(site.size, -1).sum(1)


def takes_gradients(score: str | ScoreFn) -> bool:
    """Whether a score is computed from the gradient of a loss."""
    return callable(score) or score in GRADIENTS


def check_score(score: str | ScoreFn) -> None:
    """Raise `CalibrationError` for a score that is unknown, or that only training can have."""
    if not callable(score) and score not in NAMES:
        raise CalibrationError(
            "there is no such score without training",
            seen=repr(score),
            expected=", ".join(NAMES),
            near=nearest(str(score), NAMES),
            mend="name one of these, or pass fn(params, grads, state) -> (s, f)",
        )
