"""What a run measures while it trains: JSON lines, and TensorBoard where it is installed."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One logged step.

    Attributes:
      step: how many steps were taken, the dense ones included.
      loss: the mean since the row before.
      sparsity: the share of the original channels that is dead or gone.
      width_min, width_max: living channels of the smallest and of the largest site; of FFNs, if
        there are any, else of attention.
      ms_per_step: the mean since the row before, compiling left aside.
    """

    step: int
    loss: float
    sparsity: float
    width_min: int
    width_max: int
    ms_per_step: float
    learning_rate: float


class Writer:
    """Appends rows to the files of a folder; each row is on disk when `add` is back."""

    def __init__(self, lines: Any, board: Any = None):
        self._lines, self._board = lines, board
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._lines.write(json.dumps(dataclasses.asdict(row)) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in dataclasses.asdict(row).items():
                if name != "step":
                    self._board.add_scalar(name, value, row.step)


@contextlib.contextmanager
def writer(folder: Path, *, tensorboard: bool = True) -> Iterator[Writer]:
    """A writer for a run; TensorBoard's files too, if tensorboardX is installed and they are asked
    for."""
    board = _board(folder / TENSORBOARD) if tensorboard else None
    try:
        with (folder / FILE).open("w", encoding="utf-8") as lines:
            yield Writer(lines, board)
    finally:
        if board is not None:
            board.close()


def _board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def read(folder: Path) -> list[Row]:
    """The rows that a run has written so far.

    A last line that was cut off, as when a machine goes down, is left out.
    """
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(**json.loads(line)))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


def plain(value: Any) -> Any:
    """Numbers as JSON takes them: what is not finite as a text."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
