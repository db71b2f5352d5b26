"""Which weight files of a folder that is being written are finished."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flaxslim.checkpoint._leaf import Piece
from flaxslim.checkpoint._pour import checksum

_NAME = ".written.json"


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The checksums of finished files, kept in the folder until all of it is.

    What does not stand in it is written again, also if a journal is broken or of something else.
    """

    folder: Path
    what: str | None
    found: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, what: str | None) -> "Journal":
        """That of a run which was killed, if it wrote the same; else an empty one.

        A run that cannot be gone on with (`what` is None) keeps none.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            kept = json.loads((folder / _NAME).read_text(encoding="utf-8"))
            if what is not None and kept["what"] == what:
                return cls(folder=folder, what=what, found=dict(kept["found"]))
        return cls(folder=folder, what=what)

    def has(self, name: str, pieces: Sequence[Piece]) -> bool:
        """Whether a file is there as it was finished."""
        known = self.found.get(name)
        # Of a file that is not there the checksum is None, and so may be what a journal says.
        return isinstance(known, str) and checksum(self.folder / name, pieces) == known

    def add(self, name: str, sum: str) -> None:
        self.found[name] = sum
        if self.what is not None:
            text = json.dumps({"what": self.what, "found": self.found})
            new = self.folder / f"{_NAME}.new"
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.folder / _NAME)

    def end(self) -> None:
        for name in (_NAME, f"{_NAME}.new"):
            (self.folder / name).unlink(missing_ok=True)
