"""Checkpoint and resume in the middle of a schedule: the same bits as an uninterrupted run."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from pruning_models import MLP, batches, mlp

import flaxslim
from flaxslim import Pair, Spec, cubic, pruning, shrink, sparsity
from flaxslim._tree import flatten
from flaxslim.errors import TrainingError

STEPS, MIDDLE = 16, 7
NET = mlp(layers=1)
BATCHES = list(zip(*map(np.asarray, batches(STEPS)), strict=True))
CFG = {"hidden": 10}


def _optimizer(spec: Spec = MLP, *, end: int = 12, fade: int = 1) -> Any:
    schedule = cubic(0.0, 0.6, begin=2, end=end, every=3)
    return pruning(optax.adamw(1e-2), spec, schedule, "snip_momentum", fade=fade)


TX = _optimizer()


@functools.partial(jax.jit, static_argnums=0)
def _step(tx: Any, params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    updates, state = tx.update(jax.grad(NET.loss)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


def _train(params: Any, state: Any, data: Any) -> tuple[Any, Any]:
    for batch in data:
        params, state = _step(TX, params, state, batch)
    return params, state


def assert_same(ours: Any, theirs: Any) -> None:
    """The same structure, types and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    expected = flatten(theirs)
    for path, x in flatten(ours).items():
        assert jnp.asarray(x).dtype == jnp.asarray(expected[path]).dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected[path]), err_msg=path)


# --- by flax.serialization and by Orbax -------------------------------------------------------


def _bytes(params: Any, state: Any, folder: Path) -> tuple[Any, Any]:
    """Into a target of the same kind, from parameters alone that have the right shapes."""
    file = folder / "checkpoint.msgpack"
    file.write_bytes(serialization.to_bytes((params, state)))
    target = jax.tree.map(jnp.zeros_like, params)
    found: Any = serialization.from_bytes((target, TX.init(target)), file.read_bytes())
    return found


def _restored(params: Any, state: Any, folder: Path) -> tuple[Any, Any]:
    """Without any parameters: those of the file, and a state made for them."""
    file = folder / "checkpoint.msgpack"
    file.write_bytes(serialization.to_bytes({"params": params, "opt_state": state}))
    found: Any = serialization.msgpack_restore(file.read_bytes())
    target = TX.init(found["params"])
    return found["params"], serialization.from_state_dict(target, found["opt_state"])


def _orbax(params: Any, state: Any, folder: Path) -> tuple[Any, Any]:
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", (params, state))
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, params)
        abstract = jax.eval_shape(lambda p: (p, TX.init(p)), target)
        return checkpointer.restore(folder / "checkpoint", abstract)


