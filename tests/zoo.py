"""Every Flax class of transformers that has an FFN, at tiny size, with random parameters.

`CASES` is the table; `build(case)` gives a class, its config and its parameters. A case that is
`short` belongs to the ordinary run (one class for each family, and the variants that differ in
their tree); the others are for the run marked `long`.

Left out, because the stock class itself is broken under current jax (each tried): XGLM with
cross-attention, BLOOM with a head count that is no power of two, DINOv2's plain MLP with a float
`mlp_ratio`, Wav2Vec2 without stable layer norm; and ResNet and RegNet, which have no FFN.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from flaxslim._compat import parameter_shapes
from flaxslim._proof import Control, Proof
from flaxslim._tree import flatten

Sizes = dict[str, Any]

# Families whose layers compute what those of another do (BERT, BART, T5, a composite).
TWINS = frozenset(
    {
        "blenderbot",
        "blenderbot_small",
        "electra",
        "marian",
        "mbart",
        "mt5",
        "pegasus",
        "roberta",
        "speech_encoder_decoder",
        "vision_encoder_decoder",
        "xlm_roberta",
    }
)
# Cases whose layers are among those of another one: both towers of CLIP, several groups of layers
# that share their weights, and the plain feed-forward of LongT5.
PARTS = frozenset(
    {
        "FlaxAlbertForMaskedLM",
        "FlaxCLIPTextModel",
        "FlaxCLIPVisionModel",
        "FlaxT5ForConditionalGeneration-plain",
    }
)


# What the stock classes of transformers 4.50 stumble over, and those of 4.57 do not have.
_FAULTS = {
    "FlaxRoFormerForMaskedLM": ("roformer", "sinusoidal_pos.split("),
    "FlaxBigBirdForQuestionAnswering": ("big_bird", "logits.split("),
    "FlaxDinov2ForImageClassification-swiglu": ("dinov2", "self.hidden_features"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One class of one family in one variant."""

    family: str  # as the folder in transformers/models is called
    cls_name: str
    variant: str
    config: Callable[[], Any]
    short: bool
    length: int  # of token sequences, or frames of audio

    @property
    def twin(self) -> bool:
        """Whether it is run in long runs only; `test_by_layer.py` looks at it in every one."""
        return self.family in TWINS or str(self) in PARTS

    @property
    def cls(self) -> type:
        import transformers

        return getattr(transformers, self.cls_name)

    @property
    def torch_cls_name(self) -> str | None:
        """The PyTorch class of the same architecture, if there is one."""
        import transformers

        name = _architecture(self.cls_name)
        return name if hasattr(transformers, name) else None

    def __str__(self) -> str:
        return f"{self.cls_name}-{self.variant}" if self.variant else self.cls_name


def build(case: Case, seed: int = 0) -> tuple[type, Any, dict[str, Any]]:
    """The class, a new config and random float32 numpy parameters of a case."""
    if reason := broken(case):
        pytest.skip(reason)
    cfg = case.config()
    shapes = flatten(parameter_shapes(case.cls, cfg))
    rng = np.random.default_rng(seed)
    leaves = {path: _random(rng, path, leaf) for path, leaf in shapes.items()}
    return case.cls, cfg, unflatten_dict(leaves, sep="/")


def broken(case: Case) -> str | None:
    """Why the stock class itself does not run in an older release of transformers."""
    family, fault = _FAULTS.get(str(case)) or _FAULTS.get(case.cls_name) or ("", "")
    if not fault:
        return None
    name = f"transformers.models.{family}.modeling_flax_{family}"
    if fault in inspect.getsource(importlib.import_module(name)):
        return f"the stock class has a fault in this release: {fault}"
    return None


def check_proven(proof: Proof, sites: int) -> Control:
    """Equal to rounding, while one wrong channel shows at every site."""
    proof.raise_if_failed()
    assert proof.relative <= 1e-5
    assert proof.control is not None
    assert proof.control.smallest is not None
    assert len(proof.control.rows) == sites
    assert proof.control.smallest > max(100 * proof.relative, proof.tolerance)
    return proof.control


