"""What a model card says of loading: in the way that the model can be loaded."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import flaxslim
from flaxslim import Pair, Spec
from flaxslim.checkpoint._card import how_to_load

LAID_OUT = {"flaxslim_layout": {"version": 1, "sites": {"/down": 3}}}


@dataclasses.dataclass(slots=True)
class Slots:
    hidden: int = 8
    flaxslim_layout: Any = None


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"model_type": "bert", **LAID_OUT}, "from_pretrained(FlaxAutoModel,"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"], **LAID_OUT},
            "from_pretrained(FlaxBertForMaskedLM,",
        ),
        (
            {
                "model_type": "clip",
                "text_config": {"model_type": "clip_text_model", **LAID_OUT},
                "vision_config": {"model_type": "clip_vision_model"},
            },
            "from_pretrained(FlaxAutoModel,",
        ),
        ({"model_type": "mine", **LAID_OUT}, "flaxslim.module(YourModule, cfg)"),
        (Slots(flaxslim_layout=LAID_OUT["flaxslim_layout"]), "flaxslim.module(YourModule, cfg)"),
        (Slots(), ""),
        ({"model_type": "clip", "text_config": {}}, ""),
    ],
)
def test_how_to_load(cfg, words):
    text = how_to_load(cfg, "flax")
    assert words in text
    assert bool(text) == bool(words)
    assert ("transformers" in text) == ("from_pretrained" in words)


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="down")(nn.relu(nn.Dense(self.hidden, name="up")(x)))


@dataclasses.dataclass(slots=True)
class Config:
    hidden: int = 6
    flaxslim_layout: Any = None
    per_layer_config: Any = None


def test_the_code_on_the_card_of_a_model_of_ones_own_runs_it(tmp_path):
    x = np.ones((1, 3), np.float32)
    variables = jax.tree.map(np.array, MLP(6).init(jax.random.key(0), x))
    variables["params"]["down"]["kernel"][:] = 0  # no plain config key says a width of 0
    pair = Pair(first="up", second="down", activation="relu", width="hidden")
    spec = Spec(name="MLP", pairs=pair)
    small, cfg = flaxslim.slim(variables, Config(), spec, width="per_layer")
    folder = flaxslim.save(tmp_path / "small", small, cfg)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"YourModule": MLP}
    exec(code.replace("this/folder", str(folder)), names)
    after = names["model"].apply(names["params"], x)
    np.testing.assert_array_equal(after, MLP(6).apply(variables, x))
