"""Two tiny BERT checkpoints with dead channels, and commands run in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import flaxslim
from cli.tiny import DEAD, Result, Run, tiny
from flaxslim.cli import _report, main
from flaxslim.cli._console import console, messages


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """`run("slim", source, out)`: the command line as a user has it, on a wide screen."""
    for console_ in (console, messages):
        monkeypatch.setattr(console_, "width", 200)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # tyro's --help and wrong usage
            code = stop.code if isinstance(stop.code, int) else -1
        out, err = capsys.readouterr()
        return Result(code=code, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def untimed() -> Iterator[None]:
    """A run spends no time on timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_report, "_TIMED", 0.0)
        patch.setattr(_report, "_LEAST", 1)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same BERT with dead channels as Flax msgpack and with PyTorch names; and one with none.

    Each with a tokenizer and a model card.
    """
    top = tmp_path_factory.mktemp("checkpoints")
    params, cfg = tiny("FlaxBertForMaskedLM", DEAD)
    living, _ = tiny("FlaxBertForMaskedLM")
    folders = {
        "flax": flaxslim.save(top / "flax", params, cfg),
        "torch": flaxslim.save(top / "torch", params, cfg, format="torch"),
        "living": flaxslim.save(top / "living", living, cfg),
    }
    for folder in folders.values():
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny BERT\n\nOf no use.\n")
    return folders


@pytest.fixture
def flax_folder(checkpoints) -> Path:
    return checkpoints["flax"]


@pytest.fixture
def torch_folder(checkpoints) -> Path:
    return checkpoints["torch"]


@pytest.fixture
def living_folder(checkpoints) -> Path:
    return checkpoints["living"]
