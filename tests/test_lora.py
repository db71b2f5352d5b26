"""Low-rank adapters: in the tree of the parameters, and as trees of their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from strategies import gap

from flaxslim import Pair, Plan, Spec, apply, expand, plan, slim
from flaxslim._lora import matrix, owner
from flaxslim._tree import flatten
from flaxslim.errors import PlanError, SiteShapeError

D, F, RANK = 3, 8, 2
DEAD, KEPT = [1, 4, 6], [0, 2, 3, 5, 7]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """`x @ (w + a @ b) + c`, whatever its tensors are called."""

    w: np.ndarray
    c: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x @ (self.w + self.a @ self.b) + self.c


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Where the tensors of a layer are; PyTorch stores all matrices the other way round."""

    w: str
    c: str
    a: str
    b: str
    torch: bool = False
    pair: Any = dataclasses.field(default_factory=dict)

    def pack(self, layers: dict[str, Layer], *, only: str = "wcab") -> Any:
        turn = (lambda x: x.T) if self.torch else (lambda x: x)
        flat = {
            getattr(self, part).format(name): turn(getattr(layer, part))
            for name, layer in layers.items()
            for part in only
        }
        return traverse_util.unflatten_dict(flat, sep="/")

    def unpack(self, *trees: Any) -> dict[str, Layer]:
        flat = {path: x for tree in trees for path, x in flatten(tree).items()}
        turn = (lambda x: x.T) if self.torch else (lambda x: x)
        return {
            name: Layer(**{p: turn(flat[getattr(self, p).format(name)]) for p in "wcab"})
            for name in ("up", "down")
        }

    @property
    def spec(self) -> Spec:
        layers = {"first": "up", "second": "down"} | self.pair
        pair = Pair(at="block", activation="tanh", **layers)
        spec = Spec(name="MLP", pairs=pair)
        return spec.torch() if self.torch else spec


def _named(a: str, b: str, **more: Any) -> Names:
    return Names(w="block/{}/kernel", c="block/{}/bias", a=a, b=b, **more)


NAMES = {
    "nnx.LoRA": _named("block/{}/lora_a", "block/{}/lora_b"),
    "nnx.LoRALinear": _named("block/{}/lora/lora_a", "block/{}/lora/lora_b"),
    "Linen": _named("block/{}/lora_A/kernel", "block/{}/lora_B/kernel"),
    "qwix": _named("block/{}/kernel_lora_a", "block/{}/kernel_lora_b"),
    "PEFT": Names(
        w="block/{}/weight",
        c="block/{}/bias",
        a="block/{}/lora_A/weight",
        b="block/{}/lora_B/weight",
        torch=True,
    ),
    "PEFT, named": Names(
        w="block/{}/weight",
        c="block/{}/bias",
        a="block/{}/lora_A/default/weight",
        b="block/{}/lora_B/default/weight",
        torch=True,
    ),
    "lora_down": _named("block/{}/lora_down/kernel", "block/{}/lora_up/kernel"),
    "a dict": _named("block/{}/lora/A", "block/{}/lora/B"),
    "adapter_a": _named("block/{}/adapter_a", "block/{}/adapter_b"),
    "a dict of an adapter": _named("block/{}/adapter/A", "block/{}/adapter/B"),
    "adapter_down": _named("block/{}/adapter_down/kernel", "block/{}/adapter_up/kernel"),
    "wrapped": Names(
        w="block/{}/base_module/kernel",
        c="block/{}/base_module/bias",
        a="block/{}/lora_a",
        b="block/{}/lora_b",
        pair={"first": "up/base_module", "second": "down/base_module"},
    ),
    "PEFT, wrapped": Names(
        w="block/{}/base_layer/weight",
        c="block/{}/base_layer/bias",
        a="block/{}/lora_A/default/weight",
        b="block/{}/lora_B/default/weight",
        torch=True,
        pair={"first": "up/base_layer", "second": "down/base_layer"},
    ),
    "tensors in one folder": Names(
        w="block/{}",
        c="block/{}_bias",
        a="block/{}_lora_a",
        b="block/{}_lora_b",
        pair={
            "first": "up",
            "second": "down",
            "first_bias": "up_bias",
            "second_bias": "down_bias",
        },
    ),
}
FLAX = NAMES["nnx.LoRA"]
X = np.random.default_rng(9).normal(size=(5, D))


