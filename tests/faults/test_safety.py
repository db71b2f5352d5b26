"""No command runs what a checkpoint holds, asks the network without need, or leaves its folder."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults import tiny
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.cli import main

EVIL = """\
from pathlib import Path
Path({ran!r}).touch()
class Evil: pass
"""


@pytest.fixture
def ran(tmp_path) -> Path:
    """A file that is there if code of a checkpoint has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def evil(tmp_path, ran: Path) -> Path:
    """A checkpoint that asks in every way for its own code to be run."""
    folder = tiny.torch_folder(tmp_path / "evil")
    names = ("AutoConfig", "AutoModel", "FlaxAutoModel", "AutoTokenizer", "AutoImageProcessor")
    maps: dict[str, Any] = {"auto_map": dict.fromkeys(names, "evil.Evil")}
    maps["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    path = folder / "config.json"
    values = json.loads(path.read_text()) | maps | {"trust_remote_code": True}
    path.write_text(json.dumps(values))
    for name in ("tokenizer_config", "preprocessor_config", "processor_config"):
        own = {**maps, "tokenizer_class": "Evil", "image_processor_type": "Evil"}
        (folder / f"{name}.json").write_text(json.dumps(own))
    for name in ("evil", "modeling_evil", "configuration_llama", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(EVIL.format(ran=str(ran)))
    (folder / "texts.txt").write_text("the cat\n")
    ids = np.arange(32).reshape(4, 8) % tiny.WORDS
    np.savez(folder / "data.npz", input_ids=ids)
    return folder


@pytest.fixture
def offline(monkeypatch) -> list[str]:
    """No socket is opened; what asks for one is listed."""
    asked: list[str] = []

    def refuse(*args: Any, **_: Any) -> Any:
        asked.append(str(args[-1]))
        raise OSError("there is no network here")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    # A question would be answered by whoever is asked; nobody is.
    monkeypatch.setattr("builtins.input", refuse)
    return asked


COMMANDS: dict[str, tuple[list[str], int]] = {
    "inspect": (["inspect", "{evil}", "--json"], 0),
    "slim": (["slim", "{evil}", "{out}", "--by-layer", "--heads", "--width", "per_layer"], 0),
    "verify": (["verify", "{evil}", "{evil}", "--by-layer"], 0),
    # Its tokenizer is not to be had without its code.
    "prune": (["prune", "{evil}", "{out}", "--calibration", "{evil}/texts.txt", "--keep", "1"], 1),
    "sweep": (["sweep", "{evil}", "--calibration", "{evil}/texts.txt"], 1),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_code_of_a_checkpoint_is_run_and_nobody_is_asked(
    evil: Path, ran: Path, offline: list[str], tmp_path, capsys, monkeypatch, name: str
):
    monkeypatch.chdir(evil)
    arguments, code = COMMANDS[name]
    told = [part.format(evil=evil, out=tmp_path / "out") for part in arguments]
    assert main(told) == code, capsys.readouterr().err
    assert "unexpected" not in capsys.readouterr().err
    assert not ran.exists()
    assert not offline
    assert not (tmp_path / "out").exists() or name == "slim"


def test_code_that_travels_along_is_not_run_either(evil: Path, ran: Path, tmp_path):
    """It is a side file, which is copied; the new config goes on to ask for it."""
    assert main(["slim", str(evil), str(tmp_path / "out"), "--no-verify"]) == 0
    assert (tmp_path / "out" / "evil.py").is_file()
    read(tmp_path / "out")
    assert not ran.exists()


def test_a_pickle_that_would_run_code(tmp_path, ran: Path, capsys):
    torch = pytest.importorskip("torch")

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    folder = tiny.torch_folder(tmp_path / "bomb")
    state: dict[str, Any] = {
        path.replace("/", "."): torch.from_numpy(x) for path, x in flatten(tiny.weights()).items()
    }
    (folder / "model.safetensors").unlink()
    torch.save({**state, "bomb": Bomb()}, folder / "pytorch_model.bin")
    for command in (["inspect", str(folder)], ["slim", str(folder), str(tmp_path / "out")]):
        assert main(command) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "torch does not read this file as plain weights" in said
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # or the bomb would be none


def test_a_side_file_that_links_out(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    folder = tiny.torch_folder(tmp_path / "model")
    (folder / "tokenizer.json").symlink_to(secret)
    assert main(["slim", str(folder), str(tmp_path / "out"), "--no-verify"]) == 1
    assert "a link leads out of the checkpoint's folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "secret"]


def test_a_folder_that_links_out_does_not_travel_along(tmp_path, capsys):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("a key")
    folder = tiny.torch_folder(tmp_path / "model")
    (folder / "1_Pooling").symlink_to(tmp_path / "secrets")
    assert main(["slim", str(folder), str(tmp_path / "out"), "--no-verify"]) == 1
    assert "1_Pooling" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_a_link_is_written_where_it_leads(tmp_path):
    folder = tiny.torch_folder(tmp_path / "model")
    tiny.torch_folder(tmp_path / "there", seed=1)
    (tmp_path / "out").symlink_to(tmp_path / "there")
    assert main(["slim", str(folder), str(tmp_path / "out"), "--no-verify", "--overwrite"]) == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "there" / "flaxslim.json").is_file()


def test_ctrl_c_while_it_is_still_being_imported(tmp_path):
    """At any moment from the first line of `main` on: one line, and no traceback."""
    code = (
        "import builtins, signal, os, sys\n"
        "import flaxslim.cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # workers of xdist ignore it
        "stock = builtins.__import__\n"
        "def importing(name, *args, **kwargs):\n"
        "    if name == sys.argv[1]:\n"
        "        builtins.__import__ = stock\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return stock(name, *args, **kwargs)\n"
        "builtins.__import__ = importing\n"
        "sys.exit(flaxslim.cli.main(['slim', 'nowhere', 'out']))\n"
    )
    for name in ("tyro", "jax"):
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 130, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "stopped; nothing half-written is left" in done.stderr
