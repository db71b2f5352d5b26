"""A sentence encoder, pruned until it is so many times as fast: asked, predicted, and measured.

    python benchmarks/latency_target.py                 # 1.3, 1.5 and 2 times, three runs
    python benchmarks/latency_target.py --speedups 1.5 --runs 1 --ffn

Each run times the widths anew. FFN channels and heads compete: what goes is what is missed the
least for the time that it takes. A batch is 8 windows of 128 tokens of STS-B's training sentences;
what was measured is the ratio of the median times of the dense model and the finished one, which
take turns. "of outputs" is the relative squared error of the outputs on calibration batches.
"""

import argparse
import os
import tempfile
import warnings
from typing import Any

import numpy as np
from accuracy_tasks import DATA
from rich.console import Console
from rich.table import Table

import flaxslim
from flaxslim import Budget, Report
from flaxslim.posttraining import read_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.3, 1.5, 2.0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--ffn", action="store_true", help="no heads")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers import FlaxBertModel

    console = Console(width=110)
    model: Any = FlaxBertModel.from_pretrained(DATA / "sentence-encoder")
    data = read_calibration(
        DATA / "stsb" / "sts-train.csv",
        folder=DATA / "sentence-encoder",
        cfg=model.config,
        samples=64,
        length=128,
        batch_size=8,
        fields=("6",),
        packed=True,
    )
    table = Table(
        "run", "asked", "predicted", "measured", "off by", "channels", "heads", "of outputs"
    )
    off = []
    for run in range(1, args.runs + 1):
        with tempfile.TemporaryDirectory() as cache:  # nothing of an earlier run is taken
            os.environ["XDG_CACHE_HOME"] = cache
            for speedup in args.speedups:
                reports: list[Report] = []
                pruned = flaxslim.prune(
                    model.params,
                    model.config,
                    "ffn" if args.ffn else "all",
                    model=FlaxBertModel,
                    batches=data.batches,
                    budget=Budget(speedup=speedup),
                    preset=args.preset,
                    width="per_layer",
                    report=reports.append,
                )
                (report,) = reports
                proof = flaxslim.verify(
                    (model.params, model.config),
                    pruned,
                    FlaxBertModel,
                    inputs=data.batches[0],
                    approximate=True,
                    repeats=31,
                )
                ms, cost = proof.milliseconds, report.cost
                measured = (ms.before or 0.0) / (ms.after or 1.0)
                off.append(measured / speedup - 1)
                row = (
                    str(run),
                    f"{speedup:.2f}x",
                    f"{cost['dense'] / cost['predicted']:.2f}x",
                    f"{measured:.2f}x",
                    f"{off[-1]:+.1%}",
                    *(left(report, unit) for unit in ("channels", "heads")),
                    f"{report.output_error:.3f}",
                )
                table.add_row(*row)
                console.print(*row, style="dim")
    console.print(table)
    console.print(f"off by at most {max(np.abs(off)):.1%}")


def left(report: Report, unit: str) -> str:
    """The percentage of what was there."""
    own = [row for row in report.rows if row.unit == unit]
    before = sum(row.before for row in own)
    return f"{sum(row.after for row in own) / before:.0%}" if before else ""


if __name__ == "__main__":
    main()
