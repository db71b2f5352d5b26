"""A width for each layer in the stock PyTorch classes: the example loads what `save` writes.

It runs on a folder of every family with one stack of layers, against outputs of Flax: with the
transformers 4 of this environment, if torch is here, and as a script with the transformers 5.14 or
later of another one, whose Python the variable FLAXSLIM_TORCH_PYTHON names.

Left out: DINOv2, whose config has no key for most widths, and BLOOM, whose has none at all.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import torch_claims
from kill import kill
from scripts import loaded
from transformers import FlaxLlamaForCausalLM
from zoo import CASES, Case, build

import flaxslim
from flaxslim._compat import shell
from flaxslim._inputs import inputs_for
from flaxslim.specs import spec_for

VARIABLE = "FLAXSLIM_TORCH_PYTHON"
EXAMPLE = Path(__file__).parents[1] / "examples" / "per_layer_in_torch.py"
TROUBLESHOOTING = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
# CLIP has two stacks of one class, each with a config of its own.
# fmt: off
FAMILIES = (
    "beit", "bert", "clip", "distilbert", "electra", "gemma", "gpt2", "gpt_neo", "gptj", "llama",
    "mistral", "opt", "roberta", "roberta_prelayernorm", "roformer", "vit", "wav2vec2", "xglm",
    "xlm_roberta",
)
# fmt: on
SHORT = ("bert", "clip", "gpt2", "llama", "vit")  # all others in the long run
# Of twelve layers in every run, of two besides in the long one.
DEEP = ("FlaxLlamaForCausalLM",)
# The head of the latter has an FFN of its own outside of the stack.
BIG_BIRD, REFUSED = "FlaxBigBirdForMaskedLM-full", "FlaxBigBirdForQuestionAnswering-full"


def _deep(case: Case) -> Case:
    """The case with twelve layers, whose numbers transformers 5 pads with zeros."""

    def config() -> Any:
        cfg = case.config()
        cfg.num_hidden_layers = 12
        return cfg

    return dataclasses.replace(case, variant="deep", config=config)


def _cases(*, short: bool) -> list[Case]:
    one_each = [case for case in CASES if case.short and case.family in FAMILIES]
    few = [case for case in one_each if case.family in SHORT]
    if short:
        return [_deep(case) if str(case) in DEEP else case for case in few]
    rest = [case for case in one_each if case not in few or str(case) in DEEP]
    return [*rest, *(case for case in CASES if str(case) == BIG_BIRD)]


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


def _save(folder: Path, case: Case) -> None:
    """A slimmed checkpoint with PyTorch names, and what the Flax model gives for some inputs."""
    cls, cfg, params = build(case)
    if case.family == "mistral":  # the Flax class lets one token more into its window
        cfg.sliding_window = 4 * case.length
    params, _ = kill(params, spec_for(cfg).sites(params))
    slimmed, small = flaxslim.slim(params, cfg, width="per_layer")
    flaxslim.save(folder, slimmed, small, format="torch")
    inputs = _inputs(case, cls, cfg)
    outputs = _outputs(cls, small, slimmed, inputs)
    arrays: dict[str, Any] = {f"inputs/{name}": x for name, x in inputs.items()}
    arrays |= {f"outputs/{name}": x for name, x in outputs.items()}
    np.savez(folder / "expected.npz", **arrays)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[Case], Path]:
    """The folder of a case, which is made once."""
    parent = tmp_path_factory.mktemp("per-layer")

    def folder(case: Case) -> Path:
        if not (parent / str(case)).exists():
            _save(parent / str(case), case)
        return parent / str(case)

    return folder


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["few", "rest"]
)
def folders(folder_of, request) -> list[Path]:
    return [folder_of(case) for case in _cases(short=request.param)]


@pytest.fixture(scope="module")
def llama(folder_of) -> Path:
    """Twelve layers, all of which keep the config that they were built from."""
    (case,) = (case for case in CASES if str(case) == "FlaxLlamaForCausalLM")
    return folder_of(_deep(case))


@pytest.fixture(scope="module", params=["here", VARIABLE])
def where(request) -> ModuleType | str:
    """The example as a module, or the Python of another environment with torch."""
    if request.param == "here":
        return request.getfixturevalue("example")
    if not (path := os.environ.get(VARIABLE)):
        pytest.skip(f"{VARIABLE} names no Python with torch and transformers >= 5.14")
    return path


@pytest.fixture(scope="module")
def seen(where, folders, llama, folder_of) -> dict[str, Any]:
    """What comes of loading the folders there."""
    (refused,) = (case for case in CASES if str(case) == REFUSED)
    card = (llama / "README.md").read_text(encoding="utf-8")
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", card, re.S) if "mock" in text)
    work = {
        "card": [code.replace("this/folder", str(llama)), str(llama)],
        "example": [*map(str, folders)],
        "per_layer": [str(folder_of(refused))],
        "plain": [*map(str, folders)],
    }
    return _seen_by(where, work) if isinstance(where, str) else torch_claims.seen(where, work)


def _seen_by(python: str, work: Mapping[str, Any]) -> dict[str, Any]:
    # Tiny tensors: more threads only cost time.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    command = [python, torch_claims.__file__, str(EXAMPLE.parent), json.dumps(work)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = loaded(EXAMPLE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def test_stock_classes_give_the_outputs_of_flax(where, seen, folders, record_property):
    code, out = seen["example"]
    assert code == 0, out
    release, *lines = out.splitlines()
    record_property("release", release)
    if isinstance(where, str):
        numbers = re.findall(r"\d+", release)[:2]
        assert (int(numbers[0]), int(numbers[1])) >= (5, 14), release
    shown = {line.split(" ")[0]: line for line in lines if "outputs differ by" in line}
    assert shown.keys() == {folder.name for folder in folders}
    causal = ("GPT2LMHead", "GPTNeoForCausal", "GPTJForCausal", "LlamaForCausal")
    generating = [line for key, line in shown.items() if any(name in key for name in causal)]
    assert len(generating) >= 2
    assert all("generates alike" in line for line in generating)


def test_the_card_of_a_folder_says_how_to_load_it(seen):
    assert seen["card"] <= 1e-5


def test_plain_from_pretrained_refuses_them(where, seen, folders):
    """If it does not any more, the model card may say so."""
    wanted = "is a per-layer attribute" if isinstance(where, str) else "size mismatch"
    assert wanted in TROUBLESHOOTING.read_text()
    assert seen["plain"].keys() == {str(folder) for folder in folders}
    for folder, text in seen["plain"].items():
        assert re.match(r"RuntimeError|AmbiguousGlobalPerLayerAttributeError", text), folder
        assert wanted in text, folder


def test_the_plain_flax_class_refuses_it_in_the_words_of_the_docs(llama):
    with pytest.raises(ValueError, match="PyTorch checkpoint seems to be incorrect") as error:
        FlaxLlamaForCausalLM.from_pretrained(llama)
    said = f"`ValueError: {str(error.value).partition(' Weight ')[0]} Weight ... was expected"
    assert said in TROUBLESHOOTING.read_text()


def test_a_width_outside_of_the_layers_is_refused(where, seen):
    wanted = "is a per-layer attribute" if isinstance(where, str) else "size mismatch"
    (text,) = seen["per_layer"].values()
    assert wanted in text


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
