"""Plans composed, inverted and undone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st
from strategies import GROUPED, LAYOUTS, PLAIN, Net, gap, net, nets, quick, run

from flaxslim import Pair, Plan, Spec, apply, expand, plan, slim
from flaxslim._apply import resized
from flaxslim._tree import flatten
from flaxslim.errors import PlanError, TracedError

WIDTHS = st.sampled_from(["uniform", "per_layer"])
THRESHOLDS = st.sampled_from([0.0, 0.5])


def assert_equal(after: Any, expected: Any, *, near: tuple[str, ...] = ()) -> None:
    """Two trees are equal, up to rounding in the leaves whose paths end so."""
    after, expected = flatten(after), flatten(expected)
    assert after.keys() == expected.keys()
    for path, x in after.items():
        y = np.asarray(expected[path])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        if near and path.endswith(near):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12, err_msg=path)
        else:
            np.testing.assert_array_equal(x, y, err_msg=path)


def kill(n: Net, share: int) -> None:
    """Make a third of the dead channels dead, the odd ones of them constant."""
    for ffn, dead in n.each():
        ffn.second[dead[share::6]] = 0
        ffn.first[:, :, dead[share + 3 :: 6]] = 0


@st.composite
def steps(draw: st.DrawFn) -> tuple[Net, list[Plan], list[Any]]:
    """A net whose channels die in three steps, a plan for each step, and the configs."""
    n = draw(nets(first_bias=True, second_bias=True))
    plans: list[Plan] = []
    configs: list[Any] = [n.cfg]
    for share in range(3):
        kill(n, share)
        tree = n.tree
        for made in plans:
            tree = apply(made, tree)
        plans.append(
            plan(
                tree,
                configs[-1],
                n.layout.spec("softplus"),
                width=draw(WIDTHS),
                threshold=draw(THRESHOLDS),
                multiple_of=draw(st.integers(1, 3)),
            )
        )
        configs.append(resized(plans[-1], configs[-1]))
    return n, plans, configs


@quick
@given(steps())
def test_a_composed_plan_does_what_its_plans_do_one_after_the_other(made):
    n, (first, second, third), configs = made
    one = apply(first, n.tree)
    two = apply(second, one)
    both = second @ first
    assert_equal(apply(both, n.tree), two, near=("down/bias",))
    assert resized(both, n.cfg) == configs[2]
    assert (both.removed, both.removed_parameters) == (
        first.removed + second.removed,
        first.removed_parameters + second.removed_parameters,
    )
    assert both.exact == (first.exact and second.exact)
    assert {r.width: (r.before, r.after) for r in both.resizes} == {
        "hidden": (
            n.layers[0].width,
            max(cut.width for cut in both.cuts),
        )
    }
    again = Plan.from_json(both.to_json())
    assert again == both
    assert str(again) == str(both)

    assert (third @ second) @ first == third @ both
    assert_equal(apply(third @ both, n.tree), apply(third, two), near=("down/bias",))
    assert resized(third @ both, n.cfg) == configs[3]


@quick
@given(steps())
def test_origins_say_where_a_channel_was(made):
    n, plans, _ = made
    small, whole = n.tree, plans[0]
    for number, p in enumerate(plans):
        whole = p @ whole if number else p
        small = apply(p, small)
    before, after = n.layout.layers(n.tree), n.layout.layers(small)
    for cut, old, new in zip(whole.cuts, before, after, strict=True):
        at = whole.origins[cut.site.second.path]
        np.testing.assert_array_equal(new.second, old.second[at])
        np.testing.assert_array_equal(new.first, old.first[:, :, at])


def layers(*dead: list[int], width: int = 8) -> dict[str, Any]:
    """A tree with one MLP for each list of dead channels."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for number, some in enumerate(dead):
        up, down = rng.normal(size=(2, width)), rng.normal(size=(width, 2))
        down[some] = 0
        tree[str(number)] = {"up": {"kernel": up}, "down": {"kernel": down}}
    return tree


SPEC = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))


