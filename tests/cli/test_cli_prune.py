"""`flaxslim prune` and `flaxslim sweep` on a tiny BERT with a tokenizer."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flaxslim
from cli.tiny import tiny
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.cli import INTERRUPTED
from flaxslim.posttraining import _prune

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "far",
    "away",
    "from",
    "home",
    "in",
    "rain",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    top = tmp_path_factory.mktemp("prune")
    params, cfg = tiny("FlaxBertForMaskedLM")
    source = flaxslim.save(top / "bert", params, cfg)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (source / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(source / "vocab.txt")).save_pretrained(source)
    return source


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 9)) for _ in range(40)]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(lines))
    return path


def _common(folder: Path, texts: Path) -> list[Any]:
    return [folder, "--calibration", texts, "--samples", 32, "--batch-size", 8, "--length", 16]


def _prune_command(folder: Path, out: Path, texts: Path, *more: Any) -> list[Any]:
    source, *rest = _common(folder, texts)
    return ["prune", source, out, *rest, *more]


def test_a_folder_comes_out_that_the_stock_class_loads(run, folder, texts, tmp_path):
    from transformers import FlaxBertForMaskedLM

    pytest.importorskip("matplotlib")
    more = ["--keep", 0.5, "--plot", tmp_path / "widths.png"]
    result = run(*_prune_command(folder, tmp_path / "out", texts, *more))
    assert result.code == 0, result.err
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")
    assert "of     72 channels" in result.out
    measure = "KL divergence of logits, in nats, on calibration batches"
    assert f"from the dense ones ({measure})" in result.out
    assert "parameters" in result.out
    model: Any = FlaxBertForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 36
    record = json.loads((tmp_path / "out" / "flaxslim.json").read_text())
    assert record["exact"] is False
    assert len(record["prune"]["report"]["rows"]) == 2
    assert (tmp_path / "out" / "vocab.txt").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "72 of 144 channels were cut" in card
    assert "without training" in card
    told = run("report", tmp_path / "out")
    assert told.code == 0, told.err
    assert "approximate: largest difference of any one value" in told.out
    assert "from the dense ones (KL divergence" in told.out
    assert "equal" not in told.out
    assert "tolerance" not in told.out


def test_a_budget_of_parameters_with_heads(run, folder, texts, tmp_path):
    dense = read(folder).params
    count = sum(x.size for x in flatten(dense).values())
    more = ["--max-params", int(0.8 * count), "--width", "per_layer", "--heads"]
    result = run(*_prune_command(folder, tmp_path / "out", texts, *more))
    assert result.code == 0, result.err
    after = read(tmp_path / "out").params
    assert sum(x.size for x in flatten(after).values()) <= 0.8 * count


def test_a_metric_of_ones_own(run, folder, texts, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def width(params, cfg):\n    return cfg.intermediate_size\n")
    monkeypatch.chdir(tmp_path)
    more = ["--keep", 0.5, "--evaluate", "mine:width"]
    result = run(*_prune_command(folder, tmp_path / "out", texts, *more))
    assert result.code == 0, result.err
    assert "dense: width 72" in result.out
    assert "pruned: width 36" in result.out


def test_sweep(run, folder, texts, tmp_path):
    pytest.importorskip("matplotlib")
    result = run(
        "sweep", *_common(folder, texts), "--keep", "0.75,0.5", "--presets", "magnitude,balanced",
        "--csv", tmp_path / "s.csv", "--plot", tmp_path / "s.png",
    )  # fmt: skip
    assert result.code == 0, result.err
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["preset"] for row in rows] == ["dense", *["magnitude"] * 2, *["balanced"] * 2]
    errors = [float(row["error"]) for row in rows]
    assert errors[0] == 0 < errors[1] < errors[2]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "error: KL divergence of logits, in nats, on calibration batches\n" in result.out


def test_a_sweep_measures_all_presets_alike(run, folder, texts, monkeypatch):
    brief = flaxslim.Method(score="magnitude", ridge=1e-2, tune=flaxslim.Tune(steps=2, every=1))
    monkeypatch.setitem(_prune.PRESETS, "best", brief)
    result = run("sweep", *_common(folder, texts), "--keep", 0.5, "--presets", "magnitude,best")
    assert result.code == 0, result.err
    assert "error: KL divergence of logits, in nats, on held-out batches\n" in result.out


def test_pytorch_names_stay_what_they_are(run, folder, texts, tmp_path):
    dense = flaxslim.load(folder)
    source = flaxslim.save(tmp_path / "torch", *dense, like=folder, format="torch")
    result = run(*_prune_command(source, tmp_path / "out", texts, "--keep", 0.5))
    assert result.code == 0, result.err
    other = run(*_prune_command(folder, tmp_path / "flax", texts, "--keep", 0.5))
    assert other.code == 0, other.err
    assert read(tmp_path / "out").naming == "torch"
    mine, theirs = (flatten(flaxslim.load(tmp_path / name)[0]) for name in ("out", "flax"))
    assert mine.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(mine[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def _sweep(run: Any, folder: Path, texts: Path, *more: Any) -> Any:
    return run("sweep", *_common(folder, texts), "--keep", 0.5, "--presets", "magnitude", *more)


def test_a_table_replaces_only_a_table(run, folder, texts, tmp_path):
    mine = tmp_path / "mine.csv"
    shutil.copy(texts, mine)
    refused = _sweep(run, folder, texts, "--csv", mine)
    assert refused.code == 1
    assert "something else than a table of a sweep" in refused.err
    assert mine.read_bytes() == texts.read_bytes()
    (tmp_path / "mine.png").write_text("notes")
    refused = _sweep(run, folder, texts, "--plot", tmp_path / "mine.png")
    assert refused.code == 1
    mine.write_text("preset,keep,parameters,error\ndense,1.0,9,0.0\n")
    assert _sweep(run, folder, texts, "--csv", mine).code == 0
    assert "magnitude" in mine.read_text()


def test_metrics_of_odd_names_and_values(run, folder, texts, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "def error(params, cfg):\n    return 1\n"
        "def some(params, cfg):\n    wide = cfg.intermediate_size > 40\n"
        "    return {'same': 1, 'dense' if wide else 'pruned': float('nan')}\n"
    )
    monkeypatch.chdir(tmp_path)
    refused = _sweep(run, folder, texts, "--evaluate", "odd:error")
    assert refused.code == 1
    assert "the name of another column" in refused.err
    swept = _sweep(run, folder, texts, "--evaluate", "odd:some", "--csv", tmp_path / "some.csv")
    assert swept.code == 0, swept.err
    assert "same,dense,pruned" in (tmp_path / "some.csv").read_text()
    more = ["--keep", 0.5, "--evaluate", "odd:some"]
    assert run(*_prune_command(folder, tmp_path / "out", texts, *more)).code == 0
    text = (tmp_path / "out" / "flaxslim.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    page = tmp_path / "page.html"
    assert run("report", tmp_path / "out", "--html", page).code == 0
    assert "nan" in page.read_text()


def test_after_ctrl_c_the_same_command_goes_on(run, folder, texts, tmp_path, monkeypatch):
    def interrupt(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the data are read again")

    command = _prune_command(folder, tmp_path / "out", texts, "--keep", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(_prune.Distance, "mean", interrupt)
        result = run(*command)
    assert result.code == INTERRUPTED
    assert "the same command goes on from there" in result.err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["out.statistics"]
    wrong = run(*_prune_command(folder, tmp_path / "out", texts, "--max-params", "1k"))
    assert wrong.code == 1
    with monkeypatch.context() as patch:
        patch.setattr(_prune.Calibration, "_sum", never)
        result = run(*command)
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


RECIPE = """command = "prune"
source = "bert"
out = "out"
calibration = "texts.txt"
samples = 32
batch_size = 8
length = 16
keep = 0.5
low_memory = false
"""


@pytest.fixture
def recipe(folder, texts, tmp_path) -> Path:
    shutil.copytree(folder, tmp_path / "bert")
    shutil.copy(texts, tmp_path)
    path = tmp_path / "prune.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_stands_for_the_command(run, recipe):
    shown = run("run", recipe, "--dry-run", "--set", "keep=0.75")
    assert shown.code == 0, shown.err
    assert "--batch-size 8" in shown.out
    assert "--keep 0.75" in shown.out
    assert "--no-low-memory" in shown.out
    result = run("run", recipe, "--out", recipe.parent / "other")
    assert result.code == 0, result.err
    assert read(recipe.parent / "other").config.intermediate_size == 36


def test_a_picture_lies_beside_its_recipe(run, recipe):
    recipe.write_text(RECIPE.replace("keep = 0.5", 'keep = 0.5\nplot = "w.png"'))
    shown = run("run", recipe, "--dry-run")
    assert f"--plot {recipe.parent / 'w.png'}" in shown.out.replace("\n", " ")


BAD_RECIPES: dict[str, tuple[str, str, str]] = {
    "no such flag": ("keep = 0.5", "keeps = 0.5", "prune.toml:8"),
    "what was meant": ("keep = 0.5", "keeps = 0.5", "nearest:  keep"),
    "no file": ("texts.txt", "text.txt", "texts.txt"),
    "nowhere to go": ('out = "out"\n', "", "says no out"),
    "no such command": ('"prune"', '"prun"', "expected: prune"),
    "a table": ("keep = 0.5", "keep = {f = 0.5}", "not a table"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_what_is_wrong_in_a_recipe_is_said(name, run, recipe):
    old, new, words = BAD_RECIPES[name]
    recipe.write_text(RECIPE.replace(old, new))
    result = run("run", recipe)
    assert result.code == 1
    assert words in result.err
    assert not (recipe.parent / "out").exists()


def test_a_recipe_that_does_not_train_takes_no_first_step(run, recipe):
    result = run("run", recipe, "--check")
    assert result.code == 1
    assert "--dry-run" in result.err


WRONG: dict[str, tuple[list[Any], str]] = {
    "no wish": ([], "--keep 0.7 keeps 70%"),
    "two wishes": (["--keep", 0.5, "--speedup", "1.5x"], "found:    --keep, --speedup"),
    "and what to say": (["--keep", 0.5, "--speedup", "1.5x"], "one of --keep"),
    "a speed of nonsense": (["--speedup", "fast"], "1.5x"),
    "too small": (["--max-params", "1k"], "be chosen: --heads --width per_layer"),
    "metric": (["--keep", 0.5, "--evaluate", "perplexty"], "perplexity"),
    "a picture of no kind": (["--keep", 0.5, "--plot", "widths.gif"], ".png, .svg or .pdf"),
    "a picture nowhere": (["--keep", 0.5, "--plot", "nowhere/w.png"], "no such folder"),
    "data without a metric": (["--keep", 0.5, "--evaluation", "x.txt"], "--evaluate perplexity"),
    "a metric that fails": (["--keep", 0.5, "--evaluate", "json:dumps"], "gave no number"),
    "a negative seed": (["--keep", 0.5, "--seed", -1], "no negative number"),
    "a seed of 64 bits": (["--keep", 0.5, "--seed", 2**63], "of more than 63 bits"),
    "metric without data": (["--keep", 0.5, "--evaluate", "stsb"], "--evaluation FILE"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_written(name, run, folder, texts, tmp_path):
    more, words = WRONG[name]
    result = run(*_prune_command(folder, tmp_path / "out", texts, *more))
    assert result.code == 1
    assert words in result.err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_percentage_is_refused_before_anything_is_read(run, tmp_path):
    command = _prune_command(tmp_path / "none", tmp_path / "out", tmp_path / "none.txt")
    result = run(*command, "--keep", 70)
    assert result.code == 1
    assert "--keep is the share" in result.err
    assert "mend:     for 70% --keep 0.7" in result.err


def test_without_a_tokenizer(run, folder, texts, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for path in bare.iterdir():
        if path.name not in ("config.json", "flax_model.msgpack"):
            path.unlink()
    result = run(*_prune_command(bare, tmp_path / "out", texts, "--keep", 0.5))
    assert result.code == 1
    assert "found:    neither tokenizer.json nor tokenizer_config.json\n" in result.err
    assert not (tmp_path / "out").exists()
