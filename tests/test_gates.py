"""Hard-concrete gates: their distribution, the way to a target, and channels that slim removes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from strategies import LAYOUTS, TIED, net
from transformers import BertConfig
from zoo import CASES, build

from flaxslim import BERT_FFN, BERT_HEADS, Pair, Spec, layout, slim
from flaxslim._tree import flatten
from flaxslim.errors import TrainingError
from flaxslim.training._gates import (
    expected_sparsity,
    gate_lagrangian,
    gated,
    gates,
    open_gates,
    sample_gates,
)

MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="relu", width="hidden"))


def _mlp(seed: int = 0, d: int = 4, f: int = 8, out: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(d, f)), rng.normal(size=(f, out)) / np.sqrt(f)
    return {
        "up": {"kernel": np.float32(up), "bias": np.zeros(f, np.float32)},
        "down": {"kernel": np.float32(down), "bias": np.ones(out, np.float32)},
    }


def _run(params: Any, x: Any) -> Any:
    hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# --- the distribution -------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 0.6, 2.5])
def test_gates_are_zero_and_one_as_often_as_the_closed_form_says(log_alpha):
    count = 100_000
    z = np.asarray(sample_gates(jnp.full((1, count), log_alpha), jax.random.key(0)))
    assert z.min() >= 0
    assert z.max() <= 1
    # Louizos et al. 2018: the distribution function of the stretched variable at 0 and at 1.
    for share, at in ((z == 0, 0.0), (z < 1, 1.0)):
        inside = (at + 0.1) / 1.2
        chance = _sigmoid(2 / 3 * np.log(inside / (1 - inside)) - log_alpha)
        assert abs(share.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / count)
    sparsity = expected_sparsity({"kernel": jnp.full((1, 3), log_alpha)})
    assert abs((z == 0).mean() - sparsity) < 0.01


@pytest.mark.parametrize("chance", [0.5, 0.9, 0.99])
def test_at_the_start_each_gate_is_open_by_its_chance(chance):
    log_alpha = gates(_mlp(), MLP, chance=chance)
    assert jax.tree.map(jnp.shape, log_alpha) == {"down": {"kernel": (1, 8)}}
    np.testing.assert_allclose(expected_sparsity(log_alpha), 1 - chance, rtol=1e-5)


def test_open_gates_are_without_noise_and_exact_at_their_ends():
    values = open_gates({"kernel": jnp.array([[-9.0, -2.5, 1.0, -2.3, 0.0, 2.3, 2.5, 9.0]])})
    one, zero, two = _sigmoid(np.array([1.0, 0.0, 2.3])) * 1.2 - 0.1
    np.testing.assert_allclose(values["kernel"], [[0, 0, one, 0, zero, two, 1, 1]], atol=1e-6)
    assert (np.asarray(values["kernel"]) == 1).sum() == 2


def test_at_least_as_many_are_closed_as_are_expected_at_each_site():
    # By s = sigmoid(log_alpha) alone none of these would be.
    log_alpha = np.stack([np.linspace(-2.3, 0.0, 40), np.linspace(-2.0, 4.0, 40)])
    closed = (np.asarray(open_gates({"kernel": log_alpha})["kernel"]) == 0).sum(axis=-1)
    chance = 1 - _sigmoid(log_alpha - 2 / 3 * np.log(0.1 / 1.1))
    np.testing.assert_array_equal(closed, np.round(chance.sum(axis=-1)))


def test_samples_differ_by_site_and_key_and_not_by_call():
    log_alpha = {"a": jnp.zeros((1, 50)), "b": jnp.zeros((1, 50))}
    first, again, other = (sample_gates(log_alpha, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first["a"], again["a"])
    assert (first["a"] != other["a"]).any()
    assert (first["a"] != first["b"]).any()


def test_samples_have_a_finite_gradient_everywhere():
    log_alpha = np.linspace(-200.0, 200.0, 4001, dtype=np.float32)[None]
    grad = jax.jit(jax.grad(lambda a: sample_gates(a, jax.random.key(0)).sum()))(log_alpha)
    assert np.isfinite(grad).all()
    assert (grad >= 0).all()
    assert (grad > 0).any()


# --- the model under them ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_gate_multiplies_what_reads_its_channel(name):
    n = net(LAYOUTS[name], seed=3)
    spec, rng = n.layout.spec("relu"), np.random.default_rng(0)
    values = jax.tree.map(lambda a: rng.uniform(size=a.shape), gates(n.tree, spec))
    new = n.layout.layers(gated(n.tree, values, spec))
    for i, (before, after) in enumerate(zip(n.layers, new, strict=True)):
        gate = values["layers"][str(i)]["down"]["kernel"][0]
        np.testing.assert_allclose(after.second, before.second * gate[:, None], rtol=1e-6)
        np.testing.assert_array_equal(after.first, before.first)
        np.testing.assert_array_equal(after.second_bias, before.second_bias)


def test_low_rank_matrices_beside_the_second_kernel_have_the_gates_too():
    params: Any = _mlp()
    rng = np.random.default_rng(0)
    params["down"] |= {"lora_a": rng.normal(size=(8, 2)), "lora_b": rng.normal(size=(2, 2))}
    values = {"down": {"kernel": jnp.linspace(0.0, 1.0, 8)[None]}}
    new = gated(params, values, MLP)["down"]

    def whole(down: Any) -> np.ndarray:
        return np.asarray(down["kernel"] + down["lora_a"] @ down["lora_b"])

    wanted = whole(params["down"]) * values["down"]["kernel"][0][:, None]
    np.testing.assert_allclose(whole(new), wanted, atol=1e-6)


def test_scanned_layers_have_gates_of_their_own():
    params = {"up": {"kernel": np.ones((3, 4, 5))}, "down": {"kernel": np.ones((3, 5, 4))}}
    pair = Pair(first="up", second="down", first_axes="l d f", second_axes="l f d")
    spec = Spec(name="SCANNED", pairs=pair)
    assert gates(params, spec)["down"]["kernel"].shape == (3, 5)
    values = np.arange(15.0).reshape(3, 5)
    new = gated(params, {"down": {"kernel": values}}, spec)["down"]["kernel"]
    np.testing.assert_array_equal(new, np.repeat(values[:, :, None], 4, axis=2))


def test_sites_that_are_tied_have_one_gate():
    cfg = {"heads": 2, "size": 2}
    blocks: Any = {
        i: {"v": {"kernel": np.ones((3, 4))}, "o": {"kernel": np.ones((4, 3))}} for i in "01"
    }
    blocks["0"]["bias"] = {"embedding": np.ones((5, 2))}
    params = {"block": blocks}
    assert [*flatten(gates(params, TIED, cfg=cfg))] == ["block/0/o/kernel"]
    values = {"block": {"0": {"o": {"kernel": np.array([[0.25, 0.5]])}}}}
    new = gated(params, values, TIED, cfg=cfg)["block"]
    for i in "01":
        np.testing.assert_array_equal(new[i]["o"]["kernel"][:, 0], [0.25, 0.25, 0.5, 0.5])


def test_gates_keep_the_type_of_what_they_multiply():
    params = jax.tree.map(lambda p: p.astype(jnp.dtype("bfloat16")), _mlp())
    new = gated(params, sample_gates(gates(params, MLP), jax.random.key(0)), MLP)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(new)} == {"bfloat16"}


# --- the way to a target ----------------------------------------------------------------------


def test_lagrangian_is_by_its_formula():
    log_alpha = {"a": jnp.array([[-1.0, 2.0]]), "b": jnp.array([[0.5, 0.0, -3.0]])}
    flat = np.array([-1.0, 2.0, 0.5, 0.0, -3.0])
    gap = (1 - _sigmoid(flat - 2 / 3 * np.log(0.1 / 1.1))).mean() - 0.3
    loss = gate_lagrangian(log_alpha, jnp.array([0.7, 5.0]), 0.3)
    np.testing.assert_allclose(loss, 0.7 * gap + 5.0 * gap**2, rtol=1e-5)
    traced = jax.jit(gate_lagrangian)(log_alpha, jnp.array([0.7, 5.0]), 0.3)
    np.testing.assert_allclose(traced, loss, rtol=1e-5)


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_gates_reach_the_target_and_slim_removes_what_they_close(target):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 4)).astype(np.float32)
    y = np.asarray(_run(_mlp(seed=5, f=6), x))
    trained = {"model": _mlp(seed=1, f=60), "multipliers": jnp.zeros(2)}
    trained["gates"] = gates(trained["model"], MLP)
    tx = optax.multi_transform(
        {
            "model": optax.adam(0.01),
            "gates": optax.adam(0.05),
            "multipliers": optax.chain(optax.adam(0.05), optax.scale(-1)),
        },
        {name: name for name in trained},
    )

    def loss(trained: Any, key: Any) -> Any:
        model = gated(trained["model"], sample_gates(trained["gates"], key), MLP)
        bound = gate_lagrangian(trained["gates"], trained["multipliers"], target)
        return ((_run(model, x) - y) ** 2).mean() + bound

    def step(carry: Any, key: Any) -> Any:
        trained, state = carry
        updates, state = tx.update(jax.grad(loss)(trained, key), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    keys = jax.random.split(jax.random.key(0), 1500)
    train = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), keys)[0][0])
    trained = train(trained)
    assert abs(expected_sparsity(trained["gates"]) - target) < 0.05
    values = open_gates(trained["gates"])
    closed = int((np.asarray(values["down"]["kernel"]) == 0).sum())
    assert abs(closed / 60 - target) <= 0.05

    model = jax.tree.map(np.asarray, gated(trained["model"], values, MLP))
    small, cfg = slim(model, {"hidden": 60}, MLP)
    assert cfg == {"hidden": 60 - closed}
    before, after = (np.asarray(_run(p, x)) for p in (model, small))
    np.testing.assert_allclose(after, before, atol=1e-6 * np.abs(before).max())
    assert ((after - y) ** 2).mean() < 0.1 * np.var(y)


def test_heads_and_channels_of_bert_by_the_same_functions():
    case = next(c for c in CASES if c.cls_name == "FlaxBertForQuestionAnswering")
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
    }
    cls, cfg, params = build(dataclasses.replace(case, config=lambda: BertConfig(**sizes)))
    spec, rng = BERT_FFN + BERT_HEADS, np.random.default_rng(0)
    log_alpha = gates(params, spec, cfg=cfg)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(log_alpha)) == [(1, 4), (1, 24)]
    ends = jax.tree.map(
        lambda a: rng.permuted(np.linspace(-4, 4, a.size, dtype=np.float32))[None], log_alpha
    )
    values = open_gates(ends)
    model = gated(params, values, spec, cfg=cfg)
    small, new = slim(model, cfg, spec, width="per_layer")
    for site in spec.sites(small, new):
        assert site.size == (np.asarray(flatten(values)[site.second.path]) > 0).sum()
    ids = rng.integers(5, 40, (2, 6))
    with layout():
        before, after = (
            jax.jit(lambda p, c=c: cls(c, _do_init=False)(ids, params=p).start_logits)(p)
            for p, c in ((model, cfg), (small, new))
        )
    np.testing.assert_allclose(after, before, atol=1e-6 * np.abs(before).max())


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chance", [0.0, 1.0, np.nan])
def test_a_chance_is_between_zero_and_one(chance):
    with pytest.raises(TrainingError, match="learns nothing"):
        gates(_mlp(), MLP, chance=chance)


@pytest.mark.parametrize("target", [-0.1, 1.0, np.nan])
def test_a_target_is_a_share(target):
    with pytest.raises(TrainingError, match="share of gates that close"):
        gate_lagrangian(gates(_mlp(), MLP), jnp.zeros(2), target)


def test_gates_of_other_parameters_are_refused():
    params = _mlp()
    with pytest.raises(TrainingError, match="another number of channels than it has gates"):
        gated(params, gates(_mlp(f=5), MLP), MLP)
    with pytest.raises(TrainingError, match="a site has no gates"):
        gated(params, {"up": {"kernel": jnp.ones((1, 8))}}, MLP)