def test_a_plan_composed_with_one_that_removes_nothing_removes_the_same():
    tree, cfg = layers([1, 2], [0, 2, 5]), {"hidden": 8}
    p = plan(tree, cfg, SPEC)
    nothing = plan(tree, cfg, SPEC, multiple_of=8)
    after = plan(apply(p, tree), resized(p, cfg), SPEC, multiple_of=6)
    for both in (p @ nothing, after @ p):
        assert_equal(apply(both, tree), apply(p, tree))
        assert resized(both, cfg) == {"hidden": 6}
        assert [cut.keep for cut in both.cuts] == [cut.keep for cut in p.cuts]


def test_what_is_dead_is_counted_once_and_by_rule_only_where_that_is_known():
    # A channel that fills the width up is found by either plan.
    tree, cfg = layers([1, 2], [0]), {"hidden": 8}
    first = plan(tree, cfg, SPEC)
    both = plan(apply(first, tree), resized(first, cfg), SPEC) @ first
    assert [(cut.dead, cut.rules) for cut in both.cuts] == [(2, {}), (1, {})]
    assert str(both).splitlines()[2].split() == ["0", "8", "2", "7"]
    nothing = plan(tree, cfg, SPEC, multiple_of=8)
    assert first @ nothing == first


def test_what_a_threshold_gave_up_is_never_forgotten():
    tree = layers([1, 2])
    tree["0"]["down"]["kernel"][[3, 4]] = 1e-6
    first = plan(tree, {"hidden": 8}, SPEC, threshold=1e-3)
    small, cfg = apply(first, tree), resized(first, {"hidden": 8})
    small["0"]["down"]["kernel"][0] = 0
    second = plan(small, cfg, SPEC)
    assert (second.exact, first.cuts[0].weak) == (True, 2)
    both = second @ first
    assert (both.exact, both.threshold, both.cuts[0].weak) == (False, 1e-3, 2)
    first = plan(layers([1, 2]), {"hidden": 8}, SPEC)
    second = plan(layers([1], width=6), {"hidden": 6}, SPEC, threshold=1e-3)
    assert (second @ first).threshold == 1e-3


@pytest.mark.parametrize("activations", [(None, "sigmoid"), ("sigmoid", None)])
def test_the_activation_is_that_of_the_plan_that_folds(activations):
    n = net(PLAIN["plain"], seed=0, depth=1)
    for channel, activation in enumerate(activations):
        if activation is None:
            n.layers[0].second[channel] = 0
        else:
            n.layers[0].first[:, :, channel] = 0
    first = plan(n.tree, n.cfg, n.layout.spec(activations[0]))
    one, cfg = apply(first, n.tree), resized(first, n.cfg)
    second = plan(one, cfg, n.layout.spec(activations[1]))
    both = second @ first
    assert (both.cuts[0].activation, both.cuts[0].folds) == (
        "sigmoid",
        (activations.index("sigmoid"),),
    )
    assert_equal(apply(both, n.tree), apply(second, one), near=("down/bias",))


def test_a_width_that_has_another_name_in_the_second_spec_is_told_once():
    tree, cfg = layers([1, 2]), {"hidden": 8, "other": 6}
    first = plan(tree, cfg, SPEC)
    spec = Spec(name="AGAIN", pairs=Pair(first="up", second="down", width="other"))
    second = plan(apply(first, tree), resized(first, cfg), spec)
    assert [str(r) for r in (second @ first).resizes] == ["hidden: 8 -> 6 channels"]


def test_slim_takes_a_composed_plan():
    tree, cfg = layers([1, 2, 4], [0, 5, 6]), {"hidden": 8}
    first = plan(tree, cfg, SPEC, multiple_of=7)
    second = plan(apply(first, tree), resized(first, cfg), SPEC)
    small, small_cfg = slim(tree, cfg, plan=second @ first)
    assert small_cfg == {"hidden": 5}
    assert_equal(small, apply(second, apply(first, tree)))


def test_why_a_width_is_blocked_is_told_by_the_plan_that_looked_last():
    spec = Spec(name="HARD", pairs=Pair(first="up", second="down", width="4*d"))
    tree, cfg = layers([1, 2]), {"d": 2}
    blocked, free = plan(tree, cfg, spec), plan(tree, cfg, spec, width="per_layer")
    assert blocked.blocked
    assert (free @ blocked).blocked == ()
    assert blocked.blocked == (blocked @ blocked).blocked


