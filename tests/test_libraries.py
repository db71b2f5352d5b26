"""The layouts of other libraries: trees of their shapes, computed by plain numpy, slimmed exactly.

Each row and each expert loses channels of its own, in every way that its layout allows.
"""

import dataclasses
import enum
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from hypothesis import given
from hypothesis import strategies as st
from kill_rows import by_row, kill_rows, need
from strategies import gap

import flaxslim
from flaxslim import NothingRemovedWarning, Pair, Spec, plan, slim
from flaxslim._spec import Site
from flaxslim._tree import flatten
from flaxslim.errors import (
    AxisPatternError,
    IncompletePairError,
    LayoutError,
    SiteShapeError,
    WidthError,
)
from flaxslim.specs._libraries import (
    BIG_VISION_FFN,
    BIG_VISION_HEADS,
    BONSAI_GEMMA3_FFN,
    BONSAI_GEMMA3_HEADS,
    BONSAI_QWEN3_FFN,
    BONSAI_QWEN3_HEADS,
    EASYDEL_FFN,
    EASYDEL_HEADS,
    GEMMA_DEEPMIND_FFN,
    GEMMA_DEEPMIND_HEADS,
    KERAS_HUB_FFN,
    KERAS_HUB_HEADS,
    MAXTEXT_FFN,
    MAXTEXT_HEADS,
    TUNIX_FFN,
    TUNIX_HEADS,
    _scanned,
)

# d is larger than f, before and after: a square says nothing of which of its axes is f.
SIZES = {"d": 8, "f": 7, "h": 6, "g": 3, "k": 4, "n": 6, "e": 2, "l": 3, "2": 2, "3": 3}
DEPTH = 3

Parameters = Callable[[str], np.ndarray]
Layer = Callable[[Parameters, np.ndarray], np.ndarray]

# --- what the libraries compute, in their own layouts ------------------------------------------
# By the name `np` alone, so that it can be jax.numpy as well (test_discover_families).


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def tanh(x: np.ndarray) -> np.ndarray:
    return np.tanh(x)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated(gate: str, up: str, down: str, act=silu) -> Layer:
    return lambda p, x: (act(x @ p(gate)) * (x @ p(up))) @ p(down)


def plain(up: str, down: str, act) -> Layer:
    def layer(p: Parameters, x: np.ndarray) -> np.ndarray:
        h = act(x @ p(f"{up}/kernel") + p(f"{up}/bias"))
        return h @ p(f"{down}/kernel") + p(f"{down}/bias")

    return layer


def fused(einsum: str, gate: str, down: str, act=gelu) -> Layer:
    def layer(p: Parameters, x: np.ndarray) -> np.ndarray:
        g, u = np.einsum(einsum, x, p(gate))
        return (act(g) * u) @ p(down)

    return layer


def experts(gate: str, up: str, down: str) -> Layer:
    """All experts, weighted by a router."""

    def layer(p: Parameters, x: np.ndarray) -> np.ndarray:
        h = silu(np.einsum("td,edf->tef", x, p(gate))) * np.einsum("td,edf->tef", x, p(up))
        return np.einsum("te,tef,efd->td", softmax(x @ p("gate/kernel")), h, p(down))

    return layer


def gpt_oss(p: Parameters, x: np.ndarray) -> np.ndarray:
    """MaxText's experts with biases, where up = 0 does not silence a channel."""
    g, u = (np.einsum("td,edf->tef", x, p(w)) + p(f"{w}_bias") for w in ("wi_0", "wi_1"))
    y = np.einsum("tef,efd->ted", silu(g) * (u + 1), p("wo")) + p("wo_bias")
    return np.einsum("te,ted->td", softmax(x @ p("gate/kernel")), y)


