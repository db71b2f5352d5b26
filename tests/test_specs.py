"""The shipped specs against the facts of `families.json`, and the registry."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

import flaxslim
from flaxslim import plan, spec_for
from flaxslim._config import Width
from flaxslim._spec import Spec
from flaxslim._tree import flatten
from flaxslim.errors import UnknownFamilyError, WidthError
from flaxslim.specs import COMPOSITES, FAMILIES, _ffn, _heads

FACTS = pathlib.Path(__file__).parents[2] / "shared" / "families.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the facts: one FFN of one family (or of one combination of two)."""

    model_type: str
    variant: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        names = (self.model_type, self.variant, self.facts["stack"], self.facts["kind"])
        return " ".join(filter(None, names)).replace(" + ", "+")

    @property
    def cfg(self) -> dict[str, Any]:
        """What a config of this family must say for the registry."""
        parts = COMPOSITES.get(self.model_type, {})
        if self.model_type == "clip":
            kinds = ["clip_text_model", "clip_vision_model"]
        else:
            kinds = [
                {"clip_vision": "clip_vision_model"}.get(p, p) for p in self.variant.split(" + ")
            ]
        if list(parts) == ["text_config", "vision_config"] and self.model_type != "clip":
            kinds.reverse()  # the facts name the vision tower first
        return {
            "model_type": self.model_type,
            **{key: {"model_type": kind} for key, kind in zip(parts, kinds, strict=False)},
        }

    def tree(self, root: str) -> dict[str, np.ndarray]:
        """Zeros at the paths of the facts, below one layer root."""
        f, leaves = self.facts, {}
        root = re.sub(r"\{\w+\}", "0", root)
        for name, shape in zip(f["producers"], f["example_shapes"]["producers"], strict=True):
            leaves[f"{root}/{name}/kernel"] = np.zeros(shape, np.float32)
            if f["producer_bias"]:
                size = shape[f["producer_kernel_hidden_axis"]]
                leaves[f"{root}/{name}/bias"] = np.zeros(size, np.float32)
        shape = f["example_shapes"]["consumer"]
        leaves[f"{root}/{f['consumer']}/kernel"] = np.zeros(shape, np.float32)
        if f["consumer_bias"]:
            size = shape[1 - f["consumer_kernel_hidden_axis"]]
            leaves[f"{root}/{f['consumer']}/bias"] = np.zeros(size, np.float32)
        return leaves


def _entries() -> list[Any]:
    if not FACTS.is_file():
        return [pytest.param(None, marks=pytest.mark.skip(f"no facts at {FACTS}"))]
    families = json.loads(FACTS.read_text())["families"]
    found = [
        Entry(model_type, facts["variant"], facts)
        for family in families.values()
        for facts in family.get("ffn") or ()
        for model_type in _types(family["model_type"], facts)
    ]
    return [pytest.param(entry, id=str(entry)) for entry in found]


def _types(names: list[str], facts: dict[str, Any]) -> list[str]:
    """CLIP's towers have a model_type each, and a config in which the key is not nested."""
    return names if "clip" not in names else ["clip", f"clip_{facts['stack']}_model"]


@pytest.mark.parametrize("entry", _entries())
def test_every_ffn_of_the_facts_is_found_as_they_say(entry: Entry):
    facts, spec = entry.facts, spec_for(entry.cfg)
    for root in facts["layer_roots"]:
        tree = entry.tree(root)
        (site,) = spec.sites(tree)
        assert {t.path for t in site.tensors} == set(tree)
        assert site.size == facts["example_shapes"]["hidden_width"]
        assert site.pair.gated == ("gated" in facts["kind"])
        assert site.second.path.endswith(f"/{facts['consumer']}/kernel")
        for t, name in zip(site.first, facts["producers"], strict=True):
            assert t.path.endswith(f"/{name}/kernel")  # gate before up
            (hidden,) = [i for i, dim in enumerate(t.axes.dimensions) if "f" in dim]
            assert hidden == facts["producer_kernel_hidden_axis"]
            assert (2 in t.axes.dimensions[hidden]) == facts["kind"].startswith("fused")
        (hidden,) = [i for i, dim in enumerate(site.second.axes.dimensions) if "f" in dim]
        assert hidden == facts["consumer_kernel_hidden_axis"]
        expression = site.pair.width_expression
        assert expression is not None
        key = facts["config_key"]
        if entry.model_type.startswith("clip_"):
            key = key.partition(".")[2]
        assert expression.key == key
        where, _, rest = facts["activation_from"].partition(" ")
        if where.startswith("config."):
            assert site.pair.activation is not None
            assert site.pair.activation.partition(" or ")[0] == where
            if "None ->" in rest:
                assert site.pair.activation.endswith(rest.split()[-1].rstrip(")"))