def layers(seed: int = 0, rank: int = RANK) -> dict[str, Layer]:
    """Two layers in which nothing is dead, neither in the kernels nor in what is added to them."""
    rng = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> Layer:
        shapes = {
            "w": (inputs, outputs),
            "c": (outputs,),
            "a": (inputs, rank),
            "b": (rank, outputs),
        }
        return Layer(**{name: rng.normal(size=shape) for name, shape in shapes.items()})

    return {"up": layer(D, F), "down": layer(F, D)}


def dead_rows(seed: int = 0, rank: int = RANK) -> dict[str, Layer]:
    """Nothing reads the dead channels, neither the kernel nor the adapter."""
    made = layers(seed, rank)
    made["down"].w[DEAD] = made["down"].a[DEAD] = 0
    return made


def run(made: dict[str, Layer]) -> np.ndarray:
    return X + made["down"](np.tanh(made["up"](X)))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_in_the_tree_is_cut_with_its_kernels(name):
    names = NAMES[name]
    tree = names.pack(dead_rows())
    p = plan(tree, spec=names.spec)
    assert p.cuts[0].keep == tuple(KEPT)
    small = names.unpack(apply(p, tree))
    assert small["up"].b.shape == (RANK, 5)
    assert small["down"].a.shape == (5, RANK)
    assert gap(run(small), run(dead_rows())) <= 1e-12
    assert Plan.from_json(p.to_json()) == p
    assert gap(run(names.unpack(expand(p, apply(p, tree)))), run(dead_rows())) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_channel_that_an_adapter_reads_is_alive(name):
    made = dead_rows()
    made["down"].a[[1, 4]] = 1.0
    p = plan(NAMES[name].pack(made), spec=NAMES[name].spec)
    assert p.cuts[0].keep == (0, 1, 2, 3, 4, 5, 7)


def test_a_matrix_without_its_partner_is_taken_to_add_something():
    made = dead_rows()
    made["down"].a[4] = 1.0
    p = plan(FLAX.pack(made, only="wca"), spec=FLAX.spec)
    assert p.cuts[0].keep == (0, 2, 3, 4, 5, 7)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_adds_nothing_yet_leaves_dead_what_is_dead(name):
    # As adapters begin: B is zero, A is random.
    names, made = NAMES[name], dead_rows()
    made["down"].a[DEAD] = 1.0
    made["down"].b[:] = 0
    tree = names.pack(made)
    p = plan(tree, spec=names.spec)
    assert p.cuts[0].keep == tuple(KEPT)
    assert gap(run(names.unpack(apply(p, tree))), run(made)) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_its_own_is_cut_by_the_plan_of_its_parameters(name):
    names, made = NAMES[name], dead_rows()
    params, adapter = names.pack(made, only="wc"), names.pack(made, only="ab")
    p = plan(params, spec=names.spec)
    small = names.unpack(apply(p, params), apply(p, adapter, like=params))
    assert small["up"].b.shape == (RANK, 5)
    assert gap(run(small), run(made)) <= 1e-12
    # Below names of its own, and with its parameters; what is not cut is the same.
    for tree in ({"base_model": {"model": adapter}}, names.pack(made)):
        for path, x in flatten(apply(p, tree, like=params)).items():
            old = flatten(tree)[path]
            assert (x is old) == (x.shape == old.shape)
            assert x.size * 8 == old.size * (8 if x is old else 5)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_reads_a_channel_that_goes_is_refused(name):
    names, made = NAMES[name], dead_rows()
    made["down"].a[4] = 1e-3
    params, adapter = names.pack(made, only="wc"), names.pack(made, only="ab")
    p = plan(params, spec=names.spec)
    with pytest.raises(PlanError, match="make 1 channels alive") as caught:
        apply(p, adapter, like=params)
    assert names.a.format("down") in str(caught.value)
    assert "channel 4 of" in str(caught.value)
    # Moments and gradients of an adapter are whatever they are.
    state = optax.adam(1e-2).init(adapter)
    state = jax.tree.map(lambda x: x + 1.0, state)
    small = apply(p, {"opt_state": state}, like=params)["opt_state"][0].mu
    assert names.unpack(apply(p, params), small)["down"].a.shape == (5, RANK)
    small = names.unpack(apply(p, params), apply(p, adapter, like=params, fold=False))
    assert small["down"].a.shape == (5, RANK)


