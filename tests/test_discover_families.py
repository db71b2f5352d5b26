"""`discover` against every spec that a person wrote, and what it finds against the functions.

The specs were written and proven by hand, family by family; discovery sees a trace and knows none
of them. What it finds more, or refuses, is said in `EXTRA` and `REFUSED`, with the reason.
"""

import json
import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_libraries
from crosscheck import Traced, check_cut, gap, matched, traced
from flax import nnx
from flax.traverse_util import unflatten_dict
from resized import run
from strategies import enable_x64
from test_libraries import DEPTH, LIBRARIES, SIZES, Library
from zoo import CASES, Case, build

import flaxslim
from flaxslim._activation import activation
from flaxslim._compat import parameter_shapes, shell
from flaxslim._discover._discovery import discovered
from flaxslim._discover._function import function
from flaxslim._discover._groups import Verdict
from flaxslim._inputs import inputs_for, model_class_for
from flaxslim._spec import Site
from flaxslim._tree import flatten
from flaxslim.checkpoint import read
from flaxslim.errors import ConfigError, WidthError
from flaxslim.specs import spec_for
from flaxslim.specs._libraries import NNX_HEADS

# fmt: off
# Sites of the specs that discovery refuses: the case, the second layer, and why.
REFUSED = (
    ("Bloom", "self_attention/dense",
     "the slopes of ALiBi are constants in the code, one for each head by its number"),
    ("BigBird.*-sparse", "attention/output/dense",
     "the blocks that a head looks at are constants in the code, drawn for each head"),
    ("BartForCausalLM", "encoder_attn/out_proj",
     "a decoder alone has the weights of a cross-attention that it never runs"),
)
# Pairs that no spec has: the case, the second layer, and why not.
_TIED = "a hidden layer of a head, which the class makes as wide as the hidden size"
EXTRA = (
    ("(MultipleChoice|SequenceClassification)", "(^|/)classifier(/out_proj)?$", _TIED),
    ("(Bart|MBart)ForSequenceClassification", "classification_head/out_proj$", _TIED),
    ("AlbertForPreTraining", "sop_classifier/classifier$", _TIED),
    ("(PreTraining|NextSentencePrediction)", "cls/seq_relationship$", _TIED),
    ("ElectraForPreTraining", "discriminator_predictions/dense_prediction$", _TIED),
    ("Whisper", "encoder/conv2$", "the class makes its first convolution as wide as d_model"),
    ("BigBird.*-sparse", "attention/output/dense$",
     "what a head holds: where jax stacks by concatenating, its heads are parts laid end to end"),
    ("OPT.*-post", "decoder/project_in$",
     "word_embed_proj_dim: the width of the embeddings, which is no hidden layer"),
)
# Exact groups inside of others that are not what a head holds, by the tensors that they are in.
INNER = (
    ("Wav2Vec2ForPreTraining", {"project_q/kernel", "quantizer/codevectors"},
     "the width of a codevector in each of its groups"),
)
# fmt: on
_POINTS = np.linspace(-8, 8, 101)


def _reasons(table: tuple[tuple[str, str, str], ...], case: object, sites: list[Site]) -> list[str]:
    """The second layers that a table has no reason for."""
    return [
        site.second.path
        for site in sites
        if not any(
            re.search(name, str(case)) and re.search(layer, site.second.path[: -len("/kernel")])
            for name, layer, _ in table
        )
    ]


# --- the families of transformers -------------------------------------------------------------


def _call(cls: type, cfg: Any) -> Any:
    """The stock class as a function of parameters and inputs."""
    model = shell(cls, cfg)

    def forward(params: Any, inputs: Mapping[str, Any]) -> Any:
        with flaxslim.clip_compat():
            return model(**inputs, params=params, train=False)

    return forward


def _traced(cls: type, cfg: Any, params: Any, length: int | None) -> Traced:
    return traced(_call(cls, cfg), params, inputs_for(cls, cfg, length=length))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            case,
            id=str(case),
            marks=[] if case.short and not case.twin else pytest.mark.long,
        )
        for case in CASES
    ],
)
def family(request) -> tuple[Case, Any, Any, Traced]:
    """A case, its config and parameters, and what was discovered of it: once for all its tests."""
    cls, cfg, params = build(request.param)
    return request.param, cfg, params, _traced(cls, cfg, params, request.param.length)


