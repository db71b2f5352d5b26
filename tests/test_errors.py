"""What each docstring of an error shows is so: the wrong line raises it, the right one works."""

import ast
import inspect
import textwrap
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import flaxslim
from flaxslim import errors

CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if inspect.isclass(found) and issubclass(found, Exception | Warning)
}
PUBLIC = ("slim", "plan", "apply", "verify", "discover", "Pair", "Spec")
BASES = {"FlaxslimError", "CheckpointError"}  # nothing raises CheckpointError itself
ELSEWHERE = {  # what these need, and the tests that have it
    "ShardingError": "several devices: test_sharded",
    "ProcessError": "several processes: test_processes",
    "HubError": "a network: checkpoint/test_hub",
    "ExportError": "a command line: cli/test_cli_export",
    "RecipeError": "a command line: test_recipe",
    "DivergedError": "a command line: test_training_loop",
    "CalibrationWarning": "a command line: test_calibration_data",
}


def example(found: type) -> str:
    """The indented lines of the docstring."""
    lines = inspect.cleandoc(found.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(x for x in lines if x.startswith("    ") or not x))


def steps(code: str) -> list[tuple[str, str]]:
    """The statements of an example, each with what its comment says of it."""
    lines, found = code.splitlines(), []
    for node in ast.parse(code).body:
        assert node.end_lineno is not None
        source = lines[node.lineno - 1 : node.end_lineno]
        found.append(("\n".join(source), source[-1].partition("  # ")[2].split(":")[0]))
    return found


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the examples use, as the module says they are."""
    monkeypatch.chdir(tmp_path)
    normal = np.random.default_rng(0).standard_normal

    def layer(n: int, m: int, dead: int = 0) -> dict[str, np.ndarray]:
        kernel = normal((n, m)).astype(np.float32)
        kernel[:dead] = 0.0
        return {"kernel": kernel, "bias": normal(m).astype(np.float32)}

    def block() -> dict[str, Any]:
        attention = {name: layer(8, 8) for name in ("query", "key", "value")}
        return {
            "attention": {"self": attention, "output": {"dense": layer(8, 8, dead=4)}},
            "intermediate": {"dense": layer(8, 6)},
            "output": {"dense": layer(6, 8, dead=3)},
        }

    def forward(params: Any, x: Any) -> Any:
        hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
        return hidden @ params["down"]["kernel"] + params["down"]["bias"]

    params = {"encoder": {"layer": {str(i): block() for i in range(2)}}}
    cfg = {
        "model_type": "bert",
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_act": "gelu",
    }

    class Model:
        pass

    model: Any = Model()
    model.params, model.config = params, cfg
    pair = flaxslim.Pair(first="up", second="down", activation="relu", width="hidden")

    def shapes(cfg: Any) -> Any:
        sizes = {"up": (3, cfg["hidden"]), "down": (cfg["hidden"], 2)}
        return {
            name: {
                "kernel": jax.ShapeDtypeStruct(size, np.float32),
                "bias": jax.ShapeDtypeStruct(size[1:], np.float32),
            }
            for name, size in sizes.items()
        }

    return {
        **{name: getattr(flaxslim, name) for name in PUBLIC},
        "flaxslim": flaxslim,
        "jax": jax,
        "np": np,
        "Path": Path,
        "params": params,
        "cfg": cfg,
        "model": model,
        "mlp": {"up": layer(3, 6), "down": layer(6, 2, dead=2)},
        "alive": {"up": layer(3, 6), "down": layer(6, 2)},
        "sizes": {"hidden": 6},
        "MLP": flaxslim.Spec(name="MLP", pairs=pair),
        "forward": forward,
        "shapes": shapes,
        "x": normal((64, 3)).astype(np.float32),
    }


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_an_example_and_a_mend(name: str) -> None:
    text = inspect.cleandoc(CLASSES[name].__doc__ or "")
    assert text.splitlines()[0].endswith(".")
    assert "\nMend: " in text
    if name not in BASES:
        assert ["# wrong" in text, "# right" in text] == [True, True]


@pytest.mark.parametrize("name", [x for x in CLASSES if x not in {*BASES, *ELSEWHERE}])
def test_the_wrong_line_raises_it_and_the_right_one_does_not(
    name: str, words: dict[str, Any]
) -> None:
    seen = []
    for source, word in steps(example(CLASSES[name])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for category in (x for x in CLASSES.values() if issubclass(x, Warning)):
                warnings.simplefilter("error", category)
            if word == "wrong":
                with pytest.raises(CLASSES[name]) as caught:
                    exec(source, words)
                assert caught.type is CLASSES[name]
            else:
                exec(source, words)
        seen.append(word)
    assert seen.count("wrong") == seen.count("right") == 1
