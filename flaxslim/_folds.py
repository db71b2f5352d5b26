"""What the constants of channels that go add to the second bias."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxslim import _mesh
from flaxslim._axes import WINDOW
from flaxslim._dead import Evidence
from flaxslim._spec import Site


def added_by_constants(
    seen: Evidence, site: Site, second: Any, bias: Any, folded: np.ndarray
) -> np.ndarray:
    """What the folded channels, `(s, f)` of bool, add to the second bias: float64, of its shape.

    The sum over folded j of constant_j * row_j, one for each index of the stacked axes.
    """
    assert site.second_bias is not None
    axes, pair, stack = site.second.axes, site.pair, site.second.axes.stack
    value = site.first_biases[0]
    inside = [n for n in (value.axes if value else axes).names if n in pair.inner]
    inside = [n for n in inside if n not in (pair.axis, pair.group)]
    beside = axes.dimensions[axes.dimension(pair.axis)]  # summed over with the channels
    inside += [
        n for n in axes.names if n in WINDOW or (n in beside and n not in (pair.axis, *inside))
    ]
    front = [axes.position(name) for name in (*stack, pair.axis, *inside)]
    out = [i for i in range(len(axes.factors)) if i not in front]
    constants = np.where(folded[..., None], seen.constants, 0.0)
    if _mesh.on_mesh(second):
        added = _added_on_mesh(site, second, constants, inside)
    else:
        channels = np.flatnonzero(folded.any(axis=0))
        rows = axes.split(axes.take(second, pair.axis, channels))
        rows = np.asarray(rows).astype(np.float64).transpose([*front, *out])
        sizes = rows.shape[len(front) :]
        rows = rows.reshape(site.rows, len(channels), -1, math.prod(sizes))
        constants = np.broadcast_to(constants[:, channels], rows.shape[:3])
        added = np.einsum("sfm,sfmo->so", constants, rows).reshape(*site.stack, *sizes)
    have = [*stack, *(axes.factors[i] for i in out)]
    want = list(site.second_bias.axes.factors)
    return added.transpose([have.index(name) for name in want]).reshape(bias.shape)


def _added_on_mesh(
    site: Site, second: Any, constants: np.ndarray, inside: Sequence[str]
) -> np.ndarray:
    """Constants `(s, f, m)` times the rows of a kernel in shards: the stack, then what is left."""
    axes, stack = site.second.axes, site.second.axes.stack
    sizes = axes.sizes(second.shape)
    names = (*stack, site.pair.axis, *inside)
    whole = [sizes[name] for name in names]
    values = np.broadcast_to(
        constants, (*constants.shape[:2], math.prod(whole[len(stack) + 1 :]))
    ).reshape(whole)
    order = [names.index(factor) for factor in axes.factors if factor in names]
    ones = [sizes[f] if isinstance(f, str) and f in names else 1 for f in axes.factors]
    values = values.transpose(order).reshape(ones)
    at, shape = 0, []
    for dim in axes.dimensions:
        shape.append(math.prod(ones[at : at + len(dim)]))
        at += len(dim)
    over = [axes.position(name) for name in names if name not in stack]
    added = axes.reduced(_mesh.PRODUCTS, second, over, values.reshape(shape))
    left = [factor for factor in axes.factors if factor not in names or factor in stack]
    front = [left.index(name) for name in stack]
    return added.transpose([*front, *(i for i in range(len(left)) if i not in front)])
