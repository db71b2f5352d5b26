"""`shrink`: dead channels go while a model trains, and training goes on as if nothing had been."""

import dataclasses
import functools
import logging
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training import train_state
from pruning_models import MLP, NETS, Net, batches, mlp
from strategies import enable_x64
from transformers import BertConfig
from transformers.models.bert.modeling_flax_bert import FlaxBertForSequenceClassificationModule

import flaxslim
from flaxslim import NothingRemovedWarning, Pair, ShrinkEvery, Spec, shrink, sparsity
from flaxslim._tree import flatten
from flaxslim.errors import (
    NothingMatchedError,
    PlanError,
    TracedError,
    TrainingError,
    WidthError,
)
from flaxslim.training import _shrink
from flaxslim.training._channels import values

# --- the same losses, the same deaths ---------------------------------------------------------

STEPS = 9  # in each of three parts; odd, so that gradients are being accumulated at a cut
SCHEDULE = flaxslim.cubic(0.0, 0.6, begin=4, end=15, every=3)

Prune = Callable[..., Any]


def _multi_steps_outside(prune: Prune) -> Any:
    schedule = flaxslim.cubic(0.0, 0.6, begin=0, end=6, every=2)  # counted by the updates
    return optax.MultiSteps(prune(optax.adam(3e-2), schedule), 2).gradient_transformation()


OPTIMIZERS: dict[str, Callable[[Prune], Any]] = {
    "adamw": lambda prune: prune(optax.adamw(2e-2)),
    "momentum": lambda prune: prune(optax.sgd(2e-2, momentum=0.9)),
    "lion": lambda prune: prune(optax.lion(5e-3)),
    "clipped": lambda prune: prune(
        optax.chain(optax.clip_by_global_norm(0.2), optax.adam(2e-2)),
    ),
    "MultiSteps inside": lambda prune: prune(optax.MultiSteps(optax.adam(3e-2), 2)),
    "MultiSteps outside": _multi_steps_outside,
    "inject_hyperparams": lambda prune: prune(
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(3e-2, 1e-2, 20))
    ),
    "schedule_free": lambda prune: prune(optax.contrib.schedule_free_adamw(3e-2)),
}

# What a net is given for a config, and what else `pruning` is told.
CONFIGS: dict[str, Any] = {"mlp": {"hidden": 10}}
MORE: dict[str, dict[str, Any]] = {
    "sites differ": {"allocation": "global"},
    "anew": {"score": "taylor"},
    "capped": {"max_sparsity": 0.55, "min_width": 2},
    "fading": {"fade": 2, "score": "magnitude"},
}

CASES = [
    ("mlp", "adamw", "per_layer", "sites differ"),
    ("gated", "schedule_free", "uniform", ""),
    ("gated", "MultiSteps outside", "per_layer", "anew"),
    ("gated", "clipped", "per_layer", "capped"),
    ("stacked", "momentum", "per_layer", "fading"),
    ("heads", "inject_hyperparams", "per_layer", ""),
]
PRODUCT = [
    pytest.param(*case, marks=pytest.mark.long)
    for net in NETS
    for name in OPTIMIZERS
    for width in ("uniform", "per_layer")
    if (case := (net, name, width, "")) not in CASES
]


def _optimizer(name: str, net: Net, cfg: Any, more: str = "") -> Any:
    settings = {"score": "snip_momentum", "cfg": cfg} | MORE.get(more, {})
    return OPTIMIZERS[name](
        lambda inner, schedule=SCHEDULE: flaxslim.pruning(inner, net.spec, schedule, **settings)
    )


