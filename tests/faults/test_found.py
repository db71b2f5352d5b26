"""What was found by breaking things on purpose: one small example of each, so that it stays mended.

Each failed before: by another exception than ours, by a hang, or by memory for what is not there.
"""

import gc
import json
import signal
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from kill import kill

from faults import tiny
from flaxslim import Plan, Spec, cli, plan, slim, verify_by_layer
from flaxslim.checkpoint import _atomic, read, to_flax
from flaxslim.checkpoint._atomic import fresh_file
from flaxslim.checkpoint._journal import Journal
from flaxslim.checkpoint._leaf import Piece
from flaxslim.checkpoint._names import spec_named
from flaxslim.checkpoint._yaml import values_of
from flaxslim.cli import _evaluate, _output, _recipe_prune, _recipe_read
from flaxslim.errors import (
    CalibrationError,
    ConfigError,
    CorruptFileError,
    PlanError,
    RecipeError,
    SpecError,
    TargetError,
    nearest,
)
from flaxslim.posttraining._images import pixel_reader
from flaxslim.specs import spec_for

DEEP = "[" * 100_000 + "]" * 100_000

# --- msgpack ----------------------------------------------------------------------------------


def array(shape: Any, dtype: Any, data: bytes = b"") -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def chunked(shape: Any, chunks: Any) -> dict[str, Any]:
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


@pytest.mark.parametrize(
    "leaf",
    [
        array([2**32, 2**32], "float32"),  # whose product is 0 in 64 bits
        array([-1, -2], "float32", bytes(8)),
        array([True], "float32", bytes(4)),
        array([2.0], "float32", bytes(8)),
        array([1], None, bytes(8)),
        array([2], ">f4", bytes(8)),  # would be written as if it were little-endian
        array([2], "U1", bytes(8)),
        array([1], "M8[s]", bytes(8)),
        array([1], "(2,)f4", bytes(8)),
        chunked({}, {}),
        chunked([], []),
        chunked({"0": 1}, {"0": 3}),
        chunked({"0": 2**62, "1": 4}, {"0": array([0], "int8")}),
    ],
)
def test_arrays_of_no_shape_or_type(tmp_path, leaf):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb({"a": leaf}))
    with pytest.raises(CorruptFileError, match="not a whole msgpack file"):
        read(tmp_path, lazy=True)


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_too_deep(tmp_path, name):
    folder = tiny.torch_folder(tmp_path / "x", shard_size=700)
    (folder / name).write_text(DEEP)
    with pytest.raises(CorruptFileError, match="not JSON"):
        read(folder)


def test_plans_and_specs_that_are_none():
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json(DEEP)
    for text in (DEEP, "{", "[]", '{"name": "x"}', '{"name": "x", "pairs": [{"at": 3}]}'):
        with pytest.raises(SpecError):
            Spec.from_json(text)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", f"a: {DEEP[:400]}", "a: 2001-99-99"])
def test_yaml_that_stands_for_too_much(text):
    with pytest.raises(CorruptFileError):
        values_of(text, "x.yml")


@pytest.mark.parametrize("value", ["2001-01-01", "[{ a = 07:32:00 }]"])
def test_dates_in_a_recipe(value):
    """TOML has them; JSON, in which the config is written, has not."""
    with pytest.raises(RecipeError, match="a date or a time"):
        _recipe_read.parse("", Path("x.toml"), [f"model.config.x = {value}"])


def test_no_name_is_nearest_where_there_is_none():
    assert nearest("attention_mask", [], 0) == []


