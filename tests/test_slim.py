"""`slim`, the five verbs composed: configs in and out, stored plans, nothing to do."""

import copy
import dataclasses
import logging
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given
from strategies import LAYOUTS, enable_x64, gap, net, nets, quick, run
from transformers import BertConfig, CLIPConfig, GPT2Config

import flaxslim
from flaxslim import ConfigKeptWarning, NothingRemovedWarning, Pair, Plan, Spec, apply, plan, slim
from flaxslim._layout import Layout
from flaxslim._tree import flatten, replace
from flaxslim.errors import (
    LayoutError,
    NonFiniteError,
    PlanError,
    UnsupportedDtypeError,
    WidthError,
)


@dataclasses.dataclass(frozen=True)
class Config:
    hidden: int
    act: str = "relu"


def pruned(n) -> None:
    for ffn, dead in n.each():
        ffn.second[dead] = 0


@quick
@given(nets())
def test_a_slimmed_network_is_the_same_function(n):
    pruned(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingRemovedWarning)
        small, cfg = slim(n.tree, n.cfg, n.layout.spec("gelu"))
    layers = n.layout.layers(small)
    assert cfg == {"hidden": n.need}
    assert {layer.width for layer in layers} == {n.need}
    assert gap(run(layers, "gelu", n.x), run(n.layers, "gelu", n.x)) <= 1e-12


@quick
@given(nets(first_bias=True, second_bias=True))
def test_slim_of_a_slimmed_tree_changes_nothing(n):
    # Also where filling left dead and constant channels behind.
    for ffn, dead in n.each():
        ffn.second[dead[::2]] = 0
        ffn.first[:, :, dead[1::2]] = 0
    spec = n.layout.spec("sigmoid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingRemovedWarning)
        small, cfg = slim(n.tree, n.cfg, spec)
    with pytest.warns(NothingRemovedWarning):
        again, cfg_again = slim(small, cfg, spec)
    assert again is small
    assert cfg_again is cfg


def test_nothing_dead_is_told():
    n = net(LAYOUTS["plain"], seed=0, share=0.0)
    tree, cfg = n.tree, n.cfg
    with pytest.warns(
        NothingRemovedWarning, match="no channel at 2 sites of TEST_FFN is dead"
    ) as w:
        assert slim(tree, cfg, n.layout.spec("relu")) == (tree, cfg)
    assert w[0].filename == __file__


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_dead_channels_that_cannot_go_are_told(multiple_of):
    n = net(LAYOUTS["plain"], seed=0, share=0.0, depth=2)
    n.dead[0] = np.array([1, 2])
    pruned(n)
    tree = n.tree
    with pytest.warns(NothingRemovedWarning, match="2 channels at 2 sites of TEST_FFN are dead"):
        small, _ = slim(tree, n.cfg, n.layout.spec("relu"), multiple_of=multiple_of)
    assert small is tree


HARD = Spec(name="HARD", pairs=Pair(at="b", first="up", second="down", width="4*size"))
SOFT = Spec(name="SOFT", pairs=Pair(at="a", first="up", second="down", width="hidden"))


def _two_blocks() -> dict:
    """Blocks of 4 channels, one of them dead."""
    block = {"up": {"kernel": np.ones((2, 4))}, "down": {"kernel": np.eye(4)[:, :3]}}
    return {"a": block, "b": block}


def test_what_is_dead_and_had_to_stay_is_told():
    tree, cfg = _two_blocks(), {"hidden": 4, "size": 1}
    with pytest.warns(flaxslim.DeadKeptWarning, match="hard-codes its width") as caught:
        small, new = slim(tree, cfg, SOFT + HARD)
    assert caught[0].filename == __file__
    assert new == {"hidden": 3, "size": 1}
    assert small["b"]["down"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
    ("pair", "mend"),
    [
        (next(iter(HARD)), 'pass width="per_layer"'),
        (dataclasses.replace(next(iter(SOFT)), scaled_by="scaled"), "keep the model as it is"),
    ],
)
def test_the_mend_is_what_the_reason_says(pair, mend):
    cfg = {"hidden": 4, "size": 1, "scaled": True}
    with pytest.raises(WidthError) as caught:
        slim(_two_blocks(), cfg, Spec(name="ONE", pairs=pair))
    assert (caught.value.mend or "").startswith(mend)
    assert ("per_layer" in caught.value.problem) == ("per_layer" in mend)


def test_no_other_warning_is_raised():
    n = net(LAYOUTS["gated"], seed=0, share=0.5)
    pruned(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim(jax.tree.map(jnp.asarray, n.tree), n.cfg, n.layout.spec("silu"))


def test_the_plan_is_logged(caplog):
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    with caplog.at_level(logging.INFO, logger="flaxslim"):
        slim(n.tree, n.cfg, n.layout.spec("relu"))
    assert "plan by TEST_FFN, exact" in caplog.text


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg", [{"hidden": 7, "act": "relu"}, Config(hidden=7), BertConfig(hidden=7, act="relu")]
)
def test_the_config_comes_back_resized_and_of_the_same_kind(cfg):
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    kept_aside = copy.deepcopy(cfg)
    _, new = slim(n.tree, cfg, n.layout.spec("config.act"))
    assert type(new) is type(cfg)
    assert new is not cfg
    assert str(cfg) == str(kept_aside)
    assert (new["hidden"] if isinstance(new, dict) else new.hidden) == n.need


def _mlp(first: str, second: str, width: int, dead: int, *, transposed: bool = False) -> dict:
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(4, width)), rng.normal(size=(width, 4))
    down[:dead] = 0
    return {
        f"{first}/kernel": up.T if transposed else up,
        f"{first}/bias": np.ones(width),
        f"{second}/kernel": down.T if transposed else down,
        f"{second}/bias": np.ones(4),
    }