def softmax(x: np.ndarray) -> np.ndarray:
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    return y / y.sum(axis=-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of (t, heads, k) on (t, groups, k)."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
    logits = np.where(np.tri(len(q), dtype=bool), logits, -np.inf)
    return np.einsum("hts,shk->thk", softmax(logits), v)


def attention(q: str, k: str, v: str, o: str, axes: str = "dhk", *, biases: bool = False) -> Layer:
    def layer(p: Parameters, x: np.ndarray) -> np.ndarray:
        def heads(name: str) -> np.ndarray:
            y = np.einsum(f"td,{axes}->thk", x, p(name))
            return y + p(name.replace("kernel", "bias")) if biases else y

        y = np.einsum("thk,hkd->td", attend(heads(q), heads(k), heads(v)), p(o))
        return y + p(o.replace("kernel", "bias")) if biases else y

    return layer


def flat_attention(p: Parameters, x: np.ndarray) -> np.ndarray:
    q, k, v = ((x @ p(f"{n}_proj/kernel")).reshape(len(x), -1, SIZES["k"]) for n in "qkv")
    return attend(q, k, v).reshape(len(x), -1) @ p("o_proj/kernel")


def fused_qkv(einsum: str, qkv: str, out: str) -> Layer:
    return lambda p, x: np.einsum("thk,hkd->td", attend(*np.einsum(einsum, x, p(qkv))), p(out))


def gemma_attention(p: Parameters, x: np.ndarray) -> np.ndarray:
    k, v = np.einsum("td,cgdk->ctgk", x, p("kv_einsum/w"))
    q = np.einsum("td,hdk->thk", x, p("q_einsum/w"))
    return np.einsum("thk,hkd->td", attend(q, k, v), p("attn_vec_einsum/w"))


# --- where it lies ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """A layout: the axes of each tensor of one layer by letters, and what the layer computes.

    `scan`: the axis on which layers are stacked, in every tensor; without it, `at` has an {i}.
    """

    spec: Spec
    cfg: Mapping[str, Any]
    at: str
    tensors: Mapping[str, str]
    layer: Layer
    scan: int | None = None
    width: str | None = None

    def tree(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Random parameters, none of which is zero."""
        tree = {}
        for i in range(DEPTH if self.scan is None else 1):
            for name, letters in self.tensors.items():
                shape = [math.prod(SIZES[c] for c in dim) for dim in letters.split()]
                if self.scan is not None:
                    shape.insert(self.scan, SIZES["l"])
                values = rng.uniform(0.3, 1, shape) * rng.choice([-1, 1], shape)
                tree[f"params/{self.at}/{name}".format(i=i)] = values / 2
        return tree

    def run(self, tree: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
        for i in range(DEPTH):

            def p(name: str, i: int = i) -> np.ndarray:
                leaf = np.asarray(tree[f"params/{self.at}/{name}".format(i=i)], np.float64)
                return leaf if self.scan is None else np.take(leaf, i, axis=self.scan)

            x = x + self.layer(p, x)
        return x


_MAXTEXT = {
    "base_mlp_dim": 7,
    "base_moe_mlp_dim": 7,
    "base_num_query_heads": 6,
    "base_num_kv_heads": 3,
    "attention_sink": False,
    "mlp_activations": ["silu", "linear"],
}
_MHA = {**_MAXTEXT, "base_num_kv_heads": 6}
_SPLIT = {"wi_0/kernel": "d f", "wi_1/kernel": "d f", "wo/kernel": "f d"}
_MOE = {"wi_0": "e d f", "wi_1": "e d f", "wo": "e f d", "gate/kernel": "d e"}
_MOE_BIASES = {**_MOE, "wi_0_bias": "e f", "wi_1_bias": "e f", "wo_bias": "e d"}
_ATTENTION = {
    "query/kernel": "d h k",
    "key/kernel": "d g k",
    "value/kernel": "d g k",
    "out/kernel": "h k d",
}
_BIASES = {"query/bias": "h k", "key/bias": "h k", "value/bias": "h k", "out/bias": "d"}
_MHA_BIASES = {n: a.replace("g", "h") for n, a in {**_ATTENTION, **_BIASES}.items()}
_HF = {f"{n}_proj/kernel": a for n, a in {"gate": "d f", "up": "d f", "down": "f d"}.items()}
_DENSE = {
    "Dense_0/kernel": "d f",
    "Dense_0/bias": "f",
    "Dense_1/kernel": "f d",
    "Dense_1/bias": "d",
}
_FLAT = {"q": "d hk", "k": "d gk", "v": "d gk", "o": "hk d"}
_EINSUM = {"q": "d h k", "k": "d g k", "v": "d g k", "o": "h k d"}
_qkvo = ("query/kernel", "key/kernel", "value/kernel", "out/kernel")
_proj = tuple(f"{n}_proj/kernel" for n in "qkvo")


def _maxtext(tensors, layer, *, cfg=_MAXTEXT, spec=MAXTEXT_FFN, place="mlp", width="base_mlp_dim"):
    """The three ways in which MaxText's layers lie."""
    for name, at, scan in (
        ("", "decoder/layers_{i}", None),
        (" scanned", "decoder/layers", 1),
        (" scanned first", "decoder/layers", 0),
    ):
        yield (
            name,
            Library(
                spec=spec,
                cfg=cfg,
                at=f"{at}/{place}",
                tensors=tensors,
                layer=layer,
                scan=scan,
                width=width,
            ),
        )


def _all_maxtext() -> Iterator[tuple[str, Library]]:
    gpt3 = {**_MAXTEXT, "mlp_activations": ["gelu"]}
    wi = {"wi/kernel": "d f", "wi/bias": "f", "wo/kernel": "f d", "wo/bias": "d"}
    geglu = {**_MAXTEXT, "mlp_activations": ["gelu", "linear"]}
    both = {"wi/kernel": "d 2 f", "wo/kernel": "f d"}
    qkv = {"qkv_proj/kernel": "d 3 n k", "out/kernel": "h k d"}
    attentions: dict[str, Any] = {
        "spec": MAXTEXT_HEADS,
        "place": "self_attention",
        "width": "base_num_query_heads",
    }
    rows = {
        "maxtext": _maxtext(_SPLIT, gated(*_SPLIT)),
        "maxtext plain": _maxtext(wi, plain("wi", "wo", gelu), cfg=gpt3),
        "maxtext fused": _maxtext(both, fused("td,dpf->ptf", "wi/kernel", "wo/kernel"), cfg=geglu),
        "maxtext experts": _maxtext(
            _MOE, experts("wi_0", "wi_1", "wo"), place="MoeBlock_0", width="base_moe_mlp_dim"
        ),
        "maxtext gpt-oss": _maxtext(
            _MOE_BIASES, gpt_oss, place="MoeBlock_0", width="base_moe_mlp_dim"
        ),
        "maxtext attention": _maxtext(_ATTENTION, attention(*_qkvo), **attentions),
        "maxtext attention with biases": _maxtext(
            _MHA_BIASES, attention(*_qkvo, biases=True), cfg=_MHA, **attentions
        ),
        "maxtext attention fused": _maxtext(
            qkv, fused_qkv("td,dchk->cthk", "qkv_proj/kernel", "out/kernel"), cfg=_MHA, **attentions
        ),
    }
    for row, layouts in rows.items():
        for name, library in layouts:
            yield row + name, library


def _others() -> Iterator[tuple[str, Library]]:
    gemma: dict[str, Any] = {"hidden_dim": 7, "num_heads": 6, "num_kv_heads": 3}
    gemma["query_pre_attn_norm"] = "BY_ONE_OVER_SQRT_HEAD_DIM"
    for axes, einsum in (("2 f d", "td,pfd->ptf"), ("2 d f", "td,pdf->ptf")):
        yield (
            f"gemma {axes}",
            Library(
                spec=GEMMA_DEEPMIND_FFN,
                cfg=gemma,
                at="layer_{i}/mlp",
                tensors={"gating_einsum": axes, "linear": "f d"},
                layer=fused(einsum, "gating_einsum", "linear"),
                width="hidden_dim",
            ),
        )
    for name, spec, at in (
        ("gemma", GEMMA_DEEPMIND_HEADS, "layer_{i}/attn"),
        ("tunix", TUNIX_HEADS, "layers/{i}/attn"),
    ):
        yield (
            f"{name} kv",
            Library(
                spec=spec,
                cfg=gemma,
                at=at,
                tensors={
                    "q_einsum/w": "h d k",
                    "kv_einsum/w": "2 g d k",
                    "attn_vec_einsum/w": "h k d",
                },
                layer=gemma_attention,
                width="num_heads",
            ),
        )
        yield (
            f"{name} qkv",
            Library(
                spec=spec,
                cfg={**gemma, "num_kv_heads": 6},
                at=at,
                tensors={"qkv_einsum/w": "3 n d k", "attn_vec_einsum/w": "h k d"},
                layer=fused_qkv("td,chdk->cthk", "qkv_einsum/w", "attn_vec_einsum/w"),
                width="num_heads",
            ),
        )
    hf = {
        "intermediate_size": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "hidden_act": "silu",
    }
    for name, spec, cfg, width in (
        ("tunix", TUNIX_FFN, gemma, "hidden_dim"),
        ("bonsai qwen3", BONSAI_QWEN3_FFN, {"mlp_dim": 7}, "mlp_dim"),
        ("bonsai gemma3", BONSAI_GEMMA3_FFN, hf, "intermediate_size"),
        ("easydel", EASYDEL_FFN, hf, "intermediate_size"),
    ):
        act = gelu if "gemma3" in name else silu
        layer = gated(*_HF, act=act)
        at = "model/layers/{i}/mlp" if name == "easydel" else "layers/{i}/mlp"
        yield name, Library(spec=spec, cfg=cfg, at=at, tensors=_HF, layer=layer, width=width)
    yield (
        "tunix experts",
        Library(
            spec=TUNIX_FFN,
            cfg=gemma,
            at="layers/{i}/mlp",
            tensors={
                "gate_proj": "e d f",
                "up_proj": "e d f",
                "down_proj": "e f d",
                "gate/kernel": "d e",
            },
            layer=experts("gate_proj", "up_proj", "down_proj"),
            width="hidden_dim",
        ),
    )
    for name, spec, cfg, at, kernel, width in (
        ("tunix", TUNIX_HEADS, gemma, "layers/{i}/attn", "w", "num_heads"),
        ("bonsai qwen3", BONSAI_QWEN3_HEADS, gemma, "layers/{i}/attn", "kernel", "num_heads"),
        ("bonsai gemma3", BONSAI_GEMMA3_HEADS, hf, "layers/{i}/self_attn", "kernel", None),
    ):
        yield (
            f"{name} attention",
            Library(
                spec=spec,
                cfg=cfg,
                at=at,
                tensors={f"{n}_proj/{kernel}": axes for n, axes in _EINSUM.items()},
                layer=attention(*(name.replace("kernel", kernel) for name in _proj)),
                width=width or "num_attention_heads",
            ),
        )
    for name, spec in (("bonsai gemma3", BONSAI_GEMMA3_HEADS), ("easydel", EASYDEL_HEADS)):
        yield (
            f"{name} flat attention",
            Library(
                spec=spec,
                cfg=hf,
                at="layers/{i}/self_attn",
                tensors={f"{n}_proj/kernel": axes for n, axes in _FLAT.items()},
                layer=flat_attention,
                width="num_attention_heads",
            ),
        )
    yield from _keras_hub()
    yield from _big_vision()


def _keras_hub() -> Iterator[tuple[str, Library]]:
    gate, up, down = (f"feedforward_{n}_dense" for n in ("gate", "intermediate", "output"))
    ffw = {"ffw_gating/kernel": "d f", "ffw_gating_2/kernel": "d f", "ffw_linear/kernel": "f d"}
    cfg = {"intermediate_dim": 7, "num_query_heads": 6, "num_key_value_heads": 3, "num_heads": 6}
    at = "transformer_layer_{i}"
    pair = {f"{up}/kernel": "d f", f"{down}/kernel": "f d"}
    for name, tensors, layer, extra in (
        (
            "llama",
            {**pair, f"{gate}/kernel": "d f"},
            gated(*(f"{n}/kernel" for n in (gate, up, down))),
            {},
        ),
        (
            "encoder",
            {**pair, f"{up}/bias": "f", f"{down}/bias": "d"},
            plain(up, down, tanh),
            {"activation": "tanh"},
        ),
        ("gemma", ffw, gated(*ffw, act=gelu), {"intermediate_dim": 14}),
    ):
        yield (
            f"keras hub {name}",
            Library(
                spec=KERAS_HUB_FFN,
                cfg={**cfg, **extra},
                at=at,
                tensors=tensors,
                layer=layer,
                width="intermediate_dim/2" if name == "gemma" else "intermediate_dim",
            ),
        )
    names = tuple(n.replace("out/", "attention_output/") for n in _qkvo)
    gqa = dict(zip(names, _ATTENTION.values(), strict=True))
    mha = {n.replace("out/", "attention_output/"): a for n, a in _MHA_BIASES.items()}
    first = {n: axes.replace("d h", "h d").replace("d g", "g d") for n, axes in gqa.items()}
    for name, place, tensors, layer, width in (
        ("llama", "self_attention", gqa, attention(*names), None),
        ("encoder", "self_attention_layer", mha, attention(*names, biases=True), None),
        ("gemma", "attention", first, attention(*names, axes="hdk"), "num_query_heads"),
    ):
        yield (
            f"keras hub {name} attention",
            Library(
                spec=KERAS_HUB_HEADS,
                cfg=cfg,
                at=f"{at}/{place}",
                tensors=tensors,
                layer=layer,
                width=width,
            ),
        )


def _big_vision() -> Iterator[tuple[str, Library]]:
    cfg = {"mlp_dim": 7, "num_heads": 6, "width": 24}
    for name, at, scan in (
        ("", "Transformer/encoderblock_{i}", None),
        (" scanned", "Transformer/encoderblock", 0),
    ):
        yield (
            f"big vision{name}",
            Library(
                spec=BIG_VISION_FFN,
                cfg=cfg,
                at=f"{at}/MlpBlock_0",
                tensors=_DENSE,
                layer=plain("Dense_0", "Dense_1", gelu),
                scan=scan,
                width="mlp_dim",
            ),
        )
        yield (
            f"big vision attention{name}",
            Library(
                spec=BIG_VISION_HEADS,
                cfg=cfg,
                at=f"{at}/MultiHeadDotProductAttention_0",
                tensors=_MHA_BIASES,
                layer=attention(*_qkvo, biases=True),
                scan=scan,
            ),
        )


LIBRARIES = dict([*_all_maxtext(), *_others()])


# --- the claim --------------------------------------------------------------------------------

few = hypothesis.settings(max_examples=10, deadline=None)


def slimmed(tree, cfg, spec, **more) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingRemovedWarning)
        return slim(tree, cfg, spec, **more)


@pytest.mark.parametrize("name", LIBRARIES)
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_dead_goes_and_the_function_stays(name, seed):
    library, rng = LIBRARIES[name], np.random.default_rng(seed)
    tree, x = library.tree(rng), rng.normal(size=(4, SIZES["d"]))
    sites = library.spec.sites(tree, library.cfg)
    assert len(sites) == (DEPTH if library.scan is None else 1)
    dead = kill_rows(tree, sites, rng)
    for cut in plan(tree, library.cfg, library.spec).cuts:
        assert dict(cut.rules) == dead[cut.site.second.path].rules, cut.site.root
    before = library.run(tree, x)

    # By itself, each site keeps what its widest row needs, down to nothing.
    cuts = plan(tree, library.cfg, library.spec, width="per_layer").cuts
    widths = [cut.width for cut in cuts]
    assert widths == [need((cut.site,), dead, 0) for cut in cuts]
    small, _ = slimmed(tree, library.cfg, library.spec, width="per_layer")
    if all(widths) or sites[0].pair.axis == "f":  # attention without heads is left to the class
        assert gap(library.run(small, x), before) <= 1e-12

    # With one width for all, the plain key says it, if there is one that can.
    if library.width is None:
        return
    small, cfg = slimmed(tree, library.cfg, library.spec)
    assert gap(library.run(small, x), before) <= 1e-12
    width = need(sites, dead, 1)
    key, _, factor = library.width.partition("/")
    assert cfg[key] == width * int(factor or 1)
    again = library.spec.sites(small, cfg)
    assert {site.size for site in again} == {width}
    kept = plan(tree, library.cfg, library.spec).cuts
    for site, cut in zip(again, kept, strict=True):
        living = ~dead[site.second.path].mask
        _show(library, small, x, site, np.take_along_axis(living, cut.kept, axis=1))


def _show(library: Library, small, x, site: Site, living: np.ndarray) -> None:
    """The control: in no row can a channel that lives go as well without a trace."""
    before = library.run(small, x)
    for index, alive in zip(np.ndindex(*site.stack), living, strict=True):
        gaps = []
        for channel in np.flatnonzero(alive):
            wrong = {path: np.array(leaf) for path, leaf in small.items()}
            by_row(wrong, site, site.second)[index][channel] = 0
            gaps.append(gap(library.run(wrong, x), before))
        assert max(gaps, default=1) > 1e-6


DEVICE = ["maxtext scanned", "maxtext experts scanned", "maxtext attention with biases scanned"]


@pytest.mark.parametrize(
    "name", [*DEVICE, "gemma kv", "keras hub encoder", "easydel flat attention"]
)
def test_float32_on_the_device(name):
    library, rng = LIBRARIES[name], np.random.default_rng(7)
    tree, x = library.tree(rng), rng.normal(size=(4, SIZES["d"]))
    kill_rows(tree, library.spec.sites(tree, library.cfg), rng)
    device = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in tree.items()}
    small, _ = slim(device, library.cfg, library.spec)
    assert all(isinstance(leaf, jax.Array) for leaf in small.values())
    assert sum(x.size for x in small.values()) < 0.95 * sum(x.size for x in tree.values())
    assert gap(library.run(small, x), library.run(device, x)) <= 1e-6
    # From the host it is the same cut.
    host, _ = slim({p: np.asarray(leaf) for p, leaf in device.items()}, library.cfg, library.spec)
    for path, leaf in host.items():
        np.testing.assert_array_equal(np.asarray(small[path]), leaf)


