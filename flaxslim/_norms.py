"""Norms between the layers of a pair: of each channel alone, or over all of them.

A batch norm treats each channel alone, and is cut along with them. The mean and variance of a layer
norm run over the channels: when one goes, even one that nothing reads, all others change.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from flaxslim._roots import table_path
from flaxslim._spec import Site, Tensor
from flaxslim.errors import SpecError

PER_CHANNEL = (nnx.BatchNorm, nnx.InstanceNorm)
_OVER_ALL = (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)

# What trees call them: "LayerNorm_0/scale", "ln_1/bias". A batch norm has statistics beside.
_NAMED = re.compile(
    r"(.*/)?(?!\w*(batch|instance))(?P<norm>\w*norm\w*|(\w*_)?ln(_\w+|\d+)?)"
    r"/(scale|bias|weight|gamma|beta)",
    re.IGNORECASE,
)
_STATISTICS = re.compile(r".*(mean|var|variance)")


def refuse_norms(site: Site, nodes: Mapping[str, Any]) -> None:
    """Raise `SpecError` if a norm over all channels of a site would be cut; `nodes` are of nnx."""
    found = next(_over_all(site, nodes), None)
    if found is not None:
        raise SpecError(
            "a norm over the channels stands between the layers of a pair: without one of them "
            "its mean or variance is another",
            path=found,
            seen=f"beside {site.second.path}, with {site.size} {site.pair.unit}",
            mend="no channel of this pair can go exactly: leave it out of the spec; if it is a "
            "norm of each channel alone, name its statistics, too: "
            'Pair(tables={"batch_stats:norm/mean": "f", ...})',
        )


def _over_all(site: Site, nodes: Mapping[str, Any]) -> Iterator[str]:
    known = {table_path(site.root, name) for name in site.pair.tables}
    folders = {path.rpartition("/")[0] for path in known if path and _STATISTICS.fullmatch(path)}
    # Statistics of Linen lie in a collection of their own.
    folders |= {f"params/{folder.partition('/')[2]}" for folder in folders}
    for tensor in site.cut:
        folder = tensor.path.rpartition("/")[0]
        if isinstance(node := nodes.get(folder), _OVER_ALL):
            yield tensor.path
        elif tensor.path in known and not isinstance(node, PER_CHANNEL) and folder not in folders:
            heads = site.pair.axis == "h"  # of which each may have a norm of its own
            alone = heads and len(_beside_axis(tensor, site.axis(tensor))) == 1
            if _NAMED.fullmatch(tensor.path) and not alone:
                yield tensor.path
    yield from norms_beside(nodes, site, _OVER_ALL) if site.pair.axis == "f" else ()


def _beside_axis(tensor: Tensor, axis: str) -> tuple[Any, ...]:
    return tensor.axes.dimensions[tensor.axes.dimension(axis)]


def norms_beside(nodes: Mapping[str, Any], site: Site, kinds: tuple[type, ...]) -> Iterator[str]:
    """Norms beside the layers of a site with as many features as it has channels, not cut along.

    Where the layers have so many inputs or outputs as well, nobody can tell whose norm it is.
    """
    around = {tensor.path.rpartition("/")[0].rpartition("/")[0] for tensor in site.cut}
    kernels = (*site.first, site.second)
    if any(n == site.size for t in kernels for n in _others(t, site.axis(t))):
        return
    for at, node in nodes.items():
        if at.rpartition("/")[0] in around and isinstance(node, kinds):
            shapes = [getattr(value, "shape", None) for value in vars(node).values()]
            if (site.size,) in (*shapes, (_features(node),)):
                yield at


def _features(norm: Any) -> int | None:
    """How many features a norm has; a group norm does not say it in one number."""
    if isinstance(norm, nnx.GroupNorm):
        return norm.num_groups * norm.group_size
    return getattr(norm, "num_features", None)


def _others(tensor: Tensor, axis: str) -> list[int]:
    """The sizes of the axes of a tensor but for one."""
    return [n for name, n in tensor.axes.sizes(tensor.shape).items() if name != axis]
