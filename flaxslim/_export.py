"""A model as compiled-ahead programs (StableHLO) and its parameters, in one file.

What runs the file needs JAX and safetensors: no transformers, no Flax, nothing of flaxslim. It is a
safetensors file. Each parameter is a tensor in it, by its path, and each program one of bytes, by
its sizes ("batch=1,length=128"), as `jax.export.Exported.serialize` gives them. The parameters are
arguments of the programs: as constants they would stand in each program again, be folded by the
compiler at length, and could neither be mapped from disk nor be sharded. The metadata name the
programs, inputs and outputs.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from flaxslim._compare import compare, reference
from flaxslim._compat import parameter_shapes, stock_config
from flaxslim._inputs import inputs_for, model_class_for, positions
from flaxslim._model import is_hugging_face, outputs, resolve
from flaxslim._tree import flatten
from flaxslim.errors import ExportError, FlaxslimError, InputsError, ProofError

SYMBOLIC = "symbolic"
Sizes = int | Sequence[int] | Literal["symbolic"]
PLATFORMS = ("cpu", "cuda", "tpu")
_BACKENDS = {"cuda": "gpu", "rocm": "gpu"}  # as jax.default_backend() calls them
_TOLERANCE = 1e-5  # of the same computation in the same precision
_FORMAT = "jax.export"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One program: `exported.call(params, inputs) -> outputs`, all of them flat dicts of arrays.

    `batch` and `length` are numbers, or "symbolic" for whatever the caller gives; a length of None
    is that of a model that takes no sequence.
    """

    batch: int | str
    length: int | str | None
    exported: Any

    @property
    def name(self) -> str:
        """What it is called in the file."""
        length = "" if self.length is None else f",length={self.length}"
        return f"batch={self.batch}{length}"


def export(
    target: str | os.PathLike,
    params: Any,
    cfg: Any,
    model: type | None = None,
    *,
    batch: Sizes = SYMBOLIC,
    length: Sizes = SYMBOLIC,
    platforms: Sequence[str] = PLATFORMS,
    verify: bool = True,
    overwrite: bool = False,
) -> tuple[Program, ...]:
    """Write what a Flax class of transformers computes to a file that runs without it.

    Args:
      target: the file; it appears whole or not at all.
      params, cfg: a model, dense or slimmed, with a width for all layers or one for each.
      model: the class; by default that of the config which has these parameters.
      batch, length: "symbolic" for any, or numbers, for each pair of which a program is written.
        `length` counts tokens (of audio, frames of the encoder).
      platforms: where the programs are to run ("cpu", "cuda", "rocm", "tpu"), whatever this machine
        has.
      verify: run each program here beside the class, and refuse to write unless they agree; left
        out where none of the platforms is this machine's.
      overwrite: replace the file if an earlier export wrote it.

    `examples/run_exported.py` has the dozen lines that load it. Raises `ExportError` for sizes that
    the model does not take, or cannot be traced with; `ProofError`; `TargetError`; and what finding
    the class raises.

    >>> export("model.jaxexport", *flaxslim.load("smaller"), batch=(1, 8))  # doctest: +SKIP
    """
    from flaxslim.checkpoint._atomic import check_file

    path = Path(target).expanduser()
    check_file(path, overwrite=overwrite, ours=is_export, what="an exported model")
    cls = model_class_for(cfg, params) if model is None else model
    params = own_parameters(params, cfg, cls)
    made = programs(params, cfg, cls, batch=batch, length=length, platforms=platforms)
    if verify:
        for program in made:
            _check(program, params, cfg, cls)
    _write(path, flatten(params), made, cls)
    return made


def own_parameters(params: Any, cfg: Any, cls: type) -> Any:
    """The parameters that a class uses: a bare class has no use for those of a head."""
    from flaxslim.checkpoint._leaf import nest

    wanted = flatten(parameter_shapes(cls, cfg))
    have = flatten(params["params"] if list(params) == ["params"] else params)
    if missing := sorted(wanted.keys() - have.keys()):
        raise InputsError(
            f"{cls.__name__} has {len(missing)} parameters that are not given",
            path=missing[0],
            mend="export the class that these parameters belong to",
        )
    return nest({path: leaf for path, leaf in have.items() if path in wanted}, "/")