# --- plans of what a plan has left ------------------------------------------------------------


def test_layers_that_differ_already_share_no_smaller_width():
    tree, cfg = layers([0, 1, 2, 3], [0]), {"hidden": 8}
    first = plan(tree, cfg, SPEC, width="per_layer")
    small, cfg = apply(first, tree), resized(first, cfg)
    small["1"]["down"]["kernel"][:4] = 0
    second = plan(small, cfg, SPEC)
    assert second.blocked
    assert (second.removed, second.values) == (0, {})
    assert plan(layers([], width=4) | {"1": layers([], [], width=7)["1"]}, cfg, SPEC).blocked == ()


def test_the_plain_key_says_the_width_when_layers_no_longer_differ():
    tree, cfg = layers([0, 1, 2, 3], [0]), {"hidden": 8}
    first = plan(tree, cfg, SPEC, width="per_layer")
    small, cfg = apply(first, tree), resized(first, cfg)
    small["1"]["down"]["kernel"][:3] = 0
    second = plan(small, cfg, SPEC, width="per_layer")
    assert resized(second, cfg) == {"hidden": 4}
    plan(apply(second, small), resized(second, cfg), SPEC)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_went_whole_may_be_planned_again(layout):
    n = net(LAYOUTS[layout], seed=0, share=1.0)
    for ffn, dead in n.each():
        ffn.second[dead] = 0
    spec = n.layout.spec("relu")
    p = plan(n.tree, n.cfg, spec, width="per_layer")
    again = plan(apply(p, n.tree), resized(p, n.cfg), spec, width="per_layer")
    assert [cut.width for cut in (again @ p).cuts] == [0, 0]
    assert Plan.from_json(p.to_json()) == p


# --- stacks, heads, chains --------------------------------------------------------------------

STACKS = {
    "layers on the first axis": ("l d f", "l f d"),
    "layers on the second axis": ("d l f", "f l d"),
    "experts": ("e d f", "e f d"),
    "layers of experts": ("l e d f", "l e f d"),
}
SIZES = {"l": 2, "e": 3, "d": 2, "f": 7}


def by_row(kernel: np.ndarray, axes: str) -> np.ndarray:
    """A view with the stack in front, then the channels."""
    front = [axes.split().index(axis) for axis in "lef" if axis in axes]
    return np.moveaxis(kernel, front, range(len(front)))


def die(kernel: np.ndarray, axes: str, dead: dict[Any, np.ndarray]) -> np.ndarray:
    kernel = kernel.copy()
    for row, channels in dead.items():
        by_row(kernel, axes)[row][channels] = 0
    return kernel


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STACKS)
def test_stacked_layers_compose_and_expand_row_by_row(name, seed):
    rng = np.random.default_rng(seed)
    first_axes, axes = STACKS[name]
    up, down = (rng.normal(size=[SIZES[a] for a in own.split()]) for own in STACKS[name])
    spec = Spec(
        name="STACK",
        pairs=Pair(first="up", second="down", first_axes=first_axes, second_axes=axes),
    )
    stack = [SIZES[axis] for axis in "le" if axis in axes]
    rows = list(np.ndindex(*stack))

    def killed(tree: Any, size: int, count: int) -> Any:
        dead = {row: rng.choice(size, count, replace=False) for row in rows}
        return {**tree, "down": {"kernel": die(tree["down"]["kernel"], axes, dead)}}

    full: Any = {"up": {"kernel": up}, "down": {"kernel": down}}
    first = plan(killed(full, 7, 3), spec=spec)
    second = plan(killed(apply(first, full), 4, 2), spec=spec)
    both = second @ first
    assert (first.cuts[0].width, both.cuts[0].width) == (4, 2)
    assert Plan.from_json(both.to_json()) == both
    small = apply(both, full)
    assert_equal(small, apply(second, apply(first, full)))

    origins = both.origins["down/kernel"]
    assert origins.shape == (*stack, 2)
    for row in rows:
        for layer, own in (("up", first_axes), ("down", axes)):
            old, new = (by_row(t[layer]["kernel"], own)[row] for t in (full, small))
            np.testing.assert_array_equal(new, old[origins[row]])

    gone = {row: np.setdiff1d(np.arange(7), origins[row]) for row in rows}
    back = expand(both, small)
    np.testing.assert_array_equal(back["up"]["kernel"], die(up, first_axes, gone))
    np.testing.assert_array_equal(back["down"]["kernel"], die(down, axes, gone))
    assert_equal(apply(both, back), small)


