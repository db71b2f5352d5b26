"""The attention heads of every Flax family in transformers 4: paths, axes, and how a class is told.

A head is a channel of the pair value -> output; queries, keys and tables of biases are cut along.
Names in `modules` are what the classes call their sizes after setup, in their own code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxslim._pair import Pair
from flaxslim._spec import Spec

_HEAD = {"k": "hidden_size/num_attention_heads"}
_BERT_MODULE = {"config.num_attention_heads": "h", "config.hidden_size": "(h k)"}
_PLAIN_MODULE = {"num_heads": "h", "embed_dim": "(h k)"}


def _attention(
    at: str,
    value: str,
    query: str,
    key: str,
    out: str,
    modules: Mapping[str, Mapping[str, str]],
    *,
    width: str = "num_attention_heads",
    sizes: Mapping[str, str] = _HEAD,
    fixed: bool = True,
    **more: Any,
) -> Pair:
    """Multi-head attention with four layers, heads side by side in each."""
    return Pair(
        at=at,
        first=value,
        first_axes="d (h k)",
        also={query: "d (h k)", key: "d (h k)"},
        second=out,
        second_axes="(h k) d",
        axis="h",
        activation="identity",
        width=width,
        sizes=sizes,
        modules=modules,
        fixed=fixed,
        **more,
    )


def _bert_like(name: str, **more: Any) -> Spec:
    def attention(at: str, **also: Any) -> Pair:
        return _attention(
            f"encoder/layer/{{i}}/{at}",
            "self/value",
            "self/query",
            "self/key",
            "output/dense",
            {"self": _BERT_MODULE},
            arguments={"self": {"layer_head_mask": "h"}},
            **also,
            **more,
        )

    return Spec(
        name=name, pairs=(attention("attention"), attention("crossattention", optional=True))
    )


def _vit_like(name: str, modules: Mapping[str, Mapping[str, str]] = {}, **more: Any) -> Spec:
    return Spec(
        name=name,
        pairs=_attention(
            "encoder/layer/{i}/attention",
            "attention/value",
            "attention/query",
            "attention/key",
            "output/dense",
            {"attention": _BERT_MODULE, **modules},
            **more,
        ),
    )


def _projections(at: str, width: str, hidden: str = "d_model", **more: Any) -> Pair:
    """BART's attention and its likes, which hold their sizes in fields of their own."""
    return _attention(
        at,
        "v_proj",
        "q_proj",
        "k_proj",
        "out_proj",
        {"": _PLAIN_MODULE},
        width=width,
        sizes={"k": f"{hidden}/{width}"},
        **more,
    )


BERT_HEADS = _bert_like("BERT_HEADS")
# Both are cautious: the sparse attention of the one leaves out padded rows after its softmax, and
# the other may turn values by their position.
BIG_BIRD_HEADS = _bert_like("BIG_BIRD_HEADS", fold_unless="attention_type=block_sparse")
ROFORMER_HEADS = _bert_like("ROFORMER_HEADS", fold_unless="rotary_value")
VIT_HEADS = _vit_like("VIT_HEADS")
# Each layer has a table, or all share one, or there is none; the module that makes it goes by the
# number of heads in its config.
_BEIT_BIASES = ("attention/relative_position_bias", "../../../relative_position_bias")
BEIT_HEADS = _vit_like(
    "BEIT_HEADS",
    modules={bias: {"config.num_attention_heads": "h"} for bias in _BEIT_BIASES},
    tables={f"{bias}/relative_position_bias_table": "b h" for bias in _BEIT_BIASES},
)
ALBERT_HEADS = Spec(
    name="ALBERT_HEADS",
    pairs=_attention(
        "albert_layer_groups/{g}/albert_layers/{j}/attention",
        "value",
        "query",
        "key",
        "dense",
        {"": _BERT_MODULE},
    ),
)
DISTILBERT_HEADS = Spec(
    name="DISTILBERT_HEADS",
    pairs=_attention(
        "transformer/layer/{i}/attention",
        "v_lin",
        "q_lin",
        "k_lin",
        "out_lin",
        {"": {"n_heads": "h", "dim": "(h k)"}},
        width="n_heads",
        sizes={"k": "dim/n_heads"},
    ),
)

BART_HEADS = Spec(
    name="BART_HEADS",
    pairs=(
        _projections("encoder/layers/{i}/self_attn", "encoder_attention_heads", optional=True),
        _projections("decoder/layers/{i}/self_attn", "decoder_attention_heads", optional=True),
        _projections("decoder/layers/{i}/encoder_attn", "decoder_attention_heads", optional=True),
    ),
)
OPT_HEADS = Spec(
    name="OPT_HEADS",
    pairs=_projections("decoder/layers/{i}/self_attn", "num_attention_heads", "hidden_size"),
)
XGLM_HEADS = Spec(
    name="XGLM_HEADS",
    pairs=(
        _projections("layers/{i}/self_attn", "attention_heads"),
        _projections("layers/{i}/encoder_attn", "attention_heads", optional=True),
    ),
)
CLIP_TEXT_HEADS, CLIP_VISION_HEADS = (
    Spec(
        name=f"CLIP_{tower.upper()}_HEADS",
        pairs=_projections(
            f"{tower}_model/encoder/layers/{{i}}/self_attn", "num_attention_heads", "hidden_size"
        ),
    )
    for tower in ("text", "vision")
)
WAV2VEC2_HEADS = Spec(
    name="WAV2VEC2_HEADS",
    pairs=_projections("encoder/layers/{i}/attention", "num_attention_heads", "hidden_size"),
)
GPT_NEO_HEADS = Spec(
    name="GPT_NEO_HEADS",
    pairs=_projections("h/{i}/attn/attention", "num_heads", "hidden_size"),
)
GPTJ_HEADS = Spec(name="GPTJ_HEADS", pairs=_projections("h/{i}/attn", "n_head", "n_embd"))


