"""Tiny models with dead channels, and what a command leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from zoo import CASES, build

from flaxslim._tree import flatten, replace
from flaxslim.specs import spec_for

# How many of the 72 channels of each layer are dead: the second layer decides about the width.
DEAD = (40, 32)
WIDTH = 72 - min(DEAD)

# The recipe of the digits, small enough that compiling is most of it.
RUN = (
    "model.config.hidden_size=16",
    "model.config.intermediate_size=24",
    "model.config.num_hidden_layers=1",
    "model.config.patch_size=4",
    "train.batch_size=8",
    "evaluation.batch_size=450",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def tiny(name: str, dead: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """Parameters and config of a case of the zoo; in each layer the first few channels dead."""
    _, cfg, params = build(next(case for case in CASES if str(case) == name))
    leaves, new = flatten(params), {}
    for site, count in zip(spec_for(cfg).sites(params), dead, strict=bool(dead)):
        path = site.second.path
        new[path] = site.second.axes.zero(leaves[path], "f", np.arange(count))
    return replace(params, new), cfg
