"""A plan applied to what was made for the parameters: optimizer states, averages, gradients."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_devices import run_code
from flax import linen as nn
from flax import nnx, serialization, traverse_util
from flax.core import freeze
from flax.training import train_state
from strategies import LAYOUTS, net

from flaxslim import Pair, Plan, Spec, apply, plan, slim
from flaxslim._tree import flatten, replace
from flaxslim.errors import (
    NonFiniteError,
    PlanError,
    TracedError,
    UnsupportedDtypeError,
    UnsupportedTreeError,
)

SPEC = Spec(name="MLP", pairs=Pair(at="block", first="up", second="down", activation="tanh"))
DEAD, KEPT = [1, 4, 6], [0, 2, 3, 5, 7]

# Written out by hand, so that a mistake in the library cannot hide.
INDEX = {
    "block/up/kernel": (slice(None), KEPT),
    "block/up/bias": (KEPT,),
    "block/down/kernel": (KEPT,),
}


def mlp(seed: int = 0) -> dict[str, Any]:
    """A residual block of 8 channels, of which nothing reads 1, 4 and 6; and a head."""
    rng = np.random.default_rng(seed)

    def dense(*shape: int) -> dict[str, jax.Array]:
        return {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[1]), jnp.float32),
        }

    tree = {"block": {"up": dense(3, 8), "down": dense(8, 3)}, "head": dense(3, 2)}
    down = tree["block"]["down"]
    down["kernel"] = down["kernel"].at[jnp.array(DEAD)].set(0)
    return tree


def forward(p: Any, x: Any, tanh: Any = jnp.tanh) -> Any:
    up, down, head = p["block"]["up"], p["block"]["down"], p["head"]
    x = x + tanh(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
    return x @ head["kernel"] + head["bias"]


X = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(2).normal(size=(16, 2)), jnp.float32)
loss_and_grads = jax.jit(jax.value_and_grad(lambda p: jnp.mean((forward(p, X) - Y) ** 2)))


def index_of(path: str) -> tuple[Any, ...]:
    return next((index for end, index in INDEX.items() if f"/{path}".endswith(f"/{end}")), ())


def sliced(tree: Any) -> dict[str, Any]:
    """The kept slices of a tree, by path."""
    return {path: x[index_of(path)] if np.ndim(x) else x for path, x in flatten(tree).items()}


def living() -> Any:
    """One where a parameter belongs to a channel that stays, zero where it is dead."""
    mask = jax.tree.map(np.ones_like, jax.tree.map(np.asarray, mlp()))
    mask["block"]["up"]["kernel"][:, DEAD] = 0
    mask["block"]["up"]["bias"][DEAD] = 0
    mask["block"]["down"]["kernel"][DEAD] = 0
    return mask


def times(tree: Any, mask: Any) -> Any:
    return tree if mask is None else jax.tree.map(lambda x, m: x * m, tree, mask)


def train(tx: Any, params: Any, state: Any, steps: int, mask: Any = None) -> tuple[Any, Any, list]:
    """Train on; with a mask, what is dead is held dead."""
    losses = []
    for _ in range(steps):
        loss, grads = loss_and_grads(params)
        updates, state = tx.update(times(grads, mask), state, params)
        params = optax.apply_updates(params, times(updates, mask))
        losses.append(float(loss))
    return params, state, losses


def assert_close(after: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert after.keys() == expected.keys()
    for path, x in after.items():
        assert x.dtype == expected[path].dtype
        old, new = (np.asarray(a, np.float64) for a in (expected[path], x))
        np.testing.assert_allclose(new, old, rtol=tolerance, atol=tolerance, err_msg=path)


def assert_same(after: Any, expected: dict[str, Any]) -> None:
    leaves = flatten(after)
    assert leaves.keys() == expected.keys()
    for path, x in leaves.items():
        assert jnp.asarray(x).dtype == jnp.asarray(expected[path]).dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected[path]), err_msg=path)


# --- training goes on -------------------------------------------------------------------------


def kernels(tree: Any) -> Any:
    return traverse_util.path_aware_map(lambda path, _: path[-1] == "kernel", tree)


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-2),
    "adamw scheduled": lambda: optax.adamw(SCHEDULE),
    "sgd": lambda: optax.sgd(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "momentum in bfloat16": lambda: optax.sgd(1e-2, 0.9, accumulator_dtype=jnp.bfloat16),
    "lion": lambda: optax.lion(1e-3),
    "mu_dtype": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "one number a tensor": lambda: optax.novograd(1e-2),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    "chain in a chain": lambda: optax.chain(optax.chain(optax.clip(1.0), optax.adam(1e-2))),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "masked": lambda: optax.masked(optax.sgd(1e-2, momentum=0.9), kernels),
    "multi_transform": lambda: optax.multi_transform(
        {"adam": optax.adam(1e-2), "trace": optax.sgd(1e-2, momentum=0.9)},
        {"block": "adam", "head": "trace"},
    ),
    "parts of a layer": lambda: optax.multi_transform(
        {True: optax.adam(1e-2), False: optax.sgd(1e-2, momentum=0.9)}, kernels(mlp())
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=SCHEDULE, weight_decay=1e-2
    ),
    "ema of updates": lambda: optax.chain(optax.ema(0.9), optax.adam(1e-2)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_was_cut(name):
    tx, mask = OPTIMIZERS[name](), living()
    params, state, _ = train(tx, mlp(), tx.init(mlp()), 3, mask)
    p = plan(params, spec=SPEC)
    assert p.cuts[0].keep == tuple(KEPT)
    small, small_state = apply(p, params), apply(p, state, like=params)
    assert_same(small, sliced(params))
    assert_same(small_state, sliced(state))
    assert jax.tree.structure(small_state) == jax.tree.structure(state)

    params, state, losses = train(tx, params, state, 4, mask)
    small, small_state, small_losses = train(tx, small, small_state, 4)
    np.testing.assert_allclose(small_losses, losses, rtol=1e-5)
    # bfloat16 rounds what differs in the last bit of float32 to the next of its own.
    tolerance = 1e-2 if name in ("mu_dtype", "momentum in bfloat16") else 1e-5
    assert_close(flatten(small), sliced(params), tolerance)
    assert_close(flatten(small_state), sliced(state), tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_optax_calls_a_parameter_is_cut_and_all_else_passes_by_identity(name):
    tx, params = OPTIMIZERS[name](), mlp()
    state = jax.tree.map(
        lambda x: jnp.arange(x.size).reshape(x.shape) if x.ndim else x, tx.init(params)
    )
    small = apply(plan(params, spec=SPEC), state, like=params)
    assert_same(small, sliced(state))
    kinds = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    for path, kind in flatten(kinds).items() if jax.tree.leaves(state) else ():
        old, new = flatten(state)[path], flatten(small)[path]
        cut = kind == "parameter" and index_of(path) and np.ndim(old)
        assert (new is not old) == bool(cut), path


class State(train_state.TrainState):
    ema_params: Any = None
    batch_stats: Any = None
    key: Any = None
    nothing: Any = None


def test_a_train_state_is_cut_in_one_call():
    tx, mask = optax.adamw(1e-2), living()
    params, opt_state, _ = train(tx, mlp(), tx.init(mlp()), 3, mask)
    state = State(
        step=3,
        apply_fn=forward,
        params=params,
        tx=tx,
        opt_state=opt_state,
        ema_params=jax.tree.map(lambda x: 0.5 * x, params),
        batch_stats={"mean": jnp.ones(3)},
        key=jax.random.key(0),
    )
    small = apply(plan(params, spec=SPEC), state, like=params)
    assert isinstance(small, State)
    for now, before in zip(
        (small.params, small.opt_state, small.ema_params),
        (state.params, state.opt_state, state.ema_params),
        strict=True,
    ):
        assert_same(now, sliced(before))
    assert small.tx is tx
    assert (small.apply_fn, small.nothing, small.step) == (forward, None, 3)
    assert small.key is state.key
    assert small.batch_stats["mean"] is state.batch_stats["mean"]
    for _ in range(3):
        loss, grads = loss_and_grads(state.params)
        state = state.apply_gradients(grads=times(grads, mask))
        # Decay moves the dead columns, but nothing reads them.
        small_loss, small_grads = loss_and_grads(small.params)
        small = small.apply_gradients(grads=small_grads)
        np.testing.assert_allclose(small_loss, loss, rtol=1e-5)
    assert_close(flatten(small.params), sliced(state.params))


# --- what is no tree of parameters ------------------------------------------------------------


def trained() -> tuple[Any, Any]:
    """The parameters, and a state in which other channels look dead."""
    moments = jax.tree.map(lambda x: x, mlp(seed=5))
    kernel = moments["block"]["down"]["kernel"]
    moments["block"]["down"]["kernel"] = kernel.at[jnp.array([0, 2])].set(0)
    return mlp(), (optax.ScaleByAdamState(jnp.zeros((), int), moments, moments), optax.EmptyState())


HELD_TWICE: dict[str, Callable[[Any, Any], Any]] = {
    "TrainState": lambda p, s: State(0, forward, p, optax.adam(1.0), s),  # type: ignore
    "a tuple": lambda p, s: (p, s),
    "a checkpoint": lambda p, s: {"params": p, "opt_state": serialization.to_state_dict(s)},
    "lookahead": lambda p, _: optax.LookaheadParams(fast=p, slow=slower(p)),
    "nnx": lambda *_: nnx.ModelAndOptimizer(pruned_model(), optax.adam(1.0), wrt=nnx.Param),
}


@pytest.mark.parametrize("name", ["inner_state", "opt_state", "optimizer_states"])
def test_a_module_may_be_called_like_a_state(name):
    assert plan({name: mlp()}, None, SPEC).removed == 3


@pytest.mark.parametrize("name", HELD_TWICE)
def test_a_state_is_not_cut_as_if_it_were_layers(name):
    tree = HELD_TWICE[name](*trained())
    for cut in (plan, slim):
        with pytest.raises(UnsupportedTreeError, match=r"apply\(p, state, like=params\)"):
            cut(tree, None, SPEC)


# --- nnx --------------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(nnx.tanh(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block, self.head = Block(rngs), nnx.Linear(3, 2, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, x):
        return self.head(self.block(x))


def pruned_model() -> Model:
    model = Model(nnx.Rngs(0))
    kernel = model.block.down.kernel
    kernel[...] = kernel[...].at[jnp.array(DEAD)].set(0)
    return model


def nnx_steps(model: Any, optimizer: Any, steps: int, mask: Any = None) -> list[float]:
    @nnx.jit
    def value_and_grad(model):
        return nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)

    losses = []
    for _ in range(steps):
        loss, grads = value_and_grad(model)
        if mask is not None:
            held = flatten(mask)
            grads = replace(grads, {path: g * held[path] for path, g in flatten(grads).items()})
        optimizer.update(model, grads)
        losses.append(float(loss))
    return losses


def test_an_nnx_module_and_its_optimizer_are_cut_alike_and_go_on_training():
    model, mask = pruned_model(), living()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    nnx_steps(model, optimizer, 2, mask)
    p = plan(model, spec=SPEC)
    small, small_optimizer = apply(p, model), apply(p, optimizer, like=model)
    assert isinstance(small_optimizer, nnx.Optimizer)
    assert_same(small_optimizer, sliced(optimizer))
    losses = nnx_steps(model, optimizer, 3, mask)
    np.testing.assert_allclose(nnx_steps(small, small_optimizer, 3), losses, rtol=1e-5)
    assert_close(flatten(nnx.state(small, nnx.Param)), sliced(nnx.state(model, nnx.Param)))
    assert_close(flatten(small_optimizer), sliced(optimizer))
    assert int(small_optimizer.step[...]) == 5


def test_modules_anywhere_in_a_tree_say_their_new_sizes():
    model = pruned_model()
    pair = nnx.ModelAndOptimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    p = plan(model, spec=SPEC)
    tree = {"online": model, "averages": [pruned_model()], "state": nnx.state(model)}
    small = apply(p, tree, like=model)
    for module in (
        small["online"],
        small["averages"][0],
        apply(p, pair, like=model).model,
        apply(p, model, like=model),
    ):
        assert (module.block.up.out_features, module.block.down.in_features) == (5, 5)
        assert module.block.up.kernel.shape == (3, 5)
        np.testing.assert_allclose(module(X), model(X), rtol=1e-5, atol=1e-6)
    assert type(small["state"]) is nnx.State
    # What went in is what it was.
    assert (model.block.up.out_features, model.block.up.kernel.shape) == (8, (3, 8))


def test_modules_in_a_module_say_their_new_sizes():
    class Twin(nnx.Module):
        def __init__(self):
            self.online, self.target = pruned_model(), pruned_model()

    model = pruned_model()
    small = apply(plan(model, spec=SPEC), Twin(), like=model)
    assert small.online.block.up.out_features == small.target.block.up.out_features == 5


# --- averages, gradients ----------------------------------------------------------------------


def constant() -> dict[str, Any]:
    """Channel 6 reads nothing and puts out tanh of its bias."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), mlp())
    tree["block"]["down"]["kernel"][6] = 1.5
    tree["block"]["up"]["kernel"][:, 6] = 0
    return tree


