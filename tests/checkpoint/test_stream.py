"""Tensor by tensor: the same bytes as in memory, whatever the format, and whole or not at all."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_restore, to_bytes
from kill import kill
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from flaxslim import _lazy, errors, slim
from flaxslim._tree import flatten
from flaxslim.checkpoint import _msgpack, read, save, to_flax
from flaxslim.checkpoint._atomic import fresh_folder
from flaxslim.checkpoint._leaf import nest
from flaxslim.checkpoint._names import spec_named
from flaxslim.cli import _verify, entry, main

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 32,
}


def llama(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """PyTorch-named weights, some channels and heads of which are dead."""
    rng = np.random.default_rng(seed)
    d, f, kv = 16, 24, 8
    shapes = {"model.embed_tokens": (30, d), "lm_head": (30, d), "model.norm": (d,)}
    for i in range(3):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{x}_proj": (d, d) for x in "qo"}
        shapes |= {f"{at}self_attn.{x}_proj": (kv, d) for x in "kv"}
        shapes |= {f"{at}{x}_layernorm": (d,) for x in ("input", "post_attention")}
        shapes |= {f"{at}mlp.{x}_proj": (f, d) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj": (d, f)}
    params = {f"{k}.weight": rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}
    cfg = LlamaConfig(**LLAMA)
    sites = spec_named(cfg, "all", "torch").sites(nest(params, "."), cfg)
    return {k.replace("/", "."): v for k, v in flatten(kill(nest(params, "."), sites)[0]).items()}


@pytest.fixture
def source(tmp_path) -> Path:
    """In four shards."""
    return save(tmp_path / "source", llama(), LLAMA, format="torch", shard_size=5_000)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    kinds = (".safetensors", ".msgpack")
    return {name: text for name, text in files(folder).items() if name.endswith(kinds)}


# --- the same bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 2**20])
@pytest.mark.parametrize("width", ["uniform", "per_layer"])
@pytest.mark.parametrize("format", ["torch", "flax"])
def test_lazily_the_same_bytes_are_written(tmp_path, monkeypatch, format, width, block):
    monkeypatch.setattr(_lazy, "BLOCK", block)
    params, size = llama(ml_dtypes.bfloat16), 5_000
    folder = save(tmp_path / "source", params, LLAMA, format="torch", shard_size=size)
    if format == "flax":
        dense = read(save(tmp_path / "named", llama(), LLAMA, format="torch"))
        params = to_flax(dense.params, dense.config)
        folder = save(tmp_path / "flax", params, dense.config, shard_size=size)
    there, away = read(folder), read(folder, lazy=True)
    spec = spec_named(there.config, "all", there.naming)
    assert all(isinstance(leaf, _lazy.Lazy) for leaf in flatten(away.params).values())
    small, cfg = slim(there.params, there.config, spec, width=width)
    later, new = slim(away.params, away.config, spec, width=width)
    one = save(tmp_path / "one", small, cfg, like=there)
    two = save(tmp_path / "two", later, new, like=away)
    assert weights(one) == weights(two)
    assert len(weights(one)) >= 2
    assert sum(map(len, weights(two).values())) < sum(map(len, weights(folder).values()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["flax", "flax-safetensors"])
def test_from_torch_to_flax_lazily_too(tmp_path, monkeypatch, format, tied):
    monkeypatch.setattr(_lazy, "BLOCK", 64)
    params = llama(ml_dtypes.bfloat16)
    if tied:
        del params["lm_head.weight"]
    folder = save(
        tmp_path / "source", params, LLAMA | {"tie_word_embeddings": tied}, format="torch"
    )
    there, away = read(folder), read(folder, lazy=True)
    later = to_flax(away)
    assert all(isinstance(leaf, _lazy.Lazy) for leaf in flatten(later).values())
    assert flatten(later).keys() == flatten(to_flax(there)).keys()
    assert "lm_head/kernel" in flatten(later)
    one, two = (
        save(tmp_path / name, *slim(tree, there.config, "all"), format=format)
        for name, tree in (("one", to_flax(there)), ("two", later))
    )
    assert weights(one) == weights(two) != {}


DTYPES = ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_passes(tmp_path, dtype):
    params = llama()
    values = np.arange(-30, 30, dtype=np.float32).reshape(6, 10).astype(dtype)
    params["companion.scale"] = values
    folder = save(tmp_path / "source", params, LLAMA, format="torch")
    out = tmp_path / "out"
    assert main(["slim", str(folder), str(out), "--no-verify"]) == 0
    after = read(out).params["companion"]["scale"]
    assert after.dtype == values.dtype
    assert after.tobytes() == values.tobytes()


def test_msgpack_in_chunks(tmp_path, monkeypatch):
    """As Flax writes arrays of more than a gibibyte: here of more than a hundred bytes."""
    import flax.serialization

    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    monkeypatch.setattr(_msgpack, "_CHUNK", 100)
    monkeypatch.setattr(_lazy, "BLOCK", 70)
    rng = np.random.default_rng(0)
    tree = {
        "a": {"kernel": rng.standard_normal((7, 9)).astype(np.float32)},
        "b": np.arange(60, dtype=np.int8),
        "c": np.array(2, np.float32),
    }
    folder = tmp_path / "source"
    folder.mkdir()
    path = folder / "flax_model.msgpack"
    path.write_bytes(to_bytes(tree))
    (folder / "config.json").write_text("{}")
    found = read(folder, lazy=True)
    for name, leaf in flatten(tree).items():
        np.testing.assert_array_equal(np.asarray(flatten(found.params)[name]), leaf)
    out = save(tmp_path / "out", found.params, {}, like=found)
    assert (out / "flax_model.msgpack").read_bytes() == path.read_bytes()
    again = msgpack_restore((out / "flax_model.msgpack").read_bytes())
    np.testing.assert_array_equal(again["a"]["kernel"], tree["a"]["kernel"])


# --- what is wrong with the source ------------------------------------------------------------


def test_a_tensor_in_two_shards(source):
    one, two, *_ = sorted(source.glob("*.safetensors"))
    tensors = load_file(two)
    twice = next(iter(load_file(one)))
    save_file({**tensors, twice: np.zeros(3, np.float32)}, two, {"format": "pt"})
    with pytest.raises(errors.CorruptFileError, match="in another shard, too") as caught:
        read(source)
    assert twice in str(caught.value)


def test_a_tensor_that_the_index_does_not_name(source):
    one, *_ = sorted(source.glob("*.safetensors"))
    save_file({**load_file(one), "extra": np.zeros(3, np.float32)}, one, {"format": "pt"})
    with pytest.raises(errors.CorruptFileError, match="the index does not name") as caught:
        read(source)
    assert "extra" in str(caught.value)


def header(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_overlapping_offsets(tmp_path):
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    text = json.dumps({"a": entry, "b": {**entry, "data_offsets": [2, 6]}}).encode()
    with pytest.raises(errors.CorruptFileError, match="not a whole safetensors file"):
        read(header(tmp_path / "x", text, bytes(6)))


def test_a_name_twice_in_a_header(tmp_path):
    entry = '{"dtype": "U8", "shape": [4], "data_offsets": [%d, %d]}'
    text = f'{{"a": {entry % (0, 4)}, "a": {entry % (4, 8)}}}'.encode()
    with pytest.raises(errors.CorruptFileError):
        read(header(tmp_path / "x", text, bytes(8)))


def test_a_header_of_a_hundred_megabytes(tmp_path):
    path = header(tmp_path / "x", b"{}")
    with (path / "model.safetensors").open("r+b") as file:
        file.write((101 * 10**6).to_bytes(8, "little"))
        file.truncate(102 * 10**6)  # sparse
    with pytest.raises(errors.CorruptFileError, match="not a whole safetensors file"):
        read(path)


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_a_source_that_changes_while_it_is_read(tmp_path, source, change):
    before = read(source, lazy=True)
    small, cfg = slim(before.params, before.config, spec_named(before.config, "ffn", "torch"))
    victim = source / before.weight_files[-1]
    if change == "shorter":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        time.sleep(0.01)
        victim.write_bytes(victim.read_bytes())
    with pytest.raises(errors.CorruptFileError, match=r"shorter while|changed while"):
        save(tmp_path / "out", small, cfg, like=before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_wrong_shard_size(tmp_path, source):
    with pytest.raises(errors.UnsupportedFormatError, match="at least one byte"):
        save(tmp_path / "out", llama(), LLAMA, format="torch", shard_size=0)
    with pytest.raises(errors.UnsupportedFormatError, match="no shards"):
        save(tmp_path / "out", {"a": np.ones(2)}, {}, format="flax-safetensors", shard_size=10)


def test_what_cannot_be_written_is_refused_before_the_proof(tmp_path, source, capsys):
    """The proof is what takes long."""
    wish = ("--format", "flax-safetensors", "--shard-size", "1kB")
    assert main(["slim", str(source), str(tmp_path / "out"), *wish]) == 1
    (tmp_path / "elsewhere").mkdir()
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    assert main(["slim", str(source), str(tmp_path / "out")]) == 1
    out, told = capsys.readouterr()
    assert "no shards" in told
    assert "is a link" in told
    assert "equal to rounding" not in out
    assert not (tmp_path / "out").exists()


# --- killed ------------------------------------------------------------------------------------

# Forks a process for each line that it reads, which costs no imports. The first word is the number
# of weight files after which the process ends by itself.
SERVER = """
import os, sys, time
from flaxslim.cli import main
import flaxslim.cli._slim, flaxslim.checkpoint._write as _write, transformers.models.llama
stock, done = _write.pour, []
def pour(path, *rest):
    time.sleep(0.005)
    if len(done) == limit:
        os._exit(9)
    done.append(path)
    print("poured", path.name, file=told, flush=True)
    return stock(path, *rest)
