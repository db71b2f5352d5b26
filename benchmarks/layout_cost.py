"""Sizes of each layer's own against one size for all, and against a module written by hand.

    python benchmarks/layout_cost.py [--layers 12] [--hidden 768]

A BERT encoder of which every layer loses another share of its FFN (5% to 95%) and of its heads.
One width for all layers keeps what the fullest layer needs; sizes of their own keep no more than
each needs. Traced and run side by side, in turns; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hand_written import by_hand
from transformers import BertConfig, FlaxBertModel
from transformers.models.bert.modeling_flax_bert import FlaxBertEncoder

import flaxslim
from flaxslim._compat import parameter_shapes
from flaxslim._tree import flatten, replace


class Stock(nn.Module):
    """The stock encoder, below the name that its parameters have."""

    config: Any

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        return FlaxBertEncoder(self.config, name="encoder")(*inputs)[0]


def pruned(cfg: Any) -> Any:
    """Random parameters, of which each layer has lost another share."""
    from flax.traverse_util import unflatten_dict

    rng = np.random.default_rng(0)
    shapes = flatten(parameter_shapes(FlaxBertModel, cfg))
    params = unflatten_dict(
        {
            path: np.ones(x.shape, np.float32)
            if path.endswith("scale")
            else 0.02 * rng.standard_normal(x.shape, dtype=np.float32)
            for path, x in shapes.items()
        },
        sep="/",
    )
    leaves, new = flatten(params), {}
    sites = flaxslim.spec_for(cfg, "all").sites(params, cfg)
    shares = rng.permutation(np.linspace(0.05, 0.95, len(sites)))
    for site, share in zip(sites, shares, strict=True):
        dead = rng.permutation(site.size)[: int(share * site.size)]
        kernel = leaves[site.second.path]
        new[site.second.path] = site.second.axes.zero(kernel, site.pair.axis, dead)
    return jax.tree.map(jnp.asarray, replace(params, new))


def alternately(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, called in turns so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if number:  # the first call fills the caches
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    cfg = BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        vocab_size=1000,
    )
    params = pruned(cfg)
    uniform = flaxslim.slim(params, cfg)
    per_layer = flaxslim.slim(params, cfg, "all", width="per_layer")
    encoder, hand_params = by_hand(per_layer[1], per_layer[0]["encoder"]["layer"])

    x = jnp.ones((1, 384, options.hidden))
    mask = jnp.ones((1, 384))
    heads = jnp.ones((options.layers, cfg.num_attention_heads))
    variables = {
        "dense": {"params": {"encoder": params["encoder"]}},
        "uniform": {"params": {"encoder": uniform[0]["encoder"]}},
        "per layer": {"params": {"encoder": per_layer[0]["encoder"]}},
        "by hand": hand_params,
    }
    modules = {
        "dense": Stock(cfg),
        "uniform": Stock(uniform[1]),
        "per layer": flaxslim.module(Stock, per_layer[1]),
        "by hand": encoder,
    }

    def traced(name: str) -> Callable[[], Any]:
        def run() -> Any:  # a new function each time, or the trace would be found in the cache
            jax.jit(lambda v: modules[name].apply(v, x, mask, heads)).trace(variables[name])
            return ()

        return run

    def called(name: str) -> Callable[[], Any]:
        jitted = jax.jit(lambda v: modules[name].apply(v, x, mask, heads))
        return lambda: jitted(variables[name])

    trace_ms = alternately({name: traced(name) for name in modules}, options.repeats)
    run_ms = alternately({name: called(name) for name in modules}, options.repeats)
    print(f"{options.layers} layers of {options.hidden}, float32, 1 x 384, {jax.devices()[0]}")
    print("encoder              MB   run ms   trace ms")
    for name in modules:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables[name])) / 1e6
        print(f"{name:<14} {size:9.1f} {run_ms[name]:8.1f} {trace_ms[name]:10.1f}")
    for what, taken in (("run", run_ms), ("trace", trace_ms)):
        print(
            f"{what}: per layer / by hand {taken['per layer'] / taken['by hand']:.2f}, "
            f"per layer / uniform {taken['per layer'] / taken['uniform']:.2f}, "
            f"per layer / dense {taken['per layer'] / taken['dense']:.2f}"
        )


if __name__ == "__main__":
    main()
