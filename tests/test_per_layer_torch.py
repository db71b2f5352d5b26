"""A width for each layer in the stock PyTorch classes: the example loads what `save` writes.

It runs as a script on a folder of every family with one stack of layers, against outputs of Flax:
with the transformers 4 of this environment, if torch is here, and with the transformers 5.14 or
later of another one, whose Python the variable FLAXSLIM_TORCH_PYTHON names.

Left out: DINOv2, whose config has no key for most widths, and BLOOM, whose has none at all.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from kill import kill
from zoo import CASES, Case, build

import flaxslim
from flaxslim._compat import shell
from flaxslim._inputs import inputs_for
from flaxslim.specs import spec_for

VARIABLE = "FLAXSLIM_TORCH_PYTHON"
EXAMPLE = Path(__file__).parents[1] / "examples" / "per_layer_in_torch.py"
# CLIP has two stacks of one class, each with a config of its own.
# fmt: off
FAMILIES = (
    "beit", "bert", "clip", "distilbert", "electra", "gemma", "gpt2", "gpt_neo", "gptj", "llama",
    "mistral", "opt", "roberta", "roberta_prelayernorm", "roformer", "vit", "wav2vec2", "xglm",
    "xlm_roberta",
)
# fmt: on
SHORT = ("bert", "clip", "gpt2", "llama", "vit")  # all others in the long run
DEEP = ("FlaxBertForMaskedLM", "FlaxLlamaForCausalLM")
# The head of the latter has an FFN of its own outside of the stack.
BIG_BIRD, REFUSED = "FlaxBigBirdForMaskedLM-full", "FlaxBigBirdForQuestionAnswering-full"

ATTEMPT = """
import json, pathlib, sys, transformers
sys.path.insert(0, sys.argv[1])
from per_layer_in_torch import load_per_layer

def attempt(how, folder):
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    load = load_per_layer if how == "per_layer" else cls.from_pretrained
    arguments = (cls, folder) if how == "per_layer" else (folder,)
    try:
        load(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"

print(json.dumps({folder: attempt(sys.argv[2], folder) for folder in sys.argv[3:]}))
"""


def _deep(case: Case) -> Case:
    """The case with twelve layers, whose numbers transformers 5 pads with zeros."""

    def config() -> Any:
        cfg = case.config()
        cfg.num_hidden_layers = 12
        return cfg

    return dataclasses.replace(case, variant="deep", config=config)


def _cases(*, short: bool) -> list[Case]:
    families = [family for family in FAMILIES if (family in SHORT) == short]
    one_each = [case for case in CASES if case.short and case.family in families]
    deep = [_deep(case) for case in one_each if str(case) in DEEP]
    big_bird = [case for case in CASES if str(case) == BIG_BIRD and not short]
    return [*one_each, *deep, *big_bird]


def _inputs(case: Case, cls: type, cfg: Any) -> dict[str, np.ndarray]:
    inputs = dict(inputs_for(cls, cfg, length=case.length))
    if case.family == "electra":  # the Flax class takes ones if none are given, PyTorch zeros
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    return inputs


def _outputs(cls: type, cfg: Any, params: Any, inputs: Any) -> dict[str, np.ndarray]:
    model = shell(cls, cfg)
    with jax.default_matmul_precision("highest"):
        result = jax.jit(lambda p, x: dict(model(**x, params=p)))(params, inputs)
    arrays = {name: np.asarray(x) for name, x in result.items() if isinstance(x, jax.Array)}
    return {name: x for name, x in arrays.items() if x.dtype.kind == "f"}


def _folder(parent: Path, case: Case) -> Path:
    """A slimmed checkpoint with PyTorch names, and what the Flax model gives for some inputs."""
    cls, cfg, params = build(case)
    if case.family == "mistral":  # the Flax class lets one token more into its window
        cfg.sliding_window = 4 * case.length
    params, _ = kill(params, spec_for(cfg).sites(params))
    slimmed, small = flaxslim.slim(params, cfg, width="per_layer")
    folder = flaxslim.save(parent / str(case), slimmed, small, format="torch")
    inputs = _inputs(case, cls, cfg)
    outputs = _outputs(cls, small, slimmed, inputs)
    arrays: dict[str, Any] = {f"inputs/{name}": x for name, x in inputs.items()}
    arrays |= {f"outputs/{name}": x for name, x in outputs.items()}
    np.savez(folder / "expected.npz", **arrays)
    return folder


def _run(python: str, *arguments: object) -> subprocess.CompletedProcess:
    # Tiny tensors: more threads only cost time.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def _attempts(python: str, how: str, folders: Sequence[Path]) -> dict[str, str]:
    """What a person sees who loads the folders: the error's name and text, or "loaded"."""
    done = _run(python, "-c", ATTEMPT, EXAMPLE.parent, how, *folders)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["here", VARIABLE])
