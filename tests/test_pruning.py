"""`flaxslim.pruning`: who dies, when, by which score, and what of the model is zero then."""

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_models import NETS, Net, batches, heads, mlp
from strategies import TIED

import flaxslim
from flaxslim import Pair, Spec
from flaxslim._tree import flatten
from flaxslim.errors import NothingMatchedError, TrainingError
from flaxslim.training._allocation import Allocation, Member, choose, regrown
from flaxslim.training._channels import masks
from flaxslim.training._schedule import as_schedule
from flaxslim.training._score import SCORES, Evidence
from flaxslim.training._state import by_site

STEPS = 20
SCHEDULES = {
    "one shot": flaxslim.one_shot(0.5, at=4),
    "linear": flaxslim.linear(0.0, 0.5, begin=2, end=12, every=2),
    "cubic": flaxslim.cubic(0.1, 0.6, begin=1, end=15, every=4),
    "exponential": flaxslim.exponential(0.0, 0.7, begin=0, end=10, every=5),
    "stepwise": flaxslim.stepwise({3: 0.2, 9: 0.5}),
    "optax": optax.linear_schedule(0.0, 0.4, 10),
    "optax, each third step": flaxslim.scheduled(optax.linear_schedule(0.0, 0.5, 9), every=3),
}
OPTIMIZERS = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-3),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2),
}
# All of them in a long run; otherwise schedules and optimizers take turns, one for each score.
TURNS = {(score, list(SCHEDULES)[i % 7], list(OPTIMIZERS)[i % 6]) for i, score in enumerate(SCORES)}
ALL = [
    pytest.param(*own, marks=() if own in TURNS else pytest.mark.long)
    for own in itertools.product(SCORES, SCHEDULES, OPTIMIZERS)
]


def applied(params: Any, updates: Any) -> Any:
    return optax.apply_updates(params, updates)


def train(net: Net, tx: Any, count: int = STEPS, **extra: Any) -> tuple[Any, Any, list[Any]]:
    """The last parameters and state, and the sites' channels after each step: one program."""
    data = batches(count)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(params: Any, state: Any) -> Any:
        def body(carry: Any, batch: Any) -> Any:
            params, state = carry
            grads = jax.grad(net.loss)(params, batch)
            updates, state = tx.update(grads, state, params, **extra)
            params = applied(params, updates)
            return (params, state), (params, state)

        return jax.lax.scan(body, (params, state), data)

    chex.clear_trace_counter()
    (params, state), (every_params, states) = run(net.params, tx.init(net.params))
    sites = net.spec.sites(net.params, net.cfg)
    history = []
    for step in range(count):
        own = jax.tree.map(lambda x, step=step: np.asarray(x[step]), (every_params, states))
        channels = by_site(own[1].channels)
        _check_zero(sites, channels, *own)
        history.append(channels)
    return params, state, history


def _check_zero(sites: Any, channels: Any, params: Any, state: Any) -> None:
    """All numbers of dead channels are exactly zero, and so are their moments."""
    leaves, moments = flatten(params), flatten(state.inner_state)
    alive = {path: own["alive"] for path, own in channels.items()}
    for path, mask in masks(sites, alive).items():
        dead = np.broadcast_to(~np.asarray(mask), leaves[path].shape)
        assert (leaves[path][dead] == 0).all(), path
        for name, leaf in moments.items():
            if name.endswith(f"/{path}") and leaf.shape == leaves[path].shape:
                assert (leaf[dead] == 0).all(), name


def activations(net: Net) -> Any:
    rng = np.random.default_rng(7)
    return {
        site.second.path: rng.uniform(0.1, 1.0, (site.rows, site.size)).astype(np.float32)
        for site in net.spec.sites(net.params, net.cfg)
    }


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "schedule", "optimizer"), ALL)
def test_sparsity_is_as_scheduled_and_what_is_dead_is_zero(score, schedule, optimizer):
    net = mlp(layers=1)
    tx: Any = flaxslim.pruning(OPTIMIZERS[optimizer], net.spec, SCHEDULES[schedule], score)
    extra = {"activations": activations(net)} if score in ("activation", "wanda") else {}
    _, state, history = train(net, tx, **extra)
    expected, before = 0, np.zeros((1, 10), bool)
    plan = as_schedule(SCHEDULES[schedule])
    for step, channels in enumerate(history):
        if bool(plan.is_due(step)):
            expected = int(np.floor(float(plan(step)) * 10 + 0.5))
        (own,) = channels.values()
        assert (~own["alive"]).sum() == expected, step
        assert not (before & own["alive"]).any()  # none is revived
        before = ~own["alive"]
    assert expected > 0
    assert flaxslim.sparsity(state).total == expected / 10


