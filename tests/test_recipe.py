"""Recipes: each mistake is told with its line, all of them at once, before anything is loaded."""

import re
import tomllib
import typing
from pathlib import Path

import pytest

from flaxslim import FlaxslimError
from flaxslim.cli import _demo, _recipe_book, _recipe_lines
from flaxslim.cli._recipe import Pruning, Recipe
from flaxslim.cli._recipe_read import parse, read

# Recipes of `prune` are read by another reader, and tested in cli/test_lambada.py.
CONFIGS = [
    path
    for path in sorted(_demo.recipes().glob("*.toml"))
    if "command" not in tomllib.loads(path.read_text())
]

GOOD = """\
task = "digits"

[model]
class = "FlaxViTForImageClassification"
[model.config]
image_size = 8

[data]

[train]
steps = 100
batch_size = 8
learning_rate = 1e-3

[pruning]
sparsity = 0.5
end = 50

[output]
folder = "out"
"""


def _told(text: str, *overrides: str) -> str:
    with pytest.raises(FlaxslimError) as caught:
        parse(text, Path("dir/my.toml"), overrides)
    return str(caught.value)


def _parsed(*overrides: str, text: str = GOOD) -> Recipe:
    return parse(text, Path("dir/my.toml"), overrides).recipe


# What stands in GOOD, what is written there instead; the line, and words of the message.
MISTAKES = [
    ('task = "digits"', 'task = "digit"', 1, "no such task", "digits, language, squad"),
    ('task = "digits"', "", "", "a recipe needs a task", "squad"),
    ('task = "digits"', 'task = "digits"\nsed = 1', 2, "no key 'sed'", "seed"),
    (
        'task = "digits"',
        'task = "digits"\nseed = -1',
        2,
        "seed is out of its range",
        "from 0 to 92",
    ),
    ("FlaxViTForImageClassification", "FlaxViTForImageClasification", 4, "no class", "FlaxViTFor"),
    ("FlaxViTForImageClassification", "FlaxViTModel", 4, "has not the head", "ForImageClassif"),
    ("[model.config]", "revision = 'v1'\n[model.config]", 5, "on the Hub has revisions", "Hub id"),
    ("image_size = 8", "image_sizes = 8", 6, "ViTConfig has no key", "image_size"),
    ("[model.config]\nimage_size = 8", "", 3, "nothing says which model", "[model.config]"),
    ('class = "FlaxViTForImageClassification"', "", 3, "model.class is missing", "a text"),
    ("[data]", "[data]\nfile = 1", 9, "[data] has no key 'file'", "nothing to say"),
    ("[train]", "[trian]", 10, "no key 'trian'", "train"),
    ("steps = 100", 'steps = "100"', 11, "train.steps is of the wrong kind", "a whole number"),
    ("steps = 100", "steps = 1.5", 11, "train.steps is of the wrong kind", "'1.5'|1.5"),
    ("steps = 100", "steps = true", 11, "train.steps is of the wrong kind", "True"),
    ("steps = 100", "steps = 0", 11, "train.steps is out of its range", "1 or more"),
    ("steps = 100", "steps = 40", 17, "training is over before all channels are dead", "end 50"),
    ("steps = 100", "steps = 100\nwarmup = 100", 12, "would rise to the end", "less than 100"),
    ("steps = 100", 'steps = 100\ndecay = "cosin"', 12, "none of its choices", "cosine"),
    ("batch_size = 8", "batchsize = 8", 12, "no key 'batchsize'", "batch_size"),
    ("learning_rate = 1e-3", "learning_rate = -1", 13, "out of its range", "above 0"),
    ("learning_rate = 1e-3", "learning_rate =", 13, "this is no TOML", "at line 13"),
    ("[pruning]", "[pruning", 15, "this is no TOML", ""),
    ("sparsity = 0.5", "sparsity = 1.5", 16, "sparsity is out of its range", "from 0 to 1"),
    ("sparsity = 0.5", "sparsity = {h = 0.5}", 16, "spec 'ffn' has no axis 'h'", "f: FFN channels"),
    ("sparsity = 0.5", "sparsity = {f = 2}", 16, "sparsity is out of its range", "{'f': 2}"),
    ("sparsity = 0.5", "sparsity = 0.5\nstart = 0.6", 17, "starts above its end", "start 0.6"),
    ("sparsity = 0.5", 'sparsity = 0.5\nscore = "magnitud"', 17, "none of its", "magnitude, magn"),
    ("end = 50", "end = 50\nbegin = 60", 17, "ends before it begins", "begin 60, end 50"),
    ("end = 50", "", 15, "pruning.end is missing", "below 100"),
    ("end = 50", 'schedule = "one_shot"\nbegin = 100', 18, "training is over", "begin 100"),
    ("end = 50", 'schedule = "stepwise"', 17, "needs its steps", "1000"),
    ("end = 50", 'schedule = "stepwise"\nstepwise = {"x" = 0.1}', 18, "no step", '"0" to "99"'),
    ("end = 50", "end = 50\nstepwise = {'1' = 0.1}", 18, "no steps of its own", "stepwise"),
    ("end = 50", "schedule = 'stepwise'\nstepwise = {'9' = 0.1}", 16, "by itself", "sparsity 0.5"),
    ("end = 50", "end = 50\nfade = 3", 18, "must have faded", "channels die 1 steps apart"),
    ("end = 50", "end = 50\nregrow = 0.2\nallocation = 'global'", 18, "give way", "regrow 0.2"),
    (
        "end = 50",
        'end = 50\nschedule = "exponential"\n[pruning.sparsity]\nf = 1',
        19,
        "no TOML",
        "",
    ),
    ("[output]", "[shrink]\nat = [30, 20]\n[output]", 20, "no steps in order", "[30, 20]"),
    ("[output]", "[shrink]\nat = [\n 30,\n 'x']\n[output]", 20, "wrong kind", "a list"),
    ("[output]", "[shrink]\nat = [100]\n[output]", 20, "no steps in order", "below train.steps"),
    ("[output]", "[shrink]\nwidth = 'per-layer'\n[output]", 20, "its choices", "per_layer"),
    ("[output]", "[distillation]\n[output]", 19, "distillation.teacher is missing", "Hub id"),
    ("[output]", "[distillation]\nteacher = './x'\n[output]", 20, "no such folder", "dir/x"),
    ("[output]", "[distillation]\nteacher = 'a b'\n[output]", 20, "neither", "org/name"),
    ("sparsity = 0.5", 'sparsity = 0.5\nschedule = "one_shot"', 18, "schedule has no end", "leave"),
    ("[output]", "shrink = 1\n[output]", 19, "[pruning] has no key 'shrink'", ""),
    ('folder = "out"', "", 19, "output.folder is missing", "a path"),
    ('folder = "out"', "folder = 3", 20, "output.folder is of the wrong kind", "a path"),
]


