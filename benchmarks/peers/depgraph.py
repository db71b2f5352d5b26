"""Torch-Pruning's dependency graph: it is told the layers, and the channels, that are dead."""

from typing import Any

import job
import torch
import torch_pruning as tp  # pyright: ignore[reportMissingImports]
from torch_bert import job_of


def slim(model: Any) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, torch.from_numpy(job.IDS[:1]))
    for layer in getattr(model, "bert", model).encoder.layer:
        dead = (layer.output.dense.weight == 0).all(dim=0).nonzero().flatten().tolist()
        up = layer.intermediate.dense
        graph.get_pruning_group(up, tp.prune_linear_out_channels, idxs=dead).prune()
    return model


if __name__ == "__main__":
    job.main(job_of(slim), "torch-pruning", "torch", "transformers", "numpy")
