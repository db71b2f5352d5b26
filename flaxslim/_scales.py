"""Scales and zero points beside a quantised kernel: they are cut where they run along its axis.

A scale has the dimensions of its kernel, each of them whole, 1, or in blocks; or it has some of
them alone.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim._axes import pattern_of
from flaxslim._plan import Cut
from flaxslim._spec import Site, Tensor
from flaxslim.errors import PlanError

# Tensors that quantised kernels come with; what stands before may be the name of the kernel.
COMPANION = re.compile(
    r"(?:(?P<kernel>.*)_)?"
    r"(?:scales?|scale_inv|q?zeros|zero_points?|g_idx|absmax|quant_map|SCB)",
    re.IGNORECASE,
)

# What stands below the path of a kernel if the array itself is a tree (qwix).
PART = re.compile(r"(?P<kernel>.+?)/(?:array/)?(?P<part>qvalue|scale|zero_point)")


def beside(sites: Sequence[Site], leaves: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Site]]:
    """The tensors in the folder of a kernel that is cut which no spec names, with that kernel."""
    known = {t.path for site in sites for t in site.tensors}
    others: dict[str, list[str]] = {}
    for path in leaves:
        if path not in known:
            others.setdefault(path.rpartition("/")[0], []).append(path)
    for site in sites:
        for t in site.cut:
            if len(t.shape) > 1:
                for path in others.get(t.path.rpartition("/")[0], ()):
                    yield path, t, site


def companions(sites: Sequence[Site], leaves: Mapping[str, Any]) -> Iterator[str]:
    """The scales and the like in the folder of a kernel that is cut, which no spec names.

    Beside kernels of wide floats that share a folder, in which anything may lie, a scale has the
    name of its kernel in front ("w1_scale").
    """
    paths = {t.path for site in sites for t in site.cut if len(t.shape) > 1}
    kernels = Counter(path.rpartition("/")[0] for path in paths)
    for path, kernel, _ in beside(sites, leaves):
        folder, _, name = path.rpartition("/")
        if (match := COMPANION.fullmatch(name)) is None:
            continue
        narrow = np.dtype(leaves[kernel.path].dtype).itemsize == 1
        if narrow or kernels[folder] == 1 or match["kernel"] == kernel.path.rpartition("/")[2]:
            yield path


def tensor_of(path: str, shape: tuple[int, ...], kernel: Tensor, cut: Cut) -> Tensor | None:
    """A scale with its pattern; None for one that does not run along the axis of the cut.

    Raises `PlanError` if it cannot be cut, or if its shape does not tell.
    """
    if math.prod(shape) == 1 or path.endswith("quant_map"):  # one for all; a table of values
        return None
    number = kernel.axes.dimension(cut.site.axis(kernel))
    if len(shape) == len(kernel.shape):
        dims: Sequence[int] = range(len(shape)) if shape[number] > 1 else ()
        if shape[number] not in (1, kernel.shape[number]):
            raise PlanError(
                "a scale holds for blocks of channels, so that single ones cannot be cut",
                path=path,
                seen=f"{shape[number]} blocks for {kernel.shape[number]} channels of {kernel.path}",
                mend="dequantise first, or quantise again after the cut",
            )
    else:
        dims = _some(path, shape, kernel, number)
    if number not in dims:
        return None
    pattern = [
        pattern_of([kernel.axes.dimensions[i]]) if size == kernel.shape[i] else f"x{i}"
        for i, size in zip(dims, shape, strict=True)
    ]
    axes = dataclasses.replace(kernel.axes, pattern=" ".join(pattern))
    if cut.site.rows > 1 and {*cut.site.second.axes.stack} - {*axes.names}:
        raise PlanError(
            "a scale is shared by layers of a stack, which lose different channels",
            path=path,
            seen=f"shape {shape} beside {kernel.path} {kernel.shape}",
            expected="a scale for each layer",
            mend="quantise again after the cut",
        )
    return Tensor(path=path, axes=axes, shape=shape)


def _some(path: str, shape: tuple[int, ...], kernel: Tensor, number: int) -> tuple[int, ...]:
    """The dimensions of the kernel that a scale has which has fewer."""
    ways = [
        dims
        for dims in itertools.combinations(range(len(kernel.shape)), len(shape))
        if tuple(kernel.shape[i] for i in dims) == shape
    ]
    if ways and (len(ways) == 1 or not any(number in dims for dims in ways)):
        return ways[0]
    raise PlanError(
        "a scale could belong to several dimensions of its kernel"
        if ways
        else "a scale does not fit its kernel",
        path=path,
        seen=f"shape {shape} beside {kernel.path} {kernel.shape}",
        expected="as many dimensions as the kernel has, such as (1, outputs)",
        mend="reshape it so, or quantise again after the cut",
    )
