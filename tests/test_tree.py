"""Every container as `path -> leaf`, and back as the same kind."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze

from flaxslim._tree import flatten, replace
from flaxslim.errors import PlanError, UnsupportedTreeError


class Mlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.down = nnx.Linear(3, 2, rngs=rngs)


NESTED = {"b": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "a": {"x": np.zeros(1)}}
PATHS = {"b/kernel", "b/bias", "a/x"}


@pytest.mark.parametrize(
    "tree",
    [
        NESTED,
        freeze(NESTED),
        collections.OrderedDict(NESTED),
        {"b/kernel": np.ones((2, 3)), "b/bias": np.ones(3), "a/x": np.zeros(1)},
        nnx.State({k: {n: nnx.Param(v) for n, v in d.items()} for k, d in NESTED.items()}),
        {k: {n: nn.Partitioned(v, names=(None,)) for n, v in d.items()} for k, d in NESTED.items()},
    ],
    ids=["dict", "FrozenDict", "OrderedDict", "flat", "nnx.State", "Partitioned"],
)
def test_containers_are_walked_and_rebuilt(tree):
    leaves = flatten(tree)
    assert set(leaves) == PATHS
    new = replace(tree, {"b/kernel": np.zeros((2, 1))})
    assert type(new) is type(tree)
    after = flatten(new)
    assert set(after) == PATHS
    assert after["b/kernel"].shape == (2, 1)
    assert after["b/bias"] is leaves["b/bias"]
    assert after["a/x"] is leaves["a/x"]
    assert flatten(tree)["b/kernel"] is leaves["b/kernel"]


def test_boxes_stay_boxes():
    box = nn.Partitioned(jnp.ones((2, 3)), names=("embed", "mlp"))
    new = replace({"k": box}, {"k": jnp.ones((2, 1))})["k"]
    assert isinstance(new, nn.Partitioned)
    assert new.names == ("embed", "mlp")
    assert new.value.shape == (2, 1)
    assert box.value.shape == (2, 3)


def test_a_key_named_value_is_not_taken_for_a_box():
    assert set(flatten({"attention": {"value": {"kernel": 1}, "key": 2}, "value": 3})) == {
        "attention/value/kernel",
        "attention/key",
        "value",
    }


def test_lists_and_int_keys_have_their_index_for_a_name():
    assert set(flatten({"layers": [{"w": 1}, {"w": 2}], "blocks": {0: {"w": 3}}})) == {
        "layers/0/w",
        "layers/1/w",
        "blocks/0/w",
    }


def test_an_nnx_module_is_rebuilt_with_all_its_state():
    module = Mlp()
    leaves = flatten(module)
    assert {"up/kernel", "down/bias", "norm/mean", "norm/scale"} <= set(leaves)
    new = replace(module, {"up/kernel": jnp.zeros((2, 3))})
    assert isinstance(new, Mlp)
    assert new is not module
    assert new.up is not module.up
    assert not new.up.kernel[...].any()
    assert module.up.kernel[...].any()
    after = flatten(new)
    for path in set(leaves) - {"up/kernel"}:
        assert after[path] is leaves[path], path


def test_a_frozen_dict_inside_of_a_dict_stays_frozen():
    new = replace({"params": freeze({"a": 1, "b": 2})}, {"params/a": 3})
    assert type(new) is dict
    assert type(new["params"]) is FrozenDict
    assert new["params"]["b"] == 2


@pytest.mark.parametrize("tree", [np.ones(3), 3.0, "weights", object()])
def test_something_that_is_no_tree_is_refused(tree):
    with pytest.raises(UnsupportedTreeError, match="is not a tree of parameters") as caught:
        flatten(tree)
    assert "model.params" in str(caught.value)


def test_two_leaves_with_one_path_are_refused():
    with pytest.raises(UnsupportedTreeError, match="two leaves have the same path") as caught:
        flatten({"a/b": 1, "a": {"b": 2}})
    assert "a/b" in str(caught.value)


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(PlanError, match="no such tensor") as caught:
        replace({"a": 1}, {"b": 2})
    assert "b" in str(caught.value)


def test_an_empty_tree_has_no_leaves():
    assert flatten({}) == {}
    assert replace({"a": {}}, {}) == {"a": {}}
