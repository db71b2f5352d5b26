"""Time and memory of pruning without training: the greedy order alone, and a whole BERT.

    python benchmarks/prune_speed.py                    # orders of 768 to 3,072 channels; BERT-base
    python benchmarks/prune_speed.py --widths 14336     # needs 11.3 GB
    python benchmarks/prune_speed.py --widths --layers 2 6 12 --low-memory

"Beyond" is the peak of memory less what was in memory before, the model among it.
A greedy order takes about 2 m^3 multiplications and additions for m channels, whatever the layer
puts out, and five matrices m x m in float64.
"""

import argparse
import multiprocessing
import resource
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import flaxslim
from flaxslim.posttraining._removal import removal_order

OUTPUTS = 768


def ordered(m: int) -> tuple[float, float]:
    """Seconds for the order of m channels, and 10^9 operations a second."""
    rng = np.random.default_rng(0)
    gram = np.eye(m)
    for _ in range(4):  # of full rank, and not a multiple of the identity
        h = rng.standard_normal((m // 2, m))
        gram += h.T @ h / m
    w = rng.standard_normal((m, OUTPUTS))
    began = time.perf_counter()
    removal_order(gram, w, np.arange(m))
    seconds = time.perf_counter() - began
    return seconds, 2 * m**3 / seconds / 1e9


def bert(layers: int, preset: str, low_memory: bool) -> tuple[float, int, int]:
    """Seconds for 128 samples of 128 tokens, bytes of the model, and peak bytes beyond it."""
    from transformers import BertConfig, FlaxBertModel

    model: Any = FlaxBertModel(BertConfig(num_hidden_layers=layers))
    size = sum(x.nbytes for x in jax.tree.leaves(model.params))
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (16, 8, 128), dtype=np.int32)
    batches = [{"input_ids": x, "attention_mask": np.ones_like(x)} for x in ids]
    before, began = peak(), time.perf_counter()
    flaxslim.prune(
        model.params,
        model.config,
        model=FlaxBertModel,
        batches=batches,
        keep=0.7,
        preset=preset,
        low_memory=low_memory,
    )
    return time.perf_counter() - began, size, peak() - before


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--widths", nargs="*", type=int, default=[768, 1536, 3072])
    parser.add_argument("--layers", nargs="*", type=int, default=[12])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--low-memory", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=100)
    table = Table("channels", "order, s", "GFLOP/s", title="greedy order", title_justify="left")
    found = {m: ordered(m) for m in args.widths}
    for m, (seconds, rate) in found.items():
        table.add_row(f"{m:,}", f"{seconds:.1f}", f"{rate:.0f}")
    if found:
        console.print(table)
    if len(found) > 1:
        ms = sorted(found)
        slope = np.polyfit(np.log(ms), np.log([found[m][0] for m in ms]), 1)[0]
        console.print(f"grows as m^{slope:.2f}")
    if not args.layers:
        return
    how = f"{args.preset}{', low memory' if args.low_memory else ''}, 128 x 128 tokens"
    console.print(f"BERT of 768, {how}:")
    table = Table("layers", "s", "model, MB", "beyond, MB")
    # A process of its own for each: the peak of a process never falls.
    with ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=warnings.simplefilter,
        initargs=("ignore",),
        max_tasks_per_child=1,
    ) as pool:
        for layers in args.layers:
            seconds, size, beyond = pool.submit(bert, layers, args.preset, args.low_memory).result()
            table.add_row(str(layers), f"{seconds:.0f}", f"{size / 1e6:.0f}", f"{beyond / 1e6:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
