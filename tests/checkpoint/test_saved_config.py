"""Configs of every kind become a config.json, or an error that names the value."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import BertConfig

from flaxslim import errors
from flaxslim.checkpoint import read, save
from flaxslim.checkpoint._config import config_text

PARAMS = {"dense": {"kernel": np.ones((2, 3), np.float32)}}


@dataclasses.dataclass(frozen=True)
class Inner:
    heads: int = 2


@dataclasses.dataclass(frozen=True)
class Homemade:
    hidden: int = 8
    inner: Inner = dataclasses.field(default_factory=Inner)
    sizes: tuple = (1, 2)


def test_a_dataclass_is_written(tmp_path):
    found = read(save(tmp_path / "a", PARAMS, Homemade(hidden=np.int64(5)))).config  # pyright: ignore[reportArgumentType]
    assert (found.hidden, found.inner, found.sizes) == (5, {"heads": 2}, [1, 2])


def test_numpy_scalars_and_dtypes_become_plain():
    values = {
        "i": np.int32(3),
        "f": np.float64(0.5),
        "b": np.True_,
        "s": np.str_("x"),
        "deep": [{"n": np.uint8(1)}],
        "labels": {np.int64(0): "a"},
        "dtypes": (jnp.bfloat16, np.float16, np.dtype("int8")),
    }
    assert json.loads(config_text(values)) == {
        "i": 3,
        "f": 0.5,
        "b": True,
        "s": "x",
        "deep": [{"n": 1}],
        "labels": {"0": "a"},
        "dtypes": ["bfloat16", "float16", "int8"],
    }


def test_a_pretrained_config_with_numpy_scalars(tmp_path):
    cfg = BertConfig(intermediate_size=np.int64(40))  # pyright: ignore[reportArgumentType]
    found = read(save(tmp_path / "a", PARAMS, cfg)).config
    assert isinstance(found, BertConfig)
    assert found.intermediate_size == 40
    assert config_text(BertConfig()) == BertConfig().to_json_string()


class Dictlike:
    def to_dict(self):
        return {"hidden": 3}


def test_an_object_with_to_dict():
    assert json.loads(config_text(Dictlike(), "bfloat16")) == {
        "hidden": 3,
        "torch_dtype": "bfloat16",
    }


@pytest.mark.parametrize("cfg", [None, 3, Homemade, BertConfig, object()])
def test_what_is_no_config_is_refused(tmp_path, cfg):
    with pytest.raises(errors.ConfigError, match="cannot be written as JSON") as caught:
        save(tmp_path / "a", PARAMS, cfg)
    assert type(cfg).__name__ in str(caught.value)
    assert "a dataclass instance" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [object(), {1, 2}, np.ones(3), jnp.ones(2)])
def test_a_value_that_is_no_plain_data_is_named(value):
    with pytest.raises(errors.ConfigError, match=r"inner\.list\[1\]") as caught:
        config_text({"inner": {"list": [1, value]}})
    assert type(value).__name__ in str(caught.value)
