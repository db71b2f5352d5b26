"""Every family of transformers: dead channels go with no spec given, and nothing else changes."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from kill import Death, kill_by_every_rule
from zoo import CASES, Case, build

import flaxslim
from flaxslim._errors import WidthError
from flaxslim._inputs import inputs_for
from flaxslim._tree import flatten
from flaxslim.specs import spec_for

SLIMMABLE = [case for case in CASES if case.family != "bloom"]


def _marked(cases):
    return [
        pytest.param(case, id=str(case), marks=[] if _ordinary(case) else pytest.mark.long)
        for case in cases
    ]


def _ordinary(case: Case) -> bool:
    return case.short and not case.twin


def _stock(cls, folder):
    """`cls.from_pretrained` and the parameters that it loaded."""
    with flaxslim.clip_compat(), contextlib.redirect_stderr(None):
        try:
            _, params = cls.from_pretrained(folder, _do_init=False)
        except ValueError:  # the composite classes refuse `_do_init=False`
            params = cls.from_pretrained(folder).params
    return flatten(params)


def _check_found(
    params: Any, cfg: Any, deaths: Mapping[str, Sequence[Death]]
) -> dict[str, np.ndarray]:
    """Every dead channel was found by the rule it died for; returns them by site.

    With an activation that cannot be told from the config, rule (i) would do most of the work and
    nothing would be wrong but the sizes.
    """
    plan = flaxslim.plan(params, cfg)
    assert {cut.site.second.path for cut in plan.cuts} == set(deaths)
    dead = {}
    for cut in plan.cuts:
        site, died = cut.site, deaths[cut.site.second.path]
        folds = None not in (*site.first_biases, site.second_bias)
        rules = {"i", "ii" if site.pair.gated else "iii", *(["iv"] if folds else [])}
        counts = {r: sum(len(d.channels) for d in died if d.rule == r) for r in rules}
        assert dict(cut.rules) == counts, site.root
        dead[site.second.path] = np.concatenate([death.channels for death in died])
        assert {*range(site.size)}.difference(cut.keep) <= {*dead[site.second.path].tolist()}
    return dead


@pytest.mark.parametrize("case", _marked(SLIMMABLE))
def test_slimmed_model_is_the_same_function(case: Case, tmp_path, record_property):
    cls, cfg, params = build(case)
    sites = spec_for(cfg).sites(params)
    params, deaths = kill_by_every_rule(params, sites)
    dead = _check_found(params, cfg, deaths)
    slimmed, small = flaxslim.slim(params, cfg)

    needed: dict[str, int] = {}
    for site in sites:
        key = str(site.pair.width_expression)
        needed[key] = max(needed.get(key, 0), site.size - len(dead[site.second.path]))
    for site in spec_for(small).sites(slimmed):
        expression = site.pair.width_expression
        assert expression is not None
        step = expression.step(cfg)
        assert site.size == math.ceil(needed[str(expression)] / step) * step

    inputs = inputs_for(cls, cfg, length=case.length)
    proof = flaxslim.verify((params, cfg), (slimmed, small), cls, inputs=inputs, repeats=0)
    proof.raise_if_failed()
    assert proof.relative <= 1e-5
    assert proof.control is not None
    assert proof.control.smallest is not None
    assert len(proof.control.rows) == len(sites)
    # One wrong channel shows at every site, and at the best of them a thousand times over.
    assert proof.control.smallest > max(100 * proof.relative, proof.tolerance)
    assert max(row.relative for row in proof.control.rows) > 1000 * proof.relative

    for format in ("flax", "flax-safetensors"):
        folder = flaxslim.save(tmp_path / format, slimmed, small, format=format)
        loaded = _stock(cls, folder)
        for path, leaf in flatten(slimmed).items():
            np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)

    record_property(
        "family",
        (
            case.family,
            str(case),
            f"{sites[0].size} -> {', '.join(str(n) for n in needed.values())}",
            f"{proof.relative:.1e}",
            f"{proof.control.smallest:.1e}",
        ),
    )


@pytest.mark.parametrize("case", _marked(case for case in CASES if case.family == "bloom"))
def test_bloom_is_refused_until_layouts_carry_its_width(case: Case):
    _, cfg, params = build(case)
    params, deaths = kill_by_every_rule(params, spec_for(cfg).sites(params))
    _check_found(params, cfg, deaths)
    with pytest.raises(WidthError, match="hard-codes its width"):
        flaxslim.slim(params, cfg)
