"""`--width per_layer --heads`: each layer its own size, shown, cut, proven, and loaded again."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flaxslim
from cli.tiny import DEAD, tiny
from flaxslim import Proof
from flaxslim._tree import flatten, replace
from flaxslim.checkpoint import read
from flaxslim.cli import NOT_PROVEN, NOTHING_DEAD, main
from flaxslim.specs import spec_for

CUT = ("--width", "per_layer", "--heads")
WIDTHS = [72 - dead for dead in DEAD]
HEADS_LEFT = [(0, 2, 3), ()]
ROOTS = ["bert/encoder/layer/0", "bert/encoder/layer/1"]
# A column of the first kernel, its bias, and a row of the second; and a head's share of four.
PER_CHANNEL, PER_HEAD = 32 + 1 + 32, 3 * (32 + 1) * 8 + 8 * 32


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> dict[str, Path]:
    """The BERT of the other tests with dead heads too, as Flax msgpack and with PyTorch names."""
    params, cfg = tiny("FlaxBertForMaskedLM", DEAD)
    leaves, new = flatten(params), {}
    for site, left in zip(spec_for(cfg, "heads").sites(params, cfg), HEADS_LEFT, strict=True):
        dead = np.setdiff1d(range(4), left)
        new[site.second.path] = site.second.axes.zero(leaves[site.second.path], "h", dead)
    params, top = replace(params, new), tmp_path_factory.mktemp("pruned")
    folders = {
        "flax": flaxslim.save(top / "flax", params, cfg),
        "torch": flaxslim.save(top / "torch", params, cfg, format="torch"),
    }
    for folder in folders.values():
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny BERT\n\nOf no use.\n")
    return folders


@pytest.fixture(scope="module")
def slimmed(pruned, tmp_path_factory) -> dict[str, Path]:
    """What the command makes of them."""
    top = tmp_path_factory.mktemp("slimmed")
    for kind, folder in pruned.items():
        assert main(["slim", str(folder), str(top / kind), *CUT, "--no-verify"]) == 0
    return {kind: top / kind for kind in pruned}


@pytest.fixture(params=["flax", "torch"])
def kind(request) -> str:
    return request.param


def _logits(model: Any, params: Any) -> np.ndarray:
    import jax

    ids = np.arange(24).reshape(2, 12)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda p: model(ids, params=p).logits)(params))


@pytest.fixture(scope="module")
def expected(pruned) -> np.ndarray:
    """By the stock class, from files that were pruned."""
    from transformers import FlaxBertForMaskedLM

    loaded: Any = FlaxBertForMaskedLM.from_pretrained(pruned["flax"], _do_init=False)
    return _logits(*loaded)


def _sizes(folder: Path, axis: str) -> list[int]:
    checkpoint = read(folder)
    spec = spec_for(checkpoint.config, "all")
    spec = spec.torch() if checkpoint.naming == "torch" else spec
    sites = spec.sites(checkpoint.params, checkpoint.config)
    return [site.size for site in sites if site.pair.axis == axis]


def _rows(text: str) -> list[list[str]]:
    return [line.replace("│", " ").split() for line in text.splitlines()]


# --- slim and verify --------------------------------------------------------------------------


def test_each_layer_is_cut_to_what_lives_and_proven(run, pruned, tmp_path):
    out = tmp_path / "out"
    result = run("slim", pruned["flax"], out, *CUT)
    assert result.code == 0, result.err
    assert f"intermediate_size: 72 -> {min(WIDTHS)} to {max(WIDTHS)}" in result.out
    assert "num_attention_heads: 4 -> 0 to 3 heads" in result.out
    assert "5 heads and 72 channels go" in result.out
    assert "equal to rounding" in result.out
    assert "control: cutting one wrong channel" in result.out
    assert _sizes(out, "f") == WIDTHS
    assert _sizes(out, "h") == [len(left) for left in HEADS_LEFT]
    record = json.loads((out / "flaxslim.json").read_text())
    assert record["exact"] is True
    proof = Proof.from_dict(record["proof"])
    assert proof.ok
    assert proof.control is not None
    # A wrong cut was seen wherever something lives: of heads too.
    assert len(proof.control.rows) == 3
    assert all(row.seen for row in proof.control.rows)


def test_the_code_on_the_card_loads_what_was_pruned(slimmed, expected):
    card = (slimmed["torch"] / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Tiny BERT\n\nOf no use.\n")
    assert "5 attention heads and 72 FFN channels" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)  # torch cannot run fewer heads
    names: dict[str, Any] = {}
    exec(code.replace("this/folder", str(slimmed["torch"])), names)
    model = names["model"]
    assert type(model) is names["FlaxBertForMaskedLM"]
    logits = _logits(model, model.params)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_card_says_more_where_torch_can_run_it_and_nothing_where_any_class_can(
    run, pruned, tmp_path
):
    cards = {}
    for name, options in {"channels": CUT[:2], "uniform": ()}.items():
        out = tmp_path / name
        assert run("slim", pruned["torch"], out, *options, "--no-verify").code == 0
        cards[name] = (out / "README.md").read_text()
    assert "flaxslim.from_pretrained(FlaxBertForMaskedLM," in cards["channels"]
    assert "load_per_layer(BertForMaskedLM," in cards["channels"]
    assert "What flaxslim cut" in cards["uniform"]
    assert "How to load" not in cards["uniform"]


def test_verify_sees_that_they_are_equal_across_formats(run, pruned, slimmed):
    result = run("verify", pruned["torch"], slimmed["flax"])
    assert result.code == 0, result.out
    for root in (*ROOTS, f"{ROOTS[0]}/attention"):
        assert f"{root}/output/dense/kernel" in result.out  # where the control cut a wrong one


def test_verify_sees_a_head_that_should_not_have_gone(run, pruned, slimmed, tmp_path):
    before = read(slimmed["flax"])
    site = spec_for(before.config, "heads").sites(before.params, before.config)[0]
    second = site.second.axes.zero(flatten(before.params)[site.second.path], "h", np.array([1]))
    wrong = replace(before.params, {site.second.path: second})
    folder = flaxslim.save(tmp_path / "wrong", wrong, before.config, like=before)
    # Slimmed again, so that it is no longer there; the layer without any head stays as it is.
    out = tmp_path / "out"
    assert run("slim", folder, out, *CUT, "--no-verify").code == 0
    assert _sizes(out, "h") == [2, 0]
    result = run("verify", pruned["flax"], out)
    assert result.code == NOT_PROVEN
    assert "differs by" in result.out


@pytest.mark.parametrize("options", [CUT, (), ("--heads",)], ids=" ".join)
def test_slimming_again_finds_nothing_more(run, slimmed, tmp_path, kind, options):
    result = run("slim", slimmed[kind], tmp_path / "out", *options)
    assert result.code == NOTHING_DEAD, result.err
    assert "Nothing was written: no channel at" in result.err
    assert "is dead" in result.err
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_it_and_writes_nothing(run, pruned, tmp_path):
    result = run("slim", pruned["flax"], tmp_path / "out", *CUT, "--dry-run")
    assert result.code == 0
    assert ["bert/encoder/layer/1/attention", "4", "4", "0", "(i)", "4"] in _rows(result.out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "channels", "heads"),
    [
        (("--multiple-of", 12), [36, 48], [3, 0]),
        (("--heads-multiple-of", 2), WIDTHS, [4, 0]),
        (("--multiple-of", 12, "--heads-multiple-of", 4), [36, 48], [4, 0]),
    ],
)
def test_multiples_hold_for_each_layer_and_heads_have_their_own(
    run, pruned, tmp_path, options, channels, heads
):
    out = tmp_path / "out"
    assert run("slim", pruned["flax"], out, *CUT, "--no-verify", *options).code == 0
    assert _sizes(out, "f") == channels
    assert _sizes(out, "h") == heads


def test_heads_alone_cannot_go_from_a_class_that_ties_them_to_its_hidden_size(
    run, pruned, tmp_path
):
    out = tmp_path / "out"
    result = run("slim", pruned["flax"], out, "--heads", "--no-verify")
    assert result.code == 0
    assert "ties its heads to its hidden size" in result.out
    assert "per_layer" in result.out
    assert _sizes(out, "h") == [4, 4]
    assert _sizes(out, "f") == [max(WIDTHS)] * 2
    # Now there is nothing else that could go.
    again = run("slim", out, tmp_path / "again", "--heads", "--no-verify")
    assert again.code == 1
    assert "per_layer" in again.err
    assert not (tmp_path / "again").exists()


# --- inspect ----------------------------------------------------------------------------------


def test_json_has_the_numbers_of_each_layer(run, pruned, slimmed, kind):
    result = run("inspect", pruned[kind], *CUT, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["widths"] == {
        "intermediate_size": [72, [min(WIDTHS), max(WIDTHS)]],
        "num_attention_heads": [4, [0, 3]],
    }
    for layer, heads in enumerate(report["heads"]):
        left = len(HEADS_LEFT[layer])
        assert heads == {
            "root": f"{ROOTS[layer]}/attention",
            "heads": 4,
            "dead": 4 - left,
            "kept": left,
            "rules": {"i": 4 - left},
            "parameters": (4 - left) * PER_HEAD,
        }
    assert [site["kept"] for site in report["sites"]] == WIDTHS
    assert [site["parameters"] for site in report["sites"]] == [d * PER_CHANNEL for d in DEAD]
    counts = [
        sum(np.size(leaf) for leaf in flatten(read(folder[kind]).params).values())
        for folder in (pruned, slimmed)
    ]
    assert report["parameters"] == counts
    assert report["bytes"] == [4 * count for count in counts]
    assert report["flops"][1] < report["flops"][0]


def test_heads_are_shown_in_a_table_of_their_own(run, pruned):
    rows = _rows(run("inspect", pruned["flax"], *CUT).out)
    for layer, left in enumerate(HEADS_LEFT):
        gone = f"{(4 - len(left)) * PER_HEAD:,}"
        row = [f"{ROOTS[layer]}/attention", "4", str(4 - len(left)), str(len(left)), gone]
        assert row in rows
        gone = f"{DEAD[layer] * PER_CHANNEL:,}"
        assert [ROOTS[layer], "72", str(DEAD[layer]), str(WIDTHS[layer]), gone] in rows
    assert ["num_attention_heads", "4", "0", "to", "3"] in rows


def test_heads_that_were_not_asked_for_are_counted_all_the_same(run, pruned):
    result = run("inspect", pruned["flax"])
    rows = _rows(result.out)
    for layer, left in enumerate(HEADS_LEFT):
        assert [f"{ROOTS[layer]}/attention", "4", str(4 - len(left))] in rows
    note = "note: 5 heads are dead; --heads --width per_layer cuts them"
    assert note in result.out
    planned = ["slim", pruned["flax"], "out", "--dry-run"]
    assert note in run(*planned).out
    assert "are dead" not in run(*planned, *CUT).out
    report = json.loads(run("inspect", pruned["flax"], "--json").out)
    assert [heads["dead"] for heads in report["heads"]] == [1, 4]
    assert "num_attention_heads" not in report["widths"]
    asked = json.loads(run("inspect", pruned["flax"], *CUT, "--json").out)
    assert asked["parameters"][1] < report["parameters"][1]


def test_what_was_slimmed_has_nothing_dead(run, slimmed, kind):
    report = json.loads(run("inspect", slimmed[kind], *CUT, "--json").out)
    assert [site["channels"] for site in report["sites"]] == WIDTHS
    assert [site["heads"] for site in report["heads"]] == [3, 0]
    assert not any(site["dead"] for site in (*report["sites"], *report["heads"]))
    assert report["parameters"][0] == report["parameters"][1]
    assert report["flops"][0] == report["flops"][1] > 0
    shown = run("inspect", slimmed[kind])
    assert shown.code == 0
    assert "nothing would be removed" in shown.out
    assert "heads are dead" not in shown.out


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["per-layer", "narrow", ""])
@pytest.mark.parametrize("command", ["inspect", "slim"])
def test_a_width_that_is_none_is_refused_with_those_that_are(run, tmp_path, command, width):
    arguments = ("a", tmp_path / "out") if command == "slim" else ("a",)
    result = run(command, *arguments, "--width", width)
    assert result.code == 2
    assert "'uniform'" in result.err
    assert "'per_layer'" in result.err
    assert not result.out
    assert not list(tmp_path.iterdir())