HEADS = Spec(name="HEADS", pairs=dataclasses.replace(GROUPED, ragged=True))
HEADS_CFG = {"heads": 6, "groups": 3, "size": 2}


def attention() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": rng.normal(size=(4, width)), "bias": rng.normal(size=width)}
        for name, width in {"q": 12, "k": 6, "v": 6}.items()
    } | {"o": {"kernel": rng.normal(size=(12, 4)), "bias": rng.normal(size=4)}}


def without(tree: dict[str, Any], *heads: int) -> dict[str, Any]:
    kernel = tree["o"]["kernel"].copy()
    kernel.reshape(-1, 2, 4)[list(heads)] = 0
    return {**tree, "o": {**tree["o"], "kernel": kernel}}


def attend(tree: dict[str, Any], groups: tuple[int, ...]) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(5, 4))
    q, k, v = ((x @ tree[n]["kernel"] + tree[n]["bias"]).reshape(5, -1, 2) for n in ("q", "k", "v"))
    owners = np.repeat(np.arange(len(groups)), groups)
    logits = np.exp(np.einsum("thk,shk->hts", q, k[:, owners]))
    mixed = np.einsum("hts,shk->thk", logits / logits.sum(-1, keepdims=True), v[:, owners])
    return mixed.reshape(5, -1) @ tree["o"]["kernel"] + tree["o"]["bias"]


def test_heads_with_groups_compose_and_expand():
    tree = attention()
    first = plan(without(tree, 0, 1, 2), HEADS_CFG, HEADS, width="per_layer")
    assert (first.cuts[0].keep, first.cuts[0].groups) == ((3, 4, 5), (1, 2))
    one, cfg = apply(first, tree), resized(first, HEADS_CFG)
    second = plan(without(one, 1), cfg, HEADS, width="per_layer")
    both = second @ first
    assert (both.cuts[0].keep, both.cuts[0].groups) == ((3, 5), (1, 1))
    small = apply(both, tree)
    assert_equal(small, apply(second, one))
    assert resized(both, HEADS_CFG) == resized(second, cfg)
    assert Plan.from_json(both.to_json()) == both

    back = expand(both, small)
    assert back["q"]["kernel"].shape == (4, 12)
    assert back["v"]["kernel"].shape == (4, 6)
    assert not back["v"]["kernel"][:, :2].any()
    assert_equal(apply(both, back), small)
    assert gap(attend(back, (2, 2, 2)), attend(small, (1, 1))) <= 1e-12
    assert gap(attend(without(tree, 0, 1, 2, 4), (2, 2, 2)), attend(small, (1, 1))) <= 1e-12

    # The same number of heads in other groups is another tree.
    other = plan(without(tree, 2, 4, 5), HEADS_CFG, HEADS, width="per_layer")
    with pytest.raises(PlanError, match="not made for what the first one leaves") as caught:
        _ = second @ other
    assert "groups (1, 2)" in str(caught.value)
    assert "groups (2, 1)" in str(caught.value)


def test_plans_of_different_specs_are_joined():
    tree = {**attention(), **layers([1, 2], [0, 5])}
    ffn = plan(tree, {"hidden": 8} | HEADS_CFG, SPEC)
    cfg = resized(ffn, {"hidden": 8} | HEADS_CFG)
    one = apply(ffn, tree)
    heads = plan(without(one, 0, 3, 5), cfg, HEADS)
    both = heads @ ffn
    assert [cut.site.second.path for cut in both.cuts] == [
        "0/down/kernel",
        "1/down/kernel",
        "o/kernel",
    ]
    assert_equal(apply(both, tree), apply(heads, one))
    assert resized(both, {"hidden": 8} | HEADS_CFG) == resized(heads, cfg)
    assert [r.width for r in both.resizes] == ["hidden", "heads"]
    assert Plan.from_json(both.to_json()) == both


