"""What pruning costs in a training step, against the bare optimizer and against a mask per weight.

    python benchmarks/training_overhead.py [--layers 12] [--batch 8] [--length 128] [--rounds 4]

BERT-base (random weights, sequence classification) under adamw: alone, wrapped in
`flaxslim.pruning` by a score that looks when channels die and by one that adds up in each step, and
with a mask of one entry for each weight, as pruning libraries for JAX do it. "update" is the
optimizer's part alone, "step" all of a training step; both are medians, taken in turns. A step
takes seconds on a CPU, of which the optimizer is a small part that the noise of a shared machine
drowns. So "overhead" is what an update takes more than adamw's (median over rounds), relative to
adamw's whole step. The state of pruning is given as a share of adamw's.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from bert_training import size, stepping, training
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

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


def main() -> None:
    asked = training(__doc__, rounds=4)
    start, inner = asked.params, optax.adamw(3e-5)

    def pruned(score: str) -> Any:
        schedule = flaxslim.cubic(0.0, 0.5, begin=100, end=10_000, every=100)
        return flaxslim.pruning(inner, flaxslim.BERT_FFN, schedule, score)

    ways = {"adamw": inner} | {f"pruning, {score}": pruned(score) for score in SCORES}
    ways["masks per weight"] = masked(inner, 100)

    def updating(tx: Any) -> Callable[..., Any]:
        def update(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(update, donate_argnums=(1, 2))

    console = Console()
    grads = jax.tree.map(lambda x: 1e-3 * x, start)
    parts: dict[str, dict[str, Any]] = {"update": {}, "step": {}}
    extra: dict[str, float] = {}
    held: dict[str, Any] = {}
    base = size(inner.init(start))
    for name, tx in ways.items():
        with console.status(f"compiling {name}"):
            params = jax.tree.map(jnp.array, start)
            state = tx.init(params)
            extra[name] = (size(state) - base) / base
            step = jax.jit(stepping(asked.cfg, tx, asked.batch), donate_argnums=(0, 1))
            both = {"update": functools.partial(updating(tx), grads), "step": step}
            for part, call in both.items():
                params, state = jax.block_until_ready(call(params, state))
                parts[part][name] = call
            held[name] = params, state
    times: dict[str, dict[str, list[float]]] = {p: {name: [] for name in ways} for p in parts}
    for part, rounds in (("update", 5 * asked.rounds), ("step", asked.rounds)):
        for number in range(rounds):
            with console.status(f"{part}, round {number + 1} of {rounds}"):
                for name, call in parts[part].items():
                    started = time.perf_counter()
                    held[name] = jax.block_until_ready(call(*held[name]))
                    times[part][name].append(1e3 * (time.perf_counter() - started))

    table = Table("optimizer", "update ms", "step ms", "overhead", "state beside adamw's")
    whole = statistics.median(times["step"]["adamw"])
    for name in ways:
        pairs = zip(times["update"][name], times["update"]["adamw"], strict=True)
        more = statistics.median(a - b for a, b in pairs)
        table.add_row(
            name,
            *(f"{statistics.median(times[part][name]):.0f}" for part in ("update", "step")),
            f"{1 + more / whole:.3f}",
            f"{decimal(round(extra[name] * base))}, {extra[name]:.3%}",
        )
    console.print(str(asked))
    console.print(table)


if __name__ == "__main__":
    main()
