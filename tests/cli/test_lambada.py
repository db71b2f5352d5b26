"""The recipes of the rows that this tool's ancestor published, to the end on tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flaxslim
from cli.tiny import tiny
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.cli._demo import recipes
from flaxslim.cli._evaluate import _passages, metric
from flaxslim.errors import CalibrationError

# The recipe, and a model of its family.
FAMILIES = {
    "opt_1.3b": "FlaxOPTForCausalLM",
    "opt_2.7b": "FlaxOPTForCausalLM",
    "gptj_6b": "FlaxGPTJForCausalLM-none",
    "llama_7b": "FlaxLlamaForCausalLM",
    "bloom_1b7": "FlaxBloomForCausalLM",
}
WORDS = [f"w{i}" for i in range(98)]  # of the 99 tokens of these models


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 20))) for _ in range(count)]


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """A tiny model with a tokenizer of whole words, and the two files of a recipe."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    params, cfg = tiny(request.param)
    source = flaxslim.save(tmp_path / "model", params, cfg)
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(source)
    for name, count in (("pile", 60), ("lambada", 24)):
        lines = [json.dumps({"text": text}) for text in texts(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recipe_says_what_the_row_was(name, run):
    result = run("run", recipes() / f"{name}.toml", "--dry-run")
    assert result.code == 0, result.err
    assert "--keep 0.9" in result.out
    assert "--evaluate lambada" in result.out


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        # Of the ordinary run: one whose widths its config can say, and one whose it cannot.
        pytest.param(
            name, family, marks=() if name in ("llama_7b", "bloom_1b7") else pytest.mark.long
        )
        for name, family in FAMILIES.items()
        if name != "opt_2.7b"
    ],
    indirect=["folder"],
)
def test_the_recipe_runs_to_its_end(name, folder, run):
    said = {
        "source": str(folder / "model"),
        "calibration": str(folder / "pile.jsonl"),
        "evaluation": str(folder / "lambada.jsonl"),
        "length": 16,
    }
    result = run(
        "run", recipes() / f"{name}.toml", "--out", folder / "out",
        *(x for key, value in said.items() for x in ("--set", f"{key}={value}")),
    )  # fmt: skip
    assert result.code == 0, result.err
    record = json.loads((folder / "out" / "flaxslim.json").read_text())
    assert record["prune"]["scores"].keys() == {"dense", "pruned"}
    row = record["prune"]["report"]["rows"][0]
    assert row["after"] < row["before"]
    before, after = (sum(x.size for x in _leaves(folder / name)) for name in ("model", "out"))
    assert after < before


def _leaves(folder: Path) -> list[Any]:
    return list(flatten(read(folder).params).values())


@pytest.mark.parametrize("folder", ["FlaxLlamaForCausalLM"], indirect=True)
def test_the_last_word_counts_only_if_all_of_it_is_likeliest(folder):
    """Against the definition, without padding; as many passages end right as wrong."""
    from transformers import AutoTokenizer, FlaxLlamaForCausalLM

    model: Any = FlaxLlamaForCausalLM.from_pretrained(folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    lines = []
    for length in (5, 9):
        ids = np.random.default_rng(0).integers(1, 99, (8, length))
        best = np.asarray(model(ids).logits[:, -1].argmax(-1))
        last = np.where(np.arange(8) % 2, best, (best + 1) % 99)
        for row in np.concatenate([ids, last[:, None]], 1):
            lines.append(json.dumps({"text": tokenizer.decode(row)}))
    data = folder / "lambada.jsonl"
    data.write_text("\n".join(lines))
    measure: Any = metric("lambada", data)
    found = measure(FlaxLlamaForCausalLM, model.params, model.config, folder / "model")
    assert found == {"lambada": 50.0}


def test_a_line_without_a_passage_is_named(tmp_path):
    data = tmp_path / "lambada.jsonl"
    data.write_text('{"text": "one two"}\n{"txt": "three four"}')
    with pytest.raises(CalibrationError, match=r"lambada\.jsonl:2"):
        list(_passages(data))
