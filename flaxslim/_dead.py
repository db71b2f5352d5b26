"""Which channels of a site contribute nothing: the exactness rules.

A hidden channel j of `y = act(x @ W1 + b1) @ W2 + b2` may be cut when what it adds to y is known
without x. Each rule says of which channels it knows that. A channel is dead if any rule does, and
the constant that it puts into the second layer, times its second row, is folded into b2.

  (i)    every row that it feeds is zero: of the second layer, and of each other reader
  (ii)   gated: its up column and bias are zero, or its gate column and bias are and act(0) = 0
  (iii)  plain: its first column and bias are zero, and act(0) = 0
  (iv)   its first column (gated: both columns) is zero and the bias is b: the constant is act(b)
         (gated: act(b_gate) * b_up), which must be zero if there is no second bias to fold into,
         or if the channel has other readers

An attention head is such a channel too, plain and without an activation: W1 and b1 are its value
projection, W2 its rows of the output projection. Its output is an average of values, by weights
that sum to one, so values that are zero or constant stay so (what the queries and keys are is of no
account).

Two things no tensor tells. A convolution may pad its input with zeros, and a constant is none at
such an edge: through a window nothing but zero is folded. And what a spec names beside the pair, a
norm's scale and bias or another kernel, may stand between the layers and change what they hand on:
of such a pair of channels only rule (i) is asked.

Arrays here are `(s, f)`: one row for each index of the stacked axes (layers that are scanned,
experts), which have channels of their own; s = 1 for most.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _bits
from flaxslim._activation import Activation
from flaxslim._axes import WINDOW, Axes
from flaxslim._lora import idle
from flaxslim._spec import Site, Tensor
from flaxslim.errors import UnsupportedDtypeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules may look at.

    Attributes:
      second_zero: nothing reads the channel, `(s, f)`.
      first_zero: the channel reads nothing, `(s, f)`; one entry for a plain pair, (gate, up) for a
        gated one.
      bare: no low-rank matrix adds to the row that reads the channel, `(s, f)`.
      first_bias: as many of `(s, f, m)`: of a head, m = k values.
      foldable: there is a second bias to fold a constant into, a constant is one, at every place
        that the second layer reads, and nothing else reads it.
    """

    second_zero: np.ndarray
    bare: np.ndarray
    first_zero: tuple[np.ndarray, ...]
    first_bias: tuple[np.ndarray, ...]
    gated: bool
    activation: Activation | None
    foldable: bool

    @property
    def none(self) -> np.ndarray:
        return np.zeros_like(self.second_zero)

    @property
    def silent(self) -> tuple[np.ndarray, ...]:
        """Of each first layer, where column and bias are zero."""
        return tuple(
            zero & (bias == 0).all(axis=-1)
            for zero, bias in zip(self.first_zero, self.first_bias, strict=True)
        )

    @property
    def constants(self) -> np.ndarray:
        """What a channel that reads nothing puts out, `(s, f, m)`; of others it means nothing."""
        assert self.activation is not None
        # Only where it is asked for: of other channels it may overflow.
        known = np.logical_and.reduce(self.first_zero)[..., None]
        value = self.activation(np.where(known, self.first_bias[0], 0.0))
        with np.errstate(invalid="ignore", over="ignore"):
            return value * self.first_bias[1] if self.gated else value


Rule = Callable[[Evidence], np.ndarray]


def second_is_zero(e: Evidence) -> np.ndarray:
    """Rule (i): nothing reads the channel."""
    return e.second_zero


def gate_or_up_is_zero(e: Evidence) -> np.ndarray:
    """Rule (ii): one factor of act(gate) * up is zero for every input."""
    if not e.gated:
        return e.none
    gate, up = e.silent
    return (gate & _quiet(e.activation)) | up


def first_is_zero(e: Evidence) -> np.ndarray:
    """Rule (iii): the channel is act(0) = 0 for every input."""
    if e.gated or len(e.first_zero) != 1 or not _quiet(e.activation):
        return e.none
    return e.silent[0]


def first_is_constant(e: Evidence) -> np.ndarray:
    """Rule (iv): the channel is the same constant for every input."""
    known = np.logical_and.reduce(e.first_zero)
    if e.activation is None or not (e.gated or len(e.first_zero) == 1) or not known.any():
        return e.none
    # Without a second bias only a constant of zero may go: a relu of a bias below zero.
    # What a low-rank matrix adds to a row depends on a scale that no tensor holds.
    # An expression may have no value at a bias: log(0).
    defined = np.isfinite(e.constants).all(axis=-1)
    return known & defined & ((e.foldable & e.bare) | (e.constants == 0).all(axis=-1))