# All of them in a long run; otherwise two kinds of each network, and two networks of each kind.
KINDS = ("global", "fade", "regrow", "lock")
PAIRS = [
    pytest.param(name, kind, marks=() if (i - j) % 4 < 2 else pytest.mark.long)
    for i, name in enumerate(NETS)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_is_dead_can_be_cut_exactly_in_every_layout(name, kind):
    net, data = NETS[name](), batches(1)
    options: dict[str, Any] = {
        "global": {"allocation": "global", "min_width": 2},
        "fade": {"fade": 2},
        "regrow": {"regrow": 0.4},
        "lock": {"lock": True},
    }[kind]
    tx: Any = flaxslim.pruning(
        optax.adam(1e-2),
        net.spec,
        flaxslim.cubic(0.0, 0.5, begin=2, end=12, every=5),
        "snip",
        cfg=net.cfg,
        **options,
    )
    params, state, _ = (_train_freely if kind == "regrow" else train)(net, tx)
    known = flaxslim.sparsity(state)
    assert known.total == pytest.approx(0.5)
    plan = flaxslim.plan(params, net.cfg, net.spec, width="per_layer")
    for cut in plan.cuts:
        assert cut.dead == known.sites[cut.site.second.path].dead
    small = flaxslim.apply(plan, params)
    x = data[0][0]
    if name != "heads" or len(set(plan.cuts[0].groups)) == 1:
        np.testing.assert_allclose(net.fn(small, x), net.fn(params, x), rtol=1e-4, atol=1e-5)


def _train_freely(net: Net, tx: Any) -> tuple[Any, Any, None]:
    """As `train`, where only what reads dead channels must be zero."""
    params, state = net.params, tx.init(net.params)
    step = jax.jit(lambda p, s, b: tx.update(jax.grad(net.loss)(p, b), s, p))
    x, y = batches(STEPS)
    for batch in zip(x, y, strict=True):
        updates, state = step(params, state, batch)
        params = applied(params, updates)
        for site in net.spec.sites(net.params, net.cfg):
            alive = by_site(state.channels)[site.second.path]["alive"]
            mask = masks([site], {site.second.path: alive}, lambda s: s.reading)
            for path, living in mask.items():
                leaf = np.asarray(flatten(params)[path])
                assert (leaf[np.broadcast_to(~np.asarray(living), leaf.shape)] == 0).all()
    return params, state, None


# --- scores -----------------------------------------------------------------------------------


def _by_hand(score: str, w: np.ndarray, g: np.ndarray, first: np.ndarray, second: np.ndarray):
    """The formula of a score after one step, from all numbers (n,) of one channel."""
    return {
        "magnitude_l1": np.abs(w).sum(),
        "magnitude": np.sqrt((w**2).sum()),
        "magnitude_product": np.sqrt((first**2).sum()) * np.sqrt((second**2).sum()),
        "snip": np.abs(w * g).sum(),
        "snip_momentum": 0.9 * np.abs(w * g).sum(),
        "gradient_weight": abs((w * g).sum()),
        "taylor": (w * g).sum() ** 2,
        "fisher": ((w * g) ** 2).sum() / 2,
        "movement": -(w * g).sum(),
    }[score]


def _numbers(name: str, net: Net, tree: Any, channel: int, row: int) -> dict[str, np.ndarray]:
    """What belongs to a channel, written out for each network."""
    p = jax.tree.map(np.asarray, tree)
    if name == "mlp":
        own = p["layers"]["0"]
        up, down = own["up"], own["down"]["kernel"][channel]
        return {"first": np.append(up["kernel"][:, channel], up["bias"][channel]), "second": down}
    if name == "gated":
        m = p["mlp"]
        first = np.append(m["gate"]["kernel"][:, channel], m["up"]["kernel"][:, channel])
        return {"first": first, "second": m["down"]["kernel"][channel]}
    if name == "stacked":
        first = np.append(p["up"]["kernel"][row, :, channel], p["up"]["bias"][row, channel])
        return {"first": first, "second": p["down"]["kernel"][row, channel]}
    group = channel // 2  # six heads of two columns on three groups
    q, k, v = (p[n]["kernel"] for n in "qkv")
    own, shared = slice(2 * channel, 2 * channel + 2), slice(2 * group, 2 * group + 2)
    return {
        "first": v[:, shared].ravel(),
        "second": p["o"]["kernel"][own].ravel(),
        "also": np.append(q[:, own], k[:, shared]),
    }


BY_FORMULA = [s for s in SCORES if s not in ("random", "activation", "wanda")]


@pytest.mark.parametrize("name", NETS)
def test_scores_are_what_their_formulas_say(name):
    net = NETS[name]()
    (site, *_) = net.spec.sites(net.params, net.cfg)

    @jax.jit
    def scored(params: Any, batch: Any) -> Any:
        grads = jax.grad(net.loss)(params, batch)
        evidence = Evidence(
            site=site,
            params=flatten(params),
            grads=flatten(grads),
            state=jnp.zeros((site.rows, site.size)),
            activations={},
            seed=0,
        )
        return grads, {score: SCORES[score].rows(evidence) for score in BY_FORMULA}

    grads, found = scored(net.params, jax.tree.map(lambda x: x[0], batches(1)))
    for row, channel in itertools.product(range(site.rows), (0, 3, 5)):
        w, g = (_numbers(name, net, tree, channel, row) for tree in (net.params, grads))
        whole = [np.concatenate([x.ravel() for x in t.values()]) for t in (w, g)]
        for score, rows in found.items():
            value = _by_hand(score, whole[0], whole[1], w["first"], w["second"])
            np.testing.assert_allclose(rows[row, channel], value, rtol=2e-4, err_msg=score)


def test_sums_over_steps_are_what_their_formulas_say():
    net = mlp(layers=1)
    grads = [
        jax.grad(net.loss)(net.params, jax.tree.map(lambda x, i=i: x[i], batches(3)))
        for i in range(3)
    ]
    w = _numbers("mlp", net, net.params, 4, 0)
    w = np.concatenate(list(w.values()))
    steps = [w * np.concatenate(list(_numbers("mlp", net, g, 4, 0).values())) for g in grads]
    expected = {
        "snip_momentum": sum(0.9 * np.abs(s).sum() for s in steps),
        "taylor": sum(s.sum() ** 2 for s in steps),
        "fisher": sum((s**2).sum() / 2 for s in steps),
        "movement": -sum(s.sum() for s in steps),
    }
    for score, value in expected.items():
        tx: Any = flaxslim.pruning(optax.sgd(0.0), net.spec, flaxslim.one_shot(0.5, at=9), score)
        state = tx.init(net.params)
        for g in grads:
            _, state = tx.update(g, state, net.params)
        (own,) = by_site(state.channels).values()
        np.testing.assert_allclose(own["score"][0, 4], value, rtol=1e-4, err_msg=score)


def test_random_scores_are_those_of_the_seed_and_differ_among_sites():
    net = mlp(layers=2)

    def who(seed: int) -> list[Any]:
        tx: Any = flaxslim.pruning(
            optax.sgd(0.0), net.spec, flaxslim.one_shot(0.5), "random", seed=seed
        )
        _, state = tx.update(net.params, tx.init(net.params), net.params)
        return [own["alive"].tolist() for own in by_site(state.channels).values()]

    assert who(0) == who(0) != who(1)
    assert who(0)[0] != who(0)[1]


def test_activations_decide_where_they_are_the_score():
    net = mlp(layers=1)
    (path,) = (site.second.path for site in net.spec.sites(net.params))
    quiet = {path: np.where(np.arange(10) % 2, 1.0, 0.01)}
    for score in ("activation", "wanda"):
        tx: Any = flaxslim.pruning(optax.sgd(0.0), net.spec, flaxslim.one_shot(0.5), score)
        _, state = tx.update(net.params, tx.init(net.params), net.params, activations=quiet)
        (own,) = by_site(state.channels).values()
        assert own["alive"][0].tolist() == [bool(j % 2) for j in range(10)]


def test_a_score_of_the_users_own_sees_each_channel_and_what_it_said_before():
    net = heads()
    seen: list[Any] = []

    def mine(params: Any, grads: Any, state: Any) -> Any:
        seen.append(jax.tree.map(jnp.shape, (params, grads, state)))
        return state + jnp.abs(params.second[0] * grads.second[0]).sum(-1) + jnp.arange(6.0)

    tx: Any = flaxslim.pruning(
        optax.sgd(0.0), net.spec, flaxslim.one_shot(0.5, at=1), mine, cfg=net.cfg
    )
    state = tx.init(net.params)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, net.params), state, net.params)
    params, grads, rows = seen[0]
    assert params == grads == (((1, 6, 12),), (), ((1, 6, 12),), ((1, 6, 12), (1, 6, 12)))
    assert rows == (1, 6)
    (own,) = by_site(state.channels).values()
    assert own["score"].tolist() == [[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]]
    assert own["alive"].tolist() == [[False] * 3 + [True] * 3]


