"""`flaxslim.pruning` wherever a user would put it: in loops, wrappers, precisions, on devices.

Each place runs the same schedule on a tiny network, and each step of it is looked at: as many
channels are dead as the schedule says, every number of a dead one is exactly 0.0 and so are its
moments, all others live, and the step was traced once. What is dead where is computed here in
numpy, from the bools in the state.

What needs several devices runs in one process with eight of them: this file as a script.
"""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import older
import optax
import pytest
from fake_devices import outcomes, tell
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib
from pruning_models import NETS, Net, batches, gated, heads, mlp, stacked
from strategies import enable_x64

from flaxslim import cubic, prunable, pruning
from flaxslim._mesh import shard_map
from flaxslim._spec import Site, Spec
from flaxslim._tree import flatten, replace
from flaxslim.errors import TrainingError
from flaxslim.training._score import SCORES
from flaxslim.training._shrink import shrink

STEPS = 12
WHEN = cubic(0.0, 0.5, begin=1, end=5, every=2)
DEAD = (0.0, 0.0, 0.0, 0.4375, 0.4375, 0.5)  # what it says of the first steps; then as the last

# The parameters and the state of the optimizer after each step.
History = list[tuple[Any, Any]]
Loop = Callable[[Net, Any, Any], list[History]]


def adam() -> optax.GradientTransformation:
    return optax.adamw(1e-2, weight_decay=0.1)


def around(net: Net, inner: Any, **how: Any) -> Any:
    return pruning(inner, net.spec, WHEN, cfg=net.cfg, **how)


# --- what is looked at ------------------------------------------------------------------------