def test_an_adapter_that_is_called_one_is_checked_without_folds_too():
    made = dead_rows()
    made["down"].a[4] = 1e-3
    params, adapter = FLAX.pack(made, only="wc"), FLAX.pack(made, only="ab")
    p = plan(params, spec=FLAX.spec)
    with pytest.raises(PlanError, match="make 1 channels alive"):
        apply(p, {"params": params, "lora": adapter}, like=params, fold=False)


# What is given to a plan that was made for the parameters alone: the tree, and its `like`.
UNKNOWN: dict[str, Any] = {
    "apply": lambda p, tree, adapter: apply(p, tree),
    "slim": lambda p, tree, adapter: slim(tree, plan=p),
    "like": lambda p, tree, adapter: apply(p, tree, like=tree),
    "state": lambda p, tree, adapter: apply(p, optax.adam(1.0).init(adapter), like=tree),
}


@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("way", UNKNOWN)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_that_the_plan_does_not_know_is_refused(name, way, alive):
    names, made = NAMES[name], dead_rows()
    if alive:
        made["down"].a[4] = 1.0
    p = plan(names.pack(made, only="wc"), spec=names.spec)
    with pytest.raises(PlanError, match="the plan does not know what belongs") as caught:
        UNKNOWN[way](p, names.pack(made), names.pack(made, only="ab"))
    assert caught.value.path == names.a.format("down")
    assert names.b.format("up") in str(caught.value)
    assert names.b.format("down") not in str(caught.value)


@pytest.mark.parametrize("collection", [False, True])
def test_an_adapter_in_a_collection_of_its_own_is_refused(collection):
    params, adapter = FLAX.pack(dead_rows(), only="wc"), FLAX.pack(dead_rows(), only="ab")
    params = {"params": params} if collection else params
    p = plan(params, spec=FLAX.spec)
    with pytest.raises(PlanError, match="the plan does not know what belongs") as caught:
        apply(p, {**params, "lora": adapter})
    assert caught.value.path == "lora/block/down/lora_a"
    if collection:
        small = flatten(apply(p, {**params, "lora": adapter}, like=params))
        assert small["lora/block/down/lora_a"].shape == (5, RANK)


@pytest.mark.parametrize("name", ["lora_magnitude", "lora_magnitude_vector/default/weight"])
def test_magnitudes_are_refused(name):
    tree = FLAX.pack(dead_rows())
    params = FLAX.pack(dead_rows(), only="wc")
    more = traverse_util.unflatten_dict({**flatten(tree), f"block/up/{name}": np.ones(F)}, sep="/")
    for attempt in (
        lambda: slim(more, None, FLAX.spec),
        lambda: apply(plan(more, spec=FLAX.spec), more),
        lambda: apply(plan(params, spec=FLAX.spec), more, like=params),
    ):
        with pytest.raises(PlanError) as caught:
            attempt()
        assert f"block/up/{name}" in str(caught.value)


def test_a_dead_channel_that_stays_may_be_read_by_an_adapter():
    made = dead_rows()
    made["down"].a[1] = 1.0
    params, adapter = FLAX.pack(made, only="wc"), FLAX.pack(made, only="ab")
    p = plan(params, spec=FLAX.spec, multiple_of=6)  # channel 1 fills it up
    small = FLAX.unpack(apply(p, params), apply(p, adapter, like=params))
    assert gap(run(small), run(made)) <= 1e-12


def test_an_average_with_its_adapter_is_cut_whatever_is_dead_in_it():
    # It lags behind the parameters, in which the channels have died.
    made = dead_rows()
    params, p = FLAX.pack(made, only="wc"), plan(FLAX.pack(made, only="wc"), spec=FLAX.spec)
    lagging = FLAX.pack(layers())
    lagging["block"]["down"]["lora_a"] = made["down"].a
    small = FLAX.unpack(apply(p, lagging, like=params))
    np.testing.assert_array_equal(small["down"].w, layers()["down"].w[KEPT])
    # And if it is the parameters that live again, no adapter is to blame.
    alive = FLAX.pack(layers(), only="wc")
    small = FLAX.unpack(apply(p, alive), apply(p, FLAX.pack(made, only="ab"), like=alive))
    assert small["down"].a.shape == (5, RANK)


# --- the rules, adapter and all ---------------------------------------------------------------


def silent() -> dict[str, Layer]:
    """The first layer never moves the dead channels, though the second reads them."""
    made = layers()
    made["up"].w[:, DEAD] = made["up"].b[:, DEAD] = made["up"].c[DEAD] = 0
    return made