@pytest.mark.parametrize(("old", "new", "line", "problem", "words"), MISTAKES)
def test_a_mistake_is_told_with_its_line(old, new, line, problem, words):
    told = _told(GOOD.replace(old, new, 1))
    where = re.findall(r"dir/my\.toml(?::(\d+))?\b", told)
    assert problem in told
    assert str(line) in where
    assert any(word in told for word in words.split("|"))


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines():
    told = _told(
        GOOD.replace("steps = 100", "steps = 0")
        .replace("sparsity = 0.5", "sparsity = 2")
        .replace("image_size", "class = 1\nimage_size")
        .replace('class = "FlaxViT', 'clas = "FlaxViT')
    )
    assert re.match(r"[45] mistakes in dir/my\.toml\n", told)
    lines = [int(line) for line in re.findall(r"at: +dir/my\.toml:(\d+)", told)]
    assert lines == sorted(lines)
    assert len(set(lines)) > 2


def test_another_schedule_may_be_tried_by_the_command_line():
    assert _parsed('pruning.schedule="one_shot"').pruning.schedule == "one_shot"


def test_a_section_that_is_no_table():
    told = _told("train = 3\n" + GOOD.replace("[train]", "[model.more]"))
    assert "train is a table" in told
    assert "dir/my.toml:1" in told


