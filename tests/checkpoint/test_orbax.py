"""Orbax checkpoints: slimmed ones are what Orbax restores, and compute what the dense ones do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_devices import environment
from kill import kill_by_every_rule
from zoo import CASES, build

import flaxslim
from flaxslim import MAXTEXT_FFN
from flaxslim._tree import flatten
from flaxslim.checkpoint import convert_orbax, is_orbax, orbax_abstract
from flaxslim.checkpoint._chunks import regions
from flaxslim.cli import main
from flaxslim.errors import (
    ConfigError,
    CorruptFileError,
    MissingFileError,
    NonFiniteError,
    TargetError,
)
from flaxslim.specs import spec_for

D, L, F, DEAD = 6, 3, 16, (5, 7, 9)  # wi (d, l, f), wo (f, l, d): scanned on axis 1
LEFT = F - min(DEAD)
CONFIG = {"base_mlp_dim": F, "mlp_activations": ["silu", "linear"]}
YAML = f"""\
# A comment that stays.
base_emb_dim: {D}
base_mlp_dim:   {F}   # the width
mlp_activations: ["silu", "linear"]
base_mlp_dim_note: {F}
"""


def maxtext(seed: int = 0) -> dict[str, Any]:
    """Parameters as MaxText has them, each layer with another number of dead channels."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return np.float32(0.3) * rng.standard_normal(shape, np.float32)

    wo = normal(F, L, D)
    for layer, count in enumerate(DEAD):
        wo[rng.permutation(F)[:count], layer] = 0
    up = {name: {"kernel": normal(D, L, F)} for name in ("wi_0", "wi_1")}
    mlp = {**up, "wo": {"kernel": wo}}
    return {"params": {"decoder": {"layers": {"mlp": mlp}, "decoder_norm": {"scale": normal(D)}}}}


def network(params: Any) -> np.ndarray:
    """What the layers compute."""
    mlp = params["params"]["decoder"]["layers"]["mlp"]
    gate, up, down = (
        np.asarray(mlp[name]["kernel"], np.float64) for name in ("wi_0", "wi_1", "wo")
    )
    x = np.linspace(-1, 1, 4 * D).reshape(4, D)
    for layer in range(L):
        g = x @ gate[:, layer]
        x = x + (g / (1 + np.exp(-g)) * (x @ up[:, layer])) @ down[:, layer]
    return x


def save(folder: Path, tree: Any, **how: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    return folder


def restore(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


def same(one: Any, other: Any) -> bool:
    a, b = flatten(one), flatten(other)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("orbax") / "dense", maxtext())


# --- converted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{}, {"use_ocdbt": False}, {"use_zarr3": True}], ids=["ocdbt", "files", "zarr3"]
)
def test_each_format_stays_what_it_is_and_the_function_too(tmp_path, how):
    source, target = save(tmp_path / "dense", maxtext(), **how), tmp_path / "slim"
    plan, cfg = convert_orbax(source, target, MAXTEXT_FFN, CONFIG)
    assert cfg == {**CONFIG, "base_mlp_dim": LEFT}
    assert plan.removed == L * (F - LEFT)
    found = restore(target)
    assert same(found, flaxslim.slim(maxtext(), CONFIG, MAXTEXT_FFN)[0])
    np.testing.assert_allclose(network(found), network(maxtext()), rtol=1e-12)
    assert (target / "manifest.ocdbt").exists() == (source / "manifest.ocdbt").exists()
    assert json.loads((target / "_METADATA").read_text())["use_zarr3"] == how.get(
        "use_zarr3", False
    )
    abstract = orbax_abstract(target)
    assert same(ocp.StandardCheckpointer().restore(target, abstract), found)


def test_channels_that_are_dead_by_what_they_read_are_found_too(tmp_path):
    params, _ = kill_by_every_rule(maxtext(), MAXTEXT_FFN.sites(maxtext(), CONFIG))
    plan, _ = convert_orbax(save(tmp_path / "d", params), tmp_path / "s", MAXTEXT_FFN, CONFIG)
    assert plan == flaxslim.plan(params, CONFIG, MAXTEXT_FFN)
    assert plan.cuts[0].rules["ii"]
    np.testing.assert_allclose(network(restore(tmp_path / "s")), network(params), rtol=1e-12)


