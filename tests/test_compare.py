"""The distance of two outputs: sentinels do not hide errors, ordinary values are no sentinels."""

import numpy as np
import pytest

from flaxslim._compare import compare, masked, reference


@pytest.mark.parametrize("sentinel", [-1e4, -1e6, -1e9, np.finfo(np.float32).min, -np.inf])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_an_error_beside_a_sentinel_is_found(sentinel: float, share: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200).astype(np.float32)
    hidden = rng.random(200) < share
    a = np.where(hidden, logits + np.float32(sentinel), logits)
    b = np.where(hidden, a, logits + np.float32(0.01) * (np.arange(200) == np.argmin(hidden)))
    row = compare(reference("logits", a), b)
    assert row.masked == hidden.sum()
    assert 1e-3 < row.relative < 0.1
    assert row.largest < 10
    assert compare(reference("logits", a), a).relative == 0
    lost = compare(reference("logits", a), logits)  # the mask itself is lost
    assert lost.relative > 0.9 or lost.fault is not None


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 90.0], [1e-9, 1e-4, 0.9], [5e5, 1e6, 2e6], [0.0, 0.0, 1e6], []]
)
def test_ordinary_outputs_have_no_sentinels(values: list[float]) -> None:
    assert not masked(np.array(values)).any()


def test_two_kinds_of_sentinels() -> None:
    assert masked(np.array([1.0, 1e4, 1.001e4, 2e6, np.inf])).tolist() == [False] + [True] * 4


def test_of_zeros_nothing_may_differ() -> None:
    zero = reference("y", np.zeros(3, np.float32))
    assert compare(zero, np.array([0, 1e-9, 0], np.float32)).relative == np.inf
    assert compare(zero, zero.values).relative == 0