# --- layouts that do not fit ------------------------------------------------------------------


def _one(name: str, *, seed: int = 0) -> tuple[Library, dict[str, np.ndarray]]:
    library = LIBRARIES[name]
    return library, library.tree(np.random.default_rng(seed))


def test_a_square_kernel_that_two_layouts_fit_is_refused():
    library, tree = _one("gemma 2 f d")
    square = {path: leaf[..., :7] for path, leaf in tree.items()}
    with pytest.raises(SiteShapeError, match="two pairs of the spec claim the same axis"):
        plan(square, library.cfg, library.spec)
    (one, _) = library.spec
    assert plan(square, library.cfg, Spec(name="ONE", pairs=one)).removed == 0


def test_a_shape_that_no_layout_fits_is_refused():
    for name, path in (
        ("maxtext scanned", "params/decoder/layers/mlp/wo/kernel"),
        ("maxtext gpt-oss", "params/decoder/layers_0/MoeBlock_0/wi_0_bias"),
        ("tunix attention", "params/layers/0/attn/v_proj/w"),
        ("keras hub llama", "params/transformer_layer_0/feedforward_gate_dense/kernel"),
    ):
        library, tree = _one(name)
        tree[path] = tree[path][..., :-1] if "wo" not in path else tree[path][:-1]
        with pytest.raises((SiteShapeError, AxisPatternError)) as caught:
            plan(tree, library.cfg, library.spec)
        assert path.split("/")[-2] in str(caught.value), name