def check_alone(made: dict[str, Layer]) -> None:
    """The adapter, cut by the plan of its base, computes what it did."""
    params, adapter = FLAX.pack(made, only="wc"), FLAX.pack(made, only="ab")
    p = plan(params, spec=FLAX.spec)
    small = FLAX.unpack(apply(p, params), apply(p, adapter, like=params))
    assert len(small["down"].w) == 5
    assert gap(run(small), run(made)) <= 1e-12


def test_a_channel_that_no_matrix_moves_is_dead_whatever_reads_it():
    made = silent()
    p = plan(FLAX.pack(made), spec=FLAX.spec)
    assert p.cuts[0].rules == {"iii": 3}
    assert gap(run(FLAX.unpack(apply(p, FLAX.pack(made)))), run(made)) <= 1e-12
    check_alone(made)


def test_a_channel_that_an_adapter_moves_is_alive():
    made = silent()
    made["up"].b[1, 4] = 0.5
    assert plan(FLAX.pack(made), spec=FLAX.spec).cuts[0].keep == (0, 2, 3, 4, 5, 7)
    with pytest.raises(PlanError, match="make 1 channels alive") as caught:
        check_alone(made)
    assert "block/up/lora_b" in str(caught.value)
    made["up"].a[:] = 0  # now it adds nothing
    check_alone(made)


def constant() -> dict[str, Layer]:
    made = silent()
    made["up"].c[DEAD] = 1.0
    return made


def test_a_constant_is_folded_only_where_no_adapter_reads_it():
    # What an adapter makes of it depends on a scale that no tensor holds.
    made = constant()
    made["down"].a[[1, 6]] = 0
    p = plan(FLAX.pack(made), spec=FLAX.spec)
    assert p.cuts[0].folds == (1, 6)
    assert p.cuts[0].keep == (0, 2, 3, 4, 5, 7)
    assert gap(run(FLAX.unpack(apply(p, FLAX.pack(made)))), run(made)) <= 1e-12
    with pytest.raises(PlanError, match="make 1 channels alive"):
        check_alone(made)
    made["down"].a[4] = 0
    check_alone(made)


def test_a_threshold_gives_up_no_channel_that_an_adapter_reads():
    made = layers()
    made["down"].w[DEAD] = 1e-6
    made["down"].a[[1, 6]] = 0
    p = plan(FLAX.pack(made), spec=FLAX.spec, threshold=1e-3)
    assert p.cuts[0].keep == (0, 2, 3, 4, 5, 7)
    assert gap(run(FLAX.unpack(apply(p, FLAX.pack(made)))), run(made)) <= 1e-4
    params, adapter = FLAX.pack(made, only="wc"), FLAX.pack(made, only="ab")
    p = plan(params, spec=FLAX.spec, threshold=1e-3)
    with pytest.raises(PlanError, match="make 1 channels alive"):
        apply(p, adapter, like=params)


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nnx.LoRA", "Linen", "PEFT", "PEFT, named"])
def test_a_rank_of_the_size_of_the_layer_does_not_confuse(name):
    names, made = NAMES[name], dead_rows(rank=F)
    tree = names.pack(made)
    p = plan(tree, spec=names.spec)
    small = names.unpack(apply(p, tree))
    assert small["up"].b.shape == (F, 5)
    assert small["down"].a.shape == (5, F)
    assert gap(run(small), run(made)) <= 1e-12


