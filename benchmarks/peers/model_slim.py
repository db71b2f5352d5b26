"""Intel Neural Compressor's `model_slim`: it finds the layers, and the dead channels, by itself."""

import job
from neural_compressor.compression.pruner import (  # pyright: ignore[reportMissingImports]
    model_slim,
)
from torch_bert import job_of

if __name__ == "__main__":
    job.main(job_of(model_slim), "neural-compressor", "torch", "transformers", "numpy")
