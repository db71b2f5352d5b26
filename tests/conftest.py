"""Shared settings: strict ranks, and the real data where it is at hand."""

import os
import pathlib

# Before jax is imported anywhere: tests run on CPU, whatever the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The folder of real checkpoints beside the project; tests that need it skip without."""
    if not DATA.is_dir():
        pytest.skip(f"no real checkpoints at {DATA}")
    return DATA