# --- allocation -------------------------------------------------------------------------------


def _member(scores: list[float], gone: int = 0, alive: Any = None, path: str = "a") -> Member:
    rows = jnp.asarray([scores], jnp.float32)
    living = jnp.ones(rows.shape, bool) if alive is None else jnp.asarray([alive])
    return Member(paths=(path,), axis="f", score=rows, alive=living, gone=jnp.asarray(gone))


numbers = st.sampled_from([0.0, 1.0, 2.0, 0.5, -3.0, float("nan"), float("inf"), 1e-30, 7.0])


# Of few sizes, since each is compiled.
channels = st.lists(st.tuples(numbers, st.booleans()), min_size=8, max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    sites=st.lists(channels, min_size=1, max_size=2),
    gone=st.integers(0, 4),
    share=st.floats(0.0, 1.0, width=32),
    floor=st.integers(0, 3),
    cap=st.sampled_from([1.0, 0.5, 0.75]),
    among_all=st.booleans(),
)
def test_no_allocation_breaks_its_word(sites, gone, share, floor, cap, among_all):
    own = [
        _member([s for s, _ in site], gone, [a for _, a in site], path=str(i))
        for i, site in enumerate(sites)
    ]
    how = Allocation(among_all=among_all, min_width=floor, max_sparsity=cap)
    after = choose(own, {"f": share}, how)
    whole = sum(len(site) + gone for site in sites)
    died = 0
    for m in own:
        before, now = np.asarray(m.alive[0]), np.asarray(after[m.paths[0]][0])
        score = np.asarray(m.score[0])
        killed = before & ~now
        died += int((~now).sum())
        assert not (now & ~before).any()  # none is revived
        assert not (killed & ~np.isfinite(score)).any()  # none dies on NaN
        least = min(max(floor, int(np.ceil((1 - cap) * (len(before) + gone) - 1e-4))), len(before))
        assert now.sum() >= min(least, before.sum())
        if killed.any() and (now & np.isfinite(score)).any():  # the smallest die
            assert score[killed].max() <= score[now & np.isfinite(score)].min()
        if not among_all:
            wanted = int(np.floor(share * (len(before) + gone) + 0.5 + 1e-4)) - gone
            assert (~now).sum() <= max(wanted, (~before).sum())
    if among_all:
        wanted = int(np.floor(np.float32(share) * whole + 0.5 + 1e-4))
        old = sum(int((~np.asarray(m.alive)).sum()) for m in own)
        assert died + gone * len(own) <= max(wanted, old + gone * len(own))


