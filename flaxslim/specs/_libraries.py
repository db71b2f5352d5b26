"""Specs for the model libraries of JAX other than transformers, by the layouts of their parameters.

Read in the sources of MaxText (2026-08), tunix (2026-08), jax-ml/bonsai (2026-03),
google-deepmind/gemma (2026-07), EasyDeL (2026-04), KerasHub on JAX (2026-08) and big_vision. Their
configs name no family, so the spec is passed: `slim(params, cfg, MAXTEXT_FFN)`.

One name often stands for several layouts: layers that are scanned or not, one fused kernel or two.
Such a spec has a pair for each, of which that holds which fits the shapes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxslim._pair import Pair
from flaxslim._spec import Spec


def _scanned(pair: Pair, axis: int, **changes: Any) -> Pair:
    """The same pair where layers are scanned, `l` being the axis of each kernel that counts them.

    >>> print(_scanned(Pair(first="wi", second="wo"), 1))
    wi "d l f" -> wo "f l d"
    """

    def stacked(pattern: str) -> str:
        names = pattern.split()  # no pattern of these libraries has parentheses there
        return " ".join([*names[:axis], "l", *names[axis:]])

    return dataclasses.replace(
        pair,
        first_axes=stacked(pair.first_axes),
        second_axes=stacked(pair.second_axes),
        readers={name: stacked(axes) for name, axes in pair.readers.items()},
        also={name: stacked(axes) for name, axes in pair.also.items()},
        tables={name: stacked(axes) for name, axes in pair.tables.items()},
        **changes,
    )


def _gated(at: str, width: str, activation: str, **more: Any) -> Pair:
    return Pair(
        at=at,
        first=("gate_proj", "up_proj"),
        second="down_proj",
        gated=True,
        width=width,
        activation=activation,
        **more,
    )


def _heads(
    at: str,
    value: tuple[str, str],
    also: Mapping[str, str],
    out: str = "o_proj",
    *,
    second_axes: str = "h k d",
    group: str | None = "g",
    width: str | None = "num_heads",
    **more: Any,
) -> Pair:
    """Attention; `value` is a layer and its pattern, `also` are others that are cut along."""
    name, axes = value
    return Pair(
        at=at,
        first=name,
        first_axes=axes,
        also=also,
        second=out,
        second_axes=second_axes,
        axis="h",
        group=group,
        width=width,
        activation="identity",
        **more,
    )


# --- flax itself ------------------------------------------------------------------------------

# Every `nnx.MultiHeadAttention` in a module, with its cache if that was made (one batch axis). As
# many key/value heads as heads are groups of one.
NNX_HEADS = Spec(
    name="NNX_HEADS",
    pairs=_heads(
        "",
        ("value", "d g k"),
        {"query": "d h k", "key": "d g k"},
        "out",
        width=None,
        tables={"cached_key": "b t g k", "cached_value": "b t g k"},
        modules={"": {"num_heads": "h", "num_kv_heads?": "g", "qkv_features": "(h k)"}},
    ),
)

# --- MaxText ----------------------------------------------------------------------------------

_MAXTEXT_MLP = Pair(
    at="decoder/**/mlp",
    first=("wi_0", "wi_1"),
    second="wo",
    gated=True,
    width="base_mlp_dim",
    activation="jax.config.mlp_activations",
    modules={"": {"intermediate_dim?": "f"}},
    optional=True,
)
_MAXTEXT_PAIRS = (
    _MAXTEXT_MLP,
    dataclasses.replace(_MAXTEXT_MLP, first="wi", gated=False),
    dataclasses.replace(_MAXTEXT_MLP, first="wi", first_axes="d 2 f"),  # fused_mlp
)
_MAXTEXT_MOE = Pair(
    at="MoeBlock_0",
    first=("wi_0", "wi_1"),
    second="wo",
    first_axes="e d f",
    second_axes="e f d",
    gated=True,
    width="base_moe_mlp_dim",
    activation="jax.config.mlp_activations",
    modules={"": {"intermediate_dim?": "f"}},
    optional=True,
)
# What all tokens pass through beside the experts (DeepSeek, Llama 4).
_MAXTEXT_SHARED = dataclasses.replace(
    _MAXTEXT_MLP, at="shared_experts", width="base_moe_mlp_dim*shared_experts"
)
# GPT-OSS, the one with biases, multiplies act(gate) by up + 1: no rule but the first knows that.
_MAXTEXT_GPT_OSS = dataclasses.replace(
    _MAXTEXT_MOE,
    first_bias=("wi_0_bias", "wi_1_bias"),
    second_bias="wo_bias",
    gated=False,
    activation=None,
)
# Layers are scanned on axis 1 (`param_scan_axis`), or 0, or not at all; the axis of the experts
# stays before theirs. Each expert loses channels of its own, and all keep as many as the widest:
# an expert that the router never picks is not looked for.
MAXTEXT_FFN = Spec(
    name="MAXTEXT_FFN",
    pairs=(
        *_MAXTEXT_PAIRS,
        *(_scanned(pair, axis) for axis in (1, 0) for pair in _MAXTEXT_PAIRS),
        _MAXTEXT_MOE,
        _MAXTEXT_GPT_OSS,
        _MAXTEXT_SHARED,
        *(_scanned(pair, 1) for pair in (_MAXTEXT_MOE, _MAXTEXT_GPT_OSS, _MAXTEXT_SHARED)),
    ),
)

# With sinks the attention weights do not sum to one. Not for OLMo 3, whose norms of queries and
# keys run across the heads, so that none of them can go alone.
_MAXTEXT_ATTENTION: dict[str, Any] = {
    "width": "base_num_query_heads",
    "group_width": "base_num_kv_heads",
    "fold_unless": "attention_sink",
    "tables": {"sinks": "h"},
    "modules": {"": {"num_query_heads?": "h", "num_kv_heads?": "g"}},
    "optional": True,
}
_MAXTEXT_HEADS = (
    _heads(
        "decoder/**",
        ("value", "d g k"),
        {"query": "d h k", "key": "d g k"},
        "out",
        **_MAXTEXT_ATTENTION,
    ),
    # fused_qkv, of as many keys and values as queries: groups of one.
    _heads("decoder/**", ("qkv_proj", "d 3 g k"), {}, "out", parts=(2,), **_MAXTEXT_ATTENTION),
)
MAXTEXT_HEADS = Spec(
    name="MAXTEXT_HEADS",
    pairs=(
        *_MAXTEXT_HEADS,
        *(_scanned(pair, axis) for axis in (1, 0) for pair in _MAXTEXT_HEADS),
    ),
)

# --- google-deepmind/gemma --------------------------------------------------------------------

# `transpose_gating_einsum` or not.
GEMMA_DEEPMIND_FFN = Spec(
    name="GEMMA_DEEPMIND_FFN",
    pairs=tuple(
        Pair(
            at="layer_{i}/mlp",
            first="gating_einsum",
            first_axes=axes,
            second="linear",
            gated=True,
            width="hidden_dim",
            activation="gelu_pytorch_tanh",
            optional=True,
        )
        for axes in ("2 f d", "2 d f")
    ),
)


def _gemma_heads(at: str, **more: Any) -> tuple[Pair, Pair]:
    """Keys and values in one kernel, or, if there are as many of them, queries as well."""
    own = {
        "kernel": "w",
        "group_width": "num_kv_heads",
        "scaled_by": "query_pre_attn_norm=*div_num_heads",  # the 27B models
        "optional": True,
        **more,
    }
    return (
        _heads(
            at,
            ("kv_einsum", "2 g d k"),
            {"q_einsum": "h d k"},
            "attn_vec_einsum",
            parts=(1,),
            **own,
        ),
        _heads(at, ("qkv_einsum", "3 g d k"), {}, "attn_vec_einsum", parts=(2,), **own),
    )


# The class builds a `qkv_einsum` whenever its config says as many key/value heads as heads: where
# groups shrink to one head each, the two kernels must be joined by hand.
GEMMA_DEEPMIND_HEADS = Spec(name="GEMMA_DEEPMIND_HEADS", pairs=_gemma_heads("layer_{i}/attn"))

# --- tunix ------------------------------------------------------------------------------------

# No layer has a bias, so of the activation it matters only that it is 0 at 0: Gemma's gelu is, too.
TUNIX_FFN = Spec(
    name="TUNIX_FFN",
    pairs=(
        _gated("layers/{i}/mlp", "hidden_dim", "silu", optional=True),
        # Mixture of experts, by the same names.
        _gated(
            "layers/{i}/mlp",
            "hidden_dim",
            "silu",
            first_axes="e d f",
            second_axes="e f d",
            optional=True,
        ),
    ),
)
# The flat biases of Qwen2 are refused: their shape does not say where a head ends.
TUNIX_HEADS = Spec(
    name="TUNIX_HEADS",
    pairs=(
        _heads(
            "layers/{i}/attn",
            ("v_proj", "d g k"),
            {"q_proj": "d h k", "k_proj": "d g k"},
            kernel="w",
            first_bias="v_bias?",
            group_width="num_kv_heads",
            modules={"": {"n_rep?": "h/g"}},
            optional=True,
        ),
        # Its Gemma 1 and 2 scale by the size of a head, and say nothing of it.
        *_gemma_heads("layers/{i}/attn", scaled_by="query_pre_attn_norm?=*div_num_heads"),
    ),
)

# --- jax-ml/bonsai ----------------------------------------------------------------------------

BONSAI_QWEN3_FFN = Spec(name="BONSAI_QWEN3_FFN", pairs=_gated("layers/{i}/mlp", "mlp_dim", "silu"))
BONSAI_QWEN3_HEADS = Spec(
    name="BONSAI_QWEN3_HEADS",
    pairs=_heads(
        "layers/{i}/attn",
        ("v_proj", "d g k"),
        {"q_proj": "d h k", "k_proj": "d g k"},
        group_width="num_kv_heads",
        modules={"": {"n_rep?": "h/g"}},
    ),
)
# By the names in a TextConfig; of a ModelConfig that is `.under(tree="", config="text_config")`.
BONSAI_GEMMA3_FFN = Spec(
    name="BONSAI_GEMMA3_FFN",
    pairs=_gated("layers/{i}/mlp", "intermediate_size", "gelu_pytorch_tanh"),
)
_GEMMA3: dict[str, Any] = {
    "width": "num_attention_heads",
    "group_width": "num_key_value_heads",
    "modules": {"": {"num_kv_heads?": "g", "n_rep?": "h/g"}},
    "optional": True,
}
BONSAI_GEMMA3_HEADS = Spec(
    name="BONSAI_GEMMA3_HEADS",
    pairs=(
        _heads(
            "layers/{i}/self_attn",
            ("v_proj", "d g k"),
            {"q_proj": "d h k", "k_proj": "d g k"},
            **_GEMMA3,
        ),
        # Heads side by side, in its own linear layer.
        _heads(
            "layers/{i}/self_attn",
            ("v_proj", "d (g k)"),
            {"q_proj": "d (h k)", "k_proj": "d (g k)"},
            second_axes="(h k) d",
            sizes={"k": "head_dim"},
            **_GEMMA3,
        ),
    ),
)

# --- EasyDeL ----------------------------------------------------------------------------------

EASYDEL_FFN = Spec(
    name="EASYDEL_FFN",
    pairs=_gated("layers/{i}/mlp", "intermediate_size", "config.hidden_act"),
)
EASYDEL_HEADS = Spec(
    name="EASYDEL_HEADS",
    pairs=_heads(
        "layers/{i}/self_attn",
        ("v_proj", "d (g k)"),
        {"q_proj": "d (h k)", "k_proj": "d (g k)"},
        second_axes="(h k) d",
        width="num_attention_heads",
        group_width="num_key_value_heads",
        sizes={"k": "head_dim"},
        modules={
            "": {
                "num_heads?": "h",
                "num_key_value_heads?": "g",
                "num_key_value_groups?": "h/g",
            }
        },
    ),
)

# --- KerasHub ---------------------------------------------------------------------------------

KERAS_HUB_FFN = Spec(
    name="KERAS_HUB_FFN",
    pairs=(
        # LLaMA and its likes.
        Pair(
            first=("feedforward_gate_dense", "feedforward_intermediate_dense"),
            second="feedforward_output_dense",
            gated=True,
            width="intermediate_dim",
            activation="config.activation or silu",
            optional=True,
        ),
        # `TransformerEncoder` and its likes; what the models give it as activation their configs
        # do not say.
        Pair(
            first="feedforward_intermediate_dense",
            second="feedforward_output_dense",
            width="intermediate_dim",
            activation="config.activation",
            optional=True,
        ),
        # Gemma, whose key counts gate and up together.
        Pair(
            first=("ffw_gating", "ffw_gating_2"),
            second="ffw_linear",
            gated=True,
            width="intermediate_dim/2",
            activation="gelu_pytorch_tanh",
            optional=True,
        ),
    ),
)
_KERAS_HUB: dict[str, Any] = {
    "out": "attention_output",
    "width": "num_query_heads",
    "group_width": "num_key_value_heads",
    "optional": True,
}
KERAS_HUB_HEADS = Spec(
    name="KERAS_HUB_HEADS",
    pairs=(
        # LLaMA and the encoder share hidden_dim out among the heads.
        _heads(
            "self_attention",
            ("value", "d g k"),
            {"query": "d h k", "key": "d g k"},
            fixed=True,
            **_KERAS_HUB,
        ),
        _heads(
            "self_attention_layer",
            ("value", "d h k"),
            {"query": "d h k", "key": "d h k"},
            "attention_output",
            group=None,
            fixed=True,
            optional=True,
        ),
        # Gemma.
        _heads("attention", ("value", "g d k"), {"query": "h d k", "key": "g d k"}, **_KERAS_HUB),
    ),
)

# --- big_vision -------------------------------------------------------------------------------

_BIG_VISION_MLP = Pair(
    at="encoderblock_{i}/MlpBlock_0",
    first="Dense_0",
    second="Dense_1",
    width="mlp_dim or 4*width",
    activation="gelu_pytorch_tanh",
    optional=True,
)
# Blocks are scanned on axis 0 with `scan=True`. The head that pools has an FFN of the same width.
BIG_VISION_FFN = Spec(
    name="BIG_VISION_FFN",
    pairs=(
        _BIG_VISION_MLP,
        _scanned(_BIG_VISION_MLP, 0, at="encoderblock/MlpBlock_0"),
        dataclasses.replace(_BIG_VISION_MLP, at="MAPHead_0/MlpBlock_0"),
    ),
)
_BIG_VISION_ATTENTION = _heads(
    "encoderblock_{i}/MultiHeadDotProductAttention_0",
    ("value", "d h k"),
    {"query": "d h k", "key": "d h k"},
    "out",
    group=None,
    sizes={"k": "width/num_heads"},
    modules={"": {"num_heads": "h", "qkv_features": "(h k)"}},
    fixed=True,
    optional=True,
)
BIG_VISION_HEADS = Spec(
    name="BIG_VISION_HEADS",
    pairs=(
        _BIG_VISION_ATTENTION,
        _scanned(_BIG_VISION_ATTENTION, 0, at="encoderblock/MultiHeadDotProductAttention_0"),
        dataclasses.replace(_BIG_VISION_ATTENTION, at="MAPHead_0/MultiHeadDotProductAttention_0"),
    ),
)
