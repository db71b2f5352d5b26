"""Several runs of a question answering recipe, side by side.

    python examples/question_answering/table.py FOLDER...

The first is what the others are compared with. Exact match and F1 are those that the run measured
on the saved model, loaded again. Latency is measured here: all models in turns on one window of
1 x 384 tokens; "faster" is the median of the ratios within a turn.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from transformers import FlaxBertForQuestionAnswering

import flaxslim

TURNS = 40


def main(folders: list[str]) -> None:
    reports = [json.loads((Path(f) / "report.json").read_text()) for f in folders]
    times = latencies(folders)
    table = Table()
    table.add_column("model")
    for column in ("exact", "F1", "of first", "FFN", "parameters", "size", "latency", "faster"):
        table.add_column(column, justify="right")
    first = saved(reports[0])["f1"]
    for folder, report, own in zip(folders, reports, times, strict=True):
        scores = saved(report)
        config = json.loads((Path(folder) / "config.json").read_text())
        table.add_row(
            Path(folder).name,
            f"{scores['exact']:.2f}",
            f"{scores['f1']:.2f}",
            f"{scores['f1'] / first:.1%}",
            f"{config['intermediate_size']:,}",
            f"{report['parameters']['after']:,}",
            decimal(report["bytes"]["after"], precision=1),
            f"{1e3 * statistics.median(own):.1f} ms",
            f"{statistics.median(a / b for a, b in zip(times[0], own, strict=True)):.2f}x",
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"latency at 1 x 384 in float32 on {jax.devices()[0].device_kind}")


def saved(report: dict[str, Any]) -> dict[str, float]:
    """The scores of the model that was saved and loaded again."""
    return next(s for name, s in report["scores"].items() if name.endswith("reloaded"))


def latencies(folders: list[str]) -> list[list[float]]:
    """Seconds of a forward pass, of each model in each turn."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30_000, (1, 384))
    calls = []
    for folder in folders:
        model: Any = flaxslim.from_pretrained(FlaxBertForQuestionAnswering, folder)
        call = jax.jit(lambda params, model=model: model(ids, params=params).start_logits)
        jax.block_until_ready(call(model.params))  # compiles
        calls.append((call, model.params))
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS):
        for (call, params), times in zip(calls, taken, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call(params))
            times.append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
