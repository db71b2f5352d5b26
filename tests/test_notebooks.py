"""The notebooks run from start to end, and what they show is what a run of them prints."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import loaded

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
pytest.importorskip("ipykernel", reason="notebooks need a kernel")


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return loaded(FOLDER / "execute.py")


def _read(name: str) -> Any:
    import nbformat

    return nbformat.read(FOLDER / name, as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_was_run_whole_and_in_order(name):
    cells = [cell for cell in _read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    images = [
        o.data["image/png"] for c in cells for o in c.outputs if "image/png" in o.get("data", {})
    ]
    assert images
    assert all(len(image) * 3 / 4 < 60_000 for image in images)
    text = json.dumps(_read(name))
    assert "/root" not in text
    assert "/work" not in text


def _same(runner: ModuleType, name: str) -> None:
    """A run of it prints the words that are committed; numbers may be those of another machine."""
    before = runner.texts(_read(name))
    assert runner.texts(runner.executed(FOLDER / name)) == before


@pytest.mark.long
def test_digits(runner):
    _same(runner, "digits.ipynb")


@pytest.mark.long
def test_hub_checkpoint(runner, data, monkeypatch):
    monkeypatch.setenv("SOURCE", str(data / "sentence-encoder"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _same(runner, "hub_checkpoint.ipynb")


def test_another_output_would_be_seen(runner):
    notebook = _read("digits.ipynb")
    before = runner.texts(notebook)
    printed = next(
        o
        for c in notebook.cells
        for o in c.get("outputs", ())
        if "equal: True" in o.get("text", "")
    )
    printed.text = printed.text.replace("True", "False")
    assert runner.texts(notebook) != before
