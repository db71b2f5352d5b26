"""Specs as values, and how they bind to a tree."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.core import freeze
from strategies import LAYOUTS, net

from flaxslim import BERT_FFN, GPT2_FFN, LLAMA_FFN, T5_FFN, Pair, Spec, plan, slim
from flaxslim._axes import Axes
from flaxslim._tree import flatten
from flaxslim.errors import (
    AxisPatternError,
    ConfigError,
    IncompletePairError,
    NothingMatchedError,
    SiteShapeError,
    SpecError,
    TracedError,
)
from flaxslim.specs import FAMILIES, _libraries

SPECS = {f"{name}-{spec.name}": spec for name, both in FAMILIES.items() for spec in both}
SHIPPED = {
    **SPECS,
    **{name: spec for name, spec in vars(_libraries).items() if isinstance(spec, Spec)},
}


def dense(n: int, m: int, *, bias: bool = True) -> dict:
    layer = {"kernel": np.ones((n, m), np.float32)}
    return {**layer, "bias": np.ones(m, np.float32)} if bias else layer


def bert_layer(width: int = 8) -> dict:
    return {
        "intermediate": {"dense": dense(4, width)},
        "output": {"dense": dense(width, 4), "LayerNorm": {"scale": np.ones(4)}},
        "attention": {"output": {"dense": dense(4, 4)}, "self": {"query": dense(4, 4)}},
    }


def bert(layers: int = 2, width: int = 8) -> dict:
    return {"encoder": {"layer": {str(i): bert_layer(width) for i in range(layers)}}}


def t5_layer(*firsts: str) -> dict:
    layers = {name: dense(4, 8, bias=False) for name in firsts}
    return {"DenseReluDense": {**layers, "wo": dense(8, 4, bias=False)}}


# --- values -----------------------------------------------------------------------------------


def test_specs_are_frozen_hashable_and_comparable():
    a = Pair(first="up", second="down", width="hidden")
    b = Pair(first="up", second="down", width="hidden")
    assert a == b
    assert hash(a) == hash(b)
    assert a != dataclasses.replace(a, width="other")
    assert Spec(name="A", pairs=a) == Spec(name="A", pairs=(b,))
    assert len({Spec(name="A", pairs=a), Spec(name="A", pairs=(b,))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.first = "x"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Pair("up", "down")  # pyright: ignore[reportCallIssue]


def test_lists_are_as_good_as_tuples():
    a = Pair(first=["gate", "up"], second="down", gated=True)  # pyright: ignore[reportArgumentType]
    assert a == Pair(first=("gate", "up"), second="down", gated=True)
    assert len({a}) == 1


def test_specs_can_be_printed():
    text = str(LLAMA_FFN)
    for part in ("LLAMA_FFN", "layers/{i}/mlp", "gate_proj", "up_proj", "down_proj", "gated"):
        assert part in text
    assert 'c_fc "f d"' in str(GPT2_FFN)
    assert "width n_inner or 4*n_embd" in str(GPT2_FFN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 768),
        ("second", None),
        ("first", ("up", 2)),
        ("gated", "yes"),
        ("first_bias", 1),
        ("at", ["a"]),
        ("sizes", {"k": 64}),
        ("tables", {"bias": None}),
        ("also", ["query"]),
        ("also", "query"),
        ("readers", ["gate"]),
        ("readers", {"gate": 1}),
        ("modules", ["x"]),
        ("modules", {"self": "h"}),
        ("arguments", {"self": {"head_mask": 1}}),
        ("parts", 2),
        ("parts", ("2",)),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_with_what_to_type(field, value):
    good = Pair(first="up", second="down")
    with pytest.raises(SpecError, match=f"^{field}= of a Pair") as caught:
        dataclasses.replace(good, **{field: value})
    assert repr(value) in str(caught.value)
    assert f"expected: {field}=" in str(caught.value)


@pytest.mark.parametrize("name", SPECS)
def test_json_round_trip(name):
    spec = SPECS[name]
    assert Spec.from_json(spec.to_json()) == spec
    part = spec.under(tree="decoder", config="decoder")
    assert Spec.from_json(part.to_json()) == part
    assert part != spec


@pytest.mark.parametrize("name", SPECS)
def test_the_torch_spec_has_reversed_kernels_called_weight(name):
    for ours, theirs in zip(SPECS[name], SPECS[name].torch(), strict=True):
        assert theirs.kernel == "weight"
        assert Axes(theirs.first_axes).dimensions == Axes(ours.first_axes).dimensions[::-1]
        assert Axes(theirs.second_axes).dimensions == Axes(ours.second_axes).dimensions[::-1]
        assert (theirs.at, theirs.first, theirs.width) == (ours.at, ours.first, ours.width)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_torch_tree_is_the_transposed_flax_tree(layout):
    n = net(LAYOUTS[layout], seed=5, share=0.4)
    for ffn, dead in n.each():
        ffn.second[dead] = 0
    spec = n.layout.spec("relu")

    def rename(tree: dict) -> dict:
        return {
            {"kernel": "weight"}.get(k, k): rename(v) if isinstance(v, dict) else v.T
            for k, v in tree.items()
        }

    ours = plan(n.tree, n.cfg, spec)
    theirs = plan(rename(n.tree), n.cfg, spec.torch())
    assert [cut.keep for cut in theirs.cuts] == [cut.keep for cut in ours.cuts]
    small, _ = slim(rename(n.tree), n.cfg, spec.torch())
    jax.tree.map(np.testing.assert_array_equal, small, rename(slim(n.tree, n.cfg, spec)[0]))


FUSED: dict = {"first": "up", "second": "down", "first_axes": "d (2 f)"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": "up", "second": "down", "first_axes": "d g"}, "no axis 'f'"),
        ({"first": "up", "second": "down", "axis": "h"}, "no axis 'h'"),
        ({"first": "up", "second": "down", "first_axes": "d (f"}, "unbalanced"),
        ({"first": "up", "second": "down", "gated": True}, "a gate and an up layer"),
        ({"first": ("a", "b", "c"), "second": "down", "gated": True}, "a gate and an up layer"),
        ({"first": ("a", "b"), "second": "down", "first_bias": "x"}, "as many first biases"),
        ({"first": "up", "second": "down", "readers": {"gate": "d o"}}, "has no axis 'f'"),
        ({**FUSED, "parts": (2,)}, "no such part"),
        ({**FUSED, "parts": (0, -1)}, "no such part"),
        ({**FUSED, "parts": (1,), "gated": True}, "two parts"),
        ({**FUSED, "activation": "silu"}, "which part of the fused first layer"),
    ],
)
def test_a_pair_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(AxisPatternError) as caught:
        Pair(**arguments)
    assert message in str(caught.value)


def test_a_width_that_cannot_be_read_is_refused():
    with pytest.raises(ConfigError, match="cannot read the width"):
        Pair(first="up", second="down", width="4 * hidden")


# --- binding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"bert": t, "classifier": dense(4, 2)},
        lambda t: {"params": t},
        lambda t: {"params": {"bert": t}, "batch_stats": {"x": np.ones(3)}},
        lambda t: freeze({"a": {"b": {"c": t}}}),
        flatten,
    ],
    ids=["bare", "head", "params", "params and head", "deep", "flat"],
)
def test_a_spec_binds_wherever_its_layer_root_occurs(wrap):
    sites = BERT_FFN.sites(wrap(bert(12)))
    assert len(sites) == 12
    assert [site.root.rpartition("/")[2] for site in sites] == [str(i) for i in range(12)]
    for site in sites:
        assert site.root.partition("encoder/layer")[1]
        assert site.size == 8
        assert [t.path.removeprefix(site.root) for t in site.tensors] == [
            "/intermediate/dense/kernel",
            "/intermediate/dense/bias",
            "/output/dense/kernel",
            "/output/dense/bias",
        ]
    # The attention output is an output/dense too, but not below a layer root.
    assert not any("attention" in t.path for site in sites for t in site.tensors)


def test_a_root_with_a_leading_slash_is_anchored_at_the_top():
    spec = Spec(name="TOP", pairs=Pair(at="/a", first="up", second="down"))
    tree = {"a": {"up": dense(2, 3), "down": dense(3, 2)}}
    assert [site.root for site in spec.sites({**tree, "b": tree})] == ["a"]
    assert (
        len(
            Spec(name="ANY", pairs=Pair(at="a", first="up", second="down")).sites(
                {**tree, "b": tree}
            )
        )
        == 2
    )


def test_a_layer_may_be_a_tensor_itself():
    tree = {"experts": {"w1": np.ones((2, 3)), "b1": np.ones(3), "w2": np.ones((3, 2))}}
    pair = Pair(first="w1", second="w2", first_bias="b1")
    (site,) = Spec(name="RAW", pairs=pair).sites(tree)
    assert [t.path for t in site.tensors] == ["experts/w1", "experts/b1", "experts/w2"]


def test_plain_and_gated_variants_of_one_family_do_not_disturb_each_other():
    plain = {"encoder": {"block": {"0": {"layer": {"1": t5_layer("wi")}}}}}
    gated = {"encoder": {"block": {"0": {"layer": {"1": t5_layer("wi_0", "wi_1")}}}}}
    assert [len(site.first) for site in T5_FFN.sites(plain)] == [1]
    assert [len(site.first) for site in T5_FFN.sites(gated)] == [2]
    assert T5_FFN.unmatched(plain) == (list(T5_FFN)[1],)
    assert T5_FFN.unmatched(gated) == (next(iter(T5_FFN)),)
    p = plan(gated, {"d_ff": 8, "dense_act_fn": "gelu_new"}, T5_FFN)
    assert any("no site for" in note and "wi " in note for note in p.notes)
    assert "no site for" in str(p)


def test_a_tensor_may_be_the_second_of_one_pair_and_the_first_of_another():
    tree = {"a": dense(2, 3), "b": dense(3, 5), "c": dense(5, 2)}
    spec = Spec(name="CHAIN", pairs=(Pair(first="a", second="b"), Pair(first="b", second="c")))
    assert [site.size for site in spec.sites(tree)] == [3, 5]


# --- what is refused --------------------------------------------------------------------------


def test_nothing_matched_names_the_nearest():
    tree = {"encoder": {"layers": {"0": bert_layer()}}}  # "layers" where BERT has "layer"
    with pytest.raises(NothingMatchedError, match="BERT_FFN matches nothing") as caught:
        BERT_FFN.sites(tree)
    assert any("intermediate/dense/kernel" in name for name in caught.value.near)
    text = str(caught.value)
    assert "encoder/layer/{i}/intermediate/dense" in text
    assert "flaxslim families" in text


def test_an_empty_tree_matches_nothing():
    with pytest.raises(NothingMatchedError, match="this tree of 0 tensors"):
        BERT_FFN.sites({})


@pytest.mark.parametrize(
    ("gone", "stays"), [("intermediate", "output"), ("output", "intermediate")]
)
def test_half_a_pair_is_refused(gone, stays):
    tree = bert()
    del tree["encoder"]["layer"]["1"][gone]
    with pytest.raises(IncompletePairError, match="half a pair of BERT_FFN") as caught:
        BERT_FFN.sites(tree)
    assert caught.value.path == f"encoder/layer/1/{gone}/dense/kernel"
    assert f"encoder/layer/1/{stays}/dense/kernel is there" in str(caught.value)
    assert caught.value.near


def test_a_gate_without_its_up_is_refused():
    tree = {"layers": {"0": {"mlp": {"gate_proj": dense(4, 8), "down_proj": dense(8, 4)}}}}
    with pytest.raises(IncompletePairError, match="up_proj is not"):
        LLAMA_FFN.sites(tree)


def test_a_bias_that_the_spec_names_must_be_there():
    pair = Pair(first="up", second="down", first_bias="up/offset")
    with pytest.raises(IncompletePairError, match="names a bias") as caught:
        Spec(name="X", pairs=pair).sites({"up": dense(2, 3), "down": dense(3, 2)})
    assert caught.value.path == "up/offset"


@pytest.mark.parametrize(
    ("tree", "arguments", "path"),
    [
        ({"w1": np.ones((4, 8)), "b1": np.ones(8), "w2": np.ones((8, 4))}, {}, "b1"),
        (
            {"w1": {"w": np.ones((4, 8)), "b": np.ones(8)}, "w2": {"w": np.ones((8, 4))}},
            {"kernel": "w"},
            "w1/b",
        ),
    ],
)
def test_a_bias_that_the_spec_does_not_name_is_not_taken_for_zero(tree, arguments, path):
    pair = Pair(first="w1", second="w2", activation="relu", **arguments)
    kernel = tree["w1"]["w"] if arguments else tree["w1"]
    plan(tree, spec=Spec(name="X", pairs=pair))
    kernel[:, 0] = 0  # by its column the first channel is zero, if there is no bias
    with pytest.raises(IncompletePairError, match="a number for each channel") as caught:
        plan(tree, spec=Spec(name="X", pairs=pair))
    assert caught.value.path == path
    named = {"bias": "b"} if arguments else {"first_bias": path}
    plan(tree, spec=Spec(name="X", pairs=dataclasses.replace(pair, **named)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"first": ("up", "up"), "gated": True, "activation": "relu"},
        {"tables": {"up/bias": "f"}},
        {"also": {"up": "d f"}},
    ],
)
def test_a_tensor_that_one_pair_names_twice_is_refused(arguments):
    pair = Pair(**{"first": "up", "second": "down", **arguments})
    with pytest.raises(SiteShapeError, match="names one tensor twice"):
        Spec(name="X", pairs=pair).sites({"up": dense(2, 3), "down": dense(3, 2)})


@pytest.mark.parametrize("pairs", [(), "up", [("up", "down")], None])
def test_a_spec_is_made_of_pairs(pairs):
    with pytest.raises(SpecError, match="a Pair, or several"):
        Spec(name="X", pairs=pairs)


@pytest.mark.parametrize("first", [(), ""])
def test_a_pair_has_two_layers(first):
    with pytest.raises(SpecError, match="a first and a second layer"):
        Pair(first=first, second="down")


@pytest.mark.parametrize("path", ["intermediate/dense/kernel", "intermediate/dense/bias"])
def test_one_wrong_shape_is_refused(path):
    tree = flatten(bert())
    path = f"encoder/layer/1/{path}"
    tree[path] = tree[path][..., :-1]
    with pytest.raises(SiteShapeError, match="disagree about the number of channels") as caught:
        BERT_FFN.sites(tree)
    assert caught.value.path == path
    assert "f = 8" in str(caught.value)
    assert "(8, 4)" in str(caught.value)


def test_a_second_bias_of_the_wrong_size_is_refused():
    tree = flatten(bert())
    tree["encoder/layer/0/output/dense/bias"] = np.ones(5)
    with pytest.raises(SiteShapeError, match="bias of the second layer does not fit") as caught:
        BERT_FFN.sites(tree)
    assert "(5,)" in str(caught.value)


def test_a_transposed_kernel_is_refused():
    tree = flatten(bert())
    path = "encoder/layer/0/intermediate/dense/kernel"
    tree[path] = tree[path].T
    with pytest.raises(SiteShapeError, match="transposed kernel"):
        BERT_FFN.sites(tree)


def test_a_wrong_rank_is_refused():
    tree = flatten(bert())
    path = "encoder/layer/0/intermediate/dense/kernel"
    tree[path] = tree[path][None]
    with pytest.raises(AxisPatternError, match="3 dimensions where its pattern has 2") as caught:
        BERT_FFN.sites(tree)
    assert caught.value.path == path


def test_a_tensor_that_is_no_array_is_refused():
    tree = flatten(bert())
    tree["encoder/layer/0/output/dense/kernel"] = "weights"
    with pytest.raises(SiteShapeError, match="not an array") as caught:
        BERT_FFN.sites(tree)
    assert "str" in str(caught.value)


def test_shapes_without_values_are_refused():
    tree = jax.eval_shape(bert)
    with pytest.raises(TracedError, match="values") as caught:
        plan(tree, {"intermediate_size": 8}, BERT_FFN)
    assert "encoder/layer/0" in str(caught.value)


def test_two_pairs_that_claim_the_same_axis_are_refused():
    tree = {"mlp": {"up": dense(2, 3), "down": dense(3, 2)}}
    pair = Pair(first="up", second="down")
    spec = Spec(name="TWICE", pairs=(pair, dataclasses.replace(pair, at="mlp")))
    with pytest.raises(SiteShapeError, match="claim the same axis") as caught:
        spec.sites(tree)
    assert "mlp/up/kernel" in str(caught.value)


def test_two_sites_of_one_key_with_different_sizes_are_refused():
    tree = bert()
    tree["encoder"]["layer"]["1"] = bert_layer(6)
    with pytest.raises(SiteShapeError, match="share the width 'intermediate_size'") as caught:
        slim(tree, {"intermediate_size": 8, "hidden_act": "gelu"}, BERT_FFN)
    text = str(caught.value)
    assert "6 channels" in text
    assert "8 channels" in text
    assert "encoder/layer/1/output/dense/kernel" in text


def test_a_config_that_contradicts_the_tensors_is_refused():
    with pytest.raises(ConfigError, match="contradicts the tensors") as caught:
        slim(bert(), {"intermediate_size": 9, "hidden_act": "gelu"}, BERT_FFN)
    text = str(caught.value)
    assert "8 channels" in text
    assert "9, from intermediate_size" in text
    assert "encoder/layer/0/output/dense/kernel" in text


@pytest.mark.parametrize("cfg", [{"hidden_act": "gelu", "intermediate": 8}, None])
def test_an_absent_width_key_is_refused(cfg):
    with pytest.raises(ConfigError, match="no key 'intermediate_size'") as caught:
        slim(bert(), cfg, BERT_FFN)
    assert caught.value.near == (("intermediate",) if cfg else ())


def test_tracers_are_refused():
    @jax.jit
    def f(tree):
        return slim(tree, {"intermediate_size": 8, "hidden_act": "gelu"}, BERT_FFN)[0]

    with pytest.raises(TracedError, match=r"outside of jax\.jit") as caught:
        f(bert())
    assert "encoder/layer/0" in str(caught.value)


def test_a_layer_whose_name_ends_in_the_other_layers_name():
    tree = {"mlp": {"dense": {"kernel": np.ones((2, 3))}}, "dense": {"kernel": np.ones((3, 2))}}
    spec = Spec(name="S", pairs=Pair(first="mlp/dense", second="dense"))
    assert [site.size for site in spec.sites(tree)] == [3]


def test_a_module_is_told_sizes_of_axes_that_the_pair_has():
    with pytest.raises(AxisPatternError, match="unknown axis") as caught:
        Pair(first="up", second="down", modules={"": {"hidden": "ff"}})
    assert "'f'" in str(caught.value) or "f" in caught.value.near


@pytest.mark.parametrize("size", [0, -2])
def test_an_axis_without_a_size_is_refused(size):
    pair = Pair(
        first="up", second="down", first_axes="d (h k)", second_axes="(h k) d", axis="h",
        sizes={"k": "head_dim"},
    )  # fmt: skip
    tree = {"up": dense(3, 8, bias=False), "down": dense(8, 3, bias=False)}
    with pytest.raises(ConfigError) as caught:
        plan(tree, {"head_dim": size}, Spec(name="HEADS", pairs=pair))
    assert "head_dim" in str(caught.value)


def test_an_axis_whose_size_is_a_number_needs_no_config():
    pair = Pair(
        first="up", second="down", first_axes="d (h k)", second_axes="(h k) d", axis="h",
        sizes={"k": "4"},
    )  # fmt: skip
    tree = {"up": dense(3, 8, bias=False), "down": dense(8, 3, bias=False)}
    (site,) = Spec(name="HEADS", pairs=pair).sites(tree)
    assert site.size == 2
    mixed = dataclasses.replace(pair, sizes={"k": "4", "d": "hidden"})
    with pytest.raises(ConfigError, match="the sizes of d\n") as caught:
        Spec(name="HEADS", pairs=mixed).sites(tree)
    assert caught.value.expected == "a config with hidden"


# --- other readers ----------------------------------------------------------------------------

READ = Pair(first="up", second="down", readers={"gate_head": "f o", "table": "o f"})


def read_tree() -> dict:
    table = np.ones((5, 3), np.float32)
    return {"up": dense(2, 3), "down": dense(3, 2), "gate_head": dense(3, 4), "table": table}


def test_readers_are_layers_of_the_pair():
    (site,) = Spec(name="READ", pairs=READ).sites({"params": {"block": read_tree()}})
    assert READ.layers == ("up", "down", "gate_head", "table")
    assert [t.path.removeprefix("params/block/") for t in site.readers] == [
        "gate_head/kernel",
        "table",
    ]
    # Their biases have no channels.
    assert {t.path.removeprefix("params/block/") for t in site.cut} == {
        "up/kernel",
        "up/bias",
        "down/kernel",
        "gate_head/kernel",
        "table",
    }
    assert [site.reads(t) for t in site.cut] == [False, False, True, True, True]


def test_readers_are_printed_reversed_and_stored():
    assert str(READ) == 'up "d f" -> down "f d", also read by gate_head, table'
    spec = Spec(name="READ", pairs=READ)
    assert next(iter(spec.torch())).readers == {"gate_head": "o f", "table": "f o"}
    assert Spec.from_json(spec.to_json()) == spec
    assert _executed(spec) == spec


def test_a_reader_must_be_there():
    tree = read_tree()
    del tree["gate_head"]
    with pytest.raises(IncompletePairError, match="gate_head is not") as caught:
        Spec(name="READ", pairs=READ).sites(tree)
    assert caught.value.path == "gate_head/kernel"


def test_a_reader_of_another_size_is_refused():
    tree = {**read_tree(), "gate_head": dense(4, 4)}
    with pytest.raises(SiteShapeError, match="disagree about the number of channels") as caught:
        Spec(name="READ", pairs=READ).sites(tree)
    assert caught.value.path == "gate_head/kernel"


@pytest.mark.parametrize("name", ["up", "down", "query"])
def test_a_reader_is_a_layer_of_its_own(name):
    with pytest.raises(SpecError, match="cannot be one of them"):
        Pair(first="up", second="down", also={"query": "d f"}, readers={name: "f d"})


def test_a_reader_does_not_read_groups():
    with pytest.raises(AxisPatternError, match="has no axis 'h'"):
        Pair(
            first="v", second="o", first_axes="d (g k)", second_axes="(h k) d", axis="h", group="g",
            readers={"gate": "(g k) d"},
        )  # fmt: skip


# --- tables in other collections --------------------------------------------------------------

NORMED = Pair(
    at="block_{i}",
    first="up",
    second="down",
    tables={
        "bn/scale": "f",
        "batch_stats:bn/mean": "f",
        "batch_stats:../bn/mean": "f",
        "cache:state": "f",
    },
)


def normed_tree() -> dict:
    three = np.ones(3, np.float32)
    block = {"up": dense(2, 3), "down": dense(3, 2), "bn": {"scale": three}}
    return {
        "params": {"enc": {"block_0": block}},
        "batch_stats": {"enc": {"block_0": {"bn": {"mean": three}}, "bn": {"mean": three}}},
    }


def test_a_table_may_lie_in_another_collection():
    spec = Spec(name="NORMED", pairs=NORMED)
    (site,) = spec.sites(normed_tree())
    assert [t.path for t in site.also] == [
        "params/enc/block_0/bn/scale",
        "batch_stats/enc/block_0/bn/mean",
        "batch_stats/enc/bn/mean",
    ]
    small, _ = slim({**normed_tree(), "params": _with_dead(normed_tree()["params"])}, spec=spec)
    assert {flatten(small)[t.path].shape for t in site.also} == {(2,)}
    # Without collections there are no others.
    (site,) = spec.sites(normed_tree()["params"])
    assert [t.path for t in site.also] == ["enc/block_0/bn/scale"]


def _with_dead(params: dict) -> dict:
    params["enc"]["block_0"]["down"]["kernel"][1] = 0
    return params


def test_the_statistics_of_a_batch_norm_have_names_of_their_own_in_torch():
    (pair,) = Spec(name="NORMED", pairs=NORMED).torch()
    assert pair.tables == {
        "bn/weight": "f",
        "bn/running_mean": "f",
        "../bn/running_mean": "f",
        "cache:state": "f",
    }


# --- activations that are expressions ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x * tahn(x)", "names 'tahn', which is unknown"),
        ("x * y", "names 'y', which is unknown"),
        ("nn.relu", "cannot be read: nn.relu"),
        ("nn.relu(x)", "cannot be read: nn.relu"),
        ("__import__('os').getcwd()", "cannot be read"),
        ("lambda x: x", "cannot be read"),
        ("x if x > 0 else 0", "cannot be read"),
        ("[x]", "cannot be read"),
        ("0 < x < 1", "cannot be read"),
        ("x and 1", "cannot be read"),
        ("x @ x", "cannot be read"),
        ("x // 2", "cannot be read"),
        ("tanh(x, x)", "tanh takes 1 values"),
        ("where(x > 0, x)", "where takes 3 values"),
        ("maximum(x, b=0)", "maximum takes 2 values"),
        ("tanh(*x)", "cannot be read"),
        ("'x'", "cannot be read"),
        ("True * x", "cannot be read: True"),
        ("2j * x", "cannot be read"),
        ("x *", "SyntaxError"),
        ("", "SyntaxError"),
        ("1" + 400 * "0" + " * x", "OverflowError"),
        ("-" * 5000 + "x", "cannot be read"),
        ("config.act or x * y", "names 'y'"),
    ],
)
def test_an_activation_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(SpecError) as caught:
        Pair(first="up", second="down", activation=text)
    assert message in str(caught.value)
    assert "tanh" in str(caught.value.expected)


def test_what_an_unknown_name_may_have_meant_is_said():
    with pytest.raises(SpecError) as caught:
        Pair(first="up", second="down", activation="x * tahn(x)")
    assert "tanh" in caught.value.near


@pytest.mark.parametrize("name", ["sillu", "config.act or sillu"])
def test_a_name_that_is_misspelt_is_refused(name):
    with pytest.raises(SpecError, match="which is unknown") as caught:
        Pair(first="up", second="down", activation=name)
    assert "silu" in caught.value.near
    assert "x * tanh(log1p(exp(x)))" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["softmax", "jax.log_softmax", "Sparsemax", "glu", "config.act or softmax"]
)
def test_an_activation_that_mixes_the_channels_is_refused(name):
    with pytest.raises(SpecError, match="mixes the channels"):
        Pair(first="up", second="down", activation=name)


@pytest.mark.parametrize("name", ["softmax", ["glu", "linear"]])
def test_so_is_one_that_the_config_says(name):
    tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.diag([1.0, 0.0, 1.0])}}
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="config.act"))
    with pytest.raises(ConfigError, match="mixes the channels"):
        plan(tree, {"act": name}, spec)


@pytest.mark.parametrize(
    "name", ["mish", "jax.celu", "jax.nn", "config.hidden_act", "jax.config.acts", None]
)
def test_names_of_activations_are_left_alone(name):
    assert Pair(first="up", second="down", activation=name).activation == name


# --- source -----------------------------------------------------------------------------------


def _executed(spec: Spec) -> Spec:
    names: dict = {}
    exec(spec.source(), names)
    return next(value for value in names.values() if isinstance(value, Spec))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_source_of_a_spec_makes_it(name):
    spec = SHIPPED[name]
    assert _executed(spec) == spec
    part = spec.under(tree="decoder", config="decoder")
    assert _executed(part) == part


def test_the_source_of_a_spec_is_what_a_person_writes():
    spec = Spec(
        name="Mine, 2",
        pairs=(
            Pair(
                at="block_{i}",
                first=("gate", "up"),
                second="down",
                first_axes="l d f",
                second_axes="l f d",
                gated=True,
                width="hidden",
                activation='where(x > 0, x, "a")'.replace('"a"', "0.1 * x"),
                readers={"gate_head": "l f o"},
            ),
            Pair(first=("qkv",), second="o", parts=(0,), first_axes="d (3 f)"),
        ),
    )
    assert (
        spec.source()
        == """\
