"""Arguments that are no such thing at all: refused by name, in errors of ours."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxslim
from flaxslim import Pair, Spec
from flaxslim.errors import (
    CalibrationError,
    FlaxslimError,
    PlanError,
    SpecError,
    TracedError,
    TrainingError,
)

MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))
CFG = {"hidden": 2}
X = np.ones((2, 2), np.float32)


def params() -> dict[str, Any]:
    """Two channels, the first of which nothing reads."""
    down = jnp.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    return {"up": {"kernel": jnp.eye(2)}, "down": {"kernel": down}}


def forward(tree: Any, x: Any) -> Any:
    return x @ tree["up"]["kernel"] @ tree["down"]["kernel"]


# --- arrays that were donated -----------------------------------------------------------------

PLAN = flaxslim.plan(params(), CFG, MLP)
DONATED = {
    "slim": lambda tree, _: flaxslim.slim(tree, CFG, MLP),
    "plan": lambda tree, _: flaxslim.plan(tree, CFG, MLP),
    "apply": lambda tree, _: flaxslim.apply(PLAN, tree),
    "apply to a state": lambda tree, _: flaxslim.apply(PLAN, {"ema": tree}, like=params()),
    "shrink": lambda tree, _: flaxslim.shrink(tree, None, CFG, MLP),
    "channel_mask": lambda tree, _: flaxslim.channel_mask(tree, MLP),
    "keep_dead": lambda tree, _: flaxslim.keep_dead(MLP).init(tree),
    "verify": lambda tree, _: flaxslim.verify(params(), tree, forward, inputs=X, spec=MLP),
    "prune": lambda tree, _: flaxslim.prune(tree, CFG, MLP, model=forward, batches=[X], keep=0.5),
    "save": lambda tree, path: flaxslim.save(path / "out", tree, {"model_type": "bert"}),
}


@pytest.mark.parametrize("way", DONATED)
def test_a_deleted_array_is_named(way, tmp_path):
    tree = params()
    tree["down"]["kernel"].delete()
    with pytest.raises(TracedError, match="an array was deleted") as caught:
        DONATED[way](tree, tmp_path)
    assert (caught.value.path or "").endswith("down/kernel")
    assert "donate" in str(caught.value.mend)


def test_a_deleted_array_may_say_the_shapes_from_before_the_cut():
    tree, state = params(), optax.sgd(0.1, momentum=0.9).init(params())
    tree["down"]["kernel"].delete()
    small: Any = flaxslim.apply(PLAN, state, like=tree)
    assert small[0].trace["down"]["kernel"].shape == (1, 3)


# --- arguments of another kind ----------------------------------------------------------------


loose: Any = flaxslim  # without types, which would say it before it runs
any_spec: Any = MLP


def pruned(**more: Any) -> Any:
    return flaxslim.pruning(optax.sgd(0.1), MLP, flaxslim.one_shot(0.5), **more)


WRONG: dict[str, tuple[Any, type[FlaxslimError], str]] = {
    "apply": (lambda: loose.apply(None, params()), PlanError, "NoneType"),
    "apply text": (lambda: loose.apply(PLAN.to_json(), params()), PlanError, "a str"),
    "expand": (lambda: loose.expand(None, params()), PlanError, "NoneType"),
    "spec + None": (lambda: any_spec + None, SpecError, "None"),
    "None + spec": (lambda: None + any_spec, SpecError, "None"),
    "spec + pair": (lambda: any_spec + any_spec.pairs[0], SpecError, "a Pair"),
    "name": (lambda: loose.Spec(name=None, pairs=MLP.pairs), SpecError, "name=None"),
    "one_shot": (lambda: loose.one_shot(".5"), TrainingError, "'.5'"),
    "one_shot True": (lambda: loose.one_shot(True), TrainingError, "True"),
    "linear": (lambda: loose.linear(None, 0.5, begin=0, end=2), TrainingError, "None"),
    "cubic": (lambda: loose.cubic(0, ".5", begin=0, end=2), TrainingError, "'.5'"),
    "cubic end": (lambda: loose.cubic(0, 0.5, begin=0, end=None), TrainingError, "None"),
    "exponential": (lambda: loose.exponential(0, "x", begin=0, end=2), TrainingError, "'x'"),
    "stepwise": (lambda: loose.stepwise([1, 2]), TrainingError, "[1, 2]"),
    "stepwise share": (lambda: loose.stepwise({1: ".5"}), TrainingError, "'.5'"),
    "stepwise steps": (lambda: loose.stepwise({2: 0.5, "1": 0.4}), TrainingError, "'1'"),
    "scheduled": (lambda: loose.scheduled(0.5), TrainingError, "0.5"),
    "min_width": (lambda: pruned(min_width="8"), TrainingError, "min_width='8'"),
    "min_width 1.5": (lambda: pruned(min_width=1.5), TrainingError, "min_width=1.5"),
    "min_width by axis": (lambda: pruned(min_width={"f": "8"}), TrainingError, "'8'"),
    "max_sparsity": (lambda: pruned(max_sparsity=None), TrainingError, "max_sparsity=None"),
    "regrow": (lambda: pruned(regrow="x"), TrainingError, "'x'"),
    "fade": (lambda: pruned(fade=True), TrainingError, "fade=True"),
    "seed": (lambda: pruned(seed=None), TrainingError, "seed=None"),
    "lock": (lambda: pruned(lock="no"), TrainingError, "lock='no'"),
    "ShrinkEvery text": (lambda: loose.ShrinkEvery("3", MLP), TrainingError, "'3'"),
    "ShrinkEvery 2.5": (lambda: loose.ShrinkEvery(2.5, MLP), TrainingError, "2.5"),
    "chance": (lambda: loose.gates(params(), MLP, chance="x"), TrainingError, "'x'"),
    "no gates": (lambda: loose.expected_sparsity({}), TrainingError, "{}"),
    "lagrangian": (
        lambda: flaxslim.gate_lagrangian({}, jnp.zeros(2), 0.5),
        TrainingError,
        "{}",
    ),
    "multipliers": (
        lambda: flaxslim.gate_lagrangian(GATES, jnp.zeros(1), 0.5),
        TrainingError,
        "shape (1,)",
    ),
    "target": (
        lambda: flaxslim.gate_lagrangian(GATES, jnp.zeros(2), "0.5"),
        TrainingError,
        "'0.5'",
    ),
    "prune": (
        lambda: flaxslim.prune(
            params(), CFG, MLP, model=forward, batches=[X], keep=0.5, seed=2**63
        ),
        CalibrationError,
        str(2**63),
    ),
    "strength": (lambda: flaxslim.proximal_group_lasso(MLP, None), TrainingError, "None"),
    "learning_rate": (
        lambda: flaxslim.proximal_group_lasso(MLP, 0.1, None),
        TrainingError,
        "learning_rate=None",
    ),
}
GATES = {"down": {"kernel": jnp.zeros((1, 2))}}


@pytest.mark.parametrize("what", WRONG)
def test_an_argument_of_another_kind_is_refused(what):
    call, error, seen = WRONG[what]
    with pytest.raises(error) as caught:
        call()
    assert seen in str(caught.value.seen)


def test_numbers_of_numpy_and_jax_are_numbers():
    schedule = loose.cubic(np.float32(0), jnp.array(0.5), begin=np.int64(0), end=2)
    assert float(schedule(2)) == 0.5
    pruned(min_width=np.int32(1), max_sparsity=jnp.array(0.5), seed=np.int8(3))
    pruned(min_width=np.array(1), max_sparsity=np.array(0.5), seed=jnp.array(3))
    loose.proximal_group_lasso(MLP, jnp.array(0.1), np.float16(0.1))


def test_a_plan_is_hashed_by_its_content():
    assert hash(PLAN) == hash(flaxslim.Plan.from_json(PLAN.to_json()))
    other = flaxslim.plan({**params(), "down": {"kernel": jnp.ones((2, 3))}}, CFG, MLP)
    assert len({PLAN, flaxslim.plan(params(), CFG, MLP), other}) == 2
