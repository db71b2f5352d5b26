"""`flaxslim prune` of a PyTorch-named LLaMA whose head is the embedding, which is stored once."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flaxslim
from cli.tiny import tiny
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.posttraining import _prune
from flaxslim.posttraining._tune import Tune

ASKED = 19_000  # of 25,344 that are stored, and 28,512 with the head counted for itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The head is not in the files."""
    params, cfg = tiny("FlaxLlamaForCausalLM")
    params["lm_head"]["kernel"] = params["model"]["embed_tokens"]["embedding"].T
    cfg.tie_word_embeddings = True
    source = flaxslim.save(tmp_path_factory.mktemp("tied") / "llama", params, cfg, format="torch")
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, {"format": "pt"})
    return source


def _prune_command(folder: Path, out: Path, *more: object) -> list[Any]:
    ids = np.random.default_rng(0).integers(3, 90, (16, 12))
    data = out.parent / "ids.npz"
    np.savez(data, input_ids=ids, attention_mask=np.ones_like(ids))
    return ["prune", folder, out, "--calibration", data, "--samples", 16, "--batch-size", 4, *more]


def _stored(folder: Path) -> int:
    return sum(x.size for x in flatten(read(folder).params).values())


def test_it_is_tuned_counted_once_and_stays_tied(run, folder, tmp_path, monkeypatch):
    brief = flaxslim.Method(tune=Tune(steps=4, every=1, learning_rate=1e-3))
    monkeypatch.setitem(_prune.PRESETS, "best", brief)
    out = tmp_path / "out"
    result = run(*_prune_command(folder, out, "--preset", "best", "--max-params", ASKED))
    assert result.code == 0, result.err
    assert "tuned for 0 steps" not in result.out
    said = re.search(r"parameters +│ +([\d,]+) │ +([\d,]+)", result.out)
    assert said is not None, result.out
    assert [int(n.replace(",", "")) for n in said.groups()] == [_stored(folder), _stored(out)]
    assert 0.97 * ASKED < _stored(out) <= ASKED
    assert not any("lm_head" in name for name in flatten(read(out).params))


@pytest.mark.parametrize("unit", ["bytes", "params"])
def test_a_second_copy_in_the_files_counts(run, folder, tmp_path, unit):
    source, out = tmp_path / "twice", tmp_path / "out"
    shutil.copytree(folder, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.copy.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    asked = ASKED + tensors["model.copy.weight"].size
    asked *= 4 if unit == "bytes" else 1
    result = run(*_prune_command(source, out, "--preset", "fast", f"--max-{unit}", asked))
    assert result.code == 0, result.err
    written = load_file(out / "model.safetensors")
    assert "model.copy.weight" in written
    stored = sum(x.nbytes if unit == "bytes" else x.size for x in written.values())
    assert 0.97 * asked < stored <= asked
    assert "of tied tensors again" in result.out
    report = json.loads((out / "flaxslim.json").read_text())["prune"]["report"]
    assert report["cost"]["predicted"] == stored


def test_a_head_of_its_own_is_refused_before_anything_is_done(run, folder, tmp_path):
    source = tmp_path / "odd"
    shutil.copytree(folder, source)
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    head = np.ones_like(tensors["model.embed_tokens.weight"])
    save_file({**tensors, "lm_head.weight": head}, weights, {"format": "pt"})
    result = run(*_prune_command(source, tmp_path / "out", "--keep", 0.5))
    assert result.code == 1
    assert "the config ties the head to the embedding" in result.err
    assert "ranking" not in result.err