def test_among_all_the_smallest_scores_die_wherever_they_are():
    own = [_member([1, 2, 3, 4], path="a"), _member([0.1, 0.2, 0.3, 9], path="b")]
    after = choose(own, {"f": 0.5}, Allocation(among_all=True, min_width=1))
    assert after["a"].tolist() == [[False, True, True, True]]
    assert after["b"].tolist() == [[False, False, False, True]]
    capped = choose(own, {"f": 0.5}, Allocation(among_all=True, max_sparsity=0.5))
    assert capped["a"].tolist() == capped["b"].tolist() == [[False, False, True, True]]


def test_tied_sites_count_each_and_lose_the_same():
    tied = Member(
        paths=("a", "b"),
        axis="h",
        score=jnp.asarray([[1.0, 5.0]]),
        alive=jnp.ones((1, 2), bool),
        gone=jnp.asarray(0),
    )
    after = choose([tied], {"h": 0.5}, Allocation(among_all=True, min_width=0))
    assert after["a"].tolist() == after["b"].tolist() == [[False, True]]


def test_the_weakest_give_way_to_the_largest_gradients():
    m = _member([5.0, 1.0, 4.0, 0, 0, 0], alive=[True, True, True, False, False, False])
    growth = jnp.asarray([[0.0, 0.0, 0.0, 1.0, 3.0, 2.0]])
    assert regrown(m, m.alive, growth, 1 / 3).tolist() == [[True, False, True, False, True, False]]
    assert regrown(m, m.alive, growth, 0.0).tolist() == m.alive.tolist()