def chain() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    sizes = {"a": (3, 6), "b": (6, 5), "c": (5, 2)}
    return {
        name: {"kernel": rng.normal(size=size), "bias": rng.normal(size=size[1])}
        for name, size in sizes.items()
    }


AB, BC = (
    Spec(name=a + b, pairs=Pair(first=a, second=b, activation="tanh")) for a, b in ("ab", "bc")
)


def test_plans_for_either_side_of_a_tensor_are_joined():
    tree = chain()
    tree["b"]["kernel"][[0, 2]] = tree["c"]["kernel"][1] = 0
    for one, other in ((AB, BC), (BC, AB), (AB + BC, AB + BC)):
        first = plan(tree, spec=one, width="per_layer")
        small = apply(first, tree)
        small["b"]["kernel"] = small["b"]["kernel"].copy()
        small["b"]["kernel"][1] = 0
        second = plan(small, spec=other, width="per_layer")
        both = second @ first
        assert_equal(apply(both, tree), apply(second, apply(first, tree)))
        assert Plan.from_json(both.to_json()) == both
        back = expand(both, apply(both, tree))
        assert back["b"]["kernel"].shape == (6, 5)
        assert_equal(apply(both, back), apply(both, tree))


def test_constants_that_follow_from_the_first_cut_are_not_folded_in_one_go():
    tree = chain()
    tree["a"]["kernel"][:, 4] = 0  # a constant,
    tree["b"]["kernel"][:4, 3] = tree["b"]["kernel"][5:, 3] = 0  # which alone feeds this channel
    spec = AB + BC
    first = plan(tree, spec=spec, width="per_layer")
    second = plan(apply(first, tree), spec=spec, width="per_layer")
    assert second.cuts[1].folds == (3,)
    with pytest.raises(PlanError, match="not constant in this tree"):
        apply(second @ first, tree)


# --- what is refused --------------------------------------------------------------------------


def test_plans_that_do_not_follow_each_other_are_refused():
    tree, cfg = layers([1, 2], [0, 5]), {"hidden": 8}
    first = plan(tree, cfg, SPEC)
    for second in (
        first,
        plan(layers([0], width=7), {"hidden": 7}, SPEC),
        plan(layers([0], width=5), {"hidden": 5}, SPEC),
    ):
        with pytest.raises(PlanError, match="not made for what the first one leaves") as caught:
            _ = second @ first
        assert caught.value.path in {"0/up/kernel", "0/down/kernel"}
        assert "(2, 6)" in str(caught.value) or "(6, 2)" in str(caught.value)


def test_plans_that_know_different_tensors_are_refused():
    tree, cfg = layers([1, 2]), {"hidden": 8}
    first = plan(tree, cfg, SPEC)
    small = apply(first, tree)
    small["0"]["up"]["bias"] = np.ones(6)
    with pytest.raises(PlanError, match="not made for") as caught:
        _ = plan(small, resized(first, cfg), SPEC) @ first
    assert "0/up/bias" in str(caught.value)


def test_two_sites_may_not_claim_one_axis():
    tree = {"up": {"kernel": np.ones((2, 4))}, **{n: {"kernel": np.eye(4)} for n in ("one", "two")}}
    tree["one"]["kernel"][2] = tree["two"]["kernel"][2] = 0
    one, two = (
        plan(tree, spec=Spec(name=n, pairs=Pair(first="up", second=n))) for n in ("one", "two")
    )
    nothing = dataclasses.replace(one.cuts[0], keep=(0, 1, 2, 3), folds=())
    with pytest.raises(PlanError, match="same axis of a tensor") as caught:
        _ = two @ dataclasses.replace(one, cuts=(nothing,))
    assert caught.value.path == "up/kernel"


def test_two_activations_cannot_both_be_folded():
    n = net(PLAIN["plain"], seed=0, depth=1)
    n.layers[0].first[:, :, :2] = 0
    first = plan(n.tree, n.cfg, n.layout.spec("tanh"))
    small = apply(first, n.tree)
    small["layers"]["0"]["up"]["kernel"][:, 0] = 0
    cfg = resized(first, n.cfg)
    again = plan(small, cfg, n.layout.spec("sigmoid"))
    with pytest.raises(PlanError, match="not made for") as caught:
        _ = again @ first
    assert "sigmoid" in str(caught.value)
    assert (plan(small, cfg, n.layout.spec("tanh")) @ first).cuts[0].folds == (0, 1, 2)


