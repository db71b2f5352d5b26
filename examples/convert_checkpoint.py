"""A trained BERT from PyTorch: prune 30% of its FFN, slim it, reload it in Flax and in PyTorch.

    python examples/convert_checkpoint.py path/to/sentence-encoder [OUT]

The checkpoint is any BERT with PyTorch names, such as sentence-transformers/all-MiniLM-L6-v2.
The 30% of the channels of each layer with the smallest weights die first (their rows of the
second layer are set to zero): that changes the embeddings, as pruning does. What is shown is that
slimming does not: the slimmed model gives the embeddings of the pruned one.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import AutoTokenizer, FlaxBertModel

import flaxslim

SENTENCES = [
    "A plane is taking off.",
    "An air plane is taking off.",
    "A man is playing a large flute.",
    "Three dogs run over the wet grass of a park while their owner reads.",
    "The quarterly report shows a loss.",
]


def prune(params: Any, share: float) -> Any:
    """Kill the channels of each FFN whose first column and second row have the smallest norms."""
    leaves = flatten_dict(params, sep="/")
    for site in flaxslim.BERT_FFN.sites(params):
        first, second = site.first[0], site.second
        score = first.axes.norm(leaves[first.path], "f") * second.axes.norm(
            leaves[second.path], "f"
        )
        dead = np.argsort(score)[: int(share * site.size)]
        leaves[second.path] = second.axes.zero(leaves[second.path], "f", dead)
    return unflatten_dict(leaves, sep="/")


def pooled(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sentence embeddings of unit length: the mean of the token states."""
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def embed_flax(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    states = jax.jit(lambda params, batch: model(**batch, params=params).last_hidden_state)
    with jax.default_matmul_precision("highest"):
        return pooled(np.asarray(states(model.params, batch)), batch["attention_mask"])


def embed_torch(folder: Path, batch: dict[str, np.ndarray]) -> np.ndarray | None:
    """The same by the stock PyTorch class; None without torch."""
    try:
        import torch
        from transformers import BertModel
    except ImportError:
        return None
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**{k: torch.tensor(v) for k, v in batch.items()}).last_hidden_state
    return pooled(states.numpy(), batch["attention_mask"])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def main(source: str, out: Path) -> None:
    params, cfg = flaxslim.load(source)
    params = jax.tree.map(jnp.asarray, prune(params, 0.3))
    slimmed, small = flaxslim.slim(params, cfg)
    proof = flaxslim.verify((params, cfg), (slimmed, small))
    print(proof)
    proof.raise_if_failed()

    pruned_folder = out.with_name(out.name + "-pruned")
    flaxslim.save(pruned_folder, params, cfg, like=source, overwrite=True)
    flaxslim.save(
        out, slimmed, small, like=source, overwrite=True, record={"proof": proof.to_dict()}
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="np"))

    before = embed_flax(FlaxBertModel.from_pretrained(pruned_folder, from_pt=True), batch)
    after = embed_flax(FlaxBertModel.from_pretrained(out, from_pt=True), batch)
    print(f"\nstock FlaxBertModel: intermediate_size {cfg.intermediate_size} -> ", end="")
    print(f"{small.intermediate_size}, embeddings differ by {difference(before, after):.1e}")
    torch_before, torch_after = embed_torch(pruned_folder, batch), embed_torch(out, batch)
    if torch_before is None or torch_after is None:
        print("torch is not installed: the PyTorch class was not tried")
    else:
        apart = difference(torch_before, torch_after)
        print(f"stock BertModel of PyTorch: embeddings differ by {apart:.1e}")
        print(f"Flax against PyTorch, slimmed: {difference(after, torch_after):.1e}")
    print(f"bytes on disk: {disk(pruned_folder):,} -> {disk(out):,}")


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) == 3 else Path(scratch) / "slim"))
