"""Whether a function computes the same at another width: is there a number that follows from it?

A mean over channels divides by how many there are, and the trace shows a mere number. So the
function is traced again at other widths, where it can be, and the two traces are compared: the
numbers in them, and along which axes they look. An axis that has become shorter, and is not that of
the channels, tells how many there are to whatever sums it or picks from it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim._discover._atoms import Atom, Dims, roots
from flaxslim._discover._function import Walked, walked
from flaxslim._discover._groups import Group
from flaxslim._discover._place import Place
from flaxslim._discover._trace import is_readable
from flaxslim.errors import DiscoveryError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the trace at another width is another function."""

    why: str
    place: Place


Sizes = Mapping[Atom, int]
_NOWHERE = Place(primitive="")  # an output is no operation


def other_shapes(
    dims: Mapping[str, Dims], groups: Sequence[Group], sizes: Sizes
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of some groups, each cut to another size."""
    return {
        path: tuple(math.prod(sizes.get(a, a.size) for a in roots(dim)) for dim in dims[path])
        for group in groups
        for path in group.paths
    }


def smaller(size: int) -> int:
    """Another width: half of it, which is what a class most likely bears."""
    return size // 2 if size % 2 == 0 else size - 1


def odd(size: int) -> int:
    """A width that shares no factor with it: what follows from it modulo a number shows here."""
    return size - 1


def difference(one: Any, other: Any) -> Difference | None:
    """Where two jaxprs differ in more than sizes."""
    for x, y in zip(getattr(one, "consts", ()), getattr(other, "consts", ()), strict=False):
        if _differ(x, y):
            why = "an array in the code follows from its size"
            return Difference(why=why, place=Place(primitive="a closed-over array"))
    one, other = getattr(one, "jaxpr", one), getattr(other, "jaxpr", other)
    if len(one.eqns) != len(other.eqns):
        place = Place(primitive="the function")
        for a, b in zip(one.eqns, other.eqns, strict=False):
            if a.primitive.name != b.primitive.name:
                place = Place(primitive=a.primitive.name, source=a.source_info)
                break
        return Difference(why="it takes another number of operations at another size", place=place)
    for a, b in zip(one.eqns, other.eqns, strict=True):
        place = Place(primitive=a.primitive.name, source=a.source_info)
        if a.primitive.name != b.primitive.name:
            why = f"it is a {b.primitive.name} instead at another size"
            return Difference(why=why, place=place)
        for x, y in zip(_values(a), _values(b), strict=False):
            if _differ(x, y):
                numbers = f": {x:g} becomes {y:g}" if np.ndim(x) == np.ndim(y) == 0 else ""
                why = f"a number in it follows from its size{numbers}"
                return Difference(why=why, place=place)
        if any(a.params.get(key) != b.params.get(key) for key in _AXES):
            return Difference(why="it goes along another axis at another size", place=place)
        if a.primitive.name == "slice" and _moves(a, b):
            return Difference(why="the range that it takes follows from its size", place=place)
        for inner, outer in zip(_jaxprs(a.params), _jaxprs(b.params), strict=False):
            if (found := difference(inner, outer)) is not None:
                return found
    for a, b in zip(one.outvars, other.outvars, strict=False):
        x, y = (getattr(var, "val", None) for var in (a, b))
        if None not in (x, y) and _differ(x, y):
            return Difference(why="a number that it returns follows from its size", place=_NOWHERE)
    return None


def _values(eqn: Any) -> Iterator[Any]:
    """The numbers that are part of an equation, and the arrays."""
    for var in eqn.invars:
        value = getattr(var, "val", None)
        if value is not None and is_readable(value) and np.asarray(value).dtype.kind in "biuf":
            yield np.asarray(value) if np.ndim(value) else float(value)
    params = eqn.params
    for name in _NUMBERS.get(eqn.primitive.name, ()):
        yield np.asarray(params[name], float) if np.ndim(params[name]) else float(params[name])


def _moves(one: Any, other: Any) -> bool:
    """Whether a slice is another one of an axis that is as it was: it then follows from others."""
    keys = ("start_indices", "limit_indices")
    ranges = [
        (eqn.invars[0].aval.shape, *(eqn.params[key] for key in keys)) for eqn in (one, other)
    ]
    axes = [list(zip(*each, strict=True)) for each in ranges]
    return any(a[0] == b[0] and a != b for a, b in zip(*axes, strict=True))


# Those that say along which axes it goes.
_AXES = (
    "axes",
    "axis",
    "dimension",
    "dimensions",
    "permutation",
    "broadcast_dimensions",
    "reverse",
)

# The parameters of primitives that are numbers, and not the sizes of what comes out.
_NUMBERS = {
    "integer_pow": ("y",),
    "scan": ("length",),
    "conv_general_dilated": ("window_strides", "padding", "lhs_dilation", "rhs_dilation"),
    "pad": ("padding_config",),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"),
    ),
}


def _differ(one: Any, other: Any) -> bool:
    """Whether numbers or arrays differ, where both have entries."""
    if not (is_readable(one) and is_readable(other)):
        return False  # random keys
    one, other = np.asarray(one), np.asarray(other)
    if one.ndim != other.ndim or "biuf".find(one.dtype.kind) < 0:
        return one.ndim != other.ndim
    shared = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return not np.array_equal(one[shared], other[shared], equal_nan=one.dtype.kind == "f")


def _split(one: Walked, other: Walked, groups: Sequence[Group], sizes: Sizes) -> Difference | None:
    """Where an axis falls into other factors: with two heads of four, not with one of four."""
    for group in groups:
        for path, number in group.factors:
            expected = [sizes.get(a, a.size) for a in roots(one.dims[path][number])]
            found = [atom.size for atom in roots(other.dims[path][number])]
            if [size for size in expected if size != 1] != found:
                why = f"at another size {path} is taken apart otherwise"
                return Difference(why=why, place=group.sums[0].place)
    return None


def _counted(one: Walked, other: Walked, groups: Sequence[Group]) -> Difference | None:
    """Where something is looked along that is as long as the channels, and not these themselves."""
    own = {group.atom for group in groups}
    for (dim, size, place), (_, now, _) in zip(one.walk.looked, other.walk.looked, strict=False):
        if size != now and own.isdisjoint(roots(dim)):
            why = f"it looks along an axis that follows from its size: {size} becomes {now}"
            return Difference(why=why, place=place)
    return None


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield one


def checked(seen: Walked, groups: Sequence[Group]) -> Difference | DiscoveryError | None:
    """The `Difference` at another width of groups, if any; a `DiscoveryError` if it cannot run.

    At a second width, which fewer functions bear, that it cannot run says nothing.
    """
    found = _at(seen, groups, smaller)
    if found is None and any(smaller(g.size) != odd(g.size) for g in groups):
        again = _at(seen, groups, odd)
        found = again if isinstance(again, Difference) else None
    return found


def _at(
    seen: Walked, groups: Sequence[Group], change: Callable[[int], int]
) -> Difference | DiscoveryError | None:
    """What a trace shows at other widths of groups: see `checked`."""
    sizes = {group.atom: change(group.size) for group in groups}
    try:
        other = walked(seen.function, other_shapes(seen.dims, groups, sizes))
    except DiscoveryError as error:
        return error
    found = difference(seen.closed, other.closed)
    if found is None and seen.closed.out_avals != other.closed.out_avals:
        return Difference(why="the shape of an output follows from its size", place=_NOWHERE)
    if found is None:
        found = _split(seen, other, groups, sizes)
    return found if found is not None else _counted(seen, other, groups)