# --- expand -----------------------------------------------------------------------------------


@quick
@given(nets(second_bias=True), WIDTHS, st.integers(1, 3))
def test_what_is_expanded_is_what_was_with_zeros_where_it_was_cut(n, width, multiple_of):
    for ffn, dead in n.each():
        ffn.second[dead[::2]] = 0
        ffn.first[:, :, dead[1::2]] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("softplus"), width=width, multiple_of=multiple_of)
    small = apply(p, n.tree)
    back = expand(p, small)
    for cut, ffn, folded in zip(p.cuts, n.layers, n.layout.layers(small), strict=True):
        gone = np.setdiff1d(np.arange(ffn.width), cut.keep)
        ffn.second[gone] = ffn.first[:, :, gone] = 0
        if ffn.first_bias is not None:
            ffn.first_bias[:, gone] = 0
        ffn.second_bias = folded.second_bias
    assert_equal(back, n.tree)
    assert_equal(apply(p, back, fold=False), small)
    after, before = (n.layout.layers(t) for t in (back, small))
    assert gap(run(after, "softplus", n.x), run(before, "softplus", n.x)) <= 1e-12


CONTAINERS: dict[str, Any] = {
    "dict": lambda t: t,
    "FrozenDict": freeze,
    "variables": lambda t: {"params": t},
    "nnx.State": lambda t: nnx.State(jax.tree.map(nnx.Param, t)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("leaf", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_tree_is_expanded_in_its_own_kind(container, leaf, dtype):
    tree = jax.tree.map(lambda x: leaf(x.astype(dtype)), layers([1, 2], [0, 5]))
    tree = CONTAINERS[container](tree | {"norm": leaf(np.ones(2))})
    p = plan(tree, {"hidden": 8}, SPEC)
    small = apply(p, tree)
    back = expand(p, small)
    assert type(back) is type(tree)
    for path, x in flatten(back).items():
        old = flatten(tree)[path]
        assert isinstance(x, jax.Array) == isinstance(old, jax.Array)
        assert (x.dtype, x.shape) == (old.dtype, old.shape)
    assert_equal(apply(p, back), small)
    (norm,) = (path for path in flatten(small) if path.endswith("norm"))
    assert flatten(back)[norm] is flatten(small)[norm]


def test_a_plan_that_cuts_nothing_expands_nothing():
    tree = layers([1])
    p = plan(tree, {"hidden": 8}, SPEC, multiple_of=8)
    back = expand(p, tree)
    assert all(x is flatten(tree)[path] for path, x in flatten(back).items())


def test_width_zero_is_expanded():
    tree = layers(list(range(8)))
    p = plan(tree, {"hidden": 8}, SPEC, width="per_layer")
    assert p.cuts[0].width == 0
    back = expand(p, apply(p, tree))
    assert not back["0"]["up"]["kernel"].any()
    assert back["0"]["up"]["kernel"].shape == (2, 8)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


def test_an_nnx_module_is_expanded_and_says_its_sizes():
    block = Block(nnx.Rngs(0))
    block.down.kernel[...] = block.down.kernel[...].at[jnp.array([0, 3])].set(0)
    p = plan(block, spec=SPEC)
    small = apply(p, block)
    back = expand(p, small)
    assert isinstance(back, Block)
    for module, width in ((block, 8), (small, 6), (back, 8)):
        assert (module.up.out_features, module.down.in_features) == (width, width)
        assert module.up.kernel.shape == (3, width)
    x = jnp.arange(12.0).reshape(4, 3) / 10
    np.testing.assert_allclose(back(x), block(x), rtol=1e-5, atol=1e-6)


def test_a_tree_that_the_plan_does_not_leave_is_refused():
    tree = layers([1, 2], [0, 5])
    p = plan(tree, {"hidden": 8}, SPEC)
    small = apply(p, tree)
    wide = {**small, "0": {**small["0"], "down": {"kernel": np.ones((6, 3))}}}
    flat = {**small, "0": {**small["0"], "down": {"kernel": np.ones(6)}}}
    lacking = {"0": small["0"]}
    for other, seen in ((tree, "(2, 8)"), (wide, "(6, 3)"), (flat, "(6,)"), (lacking, "no such")):
        with pytest.raises(PlanError, match="not what the plan leaves") as caught:
            expand(p, other)
        assert seen in str(caught.value)
        assert "give what apply(plan, ...) returned" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernel_of_a_size_that_no_pattern_has_is_refused(layout):
    n = net(LAYOUTS[layout], seed=3, share=0.5)
    for ffn, dead in n.each():
        ffn.second[dead] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    other = jax.tree.map(lambda x: np.ones([size + 1 for size in x.shape]), apply(p, n.tree))
    with pytest.raises(PlanError, match="not what the plan leaves"):
        expand(p, other)


def test_what_is_no_plan_does_not_compose():
    made = plan({"up": {"kernel": np.eye(2)}, "down": {"kernel": np.eye(2)}}, spec=_MLP)
    others: list[Any] = [None, 3, made.to_dict()]
    for other in others:
        with pytest.raises(TypeError, match="unsupported operand"):
            _ = made @ other


def test_a_tracer_is_not_expanded():
    tree = {"up": {"kernel": jnp.eye(2)}, "down": {"kernel": jnp.diag(jnp.array([1.0, 0.0]))}}
    made = plan(tree, spec=_MLP)
    small = apply(made, tree)
    with pytest.raises(TracedError):
        jax.jit(lambda t: expand(made, t))(small)
    with pytest.raises(TracedError):
        expand(made, jax.eval_shape(lambda: small))


def test_one_key_cannot_say_two_widths():
    """Each plan alone is right; both together would leave a config that fits neither half."""
    layer = {"up": {"kernel": np.ones((3, 6))}, "down": {"kernel": np.ones((6, 3))}}
    tree = {"a": layer, "b": jax.tree.map(np.copy, layer)}
    tree["a"]["down"]["kernel"] = tree["a"]["down"]["kernel"].copy()
    tree["a"]["down"]["kernel"][:3], tree["b"]["down"]["kernel"][:1] = 0, 0
    one, other = (
        plan(tree, {"hidden": 6}, Spec(name=at.upper(), pairs=Pair(at=at, **_WIDE)))
        for at in ("a", "b")
    )
    with pytest.raises(PlanError, match="not made for what the first one leaves") as caught:
        _ = other @ one
    assert "slim(params, cfg, plan=first)" in str(caught.value)


_WIDE: dict[str, Any] = {"first": "up", "second": "down", "width": "hidden"}
_MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))


def both_parts() -> tuple[dict[str, Any], dict[str, Any], list[Spec]]:
    tree = {**layers([1, 2], [0]), **without(attention(), 0)}
    pair = dataclasses.replace(next(iter(HEADS)), at="{i}")
    tree = {k: v for k, v in tree.items() if k.isdigit()} | {
        "2": {k: v for k, v in tree.items() if not k.isdigit()}
    }
    ffn = Spec(name="FFN", pairs=Pair(at="{i}", first="up", second="down", width="hidden"))
    return tree, {"hidden": 8, **HEADS_CFG}, [ffn, Spec(name="HEADS", pairs=pair)]


@pytest.mark.parametrize("model_type", [{}, {"model_type": "mine"}])
@pytest.mark.parametrize("order", [1, -1])
def test_plans_from_one_config_keep_each_others_layout(order, model_type):
    tree, cfg, specs = both_parts()
    cfg |= model_type
    first, second = (plan(tree, cfg, spec, width="per_layer") for spec in specs[::order])
    one, one_cfg = slim(tree, cfg, plan=first)
    two, two_cfg = slim(one, one_cfg, plan=second)
    said = two_cfg.get("per_layer_config"), two_cfg["flaxslim_layout"]["sites"]
    if model_type:
        assert said == ({"0": {"hidden": 6}}, {"2/o": [1, 2, 3, 4, 5]})
    else:
        assert said == (None, {"0/down": 6, "2/o": [1, 2, 3, 4, 5]})
    assert resized(second @ first, cfg) == two_cfg
    for spec in specs:
        plan(two, two_cfg, spec)  # the config fits the tensors
