"""What a person with PyTorch sees of folders with widths for each layer: nothing of JAX is needed.

    python tests/torch_claims.py EXAMPLES '{"card": ..., "example": [...], ...}'

One process for all of it, since most of what it takes is to import PyTorch and transformers.
"""

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def seen(example: ModuleType, work: Mapping[str, Any]) -> dict[str, Any]:
    """The error of each attempt to load a folder, or "loaded"; what the example prints.

    Keys of `work`: "card", the code of a model card and its folder; "example", folders that the
    script is run on; "plain", folders for `from_pretrained`; "per_layer", for `load_per_layer`.
    """
    code, folder = work["card"]
    names: dict[str, Any] = {}
    exec(code, names)  # before the example has changed anything
    card = example.difference(names["model"], *example.expected(Path(folder)))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = example.main(work["example"])
    return {
        "card": card,
        "example": [status, out.getvalue()],
        "per_layer": _attempts(example, work["per_layer"], example.load_per_layer),
        "plain": _attempts(example, work["plain"], lambda cls, folder: cls.from_pretrained(folder)),
    }


def _attempts(example: ModuleType, folders: Sequence[str], load: Any) -> dict[str, str]:
    return {folder: _attempt(example, folder, load) for folder in folders}


def _attempt(example: ModuleType, folder: str, load: Any) -> str:
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    try:
        load(getattr(example.transformers, config["architectures"][0]), folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import per_layer_in_torch  # pyright: ignore[reportMissingImports]

    print(json.dumps(seen(per_layer_in_torch, json.loads(sys.argv[2]))))