def value(p: Any) -> np.ndarray:
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    return forward(p, np.asarray(X, np.float64), np.tanh)


def slower(tree: Any) -> Any:
    return jax.tree.map(lambda x: 0.5 * x, tree)


class TrainingState(NamedTuple):
    params: Any
    avg_params: Any
    opt_state: Any


def moment(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.full_like(x, 2.0), tree)


AVERAGES: dict[str, Callable[[Any], Any]] = {
    "dict": lambda p: {"params": p, "ema": slower(p), "opt_state": (moment(p),)},
    "variables": lambda p: {"a": {"params": p}, "b": {"params": slower(p)}},
    "named tuple": lambda p: TrainingState(p, slower(p), optax.TraceState(moment(p))),
    "lookahead": lambda p: optax.LookaheadParams(fast=p, slow=slower(p)),
    "optax.ema": lambda p: {"params": p, "ema": optax.EmaState(jnp.ones(()), slower(p))},
    "optax.ema alone": lambda p: optax.EmaState(jnp.ones(()), slower(p)),
    "optax.ema of updates": lambda p: (p, (optax.EmaState(jnp.ones(()), moment(p)),)),
    "list": lambda p: [p, {"ema": slower(p), "grads": moment(p), "mu": moment(p)}],
    "optimizer": lambda p: {"optimizer": {"target": p, "state": (optax.TraceState(moment(p)),)}},
    "alone": slower,
}


