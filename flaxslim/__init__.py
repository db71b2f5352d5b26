"""flaxslim: make a JAX transformer physically smaller without changing what it computes.

    params, cfg = slim(params, cfg, spec=BERT_FFN)

The public names are imported on first use, so that `flaxslim --help` need not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxslim._apply import apply as apply
    from flaxslim._compat import clip_compat as clip_compat
    from flaxslim._errors import FlaxslimError as FlaxslimError
    from flaxslim._errors import NothingRemovedWarning as NothingRemovedWarning
    from flaxslim._plan import Plan as Plan
    from flaxslim._plan import plan as plan
    from flaxslim._prove import Proof as Proof
    from flaxslim._prove import verify as verify
    from flaxslim._slim import slim as slim
    from flaxslim._spec import Pair as Pair
    from flaxslim._spec import Site as Site
    from flaxslim._spec import Spec as Spec
    from flaxslim.checkpoint import load as load
    from flaxslim.checkpoint import save as save
    from flaxslim.specs import spec_for as spec_for
    from flaxslim.specs._ffn import ALBERT_FFN as ALBERT_FFN
    from flaxslim.specs._ffn import BART_FFN as BART_FFN
    from flaxslim.specs._ffn import BEIT_FFN as BEIT_FFN
    from flaxslim.specs._ffn import BERT_FFN as BERT_FFN
    from flaxslim.specs._ffn import BIG_BIRD_FFN as BIG_BIRD_FFN
    from flaxslim.specs._ffn import BLENDERBOT_FFN as BLENDERBOT_FFN
    from flaxslim.specs._ffn import BLENDERBOT_SMALL_FFN as BLENDERBOT_SMALL_FFN
    from flaxslim.specs._ffn import BLOOM_FFN as BLOOM_FFN
    from flaxslim.specs._ffn import CLIP_TEXT_FFN as CLIP_TEXT_FFN
    from flaxslim.specs._ffn import CLIP_VISION_FFN as CLIP_VISION_FFN
    from flaxslim.specs._ffn import DINOV2_FFN as DINOV2_FFN
    from flaxslim.specs._ffn import DISTILBERT_FFN as DISTILBERT_FFN
    from flaxslim.specs._ffn import ELECTRA_FFN as ELECTRA_FFN
    from flaxslim.specs._ffn import GEMMA_FFN as GEMMA_FFN
    from flaxslim.specs._ffn import GPT2_FFN as GPT2_FFN
    from flaxslim.specs._ffn import GPT_NEO_FFN as GPT_NEO_FFN
    from flaxslim.specs._ffn import GPTJ_FFN as GPTJ_FFN
    from flaxslim.specs._ffn import LLAMA_FFN as LLAMA_FFN
    from flaxslim.specs._ffn import LONGT5_FFN as LONGT5_FFN
    from flaxslim.specs._ffn import MARIAN_FFN as MARIAN_FFN
    from flaxslim.specs._ffn import MBART_FFN as MBART_FFN
    from flaxslim.specs._ffn import MISTRAL_FFN as MISTRAL_FFN
    from flaxslim.specs._ffn import MT5_FFN as MT5_FFN
    from flaxslim.specs._ffn import OPT_FFN as OPT_FFN
    from flaxslim.specs._ffn import PEGASUS_FFN as PEGASUS_FFN
    from flaxslim.specs._ffn import ROBERTA_FFN as ROBERTA_FFN
    from flaxslim.specs._ffn import ROBERTA_PRELAYERNORM_FFN as ROBERTA_PRELAYERNORM_FFN
    from flaxslim.specs._ffn import ROFORMER_FFN as ROFORMER_FFN
    from flaxslim.specs._ffn import T5_FFN as T5_FFN
    from flaxslim.specs._ffn import VIT_FFN as VIT_FFN
    from flaxslim.specs._ffn import WAV2VEC2_FFN as WAV2VEC2_FFN
    from flaxslim.specs._ffn import WHISPER_FFN as WHISPER_FFN
    from flaxslim.specs._ffn import XGLM_FFN as XGLM_FFN
    from flaxslim.specs._ffn import XLM_ROBERTA_FFN as XLM_ROBERTA_FFN

__version__ = "0.1.0"

# module -> the public names that it holds; the same as above, which type checkers read.
_PUBLIC = {
    "_apply": ("apply",),
    "_compat": ("clip_compat",),
    "_errors": ("FlaxslimError", "NothingRemovedWarning"),
    "_plan": ("Plan", "plan"),
    "_prove": ("Proof", "verify"),
    "_slim": ("slim",),
    "_spec": ("Pair", "Site", "Spec"),
    "checkpoint": ("load", "save"),
    "specs": ("spec_for",),
    "specs._ffn": (
        "ALBERT_FFN",
        "BART_FFN",
        "BEIT_FFN",
        "BERT_FFN",
        "BIG_BIRD_FFN",
        "BLENDERBOT_FFN",
        "BLENDERBOT_SMALL_FFN",
        "BLOOM_FFN",
        "CLIP_TEXT_FFN",
        "CLIP_VISION_FFN",
        "DINOV2_FFN",
        "DISTILBERT_FFN",
        "ELECTRA_FFN",
        "GEMMA_FFN",
        "GPT2_FFN",
        "GPTJ_FFN",
        "GPT_NEO_FFN",
        "LLAMA_FFN",
        "LONGT5_FFN",
        "MARIAN_FFN",
        "MBART_FFN",
        "MISTRAL_FFN",
        "MT5_FFN",
        "OPT_FFN",
        "PEGASUS_FFN",
        "ROBERTA_FFN",
        "ROBERTA_PRELAYERNORM_FFN",
        "ROFORMER_FFN",
        "T5_FFN",
        "VIT_FFN",
        "WAV2VEC2_FFN",
        "WHISPER_FFN",
        "XGLM_FFN",
        "XLM_ROBERTA_FFN",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
