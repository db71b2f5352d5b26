"""Greedy removal against the definition, solved anew for every candidate; and the refits."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from strategies import quick

from flaxslim.errors import CalibrationError
from flaxslim.posttraining import _fisher, _removal
from flaxslim.posttraining._refit import Moments, error, refit
from flaxslim.posttraining._removal import removal_errors, removal_order, ridged


def _data(seed: int, m: int, o: int, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, m)) @ rng.normal(size=(m, m))
    return h, h.T @ h / n, rng.normal(size=(m, o))


def _least(hessian: np.ndarray, w: np.ndarray, gone: list[int]) -> float:
    """The least error with these rows zero: by solving for all others."""
    kept = [j for j in range(len(w)) if j not in gone]
    new = np.zeros_like(w)
    if kept:
        new[kept] = w[kept] + np.linalg.solve(
            hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, gone)] @ w[gone]
        )
    change = new - w
    return float((change * (hessian @ change)).sum())


@pytest.mark.parametrize("block", [1, 3, 64])
@quick
@hypothesis.given(seed=st.integers(0, 10**6), m=st.integers(1, 9), o=st.integers(1, 4))
def test_each_step_takes_what_costs_least(block, seed, m, o):
    _, gram, w = _data(seed, m, o)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_removal, "_BLOCK", block)
        found = removal_order(gram, w, np.arange(m), ridge=1e-2)
    hessian, gone = ridged(gram, 1e-2), []
    for unit, total in zip(found.units.tolist(), found.errors.tolist(), strict=True):
        left = [j for j in range(m) if j not in gone]
        errors = {j: _least(hessian, w, [*gone, j]) for j in left}
        np.testing.assert_allclose(errors[unit], min(errors.values()), rtol=1e-6, atol=1e-9)
        gone.append(unit)
        np.testing.assert_allclose(total, _least(hessian, w, gone), rtol=1e-6, atol=1e-9)
    assert sorted(gone) == list(range(m))


@quick
@hypothesis.given(seed=st.integers(0, 10**6), heads=st.integers(1, 5), k=st.integers(2, 3))
def test_heads_go_as_a_whole(seed, heads, k):
    _, gram, w = _data(seed, heads * k, 3)
    units = np.repeat(np.arange(heads), k)
    found = removal_order(gram, w, units, ridge=1e-2)
    hessian, gone = ridged(gram, 1e-2), []
    for unit, total in zip(found.units.tolist(), found.errors.tolist(), strict=True):
        left = [u for u in range(heads) if u not in gone]
        errors = {
            u: _least(hessian, w, np.flatnonzero(np.isin(units, [*gone, u])).tolist()) for u in left
        }
        np.testing.assert_allclose(errors[unit], min(errors.values()), rtol=1e-6, atol=1e-9)
        gone.append(unit)
        np.testing.assert_allclose(total, errors[unit], rtol=1e-6, atol=1e-9)


@quick
@hypothesis.given(seed=st.integers(0, 2**31), heads=st.integers(1, 5), k=st.integers(1, 3))
def test_errors_of_a_given_order(seed, heads, k):
    """Those of the greedy one along it, and of any other what the best of refits leaves."""
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(40, heads * k)), rng.normal(size=(heads * k, 4))
    gram, units = x.T @ x / 40, np.arange(heads).repeat(k)
    greedy = removal_order(gram, w, units)
    np.testing.assert_allclose(removal_errors(gram, w, units, greedy.units), greedy.errors)
    order, own = rng.permutation(heads), ridged(gram, 1e-2)
    p = np.linalg.inv(own)
    for i, lost in enumerate(removal_errors(gram, w, units, order)):
        gone = np.isin(units, order[: i + 1])
        best = (w[gone] * np.linalg.solve(p[np.ix_(gone, gone)], w[gone])).sum()
        np.testing.assert_allclose(lost, best)


def test_what_is_dead_already_goes_first_and_costs_nothing():
    _, gram, w = _data(0, 8, 3)
    w[[2, 5]] = 0
    found = removal_order(gram, w, np.arange(8))
    assert {*found.units[:2].tolist()} == {2, 5}
    np.testing.assert_allclose(found.errors[1], 0, atol=1e-12)


def test_a_gram_matrix_of_nan_is_refused():
    with pytest.raises(CalibrationError, match="cannot be inverted"):
        removal_order(np.full((3, 3), np.nan), np.ones((3, 1)), np.arange(3))


@quick
@hypothesis.given(
    seed=st.integers(0, 10**6), m=st.integers(2, 8), count=st.integers(1, 8), cross=st.booleans()
)
def test_no_other_rows_are_nearer(seed, m, count, cross):
    """Any change of the refitted rows makes the error larger; that of the kept ones is one."""
    h, gram, w = _data(seed, m, 2)
    rng = np.random.default_rng(seed + 1)
    kept = np.sort(rng.permutation(m)[: min(count, m)])
    x = h + 0.1 * rng.normal(size=h.shape) if cross else h
    moments = Moments(
        xx=x.T @ x / len(x),
        x=x.mean(0),
        count=len(x),
        xy=x.T @ h / len(x) if cross else None,
        y=h.mean(0) if cross else None,
        yy=gram if cross else None,
    )
    new = refit(moments, w, kept, ridge=0.0)
    least = error(moments, w, new)
    direct = ((x @ new - h @ w) ** 2).sum(1).mean()
    np.testing.assert_allclose(least, direct, rtol=1e-6, atol=1e-8)
    assert (new[np.setdiff1d(np.arange(m), kept)] == 0).all()
    for _ in range(5):
        other = new.copy()
        other[kept] += 0.01 * rng.normal(size=(len(kept), 2))
        assert error(moments, w, other) >= least - 1e-9
    plain = np.zeros_like(w)
    plain[kept] = w[kept]
    assert least <= error(moments, w, plain) + 1e-9


def test_with_all_kept_nothing_changes():
    _, gram, w = _data(3, 6, 2)
    moments = Moments(xx=gram, x=np.zeros(6), count=40)
    np.testing.assert_allclose(refit(moments, w, np.arange(6), ridge=0.1), w, rtol=1e-12)


@quick
@hypothesis.given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
def test_masks_are_the_best_numbers(seed, count):
    from flaxslim import Pair, Spec

    h, gram, w = _data(seed, 6, 3)
    spec = Spec(name="S", pairs=Pair(first="a", second="b"))
    (site,) = spec.sites({"a": np.ones((2, 6)), "b": np.ones((6, 3))})
    kept = np.sort(np.random.default_rng(seed).permutation(6)[:count])
    moments = Moments(xx=gram, x=h.mean(0), count=len(h))
    new = _fisher.scaled(moments, w, site, kept, ridge=0.0)
    masks, *_ = np.linalg.lstsq(
        np.stack([np.outer(h[:, j], w[j]).ravel() for j in kept], 1), (h @ w).ravel(), rcond=None
    )
    expected = np.zeros_like(w)
    expected[kept] = w[kept] * (masks if np.abs(masks).max() <= 10 else np.ones(count))[:, None]
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-5)


def test_rearranging_sees_that_two_units_stand_in_for_each_other():
    """By the diagonal 0 and 1 go; as each makes up for the other, 0 and 2 cost less."""
    from flaxslim import Pair, Spec

    spec = Spec(name="S", pairs=Pair(first="a", second="b"))
    (site,) = spec.sites({"a": np.ones((2, 3)), "b": np.ones((3, 3))})
    gradients = np.array([[[1.0, 1.0, -1.1]], [[1.0, 1.0, -1.1]]])
    before = _fisher.search(site, gradients)
    assert before.kept(1)[0].tolist() == [2]
    assert _fisher.rearranged(before, gradients, 1).kept(1)[0].tolist() in ([0], [1])


@quick
@hypothesis.given(seed=st.integers(0, 10**6), count=st.integers(0, 6))
def test_rearranging_never_costs_more(seed, count):
    from flaxslim import Pair, Spec

    spec = Spec(name="S", pairs=Pair(first="a", second="b"))
    (site,) = spec.sites({"a": np.ones((2, 6)), "b": np.ones((6, 3))})
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(12, 1, 6)) @ rng.normal(size=(6, 6))
    before = _fisher.search(site, gradients)
    after = _fisher.rearranged(before, gradients, count)
    fisher = np.einsum("nsu,nsv->uv", gradients, gradients) / 12

    def cost(ranking):
        gone = ranking.orders[0][: 6 - count]
        return fisher[np.ix_(gone, gone)].sum()

    assert cost(after) <= cost(before) + 1e-9
    assert sorted(after.orders[0].tolist()) == list(range(6))
