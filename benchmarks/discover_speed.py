"""How long `discover` takes on real shapes, and how that grows with the model.

    python benchmarks/discover_speed.py [NAME...]

No weights are made: the stock Flax classes are traced on shapes, each model in a fresh process.
"trace" is JAX's own tracing of the class, "walk" following the axes through the jaxpr, grouping
them and writing the pairs, "retrace" tracing at other widths and comparing (the heads of a stock
class refuse these, its other layers do not), all three medians of later calls; "all" is the call of
`discover` as a user makes it, the first of the process. "peak" is the largest resident memory of
the process during that call, above what it held before, with all modules imported and the shapes at
hand.
"""

import dataclasses
import functools
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

REPEATS = 5
LAYERS = (6, 12, 24, 48, 96)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A stock class at the sizes of a well-known model."""

    cls: str
    config: str
    sizes: Mapping[str, Any]


MODELS = {
    "bert-base": Model(cls="FlaxBertModel", config="BertConfig", sizes={}),
    "gpt2-xl": Model(
        cls="FlaxGPT2LMHeadModel",
        config="GPT2Config",
        sizes={"n_embd": 1600, "n_layer": 48, "n_head": 25},
    ),
    "llama-70b": Model(
        cls="FlaxLlamaForCausalLM",
        config="LlamaConfig",
        sizes={
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}


def stock(cls_name: str, config_name: str, sizes: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The function of a stock class, the shapes of its parameters, and inputs."""
    import transformers

    from flaxslim._compat import shell
    from flaxslim._inputs import inputs_for

    cls, cfg = getattr(transformers, cls_name), getattr(transformers, config_name)(**sizes)
    model: Any = shell(cls, cfg)

    def fn(params: Any, inputs: Any) -> Any:
        return model(**inputs, params=params, train=False)

    return fn, model.params_shape_tree, inputs_for(cls, cfg)


def bert(layers: int) -> tuple[Any, Any, Any]:
    """A narrow BERT of many layers: what is followed are equations, not numbers."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return stock("FlaxBertModel", "BertConfig", {"num_hidden_layers": layers, **sizes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of the parts of a discovery, and the number of equations."""

    trace: float
    walk: float
    retrace: float
    equations: int

    @property
    def whole(self) -> float:
        return self.trace + self.walk + self.retrace


def parts(fn: Any, params: Any, *inputs: Any) -> Times:
    """A discovery part by part."""
    from flaxslim._discover import _discovery
    from flaxslim._discover._function import Function, function
    from flaxslim._discover._trace import Walk

    seconds = {"trace": 0.0}
    runs: list[Any] = []  # what was walked, once that is tried at other widths
    stock_jaxpr, stock_tried = Function.jaxpr, _discovery._tried

    def jaxpr(self: Any, shapes: Any = None) -> Any:
        start = time.perf_counter()
        closed = stock_jaxpr(self, shapes)
        if not runs:
            seconds["trace"] += time.perf_counter() - start
        return closed

    def tried(*args: Any) -> Any:
        runs.append(args[0].walk)
        start = time.perf_counter()
        result = stock_tried(*args)
        seconds["retrace"] = time.perf_counter() - start
        return result

    from unittest.mock import patch

    with patch.object(Function, "jaxpr", jaxpr), patch.object(_discovery, "_tried", tried):
        start = time.perf_counter()
        _discovery.discovered(function(fn, params, inputs))
        whole = time.perf_counter() - start
    walk: Walk = runs[0]
    return Times(
        trace=seconds["trace"],
        walk=whole - sum(seconds.values()),
        retrace=seconds["retrace"],
        equations=walk.order,
    )


def medians(runs: Mapping[Any, Callable[[], Times]], *, collect: bool = False) -> dict[Any, Times]:
    """The median of each, run in turns so that a busy machine slows all alike.

    The first of each fills JAX's caches. Python's garbage collector is off unless `collect`: it
    falls now into one part, now into another.
    """
    found: dict[Any, list[Times]] = {name: [] for name in runs}
    for number in range(REPEATS + 1):
        for name, run in runs.items():
            gc.collect()
            if not collect:
                gc.disable()
            times = run()
            gc.enable()
            found[name] += [times] if number else []
    return {
        name: Times(
            trace=statistics.median(t.trace for t in times),
            walk=statistics.median(t.walk for t in times),
            retrace=statistics.median(t.retrace for t in times),
            equations=times[0].equations,
        )
        for name, times in found.items()
    }