@pytest.mark.parametrize("name", ["evaluation.dense=1", "output.plot='yes'"])
def test_a_bool_is_a_bool(name):
    assert "true or false" in _told(GOOD, name)


# --- what is right ----------------------------------------------------------------------------


def test_defaults():
    recipe = _parsed()
    assert recipe.seed == 0
    assert recipe.pruning == Pruning(sparsity=0.5, end=50)
    assert recipe.distillation is None
    assert recipe.shrink.at == ()
    assert recipe.output.folder == Path("dir/out")  # beside the recipe
    assert recipe.prunes


def test_overrides():
    recipe = _parsed(
        "train.steps=200",
        "pruning.sparsity.f=0.8",
        "pruning.score=snip",
        'pruning.schedule="linear"',
        "shrink.at=[60, 70]",
        "output.folder=elsewhere",
        "distillation.teacher=start",
    )
    assert recipe.train.steps == 200
    assert recipe.pruning.shares == {"f": 0.8}
    assert (recipe.pruning.score, recipe.pruning.schedule) == ("snip", "linear")
    assert recipe.shrink.at == (60, 70)
    assert recipe.output.folder == Path("elsewhere")  # of the command line: where one stands
    assert recipe.distillation is not None
    assert recipe.distillation.teacher == "start"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=3", "no key 'step'"),
        ("train.steps=x", "a whole number"),
        ("train.steps", "--set section.key=value"),
        ("=3", "--set section.key=value"),
        ("pruning.end=100", "training is over"),
        ("trian.steps=3", "no key 'trian'"),
    ],
)
def test_mistakes_on_the_command_line_are_told_as_such(override, words):
    told = _told(GOOD, override)
    assert words in told
    assert f"--set {override}" in told


def test_no_sparsity_is_no_pruning():
    assert not _parsed("pruning.sparsity=0", "shrink.at=[5]").prunes


def test_heads_and_channels_have_shares_of_their_own():
    both = ("pruning.spec=all", "pruning.sparsity={f=0.9, h=0.6}")
    assert _parsed(*both).pruning.shares == {"f": 0.9, "h": 0.6}
    assert _parsed("pruning.spec=all").pruning.shares == {"f": 0.5, "h": 0.5}


def test_a_recipe_is_written_as_it_is_read():
    recipe = _parsed("pruning.sparsity.f=0.8", "shrink.at=[60]")
    again = tomllib.loads(recipe.to_toml())
    again["output"]["folder"] = "out"
    text = recipe.to_toml().replace('"dir/out"', '"out"')
    assert parse(text, Path("dir/my.toml")).recipe == recipe


def test_lines_of_every_way_to_write_a_key():
    text = '''a = 1
b.c = """
[not.a.table]
d = 3
"""
# [no] = table

[e]
f = [
  1, # ]
  "]",
]
"g h" = { i = 2, j = { k = 3 } }
[l.m]
n = \'\'\'x\'\'\'
'''
    lines = _recipe_lines.lines(text)
    names = {".".join(key): line for key, line in lines.items()}
    assert names == {
        "a": 1,
        "b": 2,
        "b.c": 2,
        "e": 8,
        "e.f": 9,
        "e.g h": 13,
        "e.g h.i": 13,
        "e.g h.j": 13,
        "e.g h.j.k": 13,
        "l": 14,
        "l.m": 14,
        "l.m.n": 15,
    }


def test_a_recipe_that_is_not_there(tmp_path):
    (tmp_path / "digits.toml").write_text(GOOD)
    with pytest.raises(FlaxslimError, match="cannot be read") as caught:
        read(tmp_path / "digit.toml")
    assert "digits.toml" in str(caught.value)


def test_sources_are_folders_or_ids(tmp_path):
    (tmp_path / "model").mkdir()
    path = tmp_path / "my.toml"

    def source(value: str) -> str | None:
        text = GOOD.replace("[model.config]", f'source = "{value}"\n[model.config]')
        return parse(text, path).recipe.model.source

    assert source("model") == str(tmp_path / "model")
    assert source("./model") == str(tmp_path / "model")
    assert source("org/name") == "org/name"


