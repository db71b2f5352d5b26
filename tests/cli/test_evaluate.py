"""What `--evaluate` measures, against its definition; and the models that it refuses."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from initialised import drawn
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from flaxslim.cli import _evaluate
from flaxslim.errors import CalibrationError

POSITIONS = 40  # no multiple of what batches are padded to
WORDS = [
    "[PAD]",
    "[UNK]",
    "[SEP]",
    *["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far"],
]
LINE = "the cat sat on a mat"
BERT = transformers.BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=8, max_position_embeddings=POSITIONS, num_labels=2,
)  # fmt: skip
GPT2 = transformers.GPT2Config(
    vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=POSITIONS,
)  # fmt: skip
VIT = transformers.ViTConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4,
    patch_size=2,
)  # fmt: skip
T5 = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)


@pytest.fixture
def tokenizer(request, tmp_path) -> Path:
    """The folder of one that ends each text by the token that the test asks for."""
    end = getattr(request, "param", "")
    words: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        words.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, WORDS.index(end))]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]"
    ).save_pretrained(tmp_path)
    return tmp_path


def measured(name: str, cls: str, cfg: Any, data: Path, params: Any = None) -> Any:
    """A metric of random weights, or of those given; the tokenizer is beside the data."""
    measure: Any = _evaluate.metric(name, data)
    kind = getattr(transformers, cls)
    return measure(kind, drawn(kind, cfg) if params is None else params, cfg, data.parent)


def pairs(*scores: int, text: str = "ran") -> str:
    rows = (["", "", "", "", str(n), LINE, f"the dog {' '.join([text] * n)} far"] for n in scores)
    return "\n".join("\t".join(row) for row in rows)


REFUSED = {
    "bidirectional": ("perplexity", "FlaxBertForMaskedLM", BERT, "sees the token that it is asked"),
    "of classes": ("perplexity", "FlaxBertForSequenceClassification", BERT, "no logits of tokens"),
    "without a head": ("lambada", "FlaxGPT2Model", GPT2, "no logits of tokens"),
    "of two texts": ("lambada", "FlaxT5ForConditionalGeneration", T5, "reads two"),
    "of pictures": ("stsb", "FlaxViTModel", VIT, "does not run on texts alone"),
    "with a head": ("stsb", "FlaxBertForMaskedLM", BERT, "no hidden states"),
}


@pytest.mark.parametrize(("name", "cls", "cfg", "told"), REFUSED.values(), ids=REFUSED)
def test_a_metric_of_other_models_is_refused(name, cls, cfg, told, tokenizer):
    data = tokenizer / "data.txt"
    data.write_text(pairs(1, 2, 3) if name == "stsb" else f"{LINE}\n" * 4)
    with pytest.raises(CalibrationError, match=told):
        measured(name, cls, cfg, data)


def test_perplexity_is_of_all_rows(tmp_path):
    cls: Any = transformers.FlaxGPT2LMHeadModel
    ids = np.random.default_rng(0).integers(3, 20, (3, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[2, 7:] = 0
    np.savez(tmp_path / "rows.npz", eval_ids=ids, eval_mask=mask)
    params = drawn(cls, GPT2)
    found = measured("perplexity", cls.__name__, GPT2, tmp_path / "rows.npz", params)
    logits = cls(GPT2)(ids, attention_mask=mask, params=params).logits
    likely = jax.nn.log_softmax(logits[:, :-1])
    own = jnp.take_along_axis(likely, ids[:, 1:, None], -1)[..., 0]
    expected = float(jnp.exp(-(own * mask[:, 1:]).sum() / mask[:, 1:].sum()))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_of_texts_wherever_they_stand_and_however_long_they_are(tmp_path):
    """Texts padded at the left, and one that is cut into two, have that of the same, padded."""
    params = drawn(transformers.FlaxGPT2LMHeadModel, GPT2)
    rng, sizes = np.random.default_rng(0), (POSITIONS, POSITIONS, POSITIONS, 12)
    texts = [rng.integers(3, 20, n).astype(np.int32) for n in sizes]
    found = {}
    for side in ("left", "right"):
        pads = [[(0, POSITIONS - n), (POSITIONS - n, 0)][side == "left"] for n in sizes]
        ids = np.stack([np.pad(x, pad) for x, pad in zip(texts, pads, strict=True)])
        mask = np.stack([np.pad(np.ones_like(x), pad) for x, pad in zip(texts, pads, strict=True)])
        np.savez(tmp_path / f"{side}.npz", eval_ids=ids, eval_mask=mask)
    long = [np.concatenate(texts[:2]), np.concatenate([*texts[2:], np.zeros(28, np.int32)])]
    mask = np.arange(2 * POSITIONS) < np.array([[2 * POSITIONS], [POSITIONS + 12]])
    np.savez(tmp_path / "long.npz", eval_ids=np.stack(long), eval_mask=mask)
    for name in ("left", "right", "long"):
        data = tmp_path / f"{name}.npz"
        found |= {name: measured("perplexity", "FlaxGPT2LMHeadModel", GPT2, data, params)}
    first = found["right"]["perplexity"]
    assert [x["perplexity"] for x in found.values()] == pytest.approx([first] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "cfg"),
    [
        ("FlaxGPT2LMHeadModel", GPT2),
        ("FlaxBertForCausalLM", transformers.BertConfig(**{**BERT.to_dict(), "is_decoder": True})),
    ],
)
@pytest.mark.parametrize("words", [3, POSITIONS - 1, 2 * POSITIONS + 5])
def test_perplexity_is_of_all_tokens_of_a_text(cls, cfg, words, tokenizer):
    """Windows of what the model takes, and one of the rest; also of a class called BertLMHead."""
    text = np.random.default_rng(words).choice(WORDS[3:], words)
    cfg = type(cfg)(**{**cfg.to_dict(), "architectures": [cls[4:].replace("ForC", "LMHead")]})
    ids = np.array([WORDS.index(word) for word in text], np.int32)
    data, params = tokenizer / "data.txt", drawn(getattr(transformers, cls), cfg)
    data.write_text("".join(f"{word}{' ' if i % 7 else chr(10)}" for i, word in enumerate(text)))
    found = measured("perplexity", cls, cfg, data, params)
    model, lost = getattr(transformers, cls)(cfg), []
    for start in range(0, words, POSITIONS):
        own = ids[None, start : start + POSITIONS]
        likely = jax.nn.log_softmax(model(own, params=params).logits[0, :-1])
        lost += [-float(row[i]) for row, i in zip(likely, own[0, 1:], strict=True)]
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(lost)), rel=1e-4)


@pytest.mark.parametrize("tokenizer", ["", "[SEP]"], indirect=True)
def test_what_ends_each_text_is_no_word(tokenizer):
    """A model that says "the" whatever came before, and passages of which three end so."""
    params = drawn(transformers.FlaxGPT2LMHeadModel, GPT2)["transformer"]
    params["ln_f"]["scale"] = np.zeros_like(params["ln_f"]["scale"])
    words = params["wte"]["embedding"]
    words[:] = np.random.default_rng(1).standard_normal(words.shape) / 9
    params["ln_f"]["bias"] = words[WORDS.index("the")] = np.ones(8, np.float32)
    data = tokenizer / "passages.txt"
    data.write_text("cat sat on a mat the\ndog ran the\nfar mat the\na dog ran far")
    found = measured("lambada", "FlaxGPT2LMHeadModel", GPT2, data, {"transformer": params})
    assert found == {"lambada": 75.0}


def test_texts_are_as_long_as_the_model_takes(tokenizer):
    passages, table = tokenizer / "passages.txt", tokenizer / "sts.tsv"
    passages.write_text("\n".join([" ".join(["cat"] * (POSITIONS - 2))] * 3))
    assert 0 <= measured("lambada", "FlaxGPT2LMHeadModel", GPT2, passages)["lambada"] <= 100
    table.write_text(pairs(10, 30, 60, 90))
    assert abs(measured("stsb", "FlaxBertModel", BERT, table)["spearman"]) <= 100


def test_a_token_that_the_model_lacks_is_told(tokenizer):
    data = tokenizer / "passages.txt"
    data.write_text(f"{LINE}\n")
    few = transformers.GPT2Config(**{**GPT2.to_dict(), "vocab_size": 5})
    with pytest.raises(CalibrationError, match="not in the model's vocabulary"):
        measured("lambada", "FlaxGPT2LMHeadModel", few, data)
