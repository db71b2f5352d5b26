"""A BERT encoder whose layers have sizes of their own, as a person would write it.

What the stock class at a layout is measured against: `layout_cost.py`, and a test that counts
the equations of both.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import dot_product_attention_weights
from flax.traverse_util import flatten_dict, unflatten_dict

# Where the stock encoder keeps what is called otherwise here.
_STOCK = {
    "query": "attention/self/query",
    "key": "attention/self/key",
    "value": "attention/self/value",
    "out": "attention/output/dense",
    "attention_norm": "attention/output/LayerNorm",
    "up": "intermediate/dense",
    "down": "output/dense",
    "norm": "output/LayerNorm",
}


class Encoder(nn.Module):
    """`heads`: of each layer, those that are left of the dense model; `widths`: of its FFN."""

    config: Any
    heads: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any, attention_mask: Any, head_mask: Any) -> Any:
        for i, (heads, width) in enumerate(zip(self.heads, self.widths, strict=True)):
            layer = Layer(self.config, heads, width, name=str(i))
            x = layer(x, attention_mask, head_mask[i])
        return x


class Layer(nn.Module):
    config: Any
    heads: tuple[int, ...]
    width: int

    def dense(self, features: int, name: str) -> nn.Dense:
        init = jax.nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, name=name, kernel_init=init)

    @nn.compact
    def __call__(self, x: Any, attention_mask: Any, head_mask: Any) -> Any:
        d, eps = self.config.hidden_size, self.config.layer_norm_eps
        k = d // self.config.num_attention_heads
        q, key, v = (self.dense(len(self.heads) * k, name)(x) for name in ("query", "key", "value"))
        q, key, v = (y.reshape((*y.shape[:2], len(self.heads), k)) for y in (q, key, v))
        mask = jnp.expand_dims(attention_mask, axis=(-3, -2))
        bias = jax.lax.select(
            mask > 0,
            jnp.full(mask.shape, 0.0).astype(jnp.float32),
            jnp.full(mask.shape, jnp.finfo(jnp.float32).min).astype(jnp.float32),
        )
        weights = dot_product_attention_weights(q, key, bias=bias, deterministic=True)
        if len(self.heads) < self.config.num_attention_heads:
            head_mask = jnp.take(head_mask, np.asarray(self.heads), axis=0, mode="clip")
        weights = jnp.einsum("...hqk,h->...hqk", weights, head_mask)
        y = jnp.einsum("...hqk,...khd->...qhd", weights, v)
        y = self.dense(d, "out")(y.reshape((*y.shape[:2], -1)))
        y = nn.Dropout(self.config.hidden_dropout_prob)(y, deterministic=True)
        x = nn.LayerNorm(epsilon=eps, name="attention_norm")(y + x)
        h = jax.nn.gelu(self.dense(self.width, "up")(x), approximate=False)
        y = nn.Dropout(self.config.hidden_dropout_prob)(
            self.dense(d, "down")(h), deterministic=True
        )
        return nn.LayerNorm(epsilon=eps, name="norm")(y + x)


def by_hand(cfg: Any, layers: Any) -> tuple[Encoder, Any]:
    """The encoder of a slimmed BERT, from its config and `params["encoder"]["layer"]`."""
    count = len(layers)
    sites = cfg.flaxslim_layout["sites"]
    every = range(cfg.num_attention_heads)
    encoder = Encoder(
        config=cfg,
        heads=tuple(
            tuple(sites.get(f"encoder/layer/{i}/attention/output/dense", every))
            for i in range(count)
        ),
        widths=tuple(
            layers[str(i)]["intermediate"]["dense"]["bias"].shape[0] for i in range(count)
        ),
    )
    flat = flatten_dict(layers, sep="/")
    params = {
        f"{i}/{ours}/{leaf}": flat[f"{i}/{stock}/{leaf}"]
        for i in range(count)
        for ours, stock in _STOCK.items()
        for leaf in ("kernel", "bias", "scale")
        if f"{i}/{stock}/{leaf}" in flat
    }
    return encoder, {"params": unflatten_dict(params, sep="/")}
