"""The proof one site at a time says yes to right cuts of every family, and no to wrong ones."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from kill import kill_by_every_rule
from zoo import CASES, Case, build

import flaxslim
from flaxslim import Pair, Plan, Spec, slim, verify_by_layer
from flaxslim._tree import flatten, replace
from flaxslim.specs import spec_for

ORDINARY = [case for case in CASES if case.short]


def dead_and_slim(case: Case) -> tuple[Any, Any, Any, Any, Plan]:
    _, cfg, params = build(case)
    unit = getattr(cfg, "attention_type", "") != "block_sparse"  # whose weights sum to more than 1
    sites = spec_for(cfg, "all").sites(params, cfg)
    params, _ = kill_by_every_rule(
        params, sites, high=0.9, folds=lambda site: unit and site.pair.fold_unless is None
    )
    chosen = flaxslim.plan(params, cfg, "all", width="per_layer")
    small, new = slim(params, cfg, plan=chosen)
    return params, cfg, small, new, chosen


@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_a_right_cut_is_proved_and_a_wrong_one_is_not(case: Case):
    params, cfg, small, new, chosen = dead_and_slim(case)
    proof = verify_by_layer((params, cfg), (small, new))
    proof.raise_if_failed()
    assert proof.relative <= 1e-5
    assert len(proof.outputs) == len(chosen.cuts) + 1
    assert proof.control is not None
    assert not proof.control.unseen
    assert proof.parameters.before is not None
    assert proof.parameters.after is not None
    assert proof.parameters.before - proof.parameters.after == chosen.removed_parameters

    cut = next(cut for cut in chosen.cuts if cut.width > 1 and cut.removed)
    row = cut.kept[0]
    gone = np.setdiff1d(np.arange(cut.site.size), row)
    wrong = np.sort([gone[0], *row[1:]])  # one that is dead in the place of one that lives
    keep = tuple(wrong.tolist())
    if cut.site.stack:
        keep = (keep, *cut.keep[1:])
    cuts = tuple(dataclasses.replace(c, keep=keep) if c is cut else c for c in chosen.cuts)
    other = flaxslim.apply(dataclasses.replace(chosen, cuts=cuts), params, fold=False)
    found = verify_by_layer((params, cfg), (other, new))
    assert not found.ok
    assert next(r for r in found.outputs if r.path == cut.site.second.path).relative > 1e-4


SPEC = Spec(name="MLP", pairs=Pair(first="up", second="down", activation="relu"))


def mlp(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tree: dict[str, Any] = {
        "up": {"kernel": rng.standard_normal((6, 9)), "bias": rng.standard_normal(9)},
        "down": {"kernel": rng.standard_normal((9, 5)), "bias": rng.standard_normal(5)},
        "norm": {"scale": rng.standard_normal(5)},
    }
    tree["down"]["kernel"][[1, 4]] = 0
    tree["up"]["kernel"][:, 7] = 0  # a constant, which is folded
    tree["up"]["bias"][7] = 0.5
    return tree


FAULTS: dict[str, tuple[str, Any, str]] = {
    "columns in another order": ("up/kernel", lambda x: x[:, ::-1], "none of those before"),
    "one number": ("up/kernel", lambda x: x + (x == x[2, 3]) * 1e-6, "none of those before"),
    "the bias": ("down/bias", lambda x: x + 1e-3, "differs by"),
    "another tensor": ("norm/scale", lambda x: x * 1.001, "belongs to no site"),
    "NaN": ("down/bias", lambda x: x * np.nan, "NaN after"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str):
    path, change, said = FAULTS[fault]
    tree = mlp()
    small, _ = slim(tree, None, SPEC)
    verify_by_layer((tree, None), (small, None), spec=SPEC).raise_if_failed()
    wrong = replace(small, {path: change(flatten(small)[path])})
    proof = verify_by_layer((tree, None), (wrong, None), spec=SPEC)
    assert not proof.ok
    assert any(said in reason for reason in proof.reasons), proof.reasons


def test_a_tensor_that_is_missing_is_named():
    tree = mlp()
    small, _ = slim(tree, None, SPEC)
    del small["norm"]
    assert "only the model before has it" in str(
        verify_by_layer((tree, None), (small, None), spec=SPEC)
    )
