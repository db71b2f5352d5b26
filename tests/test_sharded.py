"""All that cuts, on arrays in shards over eight devices: the same numbers as on one device.

And what comes out lies on the same mesh by the same `PartitionSpec`, while no program that was
compiled on the way holds on one device what was split among several: all of them are looked at.

All of it runs in one process with eight devices: this file as a script.
"""

import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import older
import optax
import pytest
from fake_devices import outcomes, tell
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pruning_models import Net, gated, heads, mlp, stacked
from test_pruning_places import collectives, mesh_of, put, shardings_of

from flaxslim import Pair, Spec, apply, one_shot, plan, prune, pruning, shrink, slim
from flaxslim._tree import flatten, replace
from flaxslim.errors import NonFiniteError, ShardingError, WidthError

# Where the programs that are compiled are written, by XLA itself.
DUMP = "PROGRAMS_OF_TEST_SHARDED"


# --- what a device holds ----------------------------------------------------------------------


class Watch:
    """The programs that were compiled within it, and what was fetched from shards by the host."""

    def __enter__(self) -> "Watch":
        self.folder = Path(os.environ[DUMP])
        self._before = {*self.folder.iterdir()}
        return self

    def __exit__(self, *_: Any) -> None:
        new = sorted({*self.folder.iterdir()} - self._before)
        self.texts = [
            path.read_text() for path in new if path.name.endswith("after_optimizations.txt")
        ]

    @property
    def largest(self) -> int:
        """The numbers in the largest array that a device holds in any of them."""
        shapes = (shape for text in self.texts for shape in re.findall(r"= \w+\[([\d,]+)\]", text))
        return max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)

    @property
    def moved(self) -> list[tuple[str, int]]:
        return [told for text in self.texts for told in collectives(text)]


def whole(net: Net, params: Any) -> int:
    """The numbers of the smallest kernel that is split."""
    sites = net.spec.sites(params, net.cfg)
    kernels = {t.path for site in sites for t in (*site.first, *site.also, *site.reading)}
    leaves = flatten(params)
    split = [leaves[p].size for p in kernels if not leaves[p].sharding.is_fully_replicated]
    return min(split, default=10**9)


# --- networks ---------------------------------------------------------------------------------


def killed(net: Net, dead: int = 13) -> Net:
    """Some channels die; of an mlp one more becomes a constant."""
    leaves = {path: np.array(x) for path, x in flatten(net.params).items()}
    for number, site in enumerate(net.spec.sites(net.params, net.cfg)):
        rng = np.random.default_rng(number)
        gone = np.zeros((site.rows, site.size), bool)
        if site.groups:
            gone[:, :6] = True  # three groups of two heads, of four
        else:
            for row in gone:
                row[rng.choice(site.size, min(dead, site.size - 1), replace=False)] = True
        second = site.second
        leaves[second.path] = second.axes.zero(
            leaves[second.path], site.pair.axis, gone, second.axes.stack
        )
        if site.second_bias is not None:
            living = np.flatnonzero(~gone[0])[3]
            leaves[site.first[0].path][:, living] = 0
    return Net(params=replace(net.params, leaves), spec=net.spec, fn=net.fn, cfg=net.cfg)


WIDE: dict[str, Callable[[], Net]] = {
    "mlp": lambda: mlp(layers=2, d=8, f=32),
    "gated": lambda: gated(d=8, f=32),
    "stacked": lambda: stacked(layers=2, d=8, f=32),
    "heads": lambda: heads(d=32, h=8, g=4, k=2),
}


def on(net: Net, mesh: Mesh, where: Mapping[str, Any]) -> Any:
    return put(net.params, shardings_of(net, mesh, dict(where)))


def same(found: Any, expected: Any, **how: Any) -> None:
    theirs = flatten(expected)
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(np.asarray(leaf), theirs[path], err_msg=path, **how)


def kept(found: Any, before: Any) -> None:
    """Mesh and spec of each array are those before."""
    was = flatten(before)
    for path, leaf in flatten(found).items():
        assert leaf.sharding == was[path].sharding, (path, leaf.sharding, was[path].sharding)


