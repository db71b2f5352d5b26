"""What a cut costs on a mesh: what moves between devices, and what each of them holds.

    python benchmarks/sharded.py            # 768 x 3072, half of the channels dead at random
    python benchmarks/sharded.py 4096 16384

For meshes of 1, 2, 4 and 8 devices (fake ones, of the CPU) and each way to lay out an FFN, the
programs that `apply` runs on its two kernels are compiled, and read. Moved: what one device sends,
by the collectives in the compiled text. Peak: what one device holds at once, arguments and results
among it, by XLA's own analysis of its memory. Both are of float32, and stand beside what XLA's own
gather (`jit(take)` with the same shardings) comes to. Kept: whether what `slim` gives back lies on
the same mesh by the same `PartitionSpec`.
"""

import argparse
import math
import os
import re
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from flaxslim import Pair, Spec, plan, slim
from flaxslim._mesh import gathering, on_mesh

MLP = Spec(name="MLP", pairs=Pair(first="up", second="down"))
# The specs of (up, down), whose patterns are "d f" and "f d"; a mesh of two axes for "both".
LAYOUTS = {
    "replicated": (P(), P()),
    "along f": (P(None, "x"), P("x", None)),  # tensor-parallel
    "along d": (P("x", None), P(None, "x")),  # fully sharded
    "f and d": (P("y", "x"), P("x", "y")),
}
_SENT = re.compile(r"= \(?(\w+?\d+)\[([\d,]*)\]\S* (collective-permute|all-reduce|all-gather)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("d", type=int, nargs="?", default=768)
    parser.add_argument("f", type=int, nargs="?", default=3072)
    ask = parser.parse_args()
    table = Table(title=f"an FFN of {ask.d} x {ask.f}, float32: megabytes of one device")
    for name in ("devices", "layout", "holds", "moved", "peak", "XLA: moved", "peak ", "kept"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for count in (1, 2, 4, 8):
        for layout, specs in LAYOUTS.items():
            if count >= {"replicated": 1, "f and d": 4}.get(layout, 2):
                table.add_row(str(count), layout, *row(ask.d, ask.f, count, specs))
    Console().print(table)


def row(d: int, f: int, count: int, specs: tuple[P, P]) -> list[str]:
    sides = (count // 2, 2) if "y" in (*specs[0], *specs[1]) else (count, 1)
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(sides), ("x", "y"))
    rng = np.random.default_rng(0)
    up, down = (rng.normal(size=size).astype(np.float32) for size in ((d, f), (f, d)))
    down[rng.permutation(f)[: f // 2]] = 0
    arrays = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((up, down), specs, strict=True)
    ]
    tree = {name: {"kernel": x} for name, x in zip(("up", "down"), arrays, strict=True)}
    (cut,) = plan(tree, spec=MLP).cuts
    small, _ = slim(tree, spec=MLP)
    kept = all(small[name]["kernel"].sharding == tree[name]["kernel"].sharding for name in tree)
    ours, xla = [], []
    for x, dimension in zip(arrays, (1, 0), strict=True):
        index = cut.kept

        def take(x: Any, dimension: int = dimension, index: Any = index) -> Any:
            return jnp.take(x, index[0], axis=dimension, mode="clip")

        xla.append(cost(jax.jit(take, out_shardings=x.sharding), (x,)))
        ours.append(cost(*gathering(x, dimension, index)) if on_mesh(x) else xla[-1])
    holds = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in arrays)
    numbers = [holds]
    for found in (ours, xla):
        # One kernel is cut after the other.
        numbers += [sum(moved for moved, _ in found), max(peak for _, peak in found)]
    return [*(f"{number / 1e6:,.2f}" for number in numbers), "yes" if kept else "NO"]


def cost(program: Any, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """What a device sends, and the most that it holds at once; in bytes."""
    compiled = program.lower(*arguments).compile()
    moved = sum(
        int(re.sub(r"\D", "", kind)) // 8 * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape, _ in _SENT.findall(compiled.as_text())
    )
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return moved, peak


if __name__ == "__main__":
    main()
