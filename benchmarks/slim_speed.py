"""How fast `slim` is, against one copy of the bytes that stay, both measured in one run.

    python benchmarks/slim_speed.py [bert] [gpt2] [llama]

Half of the channels of every FFN are dead, another random half in each layer. "copy" is the gather
of the kept kernels, by eager `jnp.take` or `np.take`, whichever is faster; it is told the indices,
while `slim` finds them and looks for NaN (its own gather is `jnp.take` with mode="clip", which is
faster than the default). Medians of interleaved runs. "peak" is the largest resident memory of the
process during the first call, XLA's compilation included, above what it held before.
"""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

REPEATS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A stack of FFNs: `layers` times width `f` on a stream of size `d`."""

    model_type: str
    d: int
    f: int
    layers: int


SHAPES = {
    "bert": Shape(model_type="bert", d=768, f=3072, layers=12),
    "gpt2": Shape(model_type="gpt2", d=768, f=3072, layers=12),
    # 1.06 GB and half of it in float32: is the time linear in size?
    "llama": Shape(model_type="llama", d=2048, f=5504, layers=8),
    "llama-half": Shape(model_type="llama", d=2048, f=5504, layers=4),
}


def config(shape: Shape) -> dict[str, Any]:
    key = {"bert": "intermediate_size", "gpt2": "n_inner", "llama": "intermediate_size"}
    act = {"bert": "hidden_act", "gpt2": "activation_function", "llama": "hidden_act"}
    kind = shape.model_type
    return {"model_type": kind, key[kind]: shape.f, act[kind]: "gelu", "n_embd": shape.d}


def tree(shape: Shape) -> tuple[Any, list[Any]]:
    """Random parameters with half of each FFN dead, and the indices that live."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*size: int) -> Any:
        return rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)

    layers, keeps = {}, []
    for i in range(shape.layers):
        dead = rng.permutation(shape.f)[: shape.f // 2]
        keeps.append(np.setdiff1d(np.arange(shape.f), dead))
        second = normal(shape.f, shape.d)
        second[dead] = 0
        first, bias = normal(shape.d, shape.f), normal(shape.f)
        if shape.model_type == "bert":
            layer = {
                "intermediate": {"dense": {"kernel": first, "bias": bias}},
                "output": {"dense": {"kernel": second, "bias": normal(shape.d)}},
            }
        elif shape.model_type == "gpt2":
            layer = {
                "mlp": {
                    "c_fc": {"kernel": first.T.copy(), "bias": bias},
                    "c_proj": {"kernel": second.T.copy(), "bias": normal(shape.d)},
                }
            }
        else:
            layer = {
                "mlp": {
                    "gate_proj": {"kernel": first},
                    "up_proj": {"kernel": normal(shape.d, shape.f)},
                    "down_proj": {"kernel": second},
                }
            }
        layers[str(i)] = layer
    root = {"bert": "encoder/layer", "gpt2": "h", "llama": "layers"}[shape.model_type]
    params: Any = layers
    for name in reversed(root.split("/")):
        params = {name: params}
    import jax

    return jax.tree.map(jnp.asarray, params), keeps


def copies(params: Any, keeps: list[Any], shape: Shape) -> list[tuple[Any, int, Any]]:
    """(kernel, axis, indices) of everything that `slim` has to copy."""
    from flaxslim.specs import spec_for

    sites = spec_for({"model_type": shape.model_type}).sites(params)
    from flaxslim._tree import flatten

    leaves = flatten(params)
    jobs = []
    for site, keep in zip(sites, keeps, strict=True):
        for t in site.cut:
            jobs.append((leaves[t.path], t.axes.flat(t.shape, "f", keep)[0], keep))
    return jobs


def timed(run: Callable[[], Any]) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) * 1e3


class Peak:
    """The largest resident memory of the process while it is entered, above that at entry."""

    def __enter__(self) -> "Peak":
        import psutil

        self._process = psutil.Process()
        self._before = self.bytes = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes -= self._before


def main(name: str) -> None:
    import warnings

    import jax.numpy as jnp
    import numpy as np

    import flaxslim

    shape = SHAPES[name]
    params, keeps = tree(shape)
    cfg = config(shape)

    def slim() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return flaxslim.slim(params, cfg)[0]

    with Peak() as peak:
        first = timed(slim)
    jobs = copies(params, keeps, shape)
    host = [(np.asarray(x), axis, keep) for x, axis, keep in jobs]
    kept = sum(x.nbytes // 2 for x, _, _ in jobs)

    ways = {
        "slim": slim,
        "find only": lambda: flaxslim.plan(params, cfg).removed,
        "jnp.take": lambda: [jnp.take(x, keep, axis=axis) for x, axis, keep in jobs],
        "np.take": lambda: [np.take(x, keep, axis=axis) for x, axis, keep in host],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, run in ways.items():
            times[way].append(timed(run))
    median = {way: float(np.median(values)) for way, values in times.items()}
    copy = min(median["jnp.take"], median["np.take"])
    print(
        f"{name:<11} {kept / 1e6:7.0f} {first:10.0f} {median['slim']:9.1f} "
        f"{median['find only']:9.1f} {median['jnp.take']:9.1f} {median['np.take']:9.1f} "
        f"{median['slim'] / copy:10.2f} {peak.bytes / kept:10.2f}",
        flush=True,
    )


if __name__ == "__main__":
    if os.environ.get("FLAXSLIM_BENCHMARK"):
        main(os.environ["FLAXSLIM_BENCHMARK"])
        sys.exit()
    print("FFN of        kept      first      slim      find  jnp.take   np.take ", end="")
    print(" slim/copy  peak/kept")
    print("                MB    call ms        ms        ms        ms        ms")
    for name in sys.argv[1:] or SHAPES:
        # A process each: the first call and the peak of memory are those of a fresh one.
        subprocess.run(
            [sys.executable, __file__], env={**os.environ, "FLAXSLIM_BENCHMARK": name}, check=True
        )