# --- what is asked ----------------------------------------------------------------------------


def check_slim(
    name: str,
    where: Mapping[str, Any],
    multiples: Any,
    *,
    explicit: bool = False,
    wish: int = 1,
    **how: Any,
) -> None:
    """Parameters and moments on a mesh, against numpy; `multiples`: what the mesh must ask for."""
    net = killed(WIDE[name]())
    mesh = mesh_of(2, 4, explicit=explicit)
    params = on(net, mesh, where)
    moments = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), params, params)
    on_host = jax.tree.map(np.asarray, net.params)
    with Watch() as watch:
        made = plan(params, net.cfg, net.spec, multiple_of=wish, **how)
        small, cfg = slim(params, net.cfg, net.spec, multiple_of=wish, **how)
        state = apply(made, moments, like=params)
    expected = plan(on_host, net.cfg, net.spec, multiple_of=multiples, **how)
    assert made.removed
    assert [cut.keep for cut in made.cuts] == [cut.keep for cut in expected.cuts]
    assert [cut.folds for cut in made.cuts] == [cut.folds for cut in expected.cuts]
    theirs, their_cfg = slim(on_host, net.cfg, net.spec, multiple_of=multiples, **how)
    assert cfg == their_cfg
    same(small, theirs, rtol=0, atol=1e-7)  # a folded bias is rounded after the sum
    for tree in (small, state.mu, state.nu):
        kept(tree, params)
    same(state.mu, apply(expected, on_host, fold=False), rtol=0, atol=0)
    x = np.random.default_rng(1).normal(size=(5, len(net.params["out"]["kernel"])))
    if not how:
        found = net.fn(jax.tree.map(np.asarray, small), x)
        np.testing.assert_allclose(found, net.fn(on_host, x), atol=1e-5)
    assert watch.largest < whole(net, params), (watch.largest, whole(net, params))


def check_control() -> None:
    """A gather by a device that holds all of a kernel is seen."""
    net, mesh = killed(WIDE["mlp"]()), mesh_of(2, 4)
    params = on(net, mesh, {"f": "y"})
    kernel = params["layers"]["0"]["up"]["kernel"]
    with Watch() as watch:
        everywhere = jax.device_put(kernel, NamedSharding(mesh, P()))
        jax.jit(lambda x: x[:, ::2], out_shardings=kernel.sharding)(everywhere)
    assert watch.largest >= whole(net, params)


def check_shrink(
    where: Mapping[str, Any], moments: Mapping[str, Any], multiple: int, *, steps: int = 0
) -> None:
    """What is left for training is what one device has left; moments may lie otherwise."""
    net, mesh = mlp(layers=1, d=8, f=32), mesh_of(2, 4)
    tx = pruning(optax.sgd(1e-2, momentum=0.9), net.spec, one_shot(0.4))
    where_moments = shardings_of(net, mesh, dict(moments))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)  # as if the loss were its square
        return optax.apply_updates(params, updates), state

    one, state = step(net.params, tx.init(net.params))
    many = put(one, shardings_of(net, mesh, dict(where)))
    momentum = state.inner_state[0]
    spread = momentum._replace(trace=put(momentum.trace, where_moments))
    theirs = state._replace(inner_state=(spread, *state.inner_state[1:]))
    with Watch() as watch:
        small, small_state, cfg = shrink(many, theirs, net.cfg, net.spec)
    expected = shrink(one, state, net.cfg, net.spec, multiple_of=multiple)
    assert cfg == expected[2] != net.cfg
    kept(small, many)
    kept(small_state.inner_state[0].trace, spread.trace)
    same(small, expected[0], rtol=0, atol=0)
    same(small_state, expected[1], rtol=0, atol=0)
    assert watch.largest < whole(net, many)
    for _ in range(steps):
        after, expected = step(small, small_state), step(*expected[:2])
        same(after, expected, rtol=1e-4, atol=1e-6)
        small, small_state = after