def test_every_site_of_a_family_is_found(family):
    case, cfg, params, made = family
    theirs = spec_for(cfg, "all").sites(params, cfg)
    pairs, missing, extra = matched(theirs, made.sites)
    assert not _reasons(REFUSED, case, missing)
    for name, layer, why in REFUSED:  # none of them is out of date
        if re.search(name, str(case)):
            assert any(re.search(layer, site.second.path) for site in missing), why
    assert not _reasons(EXTRA, case, extra)
    assert pairs
    for site, found in pairs:
        _check_alike(site, found, cfg)
    assert not made.discovery.unknown


def test_what_lies_inside_of_other_axes_are_the_channels_of_heads(family):
    case, cfg, params, made = family
    heads = [{t.path for t in s.cut} for s in spec_for(cfg, "heads").sites(params, cfg)]
    for group in made.discovery.groups:
        if group.verdict is Verdict.INNER:
            known = [own for name, own, _ in INNER if re.search(name, str(case))]
            assert any({*group.paths} <= own for own in (*heads, *known)), group.paths


def test_what_is_exact_in_a_family_can_be_cut(family, record_property):
    case, _, params, made = family
    result = check_cut(made, params)
    exact = made.groups(Verdict.EXACT)
    record_property(
        "family",
        (
            case.family,
            str(case),
            f"{len(exact)} groups",
            f"{result.difference:.1e}",
            f"{result.control:.1e}",
        ),
    )


def _check_alike(site: Site, found: Site, cfg: Any) -> None:
    """The same activation, where one was found: of an FFN and of plain attention it always is."""
    ours, pair = found.pair, site.pair
    where = f"{found.second.path}: {ours}"
    # Groups of one head each, or one of all, are as good as none.
    sizes = [one.groups if 1 < len(one.groups) < one.size else () for one in (found, site)]
    assert found.size == site.size, where
    assert sizes[0] == sizes[1], where
    if ours.activation is None:
        # What a router weighs between is no function of the channel alone, and LongT5 lays its
        # keys end to end before it averages the values. Of several queries for one key and value
        # the values have no axis of heads.
        unclear = "e" in site.second.axes.names or re.search("(Local|Global)Self", where)
        alone = pair.axis == "h" and not {t.path for t in site.first} & {t.path for t in found.cut}
        assert pair.activation is None or unclear or alone, where
        return
    act = activation(pair.activation, cfg, pair.config)
    mine = activation(ours.activation, cfg)
    assert mine is not None, where
    if act is not None:
        np.testing.assert_allclose(mine(_POINTS), act(_POINTS), atol=1e-5, err_msg=where)
    assert ours.parts == pair.parts, where
    assert (ours.gated, len(ours.firsts)) == (pair.gated, len(pair.firsts)), where


# The evaluator itself, against JAX in float32.
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPTJForCausalLM-inner", "Wav2Vec2ForCTC"])
def test_a_jaxpr_runs_on_the_host_as_on_the_device(name):
    case = next(case for case in CASES if str(case) == f"Flax{name}")
    cls, cfg, params = build(case)
    made = _traced(cls, cfg, params, case.length)
    leaves = {path: np.asarray(x) for path, x in flatten(params).items()}
    ours = run(made.walked, leaves, made.function.inputs)
    inputs = inputs_for(cls, cfg, length=case.length)
    theirs = jax.tree.leaves(jax.jit(_call(cls, cfg))(params, inputs))
    assert gap([np.asarray(x, np.float64) for x in theirs], ours) < 1e-5


# --- the keys of their configs ----------------------------------------------------------------

# What is not found as the specs have it.
KEYS = {
    "FlaxBloomForCausalLM": {"4*hidden_size": None},  # hard-coded: no key says another
    # A multiple of the hidden size, which no one key changes alone in the plain one.
    "FlaxDinov2ForImageClassification-mlp": {"mlp_ratio*hidden_size": None},
    "FlaxDinov2ForImageClassification-swiglu": {"swiglu(mlp_ratio*hidden_size)": None},
}
ORDINARY = (
    "BartForConditionalGeneration", "BloomForCausalLM", "Dinov2ForImageClassification-mlp",
    "GPT2LMHeadModel-none", "GPT2LMHeadModel-inner", "GemmaForCausalLM-grouped",
    "EncoderDecoderModel-bert+gpt2",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str(c), marks=[] if str(c)[4:] in ORDINARY else pytest.mark.long)
        for c in CASES
        if c.short
    ],
)
def test_the_key_of_a_width_is_found(case: Case):
    cls, cfg = case.cls, case.config()
    shapes = parameter_shapes(cls, cfg)
    own = function(_call(cls, cfg), shapes, (inputs_for(cls, cfg, length=case.length),))
    found = discovered(own, cfg, lambda cfg: parameter_shapes(cls, cfg))
    sites = found.spec("DISCOVERED").sites(shapes, cfg)
    pairs, _, _ = matched(spec_for(cfg).sites(shapes, cfg), sites)
    exceptions = KEYS.get(str(case), {})
    for site, other in pairs:
        key = str(site.pair.width_expression)
        mine = other.pair.width and str(other.pair.width_expression)
        # "n_inner or 4*n_embd" is n_inner where that is set.
        assert mine == exceptions.get(key, key) or (mine and key.startswith(f"{mine} or ")), key
        assert activation(other.pair.activation, cfg) is not None
    # Of heads, whether the class can be told how many there are.
    pairs, _, _ = matched(spec_for(cfg, "heads").sites(shapes, cfg), sites)
    for site, other in pairs:
        known = other.pair.width is not None and not other.groups
        assert not known or other.pair.fixed == site.pair.fixed, other.pair


