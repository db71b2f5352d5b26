"""README.md tells the truth: its code runs and prints what it says, and two commands are enough."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flaxslim

README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks() -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return _BLOCK.findall(README.read_text(encoding="utf-8"))


def test_code_prints_what_the_readme_says(tmp_path, monkeypatch):
    """The ```python blocks are one program; an ```output block follows the code that prints it."""
    space: dict[str, object] = {"__name__": "readme"}
    blocks = _blocks()
    shown = 0
    monkeypatch.chdir(tmp_path)  # it saves a model
    with jax.numpy_rank_promotion("allow"):  # the stock classes need it
        for number, (language, text) in enumerate(blocks):
            if language != "python":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, f"README.md, block {number}", "exec"), space)
            following = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
            expected = following[1] if following[0] == "output" else ""
            assert printed.getvalue().splitlines() == expected.splitlines()
            shown += following[0] == "output"
    assert shown == sum(language == "output" for language, _ in blocks)
    assert shown >= 4


def test_what_it_says_that_explain_says():
    """The ```text block after the discovery, of its code in a file called model.py."""
    (code,) = (text for _, text in _blocks() if "flaxslim.discover(model" in text)
    (said,) = (text for language, text in _blocks() if language == "text" and "is tied" in text)
    space: dict[str, Any] = {"flaxslim": flaxslim, "jax": jax, "jnp": jnp}
    space |= {"slim": flaxslim.slim, "verify": flaxslim.verify}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "model.py", "exec"), space)
    text = flaxslim.explain(space["model"], space["weights"], "colours", space["x"])
    assert text.startswith("colours (9, 3). " + " ".join(said.split()))


def _commands() -> list[str]:
    return [
        line.split("#")[0].strip()
        for language, text in _blocks()
        if language in ("sh", "bash", "console")
        for line in text.splitlines()
        if line.strip()
    ]


@pytest.mark.parametrize("last", ["flaxslim demo", "pytest"])
def test_one_command_each_from_a_fresh_clone(last):
    fresh = [command for command in _commands() if command.startswith("python3 ")]
    assert len(fresh) == 2
    (command,) = (c for c in fresh if re.search(rf"{last}( -n \d+)?$", c))
    steps = [step.strip() for step in command.split("&&")]
    assert steps[0] == "python3 -m venv .venv"
    assert steps[1].startswith(".venv/bin/pip install -e ")
    assert steps[2].startswith(".venv/bin/")
    assert command.count("\n") == 0


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"@[A-Z]+@", README.read_text(encoding="utf-8")) == []


def test_files_and_options_that_it_names_are_there():
    """Relative links, scripts of this repository, and extras that it installs."""
    import tomllib

    text = README.read_text(encoding="utf-8")
    root = README.parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    scripts = re.findall(r"(?:examples|benchmarks|flaxslim)/[\w/]+\.py", text)
    assert links
    assert scripts
    for name in (*links, *scripts):
        assert (root / name).exists(), name
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(project["optional-dependencies"])


def test_families_are_those_of_the_registry():
    from flaxslim.specs import COMPOSITES, FAMILIES

    text = README.read_text(encoding="utf-8")
    section = text.split("\n## Families\n")[1].split("\n### ")[0]
    plain = re.sub(r"[^a-z0-9]", "", section.lower())
    for name in (*FAMILIES, *COMPOSITES):
        # Only the composite is named in words; its two towers are parts of it.
        name = name.removesuffix("_text_model").removesuffix("_vision_model")
        assert re.sub(r"[^a-z0-9]", "", name.lower()) in plain, name
