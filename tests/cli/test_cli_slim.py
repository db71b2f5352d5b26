"""`flaxslim slim`: a smaller checkpoint that the stock classes load, or nothing at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flaxslim
from cli.tiny import DEAD, WIDTH, tiny
from flaxslim import Plan, Proof
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.cli import NOT_PROVEN, NOTHING_DEAD, _slim

WEIGHTS = {"flax": "flax_model.msgpack", "torch": "model.safetensors"}
SIDE = {"README.md", "config.json", "flaxslim.json", "vocab.txt"}


def _record(folder: Path):
    return json.loads((folder / "flaxslim.json").read_text())


def _logits(folder: Path, **how):
    """By the stock Flax class, from the files alone."""
    import jax
    from transformers import FlaxBertForMaskedLM

    model: Any = FlaxBertForMaskedLM.from_pretrained(folder, **how)
    ids = np.arange(24).reshape(2, 12)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p, ids: model(ids, params=p).logits)(model.params, ids)
    return np.asarray(logits), model.config.intermediate_size


def _torch_logits(folder: Path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from transformers import BertForMaskedLM

    loaded: Any = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    model, found = loaded
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    assert all("decoder" in name for name in found["missing_keys"])  # tied to the embedding
    with torch.no_grad():
        logits = model.eval()(torch.arange(24).reshape(2, 12)).logits
    return logits.numpy(), model.config.intermediate_size


def _assert_same_function(before, after):
    (old, old_width), (new, new_width) = before, after
    assert (old_width, new_width) == (72, WIDTH)
    assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max()


@pytest.fixture(params=["flax", "torch"])
def kind(request):
    return request.param


def test_end_to_end(run, checkpoints, tmp_path, kind):
    source, out = checkpoints[kind], tmp_path / "smaller"
    result = run("slim", source, out)
    assert result.code == 0, result.err
    assert f"intermediate_size: 72 -> {WIDTH} channels" in result.out
    assert "equal to rounding" in result.out
    assert "control: cutting one wrong channel" in result.out
    assert f"written to {out}" in result.err

    assert {path.name for path in out.iterdir()} == {WEIGHTS[kind], *SIDE}
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == WIDTH
    assert (out / "vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith((source / "README.md").read_text())
    assert "## What flaxslim cut" in card
    assert f"intermediate_size: 72 to {WIDTH}" in card
    assert "the function is the same" in card

    # The record is enough to do it again, and to judge it.
    record = _record(out)
    assert record["flaxslim"] == flaxslim.__version__
    assert record["exact"] is True
    assert Proof.from_dict(record["proof"]).ok
    again = flatten(flaxslim.apply(Plan.from_dict(record["plan"]), read(source).params))
    for path, leaf in flatten(read(out).params).items():
        np.testing.assert_array_equal(leaf, again[path], path)

    how = {"from_pt": True} if kind == "torch" else {}
    _assert_same_function(_logits(source, **how), _logits(out, **how))
    if kind == "torch":
        _assert_same_function(_torch_logits(source), _torch_logits(out))


def test_slimming_again_finds_nothing_more(run, flax_folder, tmp_path):
    assert run("slim", flax_folder, tmp_path / "a", "--no-verify").code == 0
    again = run("slim", tmp_path / "a", tmp_path / "b")
    # The layer with more dead channels was filled up with dead ones, which cannot go either.
    assert again.code == NOTHING_DEAD
    assert not (tmp_path / "b").exists()


def test_dry_run_writes_nothing(run, flax_folder, tmp_path):
    before = sorted(path.name for path in flax_folder.iterdir())
    result = run("slim", flax_folder, tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert f"intermediate_size: 72 -> {WIDTH} channels" in result.out
    assert "Dry run" in result.err
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in flax_folder.iterdir()) == before


def test_dry_run_may_name_a_folder_that_exists(run, flax_folder, tmp_path):
    assert run("slim", flax_folder, tmp_path, "--dry-run").code == 0


def test_nothing_dead_writes_nothing(run, living_folder, tmp_path):
    result = run("slim", living_folder, tmp_path / "out")
    assert result.code == NOTHING_DEAD
    assert "Nothing was written: no channel at 2 sites of BERT_FFN is dead" in result.err
    assert "flaxslim prune DIR OUT --calibration texts.txt --keep 0.7" in result.err
    assert "a --threshold" in result.err
    assert not list(tmp_path.iterdir())


def test_dead_channels_that_the_width_keeps_are_not_called_living(run, flax_folder, tmp_path):
    result = run("slim", flax_folder, tmp_path / "out", "--multiple-of", "72")
    assert result.code == NOTHING_DEAD
    assert f"Nothing was written: {sum(DEAD)} channels at 2 sites" in result.err
    assert "none can go" in result.err
    assert "multiple_of" in result.err
    assert "--width per_layer asks less" in result.err
    assert not list(tmp_path.iterdir())


def test_existing_target_is_refused_and_then_replaced(run, flax_folder, tmp_path):
    out = tmp_path / "out"
    assert run("slim", flax_folder, out, "--no-verify").code == 0
    (out / "merges.txt").write_text("of the first run")
    refused = run("slim", flax_folder, out, "--no-verify")
    assert refused.code == 1
    assert "the target exists" in refused.err
    assert "--overwrite" in refused.err
    assert not refused.out  # before anything was read
    assert (out / "merges.txt").exists()

    assert run("slim", flax_folder, out, "--no-verify", "--overwrite").code == 0
    assert not (out / "merges.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_is_no_checkpoint(run, flax_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    result = run("slim", flax_folder, tmp_path, "--overwrite")
    assert result.code == 1
    assert "something else than a checkpoint" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_verify_claims_no_proof(run, flax_folder, tmp_path):
    result = run("slim", flax_folder, tmp_path / "out", "--no-verify")
    assert result.code == 0
    assert "equal" not in result.out
    record = _record(tmp_path / "out")
    assert record["proof"] is None
    assert "Measured" not in record["card"]


def test_threshold_is_called_approximate_everywhere(run, living_folder, tmp_path):
    out = tmp_path / "out"
    result = run("slim", living_folder, out, "--threshold", "0.7")
    assert result.code == 0, result.err
    assert "BERT_FFN, approximate" in result.out
    assert "equal" not in result.out
    assert "approximate: largest difference" in result.out
    record = _record(out)
    assert record["exact"] is False
    card = (out / "README.md").read_text()
    assert "approximate (threshold 0.7)" in card
    assert "tolerance" not in result.out + card
    measured = Proof.from_dict(record["proof"])
    assert measured.relative > 1e-3
    # `verify` asks for equality unless it is told not to.
    strict = run("verify", living_folder, out)
    assert strict.code == NOT_PROVEN
    assert "--approximate only measures it" in strict.err
    again = run("verify", living_folder, out, "--approximate")
    assert again.code == 0
    assert "approximate" in again.out


def test_multiple_of(run, flax_folder, tmp_path):
    assert (
        run("slim", flax_folder, tmp_path / "out", "--no-verify", "--multiple-of", "16").code == 0
    )
    assert read(tmp_path / "out").config.intermediate_size == 48


@pytest.mark.parametrize(
    ("format", "weights"),
    [
        ("flax", "flax_model.msgpack"),
        ("flax-safetensors", "model.safetensors"),
        ("torch", "model.safetensors"),
    ],
)
def test_format_converts(run, checkpoints, tmp_path, kind, format, weights):
    out = tmp_path / "out"
    assert run("slim", checkpoints[kind], out, "--no-verify", "--format", format).code == 0
    assert {path.name for path in out.iterdir()} == {weights, *SIDE}
    assert read(out).naming == ("torch" if format == "torch" else "flax")
    expected, _ = flaxslim.slim(*flaxslim.load(checkpoints["flax"]))
    loaded, _ = flaxslim.load(out)
    expected, loaded = flatten(expected), flatten(loaded)
    assert expected.keys() == loaded.keys()
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, expected[path], path)


def test_format_flax_of_pytorch_names_loads_in_the_stock_class(run, torch_folder, tmp_path):
    out = tmp_path / "out"
    assert run("slim", torch_folder, out, "--format", "flax").code == 0
    _assert_same_function(_logits(torch_folder, from_pt=True), _logits(out))


def test_failing_proof_writes_nothing(run, flax_folder, tmp_path, monkeypatch):
    def wrong(plan, params):
        """One living channel of layer 1 goes with the dead ones: a zero in its place."""
        cut = flaxslim.apply(plan, params)
        site = plan.spec.sites(cut)[1]
        second = flatten(cut)[site.second.path]
        living = np.flatnonzero(site.second.axes.norm(second, "f"))[:1]
        return flaxslim._tree.replace(
            cut, {site.second.path: site.second.axes.zero(second, "f", living)}
        )

    monkeypatch.setattr(_slim, "apply", wrong)
    result = run("slim", flax_folder, tmp_path / "out")
    assert result.code == NOT_PROVEN
    assert "NOT EQUAL" in result.out
    assert "nothing was written" in result.err
    assert "differs by" in result.err
    assert not list(tmp_path.iterdir())


def test_old_target_survives_a_failing_proof(run, flax_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("slim", flax_folder, out, "--no-verify").code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(_slim, "prove_checkpoints", lambda *_, **__: _failed())
    assert run("slim", flax_folder, out, "--overwrite").code == NOT_PROVEN
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def _failed() -> Proof:
    twice = np.eye(3, dtype=np.float32)
    return flaxslim.verify(
        {"w": twice}, {"w": 2 * twice}, lambda p, x: x @ p["w"], inputs=np.ones((1, 3), np.float32)
    )


def test_t5_runs_whatever_jax_did_to_clip(run, tmp_path):
    """transformers' T5 calls `jnp.clip(a_max=...)`; the command repairs that by itself."""
    params, cfg = tiny("FlaxT5ForConditionalGeneration-gated", (30,) * 3)
    source = flaxslim.save(tmp_path / "t5", params, cfg)
    result = run("slim", source, tmp_path / "out")
    assert result.code == 0, result.err
    assert read(tmp_path / "out").config.d_ff == 42