def test_attention_of_another_kind_is_refused():
    # MaxText's latent attention has the output of ours, and no values.
    library, tree = _one("maxtext attention")
    del tree["params/decoder/layers_0/self_attention/value/kernel"]
    with pytest.raises(IncompletePairError, match="value is not"):
        plan(tree, library.cfg, library.spec)
    # Qwen2's biases in tunix lie flat.
    library, tree = _one("tunix attention")
    tree["params/layers/0/attn/v_bias"] = np.ones(12)
    with pytest.raises(AxisPatternError, match="1 dimensions where its pattern has 2"):
        plan(tree, library.cfg, library.spec)


def test_gpt_oss_reads_up_plus_one():
    # What would silence a gated channel elsewhere does not here.
    library, tree = _one("maxtext gpt-oss")
    root = "params/decoder/layers_0/MoeBlock_0"
    tree[f"{root}/wi_1"][:, :, :2] = 0
    tree[f"{root}/wi_1_bias"][:, :2] = 0
    p = plan(tree, library.cfg, library.spec)
    assert sum(cut.dead for cut in p.cuts) == 0
    assert "only (i) were used" in str(p)


def test_sinks_go_with_their_heads_and_forbid_folds():
    library, tree = _one("maxtext attention with biases scanned")
    root = "params/decoder/layers/self_attention"
    tree[f"{root}/sinks"] = np.arange(18.0).reshape(6, 3)
    tree[f"{root}/out/kernel"][[0, 1], [0, 0]] = 0  # two heads of the first layer,
    tree[f"{root}/out/kernel"][[2, 5], [1, 1]] = 0  # of the second
    tree[f"{root}/out/kernel"][[3, 4], [2, 2]] = 0
    tree[f"{root}/value/kernel"][:, :, 0] = 0  # and a constant one in all
    with_sinks = {**library.cfg, "attention_sink": True}
    (cut,) = plan(tree, with_sinks, library.spec).cuts
    assert dict(cut.rules) == {"i": 6}
    small, cfg = slim(tree, with_sinks, library.spec)
    assert (cfg["base_num_query_heads"], cfg["base_num_kv_heads"]) == (4, 4)
    assert small[f"{root}/sinks"].T.tolist() == [[6, 9, 12, 15], [1, 4, 10, 13], [2, 5, 8, 17]]
    (cut,) = plan(tree, library.cfg, library.spec).cuts
    assert dict(cut.rules) == {"i": 6, "iv": 2}
    del with_sinks["attention_sink"]
    silent = plan(tree, with_sinks, library.spec)
    assert dict(silent.cuts[0].rules) == {"i": 6}
    assert "no config says attention_sink" in str(silent)


