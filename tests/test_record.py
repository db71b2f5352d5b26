"""The sizes of a slimmed model in its config: what is said where, and what is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from kill import kill
from zoo import CASES, build

import flaxslim
from flaxslim import Pair, Spec, slim
from flaxslim._layout import Layout
from flaxslim._tree import flatten
from flaxslim.errors import ConfigError, LayoutError, NothingRemovedWarning, WidthError
from flaxslim.specs import spec_for

FFN_0, HEADS_0 = "encoder/layer/0/output/dense", "encoder/layer/0/attention/output/dense"
BAD_SPEC = {"name": "x", "pairs": [{"first": "a", "second": "b", "width": "1.5**"}]}


def model(name: str) -> tuple[type, Any, Any]:
    return build(next(case for case in CASES if str(case) == name))


def slimmed(name: str, part: str = "all", seed: int = 0, **how: Any) -> tuple[type, Any, Any]:
    cls, cfg, params = model(name)
    spec = spec_for(cfg, part)
    params, _ = kill(params, spec.sites(params, cfg), seed=seed, high=0.9)
    return (cls, *slim(params, cfg, part, width="per_layer", **how)[::-1])


def widths(cfg: Any, params: Any, part: str = "all") -> dict[str, int]:
    return {site.name: site.size for site in spec_for(cfg, part).sites(params, cfg)}


# --- where it is said -------------------------------------------------------------------------


def test_widths_of_one_stack_are_said_the_standard_way():
    _, cfg, params = slimmed("FlaxBertForMaskedLM", "ffn")
    first, second = (widths(cfg, params)[f"encoder/layer/{i}/output/dense"] for i in range(2))
    assert cfg.intermediate_size == max(first, second)
    index, least = min(enumerate((first, second)), key=lambda found: found[1])
    assert cfg.per_layer_config == {str(index): {"intermediate_size": least}}
    assert cfg.flaxslim_layout == {
        "version": 1,
        "load": "flaxslim.from_pretrained(FlaxBertForMaskedLM, folder)",
        "sites": {},
    }


@pytest.mark.parametrize(
    "name",
    [
        "FlaxT5ForConditionalGeneration-gated",
        "FlaxBartForConditionalGeneration",
        "FlaxAlbertForMaskedLM-groups",
        "FlaxBloomForCausalLM",
    ],
)
def test_two_stacks_shared_layers_and_hard_coded_widths_are_said_by_name(name):
    _, cfg, params = slimmed(name, "ffn")
    assert getattr(cfg, "per_layer_config", None) is None
    sites = cfg.flaxslim_layout["sites"]
    assert sites
    for path, width in sites.items():
        assert widths(cfg, params)[path] == width


def test_parts_of_a_composite_have_their_own():
    _, cfg, _ = slimmed("FlaxEncoderDecoderModel-bert+bart")
    assert not hasattr(cfg, "flaxslim_layout")
    assert cfg.encoder.flaxslim_layout["sites"].keys() <= {
        f"encoder/layer/{i}/attention/output/dense" for i in range(2)
    }
    assert cfg.encoder.per_layer_config
    # BART counts its encoder's layers, so that numbers would not say which of the decoder.
    assert any(name.endswith("/fc2") for name in cfg.decoder.flaxslim_layout["sites"])
    assert getattr(cfg.decoder, "per_layer_config", None) is None
    # A part is a model of its own.
    assert Layout.of(cfg.encoder) is not None


def test_what_bigbird_says_of_its_question_answering_head():
    _, cfg, params = slimmed("FlaxBigBirdForQuestionAnswering-full", "ffn")
    found = widths(cfg, params)
    said = cfg.flaxslim_layout["sites"].get("qa_classifier/output/dense", cfg.intermediate_size)
    assert found["qa_classifier/output/dense"] == said


def test_heads_are_said_by_their_indices_in_the_dense_model():
    _, cfg, params = model("FlaxBertForMaskedLM")
    sites = spec_for(cfg, "heads").sites(params, cfg)
    params, dead = kill(params, sites, low=0.5, high=0.5)
    _, new = slim(params, cfg, "heads", width="per_layer")
    for site in sites:
        left = sorted({*range(4)} - {*dead[site.second.path].tolist()})
        assert new.flaxslim_layout["sites"][site.name] == left
    assert new.num_attention_heads == 4
    assert new.hidden_size == 32


@pytest.mark.parametrize(
    "name", ["FlaxGemmaForCausalLM-grouped", "FlaxMT5ForConditionalGeneration-gated"]
)
def test_uniform_counts_of_heads_go_to_plain_keys_where_the_class_has_them(name):
    _, cfg, params = model(name)
    leaves = flatten(params)
    new = {}
    for site in spec_for(cfg, "heads").sites(params, cfg):
        dead = np.asarray([0, 1] if site.groups else [1])
        new[site.second.path] = site.second.axes.zero(leaves[site.second.path], "h", dead)
    from flaxslim._tree import replace

    for width in ("uniform", "per_layer"):
        _, small = slim(replace(params, new), cfg, "heads", width=width)
        assert not hasattr(small, "flaxslim_layout")
        if "Gemma" in name:
            assert (small.num_attention_heads, small.num_key_value_heads) == (2, 1)
        else:
            assert small.num_heads == 3


def test_numbers_of_layers_may_be_padded_with_zeros():
    """As transformers 5 writes them."""
    cls, cfg, params = slimmed("FlaxBertForMaskedLM", "ffn")
    cfg.per_layer_config = {k.zfill(2): v for k, v in cfg.per_layer_config.items()}
    with pytest.warns(NothingRemovedWarning):
        slim(params, cfg, width="per_layer")
    proof = flaxslim.verify((params, cfg), (params, cfg), cls, repeats=0)
    assert proof.relative == 0.0


# --- slimmed again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "FlaxBertForMaskedLM",
        pytest.param("FlaxMistralForCausalLM", marks=pytest.mark.long),
        "FlaxT5ForConditionalGeneration-gated",
        pytest.param("FlaxBloomForCausalLM", marks=pytest.mark.long),
        pytest.param("FlaxEncoderDecoderModel-bert+gpt2", marks=pytest.mark.long),
    ],
)
def test_a_slimmed_model_can_be_slimmed_again(name):
    cls, cfg, params = model(name)
    spec = spec_for(cfg, "all")
    zeroed, _ = kill(params, spec.sites(params, cfg), seed=1, low=0.2, high=0.5)
    once, first = slim(zeroed, cfg, "all", width="per_layer")
    more, _ = kill(once, spec.sites(once, first), seed=2, low=0.3, high=0.6)
    twice, second = slim(more, first, "all", width="per_layer")
    assert sum(x.size for x in flatten(twice).values()) < sum(
        x.size for x in flatten(once).values()
    )
    flaxslim.verify((more, first), (twice, second), cls, repeats=0, spec="all").raise_if_failed()
    # And heads are still numbered as in the dense model.
    plan = flaxslim.plan(more, first, "all", width="per_layer")
    both = plan @ flaxslim.plan(zeroed, cfg, "all", width="per_layer")
    for part in {pair.config for pair in spec}:
        said = flaxslim._record.sites(second, part)
        for cut in both.cuts:
            if cut.site.pair.config == part and isinstance(said.get(cut.site.name), tuple):
                assert said[cut.site.name] == cut.keep


def test_one_width_for_all_is_refused_where_the_layers_differ():
    _, cfg, params = slimmed("FlaxBertForMaskedLM", "ffn")
    more, _ = kill(params, spec_for(cfg).sites(params, cfg), seed=4)
    with pytest.raises(WidthError, match="the layers differ in intermediate_size already"):
        slim(more, cfg)


def test_a_tree_of_one_prefix_reads_what_another_wrote():
    _, cfg, params = slimmed("FlaxBertForMaskedLM")
    base = params["bert"]
    assert widths(cfg, base) == widths(cfg, params)


# --- refused ----------------------------------------------------------------------------------


def test_a_layout_of_a_later_version_is_refused(tmp_path):
    cls, cfg, params = slimmed("FlaxBertForMaskedLM")
    folder = flaxslim.save(tmp_path / "slim", params, cfg)
    config = json.loads((folder / "config.json").read_text())
    config["flaxslim_layout"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    for run in (
        lambda: flaxslim.from_pretrained(cls, folder),
        lambda: slim(*flaxslim.load(folder), "all", width="per_layer"),
    ):
        with pytest.raises(LayoutError, match="later version") as caught:
            run()
        assert "pip install --upgrade" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flaxslim_layout": "yes"}, "cannot be read"),
        ({"flaxslim_layout": {"sites": {}}}, "cannot be read"),
        ({"flaxslim_layout": {"version": 1, "sites": {"x": [1, 0]}}}, "cannot be read"),
        ({"flaxslim_layout": {"version": 1, "sites": {"x": 1.5}}}, "cannot be read"),
        ({"flaxslim_layout": {"version": 1, "sites": {"x": -1}}}, "cannot be read"),
        ({"flaxslim_layout": {"version": 1, "sites": {"encoder/laier/0/output/dense": 3}}}, "know"),
        ({"flaxslim_layout": {"version": 1, "sites": [1]}}, "cannot be read"),
        ({"flaxslim_layout": {"version": 1, "sites": None}}, "cannot be read"),
        ({"flaxslim_layout": {"version": 1, "sites": {HEADS_0: 3}}}, "heads are listed"),
        ({"flaxslim_layout": {"version": 1, "sites": {FFN_0: [0, 1]}}}, "a width is said"),
        ({"flaxslim_layout": {"version": 1, "sites": {HEADS_0: [0, 99]}}}, "does not have"),
        ({"flaxslim_layout": {"version": 1, "sites": {FFN_0.replace("0", "99"): 3}}}, "not have"),
        ({"flaxslim_layout": {"version": 1, "sites": {FFN_0.replace("0", "x"): 3}}}, "not have"),
        ({"flaxslim_layout": {"version": 1, "spec": BAD_SPEC}}, "spec cannot be read"),
        ({"per_layer_config": {"1": {"intermediate_size": -3}}}, "a width that is none"),
        ({"per_layer_config": {"1": {"intermediate_size": 15.0}}}, "a width that is none"),
        ({"per_layer_config": {"99": {"intermediate_size": 3}}}, "does not have"),
        ({"per_layer_config": {"one": {"intermediate_size": 3}}}, "cannot be read"),
        ({"per_layer_config": [1, 2]}, "cannot be read"),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, "cannot run"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(change, words):
    from transformers import BertConfig

    with pytest.raises(LayoutError, match=words) as caught:
        Layout.of(BertConfig(**change))
    assert caught.value.path
    assert "mend" in str(caught.value)


def test_a_layout_that_does_not_fit_the_tensors_is_refused(tmp_path):
    cls, cfg, params = slimmed("FlaxBertForMaskedLM")
    folder = flaxslim.save(tmp_path / "slim", params, cfg)
    cfg.flaxslim_layout["sites"]["encoder/layer/0/attention/output/dense"] = [0, 1, 2, 3]
    cfg.save_pretrained(folder)
    with pytest.raises(LayoutError, match="does not fit the tensors") as caught:
        flaxslim.from_pretrained(cls, folder)
    assert "attention" in str(caught.value)
    with pytest.raises(ConfigError, match="contradicts the tensors"):
        slim(params, cfg, "all", width="per_layer")
    with pytest.raises(ConfigError, match="contradicts the tensors"):
        flaxslim.save(tmp_path / "again", params, cfg)


def test_the_stock_loader_fails_and_the_folder_leads_on(tmp_path):
    """What does the person see? A mismatch of shapes; and in the folder, what to type instead."""
    for part in ("ffn", "heads"):
        cls, cfg, params = slimmed("FlaxBertForMaskedLM", part)
        folder = flaxslim.save(tmp_path / part, params, cfg)
        with pytest.raises(ValueError, match="incompatible with the model shape"):
            cls.from_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
        load = "flaxslim.from_pretrained(FlaxBertForMaskedLM, "
        assert load in (folder / "config.json").read_text()
        assert load in (folder / "README.md").read_text()


def test_heads_that_do_not_divide_are_refused():
    _, cfg, params = model("FlaxBertForMaskedLM")
    cfg.num_attention_heads = 5
    with pytest.raises(ConfigError, match="hidden_size is not a multiple"):
        slim(params, cfg, "heads", width="per_layer")
    _, cfg, params = model("FlaxMistralForCausalLM")
    cfg.hidden_size, cfg.num_attention_heads = 64, 4
    with pytest.raises(flaxslim.FlaxslimError):
        slim(params, cfg, "heads", width="per_layer")


def test_heads_need_a_config():
    _, _, params = model("FlaxBertForMaskedLM")
    with pytest.raises(ConfigError, match="needed to tell the sizes of k"):
        slim(params, None, flaxslim.BERT_HEADS)


def test_a_dataclass_without_a_place_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Config:
        hidden: int = 4

    spec = Spec(name="MLP", pairs=Pair(at="{i}", first="up", second="down", width="hidden"))
    tree = {
        str(i): {"up": {"kernel": np.ones((2, 4))}, "down": {"kernel": np.eye(4)[:, :2]}}
        for i in range(2)
    }
    tree["1"]["down"]["kernel"] = np.ones((4, 2))
    with pytest.raises(ConfigError, match="no field to say this in") as caught:
        slim(tree, Config(), spec, width="per_layer")
    assert "flaxslim_layout" in str(caught.value)
    small, cfg = slim(tree, dataclasses.asdict(Config()), spec, width="per_layer")
    assert cfg["flaxslim_layout"]["sites"] == {"0/down": 2}
    assert Spec.from_dict(cfg["flaxslim_layout"]["spec"]) == spec
    assert small["1"] is tree["1"] or small["1"]["down"]["kernel"] is tree["1"]["down"]["kernel"]


@pytest.mark.parametrize("spec", ["head", 3, ["ffn", None], [], {"ffn"}])
def test_what_is_no_spec_is_refused(spec):
    _, cfg, params = model("FlaxBertForMaskedLM")
    with pytest.raises(flaxslim.FlaxslimError, match="spec") as caught:
        slim(params, cfg, spec)
    assert '"heads"' in str(caught.value)


# --- what is said where, in models of one's own ------------------------------------------------

MLP: dict[str, Any] = {"first": "up", "second": "down", "width": "hidden"}


def mlps(*names: str, width: int = 8) -> dict[str, Any]:
    """An MLP at each path, of which the first has one dead channel, the second two, ..."""
    tree: dict[str, Any] = {}
    for dead, name in enumerate(names, start=1):
        down = np.ones((width, 3))
        down[:dead] = 0
        tree |= {f"{name}/up/kernel": np.ones((3, width)), f"{name}/down/kernel": down}
    return tree


def agrees(params: Any, cfg: Any, spec: Any) -> bool:
    """Whether the config says the sizes of the tensors, so that they can be slimmed again."""
    with pytest.warns(NothingRemovedWarning):
        slim(params, cfg, spec, width="per_layer")
    return True


@pytest.mark.parametrize(
    ("at", "names", "sites"),
    [
        ("layer_{i}", ("layer_0", "layer_1"), {}),
        ("layer_{i}", ("layer_00", "layer_01"), {"layer_01/down": 6}),
        ("**/layer_{i}", ("layer_0", "layer_1"), {"layer_1/down": 6}),
        ("**/layer_{i}", ("params/layer_0", "params/layer_1"), {"layer_1/down": 6}),
        ("layer_{i}", ("a/layer_0", "b/layer_0"), {"/b/layer_0/down": 6}),
    ],
)
def test_a_number_of_a_layer_is_used_only_where_it_is_its_name(at, names, sites):
    spec = Spec(name="S", pairs=Pair(at=at, **MLP))
    cfg = {"model_type": "mine", "hidden": 8}
    small, new = slim(mlps(*names), cfg, spec, width="per_layer")
    assert new["flaxslim_layout"]["sites"] == sites
    assert ("per_layer_config" in new) == (not sites)
    assert agrees(small, new, spec)


def test_two_sites_of_one_name_may_not_differ():
    pairs = tuple(Pair(at="layer_{i}", tree=tree, **MLP) for tree in "ab")
    spec = Spec(name="TOWERS", pairs=pairs)
    with pytest.raises(LayoutError, match="have one name") as caught:
        slim(mlps("a/layer_0", "b/layer_0"), {"hidden": 8}, spec, width="per_layer")
    assert "slim each of them alone" in str(caught.value)


@pytest.mark.parametrize("order", [1, -1])
def test_what_two_specs_recorded_is_read_by_both(order):
    """A spec of the family and one of one's own, in either order."""
    adapter = Spec(name="AD", pairs=Pair(at="encoder/layer/{i}/adapter", **MLP))
    ffn = mlps(*(f"encoder/layer/{i}/{{}}/dense" for i in range(2)))
    rename = {"{}/dense/up": "intermediate/dense", "{}/dense/down": "output/dense"}
    tree = mlps(*(f"encoder/layer/{i}/adapter" for i in range(2)))
    for path, x in ffn.items():
        old = next(old for old in rename if old in path)
        tree[path.replace(old, rename[old])] = x
    cfg: Any = {"model_type": "bert", "hidden": 8, "intermediate_size": 8, "hidden_act": "relu"}
    specs = ["ffn", adapter][::order]
    for spec in specs:
        tree, cfg = slim(tree, cfg, spec, width="per_layer")
    assert Layout.of({**cfg, "num_attention_heads": 4, "hidden_size": 32}) is not None
    assert Spec.from_dict(cfg["flaxslim_layout"]["spec"]) == adapter
    for spec in specs:
        assert agrees(tree, cfg, spec)