def networks(tree: Any) -> list[Any]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, dict) and "block" in x)
    return [node for node in nodes if isinstance(node, dict)]


@pytest.mark.parametrize("name", AVERAGES)
def test_constants_are_folded_into_each_copy_of_the_parameters_and_into_no_moment(name):
    params = constant()
    p = plan(params, spec=SPEC)
    assert p.cuts[0].folds == (6,)
    tree = AVERAGES[name](params)

    small = apply(p, tree, like=params)
    for before, after in zip(networks(tree), networks(small), strict=True):
        assert after["block"]["up"]["kernel"].shape == (3, 5)
        if (before["head"]["bias"] == 2.0).all():
            assert after["block"]["down"]["bias"] is before["block"]["down"]["bias"]
        else:
            np.testing.assert_allclose(value(after), value(before), rtol=1e-12)
            assert np.any(after["block"]["down"]["bias"] != before["block"]["down"]["bias"])


class Bundle(NamedTuple):
    model: Any
    ema: Any
    opt_state: Any


class Fast(train_state.TrainState):
    momentum_params: Any = None
    target_network: Any = None


def fed(tree: Any) -> optax.EmaState:
    return optax.EmaState(jnp.ones((), int), slower(tree))


PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "words that contain others": lambda p: {"momentum_params": p, "momentum_encoder": slower(p)},
    "a class of the user's": lambda p: Bundle(p, slower(p), optax.adam(1.0).init(p)),
    "TrainState": lambda p: Fast(0, forward, p, None, (), slower(p), slower(p)),  # type: ignore
    "tuple with optax.ema": lambda p: (p, optax.adam(1.0).init(p), fed(p)),
    "list with optax.ema": lambda p: [p, optax.adam(1.0).init(p), fed(p)],
    "optax.ema in a wrapper of the user's": lambda p: Bundle(p, fed(p), ()),
    "below a name": lambda p: {"params": {"one": p, "two": [slower(p)]}},
    "slow weights in a state": lambda p: {"params": p, "opt_state": {"slow_params": slower(p)}},
    "z, its type lost": lambda p: {
        "params": p,
        "opt_state": {
            "0": {"z": p, "base_optimizer_state": {"nu": jax.tree.map(np.zeros_like, p)}}
        },
    },
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_copy_that_holds_parameters_computes_what_it_did(name):
    params = constant()
    tree = PARAMETERS[name](params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = apply(plan(params, spec=SPEC), tree, like=params)
    for before, after in zip(networks(tree), networks(small), strict=True):
        assert after["block"]["up"]["kernel"].shape == (3, 5)
        np.testing.assert_allclose(value(after), value(before), rtol=1e-12)


HOLDERS: dict[str, Callable[[], Any]] = {
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "schedule_free in MultiSteps": lambda: optax.MultiSteps(
        optax.contrib.schedule_free_adamw(1e-2), 1
    ),
    "schedule_free in apply_if_finite": lambda: optax.apply_if_finite(
        optax.contrib.schedule_free_adamw(1e-2), 3
    ),
    "schedule_free in multi_transform": lambda: optax.multi_transform(
        {"all": optax.contrib.schedule_free_adamw(1e-2)}, jax.tree.map(lambda _: "all", mlp())
    ),
    "cocob": optax.contrib.cocob,
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
    "sam": lambda: optax.contrib.sam(optax.sgd(1e-2), optax.sgd(1e-3), sync_period=2),
    "dog": lambda: optax.contrib.dog(1.0),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
}
if hasattr(optax.contrib, "madgrad"):
    HOLDERS["madgrad"] = lambda: optax.contrib.madgrad(1e-2)


@pytest.mark.parametrize("name", HOLDERS)
def test_parameters_in_an_optimizer_take_constants_as_training_goes_on(name):
    mask, tx = living(), HOLDERS[name]()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), constant())
    params, state, _ = train(tx, params, tx.init(params), 3, mask)
    p = plan(params, spec=SPEC)
    assert p.cuts[0].folds == (6,)
    small, small_state = apply(p, params), apply(p, state, like=params)
    beside = apply(p, {"params": params, "opt_state": state}, like=params)["opt_state"]
    assert_same(beside, flatten(small_state))
    _, _, losses = train(tx, params, state, 5, mask)
    _, _, small_losses = train(tx, small, small_state, 5)
    np.testing.assert_allclose(small_losses, losses, rtol=1e-5)


def held(tree: Any) -> Any:
    """Moments under a mask: what is zero in the parameters has none."""
    return jax.tree.map(lambda m, x: m * (x != 0), moment(tree), tree)


