"""A plan applied to a tree: what is cut, what is folded, and what is left alone."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_devices import run_code
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from hypothesis import given
from strategies import ACTS, LAYOUTS, gap, net, nets, quick, run

from flaxslim import Pair, Plan, Spec, apply, plan, slim
from flaxslim._apply import resized
from flaxslim._tree import flatten
from flaxslim.errors import PlanError

SPEC = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden", activation="tanh"))


def mlp(dtype="float32", *, seed: int = 0, width: int = 8) -> dict:
    """One MLP: channels 1 and 4 are dead, 6 is a constant; and things beside it."""
    rng = np.random.default_rng(seed)
    tree = {
        "up": {"kernel": rng.normal(size=(3, width)), "bias": rng.normal(size=width)},
        "down": {"kernel": rng.normal(size=(width, 3)), "bias": rng.normal(size=3)},
        "norm": {"scale": np.ones(width), "bias": np.ones(3)},
    }
    tree["down"]["kernel"][[1, 4]] = 0
    tree["up"]["kernel"][:, 6] = 0
    tree = jax.tree.map(lambda x: x.astype(dtype), tree)
    tree["up"] |= {"lora_a": np.ones((3, 2), dtype), "lora_b": np.ones((2, width), dtype)}
    tree["up"]["lora_b"][:, 6] = 0
    return tree


KEPT = [0, 2, 3, 5, 7]
CUT = {
    "up/kernel": (slice(None), KEPT),
    "up/bias": (KEPT,),
    "down/kernel": (KEPT,),
    "up/lora_b": (slice(None), KEPT),
}
TOUCHED = {*CUT, "down/bias"}


def partitioned(tree: dict) -> dict:
    return jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), tree)


def state(tree: dict) -> nnx.State:
    return nnx.State(jax.tree.map(nnx.Param, tree))


CONTAINERS = {
    "dict": lambda t: t,
    "FrozenDict": freeze,
    "params": lambda t: {"params": t},
    "frozen in dict": lambda t: {"params": freeze(t), "batch_stats": {"mean": np.ones(8)}},
    "flat": flatten,
    "nnx.State": state,
    "Partitioned": partitioned,
}


def check(before: dict, after: dict) -> None:
    """Two flat trees of `mlp`, perhaps below a prefix: exactly what must differ differs."""
    assert set(after) == set(before)
    for path, old in before.items():
        new, name = after[path], "/".join(path.split("/")[-2:])
        assert new.dtype == old.dtype
        assert isinstance(new, jax.Array) == isinstance(old, jax.Array)
        if name in CUT:
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old)[CUT[name]])
        elif name not in TOUCHED:
            assert new is old, path
        else:
            assert new.shape == old.shape
            assert np.any(np.asarray(new) != np.asarray(old))


@pytest.mark.parametrize("leaf", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_any_container_in_the_same_kind_out(container, leaf):
    tree = CONTAINERS[container](jax.tree.map(leaf, mlp()))
    kept_aside = {path: np.array(x) for path, x in flatten(tree).items()}
    identities = {path: id(x) for path, x in flatten(tree).items()}
    small = apply(plan(tree, {"hidden": 8}, SPEC), tree)
    assert type(small) is type(tree)
    if isinstance(tree, dict) and "params" in tree:
        assert type(small["params"]) is type(tree["params"])
    check(flatten(tree), flatten(small))
    # The input is what it was, leaf by leaf and bit by bit.
    for path, x in flatten(tree).items():
        assert id(x) == identities[path]
        np.testing.assert_array_equal(np.asarray(x), kept_aside[path])


def test_boxes_keep_their_names():
    tree = partitioned(mlp())
    tree["up"]["kernel"] = tree["up"]["kernel"].replace(names=("embed", "mlp"))
    small = apply(plan(tree, {"hidden": 8}, SPEC), tree)
    assert isinstance(small["up"]["kernel"], nn.Partitioned)
    assert small["up"]["kernel"].names == ("embed", "mlp")
    assert small["up"]["kernel"].value.shape == (3, 5)


@pytest.mark.parametrize("leaf", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
)
def test_dtypes_are_kept(dtype, leaf):
    tree = jax.tree.map(leaf, mlp(dtype))
    small = apply(plan(tree, {"hidden": 8}, SPEC), tree)
    after = flatten(small)
    assert {str(x.dtype) for x in after.values()} == {dtype}
    for path in CUT:
        np.testing.assert_array_equal(
            np.asarray(after[path]), np.asarray(flatten(tree)[path])[CUT[path]]
        )
    bias, constant = (np.asarray(x, np.float64) for x in (tree["up"]["bias"], tree["down"]["bias"]))
    row = np.asarray(tree["down"]["kernel"], np.float64)[6]
    exact = (constant + np.tanh(bias[6]) * row).astype(dtype)
    np.testing.assert_array_equal(np.asarray(after["down/bias"]), exact)


def test_float64_stays_float64_with_x64_disabled():
    tree = mlp("float64")
    small = apply(plan(tree, {"hidden": 8}, SPEC), tree)
    check(flatten(tree), flatten(small))
    bias = tree["down"]["bias"] + np.tanh(tree["up"]["bias"][6]) * tree["down"]["kernel"][6]
    np.testing.assert_allclose(small["down"]["bias"], bias, rtol=1e-15)


def test_host_and_device_leaves_may_be_mixed():
    tree = mlp()
    tree["down"] = jax.tree.map(jnp.asarray, tree["down"])
    check(flatten(tree), flatten(apply(plan(tree, {"hidden": 8}, SPEC), tree)))


def test_tensors_stay_on_their_devices():
    # In a process of its own: the number of devices is fixed when jax starts.
    code = """
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from test_apply import SPEC, mlp
        from flaxslim import slim
        one, two = jax.devices("cpu")
        tree = jax.tree.map(lambda x: jax.device_put(x, two), mlp())
        tree["down"]["bias"] = jax.device_put(tree["down"]["bias"], one)
        small, _ = slim(tree, {"hidden": 8}, SPEC)
        devices = jax.tree.map(lambda x: x.devices(), (tree, small))
        assert devices[0] == devices[1], devices
        # Half of the model on each device, along the axis that stays.
        mesh = Mesh(np.array([one, two]), ("x",))
        tree = mlp()
        tree["norm"] = {}
        place = lambda x, *names: jax.device_put(x, NamedSharding(mesh, P(*names)))
        rng = np.random.default_rng(0)
        tree["up"]["kernel"] = place(rng.normal(size=(4, 8)).astype("float32"), "x", None)
        tree["down"]["kernel"] = place(np.eye(8, 4, dtype="float32"), None, "x")
        tree["down"]["bias"] = place(np.ones(4, "float32"), "x")
        small, cfg = slim(tree, {"hidden": 8}, SPEC)
        assert cfg == {"hidden": 4}
        for name in ("up", "down"):
            assert small[name]["kernel"].sharding == tree[name]["kernel"].sharding
        np.testing.assert_array_equal(small["down"]["kernel"], np.eye(4))
        # And along the axis that is cut: 8 channels, then 4, on two devices.
        tree["up"]["kernel"] = place(np.asarray(tree["up"]["kernel"]), None, "x")
        small, _ = slim(tree, {"hidden": 8}, SPEC)
        assert small["up"]["kernel"].sharding == tree["up"]["kernel"].sharding
    """
    run_code(code, devices=2)


# --- nnx modules ------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(3, 8, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


class Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = Block(rngs), Block(rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        return self.head(self.second(self.first(x)))


def test_an_nnx_module_comes_back_new_and_whole():
    module = Stack(nnx.Rngs(0))
    for block, dead in ((module.first, [0, 2, 5]), (module.second, [1, 2, 3, 7])):
        block.down.kernel[...] = block.down.kernel[...].at[jnp.array(dead)].set(0)
    x = jnp.ones((4, 3)) * jnp.arange(3)
    y, leaves = module(x), flatten(module)
    small = apply(plan(module, {"hidden": 8}, SPEC), module)
    assert isinstance(small, Stack)
    assert small.head.bias is not None
    assert small is not module
    assert small.first.up.kernel.shape == (3, 5)
    assert small.second.down.kernel.shape == (5, 3)
    for block in (small.first, small.second):
        assert (block.up.in_features, block.up.out_features) == (3, 5)
        assert (block.down.in_features, block.down.out_features) == (5, 3)
    assert small.head.kernel[...] is module.head.kernel[...]
    np.testing.assert_allclose(small(x), y, rtol=1e-5, atol=1e-6)
    # The old one is what it was.
    assert (module.first.up.out_features, module.first.down.in_features) == (8, 8)
    after = flatten(module)
    assert all(after[path] is leaf for path, leaf in leaves.items())
    np.testing.assert_array_equal(module(x), y)
    # And the two share nothing that can be written to.
    small.count[...] += 1
    small.head.bias[...] += 1
    assert module.count[...] == 0
    np.testing.assert_array_equal(module(x), y)


# --- folds ------------------------------------------------------------------------------------


@quick
@given(nets(first_bias=True, second_bias=True))
def test_a_constant_is_folded_only_if_its_channel_goes(n):
    # Filling keeps some constant channels: these go on computing, and must not count twice.
    for ffn, dead in n.each():
        ffn.first[:, :, dead] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("softplus"), multiple_of=3)
    for cut in p.cuts:
        assert not set(cut.folds) & set(cut.keep)
    small = n.layout.layers(apply(p, n.tree))
    assert gap(run(small, "softplus", n.x), run(n.layers, "softplus", n.x)) <= 1e-12


def test_two_pairs_may_share_a_second_bias():
    # Two branches that are added before one bias: y = act(x@a)@b + act(x@c)@d + bias
    rng = np.random.default_rng(0)
    tree = {
        name: {"kernel": rng.normal(size=size), "bias": rng.normal(size=size[1])}
        for name, size in {"a": (3, 4), "b": (4, 3), "c": (3, 5), "d": (5, 3)}.items()
    }
    tree["out"] = tree.pop("b") | {"kernel_d": tree.pop("d")["kernel"]}
    tree["a"]["kernel"][:, 1] = 0
    tree["c"]["kernel"][:, 2] = 0
    pairs = tuple(
        Pair(first=a, second=b, second_bias="out/bias", activation="sigmoid")
        for a, b in (("a", "out/kernel"), ("c", "out/kernel_d"))
    )

    def forward(t):
        h, g = (ACTS["sigmoid"](x @ t[n]["kernel"] + t[n]["bias"]) for n in "ac")
        return h @ t["out"]["kernel"] + g @ t["out"]["kernel_d"] + t["out"]["bias"]

    x = rng.normal(size=(6, 3))
    p = plan(tree, spec=Spec(name="BRANCHES", pairs=pairs))
    small = apply(p, tree)
    assert (p.removed, small["c"]["kernel"].shape) == (2, (3, 4))
    assert gap(forward(small), forward(tree)) <= 1e-12


def test_a_chain_is_cut_on_both_axes_of_its_middle():
    rng = np.random.default_rng(1)
    tree = {
        name: {"kernel": rng.normal(size=size), "bias": rng.normal(size=size[1])}
        for name, size in {"a": (3, 6), "b": (6, 5), "c": (5, 2)}.items()
    }
    tree["b"]["kernel"][[0, 2]] = 0  # nothing reads them
    tree["a"]["kernel"][:, 4] = 0  # a constant
    tree["c"]["kernel"][1] = 0
    tree["b"]["kernel"][:, 3] = 0  # a constant

    def forward(t):
        h = x
        for name in "ab":
            h = ACTS["sigmoid"](h @ t[name]["kernel"] + t[name]["bias"])
        return h @ t["c"]["kernel"] + t["c"]["bias"]

    x = rng.normal(size=(6, 3))
    pairs = (
        Pair(first="a", second="b", activation="sigmoid"),
        Pair(first="b", second="c", activation="sigmoid"),
    )
    small = apply(plan(tree, spec=Spec(name="CHAIN", pairs=pairs)), tree)
    assert [small[n]["kernel"].shape for n in "abc"] == [(3, 3), (3, 3), (3, 2)]
    assert gap(forward(small), forward(tree)) <= 1e-12


# --- other trees ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_fits_every_tree_of_the_same_structure(layout):
    # An average of the parameters, moments, gradients: another tree, the same channels.
    n = net(LAYOUTS[layout], seed=4, share=0.5)
    for ffn, dead in n.each():
        ffn.second[dead] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    numbers = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), n.tree)
    before, after = n.layout.layers(numbers), n.layout.layers(apply(p, freeze(numbers)))
    for cut, old, new in zip(p.cuts, before, after, strict=True):
        keep = list(cut.keep)
        np.testing.assert_array_equal(new.first, old.first[:, :, keep])
        np.testing.assert_array_equal(new.second, old.second[keep])
        assert old.second_bias is not None
        assert new.second_bias is not None
        np.testing.assert_array_equal(new.second_bias, old.second_bias)


def test_a_plan_applied_twice_is_refused():
    tree = mlp()
    p = plan(tree, {"hidden": 8}, SPEC)
    with pytest.raises(PlanError, match="was it applied before") as caught:
        apply(p, apply(p, tree))
    assert "up/kernel" in str(caught.value)
    assert "(3, 5)" in str(caught.value)


def test_a_plan_for_another_structure_is_refused():
    tree = mlp()
    p = plan(tree, {"hidden": 8}, SPEC)
    with pytest.raises(PlanError, match="another structure") as caught:
        apply(p, {"model": tree})
    assert caught.value.path == "up/kernel"
    assert "model/up/kernel" in caught.value.near


@pytest.mark.parametrize("of", [optax.adam(1.0).init, lambda tree: {"params": tree, "step": 0}])
def test_a_state_without_like_is_told_of_it(of):
    tree = mlp()
    with pytest.raises(PlanError, match="another structure") as caught:
        apply(plan(tree, {"hidden": 8}, SPEC), of(tree))
    assert "like=params" in str(caught.value)


@pytest.mark.parametrize("leaf", ["frozen", True, 3])
def test_labels_for_parameters_are_refused(leaf):
    tree = mlp()
    with pytest.raises(PlanError, match="other sizes"):
        apply(plan(tree, {"hidden": 8}, SPEC), jax.tree.map(lambda _: leaf, tree))


def test_a_plan_for_another_size_is_refused():
    p = plan(mlp(), {"hidden": 8}, SPEC)
    with pytest.raises(PlanError, match="other sizes"):
        apply(p, mlp(width=9))


def test_a_bias_that_the_plan_does_not_know_is_refused():
    # Cut without its bias, a layer would be broken.
    tree = mlp()
    del tree["up"]["bias"]
    p = plan(tree, {"hidden": 8}, SPEC)
    with pytest.raises(PlanError, match="a bias that the plan does not know") as caught:
        apply(p, mlp())
    assert caught.value.path == "up/bias"


def test_scales_that_the_plan_does_not_know_are_refused():
    tree = mlp()
    p = plan(tree, {"hidden": 8}, SPEC)
    scaled = {**tree, "up": {**tree["up"], "kernel_scale": np.ones((1, 8))}}
    for attempt in (lambda: apply(p, scaled), lambda: slim(scaled, {"hidden": 8}, plan=p)):
        with pytest.raises(PlanError, match="the plan does not know what belongs") as caught:
            attempt()
        assert caught.value.path == "up/kernel_scale"
    assert apply(p, scaled, like=tree)["up"]["kernel_scale"].shape == (1, 5)


def test_a_plan_that_removes_nothing_changes_nothing():
    tree = mlp()
    p = plan(tree, {"hidden": 8}, SPEC, multiple_of=8)
    small = apply(p, tree)
    before = flatten(tree)
    assert all(x is before[path] for path, x in flatten(small).items())
    cfg = {"hidden": 8}
    assert resized(p, cfg) is cfg


def test_width_zero_is_defined():
    # No plan of ours says so, but a stored one may: the second bias stays.
    tree = mlp()
    p = plan(tree, {"hidden": 8}, SPEC)
    p = dataclasses.replace(p, cuts=(dataclasses.replace(p.cuts[0], keep=(), folds=()),))
    small = apply(p, tree)
    assert small["up"]["kernel"].shape == (3, 0)
    assert small["down"]["kernel"].shape == (0, 3)
    assert small["down"]["bias"] is tree["down"]["bias"]


def test_the_config_is_resized_beside_the_tree():
    cfg = FrozenDict({"hidden": 8, "other": "x"})
    p = plan(mlp(), cfg, SPEC)
    kept_aside = copy.deepcopy(cfg)
    assert resized(p, cfg) == FrozenDict({"hidden": 5, "other": "x"})
    assert cfg == kept_aside


# --- constants in other trees -----------------------------------------------------------------


def constant_mlp() -> dict:
    """Channel 2 of 4 reads nothing and puts out tanh of its bias."""
    rng = np.random.default_rng(5)
    first = rng.normal(size=(3, 4))
    first[:, 2] = 0
    return {
        "up": {"kernel": first, "bias": rng.normal(size=4)},
        "down": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)},
    }


CONSTANT = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="tanh"))


def test_an_average_gets_the_constants_of_its_own_biases():
    tree = constant_mlp()
    average = jax.tree.map(lambda x: 0.5 * x, tree)
    small = apply(plan(tree, spec=CONSTANT), average)
    x = np.random.default_rng(6).normal(size=(5, 3))
    before, after = (
        np.tanh(x @ t["up"]["kernel"] + t["up"]["bias"]) @ t["down"]["kernel"] + t["down"]["bias"]
        for t in (average, small)
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


def test_gradients_take_no_constants():
    p = plan(constant_mlp(), spec=CONSTANT)
    ones = jax.tree.map(np.ones_like, constant_mlp())
    with pytest.raises(PlanError, match="not constant in this tree") as caught:
        apply(p, ones)
    assert "fold=False" in str(caught.value)
    np.testing.assert_array_equal(apply(p, ones, fold=False)["down"]["bias"], np.ones(2))


def test_a_plan_with_folds_goes_through_json():
    p = plan(constant_mlp(), spec=CONSTANT)
    assert p.cuts[0].activation == "tanh"
    again = apply(Plan.from_json(p.to_json()), constant_mlp())
    np.testing.assert_array_equal(again["down"]["bias"], apply(p, constant_mlp())["down"]["bias"])


def test_dicts_keep_their_order():
    tree = constant_mlp()
    shuffled = {"up": tree["up"], "norm": {"z": np.ones(1), "a": np.ones(1)}, "down": tree["down"]}
    small = apply(plan(shuffled, spec=CONSTANT), shuffled)
    assert list(small) == ["up", "norm", "down"]
    assert list(small["norm"]) == ["z", "a"]


def test_a_stack_of_nnx_layers_says_its_new_sizes():
    @nnx.vmap
    def stack(key):
        return nnx.Linear(3, 4, rngs=nnx.Rngs(key))

    class Block(nnx.Module):
        def __init__(self):
            self.up = stack(jax.random.split(jax.random.key(0), 2))
            self.down = nnx.Param(jnp.ones((2, 4, 3)).at[:, 1].set(0))

    spec = Spec(
        name="S",
        pairs=Pair(first="up", second="down", first_axes="l d f", second_axes="l f d"),
    )
    block = Block()
    small = apply(plan(block, spec=spec), block)
    assert small.up.kernel.shape == (2, 3, 3)
    assert (small.up.in_features, small.up.out_features) == (3, 3)