def test_gpt2_whose_config_says_none():
    tree = _mlp("transformer/h/0/mlp/c_fc", "transformer/h/0/mlp/c_proj", 16, 5, transposed=True)
    cfg = GPT2Config(n_embd=4, n_head=1)
    assert cfg.n_inner is None
    small, new = slim(tree, cfg)
    assert (cfg.n_inner, new.n_inner) == (None, 11)
    assert type(new) is GPT2Config
    assert small["transformer/h/0/mlp/c_fc/kernel"].shape == (11, 4)


def test_clip_whose_config_is_nested():
    tree = {
        **_mlp("text_model/encoder/layers/0/mlp/fc1", "text_model/encoder/layers/0/mlp/fc2", 9, 3),
        **_mlp(
            "vision_model/encoder/layers/0/mlp/fc1", "vision_model/encoder/layers/0/mlp/fc2", 8, 2
        ),
    }
    cfg = CLIPConfig(text_config={"intermediate_size": 9}, vision_config={"intermediate_size": 8})
    small, new = slim(tree, cfg)
    assert (new.text_config.intermediate_size, new.vision_config.intermediate_size) == (6, 6)
    assert (cfg.text_config.intermediate_size, cfg.vision_config.intermediate_size) == (9, 8)
    assert small["vision_model/encoder/layers/0/mlp/fc1/kernel"].shape == (4, 6)


def test_composites_whose_config_is_a_dict():
    tree = {
        **_mlp(
            "encoder/encoder/layer/0/intermediate/dense",
            "encoder/encoder/layer/0/output/dense",
            9,
            3,
        ),
        **_mlp(
            "decoder/transformer/h/0/mlp/c_fc",
            "decoder/transformer/h/0/mlp/c_proj",
            16,
            1,
            transposed=True,
        ),
    }
    cfg = {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "bert", "intermediate_size": 9, "hidden_act": "gelu"},
        "decoder": {"model_type": "gpt2", "n_inner": None, "n_embd": 4},
    }
    kept_aside = copy.deepcopy(cfg)
    _, new = slim(tree, cfg)
    assert cfg == kept_aside
    assert new["encoder"] == {**cfg["encoder"], "intermediate_size": 6}
    assert new["decoder"] == {**cfg["decoder"], "n_inner": 15}


