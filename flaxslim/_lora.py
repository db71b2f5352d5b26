"""Low-rank matrices beside a kernel: `W + A B`, of which the side that carries the axis is cut.

Of a first layer, whose outputs are the channels, that is B; of a second layer it is A. They are
known by their names, which are those of flax (`lora_a`, `lora/lora_a`), of qwix and tunix
(`kernel_lora_a`, beside the kernel of that name), of PEFT (`lora_A/weight`), and such as people
give them (`lora_down`, `lora/A`). What is called an adapter (`adapter_a`, `adapter/A`) is one if
its shapes are: many an adapter is another kind of layer.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flaxslim import _bits
from flaxslim._axes import Axes, pattern_of
from flaxslim._pair import Pair
from flaxslim._spec import Site, Tensor
from flaxslim.errors import AxisPatternError, SiteShapeError

_NAME = re.compile(
    r"(?:(?P<folder>.+?)/)??(?:lora/)?(?:(?P<kernel>\w+)_)?(?:(?P<lora>lora)|adapters?)(?P<in>_?|/)"
    r"(?P<side>[abAB]|down|up)(?:/(?!kernel|weight|lora_?[abAB])\w+)?(?:/(?P<inner>kernel|weight))?"
)
_SIDES: dict[str, str] = dict(
    zip(("a", "b", "A", "B", "down", "up"), ("b", "a", "B", "A", "up", "down"), strict=True)
)
_BOTTLENECK = re.compile(r"adapters?[_/]?(down|up)")

# The magnitudes of DoRA, one for each output of a kernel.
_MAGNITUDE = re.compile(r"(?:(?P<folder>.+?)/)??(?:lora/)?lora_magnitude\w*(?:/\w+)*")

# A layer that is wrapped whole stands below its adapter: `nnx.LoRA(base_module=...)`, PEFT.
_WRAPPED = ("base_module", "base_layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A low-rank matrix, by its path alone.

    Attributes:
      folder: the path at which its kernel is, too.
      kernel: the name of the kernel, where its own says it ("" if not).
      side: "a" has the inputs of the kernel, "b" its outputs.
      torch: it is stored as PyTorch does it, outputs first.
      partner: the path of the other one.
      sure: no other thing has such a name.
    """

    path: str
    folder: str
    kernel: str
    side: str
    torch: bool
    partner: str
    sure: bool

    def has_axis(self, *, reads: bool) -> bool:
        """Whether it has the channels; `reads`: they are what its kernel reads, not writes."""
        return self.side == ("a" if reads else "b")


def matrix(path: str) -> Matrix | None:
    """A path read as that of a low-rank matrix; None if it is none.

    >>> matrix("mlp/up/kernel_lora_a").folder, matrix("mlp/up/lora_B/weight").side
    ('mlp/up', 'b')
    """
    if ("lora" not in path and "adapter" not in path) or not (match := _NAME.fullmatch(path)):
        return None
    (at, end), side = match.span("side"), match["side"]
    return Matrix(
        path=path,
        folder=match["folder"] or "",
        kernel=match["kernel"] or "",
        side="a" if side in ("a", "A", "down") else "b",
        torch=match["inner"] == "weight" or (side.isupper() and match["inner"] is None),
        partner=path[:at] + _SIDES[side] + path[end:],
        sure=bool(match["lora"]) and not (match["in"] == "/" and len(side) > 1),
    )


def _fits(m: Matrix, leaves: Mapping[str, Any], kernel: tuple[int, ...]) -> bool:
    """Whether a matrix and its partner have the shapes of `A B` beside a kernel, for each stack."""
    own, other = (getattr(leaves.get(p), "shape", None) for p in (m.path, m.partner))
    if own is None or other is None or not len(own) == len(other) == len(kernel) > 1:
        return False
    a, b = (own, other) if m.side == "a" else (other, own)
    if not a[:-2] == b[:-2] == kernel[:-2]:
        return False
    d, f = sorted(kernel[-2:])
    for rank in {*a[-2:]} & {*b[-2:]}:
        ends = sum(a[-2:]) - rank, sum(b[-2:]) - rank
        # Between equal ends "down" and "up" may be a bottleneck, which reads what the kernel wrote.
        if sorted(ends) == [d, f] and rank <= d and (d != f or not _BOTTLENECK.search(m.path)):
            return True
    return False