STATES: dict[str, Callable[[Any], Any]] = {
    "optax": lambda p: optax.TraceState(held(p)),
    "in a list": lambda p: {"params": p, "opt_state": [held(p)]},
    "momentum in a state": lambda p: {"params": p, "opt_state": {"momentum": held(p)}},
    "trace": lambda p: {"params": p, "trace": held(p)},
    "acc_grads": lambda p: {"params": p, "acc_grads": held(p)},
    "exp_avg, its type lost": lambda p: {"exp_avg": held(p), "prev_updates": held(p)},
    "grads of a collection": lambda p: {"params": p, "grads": {"params": held(p)}},
    "mu of a collection": lambda p: optax.TraceState({"params": held(p)}),
    "m of a collection": lambda p: {"opt_state": {"m": {"params": held(p)}}},
    "ema in a chain": lambda p: {
        "opt_state": (optax.EmaState(jnp.ones(()), held(p)), optax.EmptyState())
    },
    "ema in a named chain": lambda p: {
        "opt_state": {"ema": optax.EmaState(jnp.ones(()), held(p)), "b": optax.EmptyState()}
    },
    "model in a state": lambda p: {"opt_state": {"m": {"model": held(p)}}},
    "a label of the caller's": lambda p: {
        "opt_state": optax.MultiTransformState({"all_params": optax.TraceState(held(p))})
    },
    "a label, its type lost": lambda p: {
        "opt_state": {"inner_states": {"all_params": {"inner_state": {"mu": held(p)}}}}
    },
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_takes_no_constants_even_if_its_channels_are_held(name):
    params = constant()
    tree = STATES[name](params)
    small = apply(plan(params, spec=SPEC), tree, like=params)
    for before, after in zip(networks(tree), networks(small), strict=True):
        if before is not params:
            assert after["block"]["down"]["bias"] is before["block"]["down"]["bias"]


def injected(p: Any) -> Any:
    return optax.InjectStatefulHyperparamsState(
        count=jnp.ones((), int), hyperparams={}, hyperparams_states={}, inner_state=fed(p)
    )


def of_updates(p: Any) -> Any:
    return optax.EmaState(jnp.ones(()), held(p))


class Strange(NamedTuple):
    thing: Any


UNKNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "m": (lambda p: {"params": p, "m": held(p)}, "m"),
    "a word that contains another": (lambda p: {"params": p, "upgraded": slower(p)}, "upgraded"),
    "two words": (lambda p: {"no_grad_params": slower(p)}, "no_grad_params"),
    "field": (lambda p: Strange(slower(p)), "thing"),
    "in a list": (lambda p: (p, held(p)), "1"),
    "momentum": (lambda p: {"params": p, "momentum": held(p)}, "momentum"),
    "changes of parameters": (lambda p: {"params": p, "param_delta": held(p)}, "param_delta"),
    "averages of something": (lambda p: {"params": p, "fisher_ema": held(p)}, "fisher_ema"),
    "optax.ema in a bare chain": (lambda p: (of_updates(p), optax.EmptyState()), "0/ema"),
    "optax.ema beside an optimizer": (lambda p: (optax.adam(1.0).init(p), fed(p)), "1/ema"),
    "optax.ema in a dict": (lambda p: {"adam": optax.EmptyState(), "ema": fed(p)}, "ema/ema"),
    "optax.ema in inject_hyperparams": (injected, "inner_state/ema"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_copy_of_which_nobody_knows_what_it_holds_is_refused_if_it_matters(name):
    params = constant()
    make, path = UNKNOWN[name]
    p, tree = plan(params, spec=SPEC), make(params)
    with pytest.raises(PlanError, match="its place does not tell") as caught:
        apply(p, tree, like=params)
    assert caught.value.path == path
    assert "fold=False" in str(caught.value)
    # Without constants it does not matter, and neither if the caller says so.
    apply(plan(mlp(), spec=SPEC), make(mlp()), like=mlp())
    zeros = jax.tree.map(lambda x: x * 0, params)
    apply(p, make(zeros), like=params)
    alone = slower(params)
    np.testing.assert_allclose(value(apply(p, alone, like=params)), value(alone), rtol=1e-12)
    assert_same(apply(p, fed(params), like=params, fold=False).ema, sliced(alone))


CHANNEL_ALIVE: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "average": (lambda p, other: {"params": p, "ema": other}, True),
    "alone": (lambda p, other: other, True),
    "unknown": (lambda p, other: {"params": p, "shadow": other}, True),
    "constants that are not folded": (lambda p, other: {"params": p}, False),
}


@pytest.mark.parametrize("name", CHANNEL_ALIVE)
def test_a_copy_that_loses_living_channels_is_warned_of(name):
    params = constant()
    other = jax.tree.map(np.copy, params)
    other["block"]["down"]["kernel"][1] = 1.0
    make, fold = CHANNEL_ALIVE[name]
    p = plan(params, spec=SPEC)
    tree = make(params, {**other, "block": {**other["block"]}})
    if name == "unknown":
        other["block"]["up"]["kernel"][:, 6] = 1.0
    with pytest.warns(UserWarning, match="1 channels that the plan cuts are alive|2 channels"):
        apply(p, tree, like=params, fold=fold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(p, {"params": params, "grads": other}, like=params)
        apply(p, other, like=params, fold=False)


def test_moments_of_a_name_unknown_are_cut_with_a_warning_beside_parameters():
    params = constant()
    tree = {"params": params, "m": moment(params)}
    with pytest.warns(UserWarning, match="are alive in m"):
        small = apply(plan(params, spec=SPEC), tree, like=params)
    np.testing.assert_allclose(value(small["params"]), value(params), rtol=1e-12)
    assert_same(small["m"], sliced(tree["m"]))


def test_an_average_that_is_not_constant_is_named():
    params = constant()
    tree = {"params": params, "ema": moment(params)}
    with pytest.raises(PlanError, match="not constant in this tree") as caught:
        apply(plan(params, spec=SPEC), tree, like=params)
    assert caught.value.path == "ema/block/up/kernel"
    assert "alone" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "schedule_free"])
def test_moments_take_no_constants(name):
    params = jax.tree.map(np.float32, constant())
    state = moment(OPTIMIZERS[name]().init(params))
    assert_same(apply(plan(params, spec=SPEC), state, like=params), sliced(state))


@pytest.mark.parametrize("name", ["adamw", "MultiSteps", "momentum", "multi_transform", "amsgrad"])
def test_moments_take_no_constants_where_their_types_are_lost(name):
    # As a checkpoint has them: dicts, with the names of the fields.
    params = constant()
    state = serialization.to_state_dict(moment(OPTIMIZERS[name]().init(params)))
    assert_same(apply(plan(params, spec=SPEC), state, like=params), sliced(state))


def test_gradients_take_no_constants():
    params = constant()
    p, grads = plan(params, spec=SPEC), jax.tree.map(np.ones_like, constant())
    assert_same(apply(p, grads, like=params, fold=False), sliced(grads))
    with pytest.raises(PlanError, match="not constant in this tree") as caught:
        apply(p, grads, like=params)
    assert "fold=False" in str(caught.value)


def test_a_mask_takes_no_constants():
    params = constant()
    masks = jax.tree.map(lambda x: x != 0, params)
    assert_same(apply(plan(params, spec=SPEC), masks, like=params), sliced(masks))


def test_numbers_for_whole_tensors_stay():
    # Learning rates of their own, in a copy and beside it.
    params = constant()
    rates = jax.tree.map(lambda _: 0.1, params)
    rates["block"]["up"]["alpha"] = np.float32(2.0)
    tree = {"params": {**params, "alpha": np.float32(2.0)}, "rates": rates, "step": 3}
    small = apply(plan(params, spec=SPEC), tree, like=params)
    assert_same(small["rates"], flatten(rates))
    assert small["params"]["block"]["up"]["kernel"].shape == (3, 5)
    np.testing.assert_allclose(value(small["params"]), value(tree["params"]), rtol=1e-12)


