"""`verify`: run two models on the same inputs and show that they compute the same function."""

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import _config
from flaxslim._compare import Reference, compare, reference
from flaxslim._control import bar, by_site, by_tensor, norms
from flaxslim._model import Inputs, Model, as_inputs, outputs, resolve, split
from flaxslim._once import once
from flaxslim._proof import Change, OutputRow, Proof
from flaxslim._spec import Spec, SpecLike
from flaxslim._tree import check_living, flatten, name_of
from flaxslim.errors import FlaxslimError, InputsError, UnknownFamilyError
from flaxslim.specs import chosen, spec_for


def verify(
    before: Any,
    after: Any,
    model: Any = None,
    *,
    inputs: Any = None,
    spec: SpecLike = None,
    tolerance: float | None = None,
    approximate: bool = False,
    dtype: Any = None,
    repeats: int = 5,
    seed: int = 0,
) -> Proof:
    """Compare two models on the same inputs, under `jit`, at the highest matmul precision.

    Every output array of `after` is compared with that of `before`. Then the proof is put to the
    test: at one site after another the strongest channel of `after` is zeroed, and the
    difference that this makes must stand out. If it does not, these inputs say nothing about that
    site, and the proof is not `ok`. Where no spec is known, whole tensors are zeroed instead: each
    that has another shape than before. Where no control can be made, the proof is not `ok` either.

    Args:
      before, after: `(params, cfg)` pairs, parameters, or nnx modules.
      model: a Hugging Face Flax class or instance; a Linen module (run with the values of each
        config in its fields) or a builder cfg -> module; a function fn(params, *inputs). May be
        left out for nnx modules, and for configs that name a Hugging Face class.
      inputs: a dict (by keyword), a tuple or list (by position), or the only input. Made from the
        config for a Hugging Face class. Strings and bools are passed as they are.
      spec: where the sites are, as in `flaxslim.plan`; by default the FFN of the family that the
        config names, and its heads if they were cut.
      tolerance: the largest difference allowed, relative to the largest value of each output. By
        default 1e-12 in float64, 1e-5 in float32, 8 rounding steps in 16 bits (2 where only
        biases that took up a constant are stored in 16 bits).
      approximate: channels that contribute were cut on purpose: measure, ask for no tolerance.
      dtype: what a Hugging Face class computes in; float32 by default, whatever the parameters.
      repeats: how many calls of each model are timed; 0 for none.
      seed: of the inputs made here.

    Returns: a `Proof`. Ask it for `.ok` and `.reasons`, print it, or `.raise_if_failed()`.

    Raises: `InputsError` if inputs or model are needed and not given, if the two are of different
    families or classes, or if the model gives something else than arrays; `ConfigError` if a
    stock class cannot be built from a config; whatever a model raises.

    >>> from flaxslim import Pair, Spec
    >>> mlp = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
    >>> before = {"up": np.eye(3), "down": np.array([[1.0], [0.0], [2.0]])}
    >>> after = {"up": before["up"][:, [0, 2]], "down": before["down"][[0, 2]]}
    >>> proof = verify(before, after, mlp, inputs=np.ones((2, 3), np.float32),
    ...                spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> proof.ok, proof.relative, proof.parameters
    (True, 0.0, Change(before=12, after=8))
    """
    if model is None:
        _check_same_family(split(before)[1], split(after)[1])
    m0, cfg = resolve(before, model, dtype=dtype)
    m1, small = resolve(after, m0.cls if model is None else model, dtype=dtype)
    if model is None:
        _check_same_class(m0, m1, split(after)[1])
    given = as_inputs(inputs) if inputs is not None else _made_inputs(m0, cfg, seed)
    spec = _known_spec(m0, m1, cfg) if spec is None else chosen(spec, cfg)
    return _proved(
        (m0, cfg),
        (m1, small),
        given,
        spec,
        tolerance=tolerance,
        approximate=approximate,
        repeats=repeats,
    )


