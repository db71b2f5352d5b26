"""Every conversion between PyTorch and Flax names is checked against the stock classes of both."""

import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers as tf
from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

from flaxslim import errors
from flaxslim._compat import parameter_shapes
from flaxslim._tree import flatten
from flaxslim.checkpoint import load, read, save, to_flax
from flaxslim.checkpoint._names import dotted, table, to_torch

_TEXT: Any = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT: Any = {**_TEXT, "intermediate_size": 40, "max_position_embeddings": 32}
_LLAMA: Any = {**_BERT, "num_key_value_heads": 2}
_SEQ2SEQ: Any = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_IMAGE: Any = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
}
_T5: Any = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_CLIP: Any = {"projection_dim": 24}


def _encoder_decoder():
    encoder, decoder = tf.BertConfig(**_BERT), tf.BertConfig(**_BERT)
    return tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


# PyTorch class -> its tiny config, made when it is used.
FAMILIES = {
    "BertModel": lambda: tf.BertConfig(**_BERT),
    "BertForMaskedLM": lambda: tf.BertConfig(**_BERT),
    "BertForSequenceClassification": lambda: tf.BertConfig(**_BERT),
    "GPT2LMHeadModel": lambda: tf.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=40
    ),
    "LlamaForCausalLM": lambda: tf.LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "GemmaForCausalLM": lambda: tf.GemmaConfig(**_LLAMA, head_dim=8),
    "OPTForCausalLM": lambda: tf.OPTConfig(
        vocab_size=61,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=40,
        max_position_embeddings=32,
    ),
    "T5ForConditionalGeneration": lambda: tf.T5Config(**_T5),
    "MT5ForConditionalGeneration": lambda: tf.MT5Config(**_T5, tie_word_embeddings=False),
    "BartForConditionalGeneration": lambda: tf.BartConfig(**_SEQ2SEQ),
    "MarianMTModel": lambda: tf.MarianConfig(**_SEQ2SEQ),
    "WhisperForConditionalGeneration": lambda: tf.WhisperConfig(
        **{**_SEQ2SEQ, "pad_token_id": 0},
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
    ),
    "ViTForImageClassification": lambda: tf.ViTConfig(**_IMAGE),
    "BeitForImageClassification": lambda: tf.BeitConfig(
        **_IMAGE, vocab_size=61, use_relative_position_bias=True
    ),
    "Dinov2ForImageClassification": lambda: tf.Dinov2Config(
        **_IMAGE, mlp_ratio=2, use_swiglu_ffn=True
    ),
    "CLIPModel": lambda: tf.CLIPConfig(
        text_config={**_BERT, **_CLIP}, vision_config={**_IMAGE, **_CLIP}, **_CLIP
    ),
    "Wav2Vec2ForCTC": lambda: tf.Wav2Vec2Config(
        **{**_TEXT, "vocab_size": 12},
        intermediate_size=40,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    ),
    "DistilBertForMaskedLM": lambda: tf.DistilBertConfig(
        vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=32
    ),
    "AlbertForMaskedLM": lambda: tf.AlbertConfig(**_BERT, embedding_size=16),
    "BigBirdForQuestionAnswering": lambda: tf.BigBirdConfig(
        **_BERT, attention_type="original_full"
    ),
    "XLMRobertaForTokenClassification": lambda: tf.XLMRobertaConfig(**_BERT),
    "EncoderDecoderModel": _encoder_decoder,
    "ResNetForImageClassification": lambda: tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
    ),
}


def _torch_model(name):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = getattr(tf, name)(FAMILIES[name]()).eval()
    with torch.no_grad():  # norms and biases would all be ones and zeros, and hide a mix-up
        for path, tensor in model.named_parameters():
            if "embed_positions" not in path:  # PyTorch computes Marian's, whatever is stored
                tensor.add_(torch.randn_like(tensor) * 0.02)
    return model


