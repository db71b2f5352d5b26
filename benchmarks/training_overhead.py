"""What pruning costs in a training step, against the bare optimizer and against a mask per weight.

    python benchmarks/training_overhead.py [--layers 12] [--batch 8] [--length 128] [--rounds 5]

A step of BERT-base (random weights, sequence classification) under adamw: alone, wrapped in
`flaxslim.pruning` by a score that looks when channels die and by one that adds up in each step, and
with a mask of one entry for each weight, as pruning libraries for JAX do it. All are compiled first
and timed in turn; a ratio is the median over rounds of the ratios within a round. The state of
pruning is given as a share of the inner optimizer's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from transformers import BertConfig, FlaxBertForSequenceClassification

import flaxslim
from flaxslim._tree import flatten, replace

SCORES = ("magnitude", "snip_momentum")


def masked(inner: optax.GradientTransformation, every: int) -> optax.GradientTransformation:
    """The way of masks: one bool for each weight of the FFN kernels, chosen by magnitude."""

    def init(params: Any) -> Any:
        masks = {
            t.path: jnp.ones(t.shape, bool)
            for site in flaxslim.BERT_FFN.sites(params)
            for t in (*site.first, site.second)
        }
        return inner.init(params), masks, jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        inner_state, masks, count = state
        leaves = flatten(params)

        def chosen() -> Any:
            return {
                path: jnp.abs(leaves[path]) > jnp.quantile(jnp.abs(leaves[path][::64]), 0.5)
                for path in masks
            }

        masks = jax.lax.cond(count % every == every - 1, chosen, lambda: masks)
        updates, inner_state = inner.update(updates, inner_state, params)
        own = flatten(updates)
        new = {path: jnp.where(m, own[path], -leaves[path]) for path, m in masks.items()}
        return replace(updates, new), (inner_state, masks, count + 1)

    return optax.GradientTransformation(init, update)


def size(tree: Any) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    cfg = BertConfig(num_hidden_layers=arguments.layers, num_labels=2)
    model: Any = FlaxBertForSequenceClassification(cfg)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, cfg.vocab_size, (arguments.batch, arguments.length))
    labels = rng.integers(0, 2, arguments.batch)
    inner = optax.adamw(3e-5)

    def pruned(score: str) -> Any:
        schedule = flaxslim.cubic(0.0, 0.5, begin=100, end=10_000, every=100)
        return flaxslim.pruning(inner, flaxslim.BERT_FFN, schedule, score)

    ways = {"adamw": inner} | {f"pruning, {score}": pruned(score) for score in SCORES}
    ways["masks per weight"] = masked(inner, 100)

    def stepping(tx: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
        def step(params: Any, state: Any) -> tuple[Any, Any]:
            def loss(params: Any) -> Any:
                logits = model(ids, params=params).logits
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1))

    console, held, times, extra = Console(), {}, {name: [] for name in ways}, {}
    base = size(inner.init(model.params))
    for name, tx in ways.items():
        with console.status(f"compiling {name}"):
            params = jax.tree.map(jnp.array, model.params)
            state = tx.init(params)
            extra[name] = (size(state) - base) / base
            step = stepping(tx)
            held[name] = step, *jax.block_until_ready(step(params, state))
    for number in range(arguments.rounds):
        with console.status(f"round {number + 1} of {arguments.rounds}"):
            for name, (step, params, state) in held.items():
                started = time.perf_counter()
                held[name] = step, *jax.block_until_ready(step(params, state))
                times[name].append(time.perf_counter() - started)

    table = Table("optimizer", "ms per step", "ratio", "state beside adamw's")
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["adamw"], strict=True))
        table.add_row(
            name,
            f"{1e3 * statistics.median(times[name]):.0f}",
            f"{ratio:.3f}",
            f"{decimal(round(extra[name] * base))}, {extra[name]:.3%}",
        )
    shape = f"{arguments.batch} x {arguments.length}"
    console.print(f"BERT, {arguments.layers} layers, {shape}, float32, {jax.devices()[0]}")
    console.print(table)


if __name__ == "__main__":
    main()