def test_a_second_spec_of_ones_own_is_added_to_the_first():
    one, two = (Spec(name=n, pairs=Pair(at=f"{n}_{{i}}", **MLP)) for n in "ab")
    tree, cfg = mlps("a_0", "a_1", "b_0", "b_1"), {"hidden": 8}
    for spec in (one, Spec(name="b", pairs=dataclasses.replace(*two, width="other"))):
        tree, cfg = slim(tree, {"other": 8, **cfg}, spec, width="per_layer")
    assert cfg["flaxslim_layout"]["sites"] == {"a_1/down": 6, "b_1/down": 4}
    assert [pair["at"] for pair in cfg["flaxslim_layout"]["spec"]["pairs"]] == ["a_{i}", "b_{i}"]
    assert Layout.of(cfg) is not None


def bert(*, torch: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    tree: dict[str, Any] = {}
    for i in range(2):
        down = np.ones((8, 4))
        down[: i + 1] = 0
        layer = f"encoder/layer/{i}"
        tree |= {f"{layer}/intermediate/dense/kernel": np.ones((4, 8))}
        tree |= {f"{layer}/output/dense/kernel": down}
    if torch:
        tree = {path.replace("kernel", "weight"): x.T for path, x in tree.items()}
    return tree, {
        "model_type": "bert",
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 4,
        "hidden_act": "relu",
    }


def test_pytorch_names_of_a_known_family_need_no_spec_in_the_config():
    tree, cfg = bert(torch=True)
    _, new = slim(tree, cfg, flaxslim.BERT_FFN.torch(), width="per_layer")
    assert "spec" not in new["flaxslim_layout"]
    assert new["per_layer_config"] == {"1": {"intermediate_size": 6}}


@pytest.mark.parametrize("torch", [False, True])
def test_a_spec_of_some_layers_leaves_the_key_of_all_alone(torch):
    tree, cfg = bert(torch=torch)
    pair = dataclasses.replace(next(iter(flaxslim.BERT_FFN)), at="encoder/layer/1")
    spec, whole = Spec(name="ONE", pairs=pair), flaxslim.BERT_FFN
    spec, whole = (spec.torch(), whole.torch()) if torch else (spec, whole)
    small, new = slim(tree, cfg, spec, width="per_layer")
    assert new["intermediate_size"] == 8
    assert new["flaxslim_layout"]["sites"] == {"encoder/layer/1/output/dense": 6}
    assert Layout.of(new) is not None
    flaxslim.plan(small, new, whole, width="per_layer")  # the config fits the tensors
    with pytest.raises(WidthError, match="which the spec does not name"):
        slim(tree, cfg, spec)


def test_a_uniform_cut_takes_the_layout_away():
    spec = Spec(name="S", pairs=Pair(at="{i}", **{**MLP, "width": "ratio*d"}))
    tree, cfg = mlps("0", "1"), {"d": 4, "ratio": 2}
    for name in "01":
        tree[f"{name}/down/kernel"][:3] = 0
    small, laid_out = slim(tree, cfg, spec, width="per_layer")
    assert laid_out["flaxslim_layout"]["sites"] == {"0/down": 5, "1/down": 5}
    for name in "01":
        small[f"{name}/down/kernel"][:1] = 0
    small, new = slim(small, laid_out, spec)
    assert new == {"d": 4, "ratio": 1}
    assert agrees(small, new, spec)


ATTENTION: dict[str, Any] = {
    "at": "{i}",
    "first": "v",
    "first_axes": "d (g k)",
    "also": {"q": "d (h k)"},
    "second": "o",
    "second_axes": "(h k) d",
    "axis": "h",
    "group": "g",
    "width": "heads",
    "sizes": {"k": "size"},
    "activation": "identity",
    "ragged": True,
}


def attention(groups: int = 4) -> dict[str, Any]:
    out = np.ones((8, 3))
    out[:2] = 0
    sizes = {"v": 2 * groups, "q": 8}
    return {
        "0": {n: {"kernel": np.ones((3, w))} for n, w in sizes.items()} | {"o": {"kernel": out}}
    }


@pytest.mark.parametrize("said", [2, 3])
def test_another_number_of_key_value_groups_is_refused(said):
    spec = Spec(name="H", pairs=Pair(**ATTENTION, group_width="groups"))
    cfg = {"heads": 4, "size": 2, "groups": said}
    with pytest.raises(ConfigError, match="contradicts the tensors") as caught:
        slim(attention(), cfg, spec, width="per_layer")
    assert "4 key/value groups" in str(caught.value)


def test_groups_without_a_key_are_refused_in_words():
    spec = Spec(name="H", pairs=Pair(**ATTENTION))
    _, cfg = slim(attention(2), {"heads": 4, "size": 2}, spec, width="per_layer")
    with pytest.raises(LayoutError, match="does not say how they are grouped"):
        Layout.of(cfg, spec)


@pytest.mark.parametrize("groups", [{}, {"num_key_value_heads": None}])
def test_old_llama_configs_without_groups_have_one_for_each_head(groups):
    cfg = {"num_attention_heads": 4, **groups}
    expression = next(iter(flaxslim.LLAMA_HEADS)).group_expression
    assert expression is not None
    assert expression.read(cfg) == 4


def test_a_spec_is_found_in_the_part_of_the_config_that_keeps_it():
    spec = Spec(name="S", pairs=Pair(at="{i}", config="model.", **MLP))
    _, cfg = slim(mlps("0", "1"), {"model": {"hidden": 8}}, spec, width="per_layer")
    assert cfg["model"]["flaxslim_layout"]["sites"] == {"1/down": 6}
    assert Layout.of(cfg) is not None


@pytest.mark.parametrize(
    ("cfg", "load"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "(FlaxBertModel, folder)"),
        ({"model_type": "bert"}, "(FlaxAutoModel, folder)"),
        ({"hidden": 8}, "flaxslim.module(YourModule, cfg)"),
    ],
)
def test_the_config_says_how_it_is_loaded(cfg, load):
    assert flaxslim._record.written(cfg, None, {})["load"].endswith(load)
