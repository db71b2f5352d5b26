"""The smallest llama that there is, with dead channels: checkpoints of every kind in some kB."""

from pathlib import Path
from typing import Any

import numpy as np
from kill import kill
from transformers import LlamaConfig

from flaxslim._tree import flatten
from flaxslim.checkpoint import save, to_flax
from flaxslim.checkpoint._leaf import nest
from flaxslim.checkpoint._names import spec_named

D, F, KV, LAYERS, WORDS = 8, 12, 4, 2, 11
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
}


def config() -> LlamaConfig:
    return LlamaConfig(**CONFIG)


def weights(seed: int = 0) -> dict[str, Any]:
    """A tree with PyTorch's names, some channels and heads of which are dead."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (WORDS, D), "lm_head": (WORDS, D), "model.norm": (D,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{x}_proj": (D, D) for x in "qo"}
        shapes |= {f"{at}self_attn.{x}_proj": (KV, D) for x in "kv"}
        shapes |= {f"{at}{x}_layernorm": (D,) for x in ("input", "post_attention")}
        shapes |= {f"{at}mlp.{x}_proj": (F, D) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj": (D, F)}
    flat = {f"{k}.weight": rng.standard_normal(s, np.float32) for k, s in shapes.items()}
    tree = nest(flat, ".")
    return kill(tree, spec_named(config(), "all", "torch").sites(tree, config()), seed=seed)[0]


def torch_folder(folder: Path, *, seed: int = 0, **how: Any) -> Path:
    """A checkpoint with PyTorch's names; `how` goes to `save`."""
    flat = {path.replace("/", "."): leaf for path, leaf in flatten(weights(seed)).items()}
    return save(folder, flat, CONFIG, format="torch", **how)


def flax_folder(folder: Path, *, seed: int = 0, **how: Any) -> Path:
    """A checkpoint in Flax's msgpack."""
    return save(folder, to_flax(weights(seed), config()), config(), **how)
