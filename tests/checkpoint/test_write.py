"""What is written is what the stock classes load; what fails leaves nothing behind."""

import errno
import io
import json
import os
import shutil
import subprocess
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import freeze
from flax.serialization import to_bytes
from initialised import drawn
from safetensors import safe_open
from transformers import (
    BertConfig,
    FlaxBertForSequenceClassification,
    FlaxBertModel,
    FlaxLlamaForCausalLM,
    LlamaConfig,
)

from flaxslim import errors
from flaxslim._tree import flatten, replace
from flaxslim.checkpoint import _atomic, _pour, _safetensors, _write, load, read, save
from flaxslim.checkpoint._card import HEADING, with_section
from flaxslim.checkpoint._config import config_text
from flaxslim.checkpoint._leaf import nest
from flaxslim.checkpoint._names import dotted

CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
    architectures=["BertModel"],
)
SIDE = {
    "tokenizer.json": "{}",
    "vocab.txt": "a",
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "modules.json": "[]",
    "1_Pooling/config.json": "{}",
    "2_Dense/model.safetensors": "weights of the module after the encoder",
}
STALE = {
    "tf_model.h5": "x",
    "pytorch_model.bin": "x",
    "rust_model.ot": "x",
    "onnx/model.onnx": "x",
    "onnx/config.json": "{}",
    "training_args.bin": "x",
    "checkpoint-500/config.json": "{}",
    ".gitattributes": "x",
}


@pytest.fixture(scope="module")
def params():
    return drawn(FlaxBertModel, CONFIG)


@pytest.fixture
def source(tmp_path, params):
    """A Flax folder with side files and a card."""
    folder = save(tmp_path / "source", params, CONFIG)
    _put(folder, {**SIDE, "README.md": "---\nlicense: mit\n---\n# Model\n"})
    return folder