def _proved(
    before: tuple[Model, Any],
    after: tuple[Model, Any],
    given: Inputs,
    spec: Spec | None,
    *,
    tolerance: float | None,
    approximate: bool,
    repeats: int,
) -> Proof:
    """The models of these configs are run, compared, put to the test, and timed."""
    (m0, cfg), (m1, small) = before, after
    sites = spec.sites(m1.params, small) if spec is not None else ()
    notes = list(_notes(m0, m1))
    for model in (m0, m1):
        leaves, _ = jax.tree_util.tree_flatten_with_path(model.weights)
        check_living({name_of(keys): leaf for keys, leaf in leaves})

    with jax.default_matmul_precision("highest"):
        run0, run1 = _Run(m0, given), _Run(m1, given)
        first, device = _first(run0)
        try:
            result = run1()
        except Exception as error:
            error.add_note("(flaxslim.verify was running the model after the cut)")
            raise
        rows = _rows(first, result)
        default, reason = _tolerance(first, m0, m1, spec, cfg)
        if tolerance is None:
            tolerance = default
        else:
            reason = "as given"
        if approximate:
            first = {path: reference(path, x) for path, x in result.items()}
        del result
        control = None
        if any(row.fault or not (approximate or row.relative <= tolerance) for row in rows):
            notes.append("no control: it would show nothing, as the outputs differ already")
        else:
            measured = 0.0 if approximate else max(row.relative for row in rows)
            least = default if approximate else bar(measured, tolerance, first)
            if spec is None:
                control, more = by_tensor(run1, first, run0.params, least)
            else:
                old = () if approximate else spec.sites(m0.params, cfg)
                control, more = by_site(run1, first, sites, (old, run0.params), least, measured)
            notes += more
        milliseconds = _milliseconds(run0, run1, repeats)
        flops = Change(before=run0.flops(), after=run1.flops())

    return Proof(
        outputs=rows,
        tolerance=tolerance,
        tolerance_reason=reason,
        control=control,
        milliseconds=milliseconds,
        parameters=Change(before=_count(m0)[0], after=_count(m1)[0]),
        bytes=Change(before=_count(m0)[1], after=_count(m1)[1]),
        flops=flops,
        device=device,
        dtype=" and ".join(map(str, _floats(m0.weights))) or "no floating point",
        notes=tuple(notes),
        exact=not approximate,
    )


class _Run:
    """A model, compiled, with its parameters and inputs on the device."""

    def __init__(self, model: Model, inputs: Inputs):
        arrays, join = inputs.split()

        def call(params: Any, arrays: list[Any]) -> dict[str, Any]:
            given = join(arrays)
            return outputs(model.call(params, *given.args, **given.kwargs))

        self._call = jax.jit(call)
        # Once, here: jit would carry host arrays to the device anew with every call.
        self.params, self._arrays = jax.device_put(model.params), jax.device_put(arrays)

    def __call__(self, params: Any = None) -> dict[str, Any]:
        return self._call(self.params if params is None else params, self._arrays)

    def flops(self) -> float | None:
        return flops(self._call, self.params, self._arrays)


def flops(function: Any, *arguments: Any) -> float | None:
    """By XLA's cost analysis of the lowered function; None where there is none.

    Nothing is compiled or run, so the arguments may be shapes (`jax.ShapeDtypeStruct`).
    """
    try:
        costs: Any = jax.jit(function).lower(*arguments).cost_analysis()
    except (NotImplementedError, RuntimeError, TypeError):  # a backend without one
        return None
    if isinstance(costs, list | tuple):  # older releases: one for each device
        costs = costs[0] if costs else None
    count = costs.get("flops") if isinstance(costs, Mapping) else None
    return float(count) if count is not None and count >= 0 else None


# --- what is run ------------------------------------------------------------------------------


def _made_inputs(model: Model, cfg: Any, seed: int) -> Inputs:
    if model.cls is None:
        raise InputsError(
            "inputs can be made from the config of a Hugging Face class only",
            mend="pass inputs=: a dict by keyword, a tuple by position, or the only input",
        )
    from flaxslim._inputs import inputs_for

    return as_inputs(inputs_for(model.cls, cfg, seed=seed))


def _known_spec(before: Model, after: Model, cfg: Any) -> Spec | None:
    """The spec of the family's FFN, and of its heads if these were cut."""
    if cfg is None or _config.model_type(cfg) is None:
        return None
    try:
        ffn, heads = spec_for(cfg), spec_for(cfg, "heads")
    except UnknownFamilyError:
        return None
    leaves = flatten(after.params)
    try:
        cut = any(
            tensor.path in leaves and tensor.shape != leaves[tensor.path].shape
            for site in heads.sites(before.params, cfg)
            for tensor in site.cut
        )
    except FlaxslimError:  # not even there, or in another layout: then none was cut by us
        return ffn
    return ffn + heads if cut else ffn


def _check_same_family(before: Any, after: Any) -> None:
    names = [None if cfg is None else _config.model_type(cfg) for cfg in (before, after)]
    if None not in names and names[0] != names[1]:
        raise InputsError(
            "the two models are of different families, so they cannot be compared",
            seen=f"model_type {names[0]!r} before and {names[1]!r} after",
            mend="give a model and the model that was cut from it",
        )


def _check_same_class(before: Model, after: Model, cfg: Any) -> None:
    if before.cls is None or flatten(before.params).keys() == flatten(after.params).keys():
        return
    from flaxslim._inputs import model_class_for

    other = model_class_for(cfg, after.params)
    if other is not before.cls:
        raise InputsError(
            "the two models are of different classes, so they cannot be compared",
            path=min(flatten(before.params).keys() ^ flatten(after.params).keys()),
            seen=f"{before.cls.__name__} before and {other.__name__} after",
            mend="give a model and the model that was cut from it, or say which class runs both: "
            "verify(before, after, FlaxClass)",
        )


