"""Small nnx transformers in the styles of the model libraries, written for the tests.

They differ where the libraries do: how heads lie, who counts them, and where the cache is. All are
called `model(tokens)`, or with a cache and the position of the first token, one token at a time.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import older
from flax import nnx

from flaxslim import Pair, Spec
from flaxslim._tree import flatten, replace
from flaxslim.specs._libraries import (
    BONSAI_GEMMA3_FFN,
    BONSAI_GEMMA3_HEADS,
    BONSAI_QWEN3_FFN,
    BONSAI_QWEN3_HEADS,
    MAXTEXT_FFN,
    MAXTEXT_HEADS,
    NNX_HEADS,
    TUNIX_FFN,
    TUNIX_HEADS,
)

VOCABULARY, LENGTH = 13, 12

# Of all libraries the arrays of a cache are (batch, length, key/value heads, size of a head).
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Of bonsai's Qwen3."""

    num_layers: int = 2
    emb_dim: int = 16
    mlp_dim: int = 12
    num_heads: int = 6
    num_kv_heads: int = 3
    head_dim: int = 4


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Of bonsai's Gemma3."""

    num_hidden_layers: int = 2
    hidden_size: int = 16
    intermediate_size: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 4
    sliding_window: int = 3


@dataclasses.dataclass
class TunixConfig:
    num_layers: int = 2
    embed_dim: int = 16
    hidden_dim: int = 12
    num_heads: int = 6
    num_kv_heads: int = 3
    head_dim: int = 4


@dataclasses.dataclass(frozen=True)
class MaxTextConfig:
    num_decoder_layers: int = 2
    base_emb_dim: int = 16
    base_mlp_dim: int = 12
    base_num_query_heads: int = 6
    base_num_kv_heads: int = 3
    head_dim: int = 4
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    attention_sink: bool = False


