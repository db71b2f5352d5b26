"""The shipped specs, and the registry that finds one by `config.model_type`."""

import functools
from typing import Any

from flaxslim import _config
from flaxslim._pair import Pair
from flaxslim._spec import Spec, SpecLike
from flaxslim.errors import SpecError, UnknownFamilyError, nearest
from flaxslim.specs import _ffn, _heads

# model_type -> specs of the FFN and of the heads, for every family that stands by itself.
FAMILIES: dict[str, tuple[Spec, Spec]] = {
    "albert": (_ffn.ALBERT_FFN, _heads.ALBERT_HEADS),
    "bart": (_ffn.BART_FFN, _heads.BART_HEADS),
    "beit": (_ffn.BEIT_FFN, _heads.BEIT_HEADS),
    "bert": (_ffn.BERT_FFN, _heads.BERT_HEADS),
    "big_bird": (_ffn.BIG_BIRD_FFN, _heads.BIG_BIRD_HEADS),
    "blenderbot": (_ffn.BLENDERBOT_FFN, _heads.BLENDERBOT_HEADS),
    "blenderbot-small": (_ffn.BLENDERBOT_SMALL_FFN, _heads.BLENDERBOT_SMALL_HEADS),
    "bloom": (_ffn.BLOOM_FFN, _heads.BLOOM_HEADS),
    "clip_text_model": (_ffn.CLIP_TEXT_FFN, _heads.CLIP_TEXT_HEADS),
    "clip_vision_model": (_ffn.CLIP_VISION_FFN, _heads.CLIP_VISION_HEADS),
    "dinov2": (_ffn.DINOV2_FFN, _heads.DINOV2_HEADS),
    "distilbert": (_ffn.DISTILBERT_FFN, _heads.DISTILBERT_HEADS),
    "electra": (_ffn.ELECTRA_FFN, _heads.ELECTRA_HEADS),
    "gemma": (_ffn.GEMMA_FFN, _heads.GEMMA_HEADS),
    "gpt2": (_ffn.GPT2_FFN, _heads.GPT2_HEADS),
    "gpt_neo": (_ffn.GPT_NEO_FFN, _heads.GPT_NEO_HEADS),
    "gptj": (_ffn.GPTJ_FFN, _heads.GPTJ_HEADS),
    "llama": (_ffn.LLAMA_FFN, _heads.LLAMA_HEADS),
    "longt5": (_ffn.LONGT5_FFN, _heads.LONGT5_HEADS),
    "marian": (_ffn.MARIAN_FFN, _heads.MARIAN_HEADS),
    "mbart": (_ffn.MBART_FFN, _heads.MBART_HEADS),
    "mistral": (_ffn.MISTRAL_FFN, _heads.MISTRAL_HEADS),
    "mt5": (_ffn.MT5_FFN, _heads.MT5_HEADS),
    "opt": (_ffn.OPT_FFN, _heads.OPT_HEADS),
    "pegasus": (_ffn.PEGASUS_FFN, _heads.PEGASUS_HEADS),
    "roberta": (_ffn.ROBERTA_FFN, _heads.ROBERTA_HEADS),
    "roberta-prelayernorm": (_ffn.ROBERTA_PRELAYERNORM_FFN, _heads.ROBERTA_PRELAYERNORM_HEADS),
    "roformer": (_ffn.ROFORMER_FFN, _heads.ROFORMER_HEADS),
    "t5": (_ffn.T5_FFN, _heads.T5_HEADS),
    "vit": (_ffn.VIT_FFN, _heads.VIT_HEADS),
    "wav2vec2": (_ffn.WAV2VEC2_FFN, _heads.WAV2VEC2_HEADS),
    "whisper": (_ffn.WHISPER_FFN, _heads.WHISPER_HEADS),
    "xglm": (_ffn.XGLM_FFN, _heads.XGLM_HEADS),
    "xlm-roberta": (_ffn.XLM_ROBERTA_FFN, _heads.XLM_ROBERTA_HEADS),
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

# What of a family is meant: the index of its spec in FAMILIES, and the end of the spec's name.
PARTS = {"ffn": (0, "FFN"), "heads": (1, "HEADS")}


def spec_for(cfg: Any, part: str = "ffn") -> Spec:
    """The spec of the family that a config names by its `model_type`.

    `part` is "ffn", "heads", or "all" for both. Raises `UnknownFamilyError`, with the families
    spelled most like it, and `SpecError` for another part.

    >>> spec_for({"model_type": "gpt2"}).name
    'GPT2_FFN'
    >>> spec_for({"model_type": "gpt2"}, "all").name
    'GPT2_FFN+GPT2_HEADS'
    """
    if part == "all":
        return spec_for(cfg, "ffn") + spec_for(cfg, "heads")
    if part not in PARTS:
        raise SpecError(
            f"there is no spec {part!r} of a family",
            expected='"ffn", "heads", "all", or a Spec such as flaxslim.BERT_FFN',
        )
    index, end = PARTS[part]
    name = _config.model_type(cfg)
    if name in COMPOSITES:
        parts = [
            spec_for(_config.read(cfg, key), part).under(tree=tree, config=key)
            for key, tree in COMPOSITES[name].items()
        ]
        joined = "_".join(spec.name.removesuffix(f"_{end}") for spec in parts)
        return Spec(name=f"{joined}_{end}", pairs=tuple(pair for spec in parts for pair in spec))
    if name in FAMILIES:
        return FAMILIES[name][index]
    problem = f"no spec for model_type {name!r}"
    if name is None:
        given = "no config was given" if cfg is None else "the config has no model_type"
        problem = f"{given}, so the family is not known"
    raise UnknownFamilyError(
        problem,
        near=nearest((name or "").lower(), [*FAMILIES, *COMPOSITES]),
        mend=("pass the config that belongs to the parameters; " if cfg is None else "")
        + "`flaxslim families` lists the known ones; for a model of your own pass "
        'spec=Spec(name="MY_FFN", pairs=Pair(first="up", second="down")), or let '
        "spec=flaxslim.discover(fn, params, *inputs) find it (`flaxslim inspect SOURCE --discover` "
        "for a Flax class of transformers)",
    )


def chosen(spec: SpecLike, cfg: Any) -> Spec:
    """One spec of whatever the user gave: none, a name of a part, a Spec, or several.

    Raises `SpecError` for anything else, and what `spec_for` raises.
    """
    if spec is None:
        return spec_for(cfg)
    if isinstance(spec, str):
        return spec_for(cfg, spec)
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, list | tuple) and spec and None not in spec:
        return functools.reduce(Spec.__add__, [chosen(one, cfg) for one in spec])
    raise SpecError(
        "spec is not a Spec",
        seen=repr(spec),
        expected='a Spec such as flaxslim.BERT_FFN, several, or "ffn", "heads", "all"',
        mend="leave it out for the FFN of the family that the config names",
    )


def known(cfg: Any) -> frozenset[Pair]:
    """All pairs that a config's model_type stands for; none if it stands for no family."""
    try:
        return frozenset(spec_for(cfg, "all"))
    except UnknownFamilyError:
        return frozenset()