def test_no_config_is_needed_without_a_width_key():
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    spec = Spec(name="FREE", pairs=Pair(first="up", second="down"))
    small, cfg = slim(n.tree, spec=spec)
    assert cfg is None
    assert n.layout.layers(small)[0].width == n.need


# --- stored plans -----------------------------------------------------------------------------


def test_a_stored_plan_is_applied(tmp_path):
    n = net(LAYOUTS["fused"], seed=0, share=0.5)
    pruned(n)
    spec = n.layout.spec("silu")
    (tmp_path / "plan.json").write_text(plan(n.tree, n.cfg, spec).to_json())
    stored = Plan.from_json((tmp_path / "plan.json").read_text())
    small, cfg = slim(n.tree, n.cfg, plan=stored)
    expected, expected_cfg = slim(n.tree, n.cfg, spec)
    jax.tree.map(np.testing.assert_array_equal, small, expected)
    assert cfg == expected_cfg


def test_a_stored_plan_serves_an_average_of_the_parameters():
    n = net(LAYOUTS["gated"], seed=0, share=0.5)
    pruned(n)
    p = plan(n.tree, n.cfg, n.layout.spec("silu"))
    average = jax.tree.map(lambda x: 0.9 * x, n.tree)
    small, cfg = slim(average, n.cfg, plan=p)
    assert cfg == {"hidden": n.need}
    for old, new, cut in zip(n.layout.layers(average), n.layout.layers(small), p.cuts, strict=True):
        np.testing.assert_array_equal(new.second, old.second[list(cut.keep)])


def test_a_stored_plan_never_cuts_what_is_alive():
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    alive = jax.tree.map(lambda x: x + 0.1, n.tree)
    with pytest.raises(PlanError, match="channels that are alive here"):
        slim(alive, n.cfg, plan=p)
    assert n.layout.layers(apply(p, alive))[0].width == n.need  # `apply` does as it is told


@pytest.mark.parametrize(
    "more",
    [{"multiple_of": 2}, {"threshold": 0.1}, {"width": "per_layer"}, {"spec": flaxslim.T5_FFN}],
)
def test_a_stored_plan_leaves_nothing_to_say(more):
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    with pytest.raises(PlanError, match="already says which channels stay"):
        slim(n.tree, n.cfg, plan=p, **more)


@pytest.mark.parametrize("stored", [Plan.to_json, Plan.to_dict, lambda _: 3])
def test_what_is_no_plan_is_refused_with_how_to_read_one(stored):
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    with pytest.raises(PlanError, match="is not a Plan") as caught:
        slim(n.tree, n.cfg, plan=stored(p))
    assert "Plan.from_json" in str(caught.value)


def test_a_stored_plan_for_another_tree_is_refused():
    n, other = (net(LAYOUTS["plain"], seed=0, share=0.5, depth=depth) for depth in (2, 1))
    pruned(n)
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    with pytest.raises(PlanError, match="another structure") as caught:
        slim(other.tree, other.cfg, plan=p)
    assert caught.value.path == "layers/1/up/kernel"
    small, cfg = slim(n.tree, n.cfg, plan=p)
    with pytest.raises(PlanError, match="applied before"):
        slim(small, cfg, plan=p)


@pytest.mark.parametrize("condition", ["fold_unless", "scaled_by"])
def test_a_stored_plan_is_refused_by_a_config_that_forbids_it(condition):
    rng = np.random.default_rng(0)
    value = {"kernel": rng.normal(size=(4, 3, 2)), "bias": np.ones((3, 2))}
    value["kernel"][:, 1] = 0  # constant values
    out = {"kernel": rng.normal(size=(3, 2, 4)), "bias": np.zeros(4)}
    pair = Pair(
        first="value",
        second="out",
        first_axes="d h k",
        second_axes="h k d",
        axis="h",
        activation="identity",
        width="heads",
    )
    spec = Spec(name="HEADS", pairs=dataclasses.replace(pair, **{condition: "odd"}))
    tree, cfg = {"value": value, "out": out}, {"heads": 3, "odd": False}
    p = plan(tree, cfg, spec)
    assert slim(tree, cfg, plan=p)[1]["heads"] == 2
    for other in ({"heads": 3, "odd": True}, {"heads": 3}):
        with pytest.raises(PlanError, match="a config that says otherwise"):
            slim(tree, other, plan=p)


