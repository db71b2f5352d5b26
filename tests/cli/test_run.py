"""`flaxslim run`: a few steps of the digits, end to end, with a shrink in the middle."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import flaxslim
from cli.tiny import RUN
from flaxslim import FlaxslimError
from flaxslim.cli import (
    INTERRUPTED,
    _build,
    _demo,
    _metrics,
    _output,
    _page,
    _program,
    _recipe_read,
    _report,
    _run,
    _slimming,
)
from flaxslim.cli._recipe import Recipe
from flaxslim.errors import DivergedError, RecipeError, TargetError

pytest.importorskip("sklearn", reason="the digits need scikit-learn")

TINY = (
    *RUN,
    "train.dense_steps=0",
    "train.steps=20",
    "train.warmup=2",
    "pruning.begin=2",
    "pruning.end=12",
    "pruning.every=2",
    "shrink.at=[10]",
    "output.log_every=5",
    "output.tensorboard=false",
)


def _tiny(folder: Path, *overrides: str) -> Recipe:
    said = (*TINY, f"output.folder={str(folder)!r}", *overrides)
    return _recipe_read.read(_demo.recipes() / "digits.toml", said).recipe


pytestmark = pytest.mark.usefixtures("untimed")


@pytest.fixture(scope="module")
def ran(untimed, tmp_path_factory) -> _report.Report:
    """The run that most tests look at."""
    return _run.run(_tiny(tmp_path_factory.mktemp("runs") / "digits"))


# --- a run ------------------------------------------------------------------------------------


def test_the_folder_is_the_model_with_its_story(ran):
    names = {path.name for path in ran.folder.iterdir()}
    assert names >= {
        "config.json",
        "flax_model.msgpack",
        "flaxslim.json",
        "metrics.jsonl",
        "recipe.toml",
        "report.json",
        "training.png",
    }
    assert not _output.partial_folder(ran.folder).exists()
    picture = (ran.folder / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_the_report_of_a_run_tells_widths_and_times(ran):
    found = _slimming.read(ran.folder)
    (site,) = found.widths
    assert (site.unit, site.before, site.after) == ("channels", 24, 12)
    assert found.proof is not None
    assert found.proof.ok
    words = _page.page(found)
    for shown in ("training step", "FLOPs, one training step", "slimmed, reloaded"):
        assert shown in words


def test_it_shrinks_in_the_middle_and_at_the_end(ran):
    assert [one.step for one in ran.shrunk] == [10, 20]
    assert all(one.proof is not None and one.proof.ok for one in ran.shrunk)
    assert sum(one.removed for one in ran.shrunk) == 12
    from transformers import FlaxViTForImageClassification, ViTConfig

    assert ViTConfig.from_pretrained(ran.folder).intermediate_size == 12
    model: Any = FlaxViTForImageClassification.from_pretrained(ran.folder)
    kernel = model.params["vit"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    assert kernel.shape == (16, 12)


def test_the_metrics(ran):
    rows = _metrics.read(ran.folder)
    assert [row.step for row in rows] == [5, 10, 15, 20]
    assert all(np.isfinite(row.loss) and row.ms_per_step > 0 for row in rows)
    assert [row.sparsity for row in rows][-1] == 0.5
    assert sorted(row.sparsity for row in rows) == [row.sparsity for row in rows]
    assert [row.width_min for row in rows][-1] == [row.width_max for row in rows][-1] == 12
    rates = [row.learning_rate for row in rows]
    assert rates == sorted(rates, reverse=True)
    line = json.loads((ran.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert line.keys() == {
        "step",
        "loss",
        "sparsity",
        "width_min",
        "width_max",
        "ms_per_step",
        "learning_rate",
    }


def test_the_report(ran):
    data = json.loads((ran.folder / "report.json").read_text())
    assert data["scores"].keys() == {"dense", "pruned", "slimmed, reloaded"}
    assert data["scores"]["pruned"] == data["scores"]["slimmed, reloaded"]
    assert data["parameters"]["before"] - data["parameters"]["after"] == 12 * (16 + 16 + 1)
    assert 0 < data["predicted"] < 1
    assert data["measured"] > 0
    assert data["skipped"] == 0
    assert [one["step"] for one in data["shrunk"]] == [10, 20]


def test_the_recipe_beside_it_is_what_was_run(ran):
    again = _recipe_read.read(ran.folder / "recipe.toml").recipe
    assert again.train == _tiny(ran.folder).train
    assert again.pruning == _tiny(ran.folder).pruning


def test_the_command_prints_what_came_of_it_and_two_runs_give_the_same_numbers(ran, run, tmp_path):
    """In the place of an older one, of which nothing is left."""
    out = tmp_path / "out"
    shutil.copytree(ran.folder, out)
    (out / "old").touch()
    said = [part for text in (*TINY, "output.plot=false") for part in ("--set", text)]
    result = run("run", "digits", *said, "--out", out, "--overwrite")
    assert result.code == 0, result.err
    for words in ("accuracy", "FLOPs, one training step", "equal to rounding", "FLOPs say"):
        assert words in result.out
    assert f"saved in {out}" in result.out
    assert "loss" in result.err

    scores = [json.loads((at / "report.json").read_text())["scores"] for at in (ran.folder, out)]
    assert scores[0] == scores[1]
    losses = [[row.loss for row in _metrics.read(at)] for at in (ran.folder, out)]
    assert losses[0] == losses[1]
    models = [(at / "flax_model.msgpack").read_bytes() for at in (ran.folder, out)]
    assert models[0] == models[1]

    assert not (out / "old").exists()
    assert not (out / "training.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_another_seed_is_another_run(ran, tmp_path):
    other = _run.run(_tiny(tmp_path / "other", "seed=1", "output.plot=false", "shrink.at=[]"))
    assert _metrics.read(other.folder)[0].loss != _metrics.read(ran.folder)[0].loss


@pytest.mark.long
def test_dense_steps_heads_a_teacher_and_widths_of_their_own(tmp_path):
    report = _run.run(
        _tiny(
            tmp_path / "all",
            "train.dense_steps=6",
            "pruning.spec=all",
            "pruning.score=snip_momentum",
            "pruning.allocation=global",
            "model.config.num_hidden_layers=2",
            "shrink.width=per_layer",
            "shrink.at=[14]",
            "distillation.teacher=start",
            "output.plot=false",
        )
    )
    rows = _metrics.read(report.folder)
    assert [row.step for row in rows] == [5, 6, 11, 16, 20, 21, 26]
    assert rows[-1].sparsity == 0.5
    assert rows[-1].width_min < rows[-1].width_max, "those of the FFNs, one by one"
    assert report.scores["pruned"] == report.scores["slimmed, reloaded"]


def test_heads_that_no_key_can_say_are_refused_before_the_first_step(tmp_path):
    recipe = _tiny(tmp_path / "out", "pruning.spec=heads", "pruning.sparsity=0.5")
    with pytest.raises(RecipeError, match="per_layer"):
        _run.run(recipe)
    assert not (tmp_path / "out").exists()


def test_a_run_without_pruning_is_a_run(tmp_path):
    recipe = _tiny(tmp_path / "dense", "pruning.sparsity=0", "output.plot=false")
    report = _run.run(recipe)
    assert report.scores.keys() == {"dense", "reloaded"}
    assert report.shrunk == ()
    assert report.parameters.ratio == report.measured == 1


# --- what goes wrong --------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    recipe = _tiny(tmp_path / "nan", "train.learning_rate=1e30", "train.warmup=0")
    with pytest.raises(DivergedError, match="no number") as caught:
        _run.run(recipe)
    assert "step " in str(caught.value)
    assert "train.learning_rate" in str(caught.value)
    assert not recipe.output.folder.exists()
    assert (_output.partial_folder(recipe.output.folder) / "metrics.jsonl").exists()


def test_a_folder_is_replaced_only_on_demand_and_only_if_a_run_made_it(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(_build, "start", begin)
    recipe = _tiny(tmp_path / "out")
    folder, partial = recipe.output.folder, _output.partial_folder(recipe.output.folder)
    folder.mkdir()
    with pytest.raises(Begun):  # an empty one is no loss
        _run.run(recipe)
    with pytest.raises(Begun):  # what another run left behind
        _run.run(recipe)
    (folder / "thesis.tex").touch()
    with pytest.raises(TargetError, match="exists"):
        _run.run(recipe)
    with pytest.raises(TargetError, match="something else"):
        _run.run(recipe, overwrite=True)
    (folder / _output.REPORT).touch()
    with pytest.raises(Begun):
        _run.run(recipe, overwrite=True)
    assert (folder / "thesis.tex").exists(), "until the new one is whole"
    (partial / _output.RECIPE).rename(partial / "thesis.tex")
    with pytest.raises(TargetError, match="something else"):
        _run.run(recipe, overwrite=True)


def test_ctrl_c(run, tmp_path, monkeypatch):
    def interrupt(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_program.Program, "train", interrupt)
    said = [part for text in TINY for part in ("--set", text)]
    result = run("run", "digits", *said, "--out", tmp_path / "out")
    assert result.code == INTERRUPTED
    assert "no model was written" in result.err
    assert str(tmp_path / "out.partial") in result.err.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_all_but_the_plot_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FlaxslimError, match=r"flaxslim\[plots\]"):
        flaxslim.plot_training([{"step": 1, "loss": 1.0}])


def test_without_tensorboard_there_are_json_lines(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    row = _metrics.Row(
        step=1, loss=2.0, sparsity=0.0, width_min=1, width_max=1, ms_per_step=1.0, learning_rate=0.1
    )
    with _metrics.writer(tmp_path) as writer:
        writer.add(row)
        assert _metrics.read(tmp_path) == [row], "at once"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1,')
    assert _metrics.read(tmp_path) == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    row = _metrics.Row(
        step=1, loss=2.0, sparsity=0.0, width_min=1, width_max=1, ms_per_step=1.0, learning_rate=0.1
    )
    with _metrics.writer(tmp_path) as writer:
        writer.add(row)
    assert any((tmp_path / "tensorboard").iterdir())


# --- the command ------------------------------------------------------------------------------


def test_dry_run_prints_the_recipe_and_stops(run, tmp_path):
    out = tmp_path / "out"
    result = run("run", "digits", "--set", "train.steps=200", "--dry-run", "--out", out)
    assert result.code == 0
    assert "steps = 200" in result.out
    assert 'allocation = "site"' in result.out
    assert not out.exists()
    bert = _demo.recipes() / "squad_bert_base.toml"
    result = run("run", bert, "--set", "data.train=nowhere", "--dry-run")
    assert result.code == 0
    assert "no such file" in result.err


def test_mistakes_are_exit_code_1(run):
    result = run("run", "digits", "--set", "train.stepz=200")
    assert result.code == 1
    assert "no key 'stepz'" in result.err
    assert run("run", "nowhere.toml").code == 1


def _set(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


NO_RUNS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "to look and to run": (["--dry-run", "--check"], ("exclude each other", "--dry-run --check")),
    "to look and to write": (["--dry-run", "--overwrite"], ("--dry-run --overwrite",)),
    "to try and to write": (["--check", "--overwrite"], ("--check --overwrite",)),
    "TOML as JSON": (["--dry-run", "--json"], ("--dry-run --json",)),
    "no such activation": (
        ["--check", *_set(*RUN, 'model.config.hidden_act="foo"')],
        ("FlaxViTForImageClassification cannot be built", "hidden_act = 'foo'"),
    ),
    "a size in words": (
        ["--check", *_set(*RUN, 'model.config.hidden_size="a"')],
        ("cannot be built", "correct the values of [model.config]"),
    ),
    "nothing can die": (
        ["--check", *_set(*RUN, "pruning.min_width=24")],
        ("min_width keeps all channels of every layer", "less than 24"),
    ),
    "a seed of 64 bits": (["--check", *_set(f"seed={2**63}")], ("seed is out of its range",)),
}


@pytest.mark.parametrize("name", NO_RUNS)
def test_what_cannot_be_run_is_said(name, run):
    arguments, words = NO_RUNS[name]
    result = run("run", "digits", *arguments)
    assert result.code == 1
    for word in words:
        assert word in result.err


def test_a_run_refuses_floors_too(tmp_path):
    with pytest.raises(RecipeError, match="min_width keeps all channels of every layer"):
        _run.run(_tiny(tmp_path / "out", "pruning.min_width=24", "train.steps=13"))


def test_a_source_may_have_a_layer_of_one_channel(run, tmp_path):
    """`--check` builds it at its own widths, and no floor that the recipe says keeps that one."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    cfg = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip
    params = jax.tree.map(np.array, FlaxViTForImageClassification(cfg).params)
    params["vit"]["encoder"]["layer"]["0"]["output"]["dense"]["kernel"][1:] = 0
    small, cfg = flaxslim.slim(params, cfg, "ffn", width="per_layer")
    source = flaxslim.save(tmp_path / "narrow", small, cfg)
    said = [x for x in TINY if not x.startswith("model.config")]
    said += [f"model.source={str(source)!r}", "model.config={}", "shrink.width=per_layer"]
    out = ("--out", tmp_path / "out")
    for floor, more in ((1, ("--check",)), (4, ())):
        result = run("run", "digits", *_set(*said, f"pruning.min_width={floor}"), *out, *more)
        assert result.code == 0, result.err


