"""flaxslim's `slim`: it finds the layers, and the dead channels, by itself."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import job
import numpy as np
import transformers

import flaxslim

Model = tuple[Any, Any]  # parameters and config


def job_of(name: str) -> job.Job:
    """By the name of PyTorch's class, the job that `slim` does for Flax's."""
    cls = getattr(transformers, f"Flax{name}")

    def load(folder: Path) -> Model:
        params, cfg = flaxslim.load(folder)
        return jax.tree.map(jnp.array, params), cfg

    def loaded(folder: Path) -> Model:
        model = cls.from_pretrained(folder)
        return model.params, model.config

    def outputs(model: Model) -> np.ndarray:
        params, cfg = model
        return np.asarray(cls(cfg, _do_init=False)(job.IDS, params=params)[0])

    return job.Job(
        load=load,
        slim=lambda model: jax.block_until_ready(flaxslim.slim(*model)),
        parameters=lambda model: sum(x.size for x in jax.tree.leaves(model[0])),
        outputs=outputs,
        ways={
            "from_pretrained": job.Way(
                write=lambda model, to: flaxslim.save(to, *model), read=loaded
            )
        },
    )


if __name__ == "__main__":
    job.main(job_of, "flaxslim", "jax", "transformers", "numpy")
