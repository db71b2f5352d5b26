"""What the peers share: a stock PyTorch model, its outputs, and the ways in which one is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from job import IDS, Job, Way


def load(cls: Any, folder: Path) -> Any:
    """The model, all of it in memory: as it comes, its weights are still a view of the file."""
    model = cls.from_pretrained(folder)
    for x in model.parameters():
        x.data = x.data.clone()
    return model


def outputs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS))[0].numpy()


def job_of(slim: Callable[[Any], Any]) -> Callable[[str], Job]:
    """By the name of a class of transformers, the job that this function does."""

    def job(name: str) -> Job:
        cls = getattr(transformers, name)

        def from_pretrained(**how: Any) -> Way:
            return Way(
                write=lambda model, path: model.save_pretrained(path),
                read=lambda path: cls.from_pretrained(path, **how),
            )

        def torch_load(**how: Any) -> Way:
            return Way(write=torch.save, read=lambda path: torch.load(path, **how))

        return Job(
            load=lambda folder: load(cls, folder),
            slim=slim,
            parameters=lambda model: sum(x.numel() for x in model.parameters()),
            outputs=outputs,
            ways={
                "from_pretrained": from_pretrained(),
                "from_pretrained, ignore_mismatched_sizes": from_pretrained(
                    ignore_mismatched_sizes=True
                ),
                "torch.load": torch_load(),
                "torch.load, weights_only=False": torch_load(weights_only=False),
            },
        )

    return job