RULES: Mapping[str, Rule] = {
    "i": second_is_zero,
    "ii": gate_or_up_is_zero,
    "iii": first_is_zero,
    "iv": first_is_constant,
}


@functools.cache
def _quiet(activation: Activation | None) -> bool:
    return activation is not None and float(activation(np.zeros(1))[0]) == 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """The verdict on a site, all `(s, f)`: what is dead, and which constants are to be folded.

    `rules` counts each dead channel once, under the first rule that knows it; "threshold" are
    those that only a threshold above zero gives up, which are marked `weak` too.
    """

    dead: np.ndarray
    weak: np.ndarray
    folded: np.ndarray
    rules: dict[str, int]


def evidence(
    site: Site, leaves: Mapping[str, Any], activation: Activation | None, *, foldable: bool = True
) -> Evidence:
    """What a tree says about the channels of a site.

    What reads the channels is read once, the first kernels hardly at all. Raises `TracedError`,
    `UnsupportedDtypeError`, and `NonFiniteError` for NaN or infinity in what reads them or in a
    bias. The first kernels are not searched for them here: that is done where their columns are
    cut (`apply`), while they are in the cache.
    """
    for tensor in site.tensors:
        _check_dtype(leaves[tensor.path], tensor)
    if site.second_bias is not None:
        _bits.check_finite(leaves[site.second_bias.path], site.second_bias)
    lora: dict[str, list[Tensor]] = {}
    for kernel, tensor in site.lora:
        if not idle(tensor.path, leaves):
            lora.setdefault(kernel, []).append(tensor)
    read = [
        [_zero_seconds(leaves[m.path], m, site) for m in with_lora(t, lora)] for t in site.reading
    ]
    zero = np.logical_and.reduce([own for own, *_ in read])
    bare = np.logical_and.reduce([np.ones_like(zero), *(m for _, *added in read for m in added)])
    return Evidence(
        second_zero=zero & bare,
        bare=bare,
        first_zero=tuple(
            row & (not site.pair.between)
            for t in site.first
            for row in np.logical_and.reduce(
                [_zero_firsts(leaves[m.path], m, site) for m in with_lora(t, lora)]
            )
        ),
        first_bias=_biases(site, leaves),
        gated=site.pair.gated,
        activation=activation,
        foldable=foldable
        and site.second_bias is not None
        and not site.readers
        and _is_read_at_once(site)
        and _values_are_read(site),
    )


def _values_are_read(site: Site) -> bool:
    """Whether the second layer reads each value that a channel's first bias has."""
    names = {name for bias in site.first_biases if bias is not None for name in bias.axes.names}
    return names <= {*site.second.axes.names, site.axis(site.first[0])}


def _is_read_at_once(site: Site) -> bool:
    """Whether the second kernel reads one place only, and no other that may lie beyond an edge.

    The window of a convolution may have any names: an axis of both kernels that is none of the
    channels, and of which a first bias has no values.
    """
    known = {site.pair.axis, site.pair.group, "d", *site.second.axes.stack}
    known |= {name for bias in site.first_biases if bias is not None for name in bias.axes.names}
    shared = {name for t in site.first for name in t.axes.names}
    sizes = site.second.axes.sizes(site.second.shape)
    return not any(
        size > 1 and name not in known and (name in WINDOW or name in shared)
        for name, size in sizes.items()
    )


def with_lora(kernel: Tensor, lora: Mapping[str, list[Tensor]]) -> list[Tensor]:
    """A kernel and the low-rank matrices that are added to it."""
    return [kernel, *lora.get(kernel.path, ())]


def mark(
    site: Site,
    leaves: Mapping[str, Any],
    activation: Activation | None,
    threshold: float = 0.0,
    *,
    foldable: bool = True,
) -> Marks:
    """The dead channels of a site; raises as `evidence` does."""
    seen = evidence(site, leaves, activation, foldable=foldable)
    dead, folded = seen.none, seen.none
    rules: dict[str, int] = {}
    for name, rule in RULES.items():
        new = rule(seen) & ~dead
        rules[name] = int(new.sum())
        if rule is first_is_constant and new.any():
            folded = new & (seen.constants != 0).any(axis=-1)
        dead = dead | new
    weak = seen.none
    if threshold > 0:
        norms = second_norms(site, leaves)
        small = (norms <= threshold * norms.max(axis=-1, keepdims=True, initial=0.0)).all(axis=0)
        weak = small & seen.bare & ~dead
        rules["threshold"] = int(weak.sum())
        dead = dead | weak
    return Marks(dead=dead, weak=weak, folded=folded, rules=rules)


