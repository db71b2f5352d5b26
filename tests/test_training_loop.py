"""A stock training loop, slimmed in the middle: the same losses as if nothing had happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from kill import kill
from strategies import enable_x64
from transformers import BertConfig, FlaxBertForSequenceClassification

import flaxslim
from flaxslim._tree import flatten, replace
from flaxslim.specs import spec_for

CONFIG = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    initializer_range=0.2,
    num_labels=3,
)
STEPS, MIDDLE = 20, 8


def _batches() -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(5, 60, (8, 10)), rng.integers(0, 3, 8)) for _ in range(STEPS)]


def _step(model: Any) -> Any:
    @jax.jit
    def step(state: TrainState, ids: Any, labels: Any, alive: Any) -> tuple[TrainState, Any]:
        def loss(params: Any) -> Any:
            logits = model(ids, params=params).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        state = state.apply_gradients(grads=grads)
        # What is dead is held at zero; of a model that was slimmed nothing is.
        params = jax.tree.map(lambda p, a: p * a, state.params, alive)
        return state.replace(params=params), value

    return step


def _alive(params: Any, cfg: Any, dead: Any) -> Any:
    """One for each parameter, zero in the second rows of dead channels."""
    leaves, new = flatten(params), {}
    for site in spec_for(cfg, "all").sites(params, cfg):
        ones = np.ones_like(leaves[site.second.path])
        rows = dead[site.second.path]
        new[site.second.path] = site.second.axes.zero(ones, site.pair.axis, rows)
    return jax.tree.map(jnp.asarray, replace(jax.tree.map(np.ones_like, params), new))


@pytest.mark.parametrize(
    "in_memory",
    [pytest.param(False, marks=pytest.mark.long), True],
    ids=["saved and reloaded", "in memory"],
)
def test_training_goes_on_as_if_nothing_had_been_cut(in_memory, tmp_path):
    with enable_x64():
        _check(in_memory, tmp_path)


def _check(in_memory: bool, tmp_path: Any) -> None:
    dense: Any = FlaxBertForSequenceClassification(CONFIG, dtype=jnp.float64)
    sites = spec_for(CONFIG, "all").sites(dense.params, CONFIG)
    params, dead = kill(dense.params, sites, high=0.9)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    alive = _alive(params, CONFIG, dead)
    state: Any = TrainState.create(apply_fn=dense.__call__, params=params, tx=tx)
    step, losses = _step(dense), {"dense": [], "slim": []}
    slimmed: Any = None
    plan: Any = None
    step_slim: Any = None
    ones: Any = None
    with jax.default_matmul_precision("highest"):
        for number, (ids, labels) in enumerate(_batches()):
            if number == MIDDLE:
                plan = flaxslim.plan(state.params, CONFIG, "all", width="per_layer")
                assert plan.removed == sum(map(len, dead.values()))
                slimmed = flaxslim.apply(plan, state, like=state.params)
                small = flaxslim.slim(state.params, CONFIG, plan=plan)[1]
                if in_memory:
                    model = _in_memory(small, slimmed.params)
                else:
                    folder = flaxslim.save(tmp_path / "slim", slimmed.params, small)
                    model = flaxslim.from_pretrained(
                        FlaxBertForSequenceClassification, folder, dtype=jnp.float64
                    )
                    slimmed = slimmed.replace(params=model.params)
                ones = jax.tree.map(jnp.ones_like, slimmed.params)
                step_slim = _step(model)
            state, value = step(state, ids, labels, alive)
            losses["dense"].append(float(value))
            if slimmed is not None:
                slimmed, value = step_slim(slimmed, ids, labels, ones)
                losses["slim"].append(float(value))
        assert slimmed is not None
        kept: Any = flaxslim.apply(plan, state, like=state.params)
    np.testing.assert_allclose(losses["slim"], losses["dense"][MIDDLE:], rtol=1e-9)
    assert abs(losses["dense"][-1] - losses["dense"][MIDDLE]) > 1e-2  # there was something to learn
    theirs = flatten(kept.params)
    for path, leaf in flatten(slimmed.params).items():
        assert leaf.dtype == np.float64
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-7, err_msg=path)


def _in_memory(cfg: Any, params: Any) -> Any:
    """The stock class built inside of a context, and laid out for good by a copy of its config."""
    from flaxslim._intercept import lay_out

    with flaxslim.layout():
        model: Any = FlaxBertForSequenceClassification(cfg, dtype=jnp.float64)
    model.params = params
    return lay_out(model)