def test_a_bias_without_what_its_constants_follow_from_is_refused():
    params = constant()
    part = {"block": {"down": params["block"]["down"]}}
    with pytest.raises(PlanError, match="without the tensors that they follow from") as caught:
        apply(plan(params, spec=SPEC), part, like=params)
    assert "block/up/kernel" in str(caught.value)
    assert_same(apply(plan(params, spec=SPEC), part, like=params, fold=False), sliced(part))


# --- containers -------------------------------------------------------------------------------


def flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda t: t,
    "params": lambda t: {"params": t, "batch_stats": {"block": {"up": {"mean": jnp.ones(8)}}}},
    "FrozenDict": lambda t: freeze({"params": t}),
    "flat": flat,
    "nnx.State": lambda t: nnx.State(jax.tree.map(nnx.Param, t)),
    "Partitioned": lambda t: jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), t),
    "numpy": lambda t: jax.tree.map(np.asarray, t),
}


@pytest.mark.parametrize("state_of", CONTAINERS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_parameters_and_what_was_made_for_them_may_be_in_different_containers(
    container, state_of
):
    like = CONTAINERS[container](mlp())
    p = plan(like, spec=SPEC)
    moments = CONTAINERS[state_of](mlp(seed=5))
    if container != "params" and state_of == "params":
        moments = {"params": moments["params"]}  # statistics that these parameters do not have
    state = (optax.ScaleByAdamState(count=jnp.ones(()), mu=moments, nu=moments), optax.EmptyState())
    small = apply(p, state, like=like)
    assert_same(small, sliced(state))
    assert type(small[0].mu) is type(moments)


def test_statistics_beside_the_parameters_stay():
    variables = CONTAINERS["params"](mlp())
    tx = optax.adam(1e-2)
    state = State(
        step=0,
        apply_fn=forward,
        params=variables["params"],
        tx=tx,
        opt_state=tx.init(variables["params"]),
        batch_stats=variables["batch_stats"],
    )
    small = apply(plan(variables, spec=SPEC), state, like=variables)
    # It is of the shape of a bias that is cut, and a known one that is none.
    mean = state.batch_stats["block"]["up"]["mean"]
    assert small.batch_stats["block"]["up"]["mean"] is mean
    assert_same(small.params, sliced(state.params))


def test_a_name_that_ends_like_another_is_not_confused():
    rng = np.random.default_rng(0)

    def layers() -> dict[str, Any]:
        return {
            "Dense_0": {"kernel": rng.normal(size=(3, 4))},
            "Dense_1": {"kernel": rng.normal(size=(4, 3))},
        }

    params = {**layers(), "Head": layers(), "mu": layers()}
    params["Dense_1"]["kernel"][0] = 0
    params["Head"]["Dense_1"]["kernel"][[1, 2]] = 0
    pairs = [Pair(at=at, first="Dense_0", second="Dense_1") for at in ("/", "/Head")]
    p = plan(params, spec=Spec(name="TWO", pairs=tuple(pairs)), width="per_layer")
    numbers = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), params)
    for tx in (optax.adam(1.0), optax.sgd(1.0, momentum=0.9)):
        state = tx.init(params)
        leaves, tree = jax.tree.flatten(state)
        state = tree.unflatten(
            [x if np.ndim(x) == 0 else np.arange(12.0).reshape(x.shape) for x in leaves]
        )
        small = apply(p, state, like=params)
        moments = small[0].mu if hasattr(small[0], "mu") else small[0].trace
        kernels = flat(moments)
        for path, kernel in flat(numbers).items():
            rows = {"Head/Dense_1/kernel": [0, 3], "Dense_1/kernel": [1, 2, 3]}.get(path)
            columns = {"Head/Dense_0/kernel": [0, 3], "Dense_0/kernel": [1, 2, 3]}.get(path)
            kernel = kernel if rows is None else kernel[rows]
            kernel = kernel if columns is None else kernel[:, columns]
            np.testing.assert_array_equal(kernels[path], kernel, err_msg=path)


def test_parameters_in_lists_have_numbers_for_names():
    rng = np.random.default_rng(0)
    params = [(rng.normal(size=(3, 4)), np.ones(4)), (rng.normal(size=(4, 2)), np.ones(2))]
    params[1][0][[0, 2]] = 0
    pair = Pair(at="/", first="0/0", second="1/0", first_bias="0/1", second_bias="1/1")
    p = plan(params, spec=Spec(name="LIST", pairs=pair))
    for tx in (optax.adam(1.0), optax.chain(optax.adamw(1.0)), optax.sgd(1.0, momentum=0.9)):
        state = (params, tx.init(params))
        small = apply(p, state, like=params)
        shapes = [x.shape for x in jax.tree.leaves(small) if x.ndim]
        assert shapes == [(3, 2), (2,), (2, 2), (2,)] * (len(shapes) // 4)
        assert len(shapes) == sum(x.ndim > 0 for x in jax.tree.leaves(state))


def test_the_middle_of_a_chain_is_cut_on_both_axes():
    rng = np.random.default_rng(1)
    sizes = {"a": (3, 6), "b": (6, 5), "c": (5, 2)}
    params = {n: {"kernel": rng.normal(size=s), "bias": np.ones(s[1])} for n, s in sizes.items()}
    params["b"]["kernel"][[0, 2]] = 0
    params["c"]["kernel"][1] = 0
    pairs = (Pair(first="a", second="b"), Pair(first="b", second="c"))
    p = plan(params, spec=Spec(name="CHAIN", pairs=pairs), width="per_layer")
    state = optax.adam(1e-2).init(params)
    state = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) if x.ndim else x, state)
    small = apply(p, state, like=params)
    for name in ("mu", "nu"):
        before, after = getattr(state[0], name), getattr(small[0], name)
        np.testing.assert_array_equal(
            after["b"]["kernel"], before["b"]["kernel"][[1, 3, 4, 5]][:, [0, 2, 3, 4]]
        )
        np.testing.assert_array_equal(after["b"]["bias"], before["b"]["bias"][[0, 2, 3, 4]])


def test_a_bias_that_takes_a_constant_may_itself_be_cut():
    rng = np.random.default_rng(1)
    sizes = {"a": (3, 6), "b": (6, 5), "c": (5, 2)}
    params = {
        n: {"kernel": rng.normal(size=s), "bias": rng.normal(size=s[1])} for n, s in sizes.items()
    }
    params["a"]["kernel"][:, 4] = 0
    params["c"]["kernel"][1] = 0
    pairs = tuple(Pair(first=a, second=b, activation="tanh") for a, b in ("ab", "bc"))
    p = plan(params, spec=Spec(name="CHAIN", pairs=pairs), width="per_layer")
    tree = {"params": params, "ema": slower(params)}
    assert_same(apply(p, tree, like=params)["params"], flatten(apply(p, params)))
    assert_same(apply(p, tree, like=params)["ema"], flatten(apply(p, slower(params))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_layer_is_cut(layout):
    n = net(LAYOUTS[layout], seed=4, share=0.5)
    for ffn, dead in n.each():
        ffn.second[dead] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("relu"))
    small = apply(p, optax.adam(1.0).init(n.tree), like=n.tree)
    expected = optax.adam(1.0).init(apply(p, n.tree))
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, expected)