def test_a_stored_plan_for_a_part_of_the_layers_is_refused():
    n, smaller = (net(LAYOUTS["plain"], seed=0, share=0.5, depth=depth) for depth in (3, 2))
    pruned(n)
    tree = {**n.tree, "layers": {i: n.tree["layers"][i] for i in ("0", "1")}}
    p = plan(tree, smaller.cfg, n.layout.spec("relu"))
    with pytest.raises(PlanError, match="does not know 1 of the layers") as caught:
        slim(n.tree, n.cfg, plan=p)
    assert caught.value.path == "layers/2/down/kernel"


# --- the rest of the model --------------------------------------------------------------------


def test_what_is_no_part_of_a_pair_passes_by_identity():
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    tree = n.tree
    tree["head"] = {"kernel": jnp.ones((3, 7)), "quantised": np.ones((7, 3), np.int8)}
    tree["layers"]["0"]["up"]["lora_a"] = np.ones((3, 2))
    tree["layers"]["0"]["up"]["lora_b"] = np.ones((2, 7))
    tree["layers"]["0"]["norm"] = {"scale": np.full(7, np.nan)}
    kept_aside = copy.deepcopy(tree)
    before = flatten(tree)
    small, _ = slim(tree, n.cfg, n.layout.spec("relu"))
    after = flatten(small)
    assert set(after) == set(before)
    for path, leaf in before.items():
        ours = path.startswith("layers") and path.split("/")[-2] in ("up", "down")
        cut = ours and not path.endswith(("up/lora_a", "down/bias"))
        assert (after[path] is leaf) == (not cut), path
    jax.tree.map(np.testing.assert_array_equal, tree, kept_aside)


def test_a_plain_linen_model_with_a_spec_of_ones_own():
    class Mlp(nn.Module):
        hidden: int

        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(self.hidden)(x), approximate=False)
            return nn.Dense(2)(x)

    x = jnp.arange(12.0).reshape(4, 3) / 10
    model = Mlp(hidden=6)
    variables = model.init(jax.random.key(0), x)
    kernel = flatten(variables)["params/Dense_1/kernel"]
    variables = replace(variables, {"params/Dense_1/kernel": kernel.at[jnp.array([0, 4])].set(0)})
    spec = Spec(
        name="MLP",
        pairs=Pair(first="Dense_0", second="Dense_1", width="hidden", activation="gelu"),
    )
    small, smaller = slim(variables, model, spec)
    assert isinstance(smaller, Mlp)
    assert (model.hidden, smaller.hidden) == (6, 4)
    before, after = (np.asarray(m.apply(v, x)) for m, v in ((model, variables), (smaller, small)))
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_errors_come_before_anything_is_changed():
    n = net(LAYOUTS["plain"], seed=0, share=0.5)
    pruned(n)
    n.layers[1].second[3, 0] = np.nan
    tree = n.tree
    kept_aside = copy.deepcopy(tree)
    with pytest.raises(NonFiniteError):
        slim(tree, n.cfg, n.layout.spec("relu"))
    with pytest.raises(WidthError, match="no width policy"):
        slim(tree, n.cfg, n.layout.spec("relu"), width="per-layer")
    jax.tree.map(np.testing.assert_array_equal, tree, kept_aside)