from flaxslim import Pair, Spec

Mine__2 = Spec(
    name="Mine, 2",
    pairs=(
        Pair(
            at="block_{i}",
            first=("gate", "up"),
            first_axes="l d f",
            second="down",
            second_axes="l f d",
            readers={"gate_head": "l f o"},
            width="hidden",
            activation="where(x > 0, x, 0.1 * x)",
            gated=True,
        ),
        Pair(
            first=("qkv",),
            first_axes="d (3 f)",
            second="o",
            parts=(0,),
        ),
    ),
)
"""
    )
    assert LLAMA_FFN.source().startswith("from flaxslim import Pair, Spec\n\nLLAMA_FFN = Spec(\n")


def test_sources_are_laid_out_as_ruff_does_it(tmp_path):
    for name, spec in SHIPPED.items():
        (tmp_path / f"{name}.py").write_text(spec.source())
    odd = Pair(first="it's", second='"', at="a\\b", sizes={"k": "4"}, also={"x" * 99: "f"})
    (tmp_path / "odd.py").write_text(Spec(name="é", pairs=odd).source())
    assert _executed(Spec(name="class", pairs=odd)) == Spec(name="class", pairs=odd)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "format",
            "--isolated",
            "--line-length=100",
            "--check",
            "--diff",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_two_pairs_of_one_second_layer_are_refused():
    """Each along another axis of it: a plan would know only one of them."""
    heads = Pair(first="v", first_axes="d h k", second="o", second_axes="h k d", axis="h")
    values = dataclasses.replace(heads, first_axes="d e f", second_axes="e f d", axis="f")
    tree = {"v": {"kernel": np.ones((3, 4, 5))}, "o": {"kernel": np.ones((4, 5, 3))}}
    with pytest.raises(SiteShapeError, match="have the same second layer"):
        Spec(name="BOTH", pairs=(heads, values)).sites(tree)
