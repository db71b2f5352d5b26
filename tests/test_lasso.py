"""Group lasso: the penalty by numpy, the proximal step by its optimality, zeros in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from strategies import GROUPED, LAYOUTS, TIED, net
from transformers import BertConfig
from zoo import CASES, build

from flaxslim import BERT_HEADS, Pair, Spec, layout, slim
from flaxslim._tree import flatten
from flaxslim.errors import TrainingError
from flaxslim.training._lasso import group_lasso, proximal_group_lasso

MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="relu", width="hidden"))
GROUPS = Spec(name="GROUPS", pairs=GROUPED)
CFG = {"heads": 4, "groups": 2, "size": 2}


def _mlp(seed: int = 0, d: int = 3, f: int = 8, out: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"up": (d, f), "down": (f, out)}
    return {
        name: {
            "kernel": rng.normal(size=shape).astype(np.float32),
            "bias": rng.normal(size=shape[-1:]).astype(np.float32),
        }
        for name, shape in shapes.items()
    }


def _run(params: Any, x: Any) -> Any:
    hidden = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def _channels(params: Any) -> np.ndarray:
    """The numbers of each channel of an MLP, `(f, n)`."""
    up, down = params["up"], params["down"]
    return np.concatenate([up["kernel"].T, up["bias"][:, None], down["kernel"]], axis=1)


def _penalty(channels: np.ndarray) -> float:
    return np.sqrt(channels.shape[1]) * np.linalg.norm(channels, axis=1).sum()


def _lasso(params: Any, spec: Spec, cfg: Any = None) -> Any:
    return jax.jit(lambda p: group_lasso(p, spec, cfg=cfg))(params)


def _stepped(tx: Any, params: Any, grads: Any = None) -> Any:
    """The parameters after the first step."""
    grads = jax.tree.map(np.zeros_like, params) if grads is None else grads

    @jax.jit
    def step(params: Any) -> Any:
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step(params)


# --- the penalty ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_penalty_is_over_all_numbers_of_each_channel(name):
    n = net(LAYOUTS[name], seed=1)
    wanted = 0.0
    for ffn in n.layers:
        assert ffn.first_bias is not None
        first = np.concatenate([ffn.first, ffn.first_bias[:, None]], axis=1)
        wanted += _penalty(np.concatenate([first.reshape(-1, ffn.width).T, ffn.second], axis=1))
    loss = _lasso(n.tree, n.layout.spec("relu"))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_penalty_of_scanned_layers_is_that_of_each():
    layers = [_mlp(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *layers)
    pair = Pair(first="up", second="down", first_axes="l d f", second_axes="l f d")
    loss = _lasso(stacked, Spec(name="SCANNED", pairs=pair))
    np.testing.assert_allclose(loss, sum(_penalty(_channels(x)) for x in layers), rtol=1e-6)


def test_gradient_is_the_direction_of_the_channel_and_zero_at_zero():
    params = _mlp()
    for zero in (params["up"]["kernel"].T, params["up"]["bias"], params["down"]["kernel"]):
        zero[2] = 0
    grads = jax.jit(jax.grad(lambda p: group_lasso(p, MLP)))(params)
    channels = _channels(params)
    norms = np.linalg.norm(channels, axis=1, keepdims=True)
    wanted = np.sqrt(channels.shape[1]) * channels / np.where(norms > 0, norms, 1)
    np.testing.assert_allclose(_channels(grads), wanted, rtol=1e-5)
    assert (_channels(grads)[2] == 0).all()
    assert (grads["down"]["bias"] == 0).all()


def _attention(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"q": (3, 8), "k": (3, 4), "v": (3, 4), "o": (8, 3)}
    return {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}


def test_keys_and_values_of_a_group_belong_to_none_of_its_heads():
    tree = _attention()
    q, o = tree["q"]["kernel"].reshape(3, 4, 2), tree["o"]["kernel"].reshape(4, 2, 3)
    own = np.concatenate([q.transpose(1, 0, 2).reshape(4, -1), o.reshape(4, -1)], axis=1)
    np.testing.assert_allclose(_lasso(tree, GROUPS, CFG), _penalty(own), rtol=1e-6)
    # Where each group is one head, they are that head's.
    alone = {name: {"kernel": rng} for name, rng in zip("qkv", [q.reshape(3, 8)] * 3, strict=True)}
    every = np.concatenate([*[q.transpose(1, 0, 2).reshape(4, -1)] * 3, o.reshape(4, -1)], axis=1)
    loss = _lasso({**alone, "o": tree["o"]}, GROUPS, {**CFG, "groups": 4})
    np.testing.assert_allclose(loss, _penalty(every), rtol=1e-6)


def _tied() -> tuple[dict[str, Any], Spec, dict[str, int]]:
    rng = np.random.default_rng(0)
    blocks = {
        str(i): {"v": {"kernel": rng.normal(size=(3, 8))}, "o": {"kernel": rng.normal(size=(8, 3))}}
        for i in range(2)
    }
    blocks["0"]["bias"] = {"embedding": rng.normal(size=(5, 4))}
    return {"block": blocks}, TIED, {"heads": 4, "size": 2}


def test_sites_that_are_tied_are_one_group():
    tree, spec, cfg = _tied()
    parts = [tree["block"]["0"]["bias"]["embedding"].T]
    for block in tree["block"].values():
        parts += [block["v"]["kernel"].reshape(3, 4, 2).transpose(1, 0, 2).reshape(4, -1)]
        parts += [block["o"]["kernel"].reshape(4, -1)]
    channels = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(_lasso(tree, spec, cfg), _penalty(channels), rtol=1e-6)
    # The smallest head goes in both layers, and its column of the table with it.
    small, large = np.sort(np.linalg.norm(channels, axis=1))[:2]
    strength = (small + large) / 2 / np.sqrt(channels.shape[1])
    moved = _stepped(proximal_group_lasso(spec, strength, cfg=cfg), tree)
    wanted = np.linalg.norm(channels, axis=1) == small
    for block in moved["block"].values():
        dead = (np.asarray(block["o"]["kernel"]).reshape(4, -1) == 0).all(axis=1)
        np.testing.assert_array_equal(dead, wanted)
    table = np.asarray(moved["block"]["0"]["bias"]["embedding"])
    np.testing.assert_array_equal((table == 0).all(axis=0), wanted)


# --- the proximal step ------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_proximal_step_solves_its_problem(name):
    """x = argmin |x - w|^2 / 2 + t R(x) exactly if w - x is in the subdifferential of t R at x."""
    n = net(LAYOUTS[name], seed=2)
    spec, params = n.layout.spec("relu"), jax.tree.map(np.float32, n.tree)
    grads = jax.tree.map(lambda p: np.float32(0.3) * np.sin(9 * p), params)
    w = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    rate, count = 0.5, 3 * n.layout.parts + n.layout.parts + 3
    strength = 1.05 * float(np.median(_norms(n, w))) / (rate * np.sqrt(count))
    tx = optax.chain(optax.sgd(rate), proximal_group_lasso(spec, strength, learning_rate=rate))

    @jax.jit
    def step(params: Any) -> Any:
        x = _stepped(tx, params, grads)
        return x, jax.grad(lambda x: group_lasso(x, spec))(x)

    x, slope = step(params)
    dead = np.concatenate([(own.second == 0).all(axis=1) for own in n.layout.layers(x)])
    assert dead.tolist() == (_norms(n, w) <= rate * strength * np.sqrt(count)).tolist()
    assert 0 < dead.sum() < len(dead)
    assert (_norms(n, x)[dead] == 0).all()
    for own, before, by in zip(*(n.layout.layers(t) for t in (x, w, slope)), strict=True):
        lives = (own.second != 0).any(axis=1)
        for part in ("first", "second"):
            a, b, c = (getattr(side, part) for side in (own, before, by))
            a, b, c = (np.moveaxis(v, -1, 0) if part == "first" else v for v in (a, b, c))
            np.testing.assert_allclose(
                (a + rate * strength * c)[lives], b[lives], rtol=1e-4, atol=1e-6
            )


def _norms(n: Any, tree: Any) -> np.ndarray:
    """The norm of each channel of all layers."""
    norms = []
    for ffn in n.layout.layers(tree):
        parts = [ffn.first.reshape(-1, ffn.width).T, ffn.first_bias.T, ffn.second]
        norms.append(np.linalg.norm(np.concatenate(parts, axis=1), axis=1))
    return np.concatenate(norms)


@pytest.mark.parametrize(
    ("params_dtype", "updates_dtype"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_zero_is_exact_in_mixed_precision(params_dtype, updates_dtype):
    params = jax.tree.map(lambda p: p.astype(jnp.dtype(params_dtype)), _mlp())
    grads = jax.tree.map(lambda p: (p / 100).astype(jnp.dtype(updates_dtype)), params)
    tx = proximal_group_lasso(MLP, 0.7)
    x = _stepped(tx, params, grads)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(x)} == {params_dtype}
    channels = _channels(jax.tree.map(lambda p: np.asarray(p, np.float32), x))
    dead = (channels == 0).all(axis=1)
    assert 0 < dead.sum() < len(dead)
    assert not (channels[~dead] == 0).any()


def test_learning_rate_may_be_a_schedule():
    def rate(count: Any) -> Any:
        return jnp.where(count < 2, 0.0, 1.0)

    params: Any = _mlp()
    tx = proximal_group_lasso(MLP, 100.0, learning_rate=rate)
    state, zero, deaths = tx.init(params), jax.tree.map(np.zeros_like, params), []
    update = jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(zero, state, params)
        params = optax.apply_updates(params, updates)
        deaths.append(bool((_channels(params) == 0).all()))
    assert deaths == [False, False, True]
    assert (params["down"]["bias"] != 0).all()


def test_what_is_between_two_pairs_is_shrunk_along_both_axes():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (5, 4), "c": (4, 2)}
    params = {
        k: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for k, s in shapes.items()
    }
    spec = Spec(
        name="CHAIN",
        pairs=(
            Pair(first="a", second="b"),
            Pair(first="b", second="c", first_axes="f g", second_axes="g d", axis="g"),
        ),
    )
    x = jax.tree.map(np.asarray, _stepped(proximal_group_lasso(spec, 0.7), params))
    first, second = (x["a"]["kernel"] == 0).all(0), (x["c"]["kernel"] == 0).all(1)
    assert 0 < first.sum() < 5
    assert 0 < second.sum() < 4
    np.testing.assert_array_equal(x["b"]["kernel"] == 0, first[:, None] | second[None])


# --- training ---------------------------------------------------------------------------------


def test_channels_die_while_an_mlp_trains_and_slim_removes_them():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype(np.float32)
    y = np.asarray(_run(_mlp(seed=5, d=4, f=3), x))  # three hidden channels are enough
    params = jax.tree.map(lambda p: 0.7 * p, _mlp(seed=1, d=4, f=24))
    rate = optax.cosine_decay_schedule(0.02, 1500)
    tx = optax.chain(optax.adam(rate), proximal_group_lasso(MLP, 0.1, learning_rate=rate))

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        grads = jax.grad(lambda p: ((_run(p, x) - y) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=1500)[0][0])
    params = jax.tree.map(np.asarray, train(params))
    dead = (_channels(params) == 0).all(axis=1)
    assert dead.sum() >= 12
    small, cfg = slim(params, {"hidden": 24}, MLP)
    assert cfg == {"hidden": 24 - dead.sum()}
    before, after = (np.asarray(_run(p, x)) for p in (params, small))
    np.testing.assert_allclose(after, before, atol=1e-6 * np.abs(before).max())
    assert ((after - y) ** 2).mean() < 0.05 * y.var()


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def test_heads_of_bert_by_the_same_functions():
    case = next(c for c in CASES if c.cls_name == "FlaxBertForQuestionAnswering")
    cls, cfg, params = build(dataclasses.replace(case, config=lambda: BertConfig(**SIZES)))
    heads, d = cfg.num_attention_heads, cfg.hidden_size
    site = BERT_HEADS.sites(params, cfg)[0]
    attention = {k.removeprefix(site.root + "/"): v for k, v in flatten(params).items()}
    parts = [attention["output/dense/kernel"].reshape(heads, -1)]
    for name in ("query", "key", "value"):
        kernel, bias = (attention[f"self/{name}/{part}"] for part in ("kernel", "bias"))
        parts += [kernel.reshape(d, heads, -1).transpose(1, 0, 2).reshape(heads, -1)]
        parts += [bias.reshape(heads, -1)]
    norms = np.linalg.norm(channels := np.concatenate(parts, axis=1), axis=1)
    # So strong that some heads die, and not all.
    strength = float(norms.min() + norms.max()) / 2 / np.sqrt(channels.shape[1])
    tx = proximal_group_lasso(BERT_HEADS, strength, cfg=cfg)
    moved = _stepped(tx, params)
    np.testing.assert_allclose(_lasso(params, BERT_HEADS, cfg), _penalty(channels), rtol=1e-5)
    o = np.asarray(flatten(moved)[site.second.path])
    dead = (o.reshape(heads, -1) == 0).all(axis=1)
    assert dead.tolist() == (norms <= strength * np.sqrt(channels.shape[1])).tolist()
    small, new = slim(moved, cfg, BERT_HEADS, width="per_layer")
    assert BERT_HEADS.sites(small, new)[0].size == heads - dead.sum()
    ids = np.random.default_rng(0).integers(5, cfg.vocab_size, (2, 6))
    with layout():
        before, after = (
            jax.jit(lambda p, c=c: cls(c, _do_init=False)(ids, params=p).start_logits)(p)
            for p, c in ((moved, cfg), (small, new))
        )
    np.testing.assert_allclose(after, before, atol=1e-6 * np.abs(before).max())


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, np.nan, np.inf])
def test_a_strength_is_zero_or_more(strength):
    with pytest.raises(TrainingError, match="strength of a penalty"):
        proximal_group_lasso(MLP, strength)


def test_a_proximal_step_needs_the_parameters():
    tx, params = proximal_group_lasso(MLP, 1.0), _mlp()
    with pytest.raises(TrainingError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_strength_may_be_injected():
    params = _mlp()
    tx = optax.inject_hyperparams(lambda strength: proximal_group_lasso(MLP, strength))(
        strength=100.0
    )
    assert (_channels(_stepped(tx, params)) == 0).all()
