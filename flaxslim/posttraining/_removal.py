"""Greedy structured removal: which unit costs the least, given that all others make up for it.

A linear layer reads hidden values h (m of them) through a matrix W (m, o). With the Gram matrix
G = mean of h h^T and a ridge r, let H = G + r I. If the rows R of W must be zero and the others are
chosen best, the error tr((W' - W)^T H (W' - W)) becomes tr(W_R^T ((H^-1)_RR)^-1 W_R); and once they
are gone, the next one is found by the same formula with H^-1 and W brought up to date. That is
optimal brain surgeon, Hassibi and Stork 1993, for whole rows as in ZipLM, Kurtic et al. 2023
(arXiv 2302.04089), formula (2).

Only P = H^-1 and S = W W^T are needed to find the order, m x m each; W itself follows from the kept
rows in one solve (`flaxslim.posttraining._refit`). Removing row j changes them by products of
columns, which are gathered and applied a block at a time: the work is in matrix products.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import linalg

from flaxslim.errors import CalibrationError

_potri: Any = linalg.get_lapack_funcs("potri", dtype=np.float64)
_gemm: Any = linalg.get_blas_funcs("gemm", dtype=np.float64)
_BLOCK = 64
_DEAD = 0.15  # of the rows may be of units that are gone, before the matrices are made smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """Units in the order in which they go, and what has been lost once each is gone.

    Attributes:
      units: all units, the first to go first, `(u,)`.
      errors: the squared error of the output after it has gone, `(u,)`, rising.
    """

    units: np.ndarray
    errors: np.ndarray


def ridged(gram: np.ndarray, ridge: float) -> np.ndarray:
    """The Gram matrix with a ridge, relative to the mean of its diagonal."""
    mean = float(np.trace(gram)) / max(len(gram), 1)
    found = gram.copy()
    # Of values that are all zero any ridge will do, or there is no inverse.
    found[np.diag_indices(len(gram))] += ridge * mean if mean else 1.0
    return found


def inverse(matrix: np.ndarray, path: str | None = None) -> np.ndarray:
    """Of a symmetric positive matrix, by Cholesky."""
    try:
        if not np.isfinite(matrix).all():
            raise linalg.LinAlgError("not finite")
        factor = linalg.cholesky(matrix, check_finite=False)
        found, failed = _potri(factor, overwrite_c=True)
        if failed:
            raise linalg.LinAlgError(f"row {failed} is zero")
        found = np.triu(found)  # dpotri gives one triangle
        diagonal = np.diag(found).copy()
        found += found.T
        found[np.diag_indices(len(found))] = diagonal
        return found
    except linalg.LinAlgError as error:
        singular = error
    raise CalibrationError(
        "the Gram matrix of the hidden values cannot be inverted",
        path=path,
        seen=f"size {len(matrix)}, smallest diagonal {np.diag(matrix).min(initial=0):.3g}",
        expected="finite values, and a ridge above rounding",
        mend="give more calibration data, or a larger ridge=",
    ) from singular


def removal_order(
    gram: np.ndarray, w: np.ndarray, units: np.ndarray, *, ridge: float = 1e-2
) -> Order:
    """The greedy order of all units.

    Args:
      gram: `(m, m)`, the mean of h h^T (centred where a bias takes up the mean), float64.
      w: `(m, o)`.
      units: `(m,)`, the unit of each hidden value, ascending: `arange(m)`, or head by head.
      ridge: relative to the mean of the diagonal.

    Takes about 2 m^3 operations for single channels and memory of five `(m, m)` matrices.

    >>> gram = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> w = np.array([[1.0], [1.1], [1.0]])
    >>> removal_order(gram, w, np.arange(3), ridge=1e-6).units
    array([0, 2, 1])
    """
    w, own = np.asarray(w, np.float64), ridged(np.asarray(gram, np.float64), ridge)
    if len(units) == len(np.unique(units)):
        return _singles(inverse(own), w @ w.T)
    return _blocks(inverse(own), w, units)


def removal_errors(
    gram: np.ndarray, w: np.ndarray, units: np.ndarray, order: np.ndarray, *, ridge: float = 1e-2
) -> np.ndarray:
    """What has been lost once each unit of an order is gone, `(u,)`.

    Of P in that order, each leading block has the leading block of its Cholesky factor, so that one
    solve gives all of tr(W_R^T (P_RR)^-1 W_R).

    >>> gram = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> removal_errors(gram, np.ones((3, 1)), np.arange(3), np.array([2, 0, 1]), ridge=0).round(2)
    array([1.  , 1.02, 4.98])
    """
    p = inverse(ridged(np.asarray(gram, np.float64), ridge))
    rows = np.concatenate([np.flatnonzero(units == unit) for unit in order])
    factor = linalg.cholesky(p[np.ix_(rows, rows)], lower=True, check_finite=False)
    solved = linalg.solve_triangular(factor, np.asarray(w, np.float64)[rows], lower=True)
    return (solved * solved).sum(1).cumsum()[np.bincount(units)[order].cumsum() - 1]


def _singles(p: np.ndarray, s: np.ndarray) -> Order:
    alive = np.arange(len(p))
    gone = np.zeros(len(p), bool)
    order, errors = np.empty(len(p), int), np.empty(len(p))
    total, done = 0.0, 0
    while done < len(order):
        n, size = len(alive), min(_BLOCK, len(order) - done)
        d, q = np.diag(p).copy(), np.diag(s).copy()
        us, rs = np.empty((size, n)), np.empty((size, n))
        for b in range(size):
            costs = np.where(gone, np.inf, np.maximum(q, 0) / np.maximum(d, np.finfo(float).tiny))
            j = int(costs.argmin())
            root = np.sqrt(d[j])
            u = (p[j] - us[:b, j] @ us[:b]) / root
            r = (s[j] - us[:b, j] @ rs[:b] - rs[:b, j] @ us[:b]) / root
            r -= u * (costs[j] / 2)
            us[b], rs[b] = u, r
            d -= u * u
            q -= 2 * u * r
            gone[j] = True
            total += float(costs[j])
            order[done], errors[done] = alive[j], total
            done += 1
        _subtract(p, us, us)
        _subtract(s, np.concatenate([us, rs]), np.concatenate([rs, us]))
        if gone.sum() > n * _DEAD:
            left = np.flatnonzero(~gone)
            p, s = (x.take(left, 0).take(left, 1) for x in (p, s))
            alive, gone = alive[left], gone[left]
    return Order(units=order, errors=errors)


def _subtract(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """x -= a^T b in place, for a symmetric x: without a matrix of its size beside it."""
    _gemm(-1.0, a.T, b.T, beta=1.0, c=x.T, trans_b=True, overwrite_c=True)


def _blocks(p: np.ndarray, w: np.ndarray, units: np.ndarray) -> Order:
    """The same for units of several rows each, such as heads."""
    left = list(dict.fromkeys(units.tolist()))
    order, errors, total = [], [], 0.0
    w = w.copy()
    while left:
        costs = []
        for unit in left:
            own = np.flatnonzero(units == unit)
            costs.append(float((w[own] * np.linalg.solve(p[np.ix_(own, own)], w[own])).sum()))
        best = int(np.argmin(costs))
        own = np.flatnonzero(units == left[best])
        back = p[:, own] @ np.linalg.inv(p[np.ix_(own, own)])
        w -= back @ w[own]
        p = p - back @ p[own]
        rest = units != left[best]
        p, w, units = p[np.ix_(rest, rest)], w[rest], units[rest]
        total += costs[best]
        order.append(left.pop(best))
        errors.append(total)
    return Order(units=np.asarray(order), errors=np.asarray(errors))