def test_any_name_is_a_folder(run, tmp_path):
    name = "a'b\"c\\ d\N{PARTY POPPER}"
    shown = run("run", "digits", "--dry-run", "--out", tmp_path / name)
    assert shown.code == 0, shown.err
    recipe = tmp_path / "again.toml"
    recipe.write_text(shown.out, encoding="utf-8")
    assert _recipe_read.read(recipe).recipe.output.folder == tmp_path / name


def test_help_teaches(run):
    text = run("run", "--help").out
    for words in ("--set", "--dry-run", "--check", "[pruning]", "metrics.jsonl", "Example: "):
        assert words in text


@pytest.mark.parametrize("name", ["squad_bert_base", "stories260k", "digits"])
def test_check_takes_the_first_step(run, name):
    small = {
        "squad_bert_base": (
            "vocab_size=99",
            "hidden_size=32",
            "intermediate_size=48",
            "num_hidden_layers=1",
            "num_attention_heads=2",
        ),
        "stories260k": (
            "vocab_size=99",
            "hidden_size=16",
            "intermediate_size=24",
            "num_hidden_layers=1",
            "num_attention_heads=2",
            "num_key_value_heads=2",
        ),
        "digits": ("num_hidden_layers=1",),
    }[name]
    said = [part for text in small for part in ("--set", f"model.config.{text}")]
    if name == "stories260k":
        said += ["--set", "model.source=org/name"]  # not asked for
    as_json = ["--json"] if name == "digits" else []
    result = run("run", name, *said, "--check", *as_json)
    assert result.code == 0, result.err
    if as_json:
        assert json.loads(result.out)["channels"] > 0
    else:
        assert "the recipe is ready to run" in result.out