_write.pour = pour
told = sys.stdout
for line in sys.stdin:
    child = os.fork()
    if not child:
        limit, *arguments = line.split()
        limit = int(limit)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(arguments))
    print("started", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
COMMAND = ("--no-verify", "--overwrite", "--shard-size", "3kB")


class Server:
    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process

    def start(self, *arguments: object, limit: int = 999) -> int:
        """The process that runs a command."""
        assert self.process.stdin is not None
        print(limit, *arguments, file=self.process.stdin, flush=True)
        return int(self._line().split()[1])

    def wait(self) -> tuple[int, list[str]]:
        """Its exit code, and the weight files that it wrote."""
        written = []
        while (line := self._line()).startswith("poured"):
            written.append(line.split()[1])
        return int(line.split()[1]), written

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def kills(tmp_path: Path, source: Path, server: Server, count: int) -> set[str]:
    """Slims, and kills that at a random moment; returns what stood at the target afterwards."""
    other = save(tmp_path / "other", llama(seed=1), LLAMA, format="torch", shard_size=5_000)
    out, seconds = tmp_path / "out", []
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(other, out)
        server.start("slim", source, out, *COMMAND)
        began = time.perf_counter()
        assert server.wait()[0] == 0
        seconds.append(time.perf_counter() - began)
    old, new = files(other), files(out)
    rng, found = random.Random(0), set()
    for _ in range(count):
        shutil.rmtree(out)
        shutil.copytree(other, out)
        child = server.start("slim", source, out, *COMMAND)
        time.sleep(rng.uniform(0, 1.2 * seconds[-1]))
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(child, signal.SIGKILL)
        server.wait()
        state = files(out)
        assert state in (old, new)
        found.add("old" if state == old else "new")
        server.start("slim", source, out, *COMMAND)
        assert server.wait()[0] == 0
        assert files(out) == new
        assert {p.name for p in tmp_path.iterdir()} == {"source", "other", "out"}
    return found


def test_killed_it_leaves_the_old_or_the_new_and_is_gone_on_with(tmp_path, source, server):
    kills(tmp_path, source, server, 6)


@pytest.mark.long
def test_a_hundred_kills(tmp_path, source, server):
    assert kills(tmp_path, source, server, 100) == {"old", "new"}


def test_finished_shards_are_not_written_again(tmp_path, source, server):
    whole, out = tmp_path / "whole", tmp_path / "out"
    server.start("slim", source, whole, *COMMAND)
    code, everything = server.wait()
    assert code == 0
    server.start("slim", source, out, *COMMAND, limit=3)
    assert server.wait() == (9, everything[:3])
    assert not out.exists()
    damaged = tmp_path / ".out.new" / everything[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    server.start("slim", source, out, *COMMAND)
    assert server.wait() == (0, [everything[1], *everything[3:]])
    assert files(out) == files(whole)


def test_side_files_that_went_since_the_kill_do_not_come_back(tmp_path, source, server):
    out = tmp_path / "out"
    (source / "vocab.txt").write_text("a")
    server.start("slim", source, out, *COMMAND, limit=3)
    assert server.wait()[0] == 9
    (source / "vocab.txt").unlink()
    server.start("slim", source, out, *COMMAND)
    assert server.wait()[0] == 0
    assert not (out / "vocab.txt").exists()


def test_what_a_killed_run_left_is_no_use_to_another(tmp_path, source, server):
    out = tmp_path / "out"
    server.start("slim", source, out, *COMMAND, limit=3)
    assert server.wait()[0] == 9
    server.start("slim", source, out, *COMMAND, "--width", "per_layer")
    code, written = server.wait()
    assert code == 0
    assert weights(out).keys() == set(written)


def test_two_runs_into_one_target(tmp_path, source):
    with fresh_folder(tmp_path / "out", need=0, overwrite=False) as new:
        (new / "x").write_text("first")
        with pytest.raises(errors.TargetError, match="another process is writing"):
            save(tmp_path / "out", llama(), LLAMA, format="torch")
    assert (tmp_path / "out" / "x").read_text() == "first"


def test_the_shell_command_leaves_torch_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flaxslim", "slim", "nowhere", "out"])
    monkeypatch.delenv("USE_TORCH", raising=False)
    monkeypatch.setenv("USE_TORCH", "AUTO")
    assert entry() == 1
    assert os.environ["USE_TORCH"] == "AUTO"  # whoever says something is heard


# --- proved layer by layer ----------------------------------------------------------------------


def test_the_proof_goes_layer_by_layer(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert main(["slim", str(source), str(out), "--by-layer", "--width", "per_layer"]) == 0
    assert "layer by layer" in capsys.readouterr().out
    assert json.loads((out / "flaxslim.json").read_text())["proof"]["ok"]
    assert main(["verify", str(source), str(out), "--by-layer"]) == 0
    assert "same function" in capsys.readouterr().out
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in index if ".mlp.up_proj" in name)
    one = out / index[name]
    tensors = load_file(one)
    tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, one, {"format": "pt"})
    assert main(["verify", str(source), str(out), "--by-layer"]) == 4
    assert "none of those before" in " ".join(capsys.readouterr().out.split())


def test_also_where_both_models_would_not_fit(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr(_verify, "_free_memory", lambda: 1000)
    assert main(["slim", str(source), str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "so the proof goes layer by layer; --whole runs them all the same" in said


def test_a_format_and_names_that_differ(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert main(["slim", str(source), str(out), "--format", "flax", "--by-layer"]) == 0
    assert main(["verify", str(source), str(out), "--by-layer"]) == 0
    assert "layer by layer" in capsys.readouterr().out
