"""How long a model takes, by width: measured on this device, where noise is the rule.

The whole model is timed, with all places of one group (all FFNs, say) at one width and all others
dense. Dense and narrow take turns, and only the ratio of two neighbours in time is believed: what
slows a shared machine slows both. What one place saves is taken to be its share of what its group
saves, and savings to add up.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxslim.errors import BudgetError, nearest

Thunk = Callable[[], Any]

_WARM_UP = 3

_log = logging.getLogger("flaxslim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Milliseconds of the whole model, `(w,)`, by the width of one group, `(w,)`, both rising.

    The last width is the dense one.
    """

    widths: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self):
        each = len(self.widths) == len(self.ms) > 0 and all(map(math.isfinite, self.ms))
        if not each or any(np.diff(self.widths) <= 0) or any(np.diff(self.ms) < 0):
            raise ValueError(f"not a time for each width, both rising: {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """What was measured.

    Attributes:
      device, dtype, shapes: on what, in what, and of a batch of which shapes.
      base: milliseconds of the dense model.
      curves: by group.
    """

    device: str
    dtype: str
    shapes: str
    base: float
    curves: Mapping[str, Curve]

    def predict(self, widths: Mapping[str, Sequence[int]]) -> float:
        """Milliseconds with these widths of all sites of each group; groups left out are dense.

        Between the widths that were measured lines are drawn; below the narrowest its time holds.
        Raises `BudgetError` for a group that was not measured.

        >>> curve = Curve(widths=(0, 100), ms=(4.0, 10.0))
        >>> table = Table(device="cpu", dtype="float32", shapes="", base=10.0, curves={"f": curve})
        >>> table.predict({"f": [50, 100]})
        8.5
        """
        costs = [self.costs(group, own, len(own)) for group, own in widths.items() if len(own)]
        return self.base + math.fsum(float(cost) for own in costs for cost in own)

    def costs(self, group: str, widths: Sequence[int] | np.ndarray, sites: int) -> np.ndarray:
        """`(w,)`: milliseconds that one of so many sites of a group adds, at each of the widths.

        Zero at the dense width and negative below, so that `base` and the costs of all sites add
        up to `predict`; sites left out are dense. Raises as `predict` does.

        >>> curve = Curve(widths=(0, 100), ms=(4.0, 10.0))
        >>> table = Table(device="cpu", dtype="float32", shapes="", base=10.0, curves={"f": curve})
        >>> table.costs("f", [0, 50, 100], sites=2)
        array([-3. , -1.5,  0. ])
        """
        if group not in self.curves:
            raise BudgetError(
                "no times were measured for this group",
                seen=repr(group),
                expected=f"one of {', '.join(self.curves) or 'none'}",
                near=nearest(group, self.curves),
                mend="measure with a grid for it",
            )
        curve = self.curves[group]
        return np.asarray(np.interp(widths, curve.widths, curve.ms) - self.base) / sites

    def to_json(self) -> str:
        """As text, from which `from_json` makes the same table to the last bit."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """The inverse of `to_json`. Raises `ValueError` if it is something else.

        >>> curve = Curve(widths=(0, 100), ms=(0.1, 0.3))
        >>> table = Table(device="cpu", dtype="float32", shapes="", base=0.3, curves={"f": curve})
        >>> Table.from_json(table.to_json()) == table
        True
        """
        try:
            data = json.loads(text)
            curves = {
                group: Curve(widths=tuple(map(int, c["widths"])), ms=tuple(map(float, c["ms"])))
                for group, c in data["curves"].items()
            }
            words = {name: str(data[name]) for name in ("device", "dtype", "shapes")}
            table = cls(**words, base=float(data["base"]), curves=curves)
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a table of times: {error!r}") from error
        if not (math.isfinite(table.base) and table.base > 0):
            raise ValueError(f"not a time: {table.base}")
        return table


def measure(
    run: Callable[[Mapping[str, int]], Thunk],
    dense: Mapping[str, int],
    grid: Mapping[str, Sequence[int]],
    *,
    dtype: str = "",
    shapes: str = "",
    device: str | None = None,
    repeats: int = 15,
    cache: Path | None = None,
    key: str = "",
    told: Callable[[int, int], Any] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Table:
    """The milliseconds of a model by the width of each group of its sites.

    Args:
      run: widths of all groups -> a call that runs the model once, with all sites of each group at
        these widths, and blocks until it is done. It compiles in its first calls.
      dense: the dense width of each group, such as `{"f": 1536, "h": 12}`.
      grid: the widths to be measured, by group; the dense one is known, and may be left out.
      dtype, shapes: what it computes in, and the shapes of its batch, to be recorded.
      device: its name; by default that of JAX's first.
      repeats: in how many rounds dense and narrow take turns.
      cache: a folder (`default_cache()`) in which the table is looked up and kept; None for none.
      key: whatever else the times depend on, such as the config: a table is only looked up by it.
      told: is called with how many widths are done, and of how many.
      clock: seconds.

    Times never fall as widths rise: where they were seen to, they are pooled.

    Raises `BudgetError` if the grid names a group or a width that the dense model lacks, or if the
    clock stands still.

    >>> now = 0.0
    >>> def run(widths):
    ...     def once():
    ...         global now
    ...         now += 1e-3 + 1e-6 * widths["f"]
    ...     return once
    >>> table = measure(run, {"f": 1000}, {"f": [0, 500]}, device="toy", clock=lambda: now)
    >>> round(table.base, 6), round(table.predict({"f": [500, 1000]}), 6)
    (2.0, 1.75)
    """
    dense = {group: int(width) for group, width in dense.items()}
    wanted = _checked(dense, grid, repeats)
    facts = {
        "device": device if device is not None else this_device(),
        "dtype": dtype,
        "shapes": shapes,
    }
    versions = [jax.__version__, metadata.version("jaxlib")]
    asked = {**facts, "key": key, "dense": dense, "grid": wanted, "jax": versions}
    path = None if cache is None else cache / _file_name(asked)
    if path is not None and (found := _stored(path, asked)) is not None:
        return found
    base, ratios = _times(run, dense, wanted, repeats, told, clock)
    curves = {
        group: Curve(
            widths=(*widths, dense[group]),
            # Of the best rising fit below a ceiling, what is above the ceiling is at it.
            ms=(*(base * min(r, 1.0) for r in rising(ratios[group])), base),
        )
        for group, widths in wanted.items()
    }
    table = Table(**facts, base=base, curves=curves)
    if path is not None:
        _store(path, asked, table)
    return table


def _checked(
    dense: Mapping[str, int], grid: Mapping[str, Sequence[int]], repeats: int
) -> dict[str, list[int]]:
    """The widths below the dense one, ascending, by group."""
    if repeats < 1:
        raise BudgetError(
            "nothing is measured in no round",
            seen=f"repeats={repeats}",
            expected="at least 1; on a shared machine some 15",
        )
    for group, widths in grid.items():
        if group not in dense:
            raise BudgetError(
                "the grid has a group that the dense widths lack",
                seen=repr(group),
                expected=f"one of {', '.join(dense)}",
                near=nearest(group, dense),
            )
        if wrong := [w for w in widths if not 0 <= w <= dense[group]]:
            raise BudgetError(
                "the grid has widths that cannot be cut from the dense one",
                path=group,
                seen=", ".join(map(str, wrong)),
                expected=f"from 0 to {dense[group]}",
            )
    return {g: sorted({int(w) for w in ws if w != dense[g]}) for g, ws in grid.items()}


def _times(
    run: Callable[[Mapping[str, int]], Thunk],
    dense: Mapping[str, int],
    grid: Mapping[str, Sequence[int]],
    repeats: int,
    told: Callable[[int, int], Any],
    clock: Callable[[], float],
) -> tuple[float, dict[str, list[float]]]:
    """Milliseconds of the dense model, and of each narrow one the share of it that it takes."""
    whole = run({**dense})
    base: list[float] = []
    ratios: dict[str, list[float]] = {}
    total, done = sum(map(len, grid.values())), 0
    for group, widths in grid.items():
        ratios[group] = []
        for width in widths:
            rounds = list(_rounds(whole, run({**dense, group: width}), repeats, clock))
            base += [before for before, _ in rounds]
            ratios[group].append(statistics.median(after / before for before, after in rounds))
            done += 1
            told(done, total)
    if not base:
        base = [before for before, _ in _rounds(whole, whole, repeats, clock)]
    return 1e3 * statistics.median(base), ratios


def _rounds(
    whole: Thunk, narrow: Thunk, repeats: int, clock: Callable[[], float]
) -> Iterator[tuple[float, float]]:
    """Seconds of the dense model and of a narrow one, measured right after each other."""

    def seconds(call: Thunk) -> float:
        start = clock()
        call()
        return clock() - start

    for _ in range(_WARM_UP):
        whole()
        narrow()
    for turn in range(repeats):
        # Each goes first every other time: a machine that gets busier favours whichever does.
        if turn % 2:
            after, before = seconds(narrow), seconds(whole)
        else:
            before, after = seconds(whole), seconds(narrow)
        if before <= 0:
            raise BudgetError(
                "the clock stands still while the dense model runs",
                seen=f"{before} s",
                mend="measure with a larger batch",
            )
        yield before, after


def rising(values: Sequence[float]) -> list[float]:
    """The rising sequence that is nearest in least squares, by pooling adjacent violators.

    >>> rising([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []  # the sum and number of what shares a value
    for value in values:
        total, count = float(value), 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def this_device() -> str:
    """What JAX's first device is called; of a CPU also which one, and how many cores it has."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    # All CPUs are "cpu" to JAX, and a home folder may be shared by several.
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{kind} ({name}, {os.cpu_count()} cores)"


# --- kept on disk -----------------------------------------------------------------------------


def default_cache() -> Path:
    """The folder of tables: `flaxslim/latency` in `XDG_CACHE_HOME`, or else in `~/.cache`."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = named if named.is_absolute() else Path.home() / ".cache"
    return home / "flaxslim" / "latency"


def _file_name(asked: Mapping[str, Any]) -> str:
    text = json.dumps(asked, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _stored(path: Path, asked: Mapping[str, Any]) -> Table | None:
    """The table that was kept; None if there is none, or the file is no good."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Table.from_json(json.dumps(data["table"])) if data["asked"] == asked else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _store(path: Path, asked: Mapping[str, Any], table: Table) -> None:
    """Whole or not at all: another process may read it meanwhile."""
    text = json.dumps({"asked": asked, "table": json.loads(table.to_json())}, indent=1)
    new = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.stem}.", delete=False
        ) as file:
            new = Path(file.name)
            file.write(text)
        new.replace(path)
    except OSError as error:
        # What took minutes to measure is not thrown away because a disk is full or read-only.
        _log.warning("the times measured are not kept in %s: %s", path, error)
    finally:
        if new is not None:
            new.unlink(missing_ok=True)
