"""Every family of transformers: dead channels go with no spec given, and nothing else changes."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from kill import Death, kill_by_every_rule
from zoo import CASES, Case, build, check_proven

import flaxslim
from flaxslim import Site
from flaxslim._compat import parameter_shapes
from flaxslim._inputs import inputs_for
from flaxslim._tree import flatten
from flaxslim.errors import WidthError
from flaxslim.specs import spec_for

SLIMMABLE = [case for case in CASES if case.family != "bloom"]


# One for each way in which a config says its widths. In the ordinary run the others are proven
# layer by layer, and as a whole at widths of each layer's own (test_families_per_layer.py).
WHOLE = (
    "FlaxBartForConditionalGeneration",
    "FlaxBertForMaskedLM",
    "FlaxCLIPModel",
    "FlaxDinov2ForImageClassification-mlp",
    "FlaxDinov2ForImageClassification-swiglu",
    "FlaxDistilBertForMaskedLM",
    "FlaxEncoderDecoderModel-bert+gpt2",
    "FlaxGPTNeoForCausalLM-none",
    "FlaxLlamaForCausalLM",
    "FlaxOPTForCausalLM",
    "FlaxT5ForConditionalGeneration-gated",
)


def _marked(cases):
    return [
        pytest.param(case, id=str(case), marks=[] if str(case) in WHOLE else pytest.mark.long)
        for case in cases
    ]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slimmed:
    """A model with dead channels, and what is left of it; `needed` channels by width."""

    params: Any
    cfg: Any
    slimmed: Any
    small: Any
    sites: Sequence[Site]
    needed: Mapping[str, int]


def _slimmed(case: Case) -> Slimmed:
    """With no spec given; each site has the width that was asked for."""
    _, cfg, params = build(case)
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
    return Slimmed(params=params, cfg=cfg, slimmed=slimmed, small=small, sites=sites, needed=needed)


@pytest.mark.parametrize("case", [case for case in SLIMMABLE if case.short], ids=str)
def test_each_slimmed_layer_is_the_same_and_the_stock_class_has_its_sizes(case: Case):
    made = _slimmed(case)
    proof = flaxslim.verify_by_layer((made.params, made.cfg), (made.slimmed, made.small))
    proof.raise_if_failed()
    assert proof.relative <= 1e-5
    shapes = {path: x.shape for path, x in flatten(parameter_shapes(case.cls, made.small)).items()}
    assert {path: np.shape(x) for path, x in flatten(made.slimmed).items()} == shapes


@pytest.mark.parametrize("case", _marked(SLIMMABLE))
def test_slimmed_model_is_the_same_function(case: Case, tmp_path, record_property):
    made, cls = _slimmed(case), case.cls
    slimmed, small = made.slimmed, made.small
    inputs = inputs_for(cls, made.cfg, length=case.length)
    before, after = (made.params, made.cfg), (slimmed, small)
    proof = flaxslim.verify(before, after, cls, inputs=inputs, repeats=0)
    control = check_proven(proof, len(made.sites))
    # At the best of the sites it shows a thousand times over.
    assert max(row.relative for row in control.rows) > 1000 * proof.relative

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
            f"{made.sites[0].size} -> {', '.join(str(n) for n in made.needed.values())}",
            f"{proof.relative:.1e}",
            f"{control.smallest:.1e}",
        ),
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.family == "bloom"], ids=str)
def test_bloom_is_refused_until_layouts_carry_its_width(case: Case):
    _, cfg, params = build(case)
    params, deaths = kill_by_every_rule(params, spec_for(cfg).sites(params))
    _check_found(params, cfg, deaths)
    with pytest.raises(WidthError, match="hard-codes its width"):
        flaxslim.slim(params, cfg)
