"""The stock classes of transformers rely on rank promotion, which the other tests forbid."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _stock_rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