def heads(joined: bool) -> tuple[dict[str, Any], Any]:
    """Attention of 4 heads by einsum kernels, of which the output reads 0 and 2."""
    rng = np.random.default_rng(0)
    d, h, k, r = 6, 4, 2, 3
    shapes = {"w": (d, h, k), "w_lora_a": (d, r), "w_lora_b": (r, h, k)}
    tree: dict[str, Any] = {
        name: {n: rng.normal(size=shape) for n, shape in shapes.items()} for name in "qkv"
    }
    shapes = {"w": (h, k, d), "w_lora_a": (h, k, r), "w_lora_b": (r, d)}
    tree["o"] = {n: rng.normal(size=shape) for n, shape in shapes.items()}
    tree["o"]["w"][[1, 3]] = tree["o"]["w_lora_a"][[1, 3]] = 0

    def forward(t: Any) -> np.ndarray:
        heads = t["o"]["w"].shape[0]
        x = np.random.default_rng(1).normal(size=(5, d))
        q, key, v = (
            np.einsum("td,dhk->thk", x, t[n]["w"])
            + ((x @ t[n]["w_lora_a"]) @ t[n]["w_lora_b"].reshape(r, -1)).reshape(5, heads, k)
            for n in "qkv"
        )
        logits = np.exp(np.einsum("thk,shk->hts", q, key))
        mixed = np.einsum("hts,shk->thk", logits / logits.sum(-1, keepdims=True), v)
        low = mixed.reshape(5, -1) @ t["o"]["w_lora_a"].reshape(-1, r)
        return np.einsum("thk,hkd->td", mixed, t["o"]["w"]) + low @ t["o"]["w_lora_b"]

    if joined:
        for name in "qkv":
            tree[name]["w_lora_b"] = tree[name]["w_lora_b"].reshape(r, h * k)
        tree["o"]["w_lora_a"] = tree["o"]["w_lora_a"].reshape(h * k, r)
    return tree, forward


HEADS = Spec(
    name="HEADS",
    pairs=Pair(
        first="v",
        second="o",
        first_axes="d h k",
        second_axes="h k d",
        also={"q": "d h k", "k": "d h k"},
        axis="h",
        kernel="w",
        activation="identity",
    ),
)


@pytest.mark.parametrize("joined", [False, True])
def test_adapters_of_einsum_kernels_are_cut_by_heads(joined):
    tree, forward = heads(joined)
    p = plan(tree, spec=HEADS)
    assert p.cuts[0].keep == (0, 2)
    small = apply(p, tree)
    assert small["q"]["w_lora_b"].shape == ((3, 4) if joined else (3, 2, 2))
    assert gap(forward(small), forward(tree)) <= 1e-12
    params = {name: {"w": layer["w"]} for name, layer in tree.items()}
    alone = apply(plan(params, spec=HEADS), tree, like=params)
    assert jax.tree.all(jax.tree.map(np.array_equal, alone, small))


@pytest.mark.parametrize("axes", [("l d f", "l f d"), ("d l f", "f l d")])
def test_adapters_of_stacked_layers_lose_the_channels_of_their_layers(axes):
    at = axes[0].index("l") // 2
    made = [layers(seed=i, rank=2) for i in range(2)]
    for i, dead in enumerate(([0, 1], [3, 5])):
        made[i]["down"].w[dead] = made[i]["down"].a[dead] = 0
    tree = FLAX.pack(
        {
            name: Layer(
                **{
                    part: np.stack(
                        [getattr(m[name], part) for m in made], at if part in "wab" else 0
                    )
                    for part in "wcab"
                }
            )
            for name in ("up", "down")
        }
    )
    for layer in tree["block"].values():
        del layer["bias"]
    pair = Pair(at="block", first="up", second="down", first_axes=axes[0], second_axes=axes[1])
    spec = Spec(name="STACK", pairs=pair)
    p = plan(tree, spec=spec)
    params = {"block": {n: {"kernel": t["kernel"]} for n, t in tree["block"].items()}}
    in_tree, alone = apply(p, tree), apply(plan(params, spec=spec), tree, like=params)
    assert jax.tree.all(jax.tree.map(np.array_equal, alone, in_tree))
    for i, keep in enumerate(([2, 3, 4, 5, 6, 7], [0, 1, 2, 4, 6, 7])):
        up, down = (in_tree["block"][name] for name in ("up", "down"))
        np.testing.assert_array_equal(up["lora_b"].take(i, at), made[i]["up"].b[:, keep])
        np.testing.assert_array_equal(up["lora_a"].take(i, at), made[i]["up"].a)
        np.testing.assert_array_equal(down["lora_a"].take(i, at), made[i]["down"].a[keep])


def test_the_adapter_of_a_fused_kernel_has_its_parts():
    rng = np.random.default_rng(0)
    tree = {
        "up": {"w": rng.normal(size=(2, 3, 8)), "w_lora_a": rng.normal(size=(3, 2))},
        "down": {"w": rng.normal(size=(8, 3))},
    }
    tree["up"]["w_lora_b"] = rng.normal(size=(2, 2, 8))  # (r, parts, f)
    tree["down"]["w"][DEAD] = 0
    pair = Pair(first="up", second="down", first_axes="2 d f", gated=True, kernel="w")
    small = apply(plan(tree, spec=Spec(name="GATED", pairs=pair)), tree)
    np.testing.assert_array_equal(small["up"]["w_lora_b"], tree["up"]["w_lora_b"][..., KEPT])


