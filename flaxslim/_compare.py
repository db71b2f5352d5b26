"""The distance between two arrays of outputs, in the presence of masked entries.

Some heads write sentinels among their outputs: BigBird's question answering subtracts 1e6 from
the logits of masked tokens, others put -inf or finfo.min there. Measured against a scale of 1e6,
an error of 1 in the real logits would pass for rounding. So such entries are measured against
themselves, and the scale is the largest of the others.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxslim._proof import OutputRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """An output of the first model, on the host, prepared for many comparisons."""

    path: str
    dtype: np.dtype
    values: np.ndarray
    masked: np.ndarray | None
    scale: float

    @property
    def inexact(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.inexact)


def reference(path: str, x: Any) -> Reference:
    """An output and its scale."""
    dtype, values = np.dtype(x.dtype), _wide(x)
    if not jnp.issubdtype(dtype, jnp.inexact) or np.isnan(values).any():
        return Reference(path=path, dtype=dtype, values=values, masked=None, scale=0.0)
    magnitudes = np.abs(values)
    mask = masked(magnitudes)
    scale = float(np.max(magnitudes, initial=0.0, where=~mask))
    return Reference(
        path=path, dtype=dtype, values=values, masked=mask if mask.any() else None, scale=scale
    )


def masked(magnitudes: np.ndarray) -> np.ndarray:
    """Which entries are sentinels, not results.

    Infinite ones, and each group at the top whose members agree to 1% (-1e6 plus a logit does),
    are at least 1e3, and stand a hundred times above all the rest. A rule by the median would
    miss them where a mask covers more than half of the entries.

    >>> masked(np.array([0.5, 3.0, 1e6 - 3, 1e6, np.inf])).tolist()
    [False, False, True, True, True]
    >>> masked(np.array([0.5, 3.0, 200.0])).any()
    np.False_
    """
    mask = np.isinf(magnitudes)
    while True:
        top = np.max(magnitudes, initial=0.0, where=~mask)
        group = magnitudes >= 0.99 * top
        others = np.max(magnitudes, initial=0.0, where=~(mask | group))
        if top < 1e3 or not 0 < others <= top / 100:
            return mask
        mask |= group


def compare(a: Reference, x: Any) -> OutputRow:
    """One row of the proof: `x`, an output of the second model, against the first one's."""
    difference, relative, fault = _distance(a, x)
    return OutputRow(
        path=a.path,
        shape=tuple(a.values.shape),
        dtype=str(a.dtype),
        largest=a.scale if a.inexact else float(np.max(np.abs(a.values), initial=0)),
        difference=difference,
        relative=relative,
        masked=0 if a.masked is None else int(a.masked.sum()),
        fault=fault,
    )


def _distance(a: Reference, x: Any) -> tuple[float, float, str | None]:
    if tuple(x.shape) != a.values.shape:
        return np.inf, np.inf, f"its shape is {a.values.shape} before and {tuple(x.shape)} after"
    b = _wide(x)
    if not a.inexact:
        equal = bool(np.array_equal(a.values, b))
        return float(np.max(np.abs(b - a.values), initial=0)), 0.0 if equal else np.inf, None
    if np.isnan(a.values).any():
        return np.inf, np.inf, "the model gives NaN on these inputs already before the cut"
    if np.isnan(b).any():
        return np.inf, np.inf, "NaN after, where there is none before"
    infinite = np.isinf(a.values) | np.isinf(b)
    if infinite.any() and not np.array_equal(a.values[infinite], b[infinite]):
        return np.inf, np.inf, "infinite values before and after are not the same"
    # Values at the opposite ends of the range differ by more than the range: infinity, rightly.
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.abs(b - a.values)
    if a.masked is None:
        largest, beside = float(np.max(distance, initial=0.0)), 0.0
    else:
        largest = float(np.max(distance, initial=0.0, where=~a.masked))
        finite = a.masked & ~infinite
        beside = float(np.max(distance[finite] / np.abs(a.values[finite]), initial=0.0))
    if largest == 0.0:
        return largest, beside, None
    return largest, max(largest / a.scale if a.scale else np.inf, beside), None


def _wide(x: Any) -> np.ndarray:
    """On the host, in a dtype in which a difference of two values is exact or nearly so."""
    y = np.asarray(x)
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        return y
    if jnp.issubdtype(y.dtype, jnp.floating):
        return y.astype(np.promote_types(np.float32, y.dtype), copy=False)
    return y.astype(np.int64)