def _deepseek(shared: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """MaxText's DeepSeek: three experts of 6 channels, and what all tokens pass through."""
    rng = np.random.default_rng(0)

    def weights(*stack: int, f: int) -> dict[str, np.ndarray]:
        shapes = {"wi_0": (4, f), "wi_1": (4, f), "wo": (f, 4)}
        return {name: rng.normal(size=(*stack, *shape)) for name, shape in shapes.items()}

    block = "params/decoder/moe_layers_0/DeepSeekMoeBlock_0"
    tree = {f"{block}/MoeBlock_0/{name}": x for name, x in weights(3, f=6).items()}
    every = weights(f=6 * shared).items()
    tree |= {f"{block}/shared_experts/{name}/kernel": x for name, x in every}
    tree[f"{block}/MoeBlock_0/wo"][:, :2] = 0
    tree[f"{block}/shared_experts/wo/kernel"][:3] = 0
    activations = ["silu", "linear"]
    cfg = {"base_moe_mlp_dim": 6, "shared_experts": shared, "mlp_activations": activations}
    return tree, cfg


def test_shared_experts_have_the_width_of_the_others_times_their_number():
    tree, cfg = _deepseek(1)
    small, new = slim(tree, cfg, MAXTEXT_FFN)
    assert new == {**cfg, "base_moe_mlp_dim": 4}
    assert {x.size for x in small.values()} == {3 * 4 * 4, 4 * 4}

    tree, cfg = _deepseek(2)
    with pytest.raises(WidthError, match=r"pass width=.per_layer"):
        slim(tree, cfg, MAXTEXT_FFN)
    small, new = slim(tree, cfg, MAXTEXT_FFN, width="per_layer")
    assert new["base_moe_mlp_dim"] == 6
    assert sorted(new["flaxslim_layout"]["sites"].values()) == [4, 9]
    assert {x.size for x in small.values()} == {3 * 4 * 4, 4 * 9}
    plan(small, new, MAXTEXT_FFN)  # it reads what it wrote


def test_a_class_that_shares_its_width_out_among_the_heads_is_told_of():
    for name in ("keras hub llama attention", "big vision attention"):
        library, tree = _one(name)
        for site in library.spec.sites(tree, library.cfg):
            tree[site.second.path][:2] = 0
        with pytest.raises(WidthError, match="ties its heads to its hidden size"):
            slim(tree, library.cfg, library.spec)


def test_a_part_of_a_config_that_is_nested():
    library, tree = _one("bonsai gemma3 flat attention")
    for site in library.spec.sites(tree, library.cfg):
        tree[site.second.path][: 2 * SIZES["k"]] = 0
    nested = library.spec.under(tree="", config="text_config")
    small, cfg = slim(tree, {"text_config": library.cfg, "dtype": "float32"}, nested)
    assert cfg["dtype"] == "float32"
    expected = {**library.cfg, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert cfg["text_config"] == expected
    x = np.random.default_rng(1).normal(size=(4, SIZES["d"]))
    assert gap(library.run(small, x), library.run(tree, x)) <= 1e-12


# --- stacks of one's own ----------------------------------------------------------------------


def biased_experts(p: Parameters, x: np.ndarray) -> np.ndarray:
    h = silu(np.einsum("td,edf->tef", x, p("up")) + p("up_bias"))
    y = np.einsum("tef,efd->ted", h, p("down")) + p("down_bias")
    return np.einsum("te,ted->td", softmax(x @ p("gate/kernel")), y)


@pytest.mark.parametrize("scan", [None, 0, 1])
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_constants_of_experts_are_folded_into_the_bias_of_each(scan, seed):
    pair = Pair(
        at="moe" if scan is not None else "moe_{i}",
        first="up",
        second="down",
        first_axes="e d f" if scan is None else "e l d f" if scan else "l e d f",
        second_axes="e f d" if scan is None else "e l f d" if scan else "l e f d",
        first_bias="up_bias",
        second_bias="down_bias",
        activation="silu",
    )
    library = Library(
        spec=Spec(name="EXPERTS", pairs=pair),
        cfg={},
        at=pair.at,
        tensors={
            "up": "e d f",
            "up_bias": "e f",
            "down": "e f d",
            "down_bias": "e d",
            "gate/kernel": "d e",
        },
        layer=biased_experts,
        scan=scan,
    )
    rng = np.random.default_rng(seed)
    tree, x = library.tree(rng), rng.normal(size=(4, SIZES["d"]))
    sites = library.spec.sites(tree)
    assert {site.rows for site in sites} == {6 if scan is not None else 2}
    dead = kill_rows(tree, sites, rng)
    p = plan(tree, spec=library.spec, width="per_layer")
    assert [dict(cut.rules) for cut in p.cuts] == [d.rules for d in dead.values()]
    assert [cut.width for cut in p.cuts] == [need((site,), dead, 0) for site in sites]
    small, _ = slimmed(tree, None, library.spec, width="per_layer")
    assert gap(library.run(small, x), library.run(tree, x)) <= 1e-12


def test_groups_of_stacked_layers_stay_even():
    # Even if the class can carry others: one array holds all layers.
    library, tree = _one("maxtext attention scanned")
    ragged = dataclasses.replace([*library.spec][2], ragged=True)
    out = tree["params/decoder/layers/self_attention/out/kernel"]
    out[:3] = 0  # the first group, and a head of the second
    p = plan(tree, library.cfg, Spec(name="RAGGED", pairs=ragged), width="per_layer")
    assert [cut.groups for cut in p.cuts] == [(2, 2)]


class Mlp(nn.Module):
    """Its width is hard-coded, as four times that of its input."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4 * x.shape[-1])(x)
        return nn.Dense(x.shape[-1])(nn.gelu(h))


class Encoder(nn.Module):
    num_heads: int
    axis: int

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            num_heads: int

            @nn.compact
            def __call__(self, x, _):
                y = nn.LayerNorm()(x)
                x += nn.MultiHeadDotProductAttention(
                    self.num_heads, bias_init=nn.initializers.normal(1.0)
                )(y, mask=nn.make_causal_mask(x[..., 0]))
                return x + Mlp(name="MlpBlock_0")(nn.LayerNorm()(x)), None

        stack = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=SIZES["l"],
        )
        return stack(self.num_heads, name="encoderblock")(x, None)[0]


@pytest.mark.skipif(
    not hasattr(jax.sharding.NamedSharding, "update"),
    reason="the nn.scan of flax >= 0.11 needs jax >= 0.7",
)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scanned_linen_stack_runs_at_widths_that_its_config_cannot_say(axis):
    ffn, heads = (
        _scanned(next(iter(spec)), axis, at=f"encoderblock/{name}")
        for spec, name in (
            (BIG_VISION_FFN, "MlpBlock_0"),
            (BIG_VISION_HEADS, "MultiHeadDotProductAttention_0"),
        )
    )
    ffn = dataclasses.replace(ffn, width="4*width")
    spec = Spec(name="SCANNED", pairs=(ffn, heads))
    cfg = {"num_heads": 4, "axis": axis, "width": 8}
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    stock = Encoder(num_heads=4, axis=axis)
    shapes, rng = (
        flatten(jax.eval_shape(stock.init, jax.random.key(0), x)),
        np.random.default_rng(7),
    )
    tree = {
        p: np.asarray(0.4 * rng.standard_normal(leaf.shape), np.float32)
        for p, leaf in shapes.items()
    }
    sites = spec.sites(tree, cfg)
    dead = kill_rows(tree, sites, rng)
    params = _nested(tree)
    small, laid_out = slim(params, cfg, spec, width="per_layer")
    widths = {site.name: need((site,), dead, 0) for site in sites}
    assert laid_out["flaxslim_layout"]["sites"] == widths
    assert all(0 < width < site.size for width, site in zip(widths.values(), sites, strict=True))

    with jax.default_matmul_precision("highest"):
        before = jax.jit(stock.apply)(params, x)
        model = flaxslim.module(Encoder, laid_out, spec=spec)
        after = jax.jit(model.apply)(small, x)
        assert gap(after, before) <= 2e-6
        with flaxslim.layout(laid_out, spec=spec):
            np.testing.assert_array_equal(jax.jit(stock.apply)(small, x), after)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
        grads = jax.jit(jax.grad(lambda p: (model.apply(p, x) ** 2).sum()))(small)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    # The stock class by itself refuses them.
    with pytest.raises(ScopeParamShapeError):
        stock.apply(small, x)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jnp.asarray(leaf)
    return tree


def test_a_layout_does_not_say_how_the_heads_of_a_stack_are_grouped():
    library, tree = _one("maxtext attention scanned")
    tree["params/decoder/layers/self_attention/out/kernel"][:2] = 0
    other = {p.replace("self_attention", "cross"): x for p, x in tree.items()}
    tree |= {p: np.array(x) for p, x in other.items()}
    tree["params/decoder/layers/cross/out/kernel"][:] = 1
    small, cfg = slim(tree, library.cfg, library.spec, width="per_layer")
    sites = {s.root.split("/")[-1]: s for s in library.spec.sites(small, cfg)}
    assert (sites["self_attention"].groups, sites["cross"].groups) == ((2, 2), (2, 2, 2))
    with pytest.raises(LayoutError, match="how the heads of stacked layers are grouped"):
        flaxslim.module(nn.Dense, {**cfg, "features": 1}, spec=library.spec)


@pytest.mark.parametrize("value", ["BY_EMBED_DIM_DIV_NUM_HEADS", "BY_ONE_OVER_SQRT_HEAD_DIM"])
@pytest.mark.parametrize("width", ["uniform", "per_layer"])
def test_heads_that_are_scaled_by_their_number_stay(value, width):
    """Gemma's 27B models: with fewer of them, those that stay would be other heads."""
    norm = getattr(enum.Enum("QueryPreAttentionNormalisation", [value]), value)
    cfg = {"num_heads": 4, "num_kv_heads": 4, "query_pre_attn_norm": norm}
    out = np.ones((4, 2, 3), np.float32)
    out[:2] = 0
    attn = {"qkv_einsum": {"w": np.ones((3, 4, 3, 2), np.float32)}, "attn_vec_einsum": {"w": out}}
    tree = {"layer_0": {"attn": attn}}
    made = plan(tree, cfg, GEMMA_DEEPMIND_HEADS, width=width)
    if value.endswith("DIV_NUM_HEADS"):
        assert made.removed == 0
        assert "by their number" in made.blocked[0]
        with pytest.raises(WidthError, match="by their number"):
            slim(tree, cfg, GEMMA_DEEPMIND_HEADS, width=width)
    else:
        assert (made.removed, made.blocked) == (2, ())
    del cfg["query_pre_attn_norm"]
    tunix = {"layers": {"0": tree["layer_0"]}}  # whose Gemma 1 and 2 have no such key
    assert plan(tunix, cfg, TUNIX_HEADS, width=width).removed == 2
    with pytest.raises(WidthError, match="pass a config that says query_pre_attn_norm"):
        slim(tree, cfg, GEMMA_DEEPMIND_HEADS, width=width)
