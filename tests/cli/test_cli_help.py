"""`--help`: it teaches, it is the same for all commands, and it does not wait for jax."""

import subprocess
import sys

import pytest

from flaxslim.specs import COMPOSITES, FAMILIES

COMMANDS = ("inspect", "slim", "verify", "families", "demo", "run", "report")


def _words(text: str) -> str:
    """Without boxes and line breaks, wherever these fall."""
    return " ".join(text.replace("│", " ").split())


def test_main_help_lists_commands_and_exit_codes(run):
    result = run("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert f"• {command} " in result.out
    for code in (0, 1, 2, 3, 4, 130):
        assert f"\n  {code} " in result.out
    assert "FLAXSLIM_TRACEBACK=1" in result.out
    assert "cut the FFN channels and attention heads" in _words(result.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert f"Example: flaxslim {command}" in _words(result.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(run, command):
    text = _words(run(command, "--help").out)
    options = text.partition("─ options ─")[2]
    for option in options.split("--")[1:]:
        words = option.split("(default")[0].split()
        assert len(words) > 3, option


@pytest.mark.parametrize("arguments", [(), ("slim",), ("nope",), ("slim", "a", "b", "--nope")])
def test_wrong_usage_is_exit_code_2(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert "--help" in _words(result.err)
    assert not result.out


def test_wrong_value_of_an_option_says_what_it_takes(run, tmp_path):
    result = run("slim", "a", tmp_path / "b", "--format", "pickle")
    assert result.code == 2
    assert "flax-safetensors" in result.err


def test_help_imports_nothing_heavy():
    """Names, not seconds: a test of time would say more about the machine."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flaxslim", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: flaxslim" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"jax", "jaxlib", "flax", "transformers", "torch", "optax", "numpy"}


def test_families_lists_all(run):
    result = run("families")
    assert result.code == 0
    first = [line.split()[0] for line in result.out.splitlines() if line.strip()]
    assert {*FAMILIES, *COMPOSITES} <= set(first)
    assert "intermediate_size" in result.out
