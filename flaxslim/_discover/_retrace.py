"""Whether a function computes the same at another width: is there a number that follows from it?

A mean over channels divides by how many there are, and the trace shows a mere number. So the
function is traced again at other widths, where it can be, and the two traces are compared.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim._discover._atoms import Dims, roots
from flaxslim._discover._groups import Group
from flaxslim._discover._place import Place
from flaxslim._errors import DiscoveryError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the trace at another width is another function."""

    why: str
    place: Place


def other_shapes(
    dims: Mapping[str, Dims], groups: Sequence[Group]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shapes of the tensors of some groups, each cut to another size, and these sizes."""
    sizes = {group.atom: smaller(group.size) for group in groups}
    shapes = {
        path: tuple(math.prod(sizes.get(a, a.size) for a in roots(dim)) for dim in dims[path])
        for group in groups
        for path in group.paths
    }
    return shapes, {str(group.size): sizes[group.atom] for group in groups}


def smaller(size: int) -> int:
    """Another width: half of it, which is what a class most likely bears."""
    return size // 2 if size % 2 == 0 else size - 1


def difference(one: Any, other: Any) -> Difference | None:
    """Where two jaxprs differ in more than sizes."""
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
        for x, y in zip(_numbers(a), _numbers(b), strict=False):
            if not (x == y or (np.isnan(x) and np.isnan(y))):
                why = f"a number in it follows from its size: {x:g} becomes {y:g}"
                return Difference(why=why, place=place)
        for inner, outer in zip(_jaxprs(a.params), _jaxprs(b.params), strict=False):
            if (found := difference(inner, outer)) is not None:
                return found
    return None


def _numbers(eqn: Any) -> Iterator[float]:
    """The numbers that are part of an equation."""
    for var in eqn.invars:
        value = getattr(var, "val", None)
        if value is not None and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf":
            yield float(value)
    if eqn.primitive.name == "integer_pow":
        yield float(eqn.params["y"])


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield one


def checked(function: Any, closed: Any, dims: Mapping[str, Dims], groups: Sequence[Group]) -> Any:
    """The `Difference` at another width of groups, if any; a `DiscoveryError` if it cannot run."""
    shapes, _ = other_shapes(dims, groups)
    try:
        return difference(closed, function.jaxpr(shapes))
    except DiscoveryError as error:
        return error
