"""Methods without training on two real models: the reference methods, and the presets below them.

    python benchmarks/accuracy.py                                # all of it: some hours
    python benchmarks/accuracy.py --task stories260K --more      # with all calibration stories
    python benchmarks/accuracy.py --methods obs best --ratios 0.5

FFN channels are removed in each layer at the given ratios. The reference methods are those of
the data's README (magnitude: product of the norms of a channel's first columns and second row;
Wanda: norm of the second row times RMS; "+ls": second layer refitted by ridge least squares; OBS:
greedy by exact error, refitted; ridge 1e-2). The presets choose what they choose, ridges and when
to stop, on calibration data that they hold out; the evaluation data are read for the table alone.

Seconds are medians over the columns, without the pass over the calibration data that all share.

With `--heads` a quarter and half of the attention heads go; then at one number of parameters a
quarter of FFN channels and heads, FFN channels alone, and what a budget chooses of both.
"""

import argparse
import pathlib
import tempfile
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accuracy_tasks import TASKS
from rich.console import Console
from rich.table import Table

from flaxslim import Budget, Method
from flaxslim.posttraining._kept import Kept
from flaxslim.posttraining._method import PRESETS, REFERENCES
from flaxslim.posttraining._prune import zero

METHODS = {**REFERENCES, **PRESETS}


def measured(
    task: Any, method: Method, keep: Any, *, spec: Any, seed: int, more: bool, kept: Kept
) -> tuple[tuple[float, ...], float]:
    """The figures of a task for one method at one size, and the seconds that pruning took."""
    began = time.perf_counter()
    params, _ = zero(
        task.params,
        task.cfg,
        spec,
        model=task.fn,
        batches=task.calibration(seed, more=more),
        keep=None if isinstance(keep, Budget) else keep,
        budget=keep if isinstance(keep, Budget) else None,
        method=method,
        width="per_layer",
        multiple_of=1,
        mask=None,
        loss=None,
        objective=None,
        low_memory=False,
        kept=kept,
        seed=seed,
        told=lambda what, done, total: None,
    )
    seconds = time.perf_counter() - began
    return task.evaluate(params), seconds


def show(figures: Any) -> str:
    return " / ".join(f"{x:.1f}" if x >= 20 else f"{x:.2f}" for x in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5, 0.7])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--more", action="store_true", help="with more calibration data")
    parser.add_argument("--heads", action="store_true", help="heads instead of FFN channels")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=140)
    wishes: dict[str, tuple[Any, Any]] = {
        f"{ratio:.0%}": ("ffn", {"f": 1 - ratio}) for ratio in args.ratios
    }
    if args.heads:
        wishes = {f"{ratio:.0%} of heads": ("heads", {"h": 1 - ratio}) for ratio in (0.25, 0.5)}
    for name in args.task or TASKS:
        task = TASKS[name]()
        task.params = jax.tree.map(jnp.asarray, task.params)
        if args.heads:
            share, budget = task.as_many_as(0.75)
            wishes["25% of both"] = ("all", {"f": 0.75, "h": 0.75})
            wishes["FFN, as many"] = ("ffn", {"f": share})
            wishes["both, by budget"] = ("all", budget)
        table = Table(title=f"{name}: {' / '.join(task.figures)}", title_justify="left")
        for column in ("method", *wishes, "s"):
            table.add_column(column, justify="left" if column == "method" else "right")
        table.add_row("dense", show(task.evaluate(task.params)))
        scratch = tempfile.TemporaryDirectory()  # all methods look at the same statistics
        for method in args.methods:
            cells, seconds = [], []
            for spec, keep in wishes.values():
                found = [
                    measured(
                        task,
                        METHODS[method],
                        keep,
                        spec=spec,
                        seed=seed,
                        more=args.more,
                        kept=Kept(pathlib.Path(scratch.name)),
                    )
                    for seed in range(args.seeds)
                ]
                cells.append(show(np.mean([figures for figures, _ in found], axis=0)))
                seconds += [taken for _, taken in found]
                console.print(f"{method} {cells[-1]}", style="dim")
            table.add_row(method, *cells, f"{np.median(seconds):.0f}")
        scratch.cleanup()
        console.print(table)


if __name__ == "__main__":
    main()
