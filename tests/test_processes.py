"""Several processes that hold one model together, over loopback: one plan, and one of them writes.

Each process runs this file as a script, and does all that it is asked in turn. What comes out is
compared with what one process has by itself.
"""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from fake_devices import environment
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pruning_models import Net, mlp

import flaxslim
from flaxslim import apply, one_shot, plan, prune, pruning, shrink, slim
from flaxslim._tree import flatten, replace
from flaxslim.errors import CalibrationError, ProcessError
from flaxslim.training._sparsity import sparsity

pytest.importorskip("transformers", reason="the jobs write folders, with its configs")

WHERE = {"up/kernel": P("x", "y"), "up/bias": P("y"), "down/kernel": P("y", "x")}


# --- in each process --------------------------------------------------------------------------


@functools.cache
def net() -> Net:
    """Some channels are dead, and one is a constant."""
    whole = mlp(layers=1, d=8, f=32)
    leaves = {path: np.array(x) for path, x in flatten(whole.params).items()}
    leaves["layers/0/down/kernel"][[1, 5, 6, 7, 9, 20, 22, 25, 30]] = 0
    leaves["layers/0/up/kernel"][:, 11] = 0
    return dataclasses.replace(whole, params=replace(whole.params, leaves))


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, -1), ("x", "y"))


def placed(x: Any, spec: P) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh(), spec), lambda at: x[at])


def spread(params: Any) -> Any:
    """Every kernel spans all processes."""
    own = {
        path: placed(x, WHERE.get("/".join(path.split("/")[-2:]), P()))
        for path, x in flatten(params).items()
    }
    assert not own["layers/0/up/kernel"].is_fully_addressable
    return replace(params, own)


def same(found: Any, expected: Any, *, atol: float = 0.0) -> None:
    """The shards that are here are those of what one process has."""
    theirs = {path: np.asarray(x) for path, x in flatten(expected).items()}
    for path, leaf in flatten(found).items():
        for shard in getattr(leaf, "addressable_shards", ()):
            np.testing.assert_allclose(
                shard.data, theirs[path][shard.index], rtol=0, atol=atol, err_msg=path
            )


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def check_slim(folder: Path) -> str:
    whole, params = net(), spread(net().params)
    made = plan(params, whole.cfg, whole.spec)
    expected = plan(on_host(whole.params), whole.cfg, whole.spec, multiple_of=mesh().shape["y"])
    assert made.removed
    assert [(c.keep, c.folds) for c in made.cuts] == [(c.keep, c.folds) for c in expected.cuts]
    small, cfg = slim(params, whole.cfg, whole.spec)
    theirs, their_cfg = slim(
        on_host(whole.params), whole.cfg, whole.spec, plan=None, multiple_of=mesh().shape["y"]
    )
    assert cfg == their_cfg
    same(small, theirs, atol=1e-7)
    same(apply(made, {"mu": params}, like=params)["mu"], apply(expected, whole.params, fold=False))
    before, after = flatten(params), flatten(small)
    assert all(after[path].sharding == x.sharding for path, x in before.items())
    copied = jax.tree.map(lambda x: placed(x, P()), whole.params)
    alone = plan(on_host(whole.params), whole.cfg, whole.spec)
    assert plan(copied, whole.cfg, whole.spec).cuts[0].keep == alone.cuts[0].keep
    return made.to_json()


