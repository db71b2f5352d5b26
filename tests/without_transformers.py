"""Where transformers is not installed: tests of what stands for its classes and files skip.

All others must pass. A core that asked for transformers unasked would fail, and not skip.
"""

import pathlib
import re
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
_REASON = "Skipped: transformers is not installed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Any:
    report = yield
    text = str(report.longrepr)
    frames = re.findall(r"^(\S+\.py):\d+: in ", text, re.MULTILINE)
    if report.failed and _MISSING.search(text) and may_ask(collector.config.rootpath / frames[-1]):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, _REASON)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    error = call.excinfo
    if error is None or not _MISSING.search(str(report.longrepr)):
        return report
    if may_ask(pathlib.Path(error.traceback[-1].path)):  # of an example: doctest itself
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 1, _REASON)
    return report


def may_ask(file: pathlib.Path) -> bool:
    """Whether a file may import transformers: any outside of the library, and some rooms of it."""
    return not file.is_relative_to(LIBRARY) or any(
        file.is_relative_to(LIBRARY / room) for room in ROOMS
    )
