"""The T5-like classes run on a JAX whose `jnp.clip` lost `a_max`; shells hold no weights."""

import importlib
import inspect
import threading
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from zoo import CASES, Case, build

from flaxslim._compat import clip_compat, parameter_shapes, shell, stock_config
from flaxslim._inputs import inputs_for
from flaxslim._tree import flatten
from flaxslim.errors import ConfigError, UnknownFamilyError

T5 = importlib.import_module("transformers.models.t5.modeling_flax_t5")
LONGT5 = importlib.import_module("transformers.models.longt5.modeling_flax_longt5")
COMPOSITES = [case for case in CASES if "+" in case.variant]

new_clip = pytest.mark.skipif(
    "a_max" in inspect.signature(jnp.clip).parameters,
    reason="this JAX still takes jnp.clip(a_max=...), so there is nothing to repair",
)


def case(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


def numpy_of(module: ModuleType) -> Any:
    return vars(module)["jnp"]


def repaired() -> bool:
    return numpy_of(T5) is not jnp and numpy_of(LONGT5) is not jnp


@new_clip
def test_clip_takes_both_spellings_inside_and_is_restored():
    stock = jnp.clip
    with clip_compat():
        assert repaired()
        for module in (T5, LONGT5):
            old = numpy_of(module)
            x = old.arange(5)
            np.testing.assert_array_equal(old.clip(x, a_max=2), [0, 1, 2, 2, 2])
            np.testing.assert_array_equal(old.clip(x, a_min=1, a_max=2), [1, 1, 2, 2, 2])
            np.testing.assert_array_equal(old.clip(x, 1, 2), [1, 1, 2, 2, 2])
            np.testing.assert_array_equal(old.clip(x, min=3), [3, 3, 3, 3, 4])
            assert old.ndarray is jnp.ndarray
    assert numpy_of(T5) is jnp
    assert numpy_of(LONGT5) is jnp
    assert jnp.clip is stock


@new_clip
def test_jax_itself_and_other_modules_are_untouched():
    from transformers.models.bert import modeling_flax_bert

    stock = jnp.clip
    with clip_compat():
        assert jnp.clip is stock
        assert numpy_of(modeling_flax_bert) is jnp
        with pytest.raises(TypeError, match="a_max"):
            jnp.clip(jnp.zeros(2), a_max=1)  # pyright: ignore[reportCallIssue]


@new_clip
def test_nested_contexts_restore_at_the_last_exit_and_after_an_error():
    with clip_compat():
        with pytest.raises(ZeroDivisionError), clip_compat():
            raise ZeroDivisionError
        assert repaired()
    assert numpy_of(T5) is jnp


@new_clip
def test_overlapping_threads_do_not_restore_too_early():
    entered, left = threading.Event(), threading.Event()
    seen: list[bool] = []

    def other() -> None:
        with clip_compat():
            entered.set()
            left.wait(10)
            seen.append(repaired())

    thread = threading.Thread(target=other)
    with clip_compat():
        thread.start()
        assert entered.wait(10)
    assert repaired()  # this thread has left, the other has not
    left.set()
    thread.join(10)
    assert seen == [True]
    assert numpy_of(T5) is jnp


@new_clip
def test_many_threads_leave_the_modules_as_they_were():
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                with clip_compat(), clip_compat():
                    assert repaired()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert numpy_of(T5) is jnp


@new_clip
def test_nothing_is_done_where_clip_still_takes_a_max(monkeypatch):
    def clip(arr=None, a_min=None, a_max=None):
        return arr

    monkeypatch.setattr(jnp, "clip", clip)
    with clip_compat():
        assert numpy_of(T5) is jnp


@new_clip
def test_a_stock_t5_class_runs_in_the_context_only():
    cls, cfg, _ = build(case("FlaxT5EncoderModel-plain"))
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(TypeError, match="a_max"):
            cls(cfg, _do_init=False)
        with clip_compat():
            cls(cfg, _do_init=False)


@pytest.mark.parametrize("name", ["FlaxT5EncoderModel-gated", "FlaxOPTModel"])
def test_a_shell_needs_nothing_of_its_caller(name):
    cls, cfg, params = build(case(name))
    model = shell(cls, cfg)
    assert isinstance(model, cls)
    inputs = inputs_for(cls, cfg, length=4)
    out = jax.jit(lambda p, x: model(**x, params=p, train=False)[0])(params, inputs)
    assert out.shape == (2, 4, 32)
    assert numpy_of(T5) is jnp


def test_a_shell_computes_in_the_dtype_that_is_asked_for():
    cls, cfg, params = build(case("FlaxViTModel"))
    model = shell(cls, cfg, jnp.bfloat16)
    out = jax.eval_shape(lambda p: model(**inputs_for(cls, cfg), params=p, train=False), params)
    assert out[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("composite", COMPOSITES, ids=str)
def test_a_shell_of_a_composite_holds_no_weights(composite):
    cfg = composite.config()
    before = len(jax.live_arrays())
    with jax.checking_leaks():
        model = shell(composite.cls, cfg)
    assert len(jax.live_arrays()) <= before + 1  # the key of the random generator
    with pytest.raises(ValueError, match="cannot be accessed"):
        _ = model.params
    leaves = jax.tree.leaves(model.params_shape_tree)
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert not any(isinstance(value, Tracer) for value in vars(model).values())


def test_parameter_shapes_are_those_of_the_stock_class():
    chosen = case("FlaxViTModel")
    cfg = chosen.config()
    with jax.numpy_rank_promotion("allow"):
        made = flatten(chosen.cls(cfg, _do_init=False).params_shape_tree)
    shapes = flatten(parameter_shapes(chosen.cls, cfg))
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in made.items()}


def test_a_dict_becomes_a_config():
    cfg = stock_config({"model_type": "bert", "hidden_size": 24})
    assert type(cfg).__name__ == "BertConfig"
    assert cfg.hidden_size == 24
    assert stock_config(cfg) is cfg


def test_a_misspelt_model_type_names_the_nearest():
    with pytest.raises(UnknownFamilyError, match=r"bertt[\s\S]*nearest: +bert"):
        stock_config({"model_type": "bertt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "mish"}, "KeyError: 'mish'"),
        ({"num_attention_heads": 3}, "ValueError: "),
        ({"hidden_size": None}, "TypeError: "),
    ],
)
def test_a_config_that_builds_nothing_is_a_config_error(change, words):
    chosen = case("FlaxBertModel")
    cfg = type(chosen.config())(**{**chosen.config().to_dict(), **change})
    for build_it in (shell, parameter_shapes):
        with pytest.raises(ConfigError, match="cannot be built from this config") as error:
            build_it(chosen.cls, cfg)
        for part in (words, "FlaxBertModel", "model_type 'bert'", "mend:"):
            assert part in str(error.value)
        assert error.value.__cause__ is not None


@pytest.mark.parametrize("cfg", [None, {}, {"hidden_size": 3}, object()])
def test_something_that_is_no_config_is_refused(cfg):
    with pytest.raises(ConfigError, match="no config of a Hugging Face model"):
        stock_config(cfg)