@pytest.fixture(scope="module")
def classifier() -> tuple[type, Any, Any, flaxslim.Spec]:
    """RoBERTa with a classifier, whose hidden layer is as wide as the model."""
    from transformers import FlaxRobertaForSequenceClassification as Classifier
    from transformers import RobertaConfig

    cfg = RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=72,
        vocab_size=99,
    )  # fmt: skip
    shapes, rng = parameter_shapes(Classifier, cfg), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    own = function(_call(Classifier, cfg), shapes, (inputs_for(Classifier, cfg),))
    found = discovered(own, cfg, lambda cfg: parameter_shapes(Classifier, cfg))
    return Classifier, cfg, params, found.spec("DISCOVERED")


def _slimmed(params: Any, cfg: Any, spec: flaxslim.Spec, second: str, **how: Any) -> Any:
    """The parameters with the first rows of a layer dead, and the model slimmed."""
    leaves = dict(flatten(params))
    leaves[second] = np.array(leaves[second])
    leaves[second][:8] = 0
    dead = unflatten_dict(leaves, sep="/")
    return (dead, cfg), flaxslim.slim(dead, cfg, spec, **how)


def test_a_width_whose_key_says_more_is_cut_by_a_layout_alone(classifier):
    cls, cfg, params, spec = classifier
    second = "classifier/out_proj/kernel"
    with pytest.raises(WidthError, match="ties this width to other sizes"):
        _slimmed(params, cfg, spec, second)
    dense, small = _slimmed(params, cfg, spec, second, width="per_layer")
    assert small[1].hidden_size == 32
    assert small[0]["classifier"]["dense"]["kernel"].shape == (32, 24)
    with jax.numpy_rank_promotion("allow"):
        assert flaxslim.verify(dense, small, cls, spec=spec, repeats=0).ok


def test_discovered_heads_of_a_class_of_fixed_heads_need_modules(classifier):
    cls, cfg, params, spec = classifier
    second = "roberta/encoder/layer/0/attention/output/dense/kernel"
    dense, small = _slimmed(params, cfg, spec, second, width="per_layer")
    with pytest.raises(ConfigError, match=r"Pair\(modules=...\), which output/dense lacks"):
        flaxslim.verify(dense, small, cls, spec=spec, repeats=0)


# --- the layouts of other libraries -----------------------------------------------------------


def _run(library: Library, tree: Mapping[str, Any], x: Any) -> Any:
    """The layers of a library one after another, or scanned as it scans them."""
    prefix = f"params/{library.at}/"
    if library.scan is None:
        for i in range(DEPTH):
            x = x + library.layer(lambda name, i=i: tree[f"{prefix}{name}".format(i=i)], x)
        return x

    def step(x: Any, layer: Any) -> tuple[Any, None]:
        return x + library.layer(lambda name: layer[prefix + name], x), None

    return jax.lax.scan(step, x, {p: jnp.moveaxis(t, library.scan, 0) for p, t in tree.items()})[0]


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_layout_of_a_library_is_found(name):
    library, rng = LIBRARIES[name], np.random.default_rng(0)
    tree, x = library.tree(rng), rng.normal(size=(4, SIZES["d"]))
    with mock.patch.object(test_libraries, "np", jnp), enable_x64():
        made = traced(lambda tree, x: _run(library, tree, x), tree, x)
        made.walked  # noqa: B018 - traced while jnp stands in for numpy
    theirs = library.spec.sites(tree, library.cfg)
    pairs, missing, extra = matched(theirs, made.sites)
    assert (missing, extra) == ([], [])
    for site, found in pairs:
        _check_alike(site, found, library.cfg)
        assert sorted(found.stack) == sorted(site.stack), found.pair
    check_cut(made, tree)