def test_channels_of_other_layers_would_be_another_function():
    slim, _ = flaxslim.slim(maxtext(), CONFIG, MAXTEXT_FFN)
    mlp = slim["params"]["decoder"]["layers"]["mlp"]
    mlp["wi_0"]["kernel"] = mlp["wi_0"]["kernel"][:, ::-1]
    assert np.abs(network(slim) - network(maxtext())).max() > 1e-3


def test_a_training_state_of_a_manager_is_cut_as_a_whole(tmp_path):
    import optax

    tx, params = optax.adam(1e-2), maxtext()
    grads = jax.tree.map(lambda x: np.float32(0.1) * x, params)
    _, state = tx.update(grads, tx.init(params), params)
    tree = {"params": params, "opt_state": state, "step": 7}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(100, args=ocp.args.StandardSave(tree))
    plan, _ = convert_orbax(tmp_path / "run" / "100", tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    found = restore(tmp_path / "slim")
    assert found["step"] == 7
    assert same(found["params"], flaxslim.apply(plan, params))
    want = flaxslim.apply(plan, state, like=params)
    assert same(found["opt_state"][0]["mu"], want[0].mu)
    assert same(found["opt_state"][0]["nu"], want[0].nu)


def test_constants_are_folded_and_the_stock_class_computes_the_same(tmp_path):
    cls, cfg, params = build(next(case for case in CASES if case.cls_name == "FlaxGPT2LMHeadModel"))
    params, _ = kill_by_every_rule(params, spec_for(cfg).sites(params, cfg))
    plan, new = convert_orbax(save(tmp_path / "dense", params), tmp_path / "slim", cfg=cfg)
    assert any(cut.folded.any() for cut in plan.cuts)
    found = restore(tmp_path / "slim")
    shapes = orbax_abstract(tmp_path / "dense", plan)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(orbax_abstract(tmp_path / "slim"))
    assert same(found, flaxslim.slim(params, cfg)[0])
    assert flaxslim.verify((params, cfg), (found, new), cls).ok


def test_the_text_of_a_yaml_config_stays_but_for_the_width(dense, tmp_path, monkeypatch):
    (tmp_path / "base.yml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    _, cfg = convert_orbax(dense, "new/items", MAXTEXT_FFN, "base.yml")
    assert cfg["base_mlp_dim"] == LEFT
    text = (tmp_path / "new" / "items.yml").read_text()
    assert text == YAML.replace(f"dim:   {F} ", f"dim:   {LEFT} ")
    assert (tmp_path / "base.yml").read_text() == YAML


# --- in shards --------------------------------------------------------------------------------

SHARDED = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
sys.path[:0] = sys.argv[2:]
from checkpoint.test_orbax import CONFIG, maxtext, network, same
import flaxslim
from flaxslim import MAXTEXT_FFN
from flaxslim._tree import name_of
from flaxslim.checkpoint import convert_orbax, orbax_abstract
from flaxslim.checkpoint._chunks import Stored

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
SPECS = {"wi_0": P("fsdp", None, "tensor"), "wi_1": P("fsdp", None, "tensor"),
         "wo": P("tensor", None, "fsdp")}
def rule(path, shape):
    return NamedSharding(mesh, next((s for n, s in SPECS.items() if f"/{n}/" in path), P()))

top = sys.argv[1]
params = jax.tree_util.tree_map_with_path(
    lambda keys, x: jax.device_put(x, rule(name_of(keys), x.shape)), maxtext())
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{top}/dense", params)

largest, region = [0], Stored.region
def watched(self, box):
    x = region(self, box)
    largest[0] = max(largest[0], x.size)
    return x
Stored.region = watched
plan, cfg = convert_orbax(f"{top}/dense", f"{top}/slim", MAXTEXT_FFN, CONFIG, multiple_of=4)
assert cfg["base_mlp_dim"] == 12, cfg
assert 0 < largest[0] < 6 * 3 * 16 // 2, largest  # never more than some of the eight chunks
Stored.region = region

abstract = orbax_abstract(f"{top}/slim", sharding=rule)
assert jax.tree.leaves(orbax_abstract(f"{top}/dense", plan, sharding=rule)) == (
    jax.tree.leaves(abstract))
found = ocp.StandardCheckpointer().restore(f"{top}/slim", abstract)
mlp = found["params"]["decoder"]["layers"]["mlp"]
for name, spec in SPECS.items():
    x = mlp[name]["kernel"]
    assert x.sharding == NamedSharding(mesh, spec) and len(x.addressable_shards) == 8
    assert 12 in x.shape and x.addressable_shards[0].data.size * 8 == x.size
assert same(found, flaxslim.slim(maxtext(), CONFIG, MAXTEXT_FFN, multiple_of=4)[0])
np.testing.assert_allclose(network(found), network(maxtext()), rtol=1e-12)

# Saved in shards, asynchronously, and restored: Orbax's own.
with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    checkpointer.save(f"{top}/again", args=ocp.args.StandardSave(found))
    checkpointer.wait_until_finished()
again = ocp.StandardCheckpointer().restore(f"{top}/again", abstract)
assert same(again, found)
assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found)))
print("done")
"""


def test_on_eight_devices_it_is_converted_restored_and_saved_again_in_shards(tmp_path):
    tests = Path(__file__).parents[1]
    arguments = [sys.executable, "-c", SHARDED, str(tmp_path), str(tests)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


def test_regions_cover_a_tensor_once():
    seen = np.zeros((5, 4, 1), int)
    for region in regions(seen.shape, (2, 4, 3)):
        seen[region] += 1
    assert (seen == 1).all()


# --- refused ----------------------------------------------------------------------------------


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_nothing_dead_writes_nothing(tmp_path):
    tree = jax.tree.map(np.ones_like, maxtext())
    (tmp_path / "base.yml").write_text(YAML)
    source = save(tmp_path / "dense", tree)
    plan, _ = convert_orbax(source, tmp_path / "slim", MAXTEXT_FFN, tmp_path / "base.yml")
    assert not plan.removed
    assert _names(tmp_path) == ["base.yml", "dense"]


def test_an_existing_target_is_left_alone(dense, tmp_path):
    (tmp_path / "slim").mkdir()
    with pytest.raises(TargetError, match="exists"):
        convert_orbax(dense, tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    assert not _names(tmp_path / "slim")


@pytest.mark.parametrize("name", ["wi_0", "wo"])
def test_infinity_in_what_is_cut_is_an_error_and_leaves_nothing(tmp_path, name):
    tree = maxtext()
    kernel = tree["params"]["decoder"]["layers"]["mlp"][name]["kernel"]
    dead = np.flatnonzero(
        (tree["params"]["decoder"]["layers"]["mlp"]["wo"]["kernel"] == 0)[:, 2, 0]
    )
    kernel[(0, 2, dead[-1]) if name == "wi_0" else (dead[-1], 2, 0)] = np.inf
    (tmp_path / "base.yml").write_text(YAML)
    source = save(tmp_path / "dense", tree)
    with pytest.raises(NonFiniteError, match=name):
        convert_orbax(source, tmp_path / "slim", MAXTEXT_FFN, tmp_path / "base.yml")
    assert _names(tmp_path) == ["base.yml", "dense"]


def test_a_run_that_fails_while_it_writes_leaves_nothing(dense, tmp_path, monkeypatch):
    (tmp_path / "base.yml").write_text(YAML)
    from flaxslim.checkpoint import _orbax

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_orbax, "region_of", full)
    with pytest.raises(TargetError, match="No space"):
        convert_orbax(dense, tmp_path / "slim", MAXTEXT_FFN, tmp_path / "base.yml")
    assert _names(tmp_path) == ["base.yml"]


def test_a_step_with_several_items_asks_for_one(tmp_path):
    for name in ("weights", "metrics"):
        save(tmp_path / "100" / name, maxtext())
    with pytest.raises(MissingFileError, match="several items") as error:
        convert_orbax(tmp_path / "100", tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    assert "metrics, weights" in str(error.value)
    with pytest.raises(MissingFileError, match="no checkpoint of Orbax"):
        convert_orbax(tmp_path, tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    with pytest.raises(MissingFileError, match="no such folder"):
        convert_orbax(tmp_path / "nowhere", tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    convert_orbax(tmp_path / "100" / "weights", tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    assert [is_orbax(tmp_path / p) for p in ("slim", "100", ".", "no")] == [True, True, True, False]


def test_parameters_are_found_where_they_are_said_to_be(tmp_path):
    source = save(tmp_path / "dense", {"model": {"weights": maxtext()}, "name": "mine"})
    with pytest.raises(MissingFileError, match="no parameters there"):
        convert_orbax(source, tmp_path / "slim", MAXTEXT_FFN, CONFIG, params="model/kernels")
    convert_orbax(source, tmp_path / "slim", MAXTEXT_FFN, CONFIG, params="model/weights")
    found = restore(tmp_path / "slim")
    assert found["name"] == "mine"
    assert same(found["model"]["weights"], flaxslim.slim(maxtext(), CONFIG, MAXTEXT_FFN)[0])


def test_a_width_that_is_no_plain_line_of_the_yaml_is_an_error(dense, tmp_path):
    (tmp_path / "base.yml").write_text('{base_mlp_dim: 16, mlp_activations: ["silu", "linear"]}\n')
    with pytest.raises(ConfigError, match="cannot be written into the text"):
        convert_orbax(dense, tmp_path / "slim", MAXTEXT_FFN, tmp_path / "base.yml")
    assert _names(tmp_path) == ["base.yml"]


def test_a_tensor_that_is_gone_is_told_by_its_name(tmp_path):
    source = save(tmp_path / "dense", maxtext(), use_ocdbt=False)
    (kernel,) = source.glob("*wo.kernel/0.0.0")
    kernel.write_bytes(kernel.read_bytes()[:9])
    with pytest.raises(CorruptFileError, match="wo/kernel"):
        convert_orbax(source, tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    assert _names(tmp_path) == ["dense"]


def test_chunks_that_no_array_has_are_refused(tmp_path):
    """TensorStore opens such an array, and ends the process when it reads it."""
    source = save(tmp_path / "dense", maxtext(), use_ocdbt=False)
    (path,) = source.glob("*wo.kernel/.zarray")
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "chunks": [2**53, *said["chunks"][1:]]}))
    with pytest.raises(CorruptFileError, match=r"larger than the array(.|\n)*wo"):
        convert_orbax(source, tmp_path / "slim", MAXTEXT_FFN, CONFIG)
    assert _names(tmp_path) == ["dense"]


def test_the_command_line_slims_a_checkpoint_of_maxtext(tmp_path, capsys):
    dense = maxtext()
    save(tmp_path / "dense", dense)
    (tmp_path / "base.yml").write_text(YAML)
    command = ["slim", str(tmp_path / "dense"), str(tmp_path / "slim"), "--config"]
    assert main([*command, str(tmp_path / "base.yml")]) == 0
    assert "no model was run" in capsys.readouterr().err
    small = restore(tmp_path / "slim")
    np.testing.assert_allclose(network(small), network(dense), rtol=1e-6)
    assert f"base_mlp_dim:   {LEFT} " in (tmp_path / "slim.yml").read_text()
    for flag in ("--overwrite", "--heads", "--by-layer"):
        assert main([*command, str(tmp_path / "base.yml"), flag]) == 1
        assert flag in capsys.readouterr().err.partition("leave out")[2]
    # Beside the target the new config would take the place of another.
    shutil.rmtree(tmp_path / "slim")
    (tmp_path / "slim.yml").write_text("mine")
    assert main([*command, str(tmp_path / "base.yml")]) == 1
    assert "place of the new config is taken" in capsys.readouterr().err
    assert (tmp_path / "slim.yml").read_text() == "mine"
    assert not (tmp_path / "slim").exists()
