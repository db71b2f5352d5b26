"""Statistics on disk, so that who was stopped need not read the same data again.

A pass over the calibration data is known by a digest of all that decides what it finds: the model,
the function, the data, the sites. What does not belong to a run is never taken.
"""

import contextlib
import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flaxslim.errors import CalibrationWarning

# Sums over samples by site; of the batches that choices are made by, and of those held out (True).
Sums = dict[bool, dict[str, list[np.ndarray]]]

_ADDRESS = re.compile(r"0x[0-9a-f]+")  # of a function in a program's text: other in each process


class Kept:
    """A folder of statistics. Each file holds one pass, as far as it came.

    A disk that takes no more costs the resuming, not the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, key: str) -> tuple[int, Sums]:
        """How many batches the sums of a pass are of, and the sums; nothing if there are none."""
        sums: Sums = {}
        try:
            with safe_open(self._file(key), framework="numpy") as file:
                for name in sorted(file.keys()):
                    held, _, path = name.split(":", 2)
                    own = sums.setdefault(held == "held", {})
                    own.setdefault(path, []).append(file.get_tensor(name))
                return int(file.metadata()["batches"]), sums
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # no such file, or none
            return 0, {}

    def save(self, key: str, done: int, sums: Sums) -> None:
        """The sums of a pass after so many batches; the file appears whole or not at all."""
        tensors = {
            f"{'held' if held else 'fit'}:{number:02}:{path}": part
            for held, own in sums.items()
            for path, parts in own.items()
            for number, part in enumerate(parts)
        }
        new = self._file(key).with_suffix(".new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, new, metadata={"batches": str(done)})
            new.replace(self._file(key))
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                new.unlink()
            warnings.warn(
                f"the statistics could not be kept in {self.folder}, so a run that is stopped "
                f"begins anew: {error}",
                CalibrationWarning,
                stacklevel=2,
            )

    def clear(self) -> None:
        """Remove the statistics, and the folder if nothing else lies in it."""
        if not self.folder.is_dir():
            return
        for file in self.folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{32}\.(safetensors|new)", file.name):
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"


def digest(*parts: Any) -> str:
    """Of pytrees: texts by what they say, arrays by their bytes, and where they stand.

    >>> digest({"a": np.ones(2)}) == digest({"a": np.ones(2)}) != digest({"a": np.zeros(2)})
    True
    """
    found = hashlib.sha256()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(parts):
        found.update(jax.tree_util.keystr(keys).encode())
        if isinstance(leaf, str):
            found.update(_ADDRESS.sub("", leaf).encode())
        else:
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            array = np.ascontiguousarray(leaf)
            found.update(f"{array.shape} {array.dtype}".encode())
            found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()
