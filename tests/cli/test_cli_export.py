"""`flaxslim export`: a file that computes what the stock class does, without it."""

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kill import kill
from safetensors import safe_open
from scripts import loaded
from zoo import CASES, build

import flaxslim
from flaxslim import _export
from flaxslim._compat import shell
from flaxslim._inputs import inputs_for
from flaxslim._model import outputs
from flaxslim._tree import flatten
from flaxslim.checkpoint._folder import listing
from flaxslim.cli import main
from flaxslim.errors import ExportError, ProofError, TargetError
from flaxslim.specs import spec_for

LOADER = Path(__file__).parents[2] / "examples" / "run_exported.py"
# transformers and flax cannot be imported there; one process for many files, since jax is slow.
ELSEWHERE = """
import json, sys
sys.modules["transformers"] = sys.modules["flax"] = sys.modules["flaxslim"] = None
import numpy as np
sys.path.insert(0, sys.argv[1])
from run_exported import load
for work in json.loads(sys.argv[2]):
    models = load(work["file"])
    for name, inputs, outputs in work["calls"]:
        found = models[name](dict(np.load(inputs)))
        np.savez(outputs, **{path.replace("/", "|"): x for path, x in found.items()})
"""


def _case(name: str) -> Any:
    return next(case for case in CASES if str(case) == name)


def _dead(name: str) -> tuple[type, Any, Any]:
    """A tiny model with dead channels, another number in each layer."""
    cls, cfg, params = build(_case(name))
    params, _ = kill(params, spec_for(cfg).sites(params, cfg))
    return cls, cfg, params


