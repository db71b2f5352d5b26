"""A MaxText-shaped Orbax checkpoint, slimmed: how long, and in how much memory.

    python benchmarks/orbax_convert.py                     # 2 GB, saved on 1 device and on 8
    python benchmarks/orbax_convert.py --gigabytes 0.2

Layers are scanned on axis 1; half of the FFN channels of each are dead, others in each layer. The
conversion runs in a process of its own, whose largest resident memory is shown, with that of one
which only imports the same; `cp -r` of the dense checkpoint and a save by Orbax of the slimmed
arrays, which has them all in memory, stand beside it. A restored kernel is compared with what
`flaxslim.apply` makes of the dense one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

D, LAYERS, VOCABULARY = 1024, 16, 8192


def params(f: int) -> dict[str, Any]:
    """Random kernels, half of whose channels are dead."""
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    wo = normal(f, LAYERS, D)
    for layer in range(LAYERS):
        wo[rng.permutation(f)[: f // 2], layer] = 0
    up = {name: {"kernel": normal(D, LAYERS, f)} for name in ("wi_0", "wi_1")}
    layers = {"mlp": {**up, "wo": {"kernel": wo}}}
    embedding = normal(VOCABULARY, D)
    return {"params": {"decoder": {"layers": layers}, "token_embedder": {"embedding": embedding}}}


def write(folder: str, f: int) -> None:
    """Save it by Orbax, each kernel split over all devices."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("tensor",))

    def placed(keys: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(keys)
        spec = ("tensor",) if "wo" in name else (None, None, "tensor") if "wi" in name else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, jax.tree_util.tree_map_with_path(placed, params(f)))


def convert(source: str, target: str, f: int) -> None:
    import orbax.checkpoint  # noqa: F401  (counted among the imports)

    from flaxslim import MAXTEXT_FFN
    from flaxslim.checkpoint import convert_orbax

    cfg = {"base_mlp_dim": f, "mlp_activations": ["silu", "linear"]}
    begin, before = time.perf_counter(), _peak()
    convert_orbax(source, target, MAXTEXT_FFN, cfg)
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak": _peak(), "idle": before}))


def save_whole(source: str, target: str) -> None:
    """Restore a checkpoint and save it: what its arrays cost in Orbax alone."""
    import orbax.checkpoint as ocp

    begin, before = time.perf_counter(), _peak()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, checkpointer.restore(source))
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak": _peak(), "idle": before}))


def _peak() -> int:
    """By Linux, which counts anew for each program; getrusage would count the parent's, too."""
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


def _run(*arguments: str, devices: int = 1) -> dict[str, float]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__, "--step", *arguments], env=env, stdout=subprocess.PIPE, text=True
    )
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def _check(source: Path, target: Path) -> None:
    """One kernel of the new checkpoint, read by plain Orbax."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from flaxslim.checkpoint import orbax_abstract

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    trees: list[Any] = [
        ocp.StandardCheckpointer().restore(path, orbax_abstract(path, sharding=here))
        for path in (source, target)
    ]
    old, new = (tree["params"]["decoder"]["layers"]["mlp"]["wo"]["kernel"] for tree in trees)
    for layer in range(LAYERS):
        alive = np.asarray(old[:, layer]).any(axis=1)
        np.testing.assert_array_equal(np.asarray(old[:, layer])[alive], new[:, layer])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--step", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, *rest = args.step
        {"write": write, "convert": convert, "save": save_whole}[name](
            *(int(x) if x.isdigit() else x for x in rest)
        )
        return
    room = args.gigabytes * 1e9 - 4 * VOCABULARY * D
    f = max(int(room / (3 * 4 * D * LAYERS)) // 16 * 16, 16)
    table = Table("saved on", "what", "seconds", "largest memory", "of the dense checkpoint")
    with tempfile.TemporaryDirectory() as top:
        for devices in (1, 8):
            source, target = Path(top) / f"dense{devices}", Path(top) / f"slim{devices}"
            _run("write", str(source), str(f), devices=devices)
            size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
            begin = time.perf_counter()
            subprocess.run(["cp", "-r", source, Path(top) / "copy"], check=True)
            subprocess.run(["sync", Path(top) / "copy"], check=True)
            where = f"{devices} device{'s' * (devices > 1)}"
            table.add_row(where, f"cp -r ({decimal(size)})", f"{time.perf_counter() - begin:.1f}")
            subprocess.run(["rm", "-r", Path(top) / "copy"], check=True)
            rows = [
                ("flaxslim, half of the FFN", _run("convert", str(source), str(target), str(f))),
                ("Orbax, restore and save that", _run("save", str(target), str(target) + "again")),
            ]
            for what, row in rows:
                share = (row["peak"] - row["idle"]) / size
                seconds, peak = f"{row['seconds']:.1f}", decimal(int(row["peak"]))
                table.add_row("", what, seconds, peak, f"{share:.0%} above {_idle(row)}")
            _check(source, target)
            subprocess.run(["rm", "-r", source, target, f"{target}again"], check=True)
    Console(width=110).print(table)


def _idle(row: dict[str, float]) -> str:
    return f"{decimal(int(row['idle']))} of imports"


if __name__ == "__main__":
    main()
