"""The book of mistakes that is kept while a recipe is read and checked."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import flaxslim
from flaxslim.cli._recipe_lines import Key
from flaxslim.errors import RecipeError

PACKAGED = Path(flaxslim.__file__).parent / "configs"  # in a wheel; a working copy has none


@dataclasses.dataclass(kw_only=True)
class Book:
    """Where the keys of a recipe stand, and the mistakes so far.

    Attributes:
      lines: of the keys in the file.
      said: for keys that the command line sets, how.
      missing: what the recipe names and is not there; a mistake or not, as the reader likes.
    """

    path: Path
    lines: dict[Key, int]
    said: dict[Key, str] = dataclasses.field(default_factory=dict)
    mistakes: list[RecipeError] = dataclasses.field(default_factory=list)
    missing: list[RecipeError] = dataclasses.field(default_factory=list)

    def where(self, key: Key) -> str:
        """The line of a key, or of the nearest table around it."""
        for end in range(len(key), 0, -1):
            inside = (text for said, text in self.said.items() if said[:end] == key[:end])
            if text := next(inside, None):
                return text
            if key[:end] in self.lines:
                return f"{self.path}:{self.lines[key[:end]]}"
        return str(self.path)

    def mistake(self, key: Key, problem: str, **details: Any) -> RecipeError:
        """A mistake at a key, not yet noted."""
        return RecipeError(problem, path=self.where(key), **details)

    def note(self, key: Key, problem: str, **details: Any) -> None:
        """Note a mistake."""
        self.mistakes.append(self.mistake(key, problem, **details))

    def placed(self, key: Key, value: str) -> Path:
        """The path that a key says: relative to the recipe, or to where the command runs.

        A recipe in an installed package is read as if `configs/` lay where the command runs, or its
        output would go into the package.
        """
        on_the_command_line = any(key[:end] in self.said for end in range(1, len(key) + 1))
        base = Path() if on_the_command_line else self.path.parent
        if base == PACKAGED:
            base = Path("configs")
        path = base / Path(value).expanduser()
        return Path(os.path.normpath(path))