def test_a_checkpoint_without_its_head_is_proven_all_the_same(run, torch_folder, tmp_path):
    """A class that wants more than the files have: the same made-up tensors before and after."""
    checkpoint = read(torch_folder)
    params = {name: part for name, part in checkpoint.params.items() if name != "cls"}
    folder = flaxslim.save(tmp_path / "headless", params, checkpoint.config, format="torch")
    out = tmp_path / "out"
    result = run("slim", folder, out)
    assert result.code == 0, result.err
    assert "equal to rounding" in result.out
    assert "lacks 5 tensors of FlaxBertForMaskedLM" in " ".join(result.err.split())
    assert flatten(read(out).params).keys() == flatten(params).keys()


def test_a_plan_has_the_names_of_what_was_written(run, torch_folder, tmp_path):
    run("slim", torch_folder, tmp_path / "out", "--format", "flax")
    plan = Plan.from_dict(_record(tmp_path / "out")["plan"])
    assert plan.cuts[0].site.second.path.endswith("output/dense/kernel")


def test_tensors_without_a_place_in_the_flax_class_are_named(run, torch_folder, tmp_path):
    """They travel along, but nothing runs them."""
    checkpoint = read(torch_folder)
    extra = {"adapter": {"weight": np.ones((2, 3), np.float32)}}
    source = flaxslim.save(
        tmp_path / "extra", {**checkpoint.params, **extra}, checkpoint.config, format="torch"
    )
    out = tmp_path / "out"
    result = run("slim", source, out)
    assert result.code == 0, result.err
    assert (
        "note: 1 tensor (adapter.weight) has no place in FlaxBertForMaskedLM: it is written "
        "unchanged, and the proof does not cover it"
    ) in result.err
    np.testing.assert_array_equal(read(out).params["adapter"]["weight"], extra["adapter"]["weight"])
    # Nothing to say where nothing is left over; and nothing is lost in a conversion.
    assert "no place" not in run("slim", torch_folder, tmp_path / "a", "--no-verify").err
    as_flax = run("slim", source, tmp_path / "b", "--no-verify", "--format", "flax")
    assert as_flax.code == 1
    assert "would be lost" in as_flax.err
    assert "adapter.weight" in as_flax.err
    assert not (tmp_path / "b").exists()
    assert "note: 1 tensor (adapter.weight)" in run("verify", source, out).err