@pytest.mark.parametrize("text", [b"\xff\xfe", DEEP.encode()])
def test_passages_that_are_no_text(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    with pytest.raises(CalibrationError):
        list(_evaluate._passages(path))


def test_a_passage_goes_on_after_a_line_separator(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    assert list(_evaluate._passages(path)) == ["one\u2028two"]


# --- images -----------------------------------------------------------------------------------


def test_a_header_that_asks_for_half_a_gigabyte(tmp_path):
    pytest.importorskip("PIL")
    said = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 7_000, 8_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
    )
    data = b"".join(
        struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(CalibrationError, match="56,000,000 pixels"):
        pixel_reader(tmp_path, 3)([tmp_path / "a.png"])


def test_an_array_that_asks_for_a_terabyte(tmp_path):
    import zipfile

    from flaxslim.posttraining._arrays import read_arrays

    said = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 8), }\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        size = len(said).to_bytes(2, "little")
        file.writestr("input_ids.npy", b"\x93NUMPY\x01\x00" + size + said)
    with pytest.raises(CalibrationError, match=r"no \.npz file of plain arrays"):
        read_arrays(tmp_path / "a.npz")


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "width"), [("ffn", "uniform"), ("ffn", "per_layer"), ("all", "per_layer")]
)
def test_a_model_that_is_dead_as_a_whole_is_proved(width, spec):
    tree, cfg = to_flax(tiny.weights(), tiny.config()), tiny.config()
    sites = spec_for(cfg, "all").sites(tree, cfg)
    params, _ = kill(tree, sites, low=1, high=1)
    small, new = slim(params, cfg, spec, width=width)
    verify_by_layer((params, cfg), (small, new), spec=spec).raise_if_failed()
    for site in spec_for(cfg, spec).sites(small, new):
        assert site.size == int(width == "uniform")


def test_a_plan_whose_tensors_disagree_is_refused():
    tree, cfg = tiny.weights(), tiny.config()
    data = plan(tree, cfg, spec_named(cfg, "all", "torch"), width="per_layer").to_dict()
    Plan.from_dict(data)
    twice = data["cuts"][2]["first"][0]
    changes: list[tuple[tuple[Any, ...], Any]] = [
        (("cuts", 0, "first", 0), twice),
        (("cuts", 0, "first", 0, 0), None),
        (("cuts", 0, "first", 0, 2), [5, 8]),
        (("cuts", 0, "first_biases"), [None, None, None]),
        (("values", "flaxslim_layout"), {}),
        (("values", "per_layer_config"), {"0": 1}),
        (("values", "per_layer_config"), {"x": {}}),
    ]
    for (*parents, last), value in changes:
        broken = json.loads(json.dumps(data))
        node = broken
        for key in parents:
            node = node[key]
        node[last] = value
        with pytest.raises(PlanError):
            Plan.from_dict(broken)


def test_a_journal_that_says_none_of_a_file(tmp_path):
    (tmp_path / ".written.json").write_text('{"what": "x", "found": {"a": null}}')
    assert not Journal.of(tmp_path, "x").has("a", [Piece.of(b"abc")])


def test_a_config_with_a_number_of_400_digits(tmp_path):
    folder = tiny.torch_folder(tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 10**400}))
    checkpoint = read(folder)
    with pytest.raises(ConfigError, match="contradicts the tensors"):
        plan(checkpoint.params, checkpoint.config, spec_named(checkpoint.config, "ffn", "torch"))


def test_a_config_without_heads(tmp_path):
    folder = tiny.torch_folder(tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_attention_heads": 0}))
    with pytest.raises(CorruptFileError, match="cannot make a config"):
        read(folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_shard_of_no_name(tmp_path, name):
    folder = tiny.torch_folder(tmp_path / "x", shard_size=700)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(CorruptFileError, match="a name leads to no file"):
        read(folder)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000])
def test_a_recipe_that_tomllib_does_not_bear(tmp_path, value):
    (tmp_path / "a.toml").write_text(f"seed = {value}")
    with pytest.raises(RecipeError, match="this is no TOML"):
        _recipe_read.load(tmp_path / "a.toml")


