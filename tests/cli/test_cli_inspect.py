"""`flaxslim inspect`: the right numbers, as a table and as JSON, and nothing written."""

import json

import numpy as np
import pytest

import flaxslim
from cli.tiny import DEAD, WIDTH, tiny
from flaxslim._tree import flatten


def _count(params):
    return sum(np.size(leaf) for leaf in flatten(params).values())


@pytest.mark.parametrize("kind", ["flax", "torch"])
def test_json_has_the_right_numbers(run, checkpoints, kind):
    result = run("inspect", checkpoints[kind], "--json")
    assert result.code == 0
    report = json.loads(result.out)

    params, cfg = flaxslim.load(checkpoints[kind])
    slimmed, _ = flaxslim.slim(params, cfg)
    per_channel = 32 + 1 + 32  # a column, its bias, a row
    assert report["model_type"] == "bert"
    assert (report["naming"], report["spec"], report["exact"]) == (kind, "BERT_FFN", True)
    assert report["widths"] == {"intermediate_size": [72, WIDTH]}
    assert [site["dead"] for site in report["sites"]] == list(DEAD)
    for site in report["sites"]:
        assert (site["channels"], site["kept"]) == (72, WIDTH)
        assert site["rules"] == {"i": site["dead"]}
        assert site["parameters"] == (72 - WIDTH) * per_channel
    assert report["parameters"] == [_count(params), _count(slimmed)]
    assert report["bytes"] == [4 * n for n in report["parameters"]]
    before, after = report["flops"]
    assert 0 < after < before


def test_table(run, flax_folder):
    result = run("inspect", flax_folder)
    assert result.code == 0
    assert "bert, flax_model.msgpack" in result.out
    rows = [line.replace("│", " ").split() for line in result.out.splitlines()]
    for layer, dead in enumerate(DEAD):
        gone = f"{(72 - WIDTH) * 65:,}"
        assert [f"bert/encoder/layer/{layer}", "72", str(dead), str(WIDTH), gone] in rows
    assert ["intermediate_size", "72", str(WIDTH), f"{72 / WIDTH:.2f}x"] in rows
    assert "FLOPs" in result.out
    assert not result.err.strip()


def test_table_cuts_nothing_off_on_a_narrow_screen(run, monkeypatch, tmp_path):
    from flaxslim.cli._console import console

    folder = flaxslim.save(tmp_path / "clip", *tiny("FlaxCLIPModel"))
    monkeypatch.setattr(console, "width", 60)
    result = run("inspect", folder)
    assert "…" not in result.out
    first_cells = "".join(
        line.split("│")[1].strip() for line in result.out.splitlines() if "│" in line
    )
    assert "vision_model/encoder/layers/1/mlp" in first_cells


def test_nothing_dead_is_said(run, living_folder):
    result = run("inspect", living_folder)
    assert result.code == 0
    assert "nothing would be removed" in result.out


def test_multiple_of_and_threshold(run, living_folder):
    report = json.loads(run("inspect", living_folder, "--json", "--threshold", "0.9").out)
    assert not report["exact"]
    width = report["widths"]["intermediate_size"][1]
    assert width < 72
    wide = json.loads(
        run("inspect", living_folder, "--json", "--threshold", "0.9", "--multiple-of", "5").out
    )
    assert wide["widths"]["intermediate_size"][1] == -(-width // 5) * 5


@pytest.mark.parametrize(
    ("change", "words"),
    [("missing", "half a pair"), ("nan", "NaN")],
)
def test_what_is_wrong_with_heads_spares_those_who_did_not_ask(run, tmp_path, change, words):
    params, cfg = tiny("FlaxBertForMaskedLM", DEAD)
    query = params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    if change == "nan":
        query["kernel"] = np.full_like(query["kernel"], np.nan)
    else:
        del query["kernel"]
    folder = flaxslim.save(tmp_path / "broken", params, cfg)
    report = json.loads(run("inspect", folder, "--json").out)
    assert report["heads"] == []
    assert [site["dead"] for site in report["sites"]] == list(DEAD)
    (note,) = (note for note in report["notes"] if note.startswith("heads are not shown"))
    assert words in note
    assert "layer/0/attention/self/query/kernel" in note
    table = run("inspect", folder)
    assert table.code == 0
    out = "".join(table.out.split())
    assert "".join(note.split()) in out
    assert "heads┃dead" not in out
    assert run("slim", folder, tmp_path / "out", "--dry-run").code == 0
    assert run("inspect", folder, "--heads").code == 1


def test_bloom_is_shown_with_the_reason_why_nothing_goes(run, tmp_path):
    folder = flaxslim.save(tmp_path / "bloom", *tiny("FlaxBloomForCausalLM", (40, 30)))
    result = run("inspect", folder)
    assert result.code == 0
    assert "hard-codes its width" in result.out
    report = json.loads(run("inspect", folder, "--json").out)
    assert [site["dead"] for site in report["sites"]] == [40, 30]
    assert report["parameters"][0] == report["parameters"][1]
    (note,) = (note for note in report["notes"] if "hard-codes its width" in note)
    assert "--width per_layer" in note