# --- the tasks --------------------------------------------------------------------------------


def test_language_learns_from_the_tokens_that_count(tmp_path):
    from flaxslim.cli._tasks._language import Language, LanguageData

    rng = np.random.default_rng(0)
    ids = rng.integers(9, size=(5, 12)).astype(np.int16)
    mask = np.arange(12) < np.array([12, 3, 8, 1, 5])[:, None]
    path = tmp_path / "tokens.npz"
    np.savez(path, a_ids=ids, a_mask=mask, b_ids=ids[:3], b_mask=mask[:3])
    data = LanguageData(tokens=path, train="a", evaluation="b", length=10)
    task = Language.load(data, None)
    batch = next(task.batches(5, np.random.default_rng(0)))
    assert batch["input_ids"].shape == (5, 10)

    def forward(inputs: Any) -> tuple[Any, ...]:
        return (np.full((*inputs["input_ids"].shape, 9), 0.5, np.float32),)

    logits = forward(batch)
    assert float(Language.loss(logits, batch)) == pytest.approx(np.log(9))
    assert task.evaluate(forward, 2)["perplexity"] == pytest.approx(9)
    with jax.numpy_rank_promotion("allow"):
        one = np.zeros((3, 10, 9), np.float32)
        np.put_along_axis(one, np.roll(task.test["input_ids"], -1, 1)[..., None], 1e3, 2)
    known = task.evaluate(lambda inputs: (one[: len(inputs["input_ids"])],), 3)
    assert known["perplexity"] == pytest.approx(1)
    from transformers import GPT2Config

    few, short = GPT2Config(vocab_size=2), GPT2Config(n_positions=9)
    for told, cfg in (("vocabulary", few), ("positions", short)):
        with pytest.raises(FlaxslimError, match=told):
            task.check(cfg)
    task.check(GPT2Config(vocab_size=9, n_positions=10))
    with pytest.raises(FlaxslimError, match="no array c_ids") as caught:
        Language.load(LanguageData(tokens=path, train="c"), None)
    assert "a_ids" in str(caught.value)