# --- one module that two pairs are about -------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_a_module_is_told_by_both_of_its_pairs(order):
    class Chain(nn.Module):
        a: int = 6
        b: int = 5

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(self.a, name="d0")(x))
            x = nn.relu(nn.Dense(self.b, name="d1")(x))
            return nn.Dense(3, name="d2")(x)

    # d1 reads nothing any more, and puts out less.
    x = np.ones((2, 4), np.float32)
    params = jax.tree.map(np.array, Chain().init(jax.random.key(0), x))
    kernels = params["params"]
    kernels["d1"]["kernel"][:] = 0
    kernels["d1"]["bias"][:] = 1
    kernels["d2"]["kernel"][:] = [[0], [0], [1], [2], [3]]
    pairs = tuple(Pair(first=f"d{i}", second=f"d{i + 1}", width="ab"[i]) for i in range(2))
    spec = Spec(name="C", pairs=pairs[::order])
    small, cfg = slim(params, {"a": 6, "b": 5}, spec, width="per_layer")
    cfg["b"], cfg["flaxslim_layout"]["sites"]["/d2"] = 5, 3  # in the layout, as of two layers
    module = flaxslim.module(Chain, cfg, spec=spec)
    fresh = jax.tree.map(np.shape, module.init(jax.random.key(0), x))
    assert fresh == jax.tree.map(np.shape, small)
    found: Any = module.apply(small, x)
    expected: Any = Chain().apply(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_what_two_pairs_say_of_one_module_is_joined(order):
    pairs = tuple(
        Pair(at="{i}", first=f"{n}1", second=f"{n}2", width=n, modules={"": {f"size_{n}": "f"}})
        for n in "ab"
    )[::order]
    sites = {"0/a2": 3, "0/b2": 4}
    cfg = {"a": 8, "b": 8, "flaxslim_layout": {"version": 1, "sites": sites}}
    layout = Layout.of(cfg, Spec(name="S", pairs=pairs))
    assert layout is not None
    told = layout.at(("0",))
    assert told is not None
    assert dict(told.attributes) == {"size_a": 3, "size_b": 4}


def test_two_pairs_that_contradict_each_other_are_refused():
    pairs = tuple(Pair(first="up", second=n, width=n) for n in "ab")
    cfg = {"a": 8, "b": 8, "flaxslim_layout": {"version": 1, "sites": {"/a": 3, "/b": 4}}}
    layout = Layout.of(cfg, Spec(name="S", pairs=pairs))
    assert layout is not None
    assert layout.at(("other",)) is None
    with pytest.raises(LayoutError, match="two pairs of the spec") as caught:
        layout.at(("up",))
    assert caught.value.path == "/up"


# --- several readers --------------------------------------------------------------------------

READ = Spec(
    name="READ",
    pairs=Pair(first="up", second="down", readers={"side": "f o"}, activation="relu", width="f"),
)


def read_twice(params, x):
    h = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    y = h @ params["down"]["kernel"] + params["down"]["bias"]
    return y, h @ params["side"]["kernel"]


def read_params() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    shapes = {"up": (5, 12), "down": (12, 4), "side": (12, 3)}
    tree: dict[str, dict[str, Any]] = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
        for name, shape in shapes.items()
    }
    del tree["side"]["bias"]
    tree["down"]["kernel"][[0, 3, 5]] = 0
    tree["side"]["kernel"][[3, 5, 7]] = 0
    return tree


def test_what_two_layers_read_goes_if_neither_reads_it():
    x = np.random.default_rng(1).normal(size=(8, 5))
    with enable_x64():
        params = jax.tree.map(jnp.asarray, read_params())
        small, cfg = slim(params, {"f": 12}, READ)
        assert cfg == {"f": 10}
        shapes = {path: leaf.shape for path, leaf in flatten(small).items()}
        assert shapes == {
            "up/kernel": (5, 10),
            "up/bias": (10,),
            "down/kernel": (10, 4),
            "down/bias": (4,),
            "side/kernel": (10, 3),
        }
        left = plan(params, {"f": 12}, READ).origins["down/kernel"].tolist()
        assert left == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
        before, after = read_twice(params, x), read_twice(small, x)
        assert max(
            gap(np.asarray(a), np.asarray(b)) for a, b in zip(after, before, strict=True)
        ) < (1e-12)
        proof = flaxslim.verify(
            (params, {"f": 12}), (small, cfg), read_twice, inputs=x, spec=READ, repeats=0
        )
    proof.raise_if_failed()
    assert proof.relative <= 1e-12
    assert proof.control is not None
    (row,) = proof.control.rows
    assert (row.living, row.seen) == (10, True)


