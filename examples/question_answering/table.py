"""Several runs of a question answering recipe, side by side.

    python examples/question_answering/table.py FOLDER...

The first is what the others are compared with. Exact match, F1 and latency are those of the saved
model, loaded again; latency and the time of a training step are medians of one run each, taken in
turns with the dense model of that run, whose ratio is what to compare.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table


def main(folders: list[str]) -> None:
    reports = {Path(f).name: json.loads((Path(f) / "report.json").read_text()) for f in folders}
    (dense, *_) = reports.values()
    table = Table()
    table.add_column("model")
    for column in ("exact", "F1", "of dense", "parameters", "size", "latency", "faster", "step"):
        table.add_column(column, justify="right")
    for name, report in reports.items():
        scores, first = saved(report), saved(dense)
        ms, step = report["latency"], report["step_milliseconds"]
        table.add_row(
            name,
            f"{scores['exact']:.2f}",
            f"{scores['f1']:.2f}",
            f"{scores['f1'] / first['f1']:.1%}",
            f"{report['parameters']['after']:,}",
            decimal(report["bytes"]["after"], precision=1),
            f"{ms['after']:.1f} ms",
            f"{ms['before'] / ms['after']:.2f}x",
            f"{step['before'] / step['after']:.2f}x",
        )
    Console().print(table)


def saved(report: dict) -> dict:
    """The scores of the model that was saved and loaded again."""
    return next(s for name, s in report["scores"].items() if name.endswith("reloaded"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
