"""The axis pattern language, against brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from flaxslim._axes import Axes
from flaxslim.errors import AxisPatternError


@st.composite
def arrays_with_pattern(draw):
    """A pattern with `f` somewhere, an array of it, each factor's size, and a set to keep."""
    f = draw(st.integers(1, 5))
    sizes = {"d": draw(st.integers(1, 4)), "l": draw(st.integers(1, 3)), "f": f}
    fused = draw(st.sampled_from([["f"], [2, "f"], ["f", 2], [3, "f"], [2, "f", 3]]))
    dimensions = draw(st.permutations([fused, ["d"], ["l"], [2]]))
    dimensions = [d for d in dimensions if "f" in d or draw(st.booleans())]
    pattern = " ".join(
        str(d[0]) if len(d) == 1 else f"({' '.join(map(str, d))})" for d in dimensions
    )
    factors = [[sizes.get(x, x) for x in d] for d in dimensions]
    shape = tuple(int(np.prod(d)) for d in factors)
    x = np.arange(1, 1 + np.prod(shape), dtype=np.float64).reshape(shape)
    keep = draw(st.lists(st.integers(0, f - 1), unique=True).map(sorted))
    names = [name for d in dimensions for name in d]
    split = [size for d in factors for size in d]
    return pattern, x, np.array(keep, int), names.index("f"), split, f


def _deleted(x, position, split, dead):
    """Brute force: split all factors, delete along f, and join them again."""
    return np.delete(x.reshape(split), dead, axis=position)


@quick
@given(arrays_with_pattern())
def test_take_deletes_the_other_channels_wherever_the_axis_occurs(case):
    pattern, x, keep, position, split, f = case
    dead = np.setdiff1d(np.arange(f), keep)
    before = x.copy()
    taken = Axes(pattern).take(x, "f", keep)
    expected = _deleted(x, position, split, dead)
    assert taken.ndim == x.ndim
    np.testing.assert_array_equal(taken.ravel(), expected.ravel())
    np.testing.assert_array_equal(x, before)
    if len(keep):
        assert Axes(pattern).sizes(taken.shape)["f"] == len(keep)


@quick
@given(arrays_with_pattern())
def test_zero_touches_those_channels_only(case):
    pattern, x, keep, position, split, f = case
    dead = np.setdiff1d(np.arange(f), keep)
    zeroed = Axes(pattern).zero(x, "f", dead)
    assert x.all()
    assert zeroed.shape == x.shape
    parts = np.moveaxis(zeroed.reshape(split), position, 0)
    np.testing.assert_array_equal(parts[keep], np.moveaxis(x.reshape(split), position, 0)[keep])
    assert not parts[dead].any()


@quick
@given(arrays_with_pattern())
def test_norm_is_the_l2_norm_of_each_channel(case):
    pattern, x, _, position, split, f = case
    rows = np.moveaxis(x.reshape(split), position, 0).reshape(f, -1)
    np.testing.assert_allclose(
        Axes(pattern).norm(x, "f"), [np.linalg.norm(row) for row in rows], rtol=1e-12
    )


@quick
@given(arrays_with_pattern())
def test_reversed_is_the_pattern_of_a_transposed_kernel(case):
    # Factors inside of a dimension keep their order: a PyTorch kernel is "(2 f) d".
    pattern, x, keep, *_ = case
    axes = Axes(pattern)
    np.testing.assert_array_equal(axes.reversed().take(x.T, "f", keep), axes.take(x, "f", keep).T)
    assert axes.reversed().reversed() == axes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_device_arrays_stay_device_arrays(dtype):
    x = jnp.arange(12, dtype=dtype).reshape(2, 6)
    axes, keep = Axes("d (2 f)"), np.array([0, 2])
    for y in (axes.take(x, "f", keep), axes.zero(x, "f", keep)):
        assert isinstance(y, type(x))
        assert y.dtype == x.dtype
    host = np.asarray(x, np.float64)
    np.testing.assert_array_equal(
        np.asarray(axes.take(x, "f", keep), np.float64), axes.take(host, "f", keep)
    )
    np.testing.assert_array_equal(
        np.asarray(axes.zero(x, "f", keep), np.float64), axes.zero(host, "f", keep)
    )


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_norm_neither_overflows_nor_vanishes(array, scale):
    x = array(np.array([[3.0, 4.0], [0.0, 5e-3]], np.float32) * np.float32(scale))
    np.testing.assert_allclose(Axes("f d").norm(x, "f") / scale, [5.0, 5e-3], rtol=1e-5)


def test_norm_of_zeros_is_zero():
    np.testing.assert_array_equal(Axes("f d").norm(jnp.zeros((2, 3)), "f"), [0, 0])
    np.testing.assert_array_equal(Axes("f d").norm(np.zeros((2, 0)), "f"), [0, 0])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("d (2 f", "unbalanced parentheses"),
        ("d 2 f)", "unbalanced parentheses"),
        ("d ((2 f))", "unbalanced parentheses"),
        ("D f", "cannot read 'D'"),
        ("d 0", "cannot read '0'"),
        ("d -f", "cannot read '-f'"),
        ("d f*2", "cannot read"),
        ("f f", "each of them once"),
        ("f (2 f)", "each of them once"),
        ("", "at least one axis"),
        ("  ", "at least one axis"),
    ],
)
def test_malformed_patterns_are_refused(pattern, message):
    with pytest.raises(AxisPatternError, match="axis pattern") as caught:
        Axes(pattern)
    assert message in str(caught.value)


def test_empty_group_is_refused():
    with pytest.raises(AxisPatternError):
        Axes("d ()")


def test_sizes():
    assert Axes("d (2 f)").sizes((3, 8)) == {"d": 3, "f": 4}
    assert Axes("2 f d").sizes((2, 4, 3)) == {"f": 4, "d": 3}
    assert Axes("l d f").names == ("l", "d", "f")


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        ("d f", (3,), "has 1 dimensions where its pattern has 2"),
        ("d f", (3, 4, 5), "has 3 dimensions where its pattern has 2"),
        ("d (2 f)", (3, 7), "a dimension of 7 is not (2 f)"),
        ("2 f d", (3, 4, 5), "a dimension of 3 is not 2"),
        ("d (h k)", (3, 8), "sizes of h and k do not follow"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(pattern, shape, message):
    with pytest.raises(AxisPatternError) as caught:
        Axes(pattern).sizes(shape, path="a/kernel")
    text = str(caught.value)
    assert message in text
    assert "a/kernel" in text
    assert str(shape) in text
    assert pattern in text


def test_an_axis_that_is_not_in_the_pattern_is_refused():
    with pytest.raises(AxisPatternError, match="'g' is not in the pattern"):
        Axes("d f").take(np.ones((2, 3)), "g", np.array([0]))


@pytest.mark.parametrize(
    ("pattern", "names", "left"),
    [
        ("d f", "f", "f"),
        ("f d", "d", "d"),
        ("d (2 f)", "f", "(2 f)"),
        ("l d f", "lf", "l f"),
        ("2 f d", "f", "2 f"),
        ("d (h k)", "hk", "(h k)"),
        ("h k d", "d", "d"),
    ],
)
def test_only_leaves_the_pattern_of_the_bias(pattern, names, left):
    assert Axes(pattern).only(names) == Axes(left)


def test_patterns_are_values():
    assert Axes("d f") == Axes("d f")
    assert hash(Axes("d f")) == hash(Axes("d f"))
    assert str(Axes("d (2 f)")) == "d (2 f)"
