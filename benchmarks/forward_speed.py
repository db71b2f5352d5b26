"""Latency of a BERT-base-shaped FlaxBertModel, dense against slimmed, beside what FLOPs predict.

    python benchmarks/forward_speed.py [--layers 12] [--dtype float32|bfloat16]

Half, then nine tenths, of the channels of every FFN are dead. Both models run interleaved in one
process, at batch x length (1, 384) and (8, 128); medians.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from transformers import BertConfig, FlaxBertModel

import flaxslim
from flaxslim._compat import parameter_shapes
from flaxslim._proof import Change
from flaxslim._tree import flatten, replace


def pruned(cfg: Any, share: float) -> Any:
    """Random parameters with a share of each FFN's channels dead, another set in each layer."""
    rng = np.random.default_rng(0)
    shapes = flatten(parameter_shapes(FlaxBertModel, cfg))
    params = unflatten_dict(
        {
            path: np.ones(x.shape, np.float32)
            if path.endswith("scale")  # of a LayerNorm
            else 0.02 * rng.standard_normal(x.shape, dtype=np.float32)
            for path, x in shapes.items()
        },
        sep="/",
    )
    leaves = flatten(params)
    new = {}
    for site in flaxslim.BERT_FFN.sites(params):
        dead = rng.permutation(site.size)[: round(share * site.size)]
        new[site.second.path] = site.second.axes.zero(leaves[site.second.path], "f", dead)
    return replace(params, new)


def gain(change: Change) -> float:
    return 1 / change.ratio if change.ratio else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    dtype = jnp.dtype(options.dtype)
    cfg = BertConfig(num_hidden_layers=options.layers)
    device = jax.devices()[0]
    print(f"{options.layers} layers, {dtype}, {device.device_kind} ({device.platform})")
    print("channels      inputs  dense ms  slim ms  ratio  FLOPs say  difference  equal")
    for share in (0.5, 0.9):
        params = pruned(cfg, share)
        small, small_cfg = flaxslim.slim(params, cfg)
        if dtype == jnp.bfloat16:
            params, small = (jax.tree.map(lambda x: x.astype(dtype), p) for p in (params, small))
        for batch, length in ((1, 384), (8, 128)):
            ids = np.random.default_rng(1).integers(1000, cfg.vocab_size, (batch, length))
            proof = flaxslim.verify(
                (params, cfg),
                (small, small_cfg),
                FlaxBertModel,
                inputs={"input_ids": ids},
                dtype=dtype,
                repeats=options.repeats,
            )
            ms = proof.milliseconds
            print(
                f"{cfg.intermediate_size} -> {small_cfg.intermediate_size:<5} {batch} x {length:<4}"
                f"{ms.before:9.1f} {ms.after:8.1f} {gain(ms):6.2f} "
                f"{gain(proof.flops):10.2f} {proof.relative:11.1e}  {proof.ok}",
                *proof.reasons,
                flush=True,
            )


if __name__ == "__main__":
    main()