def _put(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def _same(have, want):
    have, want = flatten(have), flatten(want)
    assert have.keys() == want.keys()
    for path in want:
        assert np.asarray(have[path]).dtype == np.asarray(want[path]).dtype
        np.testing.assert_array_equal(np.asarray(have[path]), np.asarray(want[path]), path)


def _stock(folder) -> Any:
    return FlaxBertModel.from_pretrained(folder)


def _files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- formats ----------------------------------------------------------------------------------


def test_msgpack_bytes_are_flaxs_own(tmp_path, params):
    folder = save(tmp_path / "a", params, CONFIG)
    in_order = {"a": params["embeddings"], "b": {"s": np.float32(3), "i": np.arange(3)}}
    nested = save(tmp_path / "b", in_order, CONFIG)
    assert _files(folder) == {"config.json", "flax_model.msgpack"}
    written = (nested / "flax_model.msgpack").read_bytes()
    # `flatten` sorts the names of each level.
    ordered = {
        "a": _sorted(params["embeddings"]),
        "b": {"i": np.arange(3), "s": np.array(3.0, "f")},
    }
    assert written == to_bytes(ordered)


def _sorted(node):
    if not isinstance(node, dict):
        return node
    return {key: _sorted(node[key]) for key in sorted(node)}


def test_safetensors_are_read_by_the_library(tmp_path):
    tensors = {
        "a.kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3, dtype=np.int8),
        "c.bias": np.ones(5, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.float64(3.5),
    }
    folder = save(tmp_path / "a", {"x": tensors["a.kernel"]}, CONFIG, format="flax-safetensors")
    assert _files(folder) == {"config.json", "model.safetensors"}
    path = tmp_path / "some.safetensors"
    leaves = {name: _write.Leaf(array=np.asarray(array)) for name, array in tensors.items()}
    _pour.pour(path, _safetensors.pieces(leaves, {"format": "flax"}), lambda _: None)
    with safe_open(path, framework="flax") as file:
        assert file.metadata() == {"format": "flax"}
        for name, array in tensors.items():
            if np.asarray(array).dtype != np.float64:  # jax has 64 bits only when asked
                np.testing.assert_array_equal(file.get_tensor(name), array)
    stored, metadata = _safetensors.stored(path)
    again = _safetensors.mapped(stored)
    assert metadata == {"format": "flax"}
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        assert again[name].dtype == np.asarray(array).dtype
        assert again[name].shape == np.asarray(array).shape
        np.testing.assert_array_equal(again[name], array)
        np.testing.assert_array_equal(np.asarray(stored[name]), array)


@pytest.mark.parametrize("format", ["flax", "flax-safetensors", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_format_comes_back(tmp_path, format, dtype):
    params = drawn(FlaxBertModel, CONFIG, dtype=dtype)
    folder = save(tmp_path / "a", params, CONFIG, format=format)
    _same(load(folder)[0], params)
    again = save(tmp_path / "b", *load(folder), like=folder)
    assert _files(again) == _files(folder)
    _same(load(again)[0], params)


def test_the_stock_class_loads_every_format(tmp_path, params):
    for format in ("flax", "flax-safetensors", "torch"):
        folder = save(tmp_path / format, freeze(params), CONFIG, format=format)
        _same(_stock(folder).params, params)


@pytest.mark.parametrize("dropped", ["0", "1"])
def test_layers_that_were_dropped_do_not_come_back_from_the_checkpoint(tmp_path, params, dropped):
    """What the Flax class has no use for does, and what stands behind the layers that it counts."""
    tree = dotted(read(save(tmp_path / "torch", params, CONFIG, format="torch")).params)
    tree |= {"encoder.layer.2.extra": np.ones(3, np.float32), "other": np.ones(2, np.float32)}
    source = save(tmp_path / "more", nest(tree, "."), CONFIG)
    less: Any = nest(
        {p: x for p, x in flatten(params).items() if f"layer/{dropped}/" not in p}, "/"
    )
    found = dotted(read(save(tmp_path / "out", less, CONFIG, like=source)).params)
    assert found.keys() == {name for name in tree if f"layer.{dropped}." not in name}


def test_shards_stay_shards(tmp_path, params, monkeypatch):
    monkeypatch.setattr(_write, "_SHARD", 20_000)
    for format, naming in (("flax", "flax"), ("torch", "torch")):
        folder = save(tmp_path / format, params, CONFIG, format=format)
        found = read(folder)
        assert found.sharded
        assert found.naming == naming
        assert len(found.weight_files) > 2
        assert max((folder / name).stat().st_size for name in found.weight_files) < 25_000
        again = save(tmp_path / f"{format}2", params, CONFIG, like=folder)
        assert read(again).sharded
        _same(load(again)[0], params)
    _same(_stock(tmp_path / "flax").params, params)


def test_pytorch_shards_are_loaded_by_the_pytorch_class(tmp_path, params, monkeypatch):
    pytest.importorskip("torch")
    from transformers import BertModel

    monkeypatch.setattr(_write, "_SHARD", 20_000)
    folder = save(tmp_path / "a", params, CONFIG, format="torch")
    cls: Any = BertModel
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    words = model.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(words, params["embeddings"]["word_embeddings"]["embedding"])


def test_a_pytorch_tree_as_read_is_written_as_it_was(tmp_path, params):
    folder = save(tmp_path / "a", params, CONFIG, format="torch")
    checkpoint = read(folder)
    config = BertConfig.from_dict({**CONFIG.to_dict(), "layer_norm_eps": 0.5})
    again = save(tmp_path / "b", checkpoint.params, config, like=checkpoint)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert read(again).config.layer_norm_eps == 0.5
    flax = save(tmp_path / "c", checkpoint.params, CONFIG, like=checkpoint, format="flax")
    _same(load(flax)[0], params)


def test_a_dtype_may_be_asked_for(tmp_path, params):
    folder = save(tmp_path / "a", params, CONFIG, dtype="bfloat16")
    leaves = flatten(load(folder)[0])
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(errors.UnsupportedFormatError, match="only cast to a floating-point"):
        save(tmp_path / "b", params, CONFIG, dtype="int8")


def test_jax_leaves_are_written(tmp_path):
    tree = {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16), "count": jnp.arange(2)}}
    folder = save(tmp_path / "a", tree, {"model_type": "homemade", "width": 3})
    found = read(folder)
    _same(found.params, tree)
    assert found.config.width == 3
    assert found.config.model_type == "homemade"
    again = save(tmp_path / "b", found.params, found.config, like=found)
    assert read(again).config.model_type == "homemade"


def test_an_unknown_format(tmp_path, params):
    with pytest.raises(errors.UnsupportedFormatError, match="no such format to write"):
        save(tmp_path / "a", params, CONFIG, format="pickle")


# --- what travels along -----------------------------------------------------------------------


def test_side_files_travel_and_stale_weights_do_not(tmp_path, source, params):
    _put(source, STALE)
    record = {"version": "1.0", "plan": {"kept": [1, 2]}}
    folder = save(tmp_path / "out", params, CONFIG, like=source, record=record)
    own = {"config.json", "flax_model.msgpack", "README.md", "flaxslim.json"}
    assert _files(folder) == set(SIDE) | own
    assert json.loads((folder / "flaxslim.json").read_text()) == record
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Model\n\n## What flaxslim cut\n")
    assert "- version: 1.0" in card


def test_no_stale_msgpack_wins_over_new_safetensors(source, params):
    changed = {
        **params,
        "pooler": {"dense": {"kernel": np.eye(32, dtype="f"), "bias": np.ones(32)}},
    }
    save(source, changed, CONFIG, like=source, format="torch", overwrite=True)
    assert not (source / "flax_model.msgpack").exists()
    _same(load(source)[0], changed)


def test_the_section_of_the_card_is_replaced():
    before = f"# A\n\n```\n{HEADING}\n```\n\n{HEADING}\n\n"
    old = before + "old\n\n```\n# no heading\n```\n\n### b\n\n## C\n\nx\n"
    new = with_section(old, "new")
    assert new == before + "new\n\n## C\n\nx\n"
    assert with_section(new, "new") == new
    assert with_section("", "new") == f"{HEADING}\n\nnew\n"


def test_a_text_of_the_callers_own_is_put_on_the_card(tmp_path, source, params):
    save(tmp_path / "out", params, CONFIG, like=source, record={"card": "| a | b |"})
    assert "| a | b |\n\nThe record is" in (tmp_path / "out" / "README.md").read_text()


def test_a_side_file_that_is_a_link_out_is_refused(tmp_path, source, params):
    (tmp_path / "secret").write_text("x")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(errors.UnsafePathError, match="a link leads out"):
        save(tmp_path / "out", params, CONFIG, like=source)
    assert not (tmp_path / "out").exists()


# --- all or nothing ---------------------------------------------------------------------------


def _listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("format", [None, "torch", "flax-safetensors"])
def test_a_checkpoint_may_be_written_over_itself(tmp_path, source, params, format):
    for _ in range(2):  # the second time it is read through the mapped file
        loaded, cfg = load(source)
        save(source, loaded, cfg, like=source, format=format, overwrite=True)
    _same(load(source)[0], params)
    assert set(SIDE) <= _files(source)
    assert _listing(tmp_path) == ["source"]


def test_a_link_to_a_folder_is_followed(tmp_path, source, params):
    (tmp_path / "link").symlink_to(source)
    save(tmp_path / "link", params, CONFIG, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert _files(source) == {"config.json", "flax_model.msgpack"}


class _Full(io.FileIO):
    """A file on a disk that runs full after some bytes, of all files together."""

    room = 9_000

    def write(self, data):
        _Full.room -= len(data)
        if _Full.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("format", ["flax", "torch"])
def test_a_disk_that_runs_full_leaves_nothing(
    tmp_path, source, params, monkeypatch, format, overwrite
):
    before = {name: (source / name).read_bytes() for name in _files(source)}
    monkeypatch.setattr(_Full, "room", 9_000)
    monkeypatch.setattr(_pour, "_opened", lambda path: _Full(path, "r+"))
    target = source if overwrite else tmp_path / "deep" / "out"
    with pytest.raises(errors.TargetError, match="the disk ran full; nothing was kept") as caught:
        save(target, params, CONFIG, like=source, format=format, overwrite=overwrite)
    assert "No space left on device" in str(caught.value)
    assert _listing(tmp_path) == ["source"]
    assert {name: (source / name).read_bytes() for name in _files(source)} == before


def test_a_small_disk(tmp_path, params):
    """A real one, where a tmpfs may be mounted; room is checked before anything is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(errors.TargetError, match="no room for the checkpoint"):
            save(disk / "out", params, CONFIG)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_atomic, "_check_room", lambda folder, need: None)
            with pytest.raises(errors.TargetError, match="the disk ran full"):
                save(disk / "out", params, CONFIG)
        assert _listing(disk) == []
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(errors.TargetError, match="cannot be written") as caught:
            save(disk / "out", params, CONFIG)
        assert "Read-only file system" in str(caught.value)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_target(tmp_path, params):
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    if os.access(place, os.W_OK):
        pytest.skip("this user may write anywhere (root)")
    with pytest.raises(errors.TargetError, match="cannot be written"):
        save(place / "out", params, CONFIG)


def test_a_refused_write(tmp_path, params, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(_atomic.Path, "mkdir", refuse)
    with pytest.raises(errors.TargetError, match="the target cannot be written"):
        save(tmp_path / "out", params, CONFIG)


def test_too_little_room_is_seen_before(tmp_path, params, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_atomic.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(errors.TargetError, match="no room for the checkpoint") as caught:
        save(tmp_path / "out", params, CONFIG)
    assert "1.0 kB free" in str(caught.value)
    assert _listing(tmp_path) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_the_old_one_comes_back_if_the_swap_fails(tmp_path, source, params, monkeypatch, fault):
    before = _files(source)
    stock = _atomic.Path.rename

    def rename(self, target):
        if self.name.endswith(".new"):
            assert not source.exists()
            raise fault
        return stock(self, target)

    monkeypatch.setattr(_atomic.Path, "rename", rename)
    monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)  # as on macOS
    with pytest.raises(errors.TargetError if fault is OSError else fault):
        save(source, params, CONFIG, overwrite=True)
    assert _listing(tmp_path) == ["source"]
    assert _files(source) == before


def test_a_record_that_is_no_json_leaves_nothing(tmp_path, params):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "out", params, CONFIG, record={"plan": object()})
    assert _listing(tmp_path) == []


# --- what another library would read as something else ----------------------------------------


def test_a_head_of_its_own_is_not_written_under_a_config_that_ties_it(tmp_path):
    """The Flax class of LLaMA has one of its own; PyTorch would take the embedding."""
    cfg = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    params: Any = FlaxLlamaForCausalLM(cfg).params
    with pytest.raises(errors.ConfigError, match="ties the head") as caught:
        save(tmp_path / "out", params, cfg, format="torch")
    assert caught.value.path == "lm_head.weight"
    assert not (tmp_path / "out").exists()
    params["lm_head"]["kernel"] = params["model"]["embed_tokens"]["embedding"].T
    save(tmp_path / "tied", params, cfg, format="torch")
    cfg.tie_word_embeddings = False
    save(tmp_path / "untied", params, cfg, format="torch")


def test_a_head_beside_a_base_model_without_a_prefix_is_loaded_by_pytorch(tmp_path, params):
    torch = pytest.importorskip("torch")
    from transformers import BertForSequenceClassification

    base = save(tmp_path / "base", params, CONFIG, format="torch")
    model: Any = FlaxBertForSequenceClassification.from_pretrained(base, from_pt=True)
    out = save(tmp_path / "out", model.params, model.config, like=base)
    loaded: Any = BertForSequenceClassification.from_pretrained(out)
    ids = np.arange(6).reshape(1, 6)
    with torch.no_grad():
        theirs = loaded(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(theirs, model(ids).logits, atol=1e-5)


def test_a_linked_folder_of_side_files_is_refused(tmp_path, source, params):
    """Its files would be left behind without a word."""
    _put(source, {"1_Pooling/config.json": "{}"})
    (source / "1_Pooling").rename(tmp_path / "elsewhere")
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.UnsafePathError, match="is a link"):
        save(tmp_path / "out", params, CONFIG, like=source)


def test_dense_shards_of_odd_names_do_not_travel(tmp_path, params):
    source = save(tmp_path / "source", params, CONFIG, format="torch", shard_size=4000)
    index = source / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    shards = sorted({*stored["weight_map"].values()})
    (source / shards[0]).rename(source / "part-1")
    stored["weight_map"] = {
        name: "part-1" if shard == shards[0] else shard
        for name, shard in stored["weight_map"].items()
    }
    index.write_text(json.dumps(stored))
    assert "part-1" not in _files(save(tmp_path / "out", params, CONFIG, like=source))


def test_the_parts_of_a_composite_say_the_new_dtype_too(tmp_path):
    cfg = {"text_config": {"dtype": "float32", "d": 3}, "torch_dtype": "float32"}
    text = json.loads(config_text(cfg, "bfloat16"))
    assert text == {"text_config": {"dtype": "bfloat16", "d": 3}, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("dtype", ["bf16", "nonsense", "f16", "int8", object()])
def test_a_dtype_that_weights_have_not_is_refused(tmp_path, params, dtype):
    with pytest.raises(errors.UnsupportedFormatError, match="floating-point dtype"):
        save(tmp_path / "out", params, CONFIG, dtype=dtype)


def test_a_weight_beyond_its_new_dtype_is_refused(tmp_path, params):
    leaves = flatten(params)
    path = next(path for path, leaf in leaves.items() if np.ndim(leaf) == 2)
    large = replace(params, {path: np.full(np.shape(leaves[path]), 1e5, np.float32)})
    with pytest.raises(errors.UnsupportedDtypeError, match="beyond what float16 can say"):
        save(tmp_path / "out", large, CONFIG, dtype="float16")
    assert not (tmp_path / "out").exists()
    save(tmp_path / "out", large, CONFIG, dtype="bfloat16")
