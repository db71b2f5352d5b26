"""Along which axes an equation looks at more than one entry."""

from flaxslim._discover._rules._elementwise import ELEMENTWISE, IDENTITY, OTHER_NUMBERS, RANDOM
from flaxslim._discover._rules._indexing import SCATTER
from flaxslim._discover._trace import Equation

_KEEP = (
    "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "concatenate", "stack",
    "tile", "rev", "pad", "iota", "dynamic_update_slice", "cumsum", "cumprod", "cummax", "cummin",
    "cumlogsumexp", "sort", "fft",
)  # fmt: skip

_AXES_STAY = frozenset((*ELEMENTWISE, *IDENTITY, *OTHER_NUMBERS, *RANDOM, *_KEEP, *SCATTER))


def looked_along(e: Equation) -> list[tuple[int, int]]:
    """The axes, as (input, axis), of which something other than an axis comes out.

    Their entries are summed, or some are picked: what comes out may tell how many there were.
    """
    p, shapes = e.params, e.in_shapes
    if e.name in _AXES_STAY:
        return []
    if e.name == "dot_general":
        (left, right), _ = p["dimension_numbers"]
        return [*((0, i) for i in left), *((1, i) for i in right)]
    if e.name in ("slice", "dynamic_slice"):
        sizes = zip(shapes[0], e.shapes[0], strict=True)
        return [(0, i) for i, (before, after) in enumerate(sizes) if before != after]
    if e.name == "gather":
        picked = p["dimension_numbers"].start_index_map
        whole = zip(shapes[0], p["slice_sizes"], strict=True)
        return [(0, i) for i, (a, b) in enumerate(whole) if a != b or i in picked]
    if e.name in ("split", "unstack"):
        return [(0, p["axis"])]
    if e.name.startswith(("reduce_", "arg")) and "axes" in p:
        return [(0, i) for i in p["axes"]]
    return [(at, axis) for at, shape in enumerate(shapes) for axis in range(len(shape))]
