"""The shipped specs, and the registry that finds one by `config.model_type`."""

from typing import Any

from flaxslim import _config
from flaxslim._errors import UnknownFamilyError, nearest
from flaxslim._spec import Spec
from flaxslim.specs import _ffn

# model_type -> spec, for every family that stands by itself.
FAMILIES: dict[str, Spec] = {
    "albert": _ffn.ALBERT_FFN,
    "bart": _ffn.BART_FFN,
    "beit": _ffn.BEIT_FFN,
    "bert": _ffn.BERT_FFN,
    "big_bird": _ffn.BIG_BIRD_FFN,
    "blenderbot": _ffn.BLENDERBOT_FFN,
    "blenderbot-small": _ffn.BLENDERBOT_SMALL_FFN,
    "bloom": _ffn.BLOOM_FFN,
    "clip_text_model": _ffn.CLIP_TEXT_FFN,
    "clip_vision_model": _ffn.CLIP_VISION_FFN,
    "dinov2": _ffn.DINOV2_FFN,
    "distilbert": _ffn.DISTILBERT_FFN,
    "electra": _ffn.ELECTRA_FFN,
    "gemma": _ffn.GEMMA_FFN,
    "gpt2": _ffn.GPT2_FFN,
    "gpt_neo": _ffn.GPT_NEO_FFN,
    "gptj": _ffn.GPTJ_FFN,
    "llama": _ffn.LLAMA_FFN,
    "longt5": _ffn.LONGT5_FFN,
    "marian": _ffn.MARIAN_FFN,
    "mbart": _ffn.MBART_FFN,
    "mistral": _ffn.MISTRAL_FFN,
    "mt5": _ffn.MT5_FFN,
    "opt": _ffn.OPT_FFN,
    "pegasus": _ffn.PEGASUS_FFN,
    "roberta": _ffn.ROBERTA_FFN,
    "roberta-prelayernorm": _ffn.ROBERTA_PRELAYERNORM_FFN,
    "roformer": _ffn.ROFORMER_FFN,
    "t5": _ffn.T5_FFN,
    "vit": _ffn.VIT_FFN,
    "wav2vec2": _ffn.WAV2VEC2_FFN,
    "whisper": _ffn.WHISPER_FFN,
    "xglm": _ffn.XGLM_FFN,
    "xlm-roberta": _ffn.XLM_ROBERTA_FFN,
}

# model_type -> {key of a part in the config: its subtree}. Their specs are built from those of
# their parts, whatever families these are.
COMPOSITES: dict[str, dict[str, str]] = {
    "clip": {"text_config": "", "vision_config": ""},
    "encoder-decoder": {"encoder": "encoder", "decoder": "decoder"},
    "speech-encoder-decoder": {"encoder": "encoder", "decoder": "decoder"},
    "vision-encoder-decoder": {"encoder": "encoder", "decoder": "decoder"},
    "vision-text-dual-encoder": {"text_config": "text_model", "vision_config": "vision_model"},
}


def spec_for(cfg: Any) -> Spec:
    """The spec of the family that a config names by its `model_type`.

    Raises `UnknownFamilyError`, with the families spelled most like it.

    >>> spec_for({"model_type": "gpt2"}).name
    'GPT2_FFN'
    """
    name = _config.model_type(cfg)
    if name in COMPOSITES:
        parts = [
            spec_for(_config.read(cfg, key)).under(tree=tree, config=key)
            for key, tree in COMPOSITES[name].items()
        ]
        joined = "_".join(part.name.removesuffix("_FFN") for part in parts)
        return Spec(name=f"{joined}_FFN", pairs=tuple(pair for part in parts for pair in part))
    if name in FAMILIES:
        return FAMILIES[name]
    raise UnknownFamilyError(
        "the config has no model_type" if name is None else f"no spec for model_type {name!r}",
        near=nearest((name or "").lower(), [*FAMILIES, *COMPOSITES]),
        mend="`flaxslim families` lists the known ones; for a model of your own pass "
        'spec=Spec(name="MY_FFN", pairs=Pair(first="up", second="down"))',
    )