def test_a_channel_that_only_another_reader_reads_is_seen_by_the_control():
    params = read_params()
    params["down"]["kernel"][:] = 0
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    small, cfg = slim(params, {"f": 12}, READ)
    assert cfg == {"f": 9}
    proof = flaxslim.verify(
        (params, {"f": 12}), (small, cfg), read_twice, inputs=x, spec=READ, repeats=0
    )
    proof.raise_if_failed()


def test_a_plan_with_readers_is_stored_composed_undone_and_applied_to_a_state():
    params = read_params()
    p = Plan.from_json(plan(params, {"f": 12}, READ).to_json())
    assert p == plan(params, {"f": 12}, READ)
    broken = p.to_dict()
    del broken["cuts"][0]["readers"]
    with pytest.raises(PlanError, match="not the JSON of a plan"):
        Plan.from_dict(broken)
    small, cfg = slim(params, {"f": 12}, plan=p)
    again = flaxslim.expand(p, small)
    jax.tree.map(np.testing.assert_array_equal, again["side"], params["side"])
    more = jax.tree.map(np.copy, small)
    more["down"]["kernel"][0] = more["side"]["kernel"][0] = 0
    second = plan(more, cfg, READ)
    whole = second @ p
    assert whole.removed == 3
    assert apply(whole, params)["side"]["kernel"].shape == (9, 3)
    state = optax.adam(1e-3).init(jax.tree.map(jnp.asarray, params))
    moments: Any = apply(p, state, like=params)[0]
    assert jax.tree.map(jnp.shape, moments.mu) == jax.tree.map(np.shape, small)
    living = copy.deepcopy(params)
    living["side"]["kernel"][3] = 1
    with pytest.raises(PlanError, match="1 channels that are alive here"):
        slim(living, {"f": 12}, plan=p)


def test_the_statistics_of_a_batch_norm_are_cut_with_its_channels():
    class Normed(nn.Module):
        hidden: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.hidden, name="up")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
            return nn.Dense(2, name="down")(x)

    pair = Pair(
        first="up",
        second="down",
        width="hidden",
        tables=dict.fromkeys(("bn/scale", "bn/bias"), "f")
        | {f"batch_stats:bn/{name}": "f" for name in ("mean", "var")},
    )
    spec = Spec(name="NORMED", pairs=pair)
    x = jax.random.normal(jax.random.key(1), (4, 3))
    variables = Normed(hidden=6).init(jax.random.key(0), x)
    leaves = flatten(variables)
    variables = replace(
        variables,
        {
            "params/down/kernel": leaves["params/down/kernel"].at[jnp.array([0, 4])].set(0),
            "batch_stats/bn/mean": jnp.arange(6.0),
        },
    )
    before: Any = Normed(hidden=6).apply(variables, x)
    small, cfg = slim(variables, {"hidden": 6}, spec)
    np.testing.assert_array_equal(small["batch_stats"]["bn"]["mean"], [1, 2, 3, 5])
    slimmed: Any = Normed(**cfg).apply(small, x)
    np.testing.assert_allclose(slimmed, before, rtol=1e-5, atol=1e-6)
    # By a layout, too, where a batch norm is told nothing: it takes its size from its input.
    small, cfg = slim(variables, {"hidden": 6, "flaxslim_layout": None}, spec, width="per_layer")
    after = flaxslim.module(Normed, cfg, spec=spec).apply(small, x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_a_config_that_cannot_say_the_new_width_is_named():
    """A spec without a width key cuts the tensors and would leave the config as it is."""
    tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    with pytest.warns(ConfigKeptWarning, match="the old size of up"):
        slim(tree, {"hidden": 3}, spec)


def test_a_field_that_the_class_of_a_config_computed_from_the_width_is_named():
    @dataclasses.dataclass
    class Config:
        hidden: int = 3
        both: int | None = None

        def __post_init__(self):
            self.both = 2 * self.hidden if self.both is None else self.both

    tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
    with pytest.warns(ConfigKeptWarning, match=r"both = 6 \(anew: 4\)") as caught:
        _, cfg = slim(tree, Config(), spec)
    assert caught[0].filename == __file__
    assert (cfg.hidden, cfg.both) == (2, 6)


def test_a_stored_plan_is_for_the_activation_by_which_it_was_made():
    spec = Spec(name="M", pairs=Pair(first="up", second="down", activation="config.act", width="f"))
    tree = {
        "up": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)},
        "down": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)},
    }
    tree["up"]["kernel"][:, 0], tree["up"]["bias"][0] = 0, -1
    p = flaxslim.plan(tree, {"act": "relu", "f": 3}, spec)
    with pytest.raises(PlanError, match="for another activation") as caught:
        slim(tree, {"act": "gelu", "f": 3}, plan=p)
    assert (caught.value.expected, "gelu" in str(caught.value.seen)) == ("relu", True)
    assert slim(tree, {"act": "relu", "f": 3}, plan=p)[1] == {"act": "relu", "f": 2}