def check_prune(where: Mapping[str, Any], multiple: int, *, explicit: bool = False) -> None:
    """Calibration on a mesh gives what it gives on one device, of a width that the mesh divides."""
    net, mesh = mlp(layers=1, d=8, f=32), mesh_of(2, 4, explicit=explicit)
    params = on(net, mesh, where)
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(24, 8)).astype(np.float32) for _ in range(3)]
    spread = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in batches]
    ask = functools.partial(prune, cfg=net.cfg, spec=net.spec, model=net.fn, keep=0.55)
    small, cfg = ask(params, batches=spread, preset="fast")
    expected, their_cfg = ask(net.params, batches=batches, preset="fast", multiple_of=multiple)
    assert cfg == their_cfg == {"hidden": -(-18 // multiple) * multiple}
    kept(small, params)
    same(small, expected, rtol=1e-3, atol=1e-4)


def check_refused() -> None:
    """A plan for other places, and what is not finite in a shard."""
    net = killed(mlp(layers=1, d=8, f=32))
    on_host = jax.tree.map(np.asarray, net.params)
    made, params = plan(on_host, net.cfg, net.spec), on(net, mesh_of(2, 4), {"f": "y"})
    with pytest.raises(ShardingError, match=r"4 devices do not divide the 18 of 32(.|\n)*as 20"):
        apply(made, params)
    bad = np.array(net.params["layers"]["0"]["up"]["kernel"])
    bad[3, 30] = np.nan
    leaves = flatten(net.params) | {"layers/0/up/kernel": bad}
    broken = Net(params=replace(net.params, leaves), spec=net.spec, fn=net.fn, cfg=net.cfg)
    with pytest.raises(NonFiniteError, match="layers/0/up/kernel"):
        slim(on(broken, mesh_of(2, 4), {"f": "y", "d": "x"}), net.cfg, net.spec)
    # A config that can say multiples of 12, and eight devices: 28 would be 48, which is all.
    pair = Pair(at="layers/{i}", first="up", second="down", activation="gelu", width="ratio*d")
    tall, cfg = killed(mlp(layers=1, d=12, f=48), dead=20), {"ratio": 4, "d": 12}
    spec = Spec(name="TALL", pairs=pair)
    assert slim(tall.params, cfg, spec)[1]["ratio"] == 3
    with pytest.raises(WidthError, match=r"32 of 48 channels(.|\n)*multiples of 12(.|\n)*for 24"):
        slim(on(tall, mesh_of(2, 4), {"f": ("x", "y")}), cfg, spec)
    # Where the mesh asks for all of them, none goes, and the plan says why.
    few = killed(mlp(layers=1, d=8, f=32), dead=3)
    made = plan(on(few, mesh_of(2, 4), {"f": ("x", "y")}), few.cfg, few.spec)
    assert not made.removed
    assert "channels stay in multiples of 8, as the mesh splits them" in str(made)


def check_metadata() -> None:
    """The names of axes, in the boxes of linen and of nnx, survive on a mesh."""
    mesh, rng = mesh_of(2, 4), np.random.default_rng(0)
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    specs = {"up": P("x", "y"), "down": P("y", "x")}
    values = {name: rng.normal(size=(8, 16)).astype(np.float32) for name in specs}
    values["down"] = values["down"].T.copy()
    values["down"][[1, 5, 6, 7, 9]] = 0
    arrays = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in values.items()}

    names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    for box in (nn.Partitioned, nn.LogicallyPartitioned):
        tree = {name: {"kernel": box(x, names[name])} for name, x in arrays.items()}
        small, _ = slim(tree, spec=spec)
        for name, x in arrays.items():
            kernel = small[name]["kernel"]
            assert (type(kernel), kernel.names) == (box, names[name])
            assert kernel.value.shape[names[name].index("mlp")] == 12
            assert kernel.value.sharding == x.sharding

    class Layer(nnx.Module):
        def __init__(self, name: str):
            init = nnx.with_partitioning(lambda: arrays[name], tuple(specs[name]))
            self.kernel = nnx.Param(init())

    class Block(nnx.Module):
        def __init__(self):
            self.up, self.down = Layer("up"), Layer("down")

    with older.set_mesh(mesh):
        module = Block()
    small, _ = slim(module, spec=spec)
    for name, x in arrays.items():
        kernel, before = getattr(small, name).kernel, getattr(module, name).kernel
        assert kernel[...].size == 96
        assert kernel[...].sharding == x.sharding
        assert kernel.get_metadata() == before.get_metadata() != {}


SLIM: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("mlp", {"f": ("y", "x")}, 8, {}),
    ("mlp", {"f": "y", "d": "x"}, 4, {"explicit": True}),
    ("gated", {"d": "y"}, 1, {"width": "per_layer"}),
    ("stacked", {"l": "x", "f": "y"}, 4, {}),
    ("heads", {"h": "y", "g": "x", "d": None}, {"h": 4}, {}),
]
SLIM_LONG: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("mlp", {}, 1, {}),
    ("mlp", {"f": "y"}, 4, {}),
    ("mlp", {"d": ("x", "y")}, 1, {"threshold": 0.5}),
    ("mlp", {"f": "y", "d": "x"}, 12, {"wish": 3}),
    ("gated", {"f": "y", "d": "x"}, 4, {"explicit": True}),
    ("stacked", {"f": "y", "d": "x"}, 4, {"explicit": True}),
    ("stacked", {"l": "x", "d": "y"}, 1, {}),
    ("heads", {"g": "x", "d": "y"}, {"h": 4}, {}),
    ("heads", {"d": "y"}, 1, {"width": "per_layer"}),
]


