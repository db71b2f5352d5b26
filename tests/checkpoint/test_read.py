"""Every format is read as the stock classes read it, and every broken folder says what is wrong."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import to_bytes
from initialised import drawn
from safetensors.numpy import save_file
from transformers import BertConfig, FlaxBertModel, PretrainedConfig

from flaxslim import errors
from flaxslim._tree import flatten
from flaxslim.checkpoint import load, read, save

CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
    architectures=["BertModel"],
)


@pytest.fixture(scope="module")
def params():
    return drawn(FlaxBertModel, CONFIG)


@pytest.fixture
def folder(tmp_path, params):
    """A Flax checkpoint in one msgpack file."""
    return save(tmp_path / "model", params, CONFIG)


@pytest.fixture
def torch_folder(tmp_path, params):
    """A PyTorch-named checkpoint in one safetensors file."""
    return save(tmp_path / "torch", params, CONFIG, format="torch")


def _same(have, want):
    have, want = flatten(have), flatten(want)
    assert have.keys() == want.keys()
    for path in want:
        assert np.asarray(have[path]).dtype == np.asarray(want[path]).dtype
        np.testing.assert_array_equal(np.asarray(have[path]), np.asarray(want[path]), path)


def _shard(folder, count=3):
    """Split the folder's model.safetensors into shards with an index."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# --- formats ----------------------------------------------------------------------------------


def test_what_the_stock_class_saves_is_read(tmp_path):
    model = FlaxBertModel(CONFIG)
    model.save_pretrained(tmp_path / "msgpack")
    model.save_pretrained(tmp_path / "safe", safe_serialization=True)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name, format in (("msgpack", "msgpack"), ("safe", "safetensors"), ("shards", "msgpack")):
        found = read(tmp_path / name)
        assert (found.naming, found.format, found.notes) == ("flax", format, ())
        assert found.sharded == (name == "shards")
        assert all((tmp_path / name / file).is_file() for file in found.weight_files)
        _same(found.params, model.params)
        loaded, cfg = load(str(tmp_path / name))
        _same(loaded, model.params)
        assert isinstance(cfg, BertConfig)
        assert cfg.architectures == ["BertModel"]


def test_pytorch_shards_are_read(torch_folder, params):
    _shard(torch_folder)
    found = read(torch_folder)
    assert (found.naming, found.format, found.sharded) == ("torch", "safetensors", True)
    assert len(found.weight_files) == 3
    assert found.params["encoder"]["layer"]["0"]["output"]["dense"]["weight"].shape == (32, 40)
    _same(load(torch_folder)[0], params)


def test_slash_joined_names_and_no_metadata_are_understood(folder, params):
    (folder / "flax_model.msgpack").unlink()
    save_file(flatten(params), folder / "model.safetensors")
    assert read(folder).naming == "flax"
    _same(load(folder)[0], params)


def test_pickled_weights_go_through_torch(torch_folder, params):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    path = torch_folder / "model.safetensors"
    state = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    path.unlink()
    torch.save(state, torch_folder / "pytorch_model.bin")
    found = read(torch_folder)
    assert (found.format, found.naming) == ("bin", "torch")
    want = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in flatten(params).items()}
    have = flatten(load(torch_folder)[0])
    assert have.keys() == want.keys()
    for name in want:
        assert have[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(have[name], want[name])


@pytest.mark.parametrize(("at", "value"), [(38, 0x10), (20, 0)], ids=["a folder", "no bytes"])
def test_an_archive_of_which_torch_reads_uninitialised_memory_is_refused(at, value, torch_folder):
    """One byte of a record in the archive's directory, which torch's reader believes."""
    torch = pytest.importorskip("torch")
    (torch_folder / "model.safetensors").unlink()
    path = torch_folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(8, 8)}, path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)  # of some record
    while b"data/0" not in data[entry : entry + 80]:
        entry = data.index(b"PK\x01\x02", entry + 4)
    data[entry + at : entry + at + 2] = bytes([value, 0])
    path.write_bytes(data)
    with pytest.raises(errors.CorruptFileError, match="a record without its bytes"):
        read(torch_folder)


def test_a_pickle_that_would_run_code_is_refused(torch_folder, tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))

    (torch_folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, torch_folder / "pytorch_model.bin")
    with pytest.raises(errors.CorruptFileError, match="does not read this file as plain weights"):
        read(torch_folder)
    assert not (tmp_path / "it-ran").exists()