def test_a_recipe_with_a_name_that_is_too_long(tmp_path):
    text = f'command = "prune"\nsource = "{"x" * 5000}"\nout = "y"\ncalibration = "z"\n'
    (tmp_path / "a.toml").write_text(text)
    tree, book = _recipe_read.load(tmp_path / "a.toml")
    with pytest.raises(RecipeError, match="this is not there"):
        _recipe_prune.arguments(tree, book)


def test_ctrl_c_in_a_callback_of_the_garbage_collector(monkeypatch, capsys):
    """Where Python drops exceptions; JAX has such a callback."""

    def families() -> int:
        def callback(phase: str, info: Any) -> None:
            gc.callbacks.remove(callback)
            raise KeyboardInterrupt

        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)
        return 0

    monkeypatch.setattr(cli, "_by_name", lambda: {"families": families, "other": families})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of xdist ignore it
    try:
        assert cli.main(["families"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.count("\n") == 1


# --- files that appear whole or not at all ----------------------------------------------------


def test_what_a_killed_process_left_of_a_file_is_written_over(tmp_path):
    (tmp_path / ".a.csv.new").write_text("half of")
    with fresh_file(tmp_path / "a.csv") as new:
        new.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "whole"


def test_two_that_write_one_file(tmp_path):
    with fresh_file(tmp_path / "a.csv") as new:
        new.write_text("first")
        with (
            pytest.raises(TargetError, match="another process is writing"),
            fresh_file(tmp_path / "a.csv"),
        ):
            pass
    assert (tmp_path / "a.csv").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def partial(folder: Path) -> Path:
    """What a run has written when it is done, but for its place."""
    path = _output.partial_folder(folder)
    (path / _output.MODEL).mkdir(parents=True)
    for name in (_output.RECIPE, _output.REPORT):
        (path / name).write_text(name)
    (path / _output.MODEL / "config.json").write_text("new")
    return path


def earlier(folder: Path) -> Path:
    folder.mkdir()
    (folder / _output.REPORT).write_text("an earlier one")
    return folder


def test_two_runs_into_one_folder(tmp_path):
    with _output.fresh_partial(tmp_path / "out", overwrite=False) as first:
        (first / _output.RECIPE).write_text("first")
        with (
            pytest.raises(TargetError, match="another process is writing"),
            _output.fresh_partial(tmp_path / "out", overwrite=False),
        ):
            pass
        assert (first / _output.RECIPE).read_text() == "first"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_run_that_is_stopped_at_any_step_of_its_end(tmp_path, monkeypatch, exchange):
    """Before each operation on files: the old or the new is there, or what makes it again."""
    if not exchange:
        monkeypatch.setattr(_atomic, "_exchange", lambda *_: False)
    for stop in range(1, 40):
        (tmp_path / str(stop)).mkdir()
        folder = earlier(tmp_path / str(stop) / "out")
        path, count = partial(folder), 0

        class Stopped(Exception):
            pass

        def counted(stock: Any, stop: int = stop) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == stop:
                    raise Stopped
                return stock(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "rmdir", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            patch.setattr(_atomic.shutil, "rmtree", counted(_atomic.shutil.rmtree))
            try:
                _output.publish(path, folder)
                break
            except Stopped:
                pass
        with _output.fresh_partial(folder, overwrite=True) as new:
            assert not any(new.iterdir())
            said = (folder / _output.REPORT).read_text()
            assert said in ("an earlier one", _output.REPORT)
            assert (folder / "config.json").is_file() == (said == _output.REPORT)
    else:
        raise AssertionError("it never ends")
    assert stop > 3
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]


def test_numbers_are_read_as_they_were(tmp_path):
    """The checks above refuse nothing that Flax itself writes."""
    from flax.serialization import to_bytes

    tree = {"a": np.arange(3), "b": np.float32(2), "c": np.ones((0, 3)), "d": np.array(True)}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "flax_model.msgpack").write_bytes(to_bytes(tree))
    found = read(tmp_path).params
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (np.shape(v), np.asarray(v).dtype) for k, v in tree.items()
    }