# --- what they share --------------------------------------------------------------------------


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = positions[:, None] / 100.0 ** (jnp.arange(half) / half)
    sin, cos = (f(angles)[None, :, None] for f in (jnp.sin, jnp.cos))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def mask(length: int, start: Any, size: int, window: int | None = None) -> jax.Array:
    """Which of `size` positions each of the tokens from `start` on may see."""
    query, key = start + jnp.arange(length)[:, None], jnp.arange(size)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Grouped attention; the number of groups is that of the keys."""
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], d)
    logits = jnp.einsum("btgrk,bsgk->bgrts", q, k) / math.sqrt(d)
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(b, t, h, d)


def extended(old: jax.Array, new: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)


class RMSNorm(nnx.Module):
    """With an epsilon that keeps rounding small where a layer puts out next to nothing."""

    def __init__(self, size: int):
        self.w = nnx.Param(jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w[...] * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-2)


class Layer(nnx.Module):
    """A block whose parts are given by name; `post` norms what they put out, as Gemma does."""

    def __init__(self, dim: int, post: bool = False, **parts: nnx.Module):
        self.names = tuple(parts)
        self.norms = older.List([RMSNorm(dim) for _ in parts])
        self.posts = older.List([RMSNorm(dim) for _ in parts] if post else [])
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x: jax.Array, cache: Any, start: Any) -> tuple[jax.Array, Any]:
        for i, name in enumerate(self.names):
            part, normed = getattr(self, name), self.norms[i](x)
            if name == "mlp":
                y = part(normed)
            else:
                y, cache = part(normed, cache, start)
            x = x + (self.posts[i](y) if self.posts else y)
        return x, cache


class Decoder(nnx.Module):
    """Tokens to logits."""

    def __init__(self, dim: int, layers: Sequence[nnx.Module], rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, dim, rngs=rngs)
        self.layers = older.List(layers)
        self.norm = RMSNorm(dim)

    def __call__(self, tokens: jax.Array, cache: Any = None, start: Any = 0) -> Any:
        x, new = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            x, own = layer(x, None if cache is None else cache[i], start)
            new.append(own)
        logits = self.embed.attend(self.norm(x))
        return logits if cache is None else (logits, new)


# --- bonsai -----------------------------------------------------------------------------------


class LayerCache(nnx.Module):
    def __init__(self, batch: int, heads: int, head_dim: int):
        shape = (batch, LENGTH, heads, head_dim)
        self.k_cache, self.v_cache = nnx.Cache(jnp.zeros(shape)), nnx.Cache(jnp.zeros(shape))

    def extend(self, k: jax.Array, v: jax.Array, start: Any) -> tuple[jax.Array, jax.Array]:
        self.k_cache[...] = extended(self.k_cache[...], k, start)
        self.v_cache[...] = extended(self.v_cache[...], v, start)
        return self.k_cache[...], self.v_cache[...]


class QwenAttention(nnx.Module):
    """Einsum layers, by whose kernels the heads are counted."""

    def __init__(self, cfg: QwenConfig, rngs: nnx.Rngs):
        d, n, g, h = cfg.emb_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_proj = nnx.Einsum("BTD,DNH->BTNH", (d, n, h), rngs=rngs)
        self.k_proj = nnx.Einsum("BSD,DKH->BSKH", (d, g, h), rngs=rngs)
        self.v_proj = nnx.Einsum("BSD,DKH->BSKH", (d, g, h), rngs=rngs)
        self.o_proj = nnx.Einsum("BTNH,NHD->BTD", (n, h, d), rngs=rngs)
        self.q_norm, self.k_norm = RMSNorm(h), RMSNorm(h)
        self.n_rep = n // g

    @property
    def num_kv_heads(self) -> int:
        return self.k_proj.kernel.shape[1]

    def __call__(self, x: jax.Array, cache: LayerCache | None, start: Any) -> tuple[Any, None]:
        positions = start + jnp.arange(x.shape[1])
        q = rope(self.q_norm(self.q_proj(x)), positions)
        k, v = rope(self.k_norm(self.k_proj(x)), positions), self.v_proj(x)
        assert k.shape[2] == self.num_kv_heads
        if cache is not None:
            k, v = cache.extend(k, v, start)
        return self.o_proj(attend(q, k, v, mask(x.shape[1], start, k.shape[1]))), None


class GatedMlp(nnx.Module):
    def __init__(self, dim: int, hidden: int, act: Callable, rngs: nnx.Rngs, **more: Any):
        self.act = act
        self.gate_proj = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs, **more)
        self.up_proj = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs, **more)
        self.down_proj = nnx.Linear(hidden, dim, use_bias=False, rngs=rngs, **more)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def qwen(cfg: QwenConfig, rngs: nnx.Rngs) -> Decoder:
    layers = [
        Layer(
            cfg.emb_dim,
            attn=QwenAttention(cfg, rngs),
            mlp=GatedMlp(cfg.emb_dim, cfg.mlp_dim, nnx.silu, rngs),
        )
        for _ in range(cfg.num_layers)
    ]
    return Decoder(cfg.emb_dim, layers, rngs)


def qwen_cache(cfg: QwenConfig) -> Any:
    caches = [LayerCache(2, cfg.num_kv_heads, cfg.head_dim) for _ in range(cfg.num_layers)]
    return older.List(caches)


class FlatLinear(nnx.Module):
    """Without a bias it keeps an array of zeros that is no parameter."""

    def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs, *, use_bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((size_in, size_out)))
        zeros = jnp.zeros(size_out)
        self.bias = nnx.Param(zeros) if use_bias else older.data(zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + self.bias[...]


class GemmaAttention(nnx.Module):
    """Heads side by side; the attributes say how many keys there are, and for how many heads."""

    def __init__(self, cfg: GemmaConfig, layer: int, rngs: nnx.Rngs):
        d, h, k = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
        self.head_dim, self.num_kv_heads = k, cfg.num_key_value_heads
        self.window = cfg.sliding_window if layer % 2 == 0 else None
        self.q_proj = FlatLinear(d, h * k, rngs)
        self.k_proj = FlatLinear(d, self.num_kv_heads * k, rngs)
        self.v_proj = FlatLinear(d, self.num_kv_heads * k, rngs)
        self.o_proj = FlatLinear(h * k, d, rngs)
        self.q_norm, self.k_norm = RMSNorm(k), RMSNorm(k)
        self.n_rep = h // self.num_kv_heads

    def __call__(self, x: jax.Array, cache: LayerCache | None, start: Any) -> tuple[Any, None]:
        def heads(layer: nnx.Module, count: int) -> jax.Array:
            return layer(x).reshape(*x.shape[:2], count, self.head_dim)

        positions = start + jnp.arange(x.shape[1])
        q = rope(self.q_norm(heads(self.q_proj, self.n_rep * self.num_kv_heads)), positions)
        k = rope(self.k_norm(heads(self.k_proj, self.num_kv_heads)), positions)
        v = heads(self.v_proj, self.num_kv_heads)
        if cache is not None:
            k, v = cache.extend(k, v, start)
        seen = mask(x.shape[1], start, k.shape[1], self.window)
        k, v = (jnp.repeat(y, self.n_rep, axis=2) for y in (k, v))
        return self.o_proj(attend(q, k, v, seen).reshape(*x.shape[:2], -1)), None


class GemmaMlp(nnx.Module):
    def __init__(self, cfg: GemmaConfig, rngs: nnx.Rngs):
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj, self.up_proj = FlatLinear(d, f, rngs), FlatLinear(d, f, rngs)
        self.down_proj = FlatLinear(f, d, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


def gemma(cfg: GemmaConfig, rngs: nnx.Rngs) -> Decoder:
    layers = [
        Layer(
            cfg.hidden_size,
            post=True,
            self_attn=GemmaAttention(cfg, i, rngs),
            mlp=GemmaMlp(cfg, rngs),
        )
        for i in range(cfg.num_hidden_layers)
    ]
    return Decoder(cfg.hidden_size, layers, rngs)


def gemma_cache(cfg: GemmaConfig) -> Any:
    count, heads = cfg.num_hidden_layers, cfg.num_key_value_heads
    return older.List([LayerCache(2, heads, cfg.head_dim) for _ in range(count)])


# --- tunix ------------------------------------------------------------------------------------


class Einsum(nnx.Module):
    def __init__(self, einsum: str, shape: tuple[int, ...], axes: tuple, rngs: nnx.Rngs):
        self.einsum_str, self.shape = einsum, shape
        init = nnx.with_partitioning(nnx.initializers.normal(0.2), axes)
        self.w = nnx.Param(init(rngs(), shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.einsum_str, x, self.w[...])


class TunixAttention(nnx.Module):
    """Keys and values in one tensor; the cache is a dict that is handed on."""

    def __init__(self, cfg: TunixConfig, rngs: nnx.Rngs):
        d, n, g, h = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_einsum = Einsum("BTD,NDH->BTNH", (n, d, h), ("tp", "fsdp", None), rngs)
        self.kv_einsum = Einsum("BSD,CKDH->CBSKH", (2, g, d, h), (None, "tp", "fsdp", None), rngs)
        self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", (n, h, d), ("tp", None, "fsdp"), rngs)

    def __call__(self, x: jax.Array, cache: Cache | None, start: Any) -> tuple[Any, Any]:
        positions = start + jnp.arange(x.shape[1])
        (k, v), q = self.kv_einsum(x), rope(self.q_einsum(x), positions)
        k = rope(k, positions)
        if cache is not None:
            cache = {"k": extended(cache["k"], k, start), "v": extended(cache["v"], v, start)}
            k, v = cache["k"], cache["v"]
        y = attend(q, k, v, mask(x.shape[1], start, k.shape[1]))
        return self.attn_vec_einsum(y), cache


def tunix(cfg: TunixConfig, rngs: nnx.Rngs) -> Decoder:
    init = nnx.with_partitioning(nnx.initializers.normal(0.3), ("fsdp", "tp"))
    mlp = {"kernel_init": init}
    # As tunix does it, the names are only kept: no mesh is at hand.
    with nnx.use_eager_sharding(False):
        layers = [
            Layer(
                cfg.embed_dim,
                attn=TunixAttention(cfg, rngs),
                mlp=GatedMlp(cfg.embed_dim, cfg.hidden_dim, nnx.gelu, rngs, **mlp),
            )
            for _ in range(cfg.num_layers)
        ]
        return Decoder(cfg.embed_dim, layers, rngs)


def dict_cache(layers: int, heads: int, head_dim: int) -> list[Cache]:
    zeros = jnp.zeros((2, LENGTH, heads, head_dim))
    return [{"k": zeros, "v": zeros} for _ in range(layers)]


def tunix_cache(cfg: TunixConfig) -> list[Cache]:
    return dict_cache(cfg.num_layers, cfg.num_kv_heads, cfg.head_dim)


# --- MaxText ----------------------------------------------------------------------------------


class DenseGeneral(nnx.Module):
    """It says its sizes by shapes, and refuses inputs of others."""

    def __init__(self, size_in: tuple[int, ...], size_out: tuple[int, ...], rngs: nnx.Rngs):
        self.in_features_shape, self.out_features_shape = size_in, size_out
        self.axis = tuple(range(-len(size_in), 0))
        shape = (*size_in, *size_out)
        self.kernel = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), shape))
        self.bias = nnx.Param(nnx.initializers.normal(0.3)(rngs.params(), size_out))

    def __call__(self, x: jax.Array) -> jax.Array:
        for axis, size in zip(self.axis, self.in_features_shape, strict=True):
            if x.shape[axis] != size:
                raise ValueError(f"{x.shape} does not end in {self.in_features_shape}")
        assert self.kernel.shape == (*self.in_features_shape, *self.out_features_shape)
        return jnp.tensordot(x, self.kernel[...], len(self.axis)) + self.bias[...]


class MlpBlock(nnx.Module):
    """Gate and up in one kernel, by an axis of their own."""

    def __init__(self, cfg: MaxTextConfig, rngs: nnx.Rngs):
        self.in_features, self.intermediate_dim = cfg.base_emb_dim, cfg.base_mlp_dim
        self.wi = DenseGeneral((cfg.base_emb_dim,), (2, cfg.base_mlp_dim), rngs)
        self.wo = DenseGeneral((cfg.base_mlp_dim,), (cfg.base_emb_dim,), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.wi(x)
        return self.wo(nnx.gelu(h[..., 0, :]) * h[..., 1, :])


class MaxTextAttention(nnx.Module):
    def __init__(self, cfg: MaxTextConfig, rngs: nnx.Rngs):
        d, k = cfg.base_emb_dim, cfg.head_dim
        self.num_query_heads, self.num_kv_heads = cfg.base_num_query_heads, cfg.base_num_kv_heads
        self.query = DenseGeneral((d,), (self.num_query_heads, k), rngs)
        self.key = DenseGeneral((d,), (self.num_kv_heads, k), rngs)
        self.value = DenseGeneral((d,), (self.num_kv_heads, k), rngs)
        self.out = DenseGeneral((self.num_query_heads, k), (d,), rngs)

    def __call__(self, x: jax.Array, cache: Cache | None, start: Any) -> tuple[Any, Any]:
        positions = start + jnp.arange(x.shape[1])
        q, k, v = rope(self.query(x), positions), rope(self.key(x), positions), self.value(x)
        assert (q.shape[2], k.shape[2]) == (self.num_query_heads, self.num_kv_heads)
        if cache is not None:
            cache = {"k": extended(cache["k"], k, start), "v": extended(cache["v"], v, start)}
            k, v = cache["k"], cache["v"]
        return self.out(attend(q, k, v, mask(x.shape[1], start, k.shape[1]))), cache


def maxtext_layer(cfg: MaxTextConfig, rngs: nnx.Rngs) -> Layer:
    attention = MaxTextAttention(cfg, rngs)
    return Layer(cfg.base_emb_dim, self_attention=attention, mlp=MlpBlock(cfg, rngs))


class MaxText(nnx.Module):
    def __init__(self, cfg: MaxTextConfig, rngs: nnx.Rngs):
        layers = [maxtext_layer(cfg, rngs) for _ in range(cfg.num_decoder_layers)]
        self.decoder = Decoder(cfg.base_emb_dim, layers, rngs)

    def __call__(self, tokens: jax.Array, cache: Any = None, start: Any = 0) -> Any:
        return self.decoder(tokens, cache, start)


def maxtext_cache(cfg: MaxTextConfig) -> list[Cache]:
    return dict_cache(cfg.num_decoder_layers, cfg.base_num_kv_heads, cfg.head_dim)


class ScannedDecoder(nnx.Module):
    """Layers stacked on axis 1 of every parameter, and scanned."""

    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})

    def __init__(self, cfg: MaxTextConfig, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=cfg.num_decoder_layers)
        @nnx.vmap(in_axes=0, out_axes=self.axes)
        def stack(rngs: nnx.Rngs) -> Layer:
            return maxtext_layer(cfg, rngs)

        self.embed = nnx.Embed(VOCABULARY, cfg.base_emb_dim, rngs=rngs)
        self.layers = stack(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: Layer, x: jax.Array) -> jax.Array:
            return layer(x, None, 0)[0]

        return self.embed.attend(run(self.layers, self.embed(tokens)))


class ScannedMaxText(nnx.Module):
    def __init__(self, cfg: MaxTextConfig, rngs: nnx.Rngs):
        self.decoder = ScannedDecoder(cfg, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.decoder(tokens)


# --- flax -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FlaxConfig:
    hidden: int = 12
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 4


class FlaxAttention(nnx.Module):
    """`nnx.MultiHeadAttention`, which holds its cache by itself."""

    def __init__(self, cfg: FlaxConfig, rngs: nnx.Rngs):
        groups: dict[str, Any] = {"num_kv_heads": cfg.num_kv_heads}
        self.mha = nnx.MultiHeadAttention(
            cfg.num_heads,
            16,
            cfg.num_heads * cfg.head_dim,
            bias_init=nnx.initializers.normal(0.3),
            rngs=rngs,
            **(groups if cfg.num_kv_heads != cfg.num_heads else {}),
        )

    def __call__(self, x: jax.Array, cache: Any, start: Any) -> tuple[Any, Any]:
        decode = cache is not None
        seen = None if decode else mask(x.shape[1], 0, x.shape[1])
        return self.mha(x, mask=seen, decode=decode), cache


class FlaxMlp(nnx.Module):
    def __init__(self, cfg: FlaxConfig, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, cfg.hidden, bias_init=nnx.initializers.normal(0.3), rngs=rngs)
        self.down = nnx.Linear(cfg.hidden, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x), approximate=False))


FLAX_FFN = Spec(name="FLAX_FFN", pairs=Pair(at="mlp", first="up", second="down", activation="gelu"))


def flax(cfg: FlaxConfig, rngs: nnx.Rngs) -> Decoder:
    layers = [Layer(16, attn=FlaxAttention(cfg, rngs), mlp=FlaxMlp(cfg, rngs)) for _ in range(2)]
    return Decoder(16, layers, rngs)


def start_cache(model: Any) -> list[int]:
    """Let each layer make its cache, by its own attributes."""
    for layer in model.layers:
        layer.attn.mha.init_cache((2, LENGTH, 16))
    return [0 for _ in model.layers]


# --- all of them ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """A library's way: how a model and its cache are made, and the specs of its layout.

    `keys`: what the config calls the widths: of the FFN, the heads, and the key/value heads.
    `biases`: they are not zero.
    """

    cfg: Any
    keys: tuple[str, str, str]
    biases: bool = True
    build: Callable[[Any, nnx.Rngs], Any]
    specs: tuple[Spec, Spec]
    cache: Callable[[Any], Any] | None = None

    @property
    def spec(self) -> Spec:
        return self.specs[0] + self.specs[1]

    def make(self) -> Any:
        """A module with values from numpy: initialisers take seconds to compile."""
        rng = np.random.default_rng(0)
        abstract = self.shape(self.cfg)
        values = {}
        for path, leaf in flatten(abstract).items():
            if path.endswith("bias"):
                value = rng.normal(0, 0.3 * self.biases, leaf.shape)
            else:
                value = (
                    rng.normal(0, 0.3, leaf.shape) if len(leaf.shape) > 1 else np.ones(leaf.shape)
                )
            values[path] = jnp.asarray(value, jnp.float32)
        return replace(abstract, values)

    def shape(self, cfg: Any) -> Any:
        """The module without values."""
        return nnx.eval_shape(lambda: self.build(cfg, nnx.Rngs(0)))

    def sized(self, *widths: int) -> Any:
        return dataclasses.replace(self.cfg, **dict(zip(self.keys, widths, strict=True)))


_QWEN = ("mlp_dim", "num_heads", "num_kv_heads")
_GEMMA = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
_TUNIX = ("hidden_dim", "num_heads", "num_kv_heads")
_MAXTEXT = ("base_mlp_dim", "base_num_query_heads", "base_num_kv_heads")
_FLAX = ("hidden", "num_heads", "num_kv_heads")

STYLES = {
    "bonsai qwen3": Style(
        cfg=QwenConfig(),
        keys=_QWEN,
        build=qwen,
        specs=(BONSAI_QWEN3_FFN, BONSAI_QWEN3_HEADS),
        cache=qwen_cache,
    ),
    "bonsai gemma3": Style(
        cfg=GemmaConfig(),
        keys=_GEMMA,
        build=gemma,
        biases=False,
        specs=(BONSAI_GEMMA3_FFN, BONSAI_GEMMA3_HEADS),
        cache=gemma_cache,
    ),
    "tunix": Style(
        cfg=TunixConfig(),
        keys=_TUNIX,
        build=tunix,
        specs=(TUNIX_FFN, TUNIX_HEADS),
        cache=tunix_cache,
    ),
    "maxtext": Style(
        cfg=MaxTextConfig(),
        keys=_MAXTEXT,
        build=MaxText,
        specs=(MAXTEXT_FFN, MAXTEXT_HEADS),
        cache=maxtext_cache,
    ),
    "maxtext scanned": Style(
        cfg=MaxTextConfig(),
        keys=_MAXTEXT,
        build=ScannedMaxText,
        specs=(MAXTEXT_FFN, MAXTEXT_HEADS),
    ),
    "flax": Style(cfg=FlaxConfig(), keys=_FLAX, build=flax, specs=(FLAX_FFN, NNX_HEADS)),
}
if "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
    STYLES["flax grouped"] = dataclasses.replace(STYLES["flax"], cfg=FlaxConfig(num_kv_heads=3))
