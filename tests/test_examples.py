"""The example and the command line on trained models: slimming changes nothing but the size."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from kill import kill
from scripts import loaded

import flaxslim
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.cli import main

pytestmark = pytest.mark.long  # `.ci/run` has a step for them

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _stock_rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    return loaded(EXAMPLES / "convert_checkpoint.py")


def _differences(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"embeddings differ by (\S+)", text)]


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


@pytest.fixture
def tiny_encoder(tmp_path, convert) -> Path:
    """A BERT of random weights with PyTorch names, and a tokenizer that knows every letter."""
    from transformers import BertConfig, FlaxBertModel

    letters = sorted({letter for text in convert.SENTENCES for letter in text.lower()} - {" "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    cfg = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=70,
        initializer_range=0.3,
        architectures=["BertModel"],
    )
    folder = flaxslim.save(tmp_path / "tiny", FlaxBertModel(cfg).params, cfg, format="torch")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def test_conversion_example(convert, tiny_encoder, tmp_path, capsys):
    convert.main(str(tiny_encoder), tmp_path / "slim")
    out = capsys.readouterr().out
    found = _differences(out)
    assert len(found) == 1 + _has_torch()
    assert max(found) <= 1e-5
    assert "intermediate_size 70 -> 49" in out
    names = {path.name for path in tiny_encoder.iterdir()} | {"README.md", "flaxslim.json"}
    assert {path.name for path in (tmp_path / "slim").iterdir()} == names


def test_difference_of_the_example_would_show(convert, tiny_encoder, tmp_path):
    """What is measured is not blind: pruning itself changes the embeddings."""
    from transformers import AutoTokenizer, FlaxBertModel

    params, cfg = flaxslim.load(tiny_encoder)
    pruned = flaxslim.save(tmp_path / "pruned", convert.prune(params, 0.3), cfg, like=tiny_encoder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    batch = dict(tokenizer(convert.SENTENCES, padding=True, return_tensors="np"))
    dense, less = (
        convert.embed_flax(FlaxBertModel.from_pretrained(folder, from_pt=True), batch)
        for folder in (tiny_encoder, pruned)
    )
    assert convert.difference(dense, less) > 1e-3


def test_conversion_example_on_a_trained_sentence_encoder(convert, data, tmp_path, capsys):
    source = data / "sentence-encoder"
    convert.main(str(source), tmp_path / "slim")
    out = capsys.readouterr().out
    found = _differences(out)
    assert len(found) == 1 + _has_torch()
    assert max(found) <= 1e-5
    assert "intermediate_size 1536 -> 1076" in out
    # Everything that sentence-transformers needs goes along.
    for name in ("modules.json", "1_Pooling/config.json", "tokenizer.json"):
        assert (tmp_path / "slim" / name).read_bytes() == (source / name).read_bytes()


def test_command_line_on_a_trained_llama(data, tmp_path):
    """stories260K, a Flax msgpack: 40% of each layer dies, and the stock class sees no change."""
    from transformers import FlaxLlamaForCausalLM

    params, cfg = flaxslim.load(data / "stories260K")
    pruned, _ = kill(params, flaxslim.LLAMA_FFN.sites(params), low=0.4, high=0.4)
    zeroed = flaxslim.save(tmp_path / "zeroed", pruned, cfg, like=data / "stories260K")
    assert main(["slim", str(zeroed), str(tmp_path / "slim")]) == 0

    with np.load(data / "stories260K" / "tinystories_tokens.npz") as tokens:
        ids, mask = tokens["eval_ids"][:4], tokens["eval_mask"][:4]
    results = {}
    for name, folder in {
        "dense": data / "stories260K",
        "zeroed": zeroed,
        "slim": tmp_path / "slim",
    }.items():
        model: Any = FlaxLlamaForCausalLM.from_pretrained(folder)
        results[name] = _logits(model, ids, mask)
        width = read(folder).config.intermediate_size
        kernel = model.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        assert kernel.shape == (64, width)
    assert read(tmp_path / "slim").config.intermediate_size == 172 - int(0.4 * 172)

    assert _apart(results["zeroed"], results["slim"]) <= 1e-5
    assert _apart(results["dense"], results["slim"]) > 0.1
    zeroed_ppl, slim_ppl = (_perplexity(results[name], ids, mask) for name in ("zeroed", "slim"))
    assert f"{zeroed_ppl:.4g}" == f"{slim_ppl:.4g}"
    assert _perplexity(results["dense"], ids, mask) < zeroed_ppl
    record = json.loads((tmp_path / "slim" / "flaxslim.json").read_text())
    assert record["proof"]["ok"]
    assert set(flatten(read(tmp_path / "slim").params)) == set(flatten(params))


def _logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p, i, m: model(i, attention_mask=m, params=p).logits)(
            model.params, ids, mask
        )
    return np.asarray(logits)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def _perplexity(logits: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of the next token, where there is one."""
    logs = np.asarray(jax.nn.log_softmax(logits[:, :-1].astype(np.float64)))
    picked = np.take_along_axis(logs, ids[:, 1:, None].astype(int), -1)[..., 0]
    return float(np.exp(-picked[mask[:, 1:] == 1].mean()))


def test_discovery_example(capsys):
    """Five kinds of models, each without a spec: found, cut, and the same function."""
    example = loaded(EXAMPLES / "discover_anything.py")
    lines = {line.name: line for line in example.main()}
    assert list(lines) == ["Linen", "nnx", "pytree", "ResNet", "ViT"]
    for line in lines.values():
        assert line.equal
        assert line.difference <= 1e-5
        assert line.after < 0.8 * line.before
    out = capsys.readouterr().out
    assert "-> x * sin(2 * x) ** 2 ->" in out
    assert "width heads" in out
    assert 'in/0 "l d f" * in/1 "l d f"' in out
    assert "discovered, cut, proven" in out


def test_discovery_example_kills_what_its_spec_reads():
    """What is compared is not the model before pruning: that one puts out something else."""
    example = loaded(EXAMPLES / "discover_anything.py")
    shapes = {"up": jax.ShapeDtypeStruct((32, 8), "float32"),
              "down": jax.ShapeDtypeStruct((8, 4), "float32")}  # fmt: skip
    spec = flaxslim.Spec(name="MLP", pairs=flaxslim.Pair(first="up", second="down"))
    params = example.randomly(shapes)
    killed = example.kill(params, spec)
    dead = ~np.asarray(killed["down"]).any(axis=1)
    assert 2 <= dead.sum() <= 4
    np.testing.assert_array_equal(killed["down"][~dead], params["down"][~dead])


def test_a_sentence_encoder_is_shrunk_and_served(data, tmp_path, capsys):
    example = loaded(EXAMPLES / "shrink_sentence_encoder.py")
    example.main(
        data / "sentence-encoder", data / "stsb" / "sts-train.csv", tmp_path / "small", "fast"
    )
    out = capsys.readouterr().out
    assert "parameters: 22,713,216 -> 19,169,664" in out
    assert float(re.findall(r"embeddings: ([0-9.]+) at least", out)[0]) > 0.7