def test_a_pickle_without_torch_says_how_to_convert(torch_folder):
    (torch_folder / "model.safetensors").rename(torch_folder / "pytorch_model.bin")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flaxslim.checkpoint import read\n"
        f"read({str(torch_folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UnsupportedFormatError: the weights are a PyTorch pickle" in done.stderr
    assert "torch is not installed" in done.stderr
    assert "convert it to safetensors" in done.stderr


def test_of_two_formats_the_one_of_transformers_is_taken_and_said(folder, torch_folder):
    (torch_folder / "model.safetensors").rename(folder / "model.safetensors")
    found = read(folder)
    assert found.weight_files == ("flax_model.msgpack",)
    assert "took flax_model.msgpack and left model.safetensors" in found.notes[0]


def test_names_win_over_metadata(torch_folder):
    from safetensors.numpy import load_file

    path = torch_folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "flax"})
    found = read(torch_folder)
    assert found.naming == "torch"
    assert "the metadata says format flax, but the names are torch's" in found.notes[0]


def test_safetensors_are_mapped_and_not_read(torch_folder):
    leaf = read(torch_folder).params["encoder"]["layer"]["0"]["output"]["dense"]["weight"]
    assert not leaf.flags.owndata
    assert not leaf.flags.writeable


def test_an_unknown_family_has_a_plain_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "homemade"}))
    cfg = read(folder).config
    assert type(cfg) is PretrainedConfig
    assert (cfg.model_type, cfg.intermediate_size) == ("homemade", 40)


def test_a_missing_model_type_is_not_guessed_from_the_folders_name(tmp_path, folder):
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values))
    assert type(read(folder.rename(tmp_path / "gpt2")).config) is PretrainedConfig


def test_the_code_of_a_repository_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    values = json.loads((folder / "config.json").read_text())
    values |= {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(values))
    assert read(folder).config.model_type == "evil"


def test_the_real_llama_is_read(data):
    params, cfg = load(data / "stories260K")
    assert cfg.model_type == "llama"
    assert params["model"]["layers"]["0"]["mlp"]["down_proj"]["kernel"].shape == (172, 64)


# --- bad input: each message is what a user sees ----------------------------------------------


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(errors.MissingFileError, match=r"the folder has no config\.json") as caught:
        read(folder)
    assert "found:    flax_model.msgpack" in str(caught.value)


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(errors.CorruptFileError, match="not JSON"):
        read(folder)


def test_no_weights(folder):
    (folder / "flax_model.msgpack").rename(folder / "tf_model.h5")
    with pytest.raises(errors.MissingFileError, match="no weights that flaxslim reads") as caught:
        read(folder)
    assert "tf_model.h5" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_msgpack(folder, keep):
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(errors.CorruptFileError, match="not a whole msgpack file"):
        read(folder)


def test_a_msgpack_with_something_after_its_end(folder):
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(errors.CorruptFileError, match="not a whole msgpack file"):
        read(folder)


def test_a_msgpack_of_something_else(folder):
    (folder / "flax_model.msgpack").write_bytes(to_bytes({"a": "text"}))
    with pytest.raises(errors.CorruptFileError, match="not a whole msgpack file of Flax param"):
        read(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_safetensors(torch_folder, keep):
    path = torch_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(errors.CorruptFileError, match="not a whole safetensors file") as error:
        read(torch_folder)
    assert str(path) in str(error.value)
    assert "download or copy the file again" in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        # The data of one tensor inside of another's.
        b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},'
        b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
    ],
)
def test_a_broken_safetensors_header(torch_folder, header):
    path = torch_folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(errors.CorruptFileError, match="not a whole safetensors file"):
        read(torch_folder)