@pytest.mark.parametrize("entry", _entries())
def test_the_same_ffn_is_found_in_pytorch_names(entry: Entry):
    tree = {
        path.removesuffix("/kernel") + "/weight" if path.endswith("/kernel") else path: leaf.T
        for path, leaf in entry.tree(entry.facts["layer_roots"][0]).items()
    }
    (site,) = spec_for(entry.cfg).torch().sites(tree)
    assert {t.path for t in site.tensors} == set(tree)
    assert site.size == entry.facts["example_shapes"]["hidden_width"]


def test_every_family_of_the_facts_with_an_ffn_is_registered():
    if not FACTS.is_file():
        pytest.skip(f"no facts at {FACTS}")
    families = json.loads(FACTS.read_text())["families"]
    known = {name for f in families.values() if f.get("ffn") for name in f["model_type"]}
    assert known == set(FAMILIES) | set(COMPOSITES)
    assert sum(bool(f.get("ffn")) for f in families.values()) == 37


# --- the registry -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_keys_of_a_spec_are_those_of_the_stock_config(name):
    cfg = AutoConfig.for_model(name)
    for pair in spec_for(cfg, "all"):
        width = pair.width_expression
        assert width is not None
        assert width.read(cfg) > 0
        for size in pair.sizes.values():
            assert Width(expression=size).read(cfg) > 0
        if pair.axis == "h":
            continue
        assert width.step(cfg) >= 1
        where, _, default = (pair.activation or "").partition(" or ")
        assert where
        if where.startswith("config."):
            assert default or isinstance(getattr(cfg, where.removeprefix("config.")), str)


@pytest.mark.parametrize(
    ("cfg", "tree", "roots"),
    [
        (
            {"model_type": "encoder-decoder", "encoder": "bert", "decoder": "gpt2"},
            {
                "encoder/encoder/layer/0": ("intermediate/dense", "output/dense", False),
                "decoder/transformer/h/0": ("mlp/c_fc", "mlp/c_proj", True),
            },
            ["encoder.intermediate_size", "decoder.n_inner"],
        ),
        (
            {"model_type": "encoder-decoder", "encoder": "bert", "decoder": "bert"},
            {
                "encoder/encoder/layer/0": ("intermediate/dense", "output/dense", False),
                "decoder/bert/encoder/layer/0": ("intermediate/dense", "output/dense", False),
            },
            ["encoder.intermediate_size", "decoder.intermediate_size"],
        ),
        (
            {
                "model_type": "vision-text-dual-encoder",
                "vision_config": "clip_vision_model",
                "text_config": "roberta",
            },
            {
                "vision_model/vision_model/encoder/layers/0": ("mlp/fc1", "mlp/fc2", False),
                "text_model/encoder/layer/0": ("intermediate/dense", "output/dense", False),
            },
            ["vision_config.intermediate_size", "text_config.intermediate_size"],
        ),
    ],
    ids=["bert+gpt2", "bert+bert", "clip_vision+roberta"],
)
def test_composites_are_built_from_their_parts(cfg, tree, roots):
    cfg = {k: v if k == "model_type" else {"model_type": v} for k, v in cfg.items()}
    leaves = {}
    for number, (root, (first, second, transposed)) in enumerate(tree.items()):
        up, down = np.zeros((4, 8 + number)), np.zeros((8 + number, 4))
        leaves[f"{root}/{first}/kernel"] = up.T if transposed else up
        leaves[f"{root}/{second}/kernel"] = down.T if transposed else down
    sites = {site.root: site for site in spec_for(cfg).sites(leaves)}
    keys = []
    for number, root in enumerate(tree):
        (site,) = [site for path, site in sites.items() if path.startswith(root)]
        assert site.size == 8 + number
        expression = site.pair.width_expression
        assert expression is not None
        keys.append(expression.key)
    assert keys == roots
    assert len(sites) == 2


@pytest.mark.parametrize(
    ("name", "near"),
    [("bertt", "bert"), ("GPT2", "gpt2"), ("lama", "llama"), ("clip_vison_model", "clip_vision")],
)
def test_an_unknown_model_type_names_the_nearest(name, near):
    with pytest.raises(UnknownFamilyError, match=f"no spec for model_type '{name}'") as caught:
        spec_for({"model_type": name})
    assert near in str(caught.value).split("nearest:")[1]
    assert "`flaxslim families`" in str(caught.value)
    assert "Spec(" in str(caught.value)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (None, "^no config was given(.|\n)*pass the config"),
        ({}, "^the config has no model_type"),
        ({"model_type": None}, "^the config has no model_type"),
    ],
)
def test_a_config_without_a_model_type_is_told(cfg, words):
    with pytest.raises(UnknownFamilyError, match=words) as caught:
        flaxslim.slim({"a": {"kernel": np.ones((2, 2))}}, cfg)
    assert "spec=Spec(" in str(caught.value)