def test_both_matrices_are_cut_in_the_middle_of_a_chain():
    rng = np.random.default_rng(1)
    sizes = {"a": (3, 6), "b": (6, 5), "c": (5, 2)}
    tree = {
        n: {
            "kernel": rng.normal(size=(i, o)),
            "lora_a": rng.normal(size=(i, 2)),
            "lora_b": rng.normal(size=(2, o)),
        }
        for n, (i, o) in sizes.items()
    }
    for name, row in {"b": 2, "c": 4}.items():
        tree[name]["kernel"][row] = tree[name]["lora_a"][row] = 0
    spec = Spec(name="CHAIN", pairs=(Pair(first="a", second="b"), Pair(first="b", second="c")))
    params = {name: {"kernel": layer["kernel"]} for name, layer in tree.items()}
    in_tree = apply(plan(tree, spec=spec), tree)
    alone = apply(plan(params, spec=spec), tree, like=params)
    for small in (in_tree, alone):
        assert {p: x.shape for p, x in flatten(small["b"]).items()} == {
            "kernel": (5, 4),
            "lora_a": (5, 2),
            "lora_b": (2, 4),
        }
    np.testing.assert_array_equal(in_tree["b"]["lora_b"], alone["b"]["lora_b"])


def test_a_matrix_that_does_not_fit_is_refused():
    # Ignored, it might bring to life what is called dead.
    tree = FLAX.pack(dead_rows())
    tree["block"]["down"]["lora_a"] = np.ones((7, RANK))
    params = FLAX.pack(dead_rows(), only="wc")
    for attempt in (
        lambda: plan(tree, spec=FLAX.spec),
        lambda: apply(plan(params, spec=FLAX.spec), tree, like=params),
    ):
        with pytest.raises(SiteShapeError, match="does not fit the kernel") as caught:
            attempt()
        assert caught.value.path == "block/down/lora_a"
        assert "(7, 2)" in str(caught.value)


def test_a_matrix_that_experts_share_is_refused():
    # qwix: B of an einsum over experts has no axis of experts, and these lose different channels.
    rng = np.random.default_rng(0)
    tree = {
        "up": {"w": rng.normal(size=(2, 3, 8)), "w_lora_b": rng.normal(size=(4, 8))},
        "down": {"w": rng.normal(size=(2, 8, 3))},
    }
    pair = Pair(first="up", second="down", first_axes="e d f", second_axes="e f d", kernel="w")
    with pytest.raises(SiteShapeError, match="does not fit the kernel") as caught:
        plan(tree, spec=Spec(name="EXPERTS", pairs=pair))
    assert caught.value.path == "up/w_lora_b"


# --- nnx --------------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.LoRALinear(D, F, lora_rank=RANK, rngs=rngs)
        self.down = nnx.LoRALinear(F, D, lora_rank=RANK, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


def test_lora_layers_of_nnx_are_slimmed_and_their_optimizer_goes_on():
    block = Block(nnx.Rngs(0))
    block.down.kernel[...] = block.down.kernel[...].at[jnp.array(DEAD)].set(0)
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="tanh"))
    optimizer = nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.LoRAParam)
    p = plan(block, spec=spec)
    small, small_optimizer = apply(p, block), apply(p, optimizer, like=block)
    assert small.up.lora.lora_b.shape == (RANK, 5)
    assert (small.up.lora.out_features, small.down.lora.in_features) == (5, 5)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(small(x), block(x), rtol=1e-5, atol=1e-6)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=wrt)(small)
    small_optimizer.update(small, grads)
    assert np.any(small.down.lora.lora_b[...] != 0)


def test_an_adapter_that_is_alive_keeps_its_channels_in_slim():
    tree, cfg = FLAX.pack(layers()), {"hidden": F}
    tree["block"]["down"]["kernel"][DEAD] = 0
    tree["block"]["down"]["lora_a"][[1, 4]] = 0
    pair = dataclasses.replace(next(iter(FLAX.spec)), width="hidden")
    small, cfg = slim(tree, cfg, Spec(name="MLP", pairs=pair))
    assert cfg == {"hidden": 6}
    assert gap(run(FLAX.unpack(small)), run(FLAX.unpack(tree))) <= 1e-12


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["up/kernel", "explora/a", "up/lora_alpha", "lora_adam/mu", "lora/kernel", "up/lora_c"]
)
def test_what_is_called_otherwise_is_no_low_rank_matrix(path):
    assert matrix(path) is None


