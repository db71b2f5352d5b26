"""Masks and labels over the channels of a spec, in the forms that Optax users know."""

from typing import Any

import numpy as np
import optax

from flaxslim import _tree
from flaxslim._spec import SpecLike
from flaxslim.specs import chosen
from flaxslim.training._channels import masks, read
from flaxslim.training._pruning import pruning


def channel_mask(params: Any, spec: SpecLike, *, cfg: Any = None) -> Any:
    """Which numbers of each parameter belong to channels that something reads: a tree of bools.

    Each mask broadcasts against its parameter, and is True where the spec names nothing: times a
    gradient it stops what is dead from learning. A channel is dead here by rule (i): all rows that
    it feeds are zero. Raises what `Spec.sites` does; works under `jax.jit`.

    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.ones((3, 2))}, "down": {"kernel": np.diag([1.0, 0.0])}}
    >>> mask = channel_mask(params, MLP)
    >>> mask["up"]["kernel"].shape, mask["down"]["kernel"].ravel().tolist()
    ((1, 2), [True, False])
    >>> import jax
    >>> grads = jax.tree.map(np.ones_like, params)
    >>> print(jax.tree.map(lambda g, m: g * m, grads, mask)["down"]["kernel"])
    [[1. 1.]
     [0. 0.]]
    """
    sites, leaves = chosen(spec, cfg).sites(params, cfg), _tree.flatten(params)
    _tree.check_living(leaves)
    alive = {site.second.path: read(site, leaves) for site in sites}
    found = dict.fromkeys(leaves, np.True_) | masks(sites, alive)
    return _tree.replace(params, found)


def keep_dead(spec: SpecLike, *, cfg: Any = None) -> optax.GradientTransformationExtraArgs:
    """What is dead when training starts stays exactly zero: the last part of an `optax.chain`.

    For fine-tuning a checkpoint that was pruned. `pruning(inner, spec, lock=True)` does the same
    around an optimizer, and holds the optimizer's moments at zero too.

    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.ones((3, 2))}, "down": {"kernel": np.diag([1.0, 0.0])}}
    >>> tx = optax.chain(optax.sgd(0.1), keep_dead(MLP))
    >>> grads = {"up": {"kernel": np.ones((3, 2))}, "down": {"kernel": np.ones((2, 2))}}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["up"]["kernel"][0])
    [0.9 0. ]
    """
    return pruning(optax.identity(), spec, cfg=cfg, lock=True)


def prunable(params: Any, spec: SpecLike, *, cfg: Any = None) -> Any:
    """A label for each parameter: "prunable" for what the spec cuts, "rest" for all others.

    For `optax.multi_transform` and `optax.masked`.

    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.ones((3, 2))}, "down": {"kernel": np.ones((2, 2))}}
    >>> params["norm"] = {"scale": np.ones(3)}
    >>> labels = prunable(params, MLP)
    >>> labels["up"]["kernel"], labels["norm"]["scale"]
    ('prunable', 'rest')
    >>> tx = optax.multi_transform({"prunable": optax.sgd(1e-2), "rest": optax.sgd(1e-3)}, labels)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates["up"]["kernel"][0, 0], updates["norm"]["scale"][0])
    -0.01 -0.001
    """
    sites, leaves = chosen(spec, cfg).sites(params, cfg), _tree.flatten(params)
    labels = dict.fromkeys(leaves, "rest")
    labels |= {tensor.path: "prunable" for site in sites for tensor in site.cut}
    return _tree.replace(params, labels)
