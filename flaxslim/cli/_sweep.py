"""`flaxslim sweep`: prune at several shares by several presets."""

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flaxslim
from flaxslim.checkpoint._atomic import check_file, fresh_file
from flaxslim.cli import _evaluate, _table
from flaxslim.cli._calibrated import Data, How, opened, pruned
from flaxslim.cli._console import console, messages
from flaxslim.cli._report import sizes
from flaxslim.errors import BudgetError, CalibrationError, TargetError
from flaxslim.plots import _style
from flaxslim.posttraining._prune import method_of

_COLUMNS = ("preset", "keep", "parameters", "error")


def run(
    source: str,
    data: Data,
    how: How,
    *,
    keep: str,
    presets: str,
    evaluate: str | None,
    evaluation: Path | None,
    csv_file: Path | None,
    plot: Path | None,
    revision: str | None,
) -> int:
    """Prune at several shares by several presets, and print what each costs and gives."""
    measure = _evaluate.metric(evaluate, evaluation)
    if plot is not None:
        _style.check(plot)
    if csv_file is not None:
        if not csv_file.resolve().parent.is_dir():
            raise TargetError("there is no such folder", path=str(csv_file.resolve().parent))
        check_file(csv_file, overwrite=True, ours=_is_table, what="a table of a sweep")
    shares, names = _shares(keep), [name.strip() for name in presets.split(",")]
    methods = [method_of(name) for name in names]  # which says what there is
    # One column is of one measure: where any of them is tuned, none may learn what is held out.
    apart = any(method.holds_out for method in methods)
    methods = [dataclasses.replace(method, hold_out=apart) for method in methods]
    model = opened(source, data, revision)
    folder = model.checkpoint.folder
    dense = dict(measure(model.cls, *model.dense, folder)) if measure else {}
    if taken := [name for name in _COLUMNS if name in dense]:
        raise CalibrationError(
            "the metric has the name of another column",
            path=evaluate,
            seen=", ".join(taken),
            mend="call it otherwise",
        )
    rows = [_row("dense", 1.0, model.dense[0], 0.0, dense)]
    measures: dict[str, None] = {}
    for preset, method in zip(names, methods, strict=True):
        for share in shares:
            params, cfg, report = pruned(model, dataclasses.replace(how, preset=method), keep=share)
            measures[report.measure] = None
            found = dict(measure(model.cls, params, cfg, folder)) if measure else {}
            rows.append(_row(preset, share, params, report.output_error, found))
    console.print(_table.swept(rows))
    console.print(f"error: {' or '.join(measures)}", markup=False, soft_wrap=True)
    if csv_file is not None:
        with fresh_file(csv_file) as new, new.open("w", newline="", encoding="utf-8") as file:
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, fieldnames=list(names))
            writer.writeheader()
            writer.writerows(rows)
        messages.print(f"written to {csv_file}", markup=False)
    if plot is not None:
        _style.write(flaxslim.plot_sweep(rows, title=Path(source).name or source), plot)
        messages.print(f"written to {plot}", markup=False)
    return 0


def _row(
    preset: str, keep: float, params: Any, error: float | None, scores: Mapping[str, float]
) -> dict[str, Any]:
    own = (preset, keep, sizes(params)[0], error)
    return {**dict(zip(_COLUMNS, own, strict=True)), **scores}


def _is_table(path: Path) -> bool:
    """Whether a file is what `--csv` wrote."""
    with path.open("rb") as file:
        return file.readline().startswith(",".join(_COLUMNS).encode())


def _shares(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise BudgetError(
            "--keep is a list of shares",
            seen=text,
            expected="numbers above 0, up to 1",
            mend="--keep 0.9,0.7,0.5",
        )
    return found