@pytest.mark.parametrize("name", ["resnet", "regnet"])
def test_families_without_an_ffn_are_unknown(name):
    with pytest.raises(UnknownFamilyError):
        spec_for({"model_type": name})


def test_an_unknown_part_of_a_composite_is_told():
    cfg = {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "gtp2"},
    }
    with pytest.raises(UnknownFamilyError, match="'gtp2'") as caught:
        spec_for(cfg)
    assert "gpt2" in str(caught.value)


def test_the_public_constants_are_those_of_the_registry():
    for part, (end, home) in enumerate((("_FFN", _ffn), ("_HEADS", _heads))):
        ours = {name for name in flaxslim.__all__ if name.endswith(end) and hasattr(home, name)}
        assert len(ours) == len(FAMILIES)
        for name in ours:
            assert isinstance(getattr(flaxslim, name), Spec)
            assert getattr(flaxslim, name) in [both[part] for both in FAMILIES.values()]
    assert FAMILIES["mistral"][0] is FAMILIES["llama"][0]
    assert FAMILIES["vit"][0] is flaxslim.VIT_FFN is flaxslim.BERT_FFN


# --- widths that a config cannot say ----------------------------------------------------------


def _mlp(first: str, second: str, width: int, *, d: int, fused: bool = False) -> dict:
    rng = np.random.default_rng(0)
    return {
        f"{first}/kernel": rng.normal(size=(d, width * (1 + fused))),
        f"{first}/bias": rng.normal(size=width * (1 + fused)),
        f"{second}/kernel": rng.normal(size=(width, d)),
        f"{second}/bias": rng.normal(size=d),
    }


DINOV2 = {"model_type": "dinov2", "hidden_size": 8, "mlp_ratio": 4, "hidden_act": "gelu"}


@pytest.mark.parametrize(("dead", "kept"), [(0, 32), (7, 32), (8, 24), (15, 24), (17, 16), (32, 8)])
def test_dinov2_is_cut_to_a_multiple_of_its_hidden_size(dead, kept):
    root = "encoder/layer/0/mlp"
    tree = _mlp(f"{root}/fc1", f"{root}/fc2", 32, d=8)
    tree[f"{root}/fc2/kernel"][:dead] = 0
    p = plan(tree, DINOV2)
    assert len(p.cuts[0].keep) == kept
    assert bool(p.blocked) == (dead == 7)
    if dead == 7:
        assert "multiples of 8" in str(p)
        with pytest.raises(WidthError, match="25 of 32 channels are needed"):
            flaxslim.slim(tree, DINOV2)
    elif dead:
        _, cfg = flaxslim.slim(tree, DINOV2)
        assert cfg == {**DINOV2, "mlp_ratio": kept // 8}
        assert isinstance(cfg["mlp_ratio"], int)


@pytest.mark.parametrize(("dead", "kept"), [(8, 80), (9, 80), (20, 72), (80, 8)])
def test_dinov2_swiglu_is_cut_to_a_multiple_of_eight(dead, kept):
    root = "encoder/layer/0/mlp"
    tree = _mlp(f"{root}/weights_in", f"{root}/weights_out", 88, d=32, fused=True)
    tree[f"{root}/weights_out/kernel"][:dead] = 0
    cfg = {**DINOV2, "hidden_size": 32, "use_swiglu_ffn": True}
    small, new = flaxslim.slim(tree, cfg)
    assert small[f"{root}/weights_in/kernel"].shape == (32, 2 * kept)
    # What Dinov2SwiGLUFFN does with it.
    hidden = int(new["hidden_size"] * new["mlp_ratio"])
    assert (int(hidden * 2 / 3) + 7) // 8 * 8 == kept


def test_bloom_can_be_looked_at_but_not_cut():
    tree = _mlp("h/0/mlp/dense_h_to_4h", "h/0/mlp/dense_4h_to_h", 32, d=8)
    cfg = {"model_type": "bloom", "hidden_size": 8}
    with pytest.warns(flaxslim.NothingRemovedWarning, match="no channel at 1 site of"):
        assert flaxslim.slim(tree, cfg) == (tree, cfg)
    tree["h/0/mlp/dense_4h_to_h/kernel"][:5] = 0
    p = plan(tree, cfg)
    assert (p.cuts[0].dead, p.removed) == (5, 0)
    assert flatten(flaxslim.apply(p, tree)) == tree
    assert "hard-codes its width" in str(p)
    with pytest.raises(WidthError, match=r"hard-codes its width \(4\*hidden_size = 32\)"):
        flaxslim.slim(tree, cfg)
