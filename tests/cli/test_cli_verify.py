"""`flaxslim verify`: the proof from disk, and the exit code that says how it went."""

import json

import numpy as np
import pytest

import flaxslim
from cli.tiny import DEAD, tiny
from flaxslim import Proof
from flaxslim._tree import flatten, replace
from flaxslim.cli import NOT_PROVEN


@pytest.fixture(scope="module")
def slimmed(checkpoints, tmp_path_factory):
    params, cfg = flaxslim.slim(*flaxslim.load(checkpoints["flax"]))
    return flaxslim.save(tmp_path_factory.mktemp("slimmed") / "out", params, cfg)


def test_equal(run, checkpoints, slimmed):
    # Across formats: one has PyTorch names, the other is Flax msgpack.
    result = run("verify", checkpoints["torch"], slimmed)
    assert result.code == 0, result.out
    assert "control" in result.out


def test_a_revision_is_of_the_first(run, flax_folder, slimmed):
    result = run("verify", flax_folder, slimmed, "--revision", "v1")
    assert result.code == 1
    assert "has no revisions" in result.err
    assert str(flax_folder) in result.err


def test_not_equal(run, living_folder, slimmed):
    result = run("verify", living_folder, slimmed)
    assert result.code == NOT_PROVEN
    assert "differs by" in result.out
    assert "Traceback" not in result.err


def test_the_record_waives_nothing(run, flax_folder, tmp_path):
    """All weights at zero, beside a record that says the cut was approximate."""
    params, cfg = flaxslim.slim(*flaxslim.load(flax_folder))
    zeros = replace(params, {path: 0 * leaf for path, leaf in flatten(params).items()})
    out = flaxslim.save(tmp_path / "out", zeros, cfg, record={"exact": False})
    result = run("verify", flax_folder, out)
    assert result.code == NOT_PROVEN
    assert "NOT PROVED" in result.out
    assert "--approximate only measures it" in result.err
    (out / "flaxslim.json").write_text("{")
    broken = run("verify", flax_folder, out)
    assert broken.code == NOT_PROVEN
    assert "--approximate" not in broken.err


def test_exact_cuts_are_not_pointed_at_the_flag(run, living_folder, slimmed):
    assert "--approximate" not in run("verify", living_folder, slimmed).err


def test_two_families(run, flax_folder, tmp_path):
    other = flaxslim.save(tmp_path / "gpt2", *tiny("FlaxGPT2LMHeadModel-inner"))
    result = run("verify", flax_folder, other)
    assert result.code == 1
    assert "different families" in result.err
    assert "'bert' before and 'gpt2' after" in result.err
    assert "Traceback" not in result.err


def test_json(run, flax_folder, tmp_path):
    params, cfg = tiny("FlaxBertForMaskedLM", DEAD)
    path = "bert/encoder/layer/1/output/dense/bias"
    # Of one feature only: a shift of all would be lost in the LayerNorm that follows.
    other = replace(params, {path: flatten(params)[path] + np.eye(1, 32, dtype=np.float32)[0]})
    folder = flaxslim.save(tmp_path / "other", other, cfg)
    result = run("verify", flax_folder, folder, "--json")
    assert result.code == NOT_PROVEN
    data = json.loads(result.out)
    assert data["ok"] is False
    assert data["reasons"]
    assert not Proof.from_json(result.out).ok


@pytest.fixture
def copied(flax_folder, tmp_path):
    """A slimmed folder that may be changed, as (folder, params, config)."""
    params, cfg = flaxslim.slim(*flaxslim.load(flax_folder))
    return flaxslim.save(tmp_path / "out", params, cfg), params, cfg


def test_another_config_is_seen_layer_by_layer_too(run, flax_folder, copied):
    out, _, _ = copied
    assert run("verify", flax_folder, out, "--by-layer").code == 0
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "layer_norm_eps": 0.5}))
    both = run("verify", flax_folder, out, "--by-layer", "--whole")
    assert "exclude each other" in both.err
    assert both.code == 1
    result = run("verify", flax_folder, out, "--by-layer")
    assert result.code == NOT_PROVEN
    assert "layer_norm_eps" in result.out


def test_what_the_inputs_may_not_reach_is_compared_too(run, flax_folder, copied):
    """A row of the embedding that no token of the proof needs."""
    out, params, cfg = copied
    path = next(p for p in flatten(params) if "position_embeddings" in p)
    rows = np.array(flatten(params)[path])
    rows[-1] = 9
    flaxslim.save(out, replace(params, {path: rows}), cfg, overwrite=True)
    result = run("verify", flax_folder, out, "--whole")
    assert result.code == NOT_PROVEN
    assert "position_embeddings" in result.out