@dataclasses.dataclass
class Run:
    """A run in parts: parameters, optimizer state and average now; what became of each step."""

    net: Net
    params: Any
    state: Any
    average: Any
    cfg: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    sparsities: list[float] = dataclasses.field(default_factory=list)

    def on(self, program: Any, data: Any) -> "Run":
        (params, state, average), (losses, states) = program(
            (self.params, self.state, self.average), data
        )
        seen = [{path: x[i] for path, x in states.items()} for i in range(STEPS)]
        dead = [sparsity(state).total for state in seen]
        return dataclasses.replace(
            self,
            params=params,
            state=state,
            average=average,
            losses=[*self.losses, *losses.tolist()],
            sparsities=[*self.sparsities, *dead],
        )

    def shrunk(self, width: str) -> "Run":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is dead is not so in the average
            params, (state, average), cfg = shrink(
                self.params, (self.state, self.average), self.cfg, self.net.spec, width=width
            )
        return dataclasses.replace(self, params=params, state=state, average=average, cfg=cfg)

    def of_the_living(self) -> dict[str, Any]:
        """All leaves, without what belongs to dead channels, however many of these are there."""
        known = sparsity(self.state).sites
        own = {
            tensor.path: (site, tensor)
            for site in self.net.spec.sites(self.params, self.cfg)
            for tensor in site.cut
        }
        found: dict[str, Any] = {}
        for path, x in flatten((self.params, self.state, self.average)).items():
            if "/channels/" in path:  # `sparsity` has told
                continue
            at = next((name for name in own if path.endswith(f"/{name}")), None)
            found[path] = x
            if at is not None and np.ndim(x):
                site, tensor = own[at]
                found[path] = np.asarray(values(site, tensor, x))[known[site.second.path].alive]
        return found


def _program(tx: Any, net: Net) -> Any:
    """STEPS of training in one: what a run holds, and batches -> the same, and what was seen."""

    def step(held: Any, batch: Any) -> tuple[Any, Any]:
        params, state, average = held
        loss, grads = jax.value_and_grad(net.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.2)
        seen = {
            path: x
            for path, x in flatten(state).items()
            if "channels/" in path or path.endswith("skipped")
        }
        return (params, state, average), (loss, seen)

    return jax.jit(lambda held, data: jax.lax.scan(step, held, data))


@pytest.mark.parametrize(("name", "inner", "width", "more"), [*CASES, *PRODUCT])
def test_a_model_that_shrinks_twice_trains_as_one_that_never_does(name, inner, width, more):
    with enable_x64():
        net, cfg = NETS[name](), CONFIGS.get(name)
        net = dataclasses.replace(net, cfg=net.cfg or cfg)
        params, data = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (net.params, batches(3 * STEPS))
        )
        parts = [jax.tree.map(lambda x, i=i: x[i * STEPS :][:STEPS], data) for i in range(3)]
        tx = _optimizer(inner, net, net.cfg, more)
        program = _program(tx, net)
        dense = Run(net, params, tx.init(params), params, net.cfg).on(program, parts[0])
        small = dense
        for i in (1, 2):  # while the schedule goes on, and after it
            small = small.shrunk(width)
            tx = _optimizer(inner, net, small.cfg, more)  # of heads, the config tells the size
            small = small.on(_program(tx, net), parts[i])
            dense = dense.on(program, parts[i])

    assert small.sparsities == dense.sparsities
    assert 0 < dense.sparsities[STEPS - 1] < dense.sparsities[-1]
    np.testing.assert_allclose(small.losses, dense.losses, rtol=1e-9)
    assert dense.losses[-1] < 0.9 * dense.losses[0]  # there was something to learn
    assert sum(map(np.size, flatten(small.params).values())) < sum(
        map(np.size, flatten(dense.params).values())
    )
    ours, theirs = small.of_the_living(), dense.of_the_living()
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        # Of sums that nearly cancel less is left to compare than of the largest.
        np.testing.assert_allclose(x, theirs[path], rtol=1e-6, atol=1e-12, err_msg=path)
        y = np.asarray(theirs[path], np.float64)
        apart = np.abs(np.asarray(x, np.float64) - y).max(initial=0)
        assert apart <= 1e-7 * np.abs(y).max(initial=0), path


