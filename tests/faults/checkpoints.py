"""The readers of checkpoints, of what is recorded in them, and of Orbax."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from faults import tiny
from faults.mutate import broken_bytes, broken_json
from faults.reader import by_bytes, by_json, some
from flaxslim._layout import Layout
from flaxslim._plan import Plan
from flaxslim._slim import slim
from flaxslim._spec import Spec
from flaxslim._tree import flatten
from flaxslim.checkpoint import read, save
from flaxslim.errors import FlaxslimError


def read_checkpoint(folder: Path, random: Random) -> None:
    """Lazily and at once the same comes out, and it can be planned for."""
    from flaxslim._draw import plan
    from flaxslim.checkpoint._names import spec_named

    there, away = read(folder), read(folder, lazy=True)
    assert repr(there.config) == repr(away.config)
    one, two = flatten(there.params), flatten(away.params)
    assert list(one) == list(two)
    for path, leaf in one.items():
        values = np.asarray(two[path])
        assert values.shape == np.shape(leaf) == tuple(two[path].shape)
        assert values.tobytes() == np.asarray(leaf).tobytes(), path
    width = random.choice(("uniform", "per_layer"))
    cfg = away.config
    assert str(plan(away.params, cfg, spec_named(cfg, "all", away.naming), width=width))


def spoilt_msgpack(folder: Path, random: Random) -> None:
    """Bytes; or a tree of hostile values, with arrays of hostile shapes and types in it."""
    import msgpack

    path = folder / "flax_model.msgpack"
    kind = random.randrange(4)
    if kind == 0:
        path.write_bytes(random.choice((b"\x81\xa1a", b"\x91", b"\xdf\xff\xff\xff\xff")) * 10**4)
    elif kind == 1:
        path.write_bytes(bytes(msgpack.packb(_packed(random, 0)) or b""))
    else:
        path.write_bytes(broken_bytes(path.read_bytes(), random))


def _packed(random: Random, depth: int) -> Any:
    import msgpack

    if depth < 3 and random.random() < 0.6:
        names = ("a", "b", "__msgpack_chunked_array__", "shape", "chunks", "0", "1")
        return {name: _packed(random, depth + 1) for name in random.sample(names, 3)}
    sizes = (0, 1, 2, 3, -1, 2**31, 2**32, 2**63 - 1, True, 1.0, "3", None, [2])
    shape = random.choices(sizes, k=random.choice((0, 1, 2, 2, 3, 40)))
    names = ("float32", "bfloat16", "int8", "object", "O", "float3", "i4,f4", "M8[s]", "U3", "")
    inner = msgpack.packb((shape, random.choice(names), random.randbytes(random.choice((0, 4, 8)))))
    numbers = (-1, 0, 2**32, "text", None, [], {})
    return random.choice((msgpack.ExtType(random.choice((1, 1, 1, 2, 3)), inner), *numbers))


def pickled_folder(folder: Path) -> None:
    import torch

    tiny.torch_folder(folder)
    leaves = flatten(tiny.weights()).items()
    state = {path.replace("/", "."): torch.from_numpy(leaf) for path, leaf in leaves}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


# --- what is recorded of a cut ----------------------------------------------------------------


def per_layer_folder(folder: Path) -> None:
    tree, cfg = tiny.weights(), tiny.config()
    from flaxslim.checkpoint import to_flax

    params = to_flax(tree, cfg)
    from flaxslim._draw import plan

    chosen = plan(params, cfg, "all", width="per_layer")
    small, new = slim(params, cfg, plan=chosen)
    save(folder, small, new, record={"exact": True, "plan": chosen.to_dict(), "card": "Cut."})


def spoilt_layout(folder: Path, random: Random) -> None:
    """Only what is ours in the config is broken."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name in ("flaxslim_layout", "per_layer_config"):
        if name in values:
            with contextlib.suppress(ValueError, RecursionError):  # it is no JSON any more
                values[name] = json.loads(broken_json(json.dumps(values[name]), random))
    path.write_text(json.dumps(values))


def read_layout(folder: Path, random: Random) -> None:
    checkpoint = read(folder)
    cfg = checkpoint.config
    found = Layout.of(cfg)
    for path in flatten(checkpoint.params) if found else ():
        assert found is not None
        found.at(tuple(path.split("/")[:-1]))
    read_checkpoint(folder, random)


def read_record(folder: Path, random: Random) -> None:
    from flaxslim.checkpoint._card import section, with_section
    from flaxslim.checkpoint._folder import read_json
    from flaxslim.checkpoint._write import _card_of
    from flaxslim.cli import _slimming
    from flaxslim.cli._verify import _recorded_as_approximate

    checkpoint = read(folder)
    with contextlib.suppress(FlaxslimError):
        _slimming.read(folder)
    _recorded_as_approximate(checkpoint)
    with_section(_card_of(folder), section({"card": "Cut."}))
    Plan.from_dict(read_json(folder / "flaxslim.json").get("plan", {}))


def planned_folder(folder: Path) -> None:
    from flaxslim._draw import plan

    folder.mkdir()
    tree, cfg = tiny.weights(), tiny.config()
    from flaxslim.checkpoint._names import spec_named

    spec = spec_named(cfg, "all", "torch")
    chosen = plan(tree, cfg, spec, width="per_layer")
    (folder / "plan.json").write_text(chosen.to_json())
    (folder / "spec.json").write_text(spec.to_json())


def read_plan(folder: Path, random: Random) -> None:
    """A plan that is read is one that can be applied, or is refused."""
    from flaxslim._apply import apply, resized

    Spec.from_json((folder / "spec.json").read_text(encoding="utf-8", errors="replace"))
    text = (folder / "plan.json").read_text(encoding="utf-8", errors="replace")
    chosen = Plan.from_json(text)
    small = flatten(apply(chosen, tiny.weights()))
    for cut in chosen.cuts:
        for tensor in cut.site.cut:
            axis = cut.site.axis(tensor)
            size = tensor.axes.sizes(small[tensor.path].shape)[axis]
            assert size == cut.indices(tensor).shape[-1], tensor.path
    resized(chosen, tiny.config())
    assert str(chosen)


def journal_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / ".written.json").write_text(json.dumps({"what": "x", "found": {"a": "00", "b": "1"}}))
    (folder / "a").write_bytes(b"abc")


def read_journal(folder: Path, random: Random) -> None:
    from flaxslim.checkpoint._journal import Journal
    from flaxslim.checkpoint._leaf import Piece

    journal = Journal.of(folder, "x")
    assert not journal.has("a", [Piece.of(b"abc")])
    assert not journal.has("b", [Piece.of(b"abc")])


# --- Orbax ------------------------------------------------------------------------------------


def orbax_folder(**how: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import orbax.checkpoint as ocp

        rng = np.random.default_rng(0)
        mlp = {"wi": {"kernel": rng.standard_normal((6, 3, 8), np.float32)}}
        tree = {"params": {"decoder": mlp}, "step": 3, "name": "text"}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))

    return make


def spoilt_orbax(folder: Path, random: Random) -> None:
    json_files = ("_METADATA", "**/.zarray", "**/zarr.json", "_CHECKPOINT_METADATA", "_sharding")
    if random.random() < 0.6:
        by_json(*json_files)(folder, random)
    elif random.random() < 0.1:
        some(folder, ("**/*",), random).unlink()
    else:
        by_bytes("**/*", "**/.z*")(folder, random)


def read_orbax_tree(folder: Path, random: Random) -> None:
    from flaxslim.checkpoint._orbax_read import read_orbax

    for leaf in flatten(read_orbax(folder).tree).values():
        np.asarray(leaf)
