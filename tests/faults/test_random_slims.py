"""Some of the slims of `random_slims.py`, and that it sees what is wrong."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from faults import random_slims
from faults.random_slims import Wrong, check_family, family, library, own


@pytest.mark.parametrize("make", [library, own])
def test_other_libraries_and_networks_of_our_own(make):
    for seed in range(25):
        make(np.random.default_rng(seed))


def test_families():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        check_family(family(rng), rng, whole=False)


@pytest.mark.long
def test_a_thousand():
    for number in range(1000):
        random_slims.one(1, number)


def _starts() -> Iterator[random_slims.Start]:
    """Models of which something is dead."""
    for seed in range(9):
        start = family(np.random.default_rng(seed))
        if not all(mask.all() for mask in start.living.values()):
            yield start


def test_a_channel_that_lives_and_goes_is_seen():
    start = next(_starts())
    living = {path: np.ones_like(mask) for path, mask in start.living.items()}
    with pytest.raises(Wrong):
        check_family(
            dataclasses.replace(start, living=living), np.random.default_rng(0), whole=False
        )


def test_a_dead_one_that_is_not_found_is_seen():
    start = next(s for s in _starts() if any(mask.any() for mask in s.living.values()))
    path = next(path for path, mask in start.living.items() if mask.any())
    mask = start.living[path].copy()
    mask[:, np.flatnonzero(mask[0])[0]] = False
    with pytest.raises(Wrong, match="dead are found"):
        check_family(
            dataclasses.replace(start, living={**start.living, path: mask}),
            np.random.default_rng(0),
            whole=False,
        )