# --- a model in a process of its own ------------------------------------------------------------


def one(name: str) -> None:
    """A row: the first call of the process, its peak, and the parts of later ones."""
    from slim_speed import Peak

    import flaxslim

    model = MODELS[name]
    fn, params, inputs = stock(model.cls, model.config, model.sizes)
    flaxslim.discover(lambda p, x: x @ p["a"] @ p["b"], *tiny())  # imports what it needs
    start = time.perf_counter()
    with Peak() as peak:
        spec = flaxslim.discover(fn, params, inputs)
    first = time.perf_counter() - start
    times = medians({name: functools.partial(parts, fn, params, inputs)})[name]
    print(
        f"{name:<10} {first:7.2f} {times.trace:8.2f} {times.walk:8.2f} {times.retrace:8.2f} "
        f"{peak.bytes / 1e6:9.0f} {times.equations:10,} {len(list(spec)):6}",
        flush=True,
    )


def tiny() -> tuple[Any, Any]:
    import jax

    shape = jax.ShapeDtypeStruct((2, 2), "float32")
    return {"a": shape, "b": shape}, shape


# --- how it grows -------------------------------------------------------------------------------


def growth() -> None:
    """Seconds for more and more layers, and the exponent of time in equations."""
    import numpy as np

    runs = {layers: functools.partial(parts, *bert(layers)) for layers in LAYERS}
    found, collected = medians(runs), medians(runs, collect=True)
    print("\nBERT layers  equations   all s  trace s    walk s  retrace s")
    for layers, times in found.items():
        print(
            f"{layers:11} {times.equations:10,} {times.whole:7.2f} {times.trace:8.2f} "
            f"{times.walk:9.3f} {times.retrace:10.2f}",
            flush=True,
        )
    equations = np.log([t.equations for t in found.values()])
    for name, seconds in (
        ("all", [t.whole for t in found.values()]),
        ("walk", [t.walk for t in found.values()]),
        ("all, garbage collected", [t.whole for t in collected.values()]),
    ):
        exponent = np.polyfit(equations, np.log(seconds), 1)[0]
        print(f"{name}: seconds grow as equations to the power of {exponent:.2f}")


def stack(layers: int) -> tuple[Any, Any, Any]:
    """A scanned stack of gated layers with attention."""
    import jax
    import jax.numpy as jnp

    d, f, heads = 64, 96, 4

    def fn(p: Any, x: Any) -> Any:
        def layer(x: Any, p: Any) -> Any:
            q, k, v = ((x @ p[name]).reshape(*x.shape[:2], heads, -1) for name in "qkv")
            weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
            x = x + jnp.einsum("bhts,bshk->bthk", weights, v).reshape(x.shape) @ p["o"]
            return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

        return jax.lax.scan(layer, x, p)[0]

    sizes = dict.fromkeys("qkvo", (d, d)) | {"gate": (d, f), "up": (d, f), "down": (f, d)}
    params = {
        name: jax.ShapeDtypeStruct((layers, *size), "float32") for name, size in sizes.items()
    }
    return fn, params, jax.ShapeDtypeStruct((2, 8, d), "float32")


def scan() -> None:
    runs = {layers: functools.partial(parts, *stack(layers)) for layers in (1, 96)}
    few, many = (times.whole for times in medians(runs).values())
    print(
        f"\na scanned stack: {1e3 * few:.0f} ms with one layer, {1e3 * many:.0f} ms with 96: ratio "
        f"{many / few:.2f}"
    )


def main(names: list[str]) -> None:
    print("model        all s  trace s   walk s  retrace s  peak MB  equations  pairs")
    for name in names or MODELS:
        # A process each: the first call and the peak of memory are those of a fresh one.
        subprocess.run(
            [sys.executable, __file__], env={**os.environ, "FLAXSLIM_BENCHMARK": name}, check=True
        )
    if not names:
        growth()
        scan()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")  # of what cannot be traced at other widths
    if os.environ.get("FLAXSLIM_BENCHMARK"):
        one(os.environ["FLAXSLIM_BENCHMARK"])
    else:
        main(sys.argv[1:])
