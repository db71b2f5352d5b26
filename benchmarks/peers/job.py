"""What each contender does with the same checkpoint, in an environment of its own.

It is run as `python SCRIPT CLASS FOLDER` and prints one line of JSON. Nothing here knows any of the
contenders: only the standard library and numpy, which all of them have. Memory is read as Linux and
the GNU C library have it.
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

REPEATS = 5
IDS = np.random.default_rng(0).integers(1000, 30000, (2, 128))
"""Token ids `(b, t)` on which outputs are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How a model gets to disk, and back from there."""

    write: Callable[[Any, Path], object]
    read: Callable[[Path], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """`load` gives the model of a folder; `slim` returns when the work is done."""

    load: Callable[[Path], Any]
    slim: Callable[[Any], Any]
    parameters: Callable[[Any], int]
    outputs: Callable[[Any], np.ndarray]
    ways: Mapping[str, Way]


def main(job: Callable[[str], Job], *packages: str) -> None:
    """Do the job for the class and the folder of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cls")
    parser.add_argument("folder", type=Path)
    ask = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({**done(job(ask.cls), ask.folder), "versions": versions}))


def done(job: Job, folder: Path) -> dict[str, Any]:
    """Seconds (and those of all cores), bytes, numbers of parameters, differences of outputs."""
    model = job.load(folder)
    before, loading = job.parameters(model), resident("VmHWM")
    resident_before = reset_peak()
    small, first = timed(job.slim, model)
    peak = resident("VmHWM")
    del model
    # The least of them: what else runs on the machine only adds.
    again = [timed(job.slim, job.load(folder))[1] for _ in range(REPEATS)]
    dense = job.outputs(job.load(folder))

    def difference(model: Any) -> float:
        return float(np.abs(job.outputs(model) - dense).max())

    def reloaded(way: Way) -> float | str:
        with tempfile.TemporaryDirectory() as place:
            try:
                way.write(small, Path(place) / "out")
                return difference(way.read(Path(place) / "out"))
            except Exception as error:  # whatever stops them is the result
                return f"{type(error).__name__}: {error}"

    return {
        "first": first,
        "again": min(again),
        "peak": max(loading, peak),
        "extra": peak - resident_before,
        "before": before,
        "after": job.parameters(small),
        "output": float(np.abs(dense).max()),
        "difference": difference(small),
        "reloaded": {name: reloaded(way) for name, way in job.ways.items()},
    }


def timed(function: Callable[[Any], Any], model: Any) -> tuple[Any, tuple[float, float]]:
    began, busy = time.perf_counter(), time.process_time()
    result = function(model)
    return result, (time.perf_counter() - began, time.process_time() - busy)


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"{field}:\s*(\d+) kB", status)
    return int(kilobytes) * 1024


def reset_peak() -> int:
    """Forget the largest resident memory; returns that of now, without what loading freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("VmRSS")
