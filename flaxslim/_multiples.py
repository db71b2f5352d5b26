"""What widths are to be multiples of: as is wished, and as the mesh of their arrays asks."""

import dataclasses
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _mesh
from flaxslim._plan import Cut
from flaxslim._spec import Site, Tensor
from flaxslim._widths import HEADS, multiple_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiples:
    """What the numbers of a site are to be multiples of: its channels, its key/value groups."""

    channels: int = 1
    groups: int = 1


def on_mesh(
    site: Site, leaves: Mapping[str, Any], beside: Mapping[str, Sequence[Any]] | None = None
) -> Multiples:
    """What a mesh asks of the widths of a site, by its tensors and by other arrays in their shapes.

    Each of these keeps its `PartitionSpec`, and a channel stays whole on one device if it was so.
    """
    found = dict.fromkeys((site.pair.axis, site.pair.group), 1)
    for tensor in site.cut:
        axis = site.axis(tensor)
        for x in (leaves[tensor.path], *(beside or {}).get(tensor.path, ())):
            if _mesh.on_mesh(x) and np.shape(x) == tensor.shape:
                found[axis] = math.lcm(found[axis], _of(x, tensor, axis))
    return Multiples(channels=found[site.pair.axis], groups=found.get(site.pair.group, 1))


def _of(x: Any, tensor: Tensor, axis: str) -> int:
    axes, sizes = tensor.axes, tensor.axes.sizes(tensor.shape)
    number = axes.dimension(axis)
    dim = axes.dimensions[number]
    factors = [f if isinstance(f, int) else sizes[f] for f in dim]
    outer, inner = math.prod(factors[: dim.index(axis)]), math.prod(factors[dim.index(axis) + 1 :])
    count = _mesh.shards(x, number)
    whole = x.shape[number] // count % max(inner, 1) == 0
    return count // math.gcd(count, outer if whole else outer * inner)


def common(
    sites: Iterable[Site],
    multiple_of: int | Mapping[str, int],
    asked: Mapping[str, Multiples],
) -> Multiples:
    """For sites of one width: as is wished, and as a mesh asks, by the paths of second kernels."""
    sites = list(sites)
    own = [asked[site.second.path] for site in sites]
    return Multiples(
        channels=math.lcm(
            *(multiple_for(site, multiple_of) for site in sites), *(m.channels for m in own)
        ),
        groups=math.lcm(*(m.groups for m in own)),
    )


def with_mesh(
    multiple_of: int | Mapping[str, int], sites: Iterable[Site], leaves: Mapping[str, Any]
) -> int | Mapping[str, int]:
    """A wish that says what the mesh asks, too, site by site; heads all alike."""
    sites = list(sites)
    asked = {site.second.path: on_mesh(site, leaves) for site in sites}
    if all(m == Multiples() for m in asked.values()):
        return multiple_of
    found = {"f": multiple_of} if isinstance(multiple_of, int) else dict(multiple_of)
    for site in sites:
        own = common([site], multiple_of, asked)
        name = HEADS if site.pair.axis == HEADS else glob.escape(site.root)
        number = math.lcm(own.channels, own.groups * max(site.groups, default=1))
        found[name] = math.lcm(found.get(name, 1), number)
    return found


def notes(cuts: Iterable[Cut], asked: Mapping[str, Multiples]) -> list[str]:
    """Notes on why dead channels may have stayed."""
    found = [
        f"{cut.site.pair.unit} stay in multiples of {multiple}, as the mesh splits them"
        for cut in cuts
        if cut.removed < cut.dead and (multiple := asked[cut.site.second.path].channels) > 1
    ]
    return list(dict.fromkeys(found))
