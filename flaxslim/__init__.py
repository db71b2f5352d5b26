"""flaxslim: make a JAX transformer physically smaller without changing what it computes.

    params, cfg = slim(params, cfg, spec=BERT_FFN)

The public names are imported on first use, so that `flaxslim --help` need not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxslim._apply import apply as apply
    from flaxslim._by_layer import verify_by_layer as verify_by_layer
    from flaxslim._compat import clip_compat as clip_compat
    from flaxslim._compose import expand as expand
    from flaxslim._discover import axis_rule as axis_rule
    from flaxslim._discover import discover as discover
    from flaxslim._discover import explain as explain
    from flaxslim._draw import plan as plan
    from flaxslim._export import export as export
    from flaxslim._intercept import layout as layout
    from flaxslim._intercept import module as module
    from flaxslim._pair import Pair as Pair
    from flaxslim._plan import Plan as Plan
    from flaxslim._prove import Proof as Proof
    from flaxslim._prove import verify as verify
    from flaxslim._slim import slim as slim
    from flaxslim._spec import Site as Site
    from flaxslim._spec import Spec as Spec
    from flaxslim.checkpoint import from_pretrained as from_pretrained
    from flaxslim.checkpoint import load as load
    from flaxslim.checkpoint import save as save
    from flaxslim.errors import CalibrationWarning as CalibrationWarning
    from flaxslim.errors import ConfigKeptWarning as ConfigKeptWarning
    from flaxslim.errors import DeadKeptWarning as DeadKeptWarning
    from flaxslim.errors import DiscoveryWarning as DiscoveryWarning
    from flaxslim.errors import FlaxslimError as FlaxslimError
    from flaxslim.errors import NothingRemovedWarning as NothingRemovedWarning
    from flaxslim.errors import TrainingWarning as TrainingWarning
    from flaxslim.plots._plan import plot_plan as plot_plan
    from flaxslim.plots._sweep import plot_sweep as plot_sweep
    from flaxslim.plots._training import plot_training as plot_training
    from flaxslim.posttraining._allocate import Budget as Budget
    from flaxslim.posttraining._method import Method as Method
    from flaxslim.posttraining._prune import prune as prune
    from flaxslim.posttraining._report import Report as Report
    from flaxslim.posttraining._tune import Tune as Tune
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
    from flaxslim.specs._heads import ALBERT_HEADS as ALBERT_HEADS
    from flaxslim.specs._heads import BART_HEADS as BART_HEADS
    from flaxslim.specs._heads import BEIT_HEADS as BEIT_HEADS
    from flaxslim.specs._heads import BERT_HEADS as BERT_HEADS
    from flaxslim.specs._heads import BIG_BIRD_HEADS as BIG_BIRD_HEADS
    from flaxslim.specs._heads import BLENDERBOT_HEADS as BLENDERBOT_HEADS
    from flaxslim.specs._heads import BLENDERBOT_SMALL_HEADS as BLENDERBOT_SMALL_HEADS
    from flaxslim.specs._heads import BLOOM_HEADS as BLOOM_HEADS
    from flaxslim.specs._heads import CLIP_TEXT_HEADS as CLIP_TEXT_HEADS
    from flaxslim.specs._heads import CLIP_VISION_HEADS as CLIP_VISION_HEADS
    from flaxslim.specs._heads import DINOV2_HEADS as DINOV2_HEADS
    from flaxslim.specs._heads import DISTILBERT_HEADS as DISTILBERT_HEADS
    from flaxslim.specs._heads import ELECTRA_HEADS as ELECTRA_HEADS
    from flaxslim.specs._heads import GEMMA_HEADS as GEMMA_HEADS
    from flaxslim.specs._heads import GPT2_HEADS as GPT2_HEADS
    from flaxslim.specs._heads import GPT_NEO_HEADS as GPT_NEO_HEADS
    from flaxslim.specs._heads import GPTJ_HEADS as GPTJ_HEADS
    from flaxslim.specs._heads import LLAMA_HEADS as LLAMA_HEADS
    from flaxslim.specs._heads import LONGT5_HEADS as LONGT5_HEADS
    from flaxslim.specs._heads import MARIAN_HEADS as MARIAN_HEADS
    from flaxslim.specs._heads import MBART_HEADS as MBART_HEADS
    from flaxslim.specs._heads import MISTRAL_HEADS as MISTRAL_HEADS
    from flaxslim.specs._heads import MT5_HEADS as MT5_HEADS
    from flaxslim.specs._heads import OPT_HEADS as OPT_HEADS
    from flaxslim.specs._heads import PEGASUS_HEADS as PEGASUS_HEADS
    from flaxslim.specs._heads import ROBERTA_HEADS as ROBERTA_HEADS
    from flaxslim.specs._heads import ROBERTA_PRELAYERNORM_HEADS as ROBERTA_PRELAYERNORM_HEADS
    from flaxslim.specs._heads import ROFORMER_HEADS as ROFORMER_HEADS
    from flaxslim.specs._heads import T5_HEADS as T5_HEADS
    from flaxslim.specs._heads import VIT_HEADS as VIT_HEADS
    from flaxslim.specs._heads import WAV2VEC2_HEADS as WAV2VEC2_HEADS
    from flaxslim.specs._heads import WHISPER_HEADS as WHISPER_HEADS
    from flaxslim.specs._heads import XGLM_HEADS as XGLM_HEADS
    from flaxslim.specs._heads import XLM_ROBERTA_HEADS as XLM_ROBERTA_HEADS
    from flaxslim.specs._libraries import BIG_VISION_FFN as BIG_VISION_FFN
    from flaxslim.specs._libraries import BIG_VISION_HEADS as BIG_VISION_HEADS
    from flaxslim.specs._libraries import BONSAI_GEMMA3_FFN as BONSAI_GEMMA3_FFN
    from flaxslim.specs._libraries import BONSAI_GEMMA3_HEADS as BONSAI_GEMMA3_HEADS
    from flaxslim.specs._libraries import BONSAI_QWEN3_FFN as BONSAI_QWEN3_FFN
    from flaxslim.specs._libraries import BONSAI_QWEN3_HEADS as BONSAI_QWEN3_HEADS
    from flaxslim.specs._libraries import EASYDEL_FFN as EASYDEL_FFN
    from flaxslim.specs._libraries import EASYDEL_HEADS as EASYDEL_HEADS
    from flaxslim.specs._libraries import GEMMA_DEEPMIND_FFN as GEMMA_DEEPMIND_FFN
    from flaxslim.specs._libraries import GEMMA_DEEPMIND_HEADS as GEMMA_DEEPMIND_HEADS
    from flaxslim.specs._libraries import KERAS_HUB_FFN as KERAS_HUB_FFN
    from flaxslim.specs._libraries import KERAS_HUB_HEADS as KERAS_HUB_HEADS
    from flaxslim.specs._libraries import MAXTEXT_FFN as MAXTEXT_FFN
    from flaxslim.specs._libraries import MAXTEXT_HEADS as MAXTEXT_HEADS
    from flaxslim.specs._libraries import NNX_HEADS as NNX_HEADS
    from flaxslim.specs._libraries import TUNIX_FFN as TUNIX_FFN
    from flaxslim.specs._libraries import TUNIX_HEADS as TUNIX_HEADS
    from flaxslim.training._distill import distill_loss as distill_loss
    from flaxslim.training._gates import expected_sparsity as expected_sparsity
    from flaxslim.training._gates import gate_lagrangian as gate_lagrangian
    from flaxslim.training._gates import gated as gated
    from flaxslim.training._gates import gates as gates
    from flaxslim.training._gates import open_gates as open_gates
    from flaxslim.training._gates import sample_gates as sample_gates
    from flaxslim.training._lasso import group_lasso as group_lasso
    from flaxslim.training._lasso import proximal_group_lasso as proximal_group_lasso
    from flaxslim.training._masks import channel_mask as channel_mask
    from flaxslim.training._masks import keep_dead as keep_dead
    from flaxslim.training._masks import prunable as prunable
    from flaxslim.training._pruning import pruning as pruning
    from flaxslim.training._schedule import cubic as cubic
    from flaxslim.training._schedule import exponential as exponential
    from flaxslim.training._schedule import linear as linear
    from flaxslim.training._schedule import one_shot as one_shot
    from flaxslim.training._schedule import scheduled as scheduled
    from flaxslim.training._schedule import stepwise as stepwise
    from flaxslim.training._shrink import ShrinkEvery as ShrinkEvery
    from flaxslim.training._shrink import shrink as shrink
    from flaxslim.training._sparsity import Sparsity as Sparsity
    from flaxslim.training._sparsity import sparsity as sparsity

__version__ = "1.0.0rc1"

# The public modules: what of them is not here is of use to few.
_MODULES = ("checkpoint", "errors", "posttraining")

# module -> the public names that it holds; the same as above, which type checkers read.
_PUBLIC = {
    "_apply": ("apply",),
    "_compat": ("clip_compat",),
    "errors": (
        "CalibrationWarning",
        "ConfigKeptWarning",
        "DeadKeptWarning",
        "DiscoveryWarning",
        "FlaxslimError",
        "NothingRemovedWarning",
        "TrainingWarning",
    ),
    "_by_layer": ("verify_by_layer",),
    "_compose": ("expand",),
    "_discover": ("axis_rule", "discover", "explain"),
    "_draw": ("plan",),
    "_export": ("export",),
    "_intercept": ("layout", "module"),
    "_pair": ("Pair",),
    "_plan": ("Plan",),
    "_prove": ("Proof", "verify"),
    "_slim": ("slim",),
    "_spec": ("Site", "Spec"),
    "checkpoint": ("from_pretrained", "load", "save"),
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
    "specs._heads": (
        "ALBERT_HEADS",
        "BART_HEADS",
        "BEIT_HEADS",
        "BERT_HEADS",
        "BIG_BIRD_HEADS",
        "BLENDERBOT_HEADS",
        "BLENDERBOT_SMALL_HEADS",
        "BLOOM_HEADS",
        "CLIP_TEXT_HEADS",
        "CLIP_VISION_HEADS",
        "DINOV2_HEADS",
        "DISTILBERT_HEADS",
        "ELECTRA_HEADS",
        "GEMMA_HEADS",
        "GPT2_HEADS",
        "GPTJ_HEADS",
        "GPT_NEO_HEADS",
        "LLAMA_HEADS",
        "LONGT5_HEADS",
        "MARIAN_HEADS",
        "MBART_HEADS",
        "MISTRAL_HEADS",
        "MT5_HEADS",
        "OPT_HEADS",
        "PEGASUS_HEADS",
        "ROBERTA_HEADS",
        "ROBERTA_PRELAYERNORM_HEADS",
        "ROFORMER_HEADS",
        "T5_HEADS",
        "VIT_HEADS",
        "WAV2VEC2_HEADS",
        "WHISPER_HEADS",
        "XGLM_HEADS",
        "XLM_ROBERTA_HEADS",
    ),
    "specs._libraries": (
        "BIG_VISION_FFN",
        "BIG_VISION_HEADS",
        "BONSAI_GEMMA3_FFN",
        "BONSAI_GEMMA3_HEADS",
        "BONSAI_QWEN3_FFN",
        "BONSAI_QWEN3_HEADS",
        "EASYDEL_FFN",
        "EASYDEL_HEADS",
        "GEMMA_DEEPMIND_FFN",
        "GEMMA_DEEPMIND_HEADS",
        "KERAS_HUB_FFN",
        "KERAS_HUB_HEADS",
        "MAXTEXT_FFN",
        "MAXTEXT_HEADS",
        "NNX_HEADS",
        "TUNIX_FFN",
        "TUNIX_HEADS",
    ),
    "plots._plan": ("plot_plan",),
    "plots._sweep": ("plot_sweep",),
    "plots._training": ("plot_training",),
    "posttraining._allocate": ("Budget",),
    "posttraining._method": ("Method",),
    "posttraining._prune": ("prune",),
    "posttraining._report": ("Report",),
    "posttraining._tune": ("Tune",),
    "training._pruning": ("pruning",),
    "training._schedule": (
        "cubic",
        "exponential",
        "linear",
        "one_shot",
        "scheduled",
        "stepwise",
    ),
    "training._shrink": (
        "ShrinkEvery",
        "shrink",
    ),
    "training._sparsity": (
        "Sparsity",
        "sparsity",
    ),
    "training._masks": (
        "channel_mask",
        "keep_dead",
        "prunable",
    ),
    "training._distill": ("distill_loss",),
    "training._lasso": (
        "group_lasso",
        "proximal_group_lasso",
    ),
    "training._gates": (
        "expected_sparsity",
        "gate_lagrangian",
        "gated",
        "gates",
        "open_gates",
        "sample_gates",
    ),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
