"""What goes wrong is said in one message that names the mend: no traceback, nothing written."""

import json
import re

import numpy as np
import pytest

import flaxslim
from cli.tiny import Result, tiny
from flaxslim._tree import flatten, replace
from flaxslim.cli import INTERRUPTED, _slim


@pytest.fixture
def broken(tmp_path):
    """A checkpoint of its own to break, with Flax names or PyTorch's."""

    def make(format: str = "flax", name: str = "FlaxBertForMaskedLM", dead=(40, 32), **change):
        params, cfg = tiny(name, dead)
        leaves = flatten(params)
        params = replace(params, {path: new(leaves[path]) for path, new in change.items()})
        return flaxslim.save(tmp_path / "broken", params, cfg, format=format)

    return make


def _assert_explained(result: Result, *words: str, code: int = 1) -> None:
    assert result.code == code
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


def _edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unknown_family(run, broken, tmp_path):
    folder = broken()
    _edit(folder / "config.json", model_type="bertt")
    result = run("slim", folder, tmp_path / "out")
    _assert_explained(result, "no spec for model_type 'bertt'", "nearest:  bert", "mend:")
    assert "flaxslim families" in result.err
    assert "Spec(" in result.err
    assert not (tmp_path / "out").exists()


def test_no_model_type(run, broken, tmp_path):
    folder = broken()
    (folder / "config.json").write_text('{"hidden_size": 32}')
    _assert_explained(run("inspect", folder), "the config has no model_type", "mend:")


def test_no_config(run, broken, tmp_path):
    folder = broken()
    (folder / "config.json").unlink()
    for command in (("inspect", folder), ("slim", folder, tmp_path / "out")):
        _assert_explained(run(*command), "the folder has no config.json", "mend:", str(folder))


def test_config_is_not_json(run, broken):
    folder = broken()
    (folder / "config.json").write_text('{"model_type": ')
    _assert_explained(run("inspect", folder), "not JSON", "config.json", "mend:")


def test_no_weights(run, broken):
    folder = broken()
    (folder / "flax_model.msgpack").unlink()
    _assert_explained(run("inspect", folder), "no weights", "model.safetensors", "mend:")


@pytest.mark.parametrize(
    ("format", "name"), [("flax", "flax_model.msgpack"), ("torch", "model.safetensors")]
)
def test_truncated_weights(run, broken, tmp_path, format, name):
    folder = broken(format)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    result = run("slim", folder, tmp_path / "out")
    _assert_explained(result, name, "mend:")
    assert not (tmp_path / "out").exists()


def test_no_such_folder(run, tmp_path):
    (tmp_path / "model-1").mkdir()
    result = run("inspect", tmp_path / "model-l")
    _assert_explained(result, "there is no such folder", "nearest:  model-1", "mend:")


def test_config_contradicts_tensors(run, broken):
    folder = broken()
    _edit(folder / "config.json", intermediate_size=64)
    _assert_explained(run("inspect", folder), "contradicts the tensors", "72", "64", "mend:")


def test_nan(run, broken, tmp_path):
    nan = {"bert/encoder/layer/0/output/dense/kernel": lambda x: np.where(x == 0, np.nan, x)}
    result = run("slim", broken(**nan), tmp_path / "out")
    _assert_explained(result, "bert/encoder/layer/0/output/dense/kernel")
    assert not (tmp_path / "out").exists()


def test_half_a_pair(run, broken):
    """Message of the spec, in the names that the file has."""
    from safetensors.numpy import load_file, save_file

    folder = broken("torch")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _assert_explained(run("inspect", folder), "half a pair", "layer/1/output/dense/weight")


@pytest.mark.parametrize("option", [("--threshold", "1.5"), ("--multiple-of", "0")])
def test_values_out_of_range(run, broken, tmp_path, option):
    result = run("slim", broken(), tmp_path / "out", *option)
    _assert_explained(result, option[0].strip("-").replace("-", "_"))
    assert not (tmp_path / "out").exists()


def test_bloom_is_refused(run, broken, tmp_path):
    folder = broken("flax", "FlaxBloomForCausalLM", (40, 30))
    result = run("slim", folder, tmp_path / "out")
    _assert_explained(result, "hard-codes its width", "mend:")
    assert re.search(r"mend: +pass --width per_layer", result.err)
    assert 'width="' not in result.out + result.err
    assert not (tmp_path / "out").exists()


def test_target_is_a_file(run, broken, tmp_path):
    (tmp_path / "out").write_text("mine")
    _assert_explained(run("slim", broken(), tmp_path / "out"), "the target is a file", "mend:")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "mish"}, "mish"),
        ({"num_attention_heads": 3}, "cannot be built from this config"),
        ({"hidden_size": None}, ""),
    ],
)
def test_config_from_which_no_class_is_built(run, broken, tmp_path, change, words):
    folder = broken()
    _edit(folder / "config.json", **change)
    _assert_explained(run("slim", folder, tmp_path / "out"), words, "mend:")
    assert run("inspect", folder).code in (0, 1)  # no FLOPs then, but the channels are counted
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["flax", "torch"])
def test_config_says_more_layers_than_there_are(run, broken, tmp_path, format):
    folder = broken(format)
    _edit(folder / "config.json", num_hidden_layers=4)
    result = run("slim", folder, tmp_path / "out")
    _assert_explained(
        result,
        "the config says 32 tensors that the checkpoint lacks, among them FFN layers "
        "(bert/encoder/layer/2, bert/encoder/layer/3)",
        "at:       bert/encoder/layer/2/attention/",
        "config.json",
    )
    assert "model=" not in result.err
    assert not (tmp_path / "out").exists()


def test_unexpected_error_is_one_line(run, broken, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("[red]of[/] mine")

    monkeypatch.setattr(_slim, "prove_checkpoints", fail)
    monkeypatch.delenv("FLAXSLIM_TRACEBACK", raising=False)
    folder = broken()
    result = run("slim", folder, tmp_path / "out")
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        "unexpected error: ZeroDivisionError: [red]of[/] mine; please report it; the traceback "
        "follows with FLAXSLIM_TRACEBACK=1"
    )
    assert "Traceback" not in result.err
    monkeypatch.setenv("FLAXSLIM_TRACEBACK", "1")
    shown = run("slim", folder, tmp_path / "out")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert "in fail" in shown.err
    assert not (tmp_path / "out").exists()


def test_ctrl_c(run, broken, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_slim, "prove_checkpoints", interrupt)
    result = run("slim", broken(), tmp_path / "out")
    assert result.code == INTERRUPTED == 130
    assert "nothing half-written is left" in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_paths_are_not_turned_into_flags(run, tmp_path):
    result = run("inspect", tmp_path / "keep=0.7")
    _assert_explained(result, f"{tmp_path}/keep=0.7\n")


def test_message_may_hold_square_brackets(run, tmp_path):
    """They are no markup: the path is shown as it is."""
    result = run("inspect", tmp_path / "[bold]x[/]")
    _assert_explained(result, "[bold]x[/]")