# Class, arguments of `slim` (None: dense), and the flags of the command.
CASES_OF_EXPORT: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "dense": ("FlaxBertForMaskedLM", None, "--batch 2 --platforms cpu --no-verify"),
    "per_layer": (
        "FlaxBertForMaskedLM",
        {"width": "per_layer"},
        "--batch 1,2 --length 6 --platforms cpu --no-verify",
    ),
    "uniform": ("FlaxLlamaForCausalLM", {}, ""),
}
# The programs to run, with the sizes of the inputs.
CALLS = {
    "dense": [("batch=2,length=symbolic", 2, 5)],
    "per_layer": [("batch=1,length=6", 1, 6), ("batch=2,length=6", 2, 6)],
    "uniform": [("batch=symbolic,length=symbolic", 3, 7)],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """(call of the stock class, file) by case, by the command line."""
    top, made = tmp_path_factory.mktemp("exported"), {}
    for key, (name, how, flags) in CASES_OF_EXPORT.items():
        cls, cfg, params = _dead(name)
        if how is not None:
            params, cfg = flaxslim.slim(params, cfg, **how)
        folder, file = flaxslim.save(top / key, params, cfg), top / f"{key}.jaxexport"
        assert main(["export", str(folder), str(file), *flags.split()]) == 0
        if key == "per_layer":
            made[key] = flaxslim.from_pretrained(cls, folder), file
            continue
        model = shell(cls, cfg)  # which does without the random numbers of a new model
        made[key] = functools.partial(model, params=params), file
    return made


def test_a_process_without_transformers_and_flax_gives_what_the_stock_class_gives(
    exported, tmp_path
):
    work, expected = [], []
    for key, (call, file) in exported.items():
        model, calls = getattr(call, "func", call), []
        for name, batch, length in CALLS[key]:
            inputs = inputs_for(type(model), model.config, batch=batch, length=length)
            stem = tmp_path / f"{key}-{batch}"
            np.savez(f"{stem}.in.npz", allow_pickle=False, **inputs)
            calls.append([name, f"{stem}.in.npz", f"{stem}.out.npz"])
            expected.append((f"{stem}.out.npz", outputs(jax.jit(call)(**inputs))))
        work.append({"file": str(file), "calls": calls})
    arguments = [sys.executable, "-c", ELSEWHERE, str(LOADER.parent), json.dumps(work)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path, outs in expected:
        with np.load(path) as found:
            assert set(found) == set(outs)
            for name, x in outs.items():
                assert np.abs(found[name] - x).max() <= 1e-5 * np.abs(x).max(), path


def test_parameters_are_no_constants_and_are_those_of_the_slimmed_model(exported):
    for key, (call, file) in exported.items():
        flat = flatten(call.keywords["params"] if key != "per_layer" else call.params)
        with safe_open(file, framework="np") as stored:
            programs = stored.metadata()["programs"].split()
            assert programs == [name for name, *_ in CALLS[key]]
            platforms = "cpu,cuda,tpu" if key == "uniform" else "cpu"
            assert stored.metadata()["platforms"] == platforms
            assert set(stored.keys()) == {*flat, *programs}
            shapes = {path: tuple(stored.get_slice(path).get_shape()) for path in flat}
            # A constant would stand in the program with its values, which are random.
            texts = [stored.get_tensor(name).tobytes() for name in programs]
            largest = max(flat, key=lambda path: flat[path].size)
            assert not any(np.asarray(flat[largest])[0].tobytes() in text for text in texts)
        assert shapes == {path: x.shape for path, x in flat.items()}


def test_the_help_teaches(run):
    text = " ".join(run("export", "--help").out.replace("│", " ").split())
    assert "Example: flaxslim export smaller model.jaxexport" in text
    assert "symbolic: any batch size; or numbers" in text


# --- what is refused --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any, type]:
    cls, cfg, params = build(_case("FlaxBertForMaskedLM"))
    return params, cfg, cls


def test_a_longer_sequence_than_the_model_has_positions_is_refused(bert, exported, tmp_path):
    params, cfg, _ = bert
    limit = cfg.max_position_embeddings
    with pytest.raises(ExportError, match=f"at most {limit}"):
        flaxslim.export(tmp_path / "x", params, cfg, length=limit + 1)
    _, file = exported["dense"]
    load = _loader()
    long = {"input_ids": np.ones((2, limit + 1), np.int32)} | {
        "attention_mask": np.ones((2, limit + 1), np.int32)
    }
    with pytest.raises(ValueError, match="refining shapes"):  # as JAX says it
        load(file)["batch=2,length=symbolic"](long)
    assert listing(tmp_path, 1) == "nothing"


def _loader() -> Any:
    return loaded(LOADER).load


def test_a_class_that_needs_numbers_is_told_to_give_them(bert, tmp_path, monkeypatch):
    params, cfg, cls = bert
    stock: Any = cls.__call__

    def call(self, input_ids, *args, **kwargs):
        assert isinstance(int(input_ids.shape[1]), int)  # as a class does that counts blocks
        return stock(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(cls, "__call__", functools.wraps(stock)(call))
    with pytest.raises(ExportError, match="cannot be traced with sizes that are left open") as e:
        flaxslim.export(tmp_path / "x", params, cfg, platforms=("cpu",), batch=2)
    assert "--length" in str(e.value)
    assert "--batch" not in str(e.value)
    assert listing(tmp_path, 1) == "nothing"


def test_a_program_that_computes_something_else_is_not_written(bert, tmp_path, monkeypatch):
    params, cfg, cls = bert
    other = copy.deepcopy(cfg)
    other.hidden_act = "relu"
    wrong = _export.programs(params, other, cls, batch=2, length=6, platforms=("cpu",))
    monkeypatch.setattr(_export, "programs", lambda *_, **__: wrong)
    with pytest.raises(ProofError, match="does not give what the class gives"):
        flaxslim.export(tmp_path / "wrong", params, cfg)
    assert listing(tmp_path, 2) == "nothing"


def test_only_an_earlier_export_is_replaced(bert, tmp_path):
    params, cfg, _ = bert
    target = tmp_path / "notes.txt"
    target.write_text("mine")
    with pytest.raises(TargetError, match="exists"):
        flaxslim.export(target, params, cfg)
    with pytest.raises(TargetError, match="something else"):
        flaxslim.export(target, params, cfg, overwrite=True)
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "one"), "--batch takes symbolic, or numbers"),
        (("--batch", "0"), "the batch is a positive number"),
        (("--platforms", "gpu"), "JAX has no such platform"),
        (("--model", "FlaxBertMaskedLM"), "nearest:  FlaxBertForMaskedLM"),
    ],
)
def test_a_wrong_flag_says_what_it_takes(run, flax_folder, tmp_path, flags, message):
    result = run("export", flax_folder, tmp_path / "x", *flags)
    assert result.code == 1
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_the_guide_has_the_loader():
    text = LOADER.read_text().split("\ndef load(path):\n")[1].split("\n\n\n")[0]
    lines = [line.split("  # noqa")[0] for line in text.splitlines() if '"""' not in line]
    assert len(lines) < 15
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "serving.md").read_text()
    assert "\n".join(["def load(path):", *lines]) in guide