def _random(rng: np.random.Generator, path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Values that keep activations near 1 and let every bias, scale and kernel matter."""
    name, normal = path.rsplit("/", 1)[-1], rng.standard_normal(leaf.shape)
    if name in ("kernel", "weight_v") and len(leaf.shape) > 1:
        # The geometric mean of both sides: GPT-2 stores its kernels transposed.
        fan = np.prod(leaf.shape[:-2]) * np.sqrt(leaf.shape[-1] * leaf.shape[-2])
        values = normal * 1.2 / np.sqrt(fan)
    elif name in ("scale", "weight", "weight_g", "logit_scale") or "lambda" in name:
        values = 1 + 0.1 * normal
    else:  # biases, embeddings, relative position tables, class tokens
        values = 0.5 * normal
    return np.asarray(values, np.float32)


# --- configs ----------------------------------------------------------------------------------

# fmt: off
# Some families have special tokens far outside of 99 by default.
TOKENS: Sizes = {"vocab_size": 99, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
BERT: Sizes = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 72, "max_position_embeddings": 64,
}
DISTILBERT: Sizes = {
    "vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 72,
    "max_position_embeddings": 64,
}
BART: Sizes = {
    **TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72, "decoder_ffn_dim": 80, "max_position_embeddings": 128,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}
VIT: Sizes = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "image_size": 16, "patch_size": 8,
}
CLIP_TEXT: Sizes = {**BERT, **TOKENS, "projection_dim": 24}
CLIP_BOTH: Sizes = {"text_config": CLIP_TEXT, "vision_config": VIT, "projection_dim": 24}
GPT2: Sizes = {
    "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "bos_token_id": 98, "eos_token_id": 98,
}
GPT_NEO: Sizes = {
    "vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    "bos_token_id": 98, "eos_token_id": 98,
}
LLAMA: Sizes = {**BERT, **TOKENS, "num_key_value_heads": 4}
BLOOM: Sizes = {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
OPT: Sizes = {
    **TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 72,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}
XGLM: Sizes = {
    **TOKENS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 72,
    "max_position_embeddings": 64,
}
T5: Sizes = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 72, "num_heads": 4, "num_layers": 1,
    "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
}
WAV2VEC2: Sizes = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 72, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_codevectors_per_group": 10,
    "codevector_dim": 16, "proj_codevector_dim": 16,
}
WHISPER: Sizes = {
    **{key: size for key, size in BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32,
    "classifier_proj_size": 24, "suppress_tokens": None, "begin_suppress_tokens": None,
}
CROSS: Sizes = {"is_decoder": True, "add_cross_attention": True}
GATED_OR_NOT: Mapping[str, Sizes] = {
    "plain": {"feed_forward_proj": "relu"}, "gated": {"feed_forward_proj": "gated-gelu"},
}
# fmt: on


def _architecture(cls_name: str) -> str:
    name = cls_name.removeprefix("Flax")
    return "BertLMHeadModel" if name == "BertForCausalLM" else name


def _config(config_name: str, sizes: Sizes, architecture: str | None = None) -> Any:
    import transformers

    cfg = getattr(transformers, config_name)(**sizes)
    cfg.architectures = [architecture] if architecture else None
    return cfg


def _pair(maker: str, first: tuple[str, Sizes], second: tuple[str, Sizes], name: str) -> Any:
    """The config of a composite: `maker` is "EncoderDecoderConfig.from_encoder_decoder_configs"."""
    import transformers

    config_name, method = maker.split(".")
    join = getattr(getattr(transformers, config_name), method)
    cfg = join(_config(*first), _config(*second))
    cfg.architectures = [name]
    return cfg


# --- the table --------------------------------------------------------------------------------

PLAIN: Mapping[str, Sizes] = {"": {}}
HEADS = (
    "Model ForMaskedLM ForMultipleChoice ForQuestionAnswering ForSequenceClassification "
    "ForTokenClassification"
)
SEQ2SEQ = "Model ForConditionalGeneration"
CAUSAL = "Model ForCausalLM"


def _rows(
    family: str,
    stem: str,
    suffixes: str,
    sizes: Sizes,
    *,
    short: str,
    variants: Mapping[str, Sizes] = PLAIN,
    long_only: tuple[str, ...] = (),
    config: str | None = None,
    length: int = 8,
) -> Iterator[Case]:
    """Each class of a family in each variant; `short` names the one of the ordinary run."""
    for suffix in suffixes.split():
        for variant, more in variants.items():
            cls_name = f"Flax{stem}{suffix}"
            yield Case(
                family=family,
                cls_name=cls_name,
                variant=variant,
                config=partial(
                    _config, config or f"{stem}Config", {**sizes, **more}, _architecture(cls_name)
                ),
                short=suffix == short and variant not in long_only,
                length=length,
            )


def _composite(
    family: str, stem: str, maker: str, parts: Mapping[str, tuple[tuple[str, Sizes], ...]]
) -> Iterator[Case]:
    """The first is in the ordinary run; they take long to compile."""
    for number, (variant, (first, second)) in enumerate(parts.items()):
        yield Case(
            family=family,
            cls_name=f"Flax{stem}Model",
            variant=variant,
            config=partial(_pair, f"{stem}Config.{maker}", first, second, f"{stem}Model"),
            short=number == 0,
            length=8,
        )


def _bert_like(family: str, stem: str, more: str = "", **sizes: Any) -> Iterator[Case]:
    return _rows(family, stem, f"{HEADS} {more}", {**BERT, **sizes}, short="ForMaskedLM")


BERT_PART, GPT2_PART = ("BertConfig", BERT), ("GPT2Config", {**GPT2, "n_inner": 88})
BART_PART, VIT_PART = ("BartConfig", BART), ("ViTConfig", VIT)
SPEECH_PART = ("Wav2Vec2Config", WAV2VEC2)

# fmt: off
CASES: tuple[Case, ...] = (
    *_rows("albert", "Albert", f"{HEADS} ForPreTraining", {**BERT, "embedding_size": 16},
           short="ForMaskedLM",
           variants={"": {}, "groups": {"num_hidden_layers": 4, "num_hidden_groups": 2}}),
    *_rows("bart", "Bart", f"{SEQ2SEQ} ForCausalLM ForQuestionAnswering ForSequenceClassification",
           BART, short="ForConditionalGeneration"),
    *_rows("beit", "Beit", "Model ForImageClassification ForMaskedImageModeling",
           {**VIT, "vocab_size": 99, "layer_scale_init_value": 0.1}, short="ForImageClassification",
           variants={
               "relative": {"use_relative_position_bias": True},
               "shared": {"use_shared_relative_position_bias": True},
               "absolute": {"use_absolute_position_embeddings": True, "use_mask_token": True}},
           long_only=("shared", "absolute")),
    *_bert_like("bert", "Bert", "ForPreTraining ForNextSentencePrediction ForCausalLM"),
    *_rows("bert", "Bert", "ForCausalLM", BERT, short="ForCausalLM", variants={"cross": CROSS}),
    *_rows("big_bird", "BigBird", f"{HEADS} ForPreTraining ForCausalLM",
           {**BERT, "block_size": 4, "num_random_blocks": 1}, short="ForQuestionAnswering",
           variants={
               "sparse": {"attention_type": "block_sparse"},
               "full": {"attention_type": "original_full"}}),
    *_rows("blenderbot", "Blenderbot", SEQ2SEQ, BART, short="ForConditionalGeneration"),
    *_rows("blenderbot_small", "BlenderbotSmall", SEQ2SEQ, BART, short="ForConditionalGeneration"),
    *_rows("bloom", "Bloom", CAUSAL, BLOOM, short="ForCausalLM"),
    *_rows("clip", "CLIP", "Model", CLIP_BOTH, short="Model"),
    *_rows("clip", "CLIP", "TextModel TextModelWithProjection", CLIP_TEXT, short="TextModel",
           config="CLIPTextConfig"),
    *_rows("clip", "CLIP", "VisionModel", VIT, short="VisionModel", config="CLIPVisionConfig"),
    *_rows("dinov2", "Dinov2", "Model ForImageClassification", {**VIT, "mlp_ratio": 4},
           short="ForImageClassification",
           variants={"mlp": {}, "swiglu": {"use_swiglu_ffn": True}}),
    *_rows("distilbert", "DistilBert", HEADS, DISTILBERT, short="ForMaskedLM"),
    *_bert_like("electra", "Electra", "ForPreTraining ForCausalLM", embedding_size=16),
    *_composite("encoder_decoder", "EncoderDecoder", "from_encoder_decoder_configs", {
        "bert+gpt2": (BERT_PART, GPT2_PART),
        "bert+bert": (BERT_PART, ("BertConfig", {**BERT, "intermediate_size": 80})),
        "bert+bart": (BERT_PART, BART_PART)}),
    *_rows("gemma", "Gemma", CAUSAL, {**LLAMA, "head_dim": 16}, short="ForCausalLM",
           variants={
               "grouped": {"num_key_value_heads": 2}, "one": {"num_key_value_heads": 1}, "all": {}},
           long_only=("one", "all")),
    *_rows("gpt2", "GPT2", "Model LMHeadModel", GPT2, short="LMHeadModel",
           variants={"none": {}, "inner": {"n_inner": 72}, "cross": {"n_inner": 72, **CROSS}},
           long_only=("cross",)),
    *_rows("gpt_neo", "GPTNeo", CAUSAL, GPT_NEO, short="ForCausalLM",
           variants={"none": {}, "inner": {"intermediate_size": 72}}, long_only=("inner",)),
    *_rows("gptj", "GPTJ", CAUSAL, {**GPT2, "rotary_dim": 4}, short="ForCausalLM",
           variants={"none": {}, "inner": {"n_inner": 72}}, long_only=("none",)),
    *_rows("llama", "Llama", CAUSAL, LLAMA, short="ForCausalLM",
           variants={"": {}, "grouped": {"num_key_value_heads": 2, "attention_bias": True}},
           long_only=("grouped",)),
    *_rows("longt5", "LongT5", SEQ2SEQ, {**T5, "local_radius": 3, "global_block_size": 4},
           short="ForConditionalGeneration",
           variants={
               f"{kind}-{gate}": {**sizes, "encoder_attention_type": kind}
               for kind in ("local", "transient-global") for gate, sizes in GATED_OR_NOT.items()},
           long_only=("local-gated", "transient-global-plain")),
    *_rows("marian", "Marian", "Model MTModel", BART, short="MTModel"),
    *_rows("mbart", "MBart", f"{SEQ2SEQ} ForQuestionAnswering ForSequenceClassification", BART,
           short="ForConditionalGeneration"),
    *_rows("mistral", "Mistral", CAUSAL, {**LLAMA, "num_key_value_heads": 2, "sliding_window": 4},
           short="ForCausalLM"),
    *_rows("mt5", "MT5", f"{SEQ2SEQ} EncoderModel", T5, short="ForConditionalGeneration",
           variants=GATED_OR_NOT, long_only=("plain",)),
    *_rows("opt", "OPT", CAUSAL, OPT, short="ForCausalLM",
           variants={"": {}, "post": {"do_layer_norm_before": False, "word_embed_proj_dim": 16}}),
    *_rows("pegasus", "Pegasus", SEQ2SEQ, BART, short="ForConditionalGeneration"),
    *_bert_like("roberta", "Roberta", "ForCausalLM"),
    *_bert_like("roberta_prelayernorm", "RobertaPreLayerNorm", "ForCausalLM"),
    *_bert_like("roformer", "RoFormer", embedding_size=32),
    *_composite("speech_encoder_decoder", "SpeechEncoderDecoder", "from_encoder_decoder_configs", {
        "wav2vec2+gpt2": (SPEECH_PART, GPT2_PART),
        "wav2vec2+bart": (SPEECH_PART, BART_PART)}),
    *_rows("t5", "T5", f"{SEQ2SEQ} EncoderModel", T5, short="ForConditionalGeneration",
           variants=GATED_OR_NOT),
    *_composite("vision_encoder_decoder", "VisionEncoderDecoder", "from_encoder_decoder_configs", {
        "vit+gpt2": (VIT_PART, GPT2_PART),
        "beit+bert": (("BeitConfig", VIT), BERT_PART)}),
    *_composite("vision_text_dual_encoder", "VisionTextDualEncoder", "from_vision_text_configs", {
        "clip+roberta": (("CLIPVisionConfig", VIT), ("RobertaConfig", BERT)),
        "vit+bert": (VIT_PART, BERT_PART)}),
    *_rows("vit", "ViT", "Model ForImageClassification", VIT, short="ForImageClassification"),
    *_rows("wav2vec2", "Wav2Vec2", "Model ForCTC ForPreTraining", WAV2VEC2, short="ForCTC"),
    *_rows("whisper", "Whisper", f"{SEQ2SEQ} ForAudioClassification", WHISPER, short="Model"),
    *_rows("xglm", "XGLM", CAUSAL, XGLM, short="ForCausalLM"),
    *_bert_like("xlm_roberta", "XLMRoberta", "ForCausalLM"),
)
# fmt: on