# --- the recipes that are shipped -------------------------------------------------------------


def test_there_are_recipes():
    names = {path.stem for path in CONFIGS}
    assert names >= {"digits", "stories260k", "squad_sentence_encoder", "squad_bert_base"}
    assert "squad_bert_large" in names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_right(path):
    found = read(path, files=False)
    assert found.recipe.prunes
    assert found.recipe.shrink.at
    text = path.read_text()
    assert "flaxslim run" in text
    assert not re.search(r"^/|\"/", text, re.MULTILINE), "an absolute path"


def test_the_published_settings():
    base = read(_demo.recipes() / "squad_bert_base.toml", files=False).recipe
    large = read(_demo.recipes() / "squad_bert_large.toml", files=False).recipe
    assert base.pruning.shares == {"f": 0.9, "h": 0.6}
    assert large.pruning.shares == {"f": 0.8, "h": 0.7}
    for recipe, batch, rate, weight in ((base, 12, 7e-5, 4.5), (large, 24, 5e-5, 3.0)):
        assert (recipe.train.batch_size, recipe.train.learning_rate) == (batch, rate)
        assert recipe.distillation is not None
        assert recipe.distillation.weight == weight
        assert recipe.train.weight_decay == 1e-7
        assert (recipe.train.warmup, recipe.pruning.every) == (1000, 1000)
        assert recipe.pruning.score == "snip_momentum"
        epoch = 88_524 / batch
        assert recipe.train.steps == pytest.approx(10 * epoch, rel=1e-3)
        assert recipe.pruning.end == pytest.approx(6 * epoch, rel=1e-3)
        assert (recipe.data.length, recipe.data.stride) == (384, 128)


def test_a_bare_name_is_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _demo.shipped("digits") == _demo.recipes() / "digits.toml"
    with pytest.raises(FlaxslimError, match="no such recipe") as caught:
        _demo.shipped("configs/digits.toml")
    assert "mend:     flaxslim run digits runs" in str(caught.value)
    with pytest.raises(FlaxslimError, match=r"are bloom_1b7, digits, (.|\n)*in configs/") as caught:
        _demo.shipped("none")
    assert "flaxslim run" not in str(caught.value)
    (tmp_path / "digits").mkdir()  # an output of that name
    assert _demo.shipped("digits") == _demo.recipes() / "digits.toml"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").touch()
    assert _demo.shipped("digits") == Path("digits")


def test_an_installed_recipe_writes_to_where_the_command_runs(tmp_path, monkeypatch):
    text = (_demo.recipes() / "digits.toml").read_text()
    (tmp_path / "digits.toml").write_text(text)
    beside = read(tmp_path / "digits.toml", files=False).recipe
    assert beside.output.folder == tmp_path.parent / "out" / "digits"
    monkeypatch.setattr(_recipe_book, "PACKAGED", tmp_path)
    installed = read(tmp_path / "digits.toml", files=False).recipe
    assert installed.output.folder == Path("out/digits")


def test_files_that_are_not_there_are_mistakes_unless_they_may_be():
    path = _demo.recipes() / "squad_bert_base.toml"
    missing = read(path, ["data.train=nowhere.json"], files=False).missing
    assert any("--set data.train" in str(one) for one in missing)
    with pytest.raises(FlaxslimError, match="there is no such file"):
        read(path, ["data.train=nowhere.json"])


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 250, 1000])
def test_the_demo_stretches_its_recipe(steps):
    recipe = read(_demo.recipes() / "digits.toml", _demo.overrides(steps)).recipe
    assert (recipe.train.steps, recipe.train.dense_steps) == (steps, steps)


def test_the_demo_is_its_recipe():
    path = _demo.recipes() / "digits.toml"
    assert read(path).recipe == read(path, _demo.overrides(100)).recipe


def test_choices_are_those_of_the_library():
    from flaxslim.training._score import SCORES

    known = {*typing.get_args(typing.get_type_hints(Pruning)["score"])}
    # Those by activations need a loop that hands them over.
    assert known == {*SCORES} - {"activation", "wanda"}