def stack() -> tuple[dict[str, Any], Plan]:
    """Two stacked layers, each with dead channels of its own, and the plan to cut them."""
    rng = np.random.default_rng(0)
    params = {
        "up": {"kernel": rng.normal(size=(2, 3, 4))},
        "down": {"kernel": rng.normal(size=(2, 4, 3))},
    }
    params["down"]["kernel"][0, [0, 1]] = 0
    params["down"]["kernel"][1, [1, 3]] = 0
    pair = Pair(first="up", second="down", first_axes="l d f", second_axes="l f d")
    return params, plan(params, spec=Spec(name="STACK", pairs=pair))


def test_layers_in_a_stack_lose_channels_of_their_own():
    params, p = stack()
    small = apply(p, {"mu": params}, like=params)["mu"]
    for i, keep in enumerate(([2, 3], [0, 2])):
        np.testing.assert_array_equal(small["up"]["kernel"][i], params["up"]["kernel"][i][:, keep])
        np.testing.assert_array_equal(small["down"]["kernel"][i], params["down"]["kernel"][i][keep])


def test_leaves_keep_their_devices_and_shardings():
    # In a process of its own: the number of devices is fixed when jax starts.
    code = """
        import jax, numpy as np, optax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from flaxslim import Pair, Spec, apply, expand, plan
        from flaxslim.errors import ShardingError
        mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("x", "y"))
        specs = {"up": P("y", "x"), "down": P("x", "y")}
        params = {"up": {"kernel": np.ones((4, 16), "float32")},
                  "down": {"kernel": np.eye(16, 4, dtype="float32")}}
        params["down"]["kernel"][4:8] = 1
        place = lambda name: lambda x: jax.device_put(x, NamedSharding(mesh, specs[name]))
        params = {name: jax.tree.map(place(name), tree) for name, tree in params.items()}
        tx = optax.adam(1e-2)
        state = jax.jit(tx.init)(params)
        state = (state[0]._replace(mu=params, nu=params), state[1])
        spec = Spec(name="MLP", pairs=Pair(first="up", second="down"))
        plan_ = plan(params, spec=spec)
        small = apply(plan_, {"params": params, "opt_state": state}, like=params)
        for tree in (small["params"], small["opt_state"][0].mu, small["opt_state"][0].nu):
            assert tree["up"]["kernel"].shape == (4, 8)
            for name in ("up", "down"):
                new, old = tree[name]["kernel"], params[name]["kernel"]
                assert new.sharding == old.sharding, (new.sharding, old.sharding)
                keep = [0, 1, 2, 3, 4, 5, 6, 7]
                axis = "down up".split().index(name)
                np.testing.assert_array_equal(new, np.take(np.asarray(old), keep, axis=axis))
        assert small["opt_state"][0].count is state[0].count
        back = expand(plan_, small["params"])
        for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
            assert (new.sharding, new.shape) == (old.sharding, old.shape)
        # What the devices do not divide is refused; what is filled up again takes any place.
        plan_ = plan(jax.tree.map(np.asarray, params), spec=spec, multiple_of=9)
        try:
            apply(plan_, state, like=params)
            raise AssertionError("9 rows on 4 devices?")
        except ShardingError as e:
            assert "4 devices do not divide the 9 of 16" in str(e), e
        wide = {"up": {"kernel": np.ones((4, 9))}, "down": {"kernel": np.eye(9, 4)}}
        plan_ = plan(wide, spec=spec)  # four stay
        small = apply(plan_, wide)
        small["up"]["kernel"] = jax.device_put(
            small["up"]["kernel"].astype("float32"), NamedSharding(mesh, specs["up"]))
        expected = np.ones((4, 9)) * (np.arange(9) < 4)
        np.testing.assert_array_equal(expand(plan_, small)["up"]["kernel"], expected)
    """
    run_code(code)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "leaf"),
    [
        (optax.adafactor(1e-2, min_dim_size_to_factor=2), "0/v_row/block/down/bias"),
        (optax.adafactor(1e-2), "0/v_row/block/down/bias"),
        (optax.chain(optax.clip(1.0), optax.adafactor(1e-2)), "1/0/v_row/block/down/bias"),
        (optax.sm3(1e-2), "0/mu/block/down/kernel/0"),
        (optax.lbfgs(1e-2), "0/diff_params_memory/block/down/bias"),
    ],
    ids=["adafactor", "adafactor unfactored", "chain", "sm3", "lbfgs"],
)
def test_optimizers_that_mix_channels_are_refused_with_advice(tx, leaf):
    params = mlp()
    state = tx.init(params)
    with pytest.raises(PlanError) as caught:
        apply(plan(params, spec=SPEC), {"params": params, "opt_state": state}, like=params)
    assert caught.value.path == f"opt_state/{leaf}"
    for advice in ("tx.init(slimmed)", "adamw, lion or sgd"):
        assert advice in str(caught.value)


def test_several_arrays_for_one_parameter_are_refused_whatever_their_shapes():
    params = mlp()
    arrays = {"block": {"up": {"kernel": {"rows": np.ones(7), "columns": np.ones(9)}}}}
    with pytest.raises(PlanError, match="2 leaves may follow") as caught:
        apply(plan(params, spec=SPEC), {"params": params, "state": arrays}, like=params)
    rows = [line.strip().removeprefix("found:").strip() for line in str(caught.value).splitlines()]
    assert "state/block/up/kernel/columns (9,)" in rows
    assert "state/block/up/kernel/rows (7,)" in rows