@pytest.mark.parametrize(
    ("path", "partner"),
    [
        ("lora_a", "lora_b"),
        ("lora/lora_b", "lora/lora_a"),
        ("a/lora_A/b/weight", "a/lora_B/b/weight"),
        ("b/w_a_lora_b", "b/w_a_lora_a"),
    ],
)
def test_the_other_matrix_is_known_by_its_name(path, partner):
    for one, other in ((path, partner), (partner, path)):
        found = matrix(one)
        assert found is not None
        assert found.partner == other


OTHERS = {
    "a bottleneck": {"adapter_down": (F, 2), "adapter_up": (2, F)},
    "two adapters": {"adapter_a": (D, D), "adapter_b": (D, D)},
    "one alone": {"adapter_a": (D, 2)},
    "another rank": {"adapter/A": (D, 2), "adapter/B": (4, F)},
}


@pytest.mark.parametrize("own", OTHERS.values(), ids=OTHERS)
def test_what_is_called_an_adapter_and_has_other_shapes_is_none(own):
    """It stays as it is; where its size is that of the channels, a note of the plan says so."""
    tree = {"block": FLAX.pack(dead_rows(), only="wc")["block"]}
    flat = flatten(tree) | {f"block/up/{name}": np.ones(shape) for name, shape in own.items()}
    tree = traverse_util.unflatten_dict(flat, sep="/")
    p = plan(tree, spec=FLAX.spec)
    assert p.removed == len(DEAD)
    small = flatten(apply(p, tree))
    assert {name: small[f"block/up/{name}"].shape for name in own} == own
    wide = [name for name, shape in own.items() if F in shape and "/" not in name]
    assert all(any(name in note for note in p.notes) for name in wide)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("lora_a", ""),
        ("lora/lora_a", ""),
        ("up/lora/lora_a", "up"),
        ("lora/up/lora_A/weight", "lora/up"),
        ("up/w_lora_a", "up"),
    ],
)
def test_a_matrix_stands_in_the_folder_of_its_kernel(path, folder):
    found = matrix(path)
    assert found is not None
    assert found.folder == folder


def test_whose_a_matrix_is_follows_from_its_name_or_from_the_only_kernel():
    assert owner("w2", ["mlp/w1", "mlp/w2"]) == "mlp/w2"
    assert owner("w3", ["mlp/w1", "mlp/w2"]) is None
    assert owner("", ["mlp/w1", "mlp/w2"]) is None
    assert owner("", ["mlp/w1"]) == owner("other", ["mlp/w1"]) == "mlp/w1"
    assert owner("", ["up/table", "up/kernel"]) == "up/kernel"
    assert owner("", []) is None


def test_adapters_that_the_plan_does_not_know_are_not_left_beside_an_expanded_kernel():
    tree = {"up": {"kernel": np.ones((4, 6))}, "down": {"kernel": np.ones((6, 3))}}
    tree["down"]["kernel"][2] = 0
    made = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    small = apply(made, tree)
    small["down"] |= {"lora_a": np.ones((5, 2)), "lora_b": np.ones((2, 3))}
    with pytest.raises(PlanError, match="does not know what belongs to a kernel"):
        expand(made, small)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_another_reader_is_one_that_reads(name):
    """Its A has the channels, which count as read; beside or apart from the parameters."""
    names, made = NAMES[name], {**dead_rows(), "side": layers(seed=3)["down"]}
    made["side"].w[DEAD] = 0
    (pair,) = names.spec
    side = pair.second.replace("down", "side")
    pair = dataclasses.replace(pair, readers={side: pair.second_axes})
    spec = Spec(name="READ", pairs=pair)
    tree = names.pack(made)
    assert plan(tree, spec=spec).removed == 0
    made["side"].a[DEAD] = 0
    tree = names.pack(made)
    p = plan(tree, spec=spec)
    assert p.removed == len(DEAD)
    small = shapes_of(apply(p, tree))
    ours, theirs = (
        {path.replace(n, "block/down"): shape for path, shape in small.items() if n in path}
        for n in ("block/side", "block/down")
    )
    assert ours == theirs
    params = names.pack(made, only="wc")
    assert shapes_of(apply(plan(params, spec=spec), tree, like=params)) == small


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(tree).items()}