def test_regrowth_revives_some_and_keeps_their_number():
    net = mlp(layers=1)
    schedule = flaxslim.linear(0.5, 0.5, begin=0, end=16, every=4)
    tx: Any = flaxslim.pruning(optax.adam(3e-2), net.spec, schedule, regrow=0.6)
    params, state, sets = net.params, tx.init(net.params), []
    x, y = batches(STEPS)
    for batch in zip(x, y, strict=True):
        updates, state = tx.update(jax.grad(net.loss)(params, batch), state, params)
        params = applied(params, updates)
        (own,) = by_site(state.channels).values()
        sets.append(frozenset(np.flatnonzero(own["alive"][0]).tolist()))
    assert {len(alive) for alive in sets} == {5}
    assert len(set(sets)) > 1
    assert len(set(sets[16:])) == 1  # by the end of the schedule none gives way any more
    firsts = np.asarray(params["layers"]["0"]["up"]["kernel"])
    assert (firsts != 0).all()  # what writes a dead channel is kept


def test_what_living_heads_share_does_not_fade():
    net = heads()
    one = lambda p, g, s: jnp.arange(6.0)[None] + 1  # noqa: E731  the first head dies
    schedule = flaxslim.one_shot(1 / 6, at=0)
    tx: Any = flaxslim.pruning(optax.sgd(0.0), net.spec, schedule, one, cfg=net.cfg, fade=4)
    params, state = net.params, tx.init(net.params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = tx.update(zero, state, params)
        params = applied(params, updates)
    for name in ("k", "v"):
        np.testing.assert_array_equal(params[name]["kernel"], net.params[name]["kernel"])
    faded = np.asarray(params["o"]["kernel"][:2] / net.params["o"]["kernel"][:2])
    np.testing.assert_allclose(faded, 0.25, rtol=1e-5)


@pytest.mark.parametrize("ramp", ["linear", "cubic", "exponential"])
def test_a_schedule_that_ends_where_it_begins_is_one_shot(ramp):
    schedule = getattr(flaxslim, ramp)(0.0, 0.5, begin=2, end=2)
    assert [bool(schedule.is_due(step)) for step in (1, 2, 3)] == [False, True, False]
    assert [float(schedule(step)) for step in (1, 2, 3)] == [0.0, 0.5, 0.5]


def test_tied_sites_share_a_table_as_long_as_one_of_them_uses_it():
    blocks: Any = {
        i: {"v": {"kernel": jnp.ones((4, 6))}, "o": {"kernel": jnp.ones((6, 4))}} for i in "01"
    }
    blocks["0"]["bias"] = {"embedding": jnp.ones((5, 3))}
    for name, head in (("0", 0), ("1", 2)):  # one head is dead in each, another one
        rows = slice(2 * head, 2 * head + 2)
        blocks[name]["o"]["kernel"] = blocks[name]["o"]["kernel"].at[rows].set(0.0)
    params, cfg = {"block": blocks}, {"heads": 3, "size": 2}
    assert len({site.tied for site in TIED.sites(params, cfg)}) == 1
    mask = flaxslim.channel_mask(params, TIED, cfg=cfg)
    assert mask["block"]["0"]["bias"]["embedding"].all()
    tx: Any = flaxslim.pruning(
        optax.sgd(0.0), TIED, flaxslim.one_shot(1 / 3, at=1), cfg=cfg, lock=True
    )
    state, zero = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = tx.update(zero, state, params)
        params = applied(params, updates)
    # Head 2, of which the table is the most, goes in both; what was locked stays so, in its block.
    alive = [own["alive"][0].tolist() for own in by_site(state.channels).values()]
    assert alive == [[False, True, False], [True, True, False]]
    table = np.asarray(params["block"]["0"]["bias"]["embedding"])
    assert (table == [1.0, 1.0, 0.0]).all()


# --- fading, locking --------------------------------------------------------------------------


def test_what_is_doomed_fades_in_equal_parts():
    net = mlp(layers=1)
    tx: Any = flaxslim.pruning(
        optax.sgd(0.0), net.spec, flaxslim.one_shot(0.3, at=1), "magnitude", fade=4
    )
    params, state, parts = net.params, tx.init(net.params), []
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(7):
        updates, state = tx.update(zero, state, params)
        params = applied(params, updates)
        parts.append(params["layers"]["0"]["down"]["kernel"])
    (own,) = by_site(state.channels).values()
    doomed = ~np.asarray(own["alive"][0])
    whole = np.asarray(net.params["layers"]["0"]["down"]["kernel"])
    for part, left in zip(parts, (1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0), strict=True):
        np.testing.assert_allclose(part[doomed], left * whole[doomed], rtol=1e-5)
        np.testing.assert_array_equal(part[~doomed], whole[~doomed])


@pytest.mark.parametrize("how", ["lock", "chain"])
def test_what_was_dead_at_the_start_stays_dead(how):
    net = mlp(layers=2)
    kernel = net.params["layers"]["1"]["down"]["kernel"]
    net.params["layers"]["1"]["down"]["kernel"] = kernel.at[jnp.array([2, 5])].set(0.0)
    if how == "lock":
        tx: Any = flaxslim.pruning(optax.adamw(1e-2), net.spec, lock=True)
    else:
        tx: Any = optax.chain(optax.adamw(1e-2), flaxslim.keep_dead(net.spec))
    params, state = net.params, tx.init(net.params)
    x, y = batches(5)
    for batch in zip(x, y, strict=True):
        updates, state = tx.update(jax.grad(net.loss)(params, batch), state, params)
        params = applied(params, updates)
    assert flaxslim.sparsity(state).widths == {
        "layers/0/down/kernel": 10,
        "layers/1/down/kernel": 8,
    }
    assert (params["layers"]["1"]["down"]["kernel"][jnp.array([2, 5])] == 0).all()
    assert (params["layers"]["0"]["down"]["kernel"] != 0).all()


@pytest.mark.parametrize("lock", [True, False])
def test_a_second_layer_that_starts_at_zero_and_would_be_locked_is_named(lock):
    net = mlp(layers=2)
    down = net.params["layers"]["1"]["down"]
    down["kernel"] = jnp.zeros_like(down["kernel"])
    tx = flaxslim.pruning(optax.sgd(0.1), net.spec, flaxslim.one_shot(0.5), lock=lock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tx.init(net.params)
    told = [str(w.message) for w in caught if w.category is flaxslim.TrainingWarning]
    assert len(told) == lock
    if lock:
        assert "layers/1/down/kernel (10 channels)" in told[0]
        assert "layers/0" not in told[0]
        assert caught[0].filename == __file__


def test_each_axis_has_its_schedule():
    params = {**heads().params, "layers": mlp(layers=1).params["layers"]}
    cfg, spec = heads().cfg | {"hidden": 10}, heads().spec + mlp().spec
    tx: Any = flaxslim.pruning(optax.sgd(1e-2), spec, {"f": 0.9, "h": 0.5}, cfg=cfg)
    updates, state = tx.update(params, tx.init(params), params)
    assert flaxslim.sparsity(state).widths == {"o/kernel": 3, "layers/0/down/kernel": 1}
    plan = flaxslim.plan(applied(params, updates), cfg, spec, width="per_layer")
    assert {cut.site.second.path: cut.dead for cut in plan.cuts} == {
        "o/kernel": 3,
        "layers/0/down/kernel": 9,
    }


# --- bad input --------------------------------------------------------------------------------


def test_a_target_that_floors_forbid_is_told_at_once():
    net = mlp(layers=1)
    tx: Any = flaxslim.pruning(optax.sgd(0.1), net.spec, flaxslim.one_shot(0.9), min_width={"f": 8})
    with pytest.warns(UserWarning, match="no more than 20% of the channels"):
        tx.init(net.params)
    with pytest.warns(UserWarning, match="no more than 20% of the channels"):
        jax.eval_shape(tx.init, net.params)


def test_floors_and_caps_may_be_by_axis():
    params = {**heads().params, "layers": mlp(layers=1).params["layers"]}
    cfg, spec = heads().cfg | {"hidden": 10}, heads().spec + mlp().spec
    bounds: Any = {"min_width": {"f": 8}, "max_sparsity": {"h": 0.5}}
    tx: Any = flaxslim.pruning(optax.sgd(0.1), spec, flaxslim.one_shot(1.0), cfg=cfg, **bounds)
    with pytest.warns(UserWarning, match="no more than"):
        state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert flaxslim.sparsity(state).widths == {"o/kernel": 3, "layers/0/down/kernel": 8}
    tx = flaxslim.pruning(optax.sgd(0.1), spec, 1.0, cfg=cfg, min_width={"f": 8})
    with pytest.warns(UserWarning, match="no more than"):
        state = tx.init(params)
    _, state = tx.update(params, state, params)
    assert flaxslim.sparsity(state).widths["o/kernel"] == 1  # what is not named keeps its floor


def test_several_states_in_one_tree_are_not_mixed_up():
    net = mlp(layers=1)
    tx: Any = flaxslim.pruning(optax.sgd(0.1), net.spec, flaxslim.one_shot(0.9))
    with pytest.raises(TrainingError, match="several states"):
        flaxslim.sparsity((tx.init(net.params), tx.init(net.params)))
    replicated = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(net.params))
    with pytest.raises(TrainingError, match="unreplicate"):
        flaxslim.sparsity(replicated)


def test_nothing_dies_by_gradients_that_are_not_numbers_and_it_is_said():
    net = mlp(layers=1)
    for score in ("snip", "snip_momentum", "taylor"):
        tx: Any = flaxslim.pruning(optax.sgd(0.0), net.spec, flaxslim.one_shot(0.5), score)
        grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), net.params)
        _, state = tx.update(grads, tx.init(net.params), net.params)
        known = flaxslim.sparsity(state)
        assert known.total == 0
        assert known.skipped == 10
        assert "10 scores were not finite" in str(known)
        assert np.isfinite(known.sites["layers/0/down/kernel"].score).all()


