"""`flaxslim.__init__` names its public objects twice: for type checkers, and for use."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import flaxslim


def _for_type_checkers() -> dict[str, str]:
    """Public name -> module, from the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(inspect.getsource(flaxslim))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "not a re-export"
            found[alias.name] = node.module
    return found


def test_both_lists_are_the_same():
    assert _for_type_checkers() == {
        name: f"flaxslim.{module}" for module, names in flaxslim._PUBLIC.items() for name in names
    }


@pytest.mark.parametrize("name", sorted(flaxslim.__all__))
def test_name_resolves(name):
    value = getattr(flaxslim, name)
    if name != "__version__":
        module = importlib.import_module(_for_type_checkers()[name])
        assert value is getattr(module, name)
    assert name in dir(flaxslim)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'sliim'"):
        _ = flaxslim.sliim  # pyright: ignore[reportAttributeAccessIssue]


def test_import_is_light():
    code = "import flaxslim, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "transformers", "torch"} & set(done.stdout.split())