def _check_dtype(leaf: Any, tensor: Tensor) -> None:
    _bits.check_concrete(leaf, tensor)
    if leaf.dtype not in _bits.FLOATS:
        raise UnsupportedDtypeError(
            "the tensor is not of a floating point type that can be judged (quantised weights?)",
            path=tensor.path,
            seen=f"{leaf.dtype} {tuple(leaf.shape)}",
            expected=f"one of {', '.join(map(str, _bits.FLOATS))}",
            mend="slim before quantising, or dequantise first",
        )


def _zero_seconds(leaf: Any, tensor: Tensor, site: Site) -> np.ndarray:
    """Which channels nothing reads: bool `(s, f)`."""
    axes, stack = tensor.axes, site.second.axes.stack
    found = _bits.set_along(leaf, axes, axes.others(site.pair.axis, stack))
    _bits.check_finite(leaf, tensor, found)
    return axes.rows(found == 0, site.pair.axis, stack)


def parts_of(site: Site) -> tuple[int, ...] | None:
    """Which parts of a fused first layer are factors of the hidden value; None: it has none."""
    if site.pair.parts:
        return site.pair.parts
    return (0, 1) if site.pair.gated and len(site.first) == 1 else None


def part_position(axes: Axes) -> int:
    """Where the literal factor stands that counts the parts of a fused layer."""
    return next(i for i, factor in enumerate(axes.factors) if isinstance(factor, int))


def by_channel(site: Site, tensor: Tensor, reduced: np.ndarray, left: Sequence[int]) -> np.ndarray:
    """What is left at some positions of a first tensor as `(parts, s, f, m)`, one row a head."""
    axes, stack, axis = tensor.axes, site.second.axes.stack, site.axis(tensor)
    parts = parts_of(site)
    front = [] if parts is None else [part_position(axes)]
    front += [axes.position(name) for name in stack]
    front.append(axes.position(axis))
    order = [*front, *(i for i in left if i not in front)]
    y = reduced.transpose([list(left).index(i) for i in order])
    size = y.shape[len(front) - 1]
    count = 1 if parts is None else len(y)
    y = y.reshape(count, site.rows, size, math.prod(y.shape[len(front) :]))
    y = y if parts is None else y[list(parts)]
    return y[:, :, site.owners] if axis == site.pair.group else y


def _zero_firsts(leaf: Any, tensor: Tensor, site: Site) -> np.ndarray:
    """Which channels read nothing: bool `(parts, s, f)`."""
    axes = tensor.axes
    left = {axes.position(name) for name in (site.axis(tensor), *site.second.axes.stack)}
    if parts_of(site) is not None:
        left.add(part_position(axes))
    others = tuple(i for i in range(len(axes.factors)) if i not in left)
    found = _bits.set_along(leaf, axes, others, sample=True)
    return by_channel(site, tensor, found == 0, sorted(left))[..., 0]


def _biases(site: Site, leaves: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """The first bias of each channel, `(s, f, m)`, one array for each part; zero without one."""
    parts = parts_of(site)
    none = np.zeros((site.rows, site.size, 1))
    rows: list[np.ndarray] = []
    for tensor in site.first_biases:
        if tensor is None:
            rows += [none] * len(parts or (0,))
            continue
        values = _bits.finite_values(leaves[tensor.path], tensor).astype(np.float64)
        values = tensor.axes.split(values)
        rows += list(by_channel(site, tensor, values, range(values.ndim)))
    return tuple(rows)


def first_norms(site: Site, leaves: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The L2 norm of what each channel reads, and of its bias: float64 `(parts, s, f)` each."""
    columns, biases = [], []
    for tensor, bias in zip(site.first, site.first_biases, strict=True):
        for found, t in ((columns, tensor), (biases, bias)):
            if t is None:
                found += [np.zeros((site.rows, site.size))] * len(parts_of(site) or (0,))
                continue
            values = t.axes.split(np.asarray(leaves[t.path]).astype(np.float64))
            rows = by_channel(site, t, values, range(values.ndim))
            # Scaled first, or the squares of large weights overflow and those of small ones vanish.
            largest = np.max(np.abs(rows), initial=0.0) or 1.0
            found += list(np.sqrt(((rows / largest) ** 2).sum(axis=-1)) * largest)
    return np.stack(columns), np.stack(biases)


def second_norms(site: Site, leaves: Mapping[str, Any]) -> np.ndarray:
    """The L2 norm of what reads each channel: float64 `(r, s, f)`, the second and each reader."""
    axis, stack = site.pair.axis, site.second.axes.stack
    norms = [t.axes.norm(leaves[t.path], axis, stack) for t in site.reading]
    return np.stack([norm.reshape(site.rows, site.size) for norm in norms])