def test_a_git_lfs_pointer(folder, torch_folder):
    for path in (folder / "flax_model.msgpack", torch_folder / "model.safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(errors.CorruptFileError, match="Git LFS pointer") as caught:
            read(path.parent)
        assert "git lfs pull" in str(caught.value)


def test_a_missing_shard(torch_folder):
    _shard(torch_folder)
    (torch_folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(errors.MissingFileError, match="1 of 3 shards are missing") as caught:
        read(torch_folder)
    assert "no model-00002-of-00003.safetensors" in str(caught.value)


def test_a_shard_without_a_promised_tensor(torch_folder):
    index = _shard(torch_folder)
    values = json.loads(index.read_text())
    values["weight_map"]["pooler.dense.weigth"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(errors.CorruptFileError, match="lacks 1 of the tensors") as caught:
        read(torch_folder)
    assert "no pooler.dense.weigth" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../x", "C:\\x", "..\\x"]
)
def test_an_index_that_leads_out(torch_folder, name):
    index = _shard(torch_folder)
    values = json.loads(index.read_text())
    values["weight_map"]["pooler.dense.weight"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(errors.UnsafePathError, match="leads out of the checkpoint's folder"):
        read(torch_folder)


def test_an_index_without_a_map(torch_folder):
    _shard(torch_folder).write_text('{"weight_map": 3}')
    with pytest.raises(errors.CorruptFileError, match="the index has no weight_map"):
        read(torch_folder)


@pytest.mark.parametrize("name", ["config.json", "flax_model.msgpack"])
def test_a_link_that_leads_out(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.UnsafePathError, match="a link leads out") as caught:
        read(folder)
    assert str(tmp_path / "elsewhere") in str(caught.value)


def test_the_links_of_a_hub_cache_are_followed(folder, tmp_path, params):
    snapshot, blobs = tmp_path / "hub/models--x/snapshots/abc", tmp_path / "hub/models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    _same(load(snapshot)[0], params)


@pytest.mark.parametrize("source", ["./no-such", "a/b/c", "no such", Path("gpt2")])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(errors.MissingFileError, match="there is no such folder"):
        read(source)


def test_a_misspelled_folder_has_neighbours(folder):
    with pytest.raises(errors.MissingFileError, match=r"nearest: +model"):
        read(str(folder.parent / "modle"))


def test_a_file_in_place_of_a_folder(folder):
    with pytest.raises(errors.MissingFileError, match="a checkpoint is a folder"):
        read(folder / "flax_model.msgpack")


def test_tensorflow_names_are_refused(torch_folder):
    from safetensors.numpy import load_file

    path = torch_folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "tf"})
    with pytest.raises(errors.UnsupportedFormatError, match="TensorFlow names"):
        read(torch_folder)


def test_a_dtype_that_is_not_known(torch_folder):
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path = torch_folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(errors.UnsupportedFormatError, match="a dtype that is not read"):
        read(torch_folder)


# --- what the system refuses --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_weights_that_are_a_folder_are_no_weights(folder, name):
    (folder / "flax_model.msgpack").unlink()
    (folder / name).mkdir()
    with pytest.raises(errors.MissingFileError, match="no weights that flaxslim reads") as caught:
        read(folder)
    assert f"{name}/" in str(caught.value)


def test_a_config_that_is_a_folder_is_no_config(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(errors.MissingFileError, match=r"no config\.json") as caught:
        read(folder)
    assert "config.json/" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "flax_model.msgpack"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_what_the_system_does_not_read(folder, monkeypatch, name, code):
    stock = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == name:
            raise OSError(code, os.strerror(code), str(self))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    kind = errors.MissingFileError if code == errno.ENOENT else errors.CorruptFileError
    with pytest.raises(kind) as caught:
        read(folder)
    assert str(folder / name) in str(caught.value)
    assert "mend:" in str(caught.value)


def test_safetensors_that_may_not_be_read(torch_folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Permission denied (os error 13)")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(errors.CorruptFileError, match="cannot be read") as caught:
        read(torch_folder)
    assert str(torch_folder / "model.safetensors") in str(caught.value)


def test_a_source_that_is_no_name_at_all():
    with pytest.raises(errors.CheckpointError):
        read("x" * 5000)


def test_a_side_file_that_is_a_link_to_nothing(folder, params, tmp_path):
    (folder / "vocab.txt").symlink_to(folder / "gone")
    with pytest.raises(errors.MissingFileError, match="a link to nothing") as caught:
        save(tmp_path / "out", params, CONFIG, like=folder)
    assert "vocab.txt" in str(caught.value)


def test_a_folder_has_no_revisions(folder):
    with pytest.raises(errors.HubError, match="has no revisions"):
        read(folder, revision="v1")


def test_a_config_of_other_sizes_is_not_loaded(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 40', '"intermediate_size": 48'))
    with pytest.raises(errors.ConfigError, match="contradicts the tensors"):
        load(folder)
