"""What shrinking in the middle of training buys: a step of BERT-base before it and after.

    python benchmarks/shrink_gain.py [--layers 12] [--batch 8] [--length 128] [--rounds 5]

Under adamw, with random weights. A share of the FFN channels (and, in the last row, of the heads)
dies by `flaxslim.pruning`; then `flaxslim.shrink` cuts parameters and optimizer state. Steps before
and after are timed in turn; a ratio is the median over rounds of the ratios within a round, beside
the one that FLOPs say (XLA's cost analysis of the two programs). "shrink" is the time of that call.
"""

import statistics
import time
from typing import Any

import jax
import optax
from bert_training import size, stepping, training
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import flaxslim
from flaxslim.specs import chosen

CASES = {
    "FFN 50%": ("ffn", {"f": 0.5}),
    "FFN 90%": ("ffn", {"f": 0.9}),
    "FFN 90%, heads 60%": ("all", {"f": 0.9, "h": 0.6}),
}


def compiled(cfg: Any, tx: Any, batch: Any, params: Any, state: Any) -> Any:
    """A compiled step of a model of these sizes."""
    return jax.jit(stepping(cfg, tx, batch)).lower(params, state).compile()


def flops(step: Any) -> float:
    found = step.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def seconds(step: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - started


def main() -> None:
    asked = training(__doc__, rounds=5)
    dense, start, batch = asked.cfg, asked.params, asked.batch
    table = Table(
        "dead", "step ms", "after", "faster", "FLOPs say", "shrink ms", "params and state"
    )
    for name, (spec, sparsity) in CASES.items():
        found = chosen(spec, dense)
        tx = flaxslim.pruning(optax.adamw(3e-5), found, sparsity, cfg=dense)
        state = tx.init(start)
        before = compiled(dense, tx, batch, start, state)
        params, state = before(start, state)
        began = time.perf_counter()
        small, small_state, cfg = flaxslim.shrink(params, state, dense, found, width="per_layer")
        jax.block_until_ready((small, small_state))
        shrinking = time.perf_counter() - began
        tx = flaxslim.pruning(optax.adamw(3e-5), found, sparsity, cfg=cfg)
        after = compiled(cfg, tx, batch, small, small_state)
        pairs = []
        for number in range(asked.rounds + 1):
            pair = seconds(before, params, state), seconds(after, small, small_state)
            pairs += [pair] if number else []  # the first is warm-up
        table.add_row(
            name,
            *(f"{1e3 * statistics.median(own):.0f}" for own in zip(*pairs, strict=True)),
            f"{statistics.median(a / b for a, b in pairs):.2f}x",
            f"{flops(before) / flops(after):.2f}x",
            f"{1e3 * shrinking:.0f}",
            " -> ".join(decimal(size(own)) for own in ((params, state), (small, small_state))),
        )
    console = Console(width=110)
    console.print(str(asked))
    console.print(table)


if __name__ == "__main__":
    main()
