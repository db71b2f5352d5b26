"""The exactness rules: what goes computes nothing, and what computes something never goes.

Each property is checked on a network computed by plain numpy in float64, before and after.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ACTS,
    GATED,
    LAYOUTS,
    LOUD,
    PLAIN,
    QUIET,
    Net,
    enable_x64,
    gap,
    net,
    nets,
    quick,
    rules_of,
    run,
)

from flaxslim import Pair, Plan, Spec, _bits, apply, plan, slim
from flaxslim._activation import activation
from flaxslim._tree import flatten, replace
from flaxslim.errors import ConfigError, NonFiniteError, SpecError, UnsupportedDtypeError

quiet, loud, acts = (st.sampled_from(sorted(names)) for names in (QUIET, LOUD, ACTS))


# --- making channels die, one rule at a time --------------------------------------------------


def no_reader(n: Net) -> None:
    for ffn, dead in n.each():
        ffn.second[dead] = 0


def silent(n: Net, *parts: int) -> None:
    for ffn, dead in n.each():
        for part in parts:
            ffn.first[part][:, dead] = 0
            if ffn.first_bias is not None:
                ffn.first_bias[part][dead] = 0


def constant(n: Net) -> None:
    for ffn, dead in n.each():
        ffn.first[:, :, dead] = 0
        if ffn.first_bias is not None:  # above zero: a relu of less would be silent
            ffn.first_bias[:, dead] = np.abs(ffn.first_bias[:, dead]) + 0.1


# --- the two claims ---------------------------------------------------------------------------


def removed_exactly(n: Net, act: str, rule: str) -> None:
    """All of the dead set was found by this rule, and without it the output is the same."""
    tree, spec = n.tree, n.layout.spec(act)
    p = plan(tree, n.cfg, spec)
    for cut, dead in zip(p.cuts, n.dead, strict=True):
        assert cut.rules == ({rule: len(dead)} if len(dead) else {})
        assert cut.dead == len(dead)
    assert p.exact
    same_function(n, p, act)


def same_function(n: Net, p, act: str) -> None:
    before = run(n.layers, act, n.x)
    small = n.layout.layers(apply(p, n.tree))
    assert {layer.width for layer in small} == {n.need}
    for cut, living in zip(p.cuts, n.living, strict=True):
        assert living <= set(cut.keep)
    assert gap(run(small, act, n.x), before) <= 1e-12


def nothing_found(n: Net, activation: str | None) -> None:
    p = plan(n.tree, n.cfg, n.layout.spec(activation))
    assert rules_of(p) == set()
    assert p.removed == 0
    assert [cut.keep for cut in p.cuts] == [tuple(range(n.layers[0].width))] * len(n.layers)


# --- (i) nothing reads the channel ------------------------------------------------------------


@quick
@given(nets(), acts)
def test_rule_i_a_channel_that_nothing_reads(n, act):
    no_reader(n)
    removed_exactly(n, act, "i")


@quick
@given(nets())
def test_rule_i_needs_no_activation(n):
    no_reader(n)
    p = plan(n.tree, n.cfg, n.layout.spec(None))
    assert [cut.dead for cut in p.cuts] == [len(dead) for dead in n.dead]
    assert "activation of layers/{i} is unknown (not given)" in str(p)
    same_function(n, p, "gelu")


# --- (ii) one factor of a gated channel is zero -----------------------------------------------


@quick
@given(nets(GATED), acts)
def test_rule_ii_up_is_zero(n, act):
    silent(n, 1)
    removed_exactly(n, act, "ii")


@quick
@given(nets(GATED), quiet)
def test_rule_ii_gate_is_zero(n, act):
    silent(n, 0)
    removed_exactly(n, act, "ii")


@quick
@given(nets(GATED), loud)
def test_rule_ii_a_zero_gate_lets_up_through_if_act_of_zero_is_not_zero(n, act):
    silent(n, 0)
    nothing_found(n, act)


@quick
@given(nets(GATED))
def test_rule_ii_without_an_activation_judges_up_only(n):
    silent(n, 0)
    nothing_found(n, None)
    silent(n, 1)
    p = plan(n.tree, n.cfg, n.layout.spec("home_made"))
    assert [cut.dead for cut in p.cuts] == [len(dead) for dead in n.dead]
    assert rules_of(p) <= {"ii"}
    assert "is unknown (home_made)" in str(p)
    assert "only (i) and (ii), up only were used" in str(p)


@quick
@given(nets(GATED, first_bias=True, second_bias=False), quiet, st.integers(0, 1))
def test_rule_ii_a_bias_keeps_a_factor_alive(n, act, part):
    silent(n, part)
    for ffn, dead in n.each():
        assert ffn.first_bias is not None
        ffn.first_bias[part][dead] = 0.25
    nothing_found(n, act)


# --- (iii) the channel is act(0) = 0 ----------------------------------------------------------


@quick
@given(nets(PLAIN), quiet)
def test_rule_iii_first_is_zero(n, act):
    silent(n, 0)
    removed_exactly(n, act, "iii")


@quick
@given(nets(PLAIN, second_bias=False), loud)
def test_rule_iii_not_if_act_of_zero_is_not_zero(n, act):
    silent(n, 0)
    nothing_found(n, act)


@quick
@given(nets(PLAIN))
def test_rule_iii_not_without_an_activation(n):
    silent(n, 0)
    nothing_found(n, None)
    assert "only (i) were used" in str(plan(n.tree, n.cfg, n.layout.spec(None)))


# --- (iv) the channel is a constant -----------------------------------------------------------


@quick
@given(nets(LAYOUTS, first_bias=True, second_bias=True), acts)
def test_rule_iv_a_constant_is_folded(n, act):
    constant(n)
    removed_exactly(n, act, "iv")


@quick
@given(nets(PLAIN, second_bias=True), loud)
def test_rule_iv_act_of_zero_is_a_constant_too(n, act):
    silent(n, 0)
    removed_exactly(n, act, "iv")


@quick
@given(nets(LAYOUTS, first_bias=True, second_bias=False), acts)
def test_rule_iv_not_without_a_second_bias(n, act):
    constant(n)
    nothing_found(n, act)


@quick
@given(nets(LAYOUTS, first_bias=True, second_bias=True))
def test_rule_iv_not_without_an_activation(n):
    constant(n)
    nothing_found(n, None)


def test_rule_iv_folds_what_it_says():
    n = net(PLAIN["plain"], seed=0, depth=1, f=4)
    n.dead = [np.array([2])]
    constant(n)
    (cut,) = plan(n.tree, n.cfg, n.layout.spec("tanh")).cuts
    assert cut.folds == (2,)
    (before,) = n.layers
    (after,) = n.layout.layers(apply(plan(n.tree, n.cfg, n.layout.spec("tanh")), n.tree))
    assert before.first_bias is not None
    assert before.second_bias is not None
    assert after.second_bias is not None
    added = np.tanh(before.first_bias[0, 2]) * before.second[2]
    np.testing.assert_allclose(after.second_bias, before.second_bias + added, rtol=1e-15)


# --- all rules together, and living channels --------------------------------------------------


@quick
@given(nets(), quiet)
def test_all_rules_at_once(n, act):
    kinds = [no_reader, lambda n: silent(n, 0), lambda n: silent(n, n.layout.parts - 1), constant]
    whole = n.dead
    for number, kill in enumerate(kinds):
        n.dead = [dead[number::4] for dead in whole]
        kill(n)
    p = plan(n.tree, n.cfg, n.layout.spec(act))
    # Constants need both biases; without a first bias they are silent channels.
    if all(ffn.second_bias is not None or ffn.first_bias is None for ffn in n.layers):
        n.dead = whole
        assert [cut.dead for cut in p.cuts] == [len(dead) for dead in whole]
    else:
        n.dead = [np.setdiff1d(dead, dead[3::4]) for dead in whole]
    same_function(n, p, act)


@quick
@given(nets(), acts)
def test_a_living_channel_never_goes(n, act):
    nothing_found(n, act)


@quick
@given(nets(), st.sampled_from(["gelu", "silu", "tanh"]), st.integers(0, 2**16))
def test_cutting_a_living_channel_would_change_the_output(n, act, pick):
    # The network can tell: otherwise the equalities above would prove nothing.
    p = plan(n.tree, n.cfg, n.layout.spec(act))
    width = n.layers[0].width
    keep = tuple(j for j in range(width) if j != pick % width)
    wrong = dataclasses.replace(p, cuts=(dataclasses.replace(p.cuts[0], keep=keep), *p.cuts[1:]))
    small = n.layout.layers(apply(wrong, n.tree))
    assert gap(run(small, act, n.x), run(n.layers, act, n.x)) > 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kill", [no_reader, lambda n: silent(n, n.layout.parts - 1), constant])
@pytest.mark.parametrize("accelerator", [False, True])
def test_float32_on_the_device(layout, kill, accelerator, monkeypatch):
    if accelerator:
        monkeypatch.setattr(_bits, "unsigned", _bits.device_bits)
    n = net(LAYOUTS[layout], seed=1, d=3, f=7, share=0.4)
    kill(n)
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), n.tree)
    p = plan(tree, n.cfg, n.layout.spec("gelu"))
    assert [cut.dead for cut in p.cuts] == [len(dead) for dead in n.dead]
    small = n.layout.layers(apply(p, tree))
    assert gap(run(small, "gelu", n.x), run(n.layers, "gelu", n.x)) <= 1e-5


def test_stacked_layers_lose_channels_of_their_own():
    # Layers scanned on axis 0; their biases are (layers, f).
    rng = np.random.default_rng(0)
    tree = {
        "up": {"kernel": rng.normal(size=(2, 3, 5)), "bias": rng.normal(size=(2, 5))},
        "down": {"kernel": rng.normal(size=(2, 5, 3)), "bias": rng.normal(size=(2, 3))},
    }
    tree["up"]["kernel"][:, :, :4] = 0
    tree["up"]["bias"][:, 0] = [0.5, 0.7]  # a constant in both layers
    tree["up"]["bias"][:, 1] = 0  # silent in both
    tree["up"]["bias"][:, 2] = [0, 0.5]  # silent in one, a constant in the other
    tree["up"]["kernel"][1, :, 3], tree["up"]["bias"][:, 3] = 1, 0.5  # constant in one only
    pair = Pair(
        first="up", second="down", first_axes="l d f", second_axes="l f d", activation="relu"
    )
    p = plan(tree, spec=Spec(name="SCANNED", pairs=pair))
    # The first layer has one living channel, and is filled up to the two of the second.
    assert p.cuts[0].keep == ((0, 4), (3, 4))
    assert p.cuts[0].folds == ((3,), (0, 2))
    assert p.cuts[0].rules == {"iii": 3, "iv": 4}
    small, x = apply(p, tree), rng.normal(size=(4, 3))

    def forward(t, layer):
        h = x @ t["up"]["kernel"][layer] + t["up"]["bias"][layer]
        return np.maximum(h, 0) @ t["down"]["kernel"][layer] + t["down"]["bias"][layer]

    for layer in range(2):
        assert gap(forward(small, layer), forward(tree, layer)) <= 1e-12


# --- what is zero -----------------------------------------------------------------------------

ROW = Spec(name="ROW", pairs=Pair(first="up", second="down"))


def _rows(second) -> dict:
    return {"up": {"kernel": np.ones((2, second.shape[0]), np.float32)}, "down": {"kernel": second}}


TINY = {
    "float64": np.float64(5e-324),
    "float32": np.float32(1e-45),
    "float16": np.float16(6e-8),
    "bfloat16": np.array(1, np.uint16).view(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.array(1, np.uint8).view(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.array(1, np.uint8).view(ml_dtypes.float8_e5m2),
}


@pytest.fixture(params=["numpy", "jax", "accelerator"])
def array(request, monkeypatch):
    """Leaves on the host, and on the device; as if that were an accelerator, too."""
    if request.param == "accelerator":
        monkeypatch.setattr(_bits, "unsigned", _bits.device_bits)
    return np.asarray if request.param == "numpy" else jnp.asarray


@pytest.mark.parametrize("dtype", TINY)
def test_the_smallest_number_is_not_zero_and_minus_zero_is(dtype, array):
    if dtype == "float64" and array is jnp.asarray:
        return  # jax has none unless x64 is enabled; the test of that is below
    second = np.zeros((5, 3), dtype)
    second[1, 2], second[2], second[3, 0], second[4] = TINY[dtype], -0.0, -TINY[dtype], 1
    leaf = array(second)
    assert str(leaf.dtype) == dtype
    (cut,) = plan(_rows(leaf), spec=ROW).cuts
    assert cut.keep == (1, 3, 4)


def test_float64_numpy_leaves_are_not_rounded_to_float32():
    second = np.zeros((3, 2))
    second[0, 0], second[1, 1] = 1e-300, 1.0
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    (cut,) = plan(_rows(second), spec=ROW).cuts
    assert cut.keep == (0, 1)


def test_float64_on_the_device():
    with enable_x64():
        second = jnp.zeros((3, 2), jnp.float64).at[0, 0].set(1e-300).at[1, 1].set(1.0)
        (cut,) = plan(_rows(second), spec=ROW).cuts
        assert cut.keep == (0, 1)
        for bad in (np.inf, -np.inf, np.nan):
            with pytest.raises(NonFiniteError):
                plan(_rows(second.at[2, 0].set(bad)), spec=ROW)


def test_a_view_that_is_not_contiguous():
    second = np.ones((6, 8), np.float32)[::2, ::2]
    second[1] = 0
    (cut,) = plan(_rows(second), spec=ROW).cuts
    assert cut.keep == (0, 2)


@pytest.mark.parametrize("value", [1.0, 2.0, 1e-30, 3e38])
def test_large_and_small_numbers_together_are_finite(value, array):
    # The bits of 1.5 and of 2.0 together are those of a NaN.
    second = np.full((4, 3), 1.5, np.float32)
    second[2] = 0
    second[0, 1] = value
    tree = jax.tree.map(array, _rows(second))
    tree["up"]["kernel"] = array(np.array([[1.5, 2, 1, 1], [value, 1, 1, 1]], np.float32))
    (cut,) = plan(tree, spec=ROW).cuts
    assert cut.keep == (0, 1, 3)


@pytest.mark.parametrize("row", [0, 15, 16, 40])
def test_one_entry_anywhere_in_a_column_keeps_it_alive(row, array):
    up = np.zeros((41, 3), np.float32)
    up[row, 1] = 1e-30
    up[:, 2] = 1
    tree = jax.tree.map(array, {"up": {"kernel": up}, "down": {"kernel": np.ones((3, 2), "f")}})
    pair = Pair(first="up", second="down", activation="relu")
    (cut,) = plan(tree, spec=Spec(name="RELU", pairs=pair)).cuts
    assert cut.keep == (1, 2)
    assert cut.rules == {"iii": 1}


# --- threshold --------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_threshold_is_relative_to_the_largest_row(array, scale):
    norms = np.array([10.0, 0.99, 1.01, 0.0, 0.5, 9.0])
    second = (norms[:, None] * np.array([0.6, 0.8]) * scale).astype(np.float32)
    p = plan(_rows(array(second)), spec=ROW, threshold=0.1)
    (cut,) = p.cuts
    assert cut.keep == (0, 2, 5)
    assert cut.rules == {"i": 1, "threshold": 2}
    assert not p.exact
    assert p.threshold == 0.1
    assert "approximate" in str(p)
    assert "(threshold) 2" in str(p)


def test_threshold_on_float64_device_arrays():
    with enable_x64(), warnings.catch_warnings():
        warnings.simplefilter("error")
        second = jnp.asarray(np.diag([1.0, 0.0, 1e-3, 0.5]) * 1e-200)
        (cut,) = plan(_rows(second), spec=ROW, threshold=0.01).cuts
        assert cut.keep == (0, 3)


@quick
@given(nets())
def test_threshold_zero_gives_up_nothing_that_is_alive(n):
    for ffn, dead in n.each():
        ffn.second[dead] = 1e-30
    p = plan(n.tree, n.cfg, n.layout.spec("gelu"), threshold=0.0)
    assert p.exact
    assert p.removed == 0
    assert str(p).startswith("plan by TEST_FFN, exact")


def test_a_threshold_that_gives_up_nothing_more_is_exact():
    p = plan(_rows(np.diag([1.0, 0.0, 1.0])), spec=ROW, threshold=0.5)
    assert p.exact
    assert p.removed == 1


def test_padding_keeps_weak_channels_rather_than_dead_ones():
    # Both go for good only if neither is needed as filling; a dead one loses nothing.
    second = np.diag([1.0, 0.0, 1.0, 0.001, 1.0])
    p = plan(_rows(second), spec=ROW, threshold=0.01, multiple_of=4)
    assert p.cuts[0].keep == (0, 2, 3, 4)
    assert p.exact


# --- what cannot be judged --------------------------------------------------------------------

BAD_PLACES = ["up/kernel", "up/bias", "down/kernel", "down/bias"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", BAD_PLACES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float8_e5m2"])
def test_nan_and_infinity_are_refused_with_their_path(place, bad, dtype):
    n = net(PLAIN["plain"], seed=3, depth=2, share=0.5)
    tree = jax.tree.map(lambda x: x.astype(dtype), n.tree)
    leaf = flatten(tree)[f"layers/1/{place}"]
    leaf[(0,) * leaf.ndim] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity") as caught:
        plan(tree, n.cfg, n.layout.spec("gelu"))
    assert caught.value.path == f"layers/1/{place}"
    assert f"layers/1/{place}" in str(caught.value)


@pytest.mark.parametrize("layout", ["plain", "transposed", "fused", "gated", "interleaved"])
def test_a_nan_in_a_column_that_would_go_does_not_vanish(layout, array):
    n = net(LAYOUTS[layout], seed=3, depth=1)
    n.dead = [np.array([4])]
    no_reader(n)
    n.layers[0].first[-1, 1, 4] = np.nan
    tree = jax.tree.map(lambda x: array(x.astype(np.float32)), n.tree)
    with pytest.raises(NonFiniteError) as caught:
        plan(tree, n.cfg, n.layout.spec("gelu"))
    assert caught.value.path == "layers/0/up/kernel"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "int4", "float8_e4m3fnuz"])
def test_quantised_tensors_are_refused(dtype):
    n = net(PLAIN["plain"], seed=3, depth=1)
    leaf = np.ones(n.layers[0].second.shape).astype(ml_dtypes.int4 if dtype == "int4" else dtype)
    tree = replace(n.tree, {"layers/0/down/kernel": leaf})
    with pytest.raises(UnsupportedDtypeError, match="quantised") as caught:
        plan(tree, n.cfg, n.layout.spec("gelu"))
    assert caught.value.path == "layers/0/down/kernel"
    assert dtype in str(caught.value)
    assert "dequantise" in str(caught.value)


def test_a_silent_constant_needs_no_second_bias():
    """relu of a bias below zero is 0 for every input: nothing is left to fold."""
    rng = np.random.default_rng(0)
    first, bias = rng.normal(size=(3, 4)), rng.normal(size=4)
    first[:, [1, 2]] = 0
    bias[[1, 2]] = -0.5, 0.5
    tree = {"up": {"kernel": first, "bias": bias}, "down": {"kernel": rng.normal(size=(4, 2))}}
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="relu"))
    slimmed, _ = slim(tree, spec=spec)
    assert plan(tree, spec=spec).cuts[0].keep == (0, 2, 3)
    x = rng.normal(size=(5, 3))
    before, after = (
        np.maximum(x @ t["up"]["kernel"] + t["up"]["bias"], 0) @ t["down"]["kernel"]
        for t in (tree, slimmed)
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


# --- several readers --------------------------------------------------------------------------

Tree = dict[str, dict[str, np.ndarray]]


def read_twice(
    seed: int = 0, f: int = 6, *, bias: bool = True, stack: tuple[int, ...] = ()
) -> Tree:
    """An MLP whose channels `down` and `side` read."""
    rng = np.random.default_rng(seed)
    tree = {
        "up": {"kernel": rng.normal(size=(*stack, 3, f)), "bias": rng.normal(size=(*stack, f))},
        "down": {"kernel": rng.normal(size=(*stack, f, 2)), "bias": rng.normal(size=(*stack, 2))},
        "side": {"kernel": rng.normal(size=(*stack, f, 4)), "bias": rng.normal(size=(*stack, 4))},
    }
    if not bias:
        del tree["up"]["bias"]
    return tree


def reading(activation: str | None = "relu", stack: str = "", **changes: Any) -> Spec:
    pair = Pair(
        first="up",
        second="down",
        first_axes=f"{stack} d f".strip(),
        second_axes=f"{stack} f d".strip(),
        readers={"side": f"{stack} f o".strip()},
        activation=activation,
    )
    return Spec(name="READ", pairs=dataclasses.replace(pair, **changes))


def both(tree: Tree, act: Any) -> np.ndarray:
    """What both readers put out, one beside the other."""
    h = np.random.default_rng(9).normal(size=(*tree["up"]["kernel"].shape[:-2], 5, 3))
    h = act(h @ tree["up"]["kernel"] + tree["up"].get("bias", np.zeros(1))[..., None, :])
    outs = [h @ tree[n]["kernel"] + tree[n]["bias"][..., None, :] for n in ("down", "side")]
    return np.concatenate(outs, axis=-1)


def test_a_channel_goes_only_if_none_of_its_readers_reads_it():
    tree = read_twice()
    tree["down"]["kernel"][[0, 1, 2]] = 0
    tree["side"]["kernel"][[1, 2, 3]] = 0
    p = plan(tree, spec=reading(None))
    assert (p.cuts[0].keep, p.cuts[0].rules) == ((0, 3, 4, 5), {"i": 2})
    small = apply(p, tree)
    assert {n: small[n]["kernel"].shape for n in small} == {
        "up": (3, 4), "down": (4, 2), "side": (4, 4),
    }  # fmt: skip
    assert small["side"]["bias"] is tree["side"]["bias"]
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    assert gap(both(small, relu), both(tree, relu)) <= 1e-12
    assert p.removed_parameters == 2 * (3 + 1 + 2 + 4)


def test_a_channel_that_is_silent_goes_whatever_reads_it():
    tree = read_twice()
    for channel, bias in enumerate((0, -0.5, 0.5)):
        tree["up"]["kernel"][:, channel] = 0
        tree["up"]["bias"][channel] = bias
    p = plan(tree, spec=reading("relu"))
    # The third is a constant, which each of its readers takes up in a bias of its own.
    assert (p.cuts[0].keep, p.cuts[0].rules) == ((2, 3, 4, 5), {"iii": 1, "iv": 1})
    assert p.cuts[0].folds == ()
    small = apply(p, tree)
    np.testing.assert_array_equal(small["down"]["bias"], tree["down"]["bias"])
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    assert gap(both(small, relu), both(tree, relu)) <= 1e-12


@pytest.mark.parametrize("stack", ["l", "e", "l e"])
def test_the_readers_of_stacked_layers_are_judged_row_by_row(stack):
    shape = (2, 3)[: len(stack.split())]
    tree = read_twice(stack=shape)
    rows = list(np.ndindex(*shape))
    for number, row in enumerate(rows):
        tree["down"]["kernel"][row][[number % 3, 3, 5]] = 0
        tree["side"]["kernel"][row][[number % 3, 3, 4]] = 0
    p = plan(tree, spec=reading(stack=stack), width="per_layer")
    assert p.cuts[0].keep == tuple(
        tuple(j for j in range(6) if j not in (number % 3, 3)) for number in range(len(rows))
    )
    small = apply(p, tree)
    assert small["side"]["kernel"].shape == (*shape, 4, 4)
    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    assert gap(both(small, relu), both(tree, relu)) <= 1e-12


def test_a_reader_may_have_experts_that_share_the_channels():
    tree = read_twice()
    tree["side"] = {"kernel": np.ones((2, 6, 4))}
    tree["down"]["kernel"][[0, 1]] = 0
    tree["side"]["kernel"][:, 0] = 0
    tree["side"]["kernel"][1, 1] = 0
    p = plan(tree, spec=reading(readers={"side": "e f o"}))
    assert p.cuts[0].keep == (1, 2, 3, 4, 5)
    assert apply(p, tree)["side"]["kernel"].shape == (2, 5, 4)


def test_a_threshold_gives_up_only_what_is_small_for_every_reader():
    tree = read_twice()
    tree["down"]["kernel"][[0, 1]] *= 1e-6
    tree["side"]["kernel"][[1, 2]] *= 1e-6
    p = plan(tree, spec=reading(), threshold=1e-3)
    assert (p.cuts[0].keep, p.cuts[0].rules) == ((0, 2, 3, 4, 5), {"threshold": 1})
    assert not p.exact


@pytest.mark.parametrize("place", ["side/kernel", "down/kernel", "up/kernel"])
def test_a_nan_in_a_reader_is_refused(place):
    tree = read_twice()
    flatten(tree)[place][0, 0] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        plan(tree, spec=reading())
    assert caught.value.path == place


# --- activations that are expressions ---------------------------------------------------------

EXPRESSIONS: dict[str, Any] = {
    "x * tanh(log1p(exp(x)))": lambda x: jax.nn.mish(x),
    "x * logistic(1.702 * x)": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "0.5 * x * erfc(-x * rsqrt(2.0))": lambda x: jax.nn.gelu(x, approximate=False),
    "x * (1 + erf(x / sqrt(2))) / 2": lambda x: jax.nn.gelu(x, approximate=False),
    "where(x > 0, x, 0.01 * x)": jax.nn.leaky_relu,
    "where(x <= 0, expm1(x), x)": jax.nn.elu,
    "minimum(maximum(x + 3, 0), 6) / 6 * x": jax.nn.hard_swish,
    "logaddexp(x, 0)": jax.nn.softplus,
    "maximum(x, 0) ** 2": lambda x: jax.nn.relu(x) ** 2,
    "square(maximum(x, 0))": lambda x: jax.nn.relu(x) ** 2,
    "x / (1 + abs(x))": jax.nn.soft_sign,
    "(x > 0) - (x < 0)": jnp.sign,
    "-(x != 0) * is_finite(x) + isnan(x)": lambda x: -(x != 0).astype(float),
    "exp2(x) - 1": lambda x: jnp.exp2(x) - 1,
    "cbrt(sign(x) * floor(abs(x))) + ceil(x) - round(x)": lambda x: (
        jnp.cbrt(jnp.sign(x) * jnp.floor(abs(x))) + jnp.ceil(x) - jnp.round(x)
    ),
    "sin(x) * cos(x) + tan(x / 9) - atan(x) + sinh(x / 9) * cosh(x / 9)": lambda x: (
        jnp.sin(x) * jnp.cos(x) + jnp.tan(x / 9) - jnp.arctan(x) + jnp.sinh(x / 9) * jnp.cosh(x / 9)
    ),
    "where(x == inf, pi, log(abs(x) + 1))": lambda x: jnp.log(abs(x) + 1),
    "x": lambda x: x,
    "+x - 3e-1": lambda x: x - 0.3,
    "2": lambda x: 2 + 0 * x,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_is_the_function_that_it_says(text):
    x = np.concatenate([np.linspace(-5, 5, 42), [0.0, 0.5, 1.5, -0.5]])
    function = activation(text, None)
    assert function is not None
    assert function is activation(text, None)
    with enable_x64():
        expected = np.asarray(EXPRESSIONS[text](jnp.asarray(x)), np.float64)
    assert function(x).dtype == np.float64
    np.testing.assert_allclose(function(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_large_values_raise_no_warning(text):
    function = activation(text, None)
    assert function is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(np.array([[-1e300, 1e300], [-800.0, 800.0]])).shape == (2, 2)


def test_a_config_may_hold_what_is_no_expression():
    assert activation("config.act", {"act": "quick-gelu"}) is None
    assert activation("config.act", {"act": "2 * x"}) is not None
    assert activation("config.act or x * y", {"act": "relu"}) is not None


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.log1p(np.exp(x)))


MISH = Pair(first="up", second="down", activation="x * tanh(log1p(exp(x)))")


def test_the_rules_go_by_an_expression_too():
    tree = read_twice()
    del tree["side"]
    tree["up"]["kernel"][:, [0, 2]] = 0
    tree["up"]["bias"][0] = 0
    spec = Spec(name="MISH", pairs=MISH)
    p = Plan.from_json(plan(tree, spec=spec).to_json())
    (cut,) = p.cuts
    assert (cut.rules, cut.folds, cut.keep) == ({"iii": 1, "iv": 1}, (2,), (1, 3, 4, 5))
    assert cut.activation == MISH.activation
    small, _ = slim(tree, plan=p)  # which checks it
    averaged = apply(p, {"ema": tree}, like=tree)["ema"]
    x = np.random.default_rng(1).normal(size=(5, 3))
    before, after, average = (
        mish(x @ t["up"]["kernel"] + t["up"]["bias"]) @ t["down"]["kernel"] + t["down"]["bias"]
        for t in (tree, small, averaged)
    )
    assert max(gap(after, before), gap(average, before)) <= 1e-12


@pytest.mark.parametrize("text", ["log(x)", "x / x", "exp(x)"])
def test_a_constant_that_is_no_number_is_not_folded(text):
    tree = read_twice()
    tree["up"]["kernel"][:, 1] = 0
    tree["up"]["bias"][1] = 1e4 if text == "exp(x)" else 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = plan(tree, spec=reading(text, readers={}))
    assert p.removed == 0


# --- what no tensor tells ---------------------------------------------------------------------


class Convs(nn.Module):
    """Two convolutions, whose second one pads as it is told."""

    f: int
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.f, (3, 3), name="up")(x))
        return nn.Conv(2, (3, 3), padding=self.padding, name="down")(x)


def changed(variables: Any, path: str, index: Any, value: float) -> Any:
    return replace(variables, {path: flatten(variables)[path].at[index].set(value)})


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_constant_is_not_folded_through_a_window_which_may_reach_beyond_an_edge(padding):
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
    v: Any = Convs(6, padding).init(jax.random.key(1), x)
    v = changed(v, "params/up/kernel", (..., slice(0, 3)), 0)
    v = changed(v, "params/up/bias", 0, 1.5)  # a constant; the next is zero, by rule (iii)
    v = changed(v, "params/up/bias", 2, -1.5)  # and the third one's relu
    pair = Pair(first="up", second="down", first_axes="x y d f", second_axes="x y f d")
    pair = dataclasses.replace(pair, activation="relu", width="f")
    small, cfg = slim(v, {"f": 6}, Spec(name="CONVS", pairs=pair))
    assert cfg == {"f": 4}
    before: Any = Convs(6, padding).apply(v, x)
    after: Any = Convs(**cfg, padding=padding).apply(small, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", ["x y", "h w"])
def test_whatever_the_axes_of_the_window_are_called(window):
    tree = {
        "up": {"kernel": np.ones((3, 3, 2, 4))},  # with a bias, its shape would betray the names
        "down": {"kernel": np.ones((3, 3, 4, 2)), "bias": np.zeros(2)},
    }
    tree["up"]["kernel"][..., 1] = 0  # sigmoid(0) = 0.5, but for what is padded
    pair = Pair(first="up", second="down", activation="sigmoid", first_axes=f"{window} d f")
    pair = dataclasses.replace(pair, second_axes=f"{window} f d")
    assert plan(tree, spec=Spec(name="CONVS", pairs=pair)).removed == 0


@pytest.mark.parametrize("gated", [False, True])
def test_what_stands_between_the_layers_leaves_only_what_nothing_reads(gated):
    """A shift makes something of a channel that is zero before it."""
    firsts = ("gate", "up") if gated else "up"
    tables: dict[str, str] = dict.fromkeys(("shift/scale", "shift/bias"), "f")
    pair = Pair(first=firsts, second="down", activation="relu", gated=gated, tables=tables)
    rng = np.random.default_rng(0)
    tree = {
        name: {"kernel": rng.normal(size=(3, 6)), "bias": rng.normal(size=6)}
        for name in ("gate", "up")
    } | {"shift": {"scale": np.ones(6), "bias": np.ones(6)}, "down": {"kernel": np.ones((6, 2))}}
    for first in ("gate", "up"):
        tree[first]["kernel"][:, :2] = tree[first]["bias"][:2] = 0
    tree["down"]["kernel"][3] = 0
    p = plan(tree, spec=Spec(name="SHIFTED", pairs=pair))
    assert p.cuts[0].keep == (0, 1, 2, 4, 5)
    assert p.cuts[0].rules == {"i": 1}
    assert any("shift/scale, shift/bias of down may stand between" in note for note in p.notes)


@pytest.mark.parametrize("axis", ["f", "h"])
@pytest.mark.parametrize("name", ["LayerNorm_0/scale", "ln_2/bias", "q_norm/scale"])
def test_a_norm_over_the_channels_is_refused_if_one_of_them_would_go(axis, name):
    """Its mean and variance are those of what is left."""
    tree = {"up": {"kernel": np.ones((3, 6))}, "down": {"kernel": np.ones((6, 2))}}
    tree |= {name.split("/")[0]: {name.split("/")[1]: np.ones(6)}}
    columns, rows = ("d (h k)", "(h k) d") if axis == "h" else ("d f", "f d")
    pair = Pair(first="up", second="down", first_axes=columns, second_axes=rows, axis=axis)
    table = columns.removeprefix("d ")
    pair = dataclasses.replace(pair, sizes={"k": "2"} if axis == "h" else {}, tables={name: table})
    spec = Spec(name="NORMED", pairs=pair)
    assert plan(tree, spec=spec).removed == 0
    tree["down"]["kernel"][:2] = 0
    with pytest.raises(SpecError, match="a norm over the channels") as caught:
        plan(tree, spec=spec)
    assert caught.value.path == name


def test_a_norm_of_each_channel_alone_or_inside_of_each_head_is_none_of_those():
    tree = {"up": {"kernel": np.ones((3, 6))}, "down": {"kernel": np.ones((6, 2))}}
    tree["down"]["kernel"][:2] = 0
    tree |= {"BatchNorm_0": {"scale": np.ones(6)}, "norm": {"scale": np.ones(6)}}
    variables = {"params": tree, "batch_stats": {"norm": {"mean": np.ones(6)}}}
    tables = {"BatchNorm_0/scale": "f", "norm/scale": "f", "batch_stats:norm/mean": "f"}
    pair = Pair(first="up", second="down", tables=tables)
    assert plan(variables, spec=Spec(name="NORMED", pairs=pair)).removed == 2

    heads = {"up": {"kernel": np.ones((4, 3, 2))}, "down": {"kernel": np.ones((3, 2, 4))}}
    heads |= {"q_norm": {"scale": np.ones((3, 2))}}
    heads["down"]["kernel"][0] = 0
    pair = Pair(first="up", second="down", first_axes="d h k", second_axes="h k d", axis="h")
    pair = dataclasses.replace(pair, tables={"q_norm/scale": "h k"})
    assert plan(heads, spec=Spec(name="HEADS", pairs=pair)).removed == 1


def test_a_second_factor_with_an_activation_is_refused():
    cfg = {"acts": ["silu", "sigmoid"]}
    with pytest.raises(ConfigError, match="more than one factor") as caught:
        activation("config.acts", cfg)
    assert "['silu', 'linear']" in str(caught.value.expected)
    assert activation("config.acts", {"acts": ["silu", "linear"]}) is not None


@pytest.mark.parametrize("name", ["elu", "selu", "mish"])
def test_activations_are_those_of_jax(name):
    x = np.linspace(-4, 4, 33)
    ours: Any = activation(name, None)
    with enable_x64():
        np.testing.assert_allclose(ours(x), getattr(jax.nn, name)(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, jnp.float8_e4m3fn])
def test_constants_that_go_beyond_what_a_bias_can_say_are_refused(dtype):
    """The model may compute in float32, and be fine."""
    largest = float(jnp.finfo(dtype).max)
    tree = {
        "up": {"kernel": np.array([[0, 1, 1]]), "bias": np.array([largest, 0, 0])},
        "down": {"kernel": np.ones((3, 2)), "bias": np.full(2, largest)},
    }
    tree = jax.tree.map(lambda x: x.astype(dtype), tree)
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="relu"))
    with pytest.raises(NonFiniteError, match=r"beyond what .* can say") as caught:
        slim(tree, spec=spec)
    assert caught.value.path == "down/bias"