# --- in every container -----------------------------------------------------------------------


class State(train_state.TrainState):
    """A stock one with an average of the parameters beside."""

    ema_params: Any = None


ONE = flaxslim.one_shot(0.5, at=1)
CFG = {"hidden": 10}


@functools.cache
def _pruned(layers: int = 1) -> tuple[Net, Any, Any, Any]:
    """A net in training, with half of its channels dead: itself, optimizer, parameters, state."""
    net = mlp(layers)
    tx = flaxslim.pruning(optax.adam(1e-2), net.spec, ONE)
    params, state, step = net.params, tx.init(net.params), _step(tx, net)
    for batch in zip(*batches(3), strict=True):
        params, state, _ = step(params, state, batch)
    return net, tx, params, state


def _step(tx: Any, net: Net) -> Any:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(net.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def test_a_train_state_is_cut_whole_and_its_average_warned_of():
    net = mlp(layers=1)

    @jax.jit
    def step(state: State, batch: Any) -> tuple[State, Any]:
        loss, grads = jax.value_and_grad(net.loss)(state.params, batch)
        state = state.apply_gradients(grads=grads)
        average = optax.incremental_update(state.params, state.ema_params, 0.1)
        return state.replace(ema_params=average), loss

    tx = flaxslim.pruning(optax.adamw(1e-2), net.spec, ONE)
    state: Any = State.create(
        apply_fn=net.fn, params=net.params, tx=tx, ema_params=jax.tree.map(jnp.copy, net.params)
    )
    data = list(zip(*batches(6), strict=True))
    for batch in data[:3]:
        state, _ = step(state, batch)
    with pytest.warns(UserWarning, match="5 channels that the plan cuts are alive in ema_params"):
        small, nothing, cfg = shrink(state, None, CFG, net.spec)
    assert nothing is None
    assert cfg == {"hidden": 5}
    assert isinstance(small, State)
    assert small.step == 3
    shapes = {path: x.shape for path, x in flatten(small).items() if path.endswith("up/kernel")}
    assert shapes == dict.fromkeys(
        (
            "params/layers/0/up/kernel",
            "opt_state/inner_state/0/mu/layers/0/up/kernel",
            "opt_state/inner_state/0/nu/layers/0/up/kernel",
            "ema_params/layers/0/up/kernel",
        ),
        (6, 5),
    )
    for batch in data[3:]:
        state, loss = step(state, batch)
        small, ours = step(small, batch)
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
    assert sparsity(small).total == sparsity(state).total == 0.5


def test_an_nnx_module_is_cut_with_its_optimizer():
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up, self.down = nnx.Linear(6, 10, rngs=rngs), nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.down(nnx.relu(self.up(x)))

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        def loss(model: Any) -> Any:
            return jnp.mean((model(batch[0]) - batch[1]) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    spec = Spec(name="BLOCK", pairs=Pair(first="up", second="down", activation="relu"))
    model = Block(nnx.Rngs(0))
    tx = flaxslim.pruning(optax.adam(1e-2), spec, ONE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    data = list(zip(*batches(6), strict=True))
    for batch in data[:3]:
        step(model, optimizer, batch)
    small, small_optimizer, cfg = shrink(model, optimizer, None, spec)
    assert cfg is None
    assert isinstance(small_optimizer, nnx.Optimizer)
    assert (small.up.out_features, small.down.in_features) == (5, 5)
    assert (model.up.out_features, model.down.in_features) == (10, 10)
    for batch in data[3:]:
        loss, ours = step(model, optimizer, batch), step(small, small_optimizer, batch)
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
    assert int(small_optimizer.step[...]) == 6
    assert sparsity(small_optimizer).total == sparsity(optimizer).total == 0.5


def test_each_tree_comes_back_as_its_own_kind():
    net, tx, params, state = _pruned()
    frozen = freeze(params)
    state = tx.init(frozen)._replace(channels=state.channels)
    found = shrink(frozen, state, CFG, net.spec)
    assert isinstance(found[0], FrozenDict)
    small, small_state, _ = found
    assert isinstance(small_state.inner_state[0].mu, FrozenDict)
    assert jax.tree.structure(small_state) == jax.tree.structure(state)
    assert flatten(small)["layers/0/down/kernel"].shape == (5, 6)
    grads = jax.tree.map(jnp.zeros_like, small)
    updates, _ = jax.jit(tx.update)(grads, small_state, small)
    assert isinstance(updates, FrozenDict)


BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=12,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
)


def test_a_stock_model_goes_on_at_widths_and_heads_of_each_layer_s_own():
    rng = np.random.default_rng(0)
    data = [(rng.integers(5, 40, (8, 6)), rng.integers(0, 3, 8)) for _ in range(10)]

    def optimizer(cfg: Any) -> Any:
        schedules = {"f": flaxslim.linear(0.0, 0.5, begin=1, end=7, every=3), "h": 0.4}
        spec, inner = flaxslim.spec_for(cfg, "all"), optax.sgd(1e-2, momentum=0.9)
        return flaxslim.pruning(inner, spec, schedules, "snip", cfg=cfg, allocation="global")

    @jax.jit
    def step(state: Any, ids: Any, labels: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logits = state.apply_fn({"params": params}, *_inputs(ids))[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    dense, ids = FlaxBertForSequenceClassificationModule(BERT), data[0][0]
    shapes = jax.eval_shape(dense.init, jax.random.key(0), *_inputs(ids))["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
    state: Any = State.create(apply_fn=dense.apply, params=params, tx=optimizer(BERT))
    with jax.default_matmul_precision("highest"):
        for batch in data[:5]:
            state, _ = step(state, *batch)
        small, _, cfg = shrink(state, None, BERT, "all", width="per_layer")
        widths = {path: x.shape[-1] for path, x in flatten(small.params).items()}
        assert (
            widths["bert/encoder/layer/0/intermediate/dense/kernel"]
            != (widths["bert/encoder/layer/1/intermediate/dense/kernel"])
        )
        model = flaxslim.module(FlaxBertForSequenceClassificationModule, cfg)
        small = small.replace(apply_fn=model.apply, tx=optimizer(cfg))
        for batch in data[5:]:
            state, loss = step(state, *batch)
            small, ours = step(small, *batch)
            np.testing.assert_allclose(ours, loss, rtol=1e-4)
    inputs = {"params": small.params}, *_inputs(ids)
    with flaxslim.layout(cfg):
        stock = FlaxBertForSequenceClassificationModule(cfg)
        program = str(jax.make_jaxpr(stock.apply)(*inputs))
    assert program == str(jax.make_jaxpr(model.apply)(*inputs))
    assert sparsity(small).total == sparsity(state).total > 0.4


def _inputs(ids: Any) -> tuple[Any, ...]:
    """What the Linen class takes: ids, mask, token types, positions, and no mask of heads."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return ids, jnp.ones_like(ids), jnp.zeros_like(ids), positions, None


# --- what it says, and what it refuses --------------------------------------------------------


def test_it_says_what_went(caplog):
    net, _, params, state = _pruned(2)
    with caplog.at_level(logging.INFO, logger="flaxslim"):
        shrink(params, state, CFG, net.spec)
    assert caplog.messages[-1].endswith("10 channels go, with 130 parameters")


def test_it_warns_if_nothing_is_dead_and_gives_back_what_it_was_given():
    net, tx, *_ = _pruned()
    state = tx.init(net.params)
    with pytest.warns(NothingRemovedWarning, match="nothing was removed: no channel at 1 site of"):
        found = shrink(net.params, state, CFG, net.spec)
    assert found[0] is net.params
    assert found[1] is state
    assert found[2] is CFG


@pytest.mark.parametrize("around", [False, True], ids=["of the tree", "of the tree inside"])
def test_channels_that_are_zero_and_were_not_pruned_are_refused(around):
    """Also where the state is of the tree inside of the one that is given."""
    net, tx, *_ = _pruned()
    params = jax.tree.map(jnp.asarray, net.params)
    down = params["layers"]["0"]["down"]
    down["kernel"] = down["kernel"].at[jnp.array([2, 3])].set(0)
    whole = {"params": params} if around else params
    with pytest.raises(TrainingError, match="2 channels are dead, but not by pruning"):
        shrink(whole, tx.init(params), CFG, net.spec)


def test_channels_that_were_pruned_and_are_not_zero_are_refused():
    """A decay that stands after `pruning` in a chain moves what `pruning` had made zero."""
    net = mlp(1)
    tx = optax.chain(
        flaxslim.pruning(optax.adam(1e-2), net.spec, ONE), optax.add_decayed_weights(1e-2)
    )
    params, state = net.params, tx.init(net.params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert sparsity(state).total == 0.5
    with pytest.raises(TrainingError, match=r"channels were pruned, and are not zero(.|\n)*decay"):
        shrink(params, state, CFG, net.spec)
    with pytest.raises(TrainingError, match="are not zero"):
        ShrinkEvery(1, net.spec)(params, state, CFG)


def test_what_was_pruned_goes_without_a_warning():
    net, _, params, state = _pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrink(params, state, CFG, net.spec)


def test_it_does_not_run_under_jit():
    net, _, params, state = _pruned()
    with pytest.raises(TracedError):
        jax.jit(lambda p, s: shrink(p, s, CFG, net.spec)[0])(params, state)


def test_an_inner_state_that_no_cut_follows_is_refused_with_what_to_do():
    net, _, params, state = _pruned()
    fresh: Any = flaxslim.pruning(optax.adafactor(1e-2), net.spec, ONE).init(params)
    state = fresh._replace(channels=state.channels)
    with pytest.raises(PlanError, match=r"adafactor(.|\n)*start the optimizer anew, tx.init"):
        shrink(params, state, CFG, net.spec)


OTHER = Spec(name="OTHER", pairs=Pair(at="block/{i}", first="up", second="down"))


def test_a_spec_of_another_model_is_refused():
    _, _, params, state = _pruned()
    with pytest.raises(NothingMatchedError, match="OTHER"):
        shrink(params, state, CFG, OTHER)


FIRST = Spec(name="FIRST", pairs=Pair(at="layers/0", first="up", second="down", activation="gelu"))


def test_a_spec_for_a_part_cuts_that_part():
    net, tx, params, state = _pruned(2)
    params, state, _ = shrink(params, state, None, FIRST)
    assert params["layers"]["0"]["down"]["kernel"].shape == (5, 6)
    assert params["layers"]["1"]["down"]["kernel"].shape == (10, 6)
    assert sparsity(state).total == 0.5
    _step(tx, net)(params, state, jax.tree.map(lambda x: x[0], batches(1)))


@pytest.mark.parametrize("alone", ["parameters", "state"])
def test_an_update_with_only_one_of_both_cut_names_shrink(alone):
    net, tx, params, state = _pruned()
    small, small_state, _ = shrink(params, state, CFG, net.spec)
    both = (small, state) if alone == "parameters" else (params, small_state)
    with pytest.raises(TrainingError, match=r"flaxslim\.shrink\(params, opt_state"):
        tx.update(jax.tree.map(jnp.ones_like, both[0]), both[1], both[0])


# --- every so many steps ----------------------------------------------------------------------


class Clock:
    """Time that passes by as much as a step is said to take."""

    def __init__(self) -> None:
        self.now, self.step = 0.0, 1.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(_shrink, "time", types.SimpleNamespace(perf_counter=found))
    return found


def _loop(
    shrinking: ShrinkEvery, schedule: Any, steps: int, clock: Clock, speed: float = 1.0
) -> list[tuple[int, int]]:
    """Train, and shrink every so often: the steps after which a width changed, with the width."""
    net = mlp(layers=1)
    tx = flaxslim.pruning(optax.sgd(1e-2), net.spec, schedule)
    traces: list[int] = []

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        traces.append(params["layers"]["0"]["down"]["kernel"].shape[0])
        updates, state = tx.update(jax.grad(net.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, state, cfg = net.params, tx.init(net.params), {"hidden": 10}
    changes: list[tuple[int, int]] = []
    for i, batch in enumerate(zip(*batches(steps), strict=True)):
        params, state = step(params, state, batch)
        clock.now += clock.step
        params, state, cfg = shrinking(params, state, cfg)
        if shrinking.changed:
            changes.append((i, cfg["hidden"]))
            clock.step *= speed
    assert traces == [10, *(width for i, width in changes if i < steps - 1)]
    return changes


@pytest.mark.parametrize(
    ("multiple_of", "changes"),
    [
        (1, [(3, 8), (7, 5)]),
        (4, [(3, 8)]),
        ({"f": 5}, [(7, 5)]),
    ],
)
def test_a_step_is_compiled_once_for_each_width_of_those_it_is_rounded_to(
    multiple_of, changes, clock
):
    schedule = flaxslim.stepwise({1: 0.2, 6: 0.5})
    found = _loop(ShrinkEvery(4, MLP, multiple_of=multiple_of), schedule, 16, clock)
    assert found == changes


def test_no_speedup_is_told_before_steps_were_seen(clock):
    shrinking = ShrinkEvery(6, MLP)
    assert shrinking.speedup is None
    assert _loop(shrinking, flaxslim.one_shot(0.5, at=2), 6, clock) == [(5, 5)]
    assert shrinking.speedup is None


def test_a_speedup_is_known_after_a_few_steps_and_stays_so(clock, caplog):
    shrinking = ShrinkEvery(6, MLP)
    with caplog.at_level(logging.INFO, logger="flaxslim"):
        _loop(shrinking, flaxslim.one_shot(0.5, at=13), 30, clock, speed=0.25)
    assert shrinking.speedup == 4.0
    went, faster = caplog.messages
    assert went.endswith("5 channels go, with 65 parameters")
    assert faster == "a step takes 250.0 ms, 4.00x as fast"


def test_a_class_that_can_say_no_smaller_width_is_refused():
    net, _, params, state = _pruned()
    (pair,) = net.spec
    spec = Spec(name="FIXED", pairs=dataclasses.replace(pair, fixed=True))
    with pytest.raises(WidthError, match=r"per_layer"):
        shrink(params, state, CFG, spec)
    with pytest.raises(WidthError, match=r"per_layer"):
        ShrinkEvery(1, spec)(params, state, CFG)


def test_it_looks_at_the_parameters_if_no_state_tells_of_channels():
    _, _, params, _ = _pruned()
    state, shrinking = optax.adam(1e-2).init(params), ShrinkEvery(1, MLP)
    params, state, cfg = shrinking(params, state, CFG)
    assert shrinking.changed
    assert state[0].mu["layers"]["0"]["down"]["kernel"].shape == (5, 6)
    shrinking(params, state, cfg)
    assert not shrinking.changed


@pytest.mark.parametrize("steps", [0, -3])
def test_it_cannot_look_every_zero_steps(steps):
    with pytest.raises(TrainingError, match="every how many steps"):
        ShrinkEvery(steps, MLP)


def test_a_layer_may_be_called_channels():
    spec = Spec(name="S", pairs=Pair(at="my_channels/channels", first="up", second="down"))
    dense = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": np.ones((3, 2))}}
    params = {"my_channels": {"channels": dense}}
    state = flaxslim.pruning(optax.sgd(0.1), spec, ONE).init(params)
    assert list(sparsity((state, {})).sites) == ["my_channels/channels/down/kernel"]