def _managed(params: Any, state: Any, folder: Path) -> tuple[Any, Any]:
    """As `_restored`, by a CheckpointManager: the shapes of the parameters lie in the metadata."""
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    with ocp.CheckpointManager(folder / "run") as manager:
        tree = {"params": params, "opt_state": state}
        manager.save(MIDDLE, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    with ocp.CheckpointManager(folder / "run", item_handlers=ocp.StandardCheckpointHandler()) as m:
        shapes = m.item_metadata(m.latest_step())["params"]
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
        target = {"params": target, "opt_state": jax.eval_shape(TX.init, target)}
        found = m.restore(m.latest_step(), args=ocp.args.StandardRestore(target))
    return found["params"], found["opt_state"]


WAYS: dict[str, Callable[[Any, Any, Path], tuple[Any, Any]]] = {
    "from_bytes": _bytes,
    "msgpack_restore": _restored,
    "StandardCheckpointer": _orbax,
    "CheckpointManager": _managed,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("small", [False, True], ids=["", "after a shrink"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(way, small, tmp_path):
    params, state = _train(NET.params, TX.init(NET.params), BATCHES[:MIDDLE])
    cfg = CFG
    if small:
        params, state, cfg = shrink(params, state, CFG, MLP)
        assert cfg["hidden"] < 10
    assert 0 < sparsity(state).total < 0.6
    found = WAYS[way](params, state, tmp_path)
    assert_same(found, (params, state))
    theirs = _train(params, state, BATCHES[MIDDLE:])
    assert_same(_train(*found, BATCHES[MIDDLE:]), theirs)
    assert sparsity(theirs[1]).total == 0.6
    (site,) = sparsity(found[1]).sites.values()
    assert site.gone == 10 - cfg["hidden"]


# --- of a stock model, with its layout --------------------------------------------------------


def test_the_layout_of_a_shrunk_model_travels_along(tmp_path):
    """By `flaxslim.save` and `load`, with the bytes of the optimizer beside."""
    from transformers import BertConfig  # takes seconds, and the process below needs none of it
    from transformers.models.bert.modeling_flax_bert import FlaxBertModule

    cfg = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
        max_position_embeddings=8,
    )

    def optimizer(cfg: Any) -> Any:
        schedules = {"f": cubic(0.0, 0.6, begin=0, end=6, every=2), "h": 0.5}
        spec = flaxslim.spec_for(cfg, "all")
        return pruning(optax.adamw(1e-3), spec, schedules, cfg=cfg, allocation="global")

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx: Any, params: Any, state: Any, lr: Any) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda x: lr * x + 0.01, params)  # in place of a loss
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def trained(tx: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
        for i in steps:
            params, state = step(tx, params, state, 0.1 * i)
        return params, state

    ids = jnp.ones((1, 3), jnp.int32)
    inputs = ids, ids, 0 * ids, jnp.arange(3)[None], None
    shapes = jax.eval_shape(FlaxBertModule(cfg).init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    tx = optimizer(cfg)
    params, state = trained(tx, params, tx.init(params), range(4))
    params, state, cfg = shrink(params, state, cfg, "all", width="per_layer")
    folder = flaxslim.save(tmp_path / "step-4", params, cfg)
    (folder / "opt_state.msgpack").write_bytes(serialization.to_bytes(state))

    loaded, own = flaxslim.load(folder)
    assert own.flaxslim_layout == cfg.flaxslim_layout
    tx = optimizer(own)
    data = (folder / "opt_state.msgpack").read_bytes()
    resumed = serialization.from_bytes(tx.init(loaded), data)
    assert_same((loaded, resumed), (params, state))
    theirs = trained(tx, params, state, range(4, 8))
    assert_same(trained(tx, loaded, resumed, range(4, 8)), theirs)
    assert sparsity(theirs[1]).total > sparsity(state).total


# --- after a kill -----------------------------------------------------------------------------

LONG = _optimizer(end=99)
SHRINK_AFTER = 40


def train(folder: Path, end: float) -> tuple[int, Any, Any]:
    """Train on from the checkpoint in a folder, if there is one, and write one at each step."""
    file, partial = folder / "checkpoint", folder / "partial"
    step, params, state = 0, NET.params, LONG.init(NET.params)
    if file.exists():
        found: Any = serialization.msgpack_restore(file.read_bytes())
        step, params = found["step"], found["params"]
        state = serialization.from_state_dict(LONG.init(params), found["opt_state"])
    while step < end:
        params, state = _step(LONG, params, state, BATCHES[step % STEPS])
        step += 1
        if step == SHRINK_AFTER:
            params, state, _ = shrink(params, state, CFG, MLP)
        tree = {"step": step, "params": params, "opt_state": state}
        partial.write_bytes(serialization.to_bytes(tree))
        os.replace(partial, file)  # at once, or not at all
    return step, params, state


_CHILD = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import test_resume
test_resume.train(pathlib.Path(sys.argv[2]), float("inf"))
"""


def _killed(folder: Path, after: float) -> int:
    """Train in another process that is killed so long after its first checkpoint: at which step."""
    file = folder / "checkpoint"
    before = file.stat().st_mtime_ns if file.exists() else 0
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(Path(__file__).parent), str(folder)]
    )
    try:
        while not file.exists() or file.stat().st_mtime_ns == before:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(after)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    found: Any = serialization.msgpack_restore(file.read_bytes())
    return found["step"]


def test_after_kills_at_random_moments_the_bits_are_those_of_an_uninterrupted_run(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    moments = [random.uniform(0.0, 0.3), random.uniform(0.0, 1.0)]
    steps = [_killed(killed, after) for after in moments]
    assert 0 < steps[0] < steps[1]
    end = max(steps[1], SHRINK_AFTER) + 10
    theirs = train(whole, end)
    assert_same(train(killed, end), theirs)
    assert (killed / "checkpoint").read_bytes() == (whole / "checkpoint").read_bytes()
    assert theirs[1]["layers"]["0"]["down"]["kernel"].shape[0] < 10


# --- what does not belong together ------------------------------------------------------------

FIRST = Spec(name="FIRST", pairs=Pair(at="layers/0", first="up", second="down"))


@pytest.mark.parametrize(
    ("resumed", "problem"),
    [
        (_optimizer(FIRST), r"made for another spec(.|\n)*resume with the spec"),
        (_optimizer(fade=0), r"has fade=, and the other has not(.|\n)*resume with the settings"),
    ],
    ids=["spec", "fade"],
)
def test_a_state_that_was_saved_with_other_settings_is_refused(resumed, problem):
    params = mlp(layers=2).params
    for saved, other in ((TX, resumed), (resumed, TX)):
        data = serialization.to_bytes(saved.init(params))
        state = serialization.from_bytes(saved.init(params), data)
        with pytest.raises(TrainingError, match=problem):
            other.update(params, state, params)
        with pytest.raises(TrainingError, match="another spec, or of other settings"):
            serialization.from_bytes(other.init(params), data)


def test_what_was_read_without_its_kinds_is_refused():
    params = mlp(layers=2).params
    plain: Any = serialization.msgpack_restore(serialization.to_bytes(TX.init(params)))
    with pytest.raises(TrainingError, match="from_bytes"):
        TX.update(params, plain, params)


def test_a_state_from_after_a_shrink_does_not_go_with_parameters_from_before_it():
    params, state = _train(NET.params, TX.init(NET.params), BATCHES[:MIDDLE])
    _, small, _ = shrink(params, state, CFG, MLP)
    found = serialization.from_bytes(TX.init(params), serialization.to_bytes(small))
    with pytest.raises(TrainingError, match=r"another number of channels(.|\n)*flaxslim.shrink"):
        TX.update(params, found, params)