def named(rows: list[Any]) -> dict[str, Callable[[], None]]:
    return {
        " ".join(map(str, row)): functools.partial(check_slim, *row[:3], **row[3])
        for row in rows
        if older.EXPLICIT or not row[3].get("explicit")
    }


CASES: dict[str, Callable[[], None]] = {
    **named(SLIM),
    "a gather is seen": check_control,
    "shrink": lambda: check_shrink({"f": "y"}, {"f": ("x", "y")}, 8),
    "prune": lambda: check_prune({"f": "y", "d": "x"}, 4),
    "what is refused": check_refused,
    "names of axes": check_metadata,
}
CASES_LONG: dict[str, Callable[[], None]] = {
    **named(SLIM_LONG),
    "shrink, and train on": lambda: check_shrink({"f": "y"}, {"d": ("x", "y")}, 4, steps=2),
    "prune, replicated": lambda: check_prune({}, 1),
    "prune, explicit axes": lambda: check_prune({"f": "y"}, 4, explicit=True),
}


# --- a process with eight devices -------------------------------------------------------------


def in_a_process_with_eight_devices(*which: str) -> dict[str, str]:
    """What went wrong in each case."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_hlo_as_text --xla_dump_to={folder}"
        return outcomes(__file__, *which, flags=flags, **{DUMP: folder})


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    return in_a_process_with_eight_devices()


@pytest.fixture(scope="module")
def said_long() -> dict[str, str]:
    return in_a_process_with_eight_devices("long")


@pytest.mark.parametrize("case", CASES)
def test_shards_stay_where_they_are_and_no_device_holds_the_whole(case, said):
    assert not said[case], said[case]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES_LONG)
def test_shards_stay_where_they_are_in_every_way(case, said_long):
    assert not said_long[case], said_long[case]


@pytest.mark.skipif(not older.EXPLICIT, reason="this JAX has no explicit axes yet")
def test_one_device_with_explicit_axes():
    """`jax.make_mesh((1,), ("y",))` makes such a mesh, on which plain operations refuse to take."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("y",), axis_types=(AxisType.Explicit,))
    net = mlp(layers=1, d=8, f=32)
    (site,) = net.spec.sites(net.params, net.cfg)
    rows = np.arange(32)[:, None] % 3 > 0
    second = np.asarray(flatten(net.params)[site.second.path]) * rows
    params = replace(net.params, {site.second.path: second})
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    small, cfg = slim(placed, net.cfg, net.spec)
    expected, _ = slim(params, net.cfg, net.spec)
    assert cfg == {"hidden": 21}
    for ours, theirs in zip(jax.tree.leaves(small), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding.mesh == mesh


if __name__ == "__main__":
    tell(CASES_LONG if sys.argv[1:] else CASES)