def test_of_some_that_are_no_numbers_only_the_others_die():
    net = mlp(layers=1)
    grads = jax.tree.map(jnp.ones_like, net.params)
    grads["layers"]["0"]["down"]["kernel"] = (
        grads["layers"]["0"]["down"]["kernel"].at[:3].set(jnp.nan)
    )
    tx: Any = flaxslim.pruning(optax.sgd(0.0), net.spec, flaxslim.one_shot(0.9), "snip")
    _, state = tx.update(grads, tx.init(net.params), net.params)
    (site,) = flaxslim.sparsity(state).sites.values()
    assert site.alive[0].tolist() == [True] * 3 + [False] * 7


def test_a_step_that_was_lost_to_no_numbers_is_made_good_in_the_next():
    net = mlp(layers=1)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), net.params)
    for score in ("snip", "snip_momentum", "taylor"):
        tx: Any = flaxslim.pruning(optax.sgd(0.0), net.spec, flaxslim.one_shot(0.5, at=1), score)
        state, shares = tx.init(net.params), []
        for grads in (net.params, nan, net.params, net.params):
            _, state = tx.update(grads, state, net.params)
            shares.append(flaxslim.sparsity(state).total)
        assert shares[2:] == [0.5, 0.5]
        assert shares[1] == (0.0 if score == "snip" else 0.5)  # sums go by the steps before


