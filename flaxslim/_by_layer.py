"""The proof one site at a time: for models of which not two, or not one, fit into memory.

A slimmed model computes the same function if each of its sites does, and if every other tensor is
the same. Of each site two things are asked. Every channel that is left must be, bit for bit and in
all tensors of the site, one channel of the site before, in the same order: so nothing was mixed
up, also not among tensors that no function here runs (queries and keys). And on random inputs both
must put out the same: so what is missing contributed nothing, or was folded into the bias.

The function is that of one layer, `act(x @ W1 + b1) @ W2 + b2`, gated or not; of heads it is an
average of values, with random weights in place of the softmax, times the output projection.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxslim._activation import Activation, activation, named
from flaxslim._axes import WINDOW
from flaxslim._compare import compare, reference
from flaxslim._dead import by_channel, part_position, parts_of
from flaxslim._lazy import Lazy
from flaxslim._proof import Change, Control, ControlRow, OutputRow, Proof
from flaxslim._spec import Site, SpecLike, Tensor
from flaxslim._tree import flatten
from flaxslim.specs import chosen

SAMPLES = 16  # inputs of each site


def verify_by_layer(
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    *,
    spec: SpecLike = "all",
    approximate: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Proof:
    """The proof that two models compute the same function, layer by layer.

    Args:
      before, after: `(params, cfg)` each. Leaves may be lazy (`read(..., lazy=True)`); the values
        of one site, before and after, are in memory at a time, and nothing is compiled.
      spec: by which the model was cut, as in `flaxslim.plan`.
      approximate: as in `flaxslim.verify`.
      progress: called with (sites done, sites in all).

    Returns: a `Proof`, an output for each site and one for all tensors outside of them. It is of
    the layers as the spec describes them: it does not run the class of the model, so a spec that
    is wrong about the class (a second reader that it does not name) is not found out here.

    Raises what `Spec.sites` raises.

    >>> from flaxslim import Pair, Spec, slim
    >>> spec = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="relu"))
    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    >>> proof = verify_by_layer((tree, None), slim(tree, None, spec), spec=spec)
    >>> proof.ok, proof.parameters
    (True, Change(before=15, after=10))
    """
    known = chosen(spec, before[1])
    old, new = flatten(before[0]), flatten(after[0])
    sites = {site.second.path: site for site in known.sites(before[0], before[1])}
    small = {site.second.path: site for site in known.sites(after[0], after[1])}
    rows, controls, notes = [], [], []
    inside = {tensor.path for site in sites.values() for tensor in site.tensors}
    tolerance, reason = 1e-5, "float32 sums over the channels run in another order"
    for number, (path, site) in enumerate(sites.items()):
        if progress is not None:
            progress(number, len(sites))
        if path not in small:
            rows.append(fault(path, "the site is not there after the cut"))
            continue
        act = activation(site.pair.activation, before[1], site.pair.config)
        row, control = _compared(site, small[path], old, new, act, seed)
        rows.append(row)
        controls += [control] if control is not None else []
        bias = site.second_bias
        if bias is not None and not row.fault and not equal(old[bias.path], new[bias.path]):
            dtype = np.dtype(old[bias.path].dtype)
            if (rounding := 2 * float(jnp.finfo(dtype).eps)) > tolerance:
                tolerance = rounding
                reason = f"constants were folded into biases, which are stored in {dtype}"
    rows.append(_rest(old, new, inside))
    bar = max(tolerance, 100 * max((row.relative for row in rows if not row.fault), default=0.0))
    controls = [dataclasses.replace(row, seen=row.relative > bar) for row in controls]
    if dead := len(sites) - len(controls):
        notes.append(f"{dead} of {len(sites)} sites have no living channel left to test with")
    return Proof(
        outputs=tuple(rows),
        tolerance=tolerance,
        tolerance_reason=reason,
        control=Control(rows=tuple(controls), sites=len(sites), bar=bar),
        milliseconds=Change(before=None, after=None),
        parameters=Change(before=_total(old, "size"), after=_total(new, "size")),
        bytes=Change(before=_total(old, "nbytes"), after=_total(new, "nbytes")),
        flops=Change(before=None, after=None),
        device="the host, layer by layer",
        dtype=" and ".join(sorted({str(x.dtype) for x in old.values()})),
        notes=tuple(notes),
        exact=not approximate,
    )


def _total(leaves: Mapping[str, Any], what: str) -> int:
    return sum(getattr(leaf, what) for leaf in leaves.values())


def fault(path: str, what: str) -> OutputRow:
    """A row that fails the proof."""
    return OutputRow(
        path=path,
        shape=(),
        dtype="",
        largest=0.0,
        difference=math.inf,
        relative=math.inf,
        fault=what,
    )


def _compared(
    site: Site,
    small: Site,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    act: Activation | None,
    seed: int,
) -> tuple[OutputRow, ControlRow | None]:
    """One site before and after: a row of the proof, and a wrong cut."""
    kept = _kept(_marks(site, old), _marks(small, new))
    if kept is None:
        return fault(
            site.second.path, "a channel after the cut is, bit for bit, none of those before"
        ), None
    act = act or named("gelu")  # unknown: then only what nothing reads was cut, whatever it is
    y, _ = _outputs(site, old, act, seed, None)
    z, wrong = _outputs(small, new, act, seed, (site.size, kept))
    first = reference(site.second.path, y)
    row, control = compare(first, z), None
    if wrong is not None and wrong.any() and not row.fault:  # what is left may be dead, too
        control = ControlRow(
            site=site.second.path,
            channels=1,
            living=small.size * small.rows,
            relative=compare(first, z - wrong).relative,
            seen=False,
        )
    return row, control


# --- every channel is one of those before -----------------------------------------------------


def _marks(site: Site, leaves: Mapping[str, Any]) -> list[list[tuple[int, ...]]]:
    """What tells each channel from others, `[s][f]`: the hashes of its slices of all tensors."""
    columns = []
    for tensor in site.cut:
        axes, axis = tensor.axes, site.axis(tensor)
        stack = [name for name in site.second.axes.stack if name in axes.names]
        values = axes.split(np.asarray(leaves[tensor.path]))
        front = [axes.position(name) for name in (*stack, axis)]
        values = np.moveaxis(values, front, range(len(front)))
        rows = 1 if not stack else site.rows
        size, inside = values.shape[len(front) - 1], math.prod(values.shape[len(front) :])
        values = values.reshape(rows, size, inside)  # of a site that died whole no -1 would follow
        found = [[hash(channel.tobytes()) for channel in row] for row in values]
        if axis == site.pair.group:
            found = [[row[owner] for owner in site.owners] for row in found]
        columns.append(found * (site.rows if rows < site.rows else 1))
    return [
        list(zip(*(column[row] for column in columns), strict=True)) for row in range(site.rows)
    ]


def _kept(
    before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]
) -> list[list[int]] | None:
    """Which channels before those after are, in each row; None if one of them is none."""
    kept = []
    for old, new in zip(before, after, strict=True):
        places = iter(enumerate(old))
        row = [next((i for i, mark in places if mark == wanted), None) for wanted in new]
        if None in row:
            return None
        kept.append(row)
    return kept


# --- the function of a site -------------------------------------------------------------------


def _outputs(
    site: Site,
    leaves: Mapping[str, Any],
    act: Activation | None,
    seed: int,
    kept: tuple[int, Sequence[Sequence[int]]] | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a site puts out on random inputs, `(s, n, o)`, and the part of one strong channel.

    `kept` is the number of channels before, and which of them these are: heads average with the
    weights that they had there.
    """
    firsts = [part for t in site.first for part in _first(site, t, leaves[t.path])]
    biases: list[Any] = []
    for bias in site.first_biases:
        none = [None] * (len(firsts) // len(site.first))
        biases += none if bias is None else _first(site, bias, leaves[bias.path])
    second = np.concatenate([_second(site, t, leaves[t.path]) for t in site.reading], axis=-1)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SAMPLES, firsts[0].shape[-1]), np.float32)
    size, rows = (site.size, [range(site.size)] * site.rows) if kept is None else kept
    outputs, parts = [], []
    for row, own in enumerate(rows):
        read = [np.tensordot(x, w[row], (1, -1)) for w in firsts]
        read = [r if b is None else r + b[row][..., 0] for r, b in zip(read, biases, strict=True)]
        if site.pair.axis == "h":
            weights = rng.random((size, SAMPLES, SAMPLES), np.float32)[list(own)]
            weights /= weights.sum(axis=-1, keepdims=True)
            channels = np.einsum("fnm,mfk->nfk", weights, read[0])
        else:
            channels = read[0] if act is None else act(read[0])
            channels = channels * read[1] if site.pair.gated else channels
            channels = channels.astype(np.float32)
        w = second[row]
        if channels.shape[2] != w.shape[1]:  # what the second sums over besides, the first has not
            w = w.sum(axis=1, keepdims=True)
        outputs.append(np.tensordot(channels, w, ((1, 2), (0, 1))))
        if len(w):
            sizes = np.abs(channels).max(axis=(0, 2)) * np.abs(w).max(axis=(1, 2), initial=0)
            strong = int(np.argmax(sizes))
            parts.append(np.tensordot(channels[:, strong], w[strong], 1))
    y = np.stack(outputs).astype(np.float32)
    if site.second_bias is not None:
        bias = np.asarray(leaves[site.second_bias.path]).astype(np.float32)
        y[..., : bias.size // site.rows] += _bias(site, site.second_bias, bias)[:, None]
    return y, np.stack(parts).astype(np.float32) if parts else None


def _first(site: Site, tensor: Tensor, leaf: Any) -> list[np.ndarray]:
    """The parts of a first kernel that make the hidden value, each `(s, f, k, inputs)`."""
    axes, stack = tensor.axes, site.second.axes.stack
    values = axes.split(np.asarray(leaf)).astype(np.float32)
    front = {axes.position(name) for name in (site.axis(tensor), *stack)}
    if parts_of(site) is not None:
        front.add(part_position(axes))
    rest = [i for i in range(values.ndim) if i not in front]
    inner = [n for n, i in enumerate(rest) if axes.factors[i] in site.pair.inner]
    y = by_channel(site, tensor, values, range(values.ndim))
    y = y.reshape(*y.shape[:3], *(values.shape[i] for i in rest))
    y = np.moveaxis(y, [3 + n for n in inner], range(3, 3 + len(inner)))
    inside = math.prod(y.shape[3 : 3 + len(inner)])
    return list(y.reshape(*y.shape[:3], inside, math.prod(y.shape[3 + len(inner) :])))


def _second(site: Site, tensor: Tensor, leaf: Any) -> np.ndarray:
    """A kernel that reads the channels, `(s, f, k, outputs)`."""
    axes, pair, stack = tensor.axes, site.pair, tensor.axes.stack
    values = axes.split(np.asarray(leaf)).astype(np.float32)
    inner = [name for name in axes.names if name in pair.inner and name != pair.axis]
    beside = [n for n in axes.dimensions[axes.dimension(pair.axis)] if isinstance(n, str)]
    inner += [
        n for n in axes.names if n not in inner and (n in beside or n in WINDOW) and n != pair.axis
    ]
    front = [axes.position(name) for name in (*stack, pair.axis, *inner)]
    values = np.moveaxis(values, front, range(len(front)))
    inside = math.prod(values.shape[len(stack) + 1 : len(front)])
    outputs = math.prod(values.shape[len(front) :])
    return values.reshape(site.rows, values.shape[len(stack)], inside, outputs)


def _bias(site: Site, tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """A second bias, `(s, outputs)` in the order of the second kernel's outputs."""
    axes, stack = tensor.axes, site.second.axes.stack
    outputs = [name for name in site.second.axes.factors if name in axes.factors]
    order = [*stack, *(name for name in outputs if name not in stack)]
    values = axes.split(values).transpose([axes.factors.index(name) for name in order])
    return values.reshape(site.rows, -1)


# --- everything else --------------------------------------------------------------------------


def _rest(old: Mapping[str, Any], new: Mapping[str, Any], inside: set[str]) -> OutputRow:
    """One row for the tensors outside of all sites: they must be the same."""
    outside = {*old, *new} - inside
    for path in sorted(outside):
        if path not in old or path not in new:
            return fault(path, f"only the model {'before' if path in old else 'after'} has it")
        if not equal(old[path], new[path]):
            return changed(path)
    return OutputRow(
        path=f"{len(outside)} other tensors",
        shape=(),
        dtype="",
        largest=0.0,
        difference=0.0,
        relative=0.0,
    )


def changed(path: str) -> OutputRow:
    """The row of a tensor that no cut explains."""
    return fault(path, "it belongs to no site, and is not the same before and after")


def equal(a: Any, b: Any) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    pairs: Iterator[tuple[Any, Any]] = (
        zip(a.blocks(), b.blocks(), strict=True)
        if isinstance(a, Lazy) and isinstance(b, Lazy)
        else iter(((np.asarray(a), np.asarray(b)),))
    )
    return all(x.tobytes() == y.tobytes() for x, y in pairs)
