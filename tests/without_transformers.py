"""Where transformers is not installed: tests of what stands for its classes and files skip.

All others must pass. A core that asked for transformers unasked would fail, and not skip.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import pytest

# What builds its classes, and reads its folders, tokenizers and recipes.
ROOMS = (
    "_compat.py",
    "_inputs.py",
    "checkpoint",
    "cli",
    "posttraining/_images.py",
    "posttraining/_tokens.py",
)
LIBRARY = pathlib.Path(__file__).parents[1] / "flaxslim"
_MISSING = re.compile(r"No module named '?transformers")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Any:
    report = yield
    frames = re.findall(r"^(\S+\.py):\d+: in ", str(report.longrepr), re.MULTILINE)
    return _judged(report, collector, [collector.config.rootpath / frame for frame in frames])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    traceback = call.excinfo.traceback if call.excinfo else ()
    # Of an example in a docstring the last frame is one of doctest's own.
    return _judged(report, item, [pathlib.Path(frame.path) for frame in traceback])


def _judged(report: Any, node: Any, frames: Sequence[pathlib.Path]) -> Any:
    if report.failed and frames and _MISSING.search(str(report.longrepr)) and may_ask(frames[-1]):
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 1, "Skipped: transformers is not installed")
    return report


def may_ask(file: pathlib.Path) -> bool:
    """Whether a file may import transformers: any outside of the library, and some rooms of it."""
    return not file.is_relative_to(LIBRARY) or any(
        file.is_relative_to(LIBRARY / room) for room in ROOMS
    )