def test_factored_moments_of_what_stays_may_be_there():
    params = mlp()
    tx = optax.multi_transform(
        {"adam": optax.adam(1e-2), "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2)},
        {"block": "adam", "head": "factored"},
    )
    state = tx.init(params)
    assert_same(apply(plan(params, spec=SPEC), state, like=params), sliced(state))


def test_every_leaf_that_looks_like_a_parameter_and_is_none_is_named():
    params = mlp()
    state = optax.adam(1e-2).init(params)
    probes = {f"probe_{i}": {"w": jnp.ones((3, 8))} for i in range(12)}
    tree = {"opt_state": state, **probes, "bias": jnp.ones(8), "seven": jnp.ones(7)}
    with pytest.raises(PlanError, match="13 leaves may follow") as caught:
        apply(plan(params, spec=SPEC), tree, like=params)
    for path in (*(f"{name}/w (3, 8)" for name in probes), "bias (8,)"):
        assert path in str(caught.value)
    assert "seven" not in str(caught.value)


UNNAMED: dict[str, Any] = {
    "one number for each channel": np.ones(8, bool),
    "a transposed kernel": np.ones((8, 3)),
    "a history of kernels": np.ones((2, 3, 8)),
    "packed numbers": np.ones((3, 8), np.uint32),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_what_may_have_the_channels_of_layers_without_biases_is_refused(name):
    params = {"up": {"kernel": np.ones((3, 8))}, "down": {"kernel": np.eye(8, 3)}}
    p = plan(params, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    with pytest.raises(PlanError, match="1 leaf may follow") as caught:
        apply(p, {"params": params, "more": {"of": UNNAMED[name]}}, like=params)
    assert caught.value.path == "more/of"


def test_one_number_for_each_layer_and_channel_or_group_is_refused():
    params = {"up": {"kernel": np.ones((2, 3, 4))}, "down": {"kernel": np.ones((2, 4, 3))}}
    params["down"]["kernel"][:, 1] = 0
    pair = Pair(first="up", second="down", first_axes="l d f", second_axes="l f d")
    p = plan(params, spec=Spec(name="STACK", pairs=pair))
    with pytest.raises(PlanError, match="1 leaf may follow"):
        apply(p, {"params": params, "masks": {"mlp": np.ones((2, 4))}}, like=params)
    assert apply(p, {"params": params, "masks": {"mlp": np.ones((5, 7))}}, like=params)


def test_keys_of_random_numbers_are_no_parameters():
    params = {"up": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}, "down": {"kernel": np.eye(2)}}
    params["down"]["kernel"][1] = 0
    p = plan(params, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    tree = {"params": params, "raw": jax.random.PRNGKey(0), "new": jax.random.key(0)}
    small = apply(p, tree, like=params)
    assert small["raw"] is tree["raw"]
    assert small["new"] is tree["new"]


def test_another_network_of_like_names_is_not_taken_for_a_copy():
    # The names of Linen are the same everywhere: an actor and its critic.
    def network(out: int, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        shapes = {"Dense_0": (3, 8), "Dense_1": (8, 8), "Dense_2": (8, out), **(extra or {})}
        return {name: {"kernel": np.ones(shape)} for name, shape in shapes.items()}

    actor = network(2)
    actor["Dense_1"]["kernel"][[0, 5]] = 0
    pair = Pair(at="/", first="Dense_0", second="Dense_1")
    p = plan(actor, spec=Spec(name="ACTOR", pairs=pair))
    with pytest.raises(PlanError, match="not its shape") as caught:
        apply(p, {"actor": actor, "critic": network(1)}, like=actor)
    assert caught.value.path == "critic/Dense_2/kernel"
    with pytest.raises(PlanError, match="2 leaves may follow") as caught:
        apply(p, {"actor": actor, "critic": network(2, {"Dense_3": (2, 1)})}, like=actor)
    message = str(caught.value)
    for leaf in ("critic/Dense_0/kernel (3, 8)", "critic/Dense_1/kernel (8, 8)"):
        assert leaf in message
    assert "critic also has Dense_3/kernel" in message
    # One that cannot be told from a copy is one: a target network.
    small = apply(p, {"actor": actor, "target": network(2)}, like=actor)
    assert small["target"]["Dense_1"]["kernel"].shape == (6, 8)


def test_a_state_of_another_model_is_refused():
    params = mlp()
    p = plan(params, spec=SPEC)
    wider = jax.tree.map(lambda x: np.ones([size + 1 for size in x.shape]), params)
    with pytest.raises(PlanError, match="not its shape"):
        apply(p, optax.adam(1e-2).init(wider), like=params)
    deeper = {**params, "tail": {"kernel": np.ones((2, 2))}}
    with pytest.raises(PlanError, match="leaves may follow") as caught:
        apply(p, optax.adam(1e-2).init(deeper), like=params)
    assert "0/mu also has tail/kernel" in str(caught.value)
    with pytest.raises(PlanError, match="another structure"):
        apply(p, optax.adam(1e-2).init(params), like={"model": params})


@pytest.mark.parametrize("like", [lambda p: {"model": p}, lambda p: optax.adam(1.0).init(p)])
def test_a_wrong_like_is_called_so(like):
    params = mlp()
    with pytest.raises(PlanError, match=r"^like=: the plan is for a tree with another structure"):
        apply(plan(params, spec=SPEC), optax.adam(1.0).init(params), like=like(params))


def test_replicated_states_are_told_what_to_do():
    params = mlp()
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    with pytest.raises(PlanError, match="unreplicate"):
        apply(plan(params, spec=SPEC), twice, like=params)


def test_a_state_that_was_cut_already_is_refused():
    params = mlp()
    p = plan(params, spec=SPEC)
    small = apply(p, optax.adam(1e-2).init(params), like=params)
    with pytest.raises(PlanError, match="cut already") as caught:
        apply(p, small, like=params)
    assert caught.value.path == "0/mu/block/down/kernel"
    assert "(5, 3)" in str(caught.value)
    with pytest.raises(PlanError, match="applied before"):
        apply(p, small, like=apply(p, params))


def test_a_tree_that_has_nothing_of_the_parameters_is_refused():
    params = mlp()
    with pytest.raises(PlanError, match="nothing in this tree follows") as caught:
        apply(plan(params, spec=SPEC), {"a": {"b": np.ones((2, 2))}}, like=params)
    assert "a/b" in str(caught.value)


@pytest.mark.parametrize("state", [(), optax.sgd(1e-2).init(mlp()), {"step": np.int32(3)}])
def test_a_state_without_arrays_passes(state):
    params = mlp()
    small = apply(plan(params, spec=SPEC), state, like=params)
    assert jax.tree.structure(small) == jax.tree.structure(state)


def test_a_plan_that_removes_nothing_changes_nothing():
    params = mlp()
    p = plan(params, spec=SPEC, multiple_of=8)
    tree = {"params": params, "opt_state": optax.adam(1e-2).init(params)}
    small = apply(p, tree, like=params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (small, tree)), strict=True))


def test_a_state_of_what_stays_passes():
    params = mlp()
    state = optax.masked(optax.adam(1e-2), {"block": False, "head": True}).init(params)
    small = apply(plan(params, spec=SPEC), state, like=params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (small, state)), strict=True))


def test_nan_in_a_state_is_told_where_it_is():
    params = mlp()
    state: Any = optax.adam(1e-2).init(params)
    state[0].nu["block"]["up"]["kernel"] = jnp.full((3, 8), jnp.nan)
    with pytest.raises(NonFiniteError) as caught:
        apply(plan(params, spec=SPEC), state, like=params)
    assert caught.value.path == "0/nu/block/up/kernel"


def test_under_jit_it_is_refused():
    params = mlp()
    p = plan(params, spec=SPEC)
    for function in (lambda t: apply(p, t), lambda t: apply(p, t, like=params)):
        with pytest.raises(TracedError):
            jax.jit(function)(params)