def _attention(*, group: str | None = None, **more: Any) -> tuple[Any, Spec]:
    """Four heads of 4, the first two of which nothing reads."""
    rng, axes = np.random.default_rng(0), f"d ({group or 'h'} k)"
    wide = 8 if group else 16
    tree = {name: {"kernel": rng.normal(size=(16, wide))} for name in "kv"}
    tree |= {name: {"kernel": rng.normal(size=(16, 16))} for name in "qo"}
    tree["o"]["kernel"][:8] = 0
    pair = Pair(
        first="v",
        first_axes=axes,
        also={"q": "d (h k)", "k": axes},
        second="o",
        second_axes="(h k) d",
        axis="h",
        group=group,
        width="heads",
        **more,
    )
    return tree, Spec(name="ATTENTION", pairs=pair)


def test_a_head_size_that_follows_from_the_number_of_heads_must_stay_as_it_is():
    tree, spec = _attention(sizes={"k": "d/heads"})
    with pytest.raises(PlanError, match="another size of axis 'k'") as caught:
        slim(tree, {"heads": 4, "d": 16}, spec)
    assert (caught.value.seen, caught.value.expected) == (8, 4)
    tree, spec = _attention(sizes={"k": "head_dim"})
    assert slim(tree, {"heads": 4, "head_dim": 4}, spec)[1] == {"heads": 2, "head_dim": 4}


def test_groups_that_no_key_says_are_named():
    tree, spec = _attention(group="g", sizes={"k": "head_dim"})
    with pytest.warns(ConfigKeptWarning, match="group_width"):
        small, _ = slim(tree, {"heads": 4, "head_dim": 4, "kv_heads": 2}, spec)
    assert small["v"]["kernel"].shape == (16, 4)


def test_a_scale_among_tensors_of_wide_floats_is_none_of_a_quantised_kernel():
    tree = {"w1": np.ones((2, 3)), "w2": np.diag([1.0, 0.0, 1.0]), "ln_scale": np.ones(2)}
    spec = Spec(name="MLP", pairs=Pair(first="w1", second="w2"))
    assert slim({**tree, "scale": np.ones(2)}, spec=spec)[0]["w1"].shape == (2, 2)
    with pytest.raises(UnsupportedDtypeError, match="its scales"):
        slim({**tree, "w1_scale": np.ones(1)}, spec=spec)


def test_a_threshold_may_be_any_real_number():
    tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.1, 1.0])}}
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    p = flaxslim.plan(tree, spec=spec, threshold=np.float32(0.5))  # pyright: ignore
    assert flaxslim.Plan.from_json(p.to_json()) == p


def test_a_root_is_found_by_its_name_also_where_it_reads_as_a_pattern():
    layer = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    tree = {"layers[0]": layer, "layers[1]": layer}
    spec = Spec(name="MLP", pairs=Pair(at="layers[{i}]", first="up", second="down"))
    p = flaxslim.plan(tree, spec=spec, width="per_layer", multiple_of={"layers[0]": 3})
    assert [cut.width for cut in p.cuts] == [3, 2]
