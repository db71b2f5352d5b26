"""Group lasso over channels: a loss term, and the proximal step that makes channels exactly zero.

    penalty(w) = sum over channels c of sqrt(n_c) * norm(w_c)

with the L2 norm over all n_c numbers of a channel: its columns and biases of the first layers, its
rows of the second, and what else is cut along with it. Its gradient draws whole channels toward
zero and never quite there; the proximal step gets there. Sites that are tied lose channels
together, so theirs are one. What several heads share (the keys and values of a group) belongs to
none of them: a head is dead when nothing reads it, and its group when all of its heads are.

References: Yuan and Lin 2006, Model selection and estimation in regression with grouped variables
(equation 2.1); Wen et al. 2016, Learning Structured Sparsity in Deep Neural Networks; Parikh and
Boyd 2014, Proximal Algorithms (section 6.5.4, block soft thresholding).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from flaxslim import _tree
from flaxslim._kinds import is_number
from flaxslim._spec import Site, SpecLike, Tensor
from flaxslim.errors import TrainingError
from flaxslim.specs import chosen
from flaxslim.training._channels import Rows, spread, together, total


def group_lasso(params: Any, spec: SpecLike, *, cfg: Any = None) -> jax.Array:
    """The sum over all channels of sqrt(n) times the L2 norm of a channel: a scalar for the loss.

    The gradient of a channel that is zero is zero. Raises what `Spec.sites` does.

    >>> import numpy as np
    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.diag([3.0, 0.0])}, "down": {"kernel": np.diag([4.0, 0.0])}}
    >>> print(group_lasso(params, MLP))  # one channel of 4 numbers, whose norm is 5
    10.0
    """
    leaves = _tree.flatten(params)
    terms = [
        group.weight * _root(group.squares(leaves)).sum()
        for group in map(_Group, together(chosen(spec, cfg).sites(params, cfg)))
    ]
    return sum(terms, jnp.zeros(()))


def proximal_group_lasso(
    spec: SpecLike, strength: Any, learning_rate: Any = 1.0, *, cfg: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The proximal step of `strength * group_lasso`, to stand last in `optax.chain`.

    Once the optimizer has moved the parameters to w = p + u, each channel is scaled by
    max(0, 1 - learning_rate * strength * sqrt(n) / norm(w)). A channel whose scale is 0 is exactly
    0.0 after `optax.apply_updates`, so `flaxslim.slim` removes it. Unlike a loss term it does not
    pass through the optimizer: with Adam it stands to the lasso as the decay of AdamW to L2.

    Args:
      spec: where the channels are, as in `flaxslim.plan`.
      strength: of the penalty, 0 or more, or a schedule of it.
      learning_rate: that of the optimizer before it: a number, or an Optax schedule.
      cfg: the config, which tells the size of heads that lie side by side.

    Returns: the transformation, whose `update` needs `params`. Its state counts the steps.

    Raises `TrainingError` for a negative strength, or without parameters; `init` and `update`
    raise what `Spec.sites` does.

    >>> import numpy as np
    >>> from flaxslim import Pair, Spec
    >>> MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    >>> params = {"up": {"kernel": np.diag([3.0, 0.1])}, "down": {"kernel": np.diag([4.0, 0.1])}}
    >>> tx = optax.chain(optax.sgd(0.1), proximal_group_lasso(MLP, 5.0, learning_rate=0.1))
    >>> grads = jax.tree.map(np.zeros_like, params)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["down"]["kernel"])
    [[3.2 0. ]
     [0.  0. ]]
    """
    found = chosen(spec, cfg)
    if not _is_rate(strength):
        raise TrainingError(
            "the strength of a penalty is 0 or more",
            seen=f"strength={strength!r}",
            expected="0.001 for a start, or a schedule; the larger, the more channels die",
        )
    if not _is_rate(learning_rate):
        raise TrainingError(
            "the learning rate is 0 or more",
            seen=f"learning_rate={learning_rate!r}",
            expected="that of the optimizer before it: a number, or its schedule",
        )

    def init(params: Any) -> optax.ScaleByScheduleState:
        found.sites(params, cfg)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        if params is None:
            raise TrainingError(
                "a proximal step needs the parameters", mend="tx.update(grads, state, params)"
            )
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        penalty: Any = strength(state.count) if callable(strength) else strength
        old, steps = _tree.flatten(params), _tree.flatten(updates)
        new: dict[str, jax.Array] = {}
        for group in map(_Group, together(found.sites(params, cfg))):
            for _, tensor in group.tensors:  # one that belongs to two sites is there already
                path = tensor.path
                new.setdefault(path, _wide(old[path]) + _wide(steps[path]))
            scale = _shrinkage(group.squares(new), rate * penalty * group.weight)
            for site, tensor in group.tensors:
                new[tensor.path] *= spread(site, tensor, scale)
        changed = {path: _step(x, old[path], steps[path]) for path, x in new.items()}
        count = jnp.asarray(optax.safe_increment(state.count))
        return _tree.replace(updates, changed), optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Sites whose channels die together, mostly a single one."""

    sites: tuple[Site, ...]

    @property
    def tensors(self) -> Iterator[tuple[Site, Tensor]]:
        return ((site, tensor) for site in self.sites for tensor in _own(site))

    @property
    def weight(self) -> float:
        """The square root of how many numbers a channel has."""
        return math.sqrt(sum(_size(site, tensor) for site, tensor in self.tensors))

    def squares(self, leaves: Mapping[str, Any]) -> Rows:
        """The squared L2 norm of each channel, `(s, f)`."""
        rows = [total(site, jnp.square, leaves, of=_own(site)) for site in self.sites]
        return sum(rows[1:], rows[0])


def _is_rate(value: Any) -> bool:
    """A number of 0 or more, or what gives one: a schedule, a tracer."""
    if callable(value) or isinstance(value, Tracer):
        return True
    return is_number(value) and 0 <= value < math.inf


def _own(site: Site) -> tuple[Tensor, ...]:
    """The tensors whose numbers belong to one channel each."""
    alone = all(heads == 1 for heads in site.groups)
    return tuple(t for t in site.cut if alone or site.axis(t) == site.pair.axis)


def _size(site: Site, tensor: Tensor) -> int:
    """How many numbers of a tensor belong to one channel."""
    sizes = tensor.axes.sizes(tensor.shape)
    rows = math.prod(sizes[name] for name in tensor.axes.stack)
    return math.prod(tensor.shape) // (sizes[site.axis(tensor)] * rows)


def _root(squares: Rows) -> Rows:
    """The square root, with a gradient of zero where it is zero."""
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)


def _shrinkage(squares: Rows, threshold: Any) -> Rows:
    """max(0, 1 - threshold / norm)."""
    norm = jnp.sqrt(squares)
    some = norm > threshold
    return jnp.where(some, 1 - threshold / jnp.where(some, norm, 1), 0)


def _step(new: jax.Array, old: Any, step: Any) -> jax.Array:
    """The update that leads to `new`, in the wider of the two types, or p + (-p) were not zero."""
    old = jnp.asarray(old)
    return (new - old).astype(jnp.promote_types(old.dtype, jnp.asarray(step).dtype))


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
