"""What may be replaced: a checkpoint with nothing of anybody's own in its folder."""

import numpy as np
import pytest

from flaxslim import errors
from flaxslim.checkpoint import _atomic, _folder, load, read, save

CONFIG = {"model_type": "homemade", "width": 3}
PARAMS = {"dense": {"kernel": np.ones((2, 3), np.float32)}}


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "source", PARAMS, CONFIG)


def _put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def _files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_target_is_refused(tmp_path, source):
    with pytest.raises(errors.TargetError, match="the target exists") as caught:
        save(source, PARAMS, CONFIG)
    assert "--overwrite" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.TargetError, match="the target exists"):
        save(tmp_path / "empty", PARAMS, CONFIG)
    save(tmp_path / "empty", PARAMS, CONFIG, overwrite=True)
    _put(tmp_path, "file")
    with pytest.raises(errors.TargetError, match="the target is a file"):
        save(tmp_path / "file", PARAMS, CONFIG, overwrite=True)


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["config.json", "app.py"], ["model.safetensors"], ["flaxslim.json"]]
)
def test_something_else_than_a_checkpoint_is_never_replaced(tmp_path, names):
    _put(tmp_path / "home", *names)
    with pytest.raises(errors.TargetError, match="something else than a checkpoint"):
        save(tmp_path / "home", PARAMS, CONFIG, overwrite=True)
    assert _files(tmp_path / "home") == set(names)


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "notes.txt",
        ".git/HEAD",
        ".gitattributes",
        "optimizer.pt",
        "data.h5",
        "data/train.csv",
        "data/config.json",
        "checkpoint-500/model.safetensors",
        "onnx/model.onnx",
        "my-model-00001-of-00002.safetensors",
    ],
)
def test_a_checkpoint_with_something_else_beside_it_is_not_replaced(source, name):
    _put(source, name)
    before = _files(source)
    for like in (None, read(source)):
        if like is not None and _folder.travels(name):
            continue  # it is carried along, so nothing is lost
        with pytest.raises(errors.TargetError, match="holds more than a checkpoint") as caught:
            save(source, PARAMS, CONFIG, like=like, overwrite=True)
        assert name.split("/")[0] in str(caught.value)
        assert "name another folder, or move these away" in str(caught.value)
    assert _files(source) == before


def test_the_first_few_are_named(source):
    _put(source, *(f"{n}.csv" for n in range(7)))
    with pytest.raises(errors.TargetError, match=r"0\.csv, 1\.csv, 2\.csv, 3\.csv and 3 more"):
        save(source, PARAMS, CONFIG, overwrite=True)


def test_a_link_to_a_folder_inside_is_somebodys_own(tmp_path, source):
    _put(tmp_path / "elsewhere", "x")
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.TargetError, match="1_Pooling/"):
        save(source, PARAMS, CONFIG, overwrite=True)


def test_a_checkpoint_in_all_its_parts_is_replaced(source):
    parts = """
        README.md LICENSE flaxslim.json tokenizer.json tokenizer_config.json vocab.txt merges.txt
        special_tokens_map.json added_tokens.json spiece.model sentencepiece.bpe.model source.spm
        generation_config.json preprocessor_config.json image_processor_config.json modules.json
        processor_config.json chat_template.jinja additional_chat_templates/tool.jinja
        sentence_bert_config.json config_sentence_transformers.json 1_Pooling/config.json
        2_Dense/model.safetensors flax_model-00001-of-00002.msgpack flax_model.msgpack.index.json
        model-00001-of-00002.safetensors pytorch_model.bin modeling_homemade.py vocab.json
    """
    _put(source, *parts.split())
    save(source, PARAMS, CONFIG, overwrite=True)
    assert _files(source) == {"config.json", "flax_model.msgpack"}


def test_what_travels_from_the_source_may_be_replaced_by_it(tmp_path, source):
    _put(source, "figure.png")
    save(tmp_path / "out", PARAMS, CONFIG, like=source)
    save(tmp_path / "out", PARAMS, CONFIG, like=source, overwrite=True)
    save(source, PARAMS, CONFIG, like=source, overwrite=True)
    assert (tmp_path / "out" / "figure.png").read_text() == "figure.png"
    assert (source / "figure.png").exists()
    with pytest.raises(errors.TargetError, match=r"figure\.png"):
        save(tmp_path / "out", PARAMS, CONFIG, overwrite=True)


def test_source_and_target_lie_apart(tmp_path, source):
    _put(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(errors.TargetError, match="the source lies inside the target"):
        save(tmp_path, PARAMS, CONFIG, like=source, overwrite=True)
    before = _files(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source / "smaller", source / "deep" / "er", tmp_path / "link" / "smaller"):
        with pytest.raises(errors.TargetError, match="the target lies inside the source"):
            save(out, PARAMS, CONFIG, like=source)
        with pytest.raises(errors.TargetError, match="the target lies inside the source"):
            _atomic.check_target(out, overwrite=True, source=source)
    assert _files(source) == before
    assert not (source / "deep").exists()
    save(source.with_name("source-2"), *load(source), like=source)