def check_training(folder: Path) -> str:
    """The same channels die everywhere, and as in one process; then they are cut."""
    whole = mlp(layers=1, d=8, f=32)
    tx = pruning(optax.sgd(1e-2, momentum=0.9), whole.spec, one_shot(0.4, at=1))

    @jax.jit
    def step(params: Any, state: Any, x: Any) -> Any:
        grads = jax.grad(lambda p: (whole.fn(p, x) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    everywhere, many = placed(x, P("x")), spread(whole.params)
    state = jax.jit(tx.init)(many)
    for _ in range(3):
        many, state = step(many, state, everywhere)
    alive = sparsity(state).sites["layers/0/down/kernel"].alive
    assert alive.sum() == 19
    small, small_state, cfg = shrink(many, state, whole.cfg, whole.spec)
    if jax.process_count() > 2:
        step(small, small_state, everywhere)
    if jax.process_index() == 0:
        one, own = whole.params, tx.init(whole.params)
        for _ in range(3):
            one, own = step(one, own, x)
        np.testing.assert_array_equal(alive, sparsity(own).sites["layers/0/down/kernel"].alive)
        multiple = mesh().shape["y"]
        theirs = shrink(one, own, whole.cfg, whole.spec, multiple_of=multiple)
        assert cfg == theirs[2] == {"hidden": 20}
        same(small, theirs[0], atol=1e-5)
        same(small_state.inner_state[0].trace, theirs[1].inner_state[0].trace, atol=1e-5)
    return json.dumps(alive.tolist())


def check_disagreement(folder: Path) -> str:
    """What one process asks for differs; each of them raises, and none waits for another."""
    whole, params = net(), spread(net().params)
    last = jax.process_index() == jax.process_count() - 1
    with pytest.raises(ProcessError, match=r"not agree on the plan(.|\n)*channels at 1 site to go"):
        plan(params, whole.cfg, whole.spec, multiple_of=16 if last else 1)
    version, flaxslim.__version__ = flaxslim.__version__, "9.9" if last else flaxslim.__version__
    with pytest.raises(ProcessError, match=r"the releases(.|\n)*flaxslim 9\.9, jax") as told:
        plan(params, whole.cfg, whole.spec)
    flaxslim.__version__ = version
    with pytest.raises(CalibrationError, match="refits layers on one host"):
        prune(params, whole.cfg, whole.spec, model=whole.fn, batches=[np.ones((4, 8))], keep=0.5)
    return str(told.value)


def check_save(folder: Path) -> str:
    """The first process writes, and the others find the folder when they go on."""
    whole = net()
    with pytest.raises(ProcessError, match="save it with Orbax"):
        flaxslim.save(folder / "spread", spread(whole.params), whole.cfg)
    replicated = jax.tree.map(lambda x: placed(x, P()), whole.params)
    assert flaxslim.save(folder / "whole", replicated, whole.cfg) == folder / "whole"
    if jax.process_index() == 0:
        same(replicated, flaxslim.load(folder / "whole")[0])
    told = r"Exists|exists" if jax.process_index() == 0 else "process 0 could not write"
    with pytest.raises(flaxslim.FlaxslimError, match=told):
        flaxslim.save(folder / "whole", replicated, whole.cfg)
    return json.dumps(sorted(path.name for path in (folder / "whole").iterdir()))


CASES: dict[str, Callable[[Path], str]] = {
    "one plan": check_slim,
    "the same channels die": check_training,
    "they do not agree": check_disagreement,
    "one writes": check_save,
}


def die_while_writing(folder: Path) -> None:
    """The first process is gone when the weights of the new checkpoint are written, and no more."""
    from flaxslim.checkpoint import _write

    _write._write_record = lambda *_: os._exit(7)
    zeros = jax.tree.map(lambda x: placed(np.zeros(x.shape, x.dtype), P()), net().params)
    flaxslim.save(folder / "whole", zeros, net().cfg, overwrite=True)


def main(number: str, count: str, port: str, folder: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))
    said = {}
    for name, run in CASES.items():
        try:
            said[name] = [run(Path(folder)), ""]
        except Exception:
            said[name] = ["", traceback.format_exc()]
    (Path(folder) / f"said.{number}").write_text(json.dumps(said))
    if not any(problem for _, problem in said.values()):
        die_while_writing(Path(folder))


# --- the processes ----------------------------------------------------------------------------


def said_by(count: int, devices: int, folder: Path) -> list[dict[str, list[str]]]:
    """What each process has to say of each case: what it found, and what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with (folder / "errors").open("w") as errors:
        children = [
            subprocess.Popen(
                [sys.executable, __file__, str(i), str(count), port, str(folder)],
                env=environment(devices),
                stdout=errors,
                stderr=errors,
            )
            for i in range(count)
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            children[0].wait(timeout=120)
        for child in children:
            child.kill()
            child.wait()
    said = [folder / f"said.{i}" for i in range(count)]
    assert all(path.exists() for path in said), (folder / "errors").read_text()[-5000:]
    code = {"code": ["", str(children[0].returncode)]}
    return [{**json.loads(path.read_text()), **code} for path in said]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    return folder, said_by(2, 2, folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("four")
    return folder, said_by(4, 1, folder)


def check(said: list[dict[str, list[str]]], case: str) -> None:
    for own in said:
        assert not own[case][1], own[case][1]
    assert len({own[case][0] for own in said}) == 1


def check_old_checkpoint(folder: Path, said: list[dict[str, list[str]]]) -> None:
    assert said[0]["code"][1] == "7", "the first process did not die while it wrote"
    assert (folder / ".whole.new" / "flax_model.msgpack").exists(), "nor had it begun to"
    found, _ = flaxslim.load(folder / "whole")
    expected = flatten(net().params)
    for path, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_as_one(case, two):
    check(two[1], case)


def test_a_process_that_dies_leaves_the_old_checkpoint_whole(two):
    check_old_checkpoint(*two)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_four_processes_do_as_one(case, four):
    check(four[1], case)


@pytest.mark.long
def test_one_of_four_that_dies_leaves_the_old_checkpoint_whole(four):
    check_old_checkpoint(*four)


if __name__ == "__main__":
    main(*sys.argv[1:])