def programs(
    params: Any,
    cfg: Any,
    cls: type,
    *,
    batch: Sizes = SYMBOLIC,
    length: Sizes = SYMBOLIC,
    platforms: Sequence[str] = PLATFORMS,
) -> tuple[Program, ...]:
    """The programs, in memory: one for each pair of sizes. Raises as `export` does.

    >>> from transformers import BertConfig, FlaxBertModel
    >>> from flaxslim._compat import parameter_shapes
    >>> cfg = BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2,
    ...                  num_hidden_layers=1, intermediate_size=12, max_position_embeddings=16)
    >>> shapes = parameter_shapes(FlaxBertModel, cfg)
    >>> (program,) = programs(shapes, cfg, FlaxBertModel, batch=2, platforms=("cpu",))
    >>> program.name, program.exported.out_avals[0].shape
    ('batch=2,length=symbolic', (2, length, 8))
    """
    if not is_hugging_face(cls):
        raise ExportError(
            "only Flax classes of transformers are exported",
            seen=getattr(cls, "__name__", repr(cls)),
            mend="call jax.export.export on a function of your own; it needs no help",
        )
    model, _ = resolve((params, cfg), cls)
    flat = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flatten(params).items()}

    def call(flat: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        from flaxslim.checkpoint._leaf import nest

        return outputs(model.call(nest(flat, "/"), **inputs))

    return tuple(
        Program(batch=b, length=n, exported=_export(call, flat, cls, cfg, b, n, platforms))
        for b in _sizes(batch, "batch")
        for n in _lengths(length, cls, cfg)
    )


def _lengths(given: Sizes, cls: type, cfg: Any) -> tuple[int | str | None, ...]:
    if any(axes for _, axes in _open_axes(cls, cfg).values()):
        return _sizes(given, "length")
    if given != SYMBOLIC:
        raise ExportError(
            f"{cls.__name__} takes no sequence, so it has no length",
            seen=given,
            mend="leave the length out",
        )
    return (None,)


def _sizes(given: Sizes, what: str) -> tuple[int | str, ...]:
    if given == SYMBOLIC:
        return (SYMBOLIC,)
    numbers = (given,) if isinstance(given, int) else tuple(given)
    if not numbers or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ExportError(
            f"the {what} is a positive number, some of them, or {SYMBOLIC!r}", seen=repr(given)
        )
    return tuple(dict.fromkeys(numbers))


def _export(
    call: Any, flat: Any, cls: type, cfg: Any, batch: Any, length: Any, platforms: Sequence[str]
) -> Any:
    from jax import export as jax_export

    inputs = _abstract_inputs(cls, cfg, batch, length)
    try:
        return jax_export.export(jax.jit(call), platforms=tuple(platforms))(flat, inputs)
    except FlaxslimError:
        raise
    except Exception as error:  # whatever a class does with a size that is no number
        symbolic = [
            f"--{name}" for name, n in (("batch", batch), ("length", length)) if n == SYMBOLIC
        ]
        raise ExportError(
            f"{cls.__name__} cannot be traced"
            + (" with sizes that are left open" if symbolic else ""),
            seen=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            mend=f"give numbers: {' and '.join(f'{flag} 1,8' for flag in symbolic)}"
            if symbolic
            else "check the platforms, and that the class runs at these sizes",
        ) from error


# --- inputs -----------------------------------------------------------------------------------


def _open_axes(cls: type, cfg: Any) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """An example of each input, and which of its axes are as long as the sequence.

    Two examples of different lengths tell, whatever the family.
    """
    longest = _longest(cfg) or 64
    long, short = (inputs_for(cls, cfg, batch=1, length=n) for n in (longest, longest // 2))
    return {
        name: (x, tuple(i for i, n in enumerate(x.shape) if n != short[name].shape[i]))
        for name, x in long.items()
    }


def _longest(cfg: Any) -> int | None:
    """How long a sequence can be in all parts of a model; None if there is no limit."""
    cfg = stock_config(cfg)
    parts = [cfg, *(getattr(cfg, name, None) for name in ("text_config", "encoder", "decoder"))]
    limits = [positions(part) for part in parts if hasattr(part, "model_type")]
    return min((limit for limit in limits if limit), default=None)


def _abstract_inputs(cls: type, cfg: Any, batch: Any, length: Any) -> dict[str, Any]:
    """Shapes and dtypes of the inputs, with dimension variables for sizes that are left open."""
    from jax import export as jax_export

    limit = _longest(cfg)
    axes = _open_axes(cls, cfg)
    if isinstance(length, int):
        _check_length(cls, cfg, length, limit)
        shapes = {k: x.shape for k, x in inputs_for(cls, cfg, batch=1, length=length).items()}
    else:
        shapes = {name: x.shape for name, (x, _) in axes.items()}
    # A decoder's sequence is of another length than the encoder's.
    names = {name: "decoder_length" if name.startswith("decoder_") else "length" for name in axes}
    used = [*dict.fromkeys(names[name] for name, (_, open_axes) in axes.items() if open_axes)]
    scope = jax_export.SymbolicScope([f"{name} <= {limit}" for name in used] if limit else ())
    symbols = jax_export.symbolic_shape(",".join(used), scope=scope)
    variables = dict(zip(used, symbols, strict=True))
    if batch == SYMBOLIC:
        (batch,) = jax_export.symbolic_shape("batch", scope=scope)
    return {
        name: jax.ShapeDtypeStruct(
            (
                batch,
                *(
                    variables[names[name]] if length == SYMBOLIC and i in open_axes else n
                    for i, n in enumerate(shapes[name])
                    if i
                ),
            ),
            x.dtype,
        )
        for name, (x, open_axes) in axes.items()
    }


def _check_length(cls: type, cfg: Any, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise ExportError(
            "the length is beyond the positions that the model has",
            seen=length,
            expected=f"at most {limit}",
            mend=f"give --length {limit} or less",
        )
    made = inputs_for(cls, cfg, batch=1, length=length)
    if "input_ids" in made and (taken := made["input_ids"].shape[-1]) != length:
        raise ExportError(
            f"{cls.__name__} does not take sequences of this length",
            seen=length,
            expected=f"whole blocks: the next is {taken}",
            mend=f"give --length {taken}",
        )


# --- the proof --------------------------------------------------------------------------------


def _check(program: Program, params: Any, cfg: Any, cls: type) -> None:
    """Raise `ProofError` unless a program gives what the class gives, on inputs of its sizes."""
    if jax.default_backend() not in {_BACKENDS.get(p, p) for p in program.exported.platforms}:
        return
    batch = program.batch if isinstance(program.batch, int) else 2
    length = program.length if isinstance(program.length, int) else None
    inputs = inputs_for(cls, cfg, batch=batch, length=length)
    model, _ = resolve((params, cfg), cls)
    expected = jax.jit(lambda p, x: outputs(model.call(p, **x)))(params, inputs)
    found = program.exported.call(flatten(params), inputs)
    rows = [compare(reference(path, x), found[path]) for path, x in expected.items()]
    worst = max(rows, key=lambda row: row.relative)
    if worst.fault or worst.relative > _TOLERANCE:
        raise ProofError(
            "the exported program does not give what the class gives",
            path=worst.path,
            seen=worst.fault or f"a difference of {worst.relative:.1e} of the largest output",
            expected=f"at most {_TOLERANCE:.0e}",
            mend="report it, with the versions of jax and transformers",
        )


# --- the file ---------------------------------------------------------------------------------


def is_export(path: Path) -> bool:
    """Whether `export` has written a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except SafetensorError:
        return False


def _write(path: Path, flat: Mapping[str, Any], made: Sequence[Program], cls: type) -> None:
    import flaxslim
    from flaxslim.checkpoint._atomic import fresh_file
    from flaxslim.checkpoint._leaf import Leaf
    from flaxslim.checkpoint._pour import pour
    from flaxslim.checkpoint._safetensors import pieces

    try:
        data = {p.name: np.frombuffer(p.exported.serialize(), np.uint8) for p in made}
    except ImportError as error:
        raise ExportError(
            "jax.export writes programs with the package flatbuffers, which is not installed",
            mend="pip install 'flaxslim[export]'",
        ) from error
    _, inputs = jax.tree.unflatten(made[0].exported.in_tree, made[0].exported.in_avals)[0]
    results = jax.tree.unflatten(made[0].exported.out_tree, made[0].exported.out_avals)
    metadata = {
        "format": _FORMAT,
        "programs": " ".join(data),
        "inputs": json.dumps({name: str(aval) for name, aval in inputs.items()}),
        "outputs": json.dumps({name: str(aval) for name, aval in results.items()}),
        "platforms": ",".join(made[0].exported.platforms),
        "model": cls.__name__,
        "flaxslim": flaxslim.__version__,
    }
    leaves = {name: Leaf(array=x) for name, x in {**flat, **data}.items()}
    with fresh_file(path) as new:
        pour(new, pieces(leaves, metadata), progress=lambda count: None)
