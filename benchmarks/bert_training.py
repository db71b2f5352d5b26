"""What the benchmarks of training share: BERT with random weights, a batch, and its loss."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from transformers import BertConfig, FlaxBertForSequenceClassification

from flaxslim._compat import shell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A random BERT-base of some layers, and a batch `(b, t)` for it."""

    cfg: BertConfig
    params: Any
    batch: tuple[np.ndarray, np.ndarray]
    rounds: int

    def __str__(self) -> str:
        b, t = self.batch[0].shape
        layers = self.cfg.num_hidden_layers
        return f"BERT, {layers} layers, {b} x {t}, float32, {jax.devices()[0]}"


def training(doc: str | None, *, rounds: int) -> Training:
    """By the command line, whose help is `doc`."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=rounds)
    said = parser.parse_args()
    cfg = BertConfig(num_hidden_layers=said.layers, num_labels=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, cfg.vocab_size, (said.batch, said.length))
    return Training(
        cfg=cfg,
        params=FlaxBertForSequenceClassification(cfg).params,
        batch=(ids, rng.integers(0, 2, said.batch)),
        rounds=said.rounds,
    )


def stepping(cfg: Any, tx: Any, batch: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A training step of a model of these sizes: parameters and optimizer state."""
    model = shell(FlaxBertForSequenceClassification, cfg)
    ids, labels = batch

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logits = model(ids, params=params).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def size(tree: Any) -> int:
    """The bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))
