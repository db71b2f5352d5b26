"""How far a pruned model is from the dense one on a batch, in what it puts out and in between."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _config
from flaxslim._divergence import divergence
from flaxslim._spec import Site
from flaxslim.posttraining._calibration import Calibration, side_of

# (outputs of the dense model, outputs, batch) -> scalar.
Loss = Callable[[Any, Any, Any], Any]

_DIVERGENCE = "KL divergence of logits, in nats"
_SQUARED = "relative squared error"


class Distance:
    """Of the outputs, by `loss`, or by the divergence of logits and the relative squared error of
    others; and of what the linear layers read, in relative squared errors.

    Where the hidden channels of a site are pruned, what its second layer reads has no counterpart.
    """

    def __init__(
        self, calibration: Calibration, sites: Sequence[Site], cfg: Any, loss: Loss | None
    ):
        self.calibration, self.loss = calibration, loss
        self.changed = {tensor.path for site in sites for tensor in site.reading}
        size = _config.read(cfg, "vocab_size") if _config.has(cfg, "vocab_size") else None
        self.vocabulary = size

    def __call__(self, params: Any, dense: Any, batch: Any, *, hidden: float = 0.0) -> Any:
        """The distance of the outputs, and `hidden` times the mean of the others; a scalar."""
        traced = self.calibration.traced(batch)
        wanted = traced.kernels - self.changed if hidden else set()
        out, reads = traced(params, batch, wanted)
        dense_out, dense_reads = traced(dense, batch, wanted)
        pairs = {id(a.source): (a, b) for a, b in zip(reads, dense_reads, strict=True)}
        errors = [
            self._relative(a.x, b.x, batch, a.path, steps=a.scanned) for a, b in pairs.values()
        ]
        between = hidden * sum(errors, jnp.zeros(())) / max(len(errors), 1)
        own = self._of_outputs if self.loss is None else self.loss
        return between + own(dense_out, out, batch)

    @property
    def measure(self) -> str:
        """What the distance of the outputs is, in words."""
        if self.loss is not None:
            return "by loss="
        outputs = self.calibration.traced(self.calibration.batches[0]).outputs
        found = [self._measure(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(outputs)]
        return " and ".join(dict.fromkeys(filter(None, found))) or "of no output"

    def mean(self, params: Any, dense: Any, batches: Sequence[Any]) -> float:
        """The mean distance of the outputs on some batches."""
        measured = jax.jit(self)
        return float(np.mean([measured(params, dense, batch) for batch in batches]))

    def _of_outputs(self, dense: Any, out: Any, batch: Any) -> Any:
        ours, theirs = jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(dense)
        found = []
        for (keys, x), y in zip(ours, theirs, strict=True):
            if measure := self._measure(keys, x):
                how = self._divergence if measure == _DIVERGENCE else self._relative
                found.append(how(x, y, batch, side_of(keys)))
        return sum(found, jnp.zeros(())) / max(len(found), 1)

    def _measure(self, keys: Any, x: Any) -> str | None:
        """By what an output is compared, if it is."""
        if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
            return None
        logits = "logits" in jax.tree_util.keystr(keys) or x.shape[-1] == self.vocabulary
        return _DIVERGENCE if logits and x.shape[-1] > 1 else _SQUARED

    def _weights(self, x: Any, batch: Any, path: str, *, steps: bool = False) -> Any:
        counted = self.calibration.counted(batch, x.shape[:-1], path, steps=steps)
        return jnp.ones(x.shape[:-1]) if counted is None else counted.astype(jnp.float32)

    def _relative(self, x: Any, y: Any, batch: Any, path: str, *, steps: bool = False) -> Any:
        """|x - y|^2 over the variance of y, of what counts; over |y|^2 where that is one alone."""
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        if x.ndim == 1:  # one number for each sample
            x, y = x[:, None], y[:, None]
        weights = self._weights(x, batch, path, steps=steps)[..., None]
        x, y = (jnp.where(weights > 0, z, 0) for z in (x, y))  # padding may be anything
        axes = tuple(range(x.ndim - 1))
        count = weights.sum()
        mean = jnp.where(count > 1, (y * weights).sum(axes) / jnp.maximum(count, 1), 0)
        return (weights * (x - y) ** 2).sum() / ((weights * (y - mean) ** 2).sum() + 1e-9)

    def _divergence(self, x: Any, y: Any, batch: Any, path: str) -> Any:
        """Kullback-Leibler of the probabilities, nats for each position that counts."""
        weights = self._weights(x, batch, path)
        x, y = (jnp.where(weights[..., None] > 0, z.astype(jnp.float32), 0) for z in (x, y))
        ours, theirs = (jax.nn.log_softmax(z) for z in (x, y))
        return (weights * divergence(theirs, ours)).sum() / jnp.maximum(weights.sum(), 1)
