"""Checkpoints at addresses of fsspec: copied in and out whole, by `memory://` and `file://`."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

import flaxslim
from flaxslim._tree import flatten
from flaxslim.checkpoint._remote import fetched, sent
from flaxslim.errors import (
    MissingFileError,
    TargetError,
    UnsafePathError,
    UnsupportedFormatError,
)

CFG = {"model_type": "bert", "intermediate_size": 3}


def _params() -> dict:
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    layer = {
        "intermediate": {"dense": {"kernel": kernel, "bias": np.ones(3, np.float32)}},
        "output": {"dense": {"kernel": kernel.T.copy(), "bias": np.ones(2, np.float32)}},
    }
    return {"encoder": {"layer": {"0": layer}}}


@pytest.fixture(params=["memory", "file"])
def address(request, tmp_path):
    """An empty place, and how to list what is in it."""
    place = (
        f"memory://{tmp_path.name}/model"
        if request.param == "memory"
        else f"file://{tmp_path}/model"
    )
    yield place
    fs, root = fsspec.core.url_to_fs(place)
    if fs.exists(root):
        fs.rm(root, recursive=True)


def _names(address: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(address)
    return sorted(path.removeprefix(root).lstrip("/") for path in fs.find(root))


def test_what_is_sent_is_fetched(address):
    with sent(address) as folder:
        flaxslim.save(folder, _params(), CFG)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text("{}")
    assert _names(address) == ["1_Pooling/config.json", "config.json", "flax_model.msgpack"]
    with fetched(address) as folder:
        assert Path(folder).name == "model"
        params, cfg = flaxslim.load(folder)
        assert (Path(folder) / "1_Pooling" / "config.json").is_file()
    assert cfg.intermediate_size == 3
    want, found = flatten(_params()), flatten(params)
    assert want.keys() == found.keys()
    assert all(np.array_equal(want[path], found[path]) for path in want)
    assert not Path(folder).exists()


def test_only_the_weights_that_are_read_are_copied(address):
    with sent(address) as folder:
        flaxslim.save(folder, _params(), CFG)
        (folder / "pytorch_model.bin").write_bytes(b"x")
        (folder / "vocab.txt").write_text("a")
    with fetched(address) as folder:
        names = sorted(path.name for path in Path(folder).iterdir())
    assert names == ["config.json", "flax_model.msgpack", "vocab.txt"]


def test_shards_are_fetched_by_their_index(address):
    import json

    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    with sent(address) as folder:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for number in (1, 2, 3):
            (folder / f"model-{number}.safetensors").write_bytes(b"x")
    with fetched(address) as folder:
        names = sorted(path.name for path in Path(folder).glob("model-*"))
    assert names == ["model-1.safetensors", "model-2.safetensors"]


def test_the_config_is_sent_last_and_a_failure_leaves_nothing(address, monkeypatch):
    fs, _ = fsspec.core.url_to_fs(address)
    order, stock = [], type(fs).put_file

    def put_file(self, local, to, **kwargs):
        order.append(to.rpartition("/")[2])
        if to.endswith("config.json"):
            raise ConnectionError("lost")
        return stock(self, local, to, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", put_file)
    with pytest.raises(TargetError, match="nothing was kept"), sent(address) as folder:
        flaxslim.save(folder, _params(), CFG)
    assert order == ["flax_model.msgpack", "config.json"]
    assert not _names(address)


def test_a_block_that_fails_or_writes_nothing_sends_nothing(address):
    def fails() -> None:
        with sent(address) as folder:
            flaxslim.save(folder, _params(), CFG)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()
    with sent(address):
        pass
    assert not _names(address)


def test_an_existing_target_is_left_alone(address):
    with sent(address) as folder:
        flaxslim.save(folder, _params(), CFG)
    before = _names(address)
    with pytest.raises(TargetError, match="exists"), sent(address):
        pass
    assert _names(address) == before


def test_what_is_no_checkpoint_is_refused(address):
    with pytest.raises(MissingFileError, match="no weights"), fetched(address):
        pass
    fs, root = fsspec.core.url_to_fs(address)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/config.json", b"{}")
    fs.pipe_file(f"{root}/model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}')
    with pytest.raises(UnsafePathError), fetched(address):
        pass


def test_a_connection_that_is_lost_is_told_with_the_address(address, monkeypatch):
    with sent(address) as folder:
        flaxslim.save(folder, _params(), CFG)
    fs, _ = fsspec.core.url_to_fs(address)

    def get_file(*args, **kwargs):
        raise ConnectionError("lost")

    monkeypatch.setattr(type(fs), "get_file", get_file)
    with pytest.raises(MissingFileError, match="ConnectionError: lost"), fetched(address):
        pass


def test_paths_and_ids_pass_through(tmp_path):
    with fetched("org/name") as source, sent(tmp_path / "out") as target:
        assert (source, target) == ("org/name", tmp_path / "out")


def test_an_address_of_no_file_system_is_an_error():
    with pytest.raises(UnsupportedFormatError, match="no file system"), fetched("nope://a/b"):
        pass
