"""`flaxslim inspect --discover`: families with a spec of ours and without one, and what fails."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from zoo import _random

import flaxslim
from cli.tiny import DEAD, WIDTH, Result
from flaxslim import Spec
from flaxslim._compat import parameter_shapes, shell
from flaxslim._tree import flatten, replace

GONE = 5
CONV = "params/resnet/encoder/stages/0/layers/0/layer/1/convolution/kernel"
X_LAYER = "params/regnet/encoder/stages/0/layers/0/layer/1/convolution/kernel"


def convolutions(name: str, killed: str, **sizes: Any) -> tuple[Any, Any]:
    """A tiny ResNet or RegNet with random weights and statistics, and some dead channels."""
    import transformers

    cfg = getattr(transformers, f"{name}Config")(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1], num_labels=3, **sizes
    )
    cfg.architectures = [f"{name}ForImageClassification"]
    cls = getattr(transformers, f"Flax{name}ForImageClassification")
    rng = np.random.default_rng(0)
    leaves = {
        path: np.abs(_random(rng, path, leaf)) + 0.5  # a variance is positive
        if path.endswith("/var")
        else _random(rng, path, leaf)
        for path, leaf in flatten(parameter_shapes(cls, cfg)).items()
    }
    leaves[killed][:, :, :GONE] = 0  # (y, x, in, out): nothing reads these
    return unflatten_dict(leaves, sep="/"), cfg


def resnet() -> tuple[Any, Any]:
    return convolutions("ResNet", CONV, layer_type="bottleneck")


@pytest.fixture(scope="module")
def resnets(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("resnets")
    params, cfg = resnet()
    return {
        "flax": flaxslim.save(top / "flax", params, cfg),
        "torch": flaxslim.save(top / "torch", params, cfg, format="torch"),
    }


def _report(run: Any, *arguments: object) -> dict[str, Any]:
    result: Result = run("inspect", *arguments, "--discover", "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def _spec(report: dict[str, Any]) -> Spec:
    """The spec of a report, by its Python; it is the one in the data, too."""
    names: dict[str, Any] = {}
    exec(report["discovered"]["source"], names)
    spec = Spec.from_dict(report["discovered"]["spec"])
    assert names[spec.name] == spec
    return spec


@pytest.mark.parametrize("kind", ["flax", "torch"])
def test_a_family_of_ours_is_found_as_our_spec_says(run, checkpoints, kind):
    report = _report(run, checkpoints[kind])
    known = json.loads(run("inspect", checkpoints[kind], "--json").out)
    assert report["spec"] == "BERT_DISCOVERED"
    for key in ("sites", "widths", "parameters", "bytes", "flops"):
        own, theirs = report[key], known[key]
        if key == "sites":  # the roots are those of another spec
            own = [{**site, "root": ""} for site in own]
            theirs = [
                {**site, "root": "", "second": own[i]["second"]} for i, site in enumerate(theirs)
            ]
        assert own == theirs, key
    assert report["widths"] == {"intermediate_size": [72, WIDTH]}
    assert [site["dead"] for site in report["sites"]] == list(DEAD)
    assert [site["heads"] for site in report["heads"]] == [4, 4]
    assert report["discovered"]["class"] == "FlaxBertForMaskedLM"
    counts = {pair["width"]: pair["count"] for pair in report["discovered"]["pairs"]}
    assert counts == {"intermediate_size": 2, "num_attention_heads": 2}
    picked = [g for g in report["discovered"]["groups"] if g["size"] == 99]
    assert any("picked by an index" in str(group["why"]) for group in picked)


@pytest.mark.parametrize("kind", ["flax", "torch"])
def test_a_family_without_a_spec_of_ours(run, resnets, kind):
    report = _report(run, resnets[kind], "--width", "per_layer")
    assert (report["model_type"], report["naming"]) == ("resnet", kind)
    dead = {site["second"]: site["dead"] for site in report["sites"] if site["dead"]}
    name = CONV if kind == "flax" else CONV.removeprefix("params/").replace("/kernel", "/weight")
    assert dead == {name: GONE}
    before, after = report["parameters"]
    # A column, its norm with its statistics, and a row of each window.
    assert before - after == GONE * (16 + 4 + 9 * 8)
    assert report["flops"] == [None, None]
    assert any("no key of the config says the width" in note for note in report["notes"])


def test_the_spec_that_is_shown_cuts_the_model_exactly(run, resnets):
    params, cfg = flaxslim.load(resnets["flax"])
    spec = _spec(_report(run, resnets["flax"]))
    with pytest.warns(UserWarning, match="the config goes on to say the old size"):
        small, _ = flaxslim.slim(params, cfg, spec, width="per_layer")
    small_leaves, leaves = flatten(small), flatten(params)
    assert small_leaves[CONV].shape[2] == leaves[CONV].shape[2] - GONE
    stats = "batch_stats/resnet/encoder/stages/0/layers/0/layer/0/normalization/mean"
    assert small_leaves[stats].shape == (8 - GONE,)
    # What went was dead: put back with other values, it changes nothing.
    other = {
        CONV.replace("layer/1", "layer/0"): _changed(leaves[CONV.replace("layer/1", "layer/0")])
    }
    model: Any = shell(_class("FlaxResNetForImageClassification"), cfg)
    x = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
    run_model = jax.jit(lambda p: model(x, params=p, train=False).logits)
    with jax.numpy_rank_promotion("allow"):
        one, two = run_model(params), run_model(replace(params, other))
    np.testing.assert_array_equal(one, two)


def _changed(kernel: np.ndarray) -> np.ndarray:
    changed = np.array(kernel)
    changed[..., :GONE] += 1
    return changed


def _class(name: str) -> type:
    import transformers

    return getattr(transformers, name)


def test_convolutions_in_groups(run, tmp_path):
    params, cfg = convolutions("RegNet", X_LAYER, groups_width=8)
    report = _report(run, flaxslim.save(tmp_path / "regnet", params, cfg), "--heads")
    assert report["spec"] == "REGNET_DISCOVERED"
    assert report["heads"]
    assert any(pair["width"] == "embedding_size" for pair in report["discovered"]["pairs"])


def test_what_is_printed(run, resnets):
    result = run("inspect", resnets["flax"], "--discover", "--width", "per_layer")
    assert result.code == 0
    assert not result.err.strip()
    assert "FlaxResNetForImageClassification, traced on shapes: " in result.out
    assert "kinds of pairs that can be cut exactly" in result.out
    assert '0/convolution "x y d f" -> 1/convolution "x y f d", 8 or 16 channels' in result.out
    # The reason, with the line of the stock class.
    assert "it is the window of a convolution (conv_general_dilated at resnet/model" in result.out
    assert "RESNET_DISCOVERED = Spec(\n" in result.out
    rows = [line.replace("│", " ").split() for line in result.out.splitlines()]
    assert [CONV, "8", str(GONE), str(8 - GONE), str(GONE * 92)] in rows
    assert "FFN" not in result.out


def test_the_python_is_whole_on_a_narrow_screen(run, monkeypatch, resnets):
    from flaxslim.cli._console import console

    monkeypatch.setattr(console, "width", 60)
    text = run("inspect", resnets["flax"], "--discover").out
    start = text.index("from flaxslim import")
    names: dict[str, Any] = {}
    exec(text[start : text.index("\n)\n", start) + 3], names)
    assert isinstance(names["RESNET_DISCOVERED"], Spec)


def test_without_discover_the_mend_names_it(run, resnets):
    result = run("inspect", resnets["flax"])
    assert result.code == 1
    assert "no spec for model_type 'resnet'" in result.err
    assert "--discover" in result.err
    assert "flaxslim.discover" in result.err


# --- what fails -------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path):
    def make(**values: Any) -> Path:
        folder = flaxslim.save(tmp_path / "edited", *resnet())
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "convnext"}, ("no Flax class to trace", "'convnext'", "flaxslim.discover")),
        ({"model_type": "resnett"}, ("no Flax class to trace", "nearest:  resnet")),
        ({"model_type": None}, ("no Flax class to trace", "no model_type")),
        ({"hidden_act": "nope"}, ("cannot be built from this config", "nope")),
        ({"depths": [2, 3]}, ("not those of its Flax class", "stages/1/layers", "half a pair")),
        ({"hidden_sizes": [32, 48]}, ("config contradicts the tensors", "(12,)", "(16,)")),
    ],
)
def test_a_class_that_cannot_be_found_or_built(run, edited, change, words):
    if change.get("model_type", "") != "":
        change = {**change, "architectures": None}
    result = run("inspect", edited(**change), "--discover")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert "mend:" in result.err
    for word in words:
        assert word in result.err


def test_a_class_that_cannot_be_traced(run, resnets, monkeypatch):
    from flaxslim.cli import _discover

    monkeypatch.setattr(_discover, "inputs_for", lambda cls, cfg: {"pixel_values": np.ones(3)})
    result = run("inspect", resnets["flax"], "--discover")
    assert result.code == 1
    assert "the function cannot be traced" in result.err
    assert "Traceback" not in result.err


def test_help_teaches_it(run):
    text = " ".join(run("inspect", "--help").out.replace("│", " ").split())
    assert "--discover" in text
    assert "find the prunable pairs in what the Flax class of the config computes" in text


# --- real checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("sentence-encoder", {"intermediate_size": (6, [1536]), "num_attention_heads": (6, [12])}),
        ("stories260K", {"intermediate_size": (5, [172]), "num_attention_heads": (5, [4])}),
    ],
)
def test_on_a_real_checkpoint(run, data, name, pairs):
    report = _report(run, data / name)
    found = {p["width"]: (p["count"], p["sizes"]) for p in report["discovered"]["pairs"]}
    assert found == pairs
    known = json.loads(run("inspect", data / name, "--json").out)
    assert report["widths"] == known["widths"]
    assert [s["channels"] for s in report["sites"]] == [s["channels"] for s in known["sites"]]
