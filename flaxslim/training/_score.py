"""How much each channel matters: the scores by which channels die, the smallest first.

In the formulas below, w runs over all numbers of a channel (its columns and biases of the first
layers, its rows of the second, and what else is cut along with it), g is the gradient of the loss
by w, and n the step. All are computed in float32.

A score that is looked at "when due" costs nothing in the steps between. One that adds up is kept in
the state of the optimizer, a number for each channel.

name                score of a channel                                      looked at   source
magnitude_l1        sum of abs(w)                                           when due    [1]
magnitude           sqrt(sum of w^2)                                        when due    [2]
magnitude_product   norm of what writes the channel * norm of what reads it when due    [3]
snip                sum of abs(w g)                                         when due    [4]
snip_momentum       s_n = s_(n-1) + 0.9 * sum of abs(w g)                   each step   [5]
gradient_weight     abs(sum of w g)                                         when due    [6]
taylor              s_n = s_(n-1) + (sum of w g)^2, anew after each time    each step   [7]
fisher              s_n = s_(n-1) + sum of (w g)^2 / 2, likewise            each step   [8]
movement            s_n = s_(n-1) - sum of w g                              each step   [9]
random              uniform, the same all along                             when due
activation          s_n = 0.9 s_(n-1) + 0.1 a_n^2                           each step   [10]
wanda               sqrt(s_n) * norm of what reads it                       each step   [11]

a_n is the root mean square of the hidden value over a batch, which the loop hands over:
`tx.update(grads, state, params, activations={path of the second kernel: (f,)})`.

[1] Li et al. 2017, arXiv 1608.08710. [2] Han et al. 2015, arXiv 1506.02626. [3] A bound of what a
channel adds to the output, for an activation with slopes up to 1. [4] Lee et al. 2019, arXiv
1810.02340. [5] Intel Neural Compressor 2, "snip_momentum". [6] Mozer and Smolensky 1989, as a
first-order estimate. [7] Molchanov et al. 2019, arXiv 1906.10771, formula (8). [8] Theis et al.
2018, arXiv 1801.05787, with the diagonal of the Fisher matrix. [9] Sanh et al. 2020, arXiv
2005.07683. [10] Molchanov et al. 2017, arXiv 1611.06440. [11] Sun et al. 2024, arXiv 2306.11695.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxslim._spec import Site, Tensor
from flaxslim.errors import TrainingError, nearest
from flaxslim.training._channels import Rows, total, values


class PairTensors(NamedTuple):
    """The numbers of the channels of one site, each tensor as `(s, f, n)`.

    Of gradients, likewise. `first` are the kernels that write the channels (gate and up), `bias`
    their biases, `second` the kernels that read them, `also` whatever else is cut along (queries
    and keys of heads).
    """

    first: tuple[jax.Array, ...]
    bias: tuple[jax.Array, ...]
    second: tuple[jax.Array, ...]
    also: tuple[jax.Array, ...]


# A score of the user's own: (parameters, gradients, score so far (s, f)) -> score (s, f).
ScoreFn = Callable[[PairTensors, PairTensors, Rows], Rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a score may look at: one site, in the trees of parameters and gradients."""

    site: Site
    params: Mapping[str, Any]
    grads: Mapping[str, Any]
    state: Rows
    activations: Mapping[str, Any]
    seed: int

    def sum(self, term: Callable[..., Any], *, of: Sequence[Tensor] = ()) -> Rows:
        return total(self.site, term, self.params, of=of)

    def sum_with_grads(self, term: Callable[..., Any]) -> Rows:
        return total(self.site, term, self.params, self.grads)

    def tensors(self, leaves: Mapping[str, Any]) -> PairTensors:
        def of(tensors: Sequence[Tensor | None]) -> tuple[jax.Array, ...]:
            return tuple(values(self.site, t, leaves[t.path]) for t in tensors if t)

        site = self.site
        also = (*site.also, *(tensor for _, tensor in site.lora))
        return PairTensors(of(site.first), of(site.first_biases), of(site.reading), of(also))

    @property
    def activation(self) -> Rows:
        """The root mean square of the hidden value of each channel."""
        path = self.site.second.path
        if path not in self.activations:
            raise TrainingError(
                "a score by activations needs them",
                path=path,
                seen=", ".join(self.activations) or "no activations=",
                near=nearest(path, self.activations),
                mend="tx.update(grads, state, params, activations={path: rms of shape (f,)}), with "
                "an entry for each second kernel",
            )
        found, shape = jnp.asarray(self.activations[path]), (self.site.rows, self.site.size)
        if found.size != math.prod(shape):
            raise TrainingError(
                "an activation is one number for each channel",
                path=path,
                seen=found.shape,
                expected=shape,
                mend="take the root mean square over all axes but that of the channels",
            )
        return found.reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A score: how it is computed, and when.

    Attributes:
      rows: what the channels of a site score, `(s, f)`.
      adds_up: it goes by all steps, not only by those at which channels die.
      anew: what was added up is forgotten when channels have died.
      finish: of what was added up, the score; if it is not that itself.
      gradients: it needs them.
    """

    rows: Callable[[Evidence], Rows]
    adds_up: bool = False
    anew: bool = False
    finish: Callable[[Evidence], Rows] | None = None
    gradients: bool = True


def _norm(e: Evidence, tensors: Sequence[Tensor]) -> Rows:
    return jnp.sqrt(e.sum(jnp.square, of=tensors))


def _product(e: Evidence) -> Rows:
    site = e.site
    writing = (*site.first, *filter(None, site.first_biases))
    return _norm(e, writing) * _norm(e, site.reading)


def _random(e: Evidence) -> Rows:
    # By the name and not by the place: the same whatever else the spec has.
    key = jax.random.fold_in(jax.random.key(e.seed), zlib.crc32(e.site.second.path.encode()))
    fresh = jax.random.uniform(key, (e.site.rows, e.site.size), minval=1e-6)
    return jnp.where(e.state > 0, e.state, fresh)  # so that `shrink` leaves each its own


def _saliency(w: Any, g: Any) -> Any:
    return w * g


SCORES: Mapping[str, Score] = {
    "magnitude_l1": Score(rows=lambda e: e.sum(jnp.abs), gradients=False),
    "magnitude": Score(rows=lambda e: _norm(e, e.site.cut), gradients=False),
    "magnitude_product": Score(rows=_product, gradients=False),
    "snip": Score(rows=lambda e: e.sum_with_grads(lambda w, g: jnp.abs(w * g))),
    "snip_momentum": Score(
        rows=lambda e: e.state + 0.9 * e.sum_with_grads(lambda w, g: jnp.abs(w * g)), adds_up=True
    ),
    "gradient_weight": Score(rows=lambda e: jnp.abs(e.sum_with_grads(_saliency))),
    "taylor": Score(
        rows=lambda e: e.state + e.sum_with_grads(_saliency) ** 2, adds_up=True, anew=True
    ),
    "fisher": Score(
        rows=lambda e: e.state + e.sum_with_grads(lambda w, g: (w * g) ** 2) / 2,
        adds_up=True,
        anew=True,
    ),
    "movement": Score(rows=lambda e: e.state - e.sum_with_grads(_saliency), adds_up=True),
    "random": Score(rows=_random, gradients=False),
    "activation": Score(
        rows=lambda e: 0.9 * e.state + 0.1 * e.activation**2, adds_up=True, gradients=False
    ),
    "wanda": Score(
        rows=lambda e: 0.9 * e.state + 0.1 * e.activation**2,
        adds_up=True,
        finish=lambda e: jnp.sqrt(e.state) * _norm(e, e.site.reading),
        gradients=False,
    ),
}


def as_score(value: str | ScoreFn) -> Score:
    """A score by its name, or from a function of the user's; raises `TrainingError`."""
    if callable(value):
        fn = value
        return Score(
            rows=lambda e: _checked(fn(e.tensors(e.params), e.tensors(e.grads), e.state), e.site),
            adds_up=True,
        )
    if value not in SCORES:
        raise TrainingError(
            "there is no such score",
            seen=repr(value),
            expected=", ".join(SCORES),
            near=nearest(str(value), SCORES),
            mend="name one of these, or pass fn(params, grads, state) -> (s, f)",
        )
    return SCORES[value]


def _checked(rows: Any, site: Site) -> Rows:
    if jnp.shape(rows) != (site.rows, site.size):
        raise TrainingError(
            "a score is one number for each channel",
            path=site.second.path,
            seen=jnp.shape(rows),
            expected=(site.rows, site.size),
            mend="sum over the last axis of the tensors, (s, f, n)",
        )
    return jnp.asarray(rows, jnp.float32)
