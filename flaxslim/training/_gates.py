"""Hard-concrete gates: each channel learns how likely it is to stay, down to a target sparsity.

A gate multiplies what reads its channel. It is drawn anew in each step from a distribution with
mass at exactly 0 and exactly 1, of which log_alpha is learned, along with the model::

    u ~ Uniform(0, 1)
    s = sigmoid((log(u) - log(1 - u) + log_alpha) / beta)
    z = clip(s * (zeta - gamma) + gamma, 0, 1)             beta = 2/3, gamma = -0.1, zeta = 1.1
    P(z > 0) = sigmoid(log_alpha - beta * log(-gamma / zeta))

How many are closed is a constraint, not a penalty to be tuned: two multipliers climb until it
holds. One loss serves all three, and each has its optimizer::

    def loss(trained, key, batch):
        model = gated(trained["model"], sample_gates(trained["gates"], key), spec, cfg=cfg)
        bound = gate_lagrangian(trained["gates"], trained["multipliers"], target=0.5)
        return task_loss(model, batch) + bound

    trained = {"model": params, "gates": gates(params, spec, cfg=cfg), "multipliers": jnp.zeros(2)}
    tx = optax.multi_transform(
        {
            "model": optax.adamw(3e-5),
            "gates": optax.adam(0.1),
            "multipliers": optax.chain(optax.adam(0.1), optax.scale(-1)),  # these ascend
        },
        {"model": "model", "gates": "gates", "multipliers": "multipliers"},
    )
    ...
    params = gated(trained["model"], open_gates(trained["gates"]), spec, cfg=cfg)
    params, cfg = flaxslim.slim(params, cfg, spec)

References: Louizos, Welling and Kingma 2018, Learning Sparse Neural Networks through L0
Regularization (equations 10 to 13); Xia, Zhong and Chen 2022, Structured Pruning Learns Compact and
Accurate Models (CoFi, section 3.1), after Wang, Wohlwend and Lei 2020.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.core import Tracer

from flaxslim import _tree
from flaxslim._kinds import is_number
from flaxslim._spec import Site, SpecLike
from flaxslim.errors import TrainingError, nearest
from flaxslim.specs import chosen
from flaxslim.training._channels import reading, spread, together

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

_SHIFT = BETA * math.log(-GAMMA / ZETA)


def gates(params: Any, spec: SpecLike, *, cfg: Any = None, chance: float = 0.9) -> dict[str, Any]:
    """The log_alpha of each channel's gate: float32 `(s, f)`, nested as the second kernels are.

    `chance` is that of each gate to be open (not 0) at the start, between 0 and 1. Sites that are
    tied have the gates of the first. Raises `TrainingError`, and what `Spec.sites` does.

    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.ones((2, 4))}, "down": {"kernel": np.ones((4, 3))}}
    >>> print(gates(params, MLP)["down"]["kernel"].shape)
    (1, 4)
    """
    if not is_number(chance) or not 0 < chance < 1:
        raise TrainingError(
            "a gate that is surely open, or surely closed, learns nothing",
            seen=f"chance={chance!r}",
            expected="a chance between 0 and 1, such as 0.9",
        )
    start = math.log(chance) - math.log1p(-chance) + _SHIFT
    sites = chosen(spec, cfg).sites(params, cfg)
    rows = {
        path: jnp.full((site.rows, site.size), start, jnp.float32) for site, path in _placed(sites)
    }
    return unflatten_dict(rows, sep="/")


def sample_gates(log_alpha: Any, key: Any) -> Any:
    """Random gates in [0, 1], some exactly 0 or 1, with a gradient to each log_alpha.

    One key for each step, as for dropout.
    """
    leaves, treedef = jax.tree.flatten(log_alpha)
    keys = jax.random.split(key, max(len(leaves), 1))
    noise = [jax.random.logistic(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    values = [_stretched((n + x) / BETA) for n, x in zip(noise, leaves, strict=True)]
    return treedef.unflatten(values)


def open_gates(log_alpha: Any) -> Any:
    """The gates without noise, for evaluation and for the final model: many are exactly 0 or 1.

    At each site as many of the least are 0 as are expected to be (so CoFi; without it a model whose
    gates hesitate would miss its target), and any other whose z is 0 at s = sigmoid(log_alpha).

    >>> print(open_gates({"kernel": jnp.array([[-4.0, 0.0, 4.0]])})["kernel"])
    [[0.  0.5 1. ]]
    """

    def value(x: Any) -> jax.Array:
        count = jnp.round(_closed(x).sum(axis=-1, keepdims=True))
        rank = jnp.argsort(jnp.argsort(x, axis=-1), axis=-1)
        return jnp.where(rank < count, 0, _stretched(x))

    return jax.tree.map(value, log_alpha)


def gated(params: Any, values: Any, spec: SpecLike, *, cfg: Any = None) -> Any:
    """The parameters, with what reads each channel multiplied by the value of its gate.

    `values` are those of `sample_gates` or `open_gates`. A channel whose gate is 0 is read by
    nothing then, so `flaxslim.slim` removes it exactly. Raises `TrainingError` for gates of other
    parameters, and what `Spec.sites` does.
    """
    leaves, found = _tree.flatten(params), _tree.flatten(values)
    sites = chosen(spec, cfg).sites(params, cfg)
    new: dict[str, Any] = {}
    for site, path in _placed(sites):
        _check_gates(site, path, found)
        for tensor in reading(site):
            x = jnp.asarray(new.get(tensor.path, leaves[tensor.path]))
            new[tensor.path] = x * spread(site, tensor, found[path]).astype(x.dtype)
    return _tree.replace(params, new)


def expected_sparsity(log_alpha: Any) -> jax.Array:
    """Which share of all gates is expected to be exactly 0: a scalar. `TrainingError` without any.

    >>> print(expected_sparsity({"kernel": jnp.array([[-9.0, 9.0]])}).round(3))
    0.5
    """
    closed = [_closed(x).ravel() for x in jax.tree.leaves(log_alpha)]
    if not closed:
        raise TrainingError(
            "there are no gates whose sparsity could be expected",
            seen=repr(log_alpha),
            mend="make them for the parameters: flaxslim.gates(params, spec, cfg=cfg)",
        )
    return jnp.concatenate(closed).mean()


def gate_lagrangian(log_alpha: Any, multipliers: Any, target: Any) -> jax.Array:
    """m[0] * (s - target) + m[1] * (s - target)**2, with the expected sparsity s: a loss term.

    The gates descend it and the multipliers `(2,)`, which begin at zero, ascend it: put
    `optax.scale(-1)` behind their optimizer. `target` may be traced, so that it can rise on a
    schedule. Raises `TrainingError` for a target that is no share, and for other multipliers.

    >>> log_alpha = {"kernel": jnp.array([[-9.0, 9.0]])}
    >>> print(gate_lagrangian(log_alpha, jnp.array([1.0, 10.0]), target=0.6).round(3))
    0.0
    """
    if not isinstance(target, Tracer) and not (is_number(target) and 0 <= target < 1):
        raise TrainingError(
            "the target is the share of gates that close",
            seen=f"target={target!r}",
            expected="0.0 to less than 1.0",
        )
    if np.shape(multipliers) != (2,):
        raise TrainingError(
            "there are two multipliers, one of the gap and one of its square",
            seen=f"shape {np.shape(multipliers)}",
            expected="jnp.zeros(2) for a start",
        )
    gap = expected_sparsity(log_alpha) - target
    return multipliers[0] * gap + multipliers[1] * gap**2


def _closed(x: Any) -> jax.Array:
    """The probability of each gate to be exactly 0."""
    return jax.nn.sigmoid(_SHIFT - x)


def _stretched(x: Any) -> jax.Array:
    """The hard sigmoid of the hard-concrete distribution, exactly 0 and 1 at its ends."""
    return jnp.clip(jax.nn.sigmoid(x) * (ZETA - GAMMA) + GAMMA, 0, 1)


def _placed(sites: Sequence[Site]) -> list[tuple[Site, str]]:
    """Each site, and the path of its gates: of those that are tied, the second of the first."""
    return [(site, own[0].second.path) for own in together(sites) for site in own]


def _check_gates(site: Site, path: str, values: Mapping[str, Any]) -> None:
    shape = (site.rows, site.size)
    if path not in values:
        raise TrainingError(
            "a site has no gates",
            path=path,
            near=nearest(path, values),
            mend="make them with the same spec: flaxslim.gates(params, spec, cfg=cfg)",
        )
    if np.shape(values[path]) != shape:
        raise TrainingError(
            "a site has another number of channels than it has gates",
            path=path,
            seen=np.shape(values[path]),
            expected=shape,
            mend="make gates anew for parameters that were cut: "
            "flaxslim.gates(params, spec, cfg=cfg)",
        )