class _Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=8, qkv_features=24, decode=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))


class _Blocks(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block_0, self.block_1 = _Block(rngs), _Block(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_1(self.block_0(x))


def test_the_heads_of_nnx_are_found():
    module, x = _Blocks(nnx.Rngs(0)), np.random.default_rng(0).normal(size=(2, 5, 8))
    made = traced(module, x.astype(np.float32))
    params = nnx.state(module)
    params = dict(flatten(params))
    pairs, missing, extra = matched(NNX_HEADS.sites(params), made.sites)
    assert (len(pairs), missing, extra) == (2, [], [])
    for site, found in pairs:
        _check_alike(site, found, None)
    rng = np.random.default_rng(1)
    check_cut(made, {p: rng.normal(size=np.shape(t)) for p, t in made.function.params.items()})


# --- convolutions -----------------------------------------------------------------------------

_CONVOLUTIONS: Mapping[str, Any] = {
    "num_channels": 3, "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1],
}  # fmt: skip
# Of each class the config, and the second layers: those inside of its blocks, and those that read
# the stream between its stages first. No norm runs across channels there, so it can be cut, too.
_STREAM = (
    "encoder/stages/0/layers/0/(shortcut|layer/(layer_)?0)/convolution",
    "encoder/stages/0/layers/1/layer/(layer_)?0/convolution",
)
NETWORKS = {
    "ResNetModel-bottleneck": (("layer/1/convolution", "layer/2/convolution"), _STREAM),
    "ResNetModel-basic": (("layer/layer_1/convolution",), _STREAM),
    "ResNetForImageClassification-bottleneck": (
        ("layer/1/convolution", "layer/2/convolution"), (*_STREAM, "classifier/1"),
    ),
    # Squeeze and excitation: grouped convolutions keep whole groups.
    "RegNetModel": (("layer/2/attention/0", "layer/2/attention/2"), _STREAM),
    "RegNetForImageClassification": (
        ("layer/2/attention/0", "layer/2/attention/2"), (*_STREAM, "classifier/1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_of_convolutions_are_found_with_their_statistics(name):
    import transformers

    cls_name, _, variant = name.partition("-")
    sizes = {**_CONVOLUTIONS, **({"layer_type": variant} if variant else {"groups_width": 8})}
    cfg = getattr(transformers, f"{cls_name[:6]}Config")(**sizes)
    cls, rng = getattr(transformers, f"Flax{cls_name}"), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.uniform(0.3, 1, x.shape), parameter_shapes(cls, cfg))
    made = _traced(cls, cfg, params, None)
    inside, stream = NETWORKS[name]
    patterns = [f"stages/./layers/./{layer}" for layer in inside] + [*stream]
    found = {site.second.path.removesuffix("/kernel"): site for site in made.sites}
    counts = [sum(bool(re.search(f"{p}$", path)) for path in found) for p in patterns]
    assert counts == [3] * len(inside) + [1] * len(stream), [*found]
    assert sum(counts) == len(found), [*found]
    for path, site in found.items():
        statistics = {t.path.rpartition("/")[2] for t in site.cut if "batch_stats" in t.path}
        squeezed = "attention/2" in path  # the one pair without a norm
        assert statistics == (set() if squeezed else {"mean", "var"}), path
    check_cut(made, params)


# --- checkpoints ------------------------------------------------------------------------------


def test_a_trained_llama(data):
    checkpoint = read(data / "stories260K")
    cfg, params = checkpoint.config, checkpoint.params
    made = _traced(model_class_for(cfg, params), cfg, params, 16)
    pairs, missing, extra = matched(spec_for(cfg, "all").sites(params, cfg), made.sites)
    assert (len(pairs), missing, extra) == (10, [], [])
    for site, found in pairs:
        _check_alike(site, found, cfg)
    check_cut(made, params)


def test_a_trained_bert(data):
    import transformers

    folder = data / "sentence-encoder"
    cfg = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    shapes = parameter_shapes(transformers.FlaxBertModel, cfg)
    made = _traced(transformers.FlaxBertModel, cfg, shapes, 16)
    pairs, missing, extra = matched(spec_for(cfg, "all").sites(shapes, cfg), made.sites)
    assert (len(pairs), missing, extra) == (12, [], [])
    for site, found in pairs:
        _check_alike(site, found, cfg)