def python(request) -> str:
    """The Python of an environment with torch."""
    if request.param == "here":
        pytest.importorskip("torch", reason="PyTorch is not installed")
        return sys.executable
    if not (path := os.environ.get(VARIABLE)):
        pytest.skip(f"{VARIABLE} names no Python with torch and transformers >= 5.14")
    return path


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["few", "rest"]
)
def folders(tmp_path_factory, request) -> list[Path]:
    parent = tmp_path_factory.mktemp("per-layer")
    return [_folder(parent, case) for case in _cases(short=request.param)]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Twelve layers, all of which keep the config that they were built from."""
    (case,) = (case for case in CASES if str(case) == "FlaxLlamaForCausalLM")
    return _folder(tmp_path_factory.mktemp("llama"), _deep(case))


def test_stock_classes_give_the_outputs_of_flax(python, folders, record_property):
    done = _run(python, EXAMPLE, *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    release, *lines = done.stdout.splitlines()
    record_property("release", release)
    if python != sys.executable:
        numbers = re.findall(r"\d+", release)[:2]
        assert (int(numbers[0]), int(numbers[1])) >= (5, 14), release
    shown = {line.split(" ")[0]: line for line in lines if "outputs differ by" in line}
    assert shown.keys() == {folder.name for folder in folders}
    causal = ("GPT2LMHead", "GPTNeoForCausal", "GPTJForCausal", "LlamaForCausal")
    generating = [line for key, line in shown.items() if any(name in key for name in causal)]
    assert len(generating) >= 2
    assert all("generates alike" in line for line in generating)


def test_the_card_of_a_folder_says_how_to_load_it(python, llama):
    card = (llama / "README.md").read_text(encoding="utf-8")
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", card, re.S) if "mock" in text)
    code = code.replace("this/folder", str(llama)) + (
        f"\nimport pathlib, sys\nsys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        "from per_layer_in_torch import difference, expected\n"
        f"print(difference(model, *expected(pathlib.Path({str(llama)!r}))))"
    )
    done = _run(python, "-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) <= 1e-5


def test_plain_from_pretrained_refuses_them(python, folders):
    """If it does not any more, the model card may say so."""
    wanted = "size mismatch" if python == sys.executable else "is a per-layer attribute"
    for folder, seen in _attempts(python, "plain", folders).items():
        assert re.match(r"RuntimeError|AmbiguousGlobalPerLayerAttributeError", seen), folder
        assert wanted in seen, folder


def test_a_width_outside_of_the_layers_is_refused(python, tmp_path):
    (case,) = (case for case in CASES if str(case) == REFUSED)
    seen = _attempts(python, "per_layer", [_folder(tmp_path, case)])
    wanted = "size mismatch" if python == sys.executable else "is a per-layer attribute"
    assert all(wanted in text for text in seen.values()), seen


def test_a_difference_would_show(example, llama, tmp_path, capsys):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    assert example.main([str(llama), str(copy)]) == 0
    with np.load(llama / "expected.npz") as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    arrays["outputs/logits"][0, 0, 0] += 1e-4 * np.abs(arrays["outputs/logits"]).max()
    np.savez(copy / "expected.npz", **arrays)
    assert example.main([str(llama), str(copy)]) == 1
    assert re.search(r"copy \(LlamaForCausalLM\): .* by 1\.0e-04.*: WRONG", capsys.readouterr().out)


def test_each_layer_has_its_width_and_all_share_one_config(example, llama):
    from transformers import LlamaForCausalLM

    model = example.load_per_layer(LlamaForCausalLM, llama)
    recorded = json.loads((llama / "config.json").read_text())
    own, default = recorded["per_layer_config"], recorded["intermediate_size"]
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths == [own.get(str(n), {}).get("intermediate_size", default) for n in range(12)]
    assert len(set(widths)) > 3
    assert model.config.per_layer_config == own
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    assert len(configs) > 12
    assert all(config is model.config for config in configs)
    # So that an attention which is chosen later reaches every layer.
    model.set_attn_implementation("eager")
    assert example.difference(model, *example.expected(llama)) <= 1e-5


@pytest.mark.parametrize("change", [0, 1, -1])
def test_widths_that_do_not_fit_are_an_error_and_nothing_stays_patched(
    example, llama, tmp_path, change
):
    from transformers import LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    recorded = json.loads((copy / "config.json").read_text())
    recorded["per_layer_config"]["0"]["intermediate_size"] += change
    (copy / "config.json").write_text(json.dumps(recorded))
    before = modeling_llama.LlamaDecoderLayer.__init__
    with pytest.raises(RuntimeError, match="size mismatch") if change else contextlib.nullcontext():
        example.load_per_layer(LlamaForCausalLM, copy)
    assert modeling_llama.LlamaDecoderLayer.__init__ is before
