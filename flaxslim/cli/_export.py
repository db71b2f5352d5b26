"""`flaxslim export`: a checkpoint -> a file that runs without transformers and Flax."""

from pathlib import Path
from typing import Any

from rich.filesize import decimal

from flaxslim._export import SYMBOLIC, Sizes, export, own_parameters
from flaxslim._inputs import model_class_for
from flaxslim._tree import flatten
from flaxslim.checkpoint import load, read
from flaxslim.checkpoint._names import some
from flaxslim.cli._console import console, messages
from flaxslim.errors import ExportError, nearest

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def run(
    source: str,
    out: Path,
    *,
    batch: str,
    length: str,
    platforms: str,
    model: str | None,
    verify: bool,
    overwrite: bool,
    revision: str | None,
) -> int:
    """Do it; returns the exit code."""
    sizes = sizes_of("--batch", batch), sizes_of("--length", length)
    wanted = platforms_of(platforms)
    with messages.status(f"reading {source}"):
        params, cfg = load(read(source, revision=revision))
        cls = model_class_for(cfg, params) if model is None else class_named(model)
    if left := sorted(flatten(params).keys() - flatten(own_parameters(params, cfg, cls)).keys()):
        messages.print(
            f"note: {len(left)} tensors ({some(left)}) have no place in {cls.__name__}, and are "
            "left out",
            markup=False,
            soft_wrap=True,
        )
    with messages.status(f"tracing {cls.__name__}"):
        made = export(
            out,
            params,
            cfg,
            cls,
            batch=sizes[0],
            length=sizes[1],
            platforms=wanted,
            verify=verify,
            overwrite=overwrite,
        )
    for program in made:
        console.print(program.name, markup=False)
    messages.print(f"written to {out} ({decimal(out.stat().st_size)})", markup=False)
    return 0


def sizes_of(flag: str, text: str) -> Sizes:
    """Sizes as the command line says them.

    >>> sizes_of("--batch", "1,8"), sizes_of("--batch", "symbolic")
    ((1, 8), 'symbolic')
    """
    if text == SYMBOLIC:
        return SYMBOLIC
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ExportError(
            f"{flag} takes {SYMBOLIC}, or numbers with commas between", seen=repr(text)
        ) from None


def platforms_of(text: str) -> tuple[str, ...]:
    """Platforms as the command line says them; `ExportError` for one that JAX has no name for."""
    found = tuple(text.split(","))
    for name in found:
        if name not in _PLATFORMS:
            raise ExportError(
                "JAX has no such platform",
                seen=repr(name),
                expected=", ".join(_PLATFORMS),
                near=nearest(name, _PLATFORMS),
            )
    return found


def class_named(name: str) -> Any:
    """A Flax class of transformers by its name."""
    import transformers

    found = getattr(transformers, name, None) if name.startswith("Flax") else None
    if found is None:
        raise ExportError(
            "transformers has no such Flax class",
            seen=repr(name),
            near=nearest(name, [n for n in dir(transformers) if n.startswith("Flax")]),
        )
    return found