def _floats(tree: Any) -> tuple[np.dtype, ...]:
    """The floating dtypes of a tree, the least precise first."""
    dtypes = {getattr(x, "dtype", None) for x in jax.tree_util.tree_leaves(tree)}
    floating = [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.inexact)]
    return tuple(sorted(map(np.dtype, floating), key=_eps, reverse=True))


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


def _count(model: Model) -> tuple[int, int]:
    """The number of parameters, and of their bytes as stored; what is tied counts once."""
    leaves = [x for x in jax.tree_util.tree_leaves(model.weights) if hasattr(x, "dtype")]
    leaves = once(dict(enumerate(leaves))).values()
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)


def _notes(before: Model, after: Model) -> Iterator[str]:
    if np.float64 in _floats(before.weights) and jnp.result_type(float) != np.float64:
        yield "float64 parameters were run in float32, since jax_enable_x64 is off"
    if _count(before)[0] == _count(after)[0]:
        yield "both models have the same number of parameters: nothing was cut"


# --- comparison -------------------------------------------------------------------------------


def _first(run: _Run) -> tuple[dict[str, Reference], str]:
    """The outputs before, on the host, and the device that they came from."""
    result = run()
    devices = {d for x in result.values() for d in x.devices()} or {jax.devices()[0]}
    kinds = {f"{d.platform} ({d.device_kind})" for d in devices}
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return (
        {path: reference(path, x) for path, x in result.items()},
        count + " and ".join(sorted(kinds)),
    )


def _rows(first: Mapping[str, Reference], result: Mapping[str, Any]) -> tuple[OutputRow, ...]:
    rows = [compare(a, result[path]) for path, a in first.items() if path in result]
    for path in [*first, *result]:
        if (path in first) != (path in result):
            x = first[path].values if path in first else result[path]
            rows.append(
                OutputRow(
                    path=path,
                    shape=tuple(x.shape),
                    dtype=str(x.dtype),
                    largest=0.0,
                    difference=np.inf,
                    relative=np.inf,
                    fault=f"only the model {'before' if path in first else 'after'} has it",
                )
            )
    return tuple(rows)


def _allowed(dtype: Any) -> float:
    """The tolerance of a dtype.

    The sums over f run in another order once channels are gone. At BERT-base size in float32
    this makes 1.6e-6 of the largest output; six times that is allowed.
    """
    bits = jnp.finfo(dtype).bits
    return {64: 1e-12, 32: 1e-5}.get(bits, 8 * _eps(dtype))


def _tolerance(
    first: Mapping[str, Reference], before: Model, after: Model, spec: Spec | None, cfg: Any
) -> tuple[float, str]:
    """How much may differ by rounding alone, and the sentence that says why."""
    computed = [a.dtype for a in first.values() if a.inexact]
    found = [(_allowed(d), f"{d} sums over the channels run in another order") for d in computed]
    old, new = _floats(before.weights), _floats(after.weights)
    if old and new and _eps(new[0]) > _eps(old[0]):
        found.append((_allowed(new[0]), f"parameters were rounded from {old[0]} to {new[0]}"))
    folded = _folded(spec, before, after, cfg)
    found += [
        (2 * _eps(d), f"constants were folded into biases, which are stored in {d}") for d in folded
    ]
    return max(found, default=(0.0, "no output is floating point"), key=lambda f: f[0])


def _folded(spec: Spec | None, before: Model, after: Model, cfg: Any) -> set[np.dtype]:
    """The 16-bit dtypes of second biases that took up a constant, and were rounded.

    Such a bias has changed; or it has not, because rounding swallowed the constant whole: then
    the model before has a channel with a bias and no inputs.
    """
    if spec is None:
        return set()
    old, new = flatten(before.params), flatten(after.params)
    found = set()
    for site in spec.sites(before.params, cfg):
        path = site.second_bias and site.second_bias.path
        if not path or path not in new or new[path].dtype.itemsize > 2:
            continue
        columns, biases, rows = norms(site, old)
        constant = (columns == 0).any(axis=0) & (biases != 0).any(axis=0) & (rows != 0)
        if constant.any() or not np.array_equal(np.asarray(old[path]), np.asarray(new[path])):
            found.add(np.dtype(new[path].dtype))
    return found


# --- timing -----------------------------------------------------------------------------------


def _milliseconds(run0: _Run, run1: _Run, repeats: int) -> Change:
    """Medians of one call each, in turns, so that a busy machine slows both alike."""
    if repeats < 1:
        return Change(before=None, after=None)
    times: dict[_Run, list[float]] = {run0: [], run1: []}
    for run in (run0, run1):  # both are compiled by now; this fills the caches
        jax.block_until_ready(run())
    for _ in range(repeats):
        for run, taken in times.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken.append(1e3 * (time.perf_counter() - start))
    return Change(before=statistics.median(times[run0]), after=statistics.median(times[run1]))