def _same_torch(name, folder, model):
    loaded, info = getattr(tf, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    want, have = model.state_dict(), loaded.state_dict()
    assert want.keys() == have.keys()
    for key in want:
        np.testing.assert_array_equal(have[key].numpy(), want[key].numpy(), err_msg=key)


def _same(have, want):
    have, want = flatten(have), flatten(want)
    assert have.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(np.asarray(have[path]), np.asarray(want[path]), path)


def _stock_conversion(folder, cls, cfg):
    shapes = parameter_shapes(cls, cfg)
    model = SimpleNamespace(params=shapes, base_model_prefix=cls.base_model_prefix)
    flat = flatten(convert_pytorch_state_dict_to_flax(dotted(read(folder).params), model))
    return {path: leaf for path, leaf in flat.items() if path in flatten(shapes)}


@pytest.mark.filterwarnings("error:.*tensors of the Flax class are not in the files")
@pytest.mark.filterwarnings("error:.*have no place in")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_torch_model_comes_back_bitwise_through_flax(name, tmp_path):
    model = _torch_model(name)
    model.save_pretrained(tmp_path / "torch")
    params, cfg = load(tmp_path / "torch")

    save(tmp_path / "like", params, cfg, like=tmp_path / "torch")
    _same_torch(name, tmp_path / "like", model)
    if name != "ResNetForImageClassification":  # PyTorch counts batches, Flax does not
        save(tmp_path / "plain", params, cfg, format="torch")
        _same_torch(name, tmp_path / "plain", model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_flax_names_are_those_that_transformers_gives(name, tmp_path):
    """transformers' own conversion of the same files, for the tree of the stock Flax class."""
    _torch_model(name).save_pretrained(tmp_path)
    params, cfg = load(tmp_path)
    _same(params, _stock_conversion(tmp_path, getattr(tf, f"Flax{name}"), cfg))


def test_the_stock_class_has_the_same_parameters_after_from_pretrained(tmp_path):
    _torch_model("BertModel").save_pretrained(tmp_path)
    model: Any = tf.FlaxBertModel.from_pretrained(tmp_path)
    _same(load(tmp_path)[0], model.params)


def test_a_head_that_the_config_ties_is_the_embedding(tmp_path):
    """FlaxLlamaForCausalLM ties nothing, so transformers would make the head up at random."""
    pytest.importorskip("torch")
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head" not in read(tmp_path / "tied").params
    params, cfg = load(tmp_path / "tied")
    embedding = params["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(params["lm_head"]["kernel"], embedding.T)
    save(tmp_path / "again", params, cfg, like=tmp_path / "tied")
    assert "lm_head" not in read(tmp_path / "again").params


def test_tensors_without_a_place_in_flax_are_kept_and_tied_ones_follow(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tf.BertForMaskedLM(tf.BertConfig(**_BERT)).save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    words = "bert.embeddings.word_embeddings.weight"
    state["cls.predictions.decoder.weight"] = state[words].clone()
    state["cls.seq_relationship.weight"] = torch.ones(2, 32)
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})

    with pytest.warns(UserWarning, match="cls.seq_relationship.weight"):
        params, cfg = load(tmp_path / "a")
    assert "seq_relationship" not in params["cls"]
    table = params["bert"]["embeddings"]["word_embeddings"]
    table["embedding"] = table["embedding"] + 1
    save(tmp_path / "b", params, cfg, like=tmp_path / "a")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert after.keys() == state.keys()
    assert torch.equal(after["cls.seq_relationship.weight"], torch.ones(2, 32))
    assert torch.equal(after[words], state[words] + 1)
    assert torch.equal(after["cls.predictions.decoder.weight"], state[words] + 1)


@pytest.mark.parametrize(
    ("saved", "wanted"), [("BertForMaskedLM", "BertModel"), ("BertModel",) * 2]
)
def test_a_prefix_is_dropped_or_added(saved, wanted):
    model = _torch_model(saved)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    cfg = tf.BertConfig(**_BERT, architectures=[wanted])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = to_flax({name: state[name] for name in state}, cfg, tf.FlaxBertModel)
    assert "encoder" in params
    lacks_pooler = saved == "BertForMaskedLM"
    assert ("pooler" not in params) == lacks_pooler
    messages = [str(w.message) for w in caught if "not in the files" in str(w.message)]
    assert bool(messages) == lacks_pooler
    if messages:
        assert "pooler/dense/bias, pooler/dense/kernel" in messages[0]

    base = _torch_model("BertModel")
    state = {name: tensor.numpy() for name, tensor in base.state_dict().items()}
    with (
        pytest.warns(UserWarning, match="cls/predictions"),
        pytest.warns(UserWarning, match=r"left out: pooler\.dense\.bias, pooler\.dense\.weight"),
    ):
        params = to_flax(state, cfg, tf.FlaxBertForMaskedLM)
    assert set(params) == {"bert"}


def test_old_layer_norm_names_are_known_and_kept(tmp_path):
    tensors = {"LayerNorm.gamma": 1, "LayerNorm.beta": 1, "dense.weight": 2}
    names = table(tensors, ["LayerNorm/scale", "LayerNorm/bias", "dense/kernel"])
    assert {name: new.path for name, new in names.items()} == {
        "LayerNorm.gamma": "LayerNorm/scale",
        "LayerNorm.beta": "LayerNorm/bias",
        "dense.weight": "dense/kernel",
    }
    assert names["dense.weight"].axes == names["dense.weight"].back == (1, 0)


def test_the_table_undoes_itself_for_convolutions():
    names = table({"conv.weight": 4, "line.weight": 3}, ["conv/kernel", "line/kernel"])
    array = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    new = names["conv.weight"]
    assert array.transpose(new.axes).shape == (5, 7, 3, 2)
    np.testing.assert_array_equal(array.transpose(new.axes).transpose(new.back), array)
    assert names["line.weight"].axes == (2, 1, 0)


def test_the_general_rule_keeps_dtypes():
    kernel = np.ones((3, 5), ml_dtypes.bfloat16)
    leaves = to_torch({"dense/kernel": kernel, "norm/scale": kernel[0]})
    assert leaves["dense.weight"].shape == (5, 3)
    assert leaves["dense.weight"].numpy().dtype == ml_dtypes.bfloat16
    assert leaves["norm.weight"].shape == (5,)


def test_a_config_that_contradicts_the_tensors_is_refused():
    model = _torch_model("BertModel")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    cfg = tf.BertConfig(**{**_BERT, "intermediate_size": 48}, architectures=["BertModel"])
    with pytest.raises(errors.ConfigError, match="sizes contradict the tensors") as caught:
        to_flax(state, cfg)
    assert "shape (32, 40)" in str(caught.value) or "shape (40," in str(caught.value)


def test_torch_is_not_needed(tmp_path):
    """PyTorch-named safetensors in and out in a process where `import torch` fails."""
    _torch_model("BertModel").save_pretrained(tmp_path / "torch")
    code = f"""
import sys
sys.modules["torch"] = None
from flaxslim.checkpoint import load, save
params, cfg = load({str(tmp_path / "torch")!r})
save({str(tmp_path / "again")!r}, params, cfg, like={str(tmp_path / "torch")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("torch", "again"))
    assert len(a) == len(b)


def test_the_real_sentence_encoder_is_what_transformers_loads(data):
    params, cfg = load(data / "sentence-encoder")
    _same(params, _stock_conversion(data / "sentence-encoder", tf.FlaxBertModel, cfg))