def kernels(leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """The kernels (arrays of two dimensions or more) in each folder, or wrapped in it, by path."""
    found: dict[str, list[str]] = {}
    for path, leaf in leaves.items():
        if len(getattr(leaf, "shape", None) or ()) > 1 and not _is_matrix(path, leaves):
            folder = path.rpartition("/")[0]
            found.setdefault(folder, []).append(path)
            outer, _, last = folder.rpartition("/")
            if last in _WRAPPED:
                found.setdefault(outer, []).append(path)
    return found


def _is_matrix(path: str, leaves: Mapping[str, Any]) -> bool:
    m = matrix(path)
    return m is not None and (m.sure or m.partner in leaves)


def owner(name: str, candidates: Iterable[str]) -> str | None:
    """The kernel in a folder that something beside it belongs to; `name` is the kernel's, or "".

    >>> owner("w2", ["mlp/w1", "mlp/w2"]), owner("", ["up/kernel", "up/table"])
    ('mlp/w2', 'up/kernel')
    """
    by_name = {path.rpartition("/")[2]: path for path in candidates}
    if name in by_name:
        return by_name[name]
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    return next((by_name[n] for n in ("kernel", "weight") if n in by_name and not name), None)


Loras = Mapping[str, Sequence[tuple[Matrix, tuple[int, ...]]]]


def matrices(leaves: Mapping[str, Any]) -> Loras:
    """The low-rank matrices of a tree with their shapes, by the kernel that they are added to."""
    named = [m for m in map(matrix, leaves) if m is not None]
    found: dict[str, list[tuple[Matrix, tuple[int, ...]]]] = {}
    beside = kernels(leaves) if named else {}  # most trees have none
    for m in named:
        shape = getattr(leaves[m.path], "shape", None)
        kernel = owner(m.kernel, beside.get(m.folder, ()))
        if kernel is None or shape is None:
            continue
        if m.sure or _fits(m, leaves, tuple(leaves[kernel].shape)):
            found.setdefault(kernel, []).append((m, tuple(shape)))
    return found


def low_rank(kernel: Tensor, pair: Pair, loras: Loras, *, reads: bool) -> Iterator[Tensor]:
    """The matrices beside a kernel that have the axis of the pair.

    `reads`: the channels are what the kernel reads (a second layer, or another reader), not what
    it writes.
    """
    for m, shape in loras.get(kernel.path, ()):
        if m.has_axis(reads=reads):
            yield tensor_of(m, shape, kernel, pair)


def beside(sites: Iterable[Site], leaves: Mapping[str, Any]) -> Iterator[str]:
    """The matrices and magnitudes in a tree that have the axis of a site.

    Those too that stand apart from their kernels, below the same path in a collection of their own.
    """
    loras = matrices(leaves)
    owned = {m.path for own in loras.values() for m, _ in own}
    apart = [m for m in map(matrix, leaves) if m is not None and m.path not in owned]
    named = [(p, m["folder"] or "") for p in leaves if (m := _MAGNITUDE.fullmatch(p))]
    near = kernels(leaves) if named else {}
    magnitudes = {kernel: path for path, folder in named for kernel in near.get(folder, ())}
    for site in sites:
        for kernel in (*site.first, *site.also, *site.reading):
            reads = site.reads(kernel)
            folder = kernel.path.rpartition("/")[0].removeprefix("params/")
            own = [m for m, _ in loras.get(kernel.path, ())]
            own += [
                m
                for m in apart
                if folder and m.folder.endswith(f"/{folder}")
                if m.sure or _fits(m, leaves, kernel.shape)
            ]
            yield from (m.path for m in own if m.has_axis(reads=reads))
            if kernel.path in magnitudes and not reads:
                yield magnitudes[kernel.path]


def tensor_of(m: Matrix, shape: tuple[int, ...], kernel: Tensor, pair: Pair) -> Tensor:
    """A matrix with its pattern: a rank, and those dimensions of the kernel that have the axis.

    These may be joined into one. A stack comes first, or where the kernel has it.
    Raises `SiteShapeError` if the shape is no such pattern.
    """
    axis = pair.axis_in(kernel.axes.pattern)
    sizes = kernel.axes.sizes(kernel.shape)
    for pattern in _patterns(kernel.axes, {axis, *pair.inner}, first=(m.side == "b") != m.torch):
        try:
            names = {*Axes(pattern).names} - {axis, "rank"}
            axes = Axes(pattern, tuple((n, size) for n, size in sizes.items() if n in names))
            if axes.sizes(shape)[axis] == sizes[axis]:
                return Tensor(path=m.path, axes=axes, shape=shape)
        except AxisPatternError:
            continue
    raise SiteShapeError(
        "a low-rank matrix does not fit the kernel that it is added to",
        path=m.path,
        seen=shape,
        expected=f"a rank, and the {'inputs' if m.side == 'a' else 'outputs'} of {kernel.path} "
        f'{kernel.shape}, "{kernel.axes}"',
        mend="merge the adapter into the kernel first",
    )


def _patterns(kernel: Axes, names: set[str], *, first: bool) -> list[str]:
    """What the pattern of a matrix may be, likeliest first; `first`: its rank is likely to be."""
    own = kernel.only(names)
    joined = f"({' '.join(map(str, own.factors))})" if len(own.dimensions) > 1 else own.pattern
    orders = ("rank {}", "{} rank") if first else ("{} rank", "rank {}")
    flat = [order.format(inside) for order in orders for inside in (own.pattern, joined)]
    kept = {*own.dimensions, *((name,) for name in kernel.stack)}
    in_place = pattern_of([dim if dim in kept else ("rank",) for dim in kernel.dimensions])
    if not kernel.stack:
        return [*flat, in_place]
    return [in_place, *(" ".join((*kernel.stack, pattern)) for pattern in flat)]


def idle(path: str, leaves: Mapping[str, Any]) -> bool:
    """Whether the partner of a matrix is all zero, as B is before training: nothing is added."""
    m = matrix(path)
    partner = leaves.get(m.partner) if m else None
    return partner is not None and not _bits.set_anywhere(partner)
