"""The second layer, refitted on the channels that stay."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import linalg

from flaxslim._spec import Site, Tensor
from flaxslim.posttraining._capture import inner_axes

_ROUNDING = 1e-5


def matrix(site: Site, leaf: Any, tensor: Tensor | None = None) -> np.ndarray:
    """A kernel that reads the channels as `(s, m, o)`, float64; `m` as in `_capture.hidden`."""
    axes, order, shape = _arranged(site, tensor or site.second)
    y = np.asarray(leaf).astype(np.float64).reshape(shape).transpose(order)
    m = math.prod(axes.sizes(np.shape(leaf))[name] for name in inner_axes(site))
    return y.reshape(site.rows, m, -1)


def read_matrix(site: Site, leaves: Mapping[str, Any]) -> np.ndarray:
    """All kernels that read the channels side by side, `(s, m, o)`, float64."""
    own = [matrix(site, leaves[tensor.path], tensor) for tensor in site.reading]
    return np.concatenate(own, axis=-1)


def kernels(site: Site, w: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `read_matrix`: each kernel in its own shape, by path."""
    widths = [math.prod(t.shape) // (w.shape[0] * w.shape[1]) for t in site.reading]
    parts = np.split(w, np.cumsum(widths)[:-1], axis=-1)
    return {t.path: kernel(site, part, t) for t, part in zip(site.reading, parts, strict=True)}


def kernel(site: Site, w: np.ndarray, tensor: Tensor | None = None) -> np.ndarray:
    """The inverse of `matrix`: the kernel in its own shape, float64."""
    tensor = tensor or site.second
    _, order, shape = _arranged(site, tensor)
    y = w.reshape([shape[i] for i in order]).transpose(np.argsort(order))
    return y.reshape(tensor.shape)


def _arranged(site: Site, tensor: Tensor) -> tuple[Any, list[int], list[int]]:
    axes = tensor.axes
    sizes = axes.sizes(tensor.shape)
    front = [axes.position(name) for name in (*axes.stack, *inner_axes(site))]
    order = [*front, *(i for i in range(len(axes.factors)) if i not in front)]
    return axes, order, [f if isinstance(f, int) else sizes[f] for f in axes.factors]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """What a row of a site reads, in the mean over samples; `x` is read, `y` was by the dense one.

    Attributes:
      xx: `(m, m)`, mean of x x^T.
      xy: `(m, m)`, mean of x y^T; None where both are the same.
      yy: `(m, m)`, mean of y y^T.
      x, y: `(m,)`, the means.
      count: of samples.
    """

    xx: np.ndarray
    x: np.ndarray
    count: int
    xy: np.ndarray | None = None
    y: np.ndarray | None = None
    yy: np.ndarray | None = None

    def joined(self, other: "Moments") -> "Moments":
        """Of the samples of both."""
        total = self.count + other.count
        a, b = self.count / max(total, 1), other.count / max(total, 1)

        def mean(x: Any, y: Any) -> Any:
            if x is None:
                return None
            found = b * y
            found += a * x
            return found

        return Moments(
            xx=mean(self.xx, other.xx),
            x=mean(self.x, other.x),
            count=total,
            xy=mean(self.xy, other.xy),
            y=mean(self.y, other.y),
            yy=mean(self.yy, other.yy),
        )

    def centred(self) -> "Moments":
        """About the means, which a bias takes up.

        The diagonal is raised by as much as sums in float32 may be wrong, so that values that do
        not vary at all leave no negative variance.
        """
        y = self.x if self.y is None else self.y
        xx = self.xx - np.outer(self.x, self.x)
        xx[np.diag_indices(len(xx))] += _ROUNDING * np.diag(self.xx)
        return dataclasses.replace(
            self,
            xx=xx,
            xy=None if self.xy is None else self.xy - np.outer(self.x, y),
            yy=None if self.yy is None else self.yy - np.outer(y, y),
        )


def refit(moments: Moments, w: np.ndarray, kept: np.ndarray, *, ridge: float) -> np.ndarray:
    """`(m, o)`: rows of `kept` that come nearest to what all rows of `w` give; the others zero.

    Minimises mean |x W' - y W|^2 + r |W' - W|^2 over the rows that are kept, r being `ridge` times
    the mean of the diagonal of `xx`.

    >>> xx = np.array([[1.0, 1.0], [1.0, 1.0]])
    >>> refit(Moments(xx=xx, x=np.zeros(2), count=9), np.ones((2, 1)), np.array([0]), ridge=0.0)
    array([[2.],
           [0.]])
    """
    new = np.zeros_like(w)
    if not len(kept):
        return new
    xy = moments.xx if moments.xy is None else moments.xy
    own = moments.xx[np.ix_(kept, kept)]
    lacking = xy[kept] @ w - own @ w[kept]
    mean = float(np.trace(moments.xx)) / len(moments.xx)
    own[np.diag_indices(len(own))] += ridge * mean if mean else 1.0
    new[kept] = w[kept] + linalg.cho_solve(
        linalg.cho_factor(own, lower=True, overwrite_a=True), lacking
    )
    return new


def error(moments: Moments, w: np.ndarray, new: np.ndarray) -> float:
    """mean |x W' - y W|^2."""
    if moments.xy is None or moments.yy is None:
        change = new - w
        return float((change * (moments.xx @ change)).sum())
    return float(
        (new * (moments.xx @ new)).sum()
        - 2 * (new * (moments.xy @ w)).sum()
        + (w * (moments.yy @ w)).sum()
    )


def energy(moments: Moments, w: np.ndarray) -> float:
    """mean |y W|^2, to which an error is relative."""
    yy = moments.xx if moments.yy is None else moments.yy
    return float((w * (yy @ w)).sum())