def dead_numbers(site: Site, alive: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The path of each tensor of a site, and which of its numbers belong to dead channels."""
    for tensor in site.cut:
        axis, dead = site.axis(tensor), ~alive
        if axis == site.pair.group:
            groups = range(len(site.groups))
            dead = np.stack([dead[:, site.owners == g].all(-1) for g in groups], axis=-1)
        ones = np.ones(tensor.shape)
        yield tensor.path, tensor.axes.zero(ones, axis, dead, site.second.axes.stack) == 0


def look(params: Any, state: Any, spec: Spec, cfg: Any = None) -> tuple[int, int]:
    """How many updates there were, and how many moments are zero where channels are dead."""
    leaves, own = flatten(params), flatten(state)
    head = next(path for path in own if path.endswith("/alive")).partition("channels/")[0]
    count, zeros = int(own[f"{head}count"]), 0
    living: dict[str, Any] = {}
    for site in spec.sites(params, cfg):
        alive = np.asarray(own[f"{head}channels/{site.second.path}/alive"])
        share = DEAD[min(count - 1, 5)] if count else 0.0
        expected = int(np.floor(share * site.size + 0.5))
        np.testing.assert_array_equal((~alive).sum(-1), expected, err_msg=f"update {count - 1}")
        for path, dead in dead_numbers(site, alive):
            leaf = np.asarray(leaves[path], np.float64)
            assert (leaf[dead] == 0).all(), f"{path}: a dead number is {np.abs(leaf[dead]).max()}"
            living[path] = ~dead & living.get(path, True)
            for name, x in own.items():
                follows = name.startswith(f"{head}inner_state") and name.endswith(f"/{path}")
                if follows and np.shape(x) == np.shape(leaf):
                    # Adafactor adds 1e-30 to each square.
                    assert (np.abs(np.asarray(x, np.float64)[dead]) < 1e-30).all(), name
                    zeros += 1
    for path, alive in living.items():
        assert np.asarray(leaves[path], np.float64)[alive].all(), f"{path}: the living are zero"
    return count, zeros


def check(
    net: Net, histories: list[History], *, updates: int = STEPS, moments: bool = True
) -> None:
    for history in histories:
        seen = [look(params, state, net.spec, net.cfg) for params, state in history]
        assert seen[-1][0] == updates
        assert bool(seen[-1][1]) == moments
        assert updates > 5, "the schedule has not ended"


def stepping(net: Net, tx: Any) -> Any:
    """One step on a carry of parameters and state, and the list that grows with each trace."""
    traces: list[None] = []

    def step(carry: Any, batch: Any) -> Any:
        traces.append(None)
        params, state = carry
        grads = jax.grad(net.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, traces


def unstacked(tree: Any, axis: int = 0) -> list[Any]:
    tree = jax.tree.map(np.asarray, tree)
    count = jax.tree.leaves(tree)[0].shape[axis]
    return [jax.tree.map(lambda x: np.take(x, i, axis), tree) for i in range(count)]  # noqa: B023


# --- loops ------------------------------------------------------------------------------------


def eager(net: Net, tx: Any, data: Any) -> list[History]:
    grad = jax.jit(jax.grad(net.loss))
    (params, state), history = (net.params, tx.init(net.params)), []
    for batch in zip(*data, strict=True):
        updates, state = tx.update(grad(params, batch), state, params)
        history.append(((params := optax.apply_updates(params, updates)), state))
    return [history]


def jitted(net: Net, tx: Any, data: Any, **how: Any) -> list[History]:
    step, traces = stepping(net, tx)
    step = jax.jit(step, **how)
    carry, history = (jax.tree.map(jnp.array, net.params), tx.init(net.params)), []
    for batch in zip(*data, strict=True):
        carry = step(carry, batch)
        history.append(jax.tree.map(np.asarray, carry))
    assert len(traces) == 1
    return [history]


def donated(net: Net, tx: Any, data: Any) -> list[History]:
    return jitted(net, tx, data, donate_argnums=0)


def scanned(net: Net, tx: Any, data: Any) -> list[History]:
    step, traces = stepping(net, tx)

    @jax.jit
    def run(params: Any) -> Any:
        return jax.lax.scan(lambda c, b: (step(c, b),) * 2, (params, tx.init(params)), data)[1]

    history = unstacked(run(net.params))
    assert len(traces) == 1
    return [history]


def ensemble(net: Net, tx: Any, data: Any) -> list[History]:
    """Three networks that start elsewhere, in one `vmap`."""
    step, traces = stepping(net, tx)
    params = jax.tree.map(lambda p: jnp.stack([p, p[::-1] * 0.9, p * 1.1]), net.params)
    step = jax.jit(jax.vmap(step, in_axes=(0, None)))
    carry, histories = (params, jax.vmap(tx.init)(params)), [[], [], []]
    for batch in zip(*data, strict=True):
        carry = step(carry, batch)
        for history, own in zip(histories, unstacked(carry), strict=True):
            history.append(own)
    assert len(traces) == 1
    return histories


def train_state(net: Net, tx: Any, data: Any) -> list[History]:
    state: Any = TrainState.create(apply_fn=net.fn, params=net.params, tx=tx)
    traces, history = [], []

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        traces.append(None)
        return state.apply_gradients(grads=jax.grad(net.loss)(state.params, batch))

    for batch in zip(*data, strict=True):
        state = step(state, batch)
        history.append((state.params, state.opt_state))
    assert len(traces) == 1
    return [history]


def frozen_dicts(net: Net, tx: Any, data: Any) -> list[History]:
    return jitted(Net(params=freeze(net.params), spec=net.spec, fn=net.fn, cfg=net.cfg), tx, data)


def numpy_gradients(net: Net, tx: Any, data: Any) -> list[History]:
    """As they come from another process: parameters and gradients are numpy arrays."""
    grad = jax.jit(jax.grad(net.loss))
    params = jax.tree.map(np.asarray, net.params)
    state, history = tx.init(params), []
    for batch in zip(*data, strict=True):
        grads = jax.tree.map(np.asarray, grad(params, batch))
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        history.append((params, state))
    return [history]


LOOPS: dict[str, Loop] = {
    "eager": eager,
    "jit": jitted,
    "donated": donated,
    "scan": scanned,
    "vmap": ensemble,
    "TrainState": train_state,
    "FrozenDict": frozen_dicts,
    "numpy": numpy_gradients,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_channels_die_on_schedule_exactly_to_zero_in_every_loop(loop):
    net = mlp(layers=1)
    check(net, LOOPS[loop](net, around(net, adam()), batches(STEPS)))


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(6, 10, rngs=rngs), nnx.Linear(10, 6, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(nnx.gelu(self.up(x)))


class Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = older.List([Layer(rngs), Layer(rngs)])
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


@pytest.mark.parametrize(
    "transformed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["nnx.jit", "eager"]
)
def test_an_nnx_optimizer_lets_channels_of_its_module_die(transformed):
    model, net = Stack(nnx.Rngs(0)), mlp()
    optimizer = nnx.Optimizer(model, around(net, adam()), wrt=nnx.Param)
    traces = []

    def step(model: Stack, optimizer: Any, batch: Any) -> None:
        traces.append(None)
        grads = nnx.grad(lambda m: jnp.mean((m(batch[0]) - batch[1]) ** 2))(model)
        optimizer.update(model, grads)

    run: Any = nnx.jit(step) if transformed else step
    for batch in zip(*batches(STEPS), strict=True):
        run(model, optimizer, batch)
        count, zeros = look(model, optimizer, net.spec)
    assert (count, bool(zeros)) == (STEPS, True)
    assert not transformed or len(traces) == 1


# --- wrappers ---------------------------------------------------------------------------------


def labels(net: Net) -> Any:
    return prunable(net.params, net.spec, cfg=net.cfg)


def is_(net: Net, label: str) -> Any:
    return jax.tree.map(lambda own: own == label, labels(net))


def with_rate(net: Net) -> Any:
    return optax.inject_hyperparams(lambda rate: around(net, optax.adam(rate)))(rate=1e-2)


# Each makes an optimizer for a network.
INSIDE: dict[str, Callable[[Net], Any]] = {
    "MultiSteps": lambda n: optax.MultiSteps(adam(), 2),
    "chain": lambda n: optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-1e-2)
    ),
    "apply_if_finite": lambda n: optax.apply_if_finite(adam(), 5),
    "inject_hyperparams": lambda n: optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 1e-3, 9), weight_decay=0.1
    ),
    "multi_transform": lambda n: optax.multi_transform(
        {"prunable": adam(), "rest": optax.sgd(1e-2)}, labels(n)
    ),
    "masked": lambda n: optax.masked(adam(), is_(n, "prunable")),
    "frozen": lambda n: optax.multi_transform(  # what dies may be what is not trained
        {"prunable": optax.set_to_zero(), "rest": adam()}, labels(n)
    ),
    "schedule-free": lambda n: contrib.schedule_free_adamw(1e-2, weight_decay=0.1),
    "lamb": lambda n: optax.lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda n: optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=0.9),
    "lion": lambda n: optax.lion(1e-3),
    "sgd": lambda n: optax.sgd(1e-1, momentum=0.9, nesterov=True),
    "amsgrad": lambda n: optax.amsgrad(1e-2),
    "ema": lambda n: optax.chain(optax.sgd(1e-1), optax.ema(0.9)),
}
if hasattr(contrib, "muon"):
    INSIDE["muon"] = lambda n: contrib.muon(1e-2, weight_decay=0.1)
OUTSIDE: dict[str, Callable[[Net], Any]] = {
    "MultiSteps": lambda n: optax.MultiSteps(around(n, adam()), 2),
    "chain, last": lambda n: optax.chain(
        optax.clip_by_global_norm(1.0), adam(), around(n, optax.identity())
    ),
    "chain, after clip": lambda n: optax.chain(optax.clip(1.0), around(n, adam())),
    "masked": lambda n: optax.chain(
        optax.masked(around(n, adam()), is_(n, "prunable")),
        optax.masked(optax.sgd(1e-2), is_(n, "rest")),
    ),
    "multi_transform": lambda n: optax.multi_transform(
        {"prunable": around(n, adam()), "rest": optax.sgd(1e-2)}, labels(n)
    ),
    "apply_if_finite": lambda n: optax.apply_if_finite(around(n, adam()), 5),
    "inject_hyperparams": with_rate,
}
WRAPPERS = [*(("inside", name) for name in INSIDE), *(("outside", name) for name in OUTSIDE)]
IDS = [" ".join(own) for own in WRAPPERS]

# What is much like another, or has a test of its own, is looked at only in long runs.
ALIKE = {
    *(("inside", name) for name in ("lion", "sgd", "amsgrad", "ema", "frozen", "masked")),
    *(("outside", name) for name in ("chain, after clip", "inject_hyperparams")),
    *((side, "apply_if_finite") for side in ("inside", "outside")),
}
QUICK = [own for own in WRAPPERS if own not in ALIKE]


def check_wrapped(net: Net, side: str, name: str) -> None:
    tx = around(net, INSIDE[name](net)) if side == "inside" else OUTSIDE[name](net)
    every = 2 if (side, name) == ("outside", "MultiSteps") else 1
    moments = (side, name) not in [("inside", "frozen"), ("outside", "chain, last")]
    histories = jitted(net, tx, batches(STEPS))
    check(net, histories, updates=STEPS // every, moments=moments)


@pytest.mark.parametrize(("side", "name"), QUICK, ids=map(" ".join, QUICK))
def test_channels_die_on_schedule_around_and_inside_of_every_wrapper(side, name):
    check_wrapped(mlp(layers=1), side, name)


@pytest.mark.long
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("side", "name"), WRAPPERS, ids=map(" ".join, WRAPPERS))
def test_every_wrapper_prunes_every_network(net, side, name):
    check_wrapped(NETS[net](), side, name)


@pytest.mark.long
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_prunes_every_network(net, loop):
    own = NETS[net]()
    check(own, LOOPS[loop](own, around(own, adam()), batches(STEPS)))


@pytest.mark.parametrize(("side", "updates"), [("inside", STEPS), ("outside", STEPS - 2)])
def test_gradients_that_are_not_finite_revive_nothing_under_apply_if_finite(side, updates):
    net, (x, y) = mlp(layers=1), batches(STEPS)
    x = x.at[jnp.array([4, 8])].set(jnp.nan)
    tx = around(net, INSIDE["apply_if_finite"](net))
    tx = tx if side == "inside" else OUTSIDE["apply_if_finite"](net)
    check(net, jitted(net, tx, (x, y)), updates=updates)


def test_lookahead_inside_is_refused_by_the_name_of_what_has_no_gradient():
    net = mlp(layers=1)
    params = optax.LookaheadParams.init_synced(net.params)
    tx = around(net, optax.lookahead(optax.sgd(0.1), 3, 0.5))
    with pytest.raises(TrainingError, match="has no gradient") as caught:
        tx.update(net.params, tx.init(params), params)
    assert caught.value.path == "fast/layers/0/up/kernel"


def test_an_average_of_the_parameters_beside_fades_where_channels_are_dead_and_shrinks_along():
    net, average = mlp(layers=1), mlp(layers=1).params
    [history] = jitted(net, around(net, adam()), batches(STEPS))
    means = [average := optax.incremental_update(p, average, 0.5) for p, _ in history]
    params, state = history[-1]
    [site] = net.spec.sites(params)
    alive = np.asarray(state.channels["layers"]["0"]["down"]["kernel"]["alive"])
    for path, dead in dead_numbers(site, alive):
        early, late = (np.asarray(flatten(mean)[path])[dead] for mean in means[-2:])
        np.testing.assert_allclose(late, early / 2, rtol=1e-6)
    with pytest.warns(UserWarning, match="5 channels that the plan cuts are alive in 1"):
        small, (_, mean), cfg = shrink(params, (state, average), {"hidden": 10}, net.spec)
    assert cfg == {"hidden": 5}
    for new, like in zip(jax.tree.leaves(mean), jax.tree.leaves(small), strict=True):
        assert new.shape == like.shape


# --- precisions -------------------------------------------------------------------------------

PRECISIONS: list[tuple[str, str, str]] = [
    ("bfloat16", "float32", "magnitude"),
    ("float32", "bfloat16", "magnitude"),
    ("float16", "float16", "taylor"),
    ("float64", "float64", "magnitude"),
    ("float64", "float32", "snip_momentum"),
]


@pytest.mark.parametrize(("own", "of_gradients", "score"), PRECISIONS)
def test_dead_is_exactly_zero_whatever_the_precisions(own, of_gradients, score):
    with enable_x64():
        net = mlp(layers=1)
        params = jax.tree.map(lambda p: p.astype(own), net.params)
        # Of most optimizers mixed types change those of the moments in the first step.
        sgd = optax.sgd(0.1, momentum=0.9, accumulator_dtype="float32")
        tx, traces = around(net, sgd, score=score), []

        @jax.jit
        def step(carry: Any, batch: Any) -> Any:
            traces.append(None)
            params, state = carry
            grads = jax.grad(net.loss)(params, batch)
            grads = jax.tree.map(lambda g: g.astype(of_gradients), grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        carry, history = (params, tx.init(params)), []
        for batch in zip(*batches(STEPS), strict=True):
            history.append(carry := step(carry, batch))
        check(net, [history])
        assert {leaf.dtype.name for leaf in jax.tree.leaves(carry[0])} == {own}
        assert len(traces) == 1


# --- what a step costs ------------------------------------------------------------------------


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            yield getattr(value, "jaxpr", value)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")


def equations(jaxpr: Any, *, conds: bool = True) -> Iterator[Any]:
    """All equations, those of inner functions too; of the branches of a cond if asked."""
    for equation in jaxpr.eqns:
        yield equation
        if conds or equation.primitive.name != "cond":
            for inner in inner_jaxprs(equation):
                yield from equations(inner, conds=conds)


def sorts(jaxpr: Any, **how: Any) -> bool:
    return any(own.primitive.name == "sort" for own in equations(jaxpr, **how))


def reads(jaxpr: Any, size: int) -> bool:
    """Whether it looks at, or hands on, an array of so many numbers."""
    used = [v for own in equations(jaxpr) for v in own.invars] + list(jaxpr.outvars)
    return any(np.prod(v.aval.shape, dtype=int) >= size for v in used)


@pytest.mark.parametrize("allocation", ["site", "global"])
@pytest.mark.parametrize("score", [name for name, own in SCORES.items() if not own.adds_up])
def test_the_steps_between_sort_nothing_and_read_no_kernel_for_a_score(score, allocation):
    net = mlp()
    tx = around(net, adam(), score=score, allocation=allocation)
    jaxpr = jax.make_jaxpr(tx.update)(net.params, tx.init(net.params), net.params).jaxpr
    assert not sorts(jaxpr, conds=False)
    conds = [own for own in equations(jaxpr, conds=False) if own.primitive.name == "cond"]
    [decides] = [own for own in conds if any(map(sorts, inner_jaxprs(own)))]
    off, on = inner_jaxprs(decides)
    assert not sorts(off)
    assert sorts(on)
    assert not reads(off, 6 * 10)
    assert reads(on, 6 * 10) == (score != "random")


@pytest.mark.parametrize("how", [{}, {"lock": True}, {"fade": 2}])
def test_the_state_is_known_by_its_shapes_alone(how):
    net = mlp()
    tx = around(net, adam(), **how)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), net.params)
    found = jax.eval_shape(tx.init, shapes)
    made = jax.eval_shape(lambda state: state, tx.init(net.params))
    assert found == made


# --- several devices --------------------------------------------------------------------------


def on_two_devices(net: Net, tx: Any, data: Any) -> list[History]:
    """`pmap` with gradients that are the mean over devices."""
    traces = []

    def step(carry: Any, batch: Any) -> Any:
        traces.append(None)
        params, state = carry
        grads = jax.lax.pmean(jax.grad(net.loss)(params, batch), "devices")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.pmap(step, axis_name="devices", devices=jax.devices()[:2])
    x, y = (part.reshape(STEPS, 2, -1, part.shape[-1]) for part in data)
    carry = jax.tree.map(lambda p: jnp.stack([p, p]), (net.params, tx.init(net.params)))
    histories: list[History] = [[], []]
    for batch in zip(x, y, strict=True):
        carry = run(carry, batch)
        for history, own in zip(histories, unstacked(carry), strict=True):
            history.append(own)
    assert len(traces) <= 2  # of any optimizer: the second once the carry lies on both devices
    return histories


def mesh_of(*shape: int, explicit: bool = False) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(devices, ("x", "y")[: len(shape)], axis_types=(kind,) * len(shape))


def mapped_over_shards(net: Net, tx: Any, data: Any) -> list[History]:
    """`shard_map` over batches, with gradients that are the mean over shards."""
    traces = []
    mesh = mesh_of(4)

    @jax.jit
    @functools.partial(shard_map, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    def step(carry: Any, batch: Any) -> Any:
        traces.append(None)
        params, state = carry
        grads = jax.grad(lambda p: jax.lax.pmean(net.loss(p, batch), "x"))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry, history = (net.params, tx.init(net.params)), []
    carry = jax.device_put(carry, NamedSharding(mesh, P()))
    for batch in zip(*data, strict=True):
        history.append(carry := step(carry, batch))
    assert len(traces) == 1
    return [history]


def shardings_of(net: Net, mesh: Mesh, where: dict[str, Any]) -> dict[str, NamedSharding]:
    """The sharding of each parameter, from the axes of the mesh for those of the patterns."""
    found = {path: NamedSharding(mesh, P()) for path in flatten(net.params)}
    for site in net.spec.sites(net.params, net.cfg):
        for tensor in site.cut:
            names: list[Any] = [None] * len(tensor.shape)
            for axis, over in where.items():
                if axis in tensor.axes.names:
                    names[tensor.axes.dimension(axis)] = over
            found[tensor.path] = NamedSharding(mesh, P(*names))
    return found


def put(tree: Any, shardings: dict[str, NamedSharding]) -> Any:
    return replace(tree, {p: jax.device_put(x, shardings[p]) for p, x in flatten(tree).items()})


_COLLECTIVE = re.compile(
    r"= (\S.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def collectives(text: str) -> list[tuple[str, int]]:
    """The collectives of a compiled program, and how many numbers each of them results in."""
    told = []
    for shapes, kind in _COLLECTIVE.findall(text):
        arrays = [shape.split(",") for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        told.append((kind, sum(math.prod(int(n) for n in shape if n) for shape in arrays)))
    return told


def sharded(net: Net, mesh: Mesh, where: dict[str, Any], **how: Any) -> list[tuple[str, int]]:
    """Eight devices do what one does; returns what they had to tell each other."""
    shardings = shardings_of(net, mesh, where)
    tx, traces = around(net, adam(), **how), []

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape), net.params) for _ in range(7)]
    grads = jax.tree.map(np.float32, grads)
    one, params = (net.params, tx.init(net.params)), put(net.params, shardings)
    for own in grads:
        one = step(one[0], one[1], own)
    with older.set_mesh(mesh):
        # After the first step the state lies where it will lie.
        many: Any = step(params, tx.init(params), put(grads[0], shardings))
        compiled: Any = step.lower(many[0], many[1], put(grads[0], shardings)).compile()
        for own in grads[1:]:
            many = compiled(*many, put(own, shardings))
    if not {"regrow", "allocation"} & {*how}:
        look(many[0], many[1], net.spec, net.cfg)
    theirs = flatten(one)
    for path, leaf in flatten(many).items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-5, atol=1e-6, err_msg=path)
        for name, sharding in shardings.items():
            if path.endswith(f"/{name}"):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (path, leaf.sharding)
    assert len(traces) == 2 or callable(how.get("score"))
    return collectives(compiled.as_text() or "")


def check_sharded(net: Net, where: dict[str, Any], *, explicit: bool = False, **how: Any) -> None:
    """A number for each channel of each tensor may go around, which is less than any weight."""
    sites = net.spec.sites(net.params, net.cfg)
    rows = sum(site.rows * site.size * len(site.cut) for site in sites)
    assert rows < min(np.prod(t.shape) for site in sites for t in (*site.first, *site.reading))
    told = sharded(net, mesh_of(2, 4, explicit=explicit), where, **how)
    assert max(size for _, size in told) <= rows, f"{told} of more than {rows} numbers"
    assert any(size > 1 for _, size in told)


def check_control() -> None:
    """A score that wants a whole kernel on each device is seen to gather it."""
    net, mesh = WIDE["mlp"](), mesh_of(2, 4)

    def score(params: Any, grads: Any, state: Any) -> Any:
        kernel = jax.lax.with_sharding_constraint(params.second[0], NamedSharding(mesh, P()))
        return jnp.sort(kernel, axis=-1)[..., 0] + state

    told = sharded(net, mesh, {"d": "y"}, score=score)
    assert max(size for _, size in told) >= 8 * 32, told


WIDE: dict[str, Callable[[], Net]] = {
    "mlp": lambda: mlp(layers=1, d=8, f=32),
    "gated": lambda: gated(d=8, f=32),
    "stacked": lambda: stacked(layers=2, d=8, f=32),
    "heads": lambda: heads(d=32, h=8, g=4, k=2),
}
SHARDED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mlp", {"f": "y"}, {}),
    ("mlp", {"d": "y"}, {"score": "snip_momentum"}),
    ("heads", {"h": "y", "g": "y", "d": "x"}, {}),
    # On a mesh with explicit axes, as `jax.make_mesh` makes it by default.
    ("mlp", {"f": "y", "d": "x"}, {"explicit": True}),
]
SHARDED_LONG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (net, where, {"explicit": explicit, **how})
    for explicit in (False, True)
    for net, where, how in [
        ("mlp", {"f": "y", "d": "x"}, {"score": "snip_momentum", "fade": 2}),
        ("mlp", {"f": ("x", "y")}, {"allocation": "global"}),
        ("mlp", {"f": "y", "d": "x"}, {"regrow": 0.3}),
        ("gated", {"f": "y", "d": "x"}, {"score": "taylor"}),
        ("stacked", {"l": "x", "f": "y"}, {"fade": 2}),
        ("stacked", {"f": "y", "d": "x"}, {"score": "snip_momentum"}),
        ("heads", {"d": "y"}, {"score": "snip"}),
        ("heads", {"h": "y", "g": "y"}, {}),
        ("heads", {"h": "y", "g": "y", "d": "x"}, {"allocation": "global"}),
    ]
]


def run_sharded(net: str, where: dict[str, Any], how: dict[str, Any]) -> None:
    check_sharded(WIDE[net](), where, **how)


def run_loop(loop: Loop) -> None:
    net = mlp(layers=1)
    check(net, loop(net, around(net, adam()), batches(STEPS)))


def named(rows: list[Any]) -> dict[str, Callable[[], None]]:
    rows = [row for row in rows if older.EXPLICIT or not row[-1].get("explicit")]
    return {" ".join(map(str, row)): functools.partial(run_sharded, *row) for row in rows}


ON_DEVICES: dict[str, Callable[[], None]] = {
    "pmap": lambda: run_loop(on_two_devices),
    "shard_map": lambda: run_loop(mapped_over_shards),
    "a gather is seen": check_control,
    **named(SHARDED),
}
ON_DEVICES_LONG = named(SHARDED_LONG)


def in_a_process_with_eight_devices(*which: str) -> dict[str, str]:
    return outcomes(__file__, *which, JAX_DISABLE_MOST_OPTIMIZATIONS="0")


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    return in_a_process_with_eight_devices()


@pytest.fixture(scope="module")
def said_long() -> dict[str, str]:
    return in_a_process_with_eight_devices("long")


@pytest.mark.parametrize("place", ON_DEVICES)
def test_eight_devices_prune_as_one_does_and_gather_no_weight(place, said):
    assert not said[place], said[place]


@pytest.mark.long
@pytest.mark.parametrize("place", ON_DEVICES_LONG)
def test_eight_devices_prune_as_one_does_in_every_way(place, said_long):
    assert not said_long[place], said_long[place]


if __name__ == "__main__":
    tell(ON_DEVICES_LONG if sys.argv[1:] else ON_DEVICES)
