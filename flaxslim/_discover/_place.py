"""Where in the user's code an operation stands."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax

# Whose frames are not the user's model.
_LIBRARIES = tuple(str(Path(module.__file__ or "").parent) + os.sep for module in (jax, flax))
_OWN = str(Path(__file__).parent) + os.sep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """An operation: its primitive, and the equation whose traceback leads to the user's line."""

    primitive: str
    source: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """`sort at model.py:17 (route)`."""
        for path, line, function in self._frames():
            if not path.startswith((*_LIBRARIES, _OWN)) and not path.startswith("<frozen"):
                return f"{self.primitive} at {_short(path)}:{line} ({function})"
        return self.primitive

    def _frames(self) -> Iterator[tuple[str, int, str]]:
        traceback = getattr(self.source, "traceback", None)
        for frame in getattr(traceback, "frames", ()):
            yield frame.file_name, frame.line_num, frame.function_name


def is_library(jaxpr: Any) -> bool:
    """Whether a jitted function is one of JAX's own, whose trace may be that of another caller."""
    info = getattr(jaxpr, "debug_info", None)
    return _LIBRARIES[0] in (getattr(info, "func_src_info", None) or "")


def _short(path: str) -> str:
    """The file with the folder it is in, which is enough to find it."""
    return os.sep.join(Path(path).parts[-2:])
