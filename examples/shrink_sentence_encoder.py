"""A trained sentence encoder, smaller without training: prune, compare, serve from the new folder.

    python examples/shrink_sentence_encoder.py path/to/sentence-encoder texts.txt [OUT]

`texts.txt` are a few hundred sentences, one a line, of the kind that the encoder will see; a tab
separated table like that of the STS benchmark will do too (edit FIELDS below). No label
is needed. The encoder is any BERT, such as sentence-transformers/all-MiniLM-L6-v2.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import AutoTokenizer, FlaxBertModel

import flaxslim
from flaxslim.posttraining import read_calibration

KEEP = 0.5
FIELDS = ("6",)  # the column of a table that holds the sentences
QUERY = "A man is playing music."
SENTENCES = [
    "Someone plays the guitar.",
    "A plane is taking off.",
    "The quarterly report shows a loss.",
]


def embed(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Unit vectors: the mean over tokens of the last layer."""
    batch = tokenizer(texts, padding=True, return_tensors="np")
    hidden = np.asarray(model(**batch).last_hidden_state)
    pooled = (hidden * batch["attention_mask"][..., None]).sum(1)
    return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)


def shrink(source: Path, texts: Path, out: Path, preset: str = "balanced") -> tuple[Any, Any]:
    """The dense model and the pruned one, as it was saved and loaded again."""
    dense: Any = flaxslim.from_pretrained(FlaxBertModel, source)
    fields = FIELDS if texts.suffix in (".csv", ".tsv") else ()
    data = read_calibration(
        texts, folder=source, cfg=dense.config, samples=256, batch_size=32, fields=fields
    )
    small, cfg = flaxslim.prune(
        dense.params,
        dense.config,
        model=FlaxBertModel,
        batches=data.batches,
        keep=KEEP,
        preset=preset,
        report=print,
    )
    flaxslim.save(out, small, cfg, like=source)
    return dense, flaxslim.from_pretrained(FlaxBertModel, out)


def main(source: Path, texts: Path, out: Path, preset: str = "balanced") -> None:
    dense, small = shrink(source, texts, out, preset)
    tokenizer = AutoTokenizer.from_pretrained(out)
    sizes = [sum(x.size for x in jax.tree.leaves(model.params)) for model in (dense, small)]
    print(f"parameters: {sizes[0]:,} -> {sizes[1]:,}")
    for name, model in (("dense", dense), ("pruned", small)):
        query, *found = embed(model, tokenizer, [QUERY, *SENTENCES])
        scores = "  ".join(f"{float(query @ vector):.2f}" for vector in found)
        print(f"{name:>6}: likeness of {QUERY!r} to each sentence: {scores}")
    ours, theirs = (embed(model, tokenizer, [QUERY, *SENTENCES]) for model in (dense, small))
    print(f"cosine of the two models' embeddings: {(ours * theirs).sum(1).min():.3f} at least")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(folder) / "small"
        main(Path(sys.argv[1]), Path(sys.argv[2]), target)
