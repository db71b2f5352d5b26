"""What `flaxslim prune` and `flaxslim sweep` share: a model, calibration data, and one pruning."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import flaxslim
from flaxslim._inputs import model_class_for
from flaxslim._kinds import MOST_SEED
from flaxslim.checkpoint import Checkpoint, read
from flaxslim.checkpoint._names import unused
from flaxslim.checkpoint._write import refuse_loss
from flaxslim.cli._console import in_flags, messages
from flaxslim.cli._slim import as_flax
from flaxslim.errors import CalibrationError, CalibrationWarning
from flaxslim.posttraining._data import CalibrationData, read_calibration
from flaxslim.posttraining._method import Method
from flaxslim.posttraining._report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The flags that say what to calibrate on."""

    calibration: Path
    samples: int
    length: int
    batch_size: int
    fields: tuple[str, ...]
    packed: str
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MOST_SEED:
            raise CalibrationError(
                "a seed is no negative number, and none of more than 63 bits",
                seen=f"--seed {self.seed}",
                expected=f"from 0 to {MOST_SEED}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """The flags that say how to prune."""

    preset: str | Method
    width: str
    heads: bool
    multiple_of: int
    heads_multiple_of: int
    low_memory: bool
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is pruned: Flax parameters, the class that runs them, and the calibration data."""

    checkpoint: Checkpoint
    source: Checkpoint  # the same in the names that it was read in
    cls: Any
    data: CalibrationData

    @property
    def dense(self) -> tuple[Any, Any]:
        return self.checkpoint.params, self.checkpoint.config


def opened(source: str, data: Data, revision: str | None) -> Model:
    """Read the checkpoint and the calibration data of a command."""
    with messages.status(f"reading {source}"):
        before = stored = read(source, revision=revision)
        if before.naming == "torch":
            refuse_loss(unused(before.params, before.config), "flax")
            before = as_flax(before)
        cls = model_class_for(before.config, before.params)
    for note in before.notes:
        messages.print(f"note: {note}", markup=False, soft_wrap=True)
    with messages.status(f"reading {data.calibration}"), _notes():
        found = read_calibration(
            data.calibration,
            folder=before.folder,
            cfg=before.config,
            samples=data.samples,
            length=data.length,
            batch_size=data.batch_size,
            fields=data.fields,
            packed={"auto": None, "yes": True, "no": False}[data.packed],
            seed=data.seed,
        )
    tokens = "" if found.tokens is None else f", {found.tokens:,} tokens"
    text = f"calibration: {found.samples:,} samples{tokens} of {found.source}"
    messages.print(text, markup=False, soft_wrap=True)
    return Model(checkpoint=before, source=stored, cls=cls, data=found)


def pruned(
    model: Model, how: How, statistics: Path | None = None, **wish: Any
) -> tuple[Any, Any, Report]:
    """The smaller parameters, their config, and what was done."""
    reports: list[Report] = []
    with _progress() as told, _notes():
        params, cfg = flaxslim.prune(
            *model.dense,
            "all" if how.heads else "ffn",
            model=model.cls,
            batches=model.data.batches,
            preset=how.preset,
            width=how.width,
            multiple_of={"f": how.multiple_of, "h": how.heads_multiple_of},
            low_memory=how.low_memory,
            statistics=statistics,
            seed=how.seed,
            progress=told,
            report=reports.append,
            **wish,
        )
    return params, cfg, reports[0]


# --- what is seen while it runs -----------------------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage, with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=messages) as progress:
        bars: dict[str, Any] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield told


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Warnings of the library as notes, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = dict.fromkeys(
        str(w.message)
        for w in caught
        if issubclass(w.category, CalibrationWarning)
        or w.category.__module__.startswith("flaxslim")
    )
    for text in said:
        messages.print(f"note: {in_flags(text)}", markup=False, soft_wrap=True)