IDS = np.arange(24).reshape(4, 6)
BAD_TOKENS: dict[str, tuple[Any, Any, str]] = {
    "floats": (IDS + 0.6, IDS * 0 + 1, "a_ids cannot be taken as input_ids"),
    "fewer masks": (IDS, IDS[:2] * 0 + 1, "not have equally many samples"),
    "shorter masks": (IDS, IDS[:, :5] * 0 + 1, "a_mask is no mask of a_ids"),
    "no text": (IDS[:0], IDS[:0], "hold no sample"),
    "a mask of zeros": (IDS, IDS * 0, "no token to predict"),
    "one token each": (IDS[:, :1], IDS[:, :1] * 0 + 1, "no token to predict"),
    "one list": (IDS[0], IDS[0], r"expected: +integers, \(samples, length\)"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_of_no_use_are_told_with_the_keys_of_the_recipe(name, tmp_path):
    from flaxslim.cli._tasks._language import Language, LanguageData

    ids, mask, words = BAD_TOKENS[name]
    np.savez(tmp_path / "x.npz", a_ids=ids, a_mask=mask)
    with pytest.raises(FlaxslimError, match=words) as caught:
        Language.load(LanguageData(tokens=tmp_path / "x.npz", train="a"), None)
    assert "data." in (caught.value.mend or "")


def test_stories_are_measured_as_their_reference_says(data):
    """Dense perplexity 6.158, by the class alone."""
    from transformers import FlaxLlamaForCausalLM

    from flaxslim.cli._tasks._language import Language

    recipe = _recipe_read.read(_demo.recipes() / "stories260k.toml").recipe
    task = Language.load(recipe.data, None)
    model: Any = flaxslim.from_pretrained(FlaxLlamaForCausalLM, data / "stories260K")
    forward = jax.jit(lambda inputs: (model(**inputs).logits,))
    assert task.evaluate(forward, 10)["perplexity"] == pytest.approx(6.158, abs=1e-3)