NOT_A_SCHEDULE = {
    "ends before it begins": (
        lambda: flaxslim.cubic(0.0, 0.5, begin=10, end=5),
        "begin=10, end=5",
    ),
    "above one": (lambda: flaxslim.linear(0.0, 1.5, begin=0, end=5), "0.0 to 1.0"),
    "above one at once": (lambda: flaxslim.one_shot(50), "0.5"),
    "never": (lambda: flaxslim.cubic(0.0, 0.5, begin=0, end=5, every=0), "every"),
    "no step": (lambda: flaxslim.stepwise({-1: 0.5}), "whole number"),
    "no steps": (lambda: flaxslim.stepwise({}), "1000: 0.3"),
    "exponential to all": (lambda: flaxslim.exponential(0.0, 1.0, begin=0, end=5), "never"),
}


@pytest.mark.parametrize("name", NOT_A_SCHEDULE)
def test_a_schedule_that_cannot_be_is_refused(name):
    make, words = NOT_A_SCHEDULE[name]
    with pytest.raises(TrainingError, match=words):
        make()


WRONG: Mapping[str, tuple[Any, str]] = {
    "score": ({"score": "snipp"}, "snip"),
    "schedule": ({"schedule": "cubic"}, "one_shot"),
    "axis": ({"schedule": {"h": 0.5}}, "'f'"),
    "axis of a floor": ({"min_width": {"h": 3}}, "'f'"),
    "axis of a cap": ({"max_sparsity": {"ff": 0.5}}, "'f'"),
    "allocation": ({"allocation": "everywhere"}, '"global"'),
    "floor": ({"min_width": -1}, "min_width=-1"),
    "cap": ({"max_sparsity": 1.5}, "max_sparsity=1.5"),
    "fade": ({"fade": 9}, "from 0 to 4"),
    "regrow": ({"regrow": 2.0}, "share"),
    "regrow and fade": ({"regrow": 0.1, "fade": 2}, "the one or the other"),
    "optimizer": ({"inner": 3e-5}, "adamw"),
    "nothing": ({"schedule": None}, "nothing would ever die"),
    "regrow and lock": ({"regrow": 0.1, "lock": True}, "cannot grow again"),
    "half a step": ({"fade": 0.5}, "from 0 to 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_at_once(name):
    arguments, words = WRONG[name]
    schedule = flaxslim.linear(0.0, 0.5, begin=0, end=8, every=4)
    wanted = {"inner": optax.sgd(0.1), "spec": mlp().spec, "schedule": schedule} | arguments
    with pytest.raises(TrainingError, match=words):
        flaxslim.pruning(wanted.pop("inner"), wanted.pop("spec"), **wanted)


def test_a_spec_that_matches_nothing_is_refused_by_init():
    tx: Any = flaxslim.pruning(optax.sgd(0.1), flaxslim.BERT_FFN, 0.5)
    with pytest.raises(NothingMatchedError):
        tx.init(mlp().params)


def _without(grads: Any) -> Any:
    return {"out": grads["out"], "layers": {"0": grads["layers"]["0"], "1": {}}}


UPDATES = {
    "no parameters": (lambda tx, s, p: tx.update(p, s), "needs the parameters"),
    "no gradients": (lambda tx, s, p: tx.update(_without(p), s, p), "no gradient"),
    "gradients of another shape": (
        lambda tx, s, p: tx.update(jax.tree.map(lambda x: x[:1], p), s, p),
        "not the shape",
    ),
    "state of another model": (
        lambda tx, s, p: tx.update(mlp(layers=3).params, s, mlp(layers=3).params),
        "layers/2/down/kernel",
    ),
    "state of another size": (
        lambda tx, s, p: tx.update(mlp(f=8).params, s, mlp(f=8).params),
        "flaxslim.shrink",
    ),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_of_what_does_not_belong_together_is_refused(name):
    call, words = UPDATES[name]
    params = mlp().params
    tx: Any = flaxslim.pruning(optax.sgd(0.1), mlp().spec, 0.5)
    with pytest.raises(TrainingError, match=words):
        call(tx, tx.init(params), params)


def test_a_state_of_another_spec_is_refused():
    params = mlp().params
    first = Pair(at="layers/0", first="up", second="down", activation="gelu")
    state = flaxslim.pruning(optax.sgd(0.1), Spec(name="FIRST", pairs=first), 0.5).init(params)
    tx: Any = flaxslim.pruning(optax.sgd(0.1), mlp().spec, 0.5)
    with pytest.raises(TrainingError, match="another spec"):
        tx.update(params, state, params)


def test_activations_that_are_not_there_are_asked_for():
    net = mlp()
    tx: Any = flaxslim.pruning(optax.sgd(0.1), net.spec, 0.5, "wanda")
    with pytest.raises(TrainingError, match="activations="):
        tx.update(net.params, tx.init(net.params), net.params)


def test_a_score_of_the_wrong_shape_is_refused():
    net = mlp()
    tx: Any = flaxslim.pruning(optax.sgd(0.1), net.spec, 0.5, lambda p, g, s: s.sum())
    with pytest.raises(TrainingError, match="one number for each channel"):
        tx.update(net.params, tx.init(net.params), net.params)


def test_there_is_no_sparsity_in_what_was_not_pruned():
    with pytest.raises(TrainingError, match=r"flaxslim\.pruning"):
        flaxslim.sparsity(optax.adam(0.1).init(mlp().params))


def test_what_an_axis_owes_is_none_of_another_that_has_not_begun():
    """A gradient that is no number delays the channels; no head dies for it before its time."""
    spec = flaxslim.Spec(
        name="BOTH",
        pairs=(
            flaxslim.Pair(first="up", second="down"),
            flaxslim.Pair(first="v", second="o", first_axes="d h", second_axes="h d", axis="h"),
        ),
    )
    rng = np.random.default_rng(0)
    shapes = {"up": (4, 8), "down": (8, 3), "v": (4, 8), "o": (8, 3)}
    params = {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}
    schedules = {
        "f": flaxslim.linear(0, 0.5, begin=2, end=10, every=2),
        "h": flaxslim.scheduled(lambda step: 0.5, begin=1000),
    }
    tx: Any = flaxslim.pruning(optax.sgd(0.0), spec, schedules, "snip")
    state = tx.init(params)
    for step in range(5):
        value = np.nan if step == 2 else 0.1
        _, state = tx.update(jax.tree.map(lambda x, v=value: x * v, params), state, params)
    sites = flaxslim.sparsity(state).sites
    assert sites["o/kernel"].alive.all()
    assert not sites["down/kernel"].alive.all()


@pytest.mark.parametrize("share", [50.0, -0.5, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(share):
    net = mlp(layers=1)
    schedule = flaxslim.scheduled(lambda step: share)
    tx: Any = flaxslim.pruning(optax.sgd(0.1), net.spec, schedule)
    with pytest.raises(TrainingError, match="is no share"):
        tx.init(net.params)