# --- quantised kernels ------------------------------------------------------------------------


def quantised(kernel: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """An int8 kernel, and its scales along an axis, as many dimensions as the kernel has."""
    largest = np.abs(kernel).max(axis=1 - axis if axis is not None else None, keepdims=True)
    scale = np.where(largest > 0, largest, 1) / 127
    return np.round(kernel / scale).astype(np.int8), scale


SCALES: dict[str, tuple[int | None, Callable[[np.ndarray], np.ndarray]]] = {
    "a number": (None, lambda s: s.reshape(())),
    "one for all": (None, np.ravel),
    "one for all, keepdims": (None, lambda s: s),
    "outputs": (1, np.ravel),
    "outputs, keepdims": (1, lambda s: s),
    "inputs": (0, np.ravel),
    "inputs, keepdims": (0, lambda s: s),
}


@pytest.mark.parametrize("name", ["kernel_scale", "scale", "scales"])
@pytest.mark.parametrize("kind", SCALES)
def test_scales_are_cut_with_their_kernels(kind, name):
    params = jax.tree.map(np.asarray, mlp())
    axis, shape = SCALES[kind]
    tree = jax.tree.map(lambda x: x, params)
    for layer in tree["block"].values():
        layer["kernel"], scale = quantised(layer["kernel"], axis)
        layer[name] = shape(scale)

    def dequantised(tree: Any) -> Any:
        def layer(t: Any, axis: int | None) -> Any:
            scale = t[name] if axis is None else np.expand_dims(np.ravel(t[name]), 1 - axis)
            return {"kernel": t["kernel"] * scale, "bias": t["bias"]}

        return {**tree, "block": {k: layer(t, axis) for k, t in tree["block"].items()}}

    small = apply(plan(params, spec=SPEC), tree, like=params)
    assert small["block"]["up"]["kernel"].dtype == np.int8
    np.testing.assert_allclose(value(dequantised(small)), value(dequantised(tree)), rtol=1e-10)
    assert_same(dequantised(small), sliced(dequantised(tree)))


@flax.struct.dataclass
class QArray:
    """As qwix has it: an array that is a tree."""

    qvalue: Any
    scale: Any
    zero_point: Any = None


def test_an_array_that_is_a_tree_of_quantised_parts_is_cut():
    params = jax.tree.map(np.asarray, mlp())
    tree = jax.tree.map(lambda x: x, params)
    for layer in tree["block"].values():
        layer["kernel"] = {"array": QArray(*quantised(layer["kernel"], 1))}
    small = apply(plan(params, spec=SPEC), tree, like=params)
    for name, layer in small["block"].items():
        old, new = tree["block"][name]["kernel"]["array"], layer["kernel"]["array"]
        end = f"block/{name}/kernel"
        np.testing.assert_array_equal(
            new.qvalue * new.scale, (old.qvalue * old.scale)[index_of(end)]
        )


def with_scale(scale: np.ndarray, shape: tuple[int, int] = (4, 8)) -> tuple[Any, Any]:
    params = {"up": {"kernel": np.ones(shape)}, "down": {"kernel": np.ones(shape[::-1])}}
    params["down"]["kernel"][1] = 0
    tree = jax.tree.map(lambda x: x.astype(np.int8), params)
    tree["up"]["kernel_scale"] = scale
    p = plan(params, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    return params, apply(p, tree, like=params)["up"]["kernel_scale"]


def test_blocks_along_the_other_axis_pass_and_are_cut_along_theirs():
    scale = np.arange(16.0).reshape(2, 8)
    _, small = with_scale(scale)
    np.testing.assert_array_equal(small, np.delete(scale, 1, axis=1))
    scale = np.arange(2.0).reshape(2, 1)
    assert with_scale(scale)[1] is scale


def test_blocks_along_the_axis_are_refused_with_the_numbers():
    with pytest.raises(PlanError, match="blocks of channels") as caught:
        with_scale(np.ones((4, 2)))
    assert caught.value.path == "up/kernel_scale"
    assert "2 blocks for 8 channels" in str(caught.value)


def test_a_scale_beside_a_square_kernel_is_refused():
    with pytest.raises(PlanError, match="several dimensions") as caught:
        with_scale(np.ones(8), shape=(8, 8))
    assert "(1, outputs)" in str(caught.value)
    assert with_scale(np.ones((1, 8)), shape=(8, 8))[1].shape == (1, 7)


def test_a_scale_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="does not fit its kernel") as caught:
        with_scale(np.ones(3))
    assert "(3,) beside up/kernel (4, 8)" in str(caught.value)


def test_a_table_of_the_values_of_a_quantised_kernel_passes():
    params = {"up": {"kernel": np.ones((4, 8))}, "down": {"kernel": np.eye(8, 4)}}
    tree = {**params, "up": {**params["up"], "quant_map": np.arange(16.0)}}
    p = plan(params, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    small = apply(p, tree, like=params)
    assert small["up"]["quant_map"] is tree["up"]["quant_map"]
    assert small["up"]["kernel"].shape == (4, 4)


def stacked(scale: np.ndarray) -> np.ndarray:
    params, p = stack()
    tree = {**params, "up": {**params["up"], "scale": scale}}
    return apply(p, tree, like=params)["up"]["scale"]


def test_scales_of_a_stack_lose_the_channels_of_their_layers():
    scale = np.arange(8.0).reshape(2, 4)
    expected = np.stack([scale[0, [2, 3]], scale[1, [0, 2]]])
    np.testing.assert_array_equal(stacked(scale), expected)
    np.testing.assert_array_equal(stacked(scale[:, None]), expected[:, None])
    with pytest.raises(PlanError, match="shared by layers of a stack"):
        stacked(np.ones((1, 1, 4)))
    with pytest.raises(PlanError, match="shared by layers of a stack"):
        stacked(np.ones(4))


def test_constants_of_a_quantised_layer_are_refused():
    params = constant()
    tree = jax.tree.map(lambda x: x, params)
    tree["block"]["up"]["kernel"], scale = quantised(tree["block"]["up"]["kernel"], 1)
    tree["block"]["up"]["scale"] = scale
    with pytest.raises(UnsupportedDtypeError, match="quantised"):
        apply(plan(params, spec=SPEC), tree, like=params)


def test_a_state_of_one_flat_vector_is_refused():
    """As optax.flatten makes it: what belongs to a channel lies anywhere in it."""
    params = mlp()
    params["block"]["down"]["kernel"] = params["block"]["down"]["kernel"].at[jnp.array(DEAD)].set(0)
    p = plan(params, spec=SPEC)
    tx = optax.chain(optax.flatten(optax.adam(1e-3)), optax.trace(0.9))
    with pytest.raises(PlanError, match="2 leaves may follow a parameter"):
        apply(p, tx.init(params), like=params)
