"""How far one distribution is from another, as float32 can tell it."""

import jax
import jax.numpy as jnp


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """The Kullback-Leibler divergence of q from p along the last axis, in nats: sum p log(p / q).

    Summed as p (r + exp(-r) - 1), r = log(p / q), which is the same for what sums to 1. No term of
    that is negative, where those of sum p r cancel to less than rounding makes of them. `log_p` and
    `log_q` are as of `jax.nn.log_softmax`, `(..., v)`; -inf is a probability of zero.

    >>> p = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    >>> q = jnp.log(jnp.array([0.25, 0.25, 0.5]))
    >>> print(f"{divergence(p, q):.4f}, {divergence(p, p):.1f}, {divergence(q, p)}")
    0.6931, 0.0, inf
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    r = jnp.where(p > 0, log_p - log_q, 0)  # of two that are never it would be no number
    small = jnp.where(abs(r) < 1, r, 0)  # exp of others may overflow
    terms = jnp.where(abs(r) < 1, p * (small + jnp.expm1(-small)), p * (r - 1) + q)
    return jnp.where(p > 0, terms, q).sum(axis=-1)
