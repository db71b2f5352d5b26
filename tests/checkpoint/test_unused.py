"""Trained tensors that a Flax class has no place for are never dropped in silence."""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers as tf

from flaxslim import errors
from flaxslim._tree import flatten
from flaxslim.checkpoint import load, read, save, to_flax, unused
from flaxslim.checkpoint._names import dotted

_SIZES: Any = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A PyTorch classifier whose family has no Flax class with such a head."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("classifier")
    tf.LlamaForSequenceClassification(tf.LlamaConfig(**_SIZES)).save_pretrained(folder)
    return folder


def test_a_head_without_a_place_is_told(classifier):
    assert unused(read(classifier)) == ("score.weight",)
    with pytest.warns(UserWarning, match="have no place in FlaxLlama.* are left out: score.weight"):
        params, cfg = load(classifier)
    assert "score" not in params
    assert unused(params, cfg) == ()


@pytest.mark.parametrize("format", ["flax", "flax-safetensors"])
def test_a_conversion_that_would_lose_it_is_refused(classifier, tmp_path, format):
    found = read(classifier)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        params, cfg = load(found)
    for tree, like in ((found.params, None), (found.params, found), (params, found)):
        with pytest.raises(errors.UnsupportedFormatError, match="would be lost") as caught:
            save(tmp_path / "out", tree, cfg, like=like, format=format)
        assert "score.weight" in str(caught.value)
        assert "keep the PyTorch format" in str(caught.value)
    assert not list(tmp_path.iterdir())

    # In its own format the head stays; a tree without it may go to Flax.
    kept = save(tmp_path / "torch", params, cfg, like=found)
    score = dotted(read(kept).params)["score.weight"]
    np.testing.assert_array_equal(score, dotted(found.params)["score.weight"])
    body = {"model": found.params["model"]}
    cfg.architectures = ["LlamaModel"]
    save(tmp_path / "flax", body, cfg, format=format)
    assert flatten(load(tmp_path / "flax")[0]).keys() == flatten(params).keys()


def test_four_are_named_and_all_counted():
    rng = np.random.default_rng(0)
    cfg = tf.BertConfig(**_SIZES, architectures=["BertModel"])
    extra = {f"head.{n}.weight": rng.standard_normal((2, 3), np.float32) for n in range(6)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_flax({**extra, "pooler.dense.weight": np.ones((32, 32), np.float32)}, cfg)
    told = [str(w.message) for w in caught if "no place" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith("6 of 7 tensors")
    assert "head.3.weight ..." in told[0]
    assert "head.4.weight" not in told[0]


def _sinusoids(n, d):
    angles = np.arange(n)[:, None] / 10000 ** (np.arange(d // 2)[None] / (d // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


_WORDS = np.random.default_rng(0).standard_normal((61, 32)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "array", "harmless"),
    [
        ("embeddings.position_ids", np.arange(32)[None], True),
        ("embeddings.position_ids", np.ones((1, 32), np.float32), False),
        ("encoder.rotary_emb.inv_freq", np.ones(4, np.float32), True),
        ("norm.num_batches_tracked", np.array(3), True),
        ("h.0.attn.masked_bias", np.array(-1e4, np.float32), True),
        ("h.0.attn.bias", np.tril(np.ones((1, 1, 8, 8), np.uint8)), True),
        ("h.0.attn.bias", np.tril(np.ones((1, 1, 8, 8), np.float32)), True),
        ("h.0.attn.bias", np.ones((1, 1, 8, 8), np.float32), False),
        ("head.bias", np.arange(8, dtype=np.float32), False),
        ("head.weight", np.zeros((8, 8), np.float32), False),
        ("head.qweight", np.ones((8, 8), np.int32), False),
        ("decoder.weight", _WORDS, True),
        ("decoder.weight", _WORDS + 1, False),
        ("encoder.embed_positions.weight", _sinusoids(20, 8).astype(ml_dtypes.bfloat16), True),
        ("encoder.embed_positions.weight", np.ones((20, 8), np.float32), False),
    ],
)
def test_what_is_harmless(name, array, harmless):
    cfg = tf.BertConfig(**_SIZES, architectures=["BertModel"])
    tensors = {"embeddings.word_embeddings.weight": _WORDS, name: array}
    assert unused(tensors, cfg) == (() if harmless else (name,))


def test_zeros_are_tied_to_no_other_zeros():
    cfg = tf.BertConfig(**_SIZES, architectures=["BertModel"])
    tensors = {"pooler.dense.weight": np.zeros((32, 32)), "head.weight": np.zeros((32, 32))}
    assert unused(tensors, cfg) == ("head.weight",)


def test_tied_biases_follow():
    """BertForPreTraining stores the bias of its tied head twice."""
    bias = np.arange(61, dtype=np.float32)
    cfg = tf.BertConfig(**_SIZES, architectures=["BertForMaskedLM"])
    tensors = {
        "bert.embeddings.word_embeddings.weight": _WORDS,
        "cls.predictions.bias": bias,
        "cls.predictions.decoder.bias": bias,
    }
    assert unused(tensors, cfg) == ()
    tensors["cls.predictions.decoder.bias"] = bias[::-1]
    assert unused(tensors, cfg) == ("cls.predictions.decoder.bias",)
