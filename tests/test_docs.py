"""README.md and docs/ tell the truth: their code runs and prints what they say.

Of each page, the ```python blocks are one program, and an ```output block is what the code before
it prints. A ```py block needs a checkpoint: it is compiled, and its names are looked up. Commands,
flags, links and files that a page names exist.
"""

import ast
import contextlib
import importlib
import inspect
import io
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from scripts import loaded

import flaxslim

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = ("python", "py")


def _blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def _named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def _with(*languages: str) -> list[Any]:
    return _named([p for p in PAGES if any(language in languages for language, _ in _blocks(p))])


# --- Python -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", _with("python"))
def test_code_prints_what_the_page_says(page, tmp_path, monkeypatch):
    space: dict[str, object] = {"__name__": "page"}
    blocks = _blocks(page)
    monkeypatch.chdir(tmp_path)  # they save models
    with jax.numpy_rank_promotion("allow"):  # the stock classes need it
        for number, (language, text) in enumerate(blocks):
            if language == "output":
                assert blocks[number - 1][0] == "python", "an output without its code"
            if language != "python":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(text, "model.py", "exec"), space)  # some print where they are
            following = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
            expected = following[1] if following[0] == "output" else ""
            said = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert said == expected.splitlines()


@pytest.mark.parametrize("page", _with(*_CODE))
def test_names_of_ours_are_there(page):
    for language, text in _blocks(page):
        if language in _CODE:
            assert list(_wrong(ast.parse(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        "flaxslim.prone(params)",
        "from flaxslim import slimm",
        "import flaxslim.checkpoints",
        "from flaxslim.checkpoint import convert_orbx",
        "flaxslim.slim(params, cfg, widht='per_layer')",
        "from flaxslim import checkpoint as c\nc.read('x', eager=True)",
    ],
)
def test_a_wrong_name_is_seen(text):
    assert list(_wrong(ast.parse(text)))


def _wrong(tree: ast.Module) -> Iterator[str]:
    """Names of flaxslim, and arguments of its functions, that do not exist."""
    ours: dict[str, Any] = {"flaxslim": flaxslim}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "flaxslim" and not _module(alias.name):
                    yield alias.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flaxslim":
            for alias in node.names:
                found = _attribute(_module(node.module or ""), alias.name)
                if found is None:
                    yield f"{node.module}.{alias.name}"
                ours[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and inspect.ismodule(_value(node.value, ours)):
            yield from [ast.unparse(node)] * (_value(node, ours) is None)
        if isinstance(node, ast.Call) and callable(function := _value(node.func, ours)):
            takes = inspect.signature(function).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
                yield from (
                    f"{ast.unparse(node.func)}({k.arg}=)"
                    for k in node.keywords
                    if k.arg is not None and k.arg not in takes
                )


def _module(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


def _attribute(owner: Any, name: str) -> Any:
    """A name of a module, or a module in it."""
    if owner is None or (found := getattr(owner, name, None)) is not None:
        return None if owner is None else found
    return _module(f"{owner.__name__}.{name}") if inspect.ismodule(owner) else None


def _value(node: ast.expr, ours: dict[str, Any]) -> Any:
    """What a dotted name of ours stands for; None for names of others."""
    if isinstance(node, ast.Name):
        return ours.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, ours)
        return _attribute(owner, node.attr) if inspect.ismodule(owner) else None
    return None


# --- the shell --------------------------------------------------------------------------------


def _shell(page: Path) -> list[str]:
    """The lines of its ```sh blocks, without comments."""
    return [
        line.split("#")[0].strip()
        for language, text in _blocks(page)
        if language in ("sh", "bash", "console")
        for line in text.replace("\\\n", " ").splitlines()
        if line.split("#")[0].strip()
    ]


def _of_ours(page: Path) -> list[list[str]]:
    """The words of each `flaxslim` command: in ```sh blocks, and in the prose."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    spans = [" ".join(span.split()) for span in re.findall(r"`(flaxslim [^`]+)`", text)]
    steps = [step.strip() for line in _shell(page) for step in line.split("&&")]
    return [
        command.removeprefix(".venv/bin/").split()
        for command in (*spans, *steps)
        if command.removeprefix(".venv/bin/").startswith("flaxslim ")
    ]


@pytest.mark.parametrize("page", _named([page for page in PAGES if _of_ours(page)]))
def test_commands_and_their_flags_are_there(page):
    for words in _of_ours(page):
        assert _unknown(words) == [], " ".join(words)


@pytest.mark.parametrize("command", ["flaxslim slm x y", "flaxslim slim x y --depth 3"])
def test_a_wrong_command_is_seen(command):
    assert _unknown(command.split())


def _unknown(words: list[str]) -> list[str]:
    """What of a command line is no command or flag of ours."""
    from flaxslim.cli import _by_name

    commands = _by_name()
    _, *rest = words
    names = [word for word in rest[:1] if not word.startswith("-")]
    if unknown := [name for piece in names for name in piece.split("|") if name not in commands]:
        return unknown
    flags = {"--help"}
    for name in names:
        for parameter in inspect.signature(commands[name.split("|")[0]]).parameters:
            dashed = parameter.replace("_", "-")
            flags |= {f"--{dashed}", f"--no-{dashed}"}
    return [word for word in rest if word.startswith("--") and word.split("=")[0] not in flags]


@pytest.mark.parametrize("last", ["flaxslim demo", "pytest"])
def test_one_command_each_from_a_fresh_clone(last):
    fresh = [command for command in _shell(README) if command.startswith("python3 ")]
    assert len(fresh) == 2
    (command,) = (c for c in fresh if re.search(rf"{last}( -n \d+)?$", c))
    steps = [step.strip() for step in command.split("&&")]
    assert steps[0] == "python3 -m venv .venv"
    assert steps[1].startswith(".venv/bin/pip install -e ")
    assert steps[2].startswith(".venv/bin/")
    assert command.count("\n") == 0


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", _named(PAGES))
def test_what_it_names_is_there(page):
    """Relative links, files of this repository, and extras that it installs."""
    text = page.read_text(encoding="utf-8")
    prose = _BLOCK.sub("", text)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        assert "://" in link or (page.parent / link).exists(), link
    folders = "examples|benchmarks|flaxslim|configs|tests|docs"
    for name in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]+\.\w+", text):
        assert (ROOT / name).exists(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"(?:\.|flaxslim)\[([\w,]+)\]", text)
    assert {name for some in extras for name in some.split(",")} <= {
        *project["optional-dependencies"]
    }


def test_extras_and_versions_are_those_of_the_project():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    section = text.split("\n## Extras, devices, versions\n")[1].split("\n## ")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(extras) == sorted(project["optional-dependencies"])
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in section
    said = re.findall(
        r"^\| (\w+) \| ([\d.]+) or later(?:, below (\d+))? \|$", section, re.MULTILINE
    )
    assert len(said) == 5
    for name, least, below in said:
        assert f"{name}>={least}" + f",<{below}" * bool(below) in project["dependencies"]


@pytest.mark.parametrize("page", _named(PAGES))
def test_nothing_is_left_to_fill_in(page):
    assert re.findall(r"@[A-Z0-9]+@|TODO|XXX", page.read_text(encoding="utf-8")) == []


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def test_the_picture_is_what_its_script_draws():
    script = ROOT / "docs" / "pictures" / "idea.py"
    assert script.with_suffix(".svg").read_text(encoding="utf-8") == loaded(script).picture()


def test_families_are_those_of_the_registry():
    from flaxslim.specs import COMPOSITES, FAMILIES

    text = README.read_text(encoding="utf-8")
    section = text.split("\n## Families\n")[1].split("\n## ")[0]
    plain = re.sub(r"[^a-z0-9]", "", section.lower())
    for name in (*FAMILIES, *COMPOSITES):
        # Only the composite is named in words; its two towers are parts of it.
        name = name.removesuffix("_text_model").removesuffix("_vision_model")
        assert re.sub(r"[^a-z0-9]", "", name.lower()) in plain, name