def _t5_attention(name: str, **more: Any) -> Pair:
    return _attention(
        f"{{stack}}/block/{{i}}/layer/{{j}}/{name}",
        "v",
        "q",
        "k",
        "o",
        {"": {"n_heads": "h", "inner_dim": "(h k)"}},
        width="num_heads",
        sizes={"k": "d_kv"},
        fixed=False,
        optional=True,
        **more,
    )


# The first block of a stack owns the table of position biases, which all of its blocks use.
_T5_TABLE = {"relative_attention_bias/embedding": "b h"}
T5_HEADS = Spec(
    name="T5_HEADS",
    pairs=(
        _t5_attention("SelfAttention", tables=_T5_TABLE),
        _t5_attention("LocalSelfAttention", tables=_T5_TABLE),
        _t5_attention(
            "TransientGlobalSelfAttention",
            tables={**_T5_TABLE, "global_relative_attention_bias/embedding": "b h"},
        ),
        # Without a mask each layer is handed zeros, made for the heads of the first.
        _t5_attention("EncDecAttention", arguments={"": {"position_bias": "b 1 q s"}}),
    ),
)

# FlaxConv1D keeps its kernels transposed; queries, keys and values are thirds of one.
_GPT2_ATTENTION = Pair(
    at="h/{i}/attn",
    first="c_attn",
    first_axes="(3 h k) d",
    parts=(2,),
    second="c_proj",
    second_axes="d (h k)",
    axis="h",
    activation="identity",
    width="n_head",
    sizes={"k": "n_embd/n_head"},
    modules={"": _PLAIN_MODULE},
    fixed=True,
)
GPT2_HEADS = Spec(
    name="GPT2_HEADS",
    pairs=(
        _GPT2_ATTENTION,
        dataclasses.replace(
            _GPT2_ATTENTION,
            at="h/{i}/crossattention",
            first_axes="(2 h k) d",
            parts=(1,),
            also={"q_attn": "(h k) d"},
            optional=True,
        ),
    ),
)
BLOOM_HEADS = Spec(
    name="BLOOM_HEADS",
    pairs=Pair(
        at="h/{i}/self_attention",
        first="query_key_value",
        first_axes="d (h 3 k)",  # queries, keys and values of one head side by side
        parts=(2,),
        second="dense",
        second_axes="(h k) d",
        axis="h",
        activation="identity",
        width="n_head",
        sizes={"k": "hidden_size/n_head"},
        modules={"": {"num_heads": "h", "hidden_size": "(h k)"}},
        arguments={"": {"alibi": "b h q s"}},  # the slope of a head goes by its old index
        fixed=True,
    ),
)


def _llama_like(
    name: str,
    sizes: Mapping[str, str],
    hidden: str | None,
    groups: str = "num_key_value_heads or num_attention_heads",
    *,
    fixed: bool,
) -> Spec:
    own = {hidden: "(h k)"} if hidden else {}
    return Spec(
        name=name,
        pairs=Pair(
            at="layers/{i}/self_attn",
            first="v_proj",
            first_axes="d (g k)",
            also={"q_proj": "d (h k)", "k_proj": "d (g k)"},
            second="o_proj",
            second_axes="(h k) d",
            axis="h",
            group="g",
            activation="identity",
            width="num_attention_heads",
            group_width=groups,
            sizes=sizes,
            modules={
                "": {
                    "num_heads": "h",
                    "num_key_value_heads": "g",
                    "num_key_value_groups": "h/g",
                    **own,
                }
            },
            fixed=fixed,
            ragged=True,  # keys and values are repeated by a count for each group
        ),
    )


LLAMA_HEADS = _llama_like("LLAMA_HEADS", _HEAD, "embed_dim", fixed=True)
MISTRAL_HEADS = _llama_like("MISTRAL_HEADS", _HEAD, "hidden_size", fixed=True)
GEMMA_HEADS = _llama_like(
    "GEMMA_HEADS", {"k": "head_dim"}, None, "num_key_value_heads", fixed=False
)

# Families that are the same.
ELECTRA_HEADS = ROBERTA_HEADS = ROBERTA_PRELAYERNORM_HEADS = XLM_ROBERTA_HEADS = BERT_HEADS
DINOV2_HEADS = VIT_HEADS
BLENDERBOT_HEADS = BLENDERBOT_SMALL_HEADS = MARIAN_HEADS = MBART_HEADS = BART_HEADS
PEGASUS_HEADS = WHISPER_HEADS = BART_HEADS
LONGT5_HEADS = MT5_HEADS = T5_HEADS
