"""`discover` and `explain` on small functions: what is found, what is refused and why.

That what is found can be cut is the claim of `test_discover_fuzz` and `test_discover_families`;
here each primitive and each call is met once, and each kind of bad input.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from strategies import enable_x64

import flaxslim
from flaxslim import DiscoveryWarning, Spec, discover, explain, slim
from flaxslim._discover import axis_rule
from flaxslim._discover._rules._table import RULES
from flaxslim._mesh import shard_map
from flaxslim.errors import ConfigError, DiscoveryError, UnsupportedTreeError

pytestmark = pytest.mark.filterwarnings("ignore::flaxslim.DiscoveryWarning")


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


D, F = 8, 12  # the embedding, and the hidden channels
X = shape(2, 5, D)
PLAIN = {"up": shape(D, F), "b": shape(F), "down": shape(F, D), "c": shape(D)}


def lines(spec: Spec) -> list[str]:
    return [str(pair) for pair in spec]


def found(fn: Callable[..., Any], params: Any, *inputs: Any) -> list[str]:
    return lines(discover(fn, params, *inputs))


def hidden(p: Any, x: Any) -> Any:
    return jax.nn.relu(x @ p["up"] + p["b"])


def mlp(p: Any, x: Any, between: Callable[[Any], Any] = lambda h: h) -> Any:
    return between(hidden(p, x)) @ p["down"] + p["c"]


# --- the activation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda x: x, "identity"),
        (jax.nn.relu, "relu"),
        (jax.nn.gelu, "gelu_pytorch_tanh"),
        (functools.partial(jax.nn.gelu, approximate=False), "gelu"),
        (jax.nn.silu, "silu"),
        (lambda x: x * jax.nn.sigmoid(1.702 * x), "quick_gelu"),
        (jnp.tanh, "tanh"),
        (jax.nn.sigmoid, "sigmoid"),
        (jax.nn.softplus, "softplus"),
        (lambda x: jax.nn.relu(x) ** 2, "relu2"),
        (jax.nn.relu6, "relu6"),
        (jax.nn.leaky_relu, "where(x >= 0, x, 0.01 * x)"),
        (jax.nn.mish, "x * tanh(maximum(x, 0) + log1p(exp(-abs(x))))"),
        (lambda x: jnp.sin(3 * x) - 1, "sin(3 * x) - 1"),
        (jnp.round, "round(x)"),
        (jax.lax.round, None),  # halves away from zero
    ],
)
def test_an_activation_is_told_by_its_values(act: Any, name: str | None) -> None:
    (pair,) = discover(lambda p, x: act(x @ p["up"] + p["b"]) @ p["down"] + p["c"], PLAIN, X)
    assert pair.activation == name


GATED = {"g": shape(D, F), "u": shape(D, F), "down": shape(F, D)}


@pytest.mark.parametrize(
    ("combine", "line"),
    [
        (lambda g, u: jax.nn.silu(g) * u, 'g "d f" * u "d f" -> silu -> down "f d", gated'),
        (lambda g, u: g * jax.nn.sigmoid(u), 'u "d f" * g "d f" -> sigmoid -> down "f d", gated'),
        # GPT-OSS: what is zero is not silent.
        (lambda g, u: jax.nn.silu(g) * (u + 1), 'g "d f" -> down "f d", with u'),
        (lambda g, u: g + u, 'g "d f" -> down "f d", with u'),
    ],
)
def test_a_gate_is_told_from_what_it_gates(combine: Any, line: str) -> None:
    spec = discover(lambda p, x: combine(x @ p["g"], x @ p["u"]) @ p["down"], GATED, X)
    (pair,) = spec
    tables = "".join(f", with {name}" for name in pair.tables)
    assert str(pair) + tables == line


def test_of_a_fused_kernel_the_gate_may_be_the_second_half() -> None:
    def fn(p: Any, x: Any) -> Any:
        h, gate = jnp.split(x @ p["w"], 2, axis=-1)
        return (h * jax.nn.gelu(gate)) @ p["down"]

    (pair,) = discover(fn, {"w": shape(D, 2 * F), "down": shape(F, D)}, X)
    assert (pair.first_axes, pair.parts, pair.gated) == ("d (2 f)", (1, 0), True)


def squared(p: Any, x: Any, times: int = 40) -> Any:
    h = x @ p["w"]
    for _ in range(times):
        h = h * h
    a, b = jnp.split(h, 2, axis=-1)
    return (a * b) @ p["down"]


def stream(p: Any, x: Any) -> Any:
    h = x @ p["in"]
    for layer in p["layers"]:
        h = h + jnp.tanh(h @ layer["up"]) @ layer["down"]
    return h @ p["out"]


def test_a_formula_in_which_values_are_used_often_or_that_is_deep_is_given_up() -> None:
    """A value that is its own square forty times has 2^40 factors, 500 layers 500 terms."""
    (pair,) = discover(squared, {"w": shape(D, 2 * F), "down": shape(F, D)}, X)
    assert (pair.first_axes, pair.activation) == ("d (2 f)", None)
    layers = [{"up": shape(F, 4), "down": shape(4, F)} for _ in range(500)]
    params = {"in": shape(D, F), "out": shape(F, D), "layers": layers}
    sizes = sorted(len(pair.readers) for pair in discover(stream, params, X))
    assert sizes == [0, 500]


# --- calls and layouts ------------------------------------------------------------------------


def scanned(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, layer: (x + mlp(layer, x), None), x, p)[0]


def in_while(p: Any, x: Any) -> Any:
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, mlp(p, s[1])), (0, x))[1]


@jax.custom_vjp
def custom(p: Any, x: Any) -> Any:
    return mlp(p, x)


custom.defvjp(lambda p, x: (mlp(p, x), (p, x)), lambda res, g: (res[0], g))

LINE = 'up "d f" -> relu -> down "f d"'


@pytest.mark.parametrize(
    "call",
    [
        jax.jit(mlp),
        jax.checkpoint(mlp),
        custom,
        in_while,
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: mlp(p, x), x),
        lambda p, x: jax.lax.cond(x.sum() > 0, mlp, lambda p, x: mlp(p, 2 * x), p, x),
        lambda p, x: jax.vmap(functools.partial(mlp, p))(x),
        lambda p, x: jax.lax.map(functools.partial(mlp, p), x),
    ],
    ids=["jit", "remat", "custom_vjp", "while", "fori", "cond", "vmap", "map"],
)
def test_a_pair_is_found_inside_of_a_call(call: Any) -> None:
    (pair,) = discover(call, PLAIN, X)
    assert (pair.first, pair.second, pair.second_bias) == ("up", "down", "c")
    assert str(pair) == LINE


def test_scanned_layers_have_channels_of_their_own() -> None:
    stacked = {name: shape(3, *leaf.shape) for name, leaf in PLAIN.items()}
    (pair,) = discover(scanned, stacked, X)
    assert (pair.first_axes, pair.second_axes) == ("l d f", "l f d")


def test_what_is_carried_between_layers_is_the_same_in_all_of_them() -> None:
    """The residual stream of scanned layers is one axis, so `l` is no stack of it."""

    def fn(p: Any, x: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        h, _ = jax.lax.scan(layer, x @ p["in"], {"up": p["up"], "down": p["down"]})
        return h @ p["out"]

    params = {
        "in": shape(D, F), "up": shape(3, F, 20), "down": shape(3, 20, F), "out": shape(F, D),
    }  # fmt: skip
    inner, stream = sorted(discover(fn, params, X), key=lambda pair: pair.first_axes[0] != "l")
    assert (inner.first_axes, inner.second_axes) == ("l d f", "l f d")
    assert "l" not in stream.first_axes + stream.second_axes + "".join(stream.readers.values())


def test_experts_have_channels_of_their_own() -> None:
    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["w0"]))
        h = h * jnp.einsum("btd,edf->btef", x, p["w1"])
        y = jnp.einsum("btef,efd->bted", h, p["w2"])
        return jnp.einsum("bte,bted->btd", jax.nn.softmax(x @ p["r"]), y)

    params = {"r": shape(D, 4), "w0": shape(4, D, F), "w1": shape(4, D, F), "w2": shape(4, F, D)}
    assert found(fn, params, X) == ['w0 "e d f" * w1 "e d f" -> silu -> w2 "e f d", gated']


def attention(p: Any, x: Any, groups: int = 1) -> Any:
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    k, v = (jnp.repeat(y, groups, axis=2) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1]))
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


def test_heads_are_one_axis_of_queries_keys_and_values() -> None:
    params = {"q": shape(D, 6, 4), "k": shape(D, 6, 4), "v": shape(D, 6, 4), "o": shape(6, 4, D)}
    (pair,) = discover(attention, params, X)
    assert (pair.axis, pair.activation) == ("h", "identity")
    assert {pair.first: pair.first_axes, **pair.tables} == dict.fromkeys("qkv", "d h k")


def test_heads_in_groups() -> None:
    def fn(p: Any, x: Any) -> Any:
        own = {n: p[n].reshape(D, -1, 4) for n in "qkv"} | {"o": p["o"].reshape(-1, 4, D)}
        return attention(own, x, own["q"].shape[1] // own["k"].shape[1])

    params = {"q": shape(D, 24), "k": shape(D, 12), "v": shape(D, 12), "o": shape(24, D)}
    (pair,) = discover(fn, params, X)
    assert (pair.group, pair.first_axes, pair.second_axes) == ("g", "d (g k)", "(h k) d")
    assert dict(pair.tables) == {"k": "d (g k)", "q": "d (h k)"}
    assert dict(pair.sizes) == {"k": "4"}


def test_the_head_dim_of_queries_and_keys_is_approximate() -> None:
    params = {"q": shape(D, 6, 4), "k": shape(D, 6, 4), "v": shape(D, 6, 4), "o": shape(6, 4, D)}
    text = explain(attention, params, "q", X)
    assert "Axis 2 (4) is tied with k. It can be cut only approximately: it is summed over" in text
    assert "between two computed values" in text


class Conv(nn.Module):
    padding: Any = "SAME"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width, window in ((6, (1, 1)), (7, (3, 3))):
            x = nn.Conv(width, window, padding=self.padding)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Conv(5, (1, 1))(x)


IMAGE = shape(2, 9, 9, 3)


def test_convolutions_with_the_statistics_of_their_norms() -> None:
    variables = jax.eval_shape(Conv().init, jax.random.key(0), IMAGE)
    first, second = discover(Conv(), variables, IMAGE)
    assert (first.first, first.second) == ("Conv_0", "Conv_1")
    assert (first.first_axes, first.second_axes) == ("x y d f", "x y f d")
    assert {name: axes for name, axes in first.tables.items() if ":" in name} == {
        "batch_stats:BatchNorm_0/mean": "f",
        "batch_stats:BatchNorm_0/var": "f",
    }
    # After the norm a channel without weights is no constant of the bias alone.
    assert first.activation is None
    assert second.second == "Conv_2"


@pytest.mark.parametrize(
    ("window", "padding", "sums", "folds"),
    [(3, "SAME", False, False), (3, "VALID", True, False), (1, "VALID", True, True)],
)
def test_a_constant_is_folded_only_where_no_edge_is_padded(
    window: int, padding: str, sums: bool, folds: bool
) -> None:
    """By the trace it `sums` nothing but the channels; a spec does not tell of a window's edges."""

    def fn(p: Any, x: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        conv = functools.partial(
            jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=dims
        )
        h = jax.nn.sigmoid(conv(x, p["a"], padding="VALID") + p["ab"])
        return conv(h, p["b"], padding=padding) + p["bb"]

    params = {
        "a": shape(1, 1, 3, 6),
        "ab": shape(6),
        "b": shape(window, window, 6, 4),
        "bb": shape(4),
    }
    (pair,) = discover(fn, params, IMAGE)
    assert (pair.activation, pair.second_bias) == ("sigmoid", "bb" if sums else None)
    rng = np.random.default_rng(0)
    values = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
    values["a"][..., :2] = 0  # constants
    values["b"][..., 4:, :] = 0  # nothing reads them
    small, _ = slim(values, spec=Spec(name="CONV", pairs=pair))
    assert small["ab"].shape == (2 if folds else 4,)
    x = rng.normal(size=IMAGE.shape).astype(np.float32)
    np.testing.assert_allclose(fn(small, x), fn(values, x), rtol=1e-4, atol=1e-4)


def test_shards_lose_the_same_channels() -> None:
    auto = jax.sharding.AxisType.Auto  # or the specs must be those of the inputs
    mesh = jax.sharding.AbstractMesh((2,), ("tp",), axis_types=(auto,))
    spec = jax.sharding.PartitionSpec

    def local(p: Any, x: Any) -> Any:
        return jax.lax.psum(jax.nn.relu(x @ p["up"]) @ p["down"], "tp")

    fn = shard_map(
        local,
        mesh=mesh,
        in_specs=({"up": spec(None, "tp"), "down": spec("tp")}, spec()),
        out_specs=spec(),
    )
    (pair,) = discover(fn, {"up": PLAIN["up"], "down": PLAIN["down"]}, X)
    assert (pair.first_axes, pair.second_axes) == ("d (2 f)", "(2 f) d")


def test_an_axis_that_is_read_twice_is_dead_only_where_nobody_reads_it() -> None:
    def fn(p: Any, x: Any) -> Any:
        h = hidden(p, x)
        return h @ p["down"], h @ p["head"]

    params = {**PLAIN, "head": shape(F, 3)}
    (pair,) = discover(fn, params, X)
    assert (pair.second, dict(pair.readers)) == ("down", {"head": "f d"})


def test_tied_embeddings_are_in_one_group_with_both_uses() -> None:
    def fn(p: Any, tokens: Any) -> Any:
        return (p["e"][tokens] @ p["in"]) @ p["out"] @ p["e"].T

    params = {"e": shape(99, 6), "in": shape(6, F), "out": shape(F, 6)}
    text = explain(fn, params, "e", shape(2, 3, dtype=jnp.int32))
    assert "Axis 1 (6) is tied with in, out. It can be cut exactly" in text
    assert "Axis 0 (99) is tied with no other. It cannot be cut: entries of it are picked" in text


def test_concatenated_halves_are_tied() -> None:
    def fn(p: Any, x: Any) -> Any:
        return jnp.concatenate([jnp.tanh(x @ p["a"]), x @ p["b"]], axis=-1) @ p["down"]

    params = {"a": shape(D, F), "b": shape(D, F), "down": shape(2 * F, D)}
    (pair,) = discover(fn, params, X)
    assert pair.second_axes == "(2 f) d"


# --- what forbids ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (jax.nn.softmax, "the max over it is taken (reduce_max"),
        (lambda h: h - h.mean(axis=-1, keepdims=True), "it is summed over, not with a parameter"),
        (lambda h: jnp.cumsum(h, axis=-1), "it is summed up along"),
        (lambda h: jnp.sort(h, axis=-1), "it is sorted (sort at"),
        (lambda h: h[..., ::-1], "it is reversed"),
        (lambda h: jnp.roll(h, 1, axis=-1), "it is taken apart (slice"),
        (lambda h: h * jnp.arange(F), "each is known by its number (iota"),
        (lambda h: h * np.arange(F), "a constant in the code has an entry for each"),
        (lambda h: h / h.shape[-1], "a number in it follows from its size: 12 becomes 6 (div"),
        (lambda h: h * (jax.random.uniform(jax.random.key(0), h.shape) < 0.5), "random numbers"),
        (lambda h: jnp.fft.fft(h).real, "it is Fourier transformed"),
        (lambda h: h.at[..., 0].set(0), "written"),
        (lambda h: jax.lax.top_k(h, F)[0], "the largest along it are picked"),
    ],
)  # fmt: skip
def test_the_first_operation_that_forbids_a_cut_is_named(between: Any, why: str) -> None:
    params = {name: PLAIN[name] for name in ("up", "b", "down", "c")}
    with pytest.raises(DiscoveryError, match="nothing in the 4 tensors"):
        discover(functools.partial(mlp, between=between), params, X)
    text = explain(functools.partial(mlp, between=between), params, "up", X)
    assert "Axis 1 (12) is tied with b" in text
    assert why in text.partition("Axis 1")[2]


def test_the_place_is_the_line_of_the_user() -> None:
    def routed(h: Any) -> Any:
        return jnp.sort(h, axis=-1)

    text = explain(functools.partial(mlp, between=routed), PLAIN, "down", X)
    line = routed.__code__.co_firstlineno + 1
    assert f"(sort at tests/test_discover.py:{line} (" in text


def test_a_mean_over_channels_is_refused_although_a_parameter_weighs_them() -> None:
    def fn(p: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(x @ p["up"]) * p["w"], axis=-1)

    params = {"up": shape(D, F), "w": shape(F)}
    assert "a number in it follows from its size: 12 becomes 6" in explain(fn, params, "up", X)

    def stiff(p: Any, x: Any) -> Any:
        assert p["w"].shape == (F,)
        return fn(p, x)

    # Of a function that bears one width only, the number itself must do.
    assert "scaled by 12, which may follow from its size" in explain(stiff, params, "up", X)
    (pair,) = discover(lambda p, x: jnp.sum(jnp.tanh(x @ p["up"]) * p["w"], axis=-1), params, X)
    assert (pair.first, pair.second, pair.second_axes) == ("up", "w", "f")


def test_a_bias_that_is_used_elsewhere_takes_up_no_constants() -> None:
    """Folded into `c`, a constant would be in the second output too."""

    def fn(p: Any, x: Any) -> Any:
        y = hidden(p, x) @ p["down"]
        return y + p["c"], y

    (pair,) = discover(fn, PLAIN, X)
    assert pair.second_bias is None


def test_an_axis_that_a_tensor_has_twice_cannot_be_said() -> None:
    def fn(p: Any, x: Any) -> Any:
        h = x @ p["up"]
        return (h + jnp.tanh(h @ p["m"])) @ p["down"]

    params = {"up": shape(D, F), "m": shape(F, F), "down": shape(F, D)}
    assert "m has it twice, which no axis pattern can say" in explain(fn, params, "up", X)


def test_experts_that_are_mixed_in_between_lose_the_same_channels() -> None:
    """Places have weights of their own, but attention over the places mixes their channels."""

    def fn(p: Any, x: Any) -> Any:
        h = jnp.einsum("btd,tdf->btf", x, p["w1"])
        weights = jax.nn.softmax(jnp.einsum("btf,bsf->bts", jnp.sin(p["s"] * x[..., :1]), p["k"]))
        return jnp.einsum("btf,tfd->btd", jnp.einsum("bts,bsf->btf", weights, h), p["w2"])

    params = {
        "w1": shape(5, D, F), "w2": shape(5, F, D), "s": shape(5, 7), "k": shape(2, 5, 7),
    }  # fmt: skip
    pair = next(pair for pair in discover(fn, params, X) if pair.second == "w2")
    assert "e" not in pair.first_axes


def test_a_tied_autoencoder_has_one_kernel_for_first_and_second() -> None:
    """Its zero rows are zero columns, and a bias alone is no first layer that could be silent."""
    spec = discover(lambda p, x: jnp.tanh(x @ p["w"].T + p["b"]) @ p["w"], {
        "w": shape(F, D), "b": shape(F)}, X)  # fmt: skip
    (pair,) = spec
    assert (pair.first, pair.second, pair.activation) == ("b", "w", None)


def test_the_second_layer_is_a_kernel_rather_than_a_scale() -> None:
    params = {"up": shape(D, F), "s": shape(F), "down": shape(F, D)}
    (pair,) = discover(lambda p, x: (p["down"].T @ (p["s"] * (x @ p["up"]))[..., None])[..., 0],
                       params, X)  # fmt: skip
    assert (pair.second, dict(pair.tables), pair.activation) == ("down", {"s": "f"}, None)


def test_a_range_of_tokens_is_no_part_of_a_fused_kernel() -> None:
    def fn(p: Any, x: Any) -> Any:
        h, other = jnp.split(x @ p["w"], 2, axis=-1)
        return (h * jnp.tanh(other))[:, :2] @ p["down"]

    (pair,) = discover(fn, {"w": shape(D, 2 * F), "down": shape(F, D)}, shape(2, 4, D))
    assert (pair.gated, pair.parts, pair.activation) == (True, (1, 0), "tanh")


def test_shared_layers_are_one_site() -> None:
    """As in ALBERT; and where they end differently, nothing is claimed but the first rule."""
    (pair,) = discover(lambda p, x: mlp(p, mlp(p, x)), PLAIN, X)
    assert (str(pair), pair.second_bias) == (LINE, "c")
    (pair,) = discover(lambda p, x: mlp(p, jnp.tanh(x @ p["up"] + p["b"]) @ p["down"]), PLAIN, X)
    assert pair.activation is None


# --- primitives without a rule ----------------------------------------------------------------


def test_a_primitive_without_a_rule_blocks_what_enters_it_and_is_named() -> None:
    def fn(p: Any, x: Any) -> Any:
        y = mlp(p, x)
        h = jax.nn.relu(x @ p["u2"])
        return y + jax.pure_callback(lambda h: h, h, h) @ p["d2"]

    params = {**PLAIN, "u2": shape(D, F), "d2": shape(F, D)}
    with pytest.warns(DiscoveryWarning, match="no rule for the primitive pure_callback at "):
        spec = discover(fn, params, X)
    assert lines(spec) == [LINE]
    assert "no rule is known for pure_callback" in explain(fn, params, "u2", X)


def test_a_print_in_the_middle_is_a_reader() -> None:
    def fn(p: Any, x: Any) -> Any:
        h = hidden(p, x)
        jax.debug.print("{}", h)
        return h @ p["down"]

    params = {name: PLAIN[name] for name in ("up", "b", "down")}
    text = explain(fn, params, "up", X)
    assert "no rule is known for debug_" in text


def test_others_can_add_a_rule() -> None:
    name = "erf_inv"
    before = RULES.pop(name)
    fn = functools.partial(mlp, between=jax.lax.erf_inv)
    try:
        with pytest.raises(DiscoveryError):
            discover(fn, PLAIN, X)

        @axis_rule(name)
        def keeps_axes(e: Any) -> list[Any]:
            return [e.inputs[0].dims]

        (pair,) = discover(fn, PLAIN, X)
        assert pair.activation is None
    finally:
        RULES[name] = before


# --- what the user may give -------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.norm = nnx.BatchNorm(F, rngs=rngs, use_running_average=True)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.gelu(self.norm(self.up(x))))


def test_an_nnx_module_is_split_and_slimmed() -> None:
    block, x = Block(nnx.Rngs(0)), jnp.ones((2, D))
    (pair,) = spec = discover(block, x)
    assert pair == next(iter(discover(lambda m, x: m(x), block, x)))
    assert {*pair.tables} == {"norm/bias", "norm/mean", "norm/scale", "norm/var"}
    block.down.kernel = nnx.Param(block.down.kernel[...].at[:5].set(0.0))
    small, _ = slim(block, spec=spec)
    assert small.up.kernel.shape == (D, F - 5)
    np.testing.assert_allclose(small(x), block(x), rtol=1e-5)


def test_no_value_is_needed() -> None:
    """A 70-billion-parameter FFN, by shapes."""
    d, f = 8192, 28672
    params = {str(i): {"g": shape(d, f), "u": shape(d, f), "down": shape(f, d)} for i in range(80)}

    def fn(p: Any, x: Any) -> Any:
        for layer in p.values():
            x = x + (jax.nn.silu(x @ layer["g"]) * (x @ layer["u"])) @ layer["down"]
        return x

    (pair,) = discover(fn, params, shape(1, 8, d))
    assert pair.at == "{i}"


def test_a_spec_is_printed_stored_and_written_as_python() -> None:
    spec = discover(mlp, PLAIN, X, name="MY_FFN")
    assert Spec.from_json(spec.to_json()) == spec
    names: dict[str, Any] = {}
    exec(spec.source(), names)
    assert names["MY_FFN"] == spec
    assert str(spec) == f"MY_FFN\n  {LINE}"


def test_a_config_key_is_taken_where_it_is_the_only_one() -> None:
    cfg = {"hidden": F, "embed": D, "act_fn": "relu"}
    with pytest.warns(DiscoveryWarning, match="hidden is the only key of the config that is 12"):
        (pair,) = discover(mlp, PLAIN, X, cfg=cfg)
    assert (pair.width, pair.activation) == ("hidden", "config.act_fn")
    with pytest.warns(DiscoveryWarning, match="which of hidden, layers is its width 12"):
        (pair,) = discover(mlp, PLAIN, X, cfg={**cfg, "layers": F})
    assert pair.width is None


def test_a_config_key_is_tried_where_the_model_can_be_rebuilt() -> None:
    def rebuild(cfg: Any) -> Any:
        f = cfg["hidden"]
        return {**PLAIN, "up": shape(D, f), "b": shape(f), "down": shape(f, D)}

    cfg = {"hidden": F, "layers": F}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (pair,) = discover(mlp, PLAIN, X, cfg=cfg, rebuild=rebuild)
    assert pair.width == "hidden"


def test_a_key_that_says_more_than_a_width_is_not_to_be_changed() -> None:
    """As the hidden size, which is the width of a classifier's hidden layer, too."""

    def fn(p: Any, x: Any) -> Any:
        return mlp(p, x) + jax.nn.softmax(x @ p["u2"]) @ p["d2"]

    def rebuild(cfg: Any) -> Any:
        f, g = cfg["hidden"], cfg["other"]
        pair = {"up": shape(D, f), "b": shape(f), "down": shape(f, D)}
        return {**PLAIN, **pair, "u2": shape(D, g or f), "d2": shape(g or f, D)}

    for other, fixed in ((None, True), (7, False)):
        cfg = {"hidden": F, "other": other}
        (pair,) = discover(fn, rebuild(cfg), X, cfg=cfg, rebuild=rebuild)
        assert (pair.width, pair.fixed) == ("hidden", fixed)


class Fixed(nn.Module):
    """Of fixed sizes, as Linen modules are, with something done to the hidden channels."""

    between: Callable[[Any], Any] = lambda h: h

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = self.between(nn.relu(nn.Dense(F)(x)))
        return nn.Dense(D)(h)


def in_parts(h: Any) -> Any:
    return h.reshape(*h.shape[:-1], 3, F // 3).reshape(*h.shape[:-1], F)


def test_a_linen_module_is_traced_at_other_widths_than_its_own() -> None:
    variables = jax.eval_shape(Fixed().init, jax.random.key(0), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (pair,) = discover(Fixed(), variables, X)
    assert (pair.at, pair.first, pair.second) == ("", "Dense_0", "Dense_1")
    text = explain(Fixed(lambda h: h / h.shape[-1]), variables, "Dense_1/kernel", X)
    assert "a number in it follows from its size: 12 becomes 6" in text


def test_what_runs_at_one_width_only_is_found_and_a_warning_says_so() -> None:
    variables = jax.eval_shape(Fixed(in_parts).init, jax.random.key(0), X)
    with pytest.warns(DiscoveryWarning, match="does not run at another width of 1 of its pairs"):
        (pair,) = discover(Fixed(in_parts), variables, X)
    assert pair.second == "Dense_1"


# --- bad input --------------------------------------------------------------------------------


def test_a_function_of_nothing() -> None:
    values = {name: jnp.ones(leaf.shape) for name, leaf in PLAIN.items()}
    with pytest.raises(DiscoveryError, match="uses none of the 4 parameters"):
        discover(lambda p, x: mlp(values, x), PLAIN, X)


def test_parameters_that_are_not_used_are_named() -> None:
    with pytest.warns(DiscoveryWarning, match="does not use 1 of the parameters: more"):
        assert found(mlp, {**PLAIN, "more": shape(3)}, X) == [LINE]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, "name", 3, None),
        lambda y: {"logits": y, "label": (y > 0).astype(int)},
        lambda y: y.argmax(axis=-1),
    ],
    ids=["strings", "dict", "integers"],
)
def test_a_function_may_return_what_it_likes(wrap: Any) -> None:
    assert found(lambda p, x: wrap(mlp(p, x)), PLAIN, X) == [LINE]


_leaked: list[Any] = []


def leak(p: Any, x: Any) -> Any:
    if _leaked:
        return mlp(p, x + _leaked[0])
    _leaked.append(x)
    return mlp(p, x)


@pytest.mark.parametrize(
    ("fn", "seen", "mend"),
    [
        (lambda p, x: x[x > 0], "NonConcreteBooleanIndexError", "depend on values"),
        (lambda p, x: mlp(p, x) if x.sum() > 0 else x, "TracerBoolConversionError", "goes by val"),
        (lambda p, x: "text", "returns no array", "call it as it is meant"),
        (lambda p, x: p["nothing"], "KeyError", "call it as it is meant"),
        (leak, "UnexpectedTracerError", "an earlier trace"),
    ],
)
def test_a_function_that_cannot_be_traced(fn: Any, seen: str, mend: str) -> None:
    if fn is leak:
        _leaked.clear()
        jax.eval_shape(fn, PLAIN, X)
    with pytest.raises(DiscoveryError) as caught:
        discover(fn, PLAIN, X)
    assert "cannot be traced" in str(caught.value)
    assert seen in str(caught.value)
    assert mend in str(caught.value)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        h = nn.relu(nn.Dense(F)(x))
        return nn.Dense(D)(nn.Dropout(0.5, deterministic=not train)(h))


def test_random_keys() -> None:
    variables = jax.eval_shape(Dropped().init, jax.random.key(0), X)
    with pytest.raises(DiscoveryError, match="with rngs= if it draws random numbers"):
        discover(lambda p, x: Dropped().apply(p, x, train=True), variables, X)
    assert found(Dropped(), variables, X)
    rngs = {"dropout": jax.random.key(0)}
    text = explain(
        lambda p, x: Dropped().apply(p, x, train=True, rngs=rngs), variables, "Dense_0/kernel", X
    )
    assert "random numbers are drawn for each" in text


def test_no_function_and_no_tree() -> None:
    with pytest.raises(DiscoveryError, match="what was given is no function"):
        discover(PLAIN, X)
    with pytest.raises(UnsupportedTreeError):
        discover(mlp, jnp.ones(3), X)


def test_a_parameter_that_is_not_there() -> None:
    with pytest.raises(DiscoveryError, match=r"nearest: +down") as caught:
        explain(mlp, PLAIN, "dwn", X)
    assert caught.value.path == "dwn"


def test_a_path_that_is_not_clear() -> None:
    variables = jax.eval_shape(Fixed().init, jax.random.key(0), X)
    with pytest.raises(DiscoveryError, match="2 parameters end so") as caught:
        explain(Fixed(), variables, "kernel", X)
    assert caught.value.near == ("params/Dense_0/kernel", "params/Dense_1/kernel")


def test_inputs_where_the_path_should_be() -> None:
    with pytest.raises(DiscoveryError, match="the path of a parameter comes before the inputs"):
        explain(mlp, PLAIN, X, "up")  # pyright: ignore
    with pytest.raises(DiscoveryError, match=r"explain\(nnx_module, path, \*inputs\)"):
        explain(Block(nnx.Rngs(0)), X)


def test_an_nnx_module_is_explained() -> None:
    assert "with down/kernel, norm/bias" in explain(Block(nnx.Rngs(0)), "up/kernel", X)


@pytest.mark.parametrize(
    ("rebuild", "words"),
    [
        (lambda cfg: cfg["nope"], "KeyError: 'nope'"),
        (lambda cfg: None, "rebuild= makes other parameters"),
        (lambda cfg: {**PLAIN, "up": shape(D, F + 1)}, r"shape \(8, 13\)"),
        (lambda cfg: {**PLAIN, "more": shape(1)}, "expected: no such parameter"),
    ],
)
def test_a_rebuild_of_another_model(rebuild: Any, words: str) -> None:
    with pytest.raises(DiscoveryError, match=words):
        discover(mlp, PLAIN, X, cfg={"hidden": F}, rebuild=rebuild)


def test_a_rebuild_without_a_config_and_a_config_without_keys() -> None:
    with pytest.raises(DiscoveryError, match="rebuild= is a function of a config"):
        discover(mlp, PLAIN, X, rebuild=lambda cfg: PLAIN)
    with pytest.raises(ConfigError, match="the config has no keys"):
        discover(mlp, PLAIN, X, cfg="bert")


def test_linen_parameters_without_their_collection() -> None:
    variables = jax.eval_shape(Fixed().init, jax.random.key(0), X)
    with pytest.raises(DiscoveryError, match='"params": params'):
        discover(Fixed(), variables["params"], X)


def test_a_rule_that_returns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "sin", lambda e: None)
    with pytest.raises(DiscoveryError, match="the rule for sin does not return"):
        discover(functools.partial(mlp, between=jnp.sin), PLAIN, X)


def test_the_whole_report() -> None:
    def fn(p: Any, x: Any) -> Any:
        return mlp(p, x) + jax.nn.softmax(x @ p["u2"]) @ p["d2"]

    text = explain(fn, {**PLAIN, "u2": shape(D, 7), "d2": shape(7, D)}, None, X)
    assert text.startswith(f"1 kind of pairs that can be cut exactly\n  1 x {LINE}, 12 channels")
    assert "1 x d2 axis 0 (7): the max over it is taken (reduce_max at" in text


def test_it_is_public() -> None:
    assert flaxslim.discover is discover
    assert flaxslim.explain is explain


# --- counter-examples -------------------------------------------------------------------------


def values_of(params: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}


def check_cut(fn: Any, params: dict[str, np.ndarray], *inputs: Any) -> dict[str, np.ndarray]:
    """The function computes the same after what is dead was cut; and what is left of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flaxslim.NothingRemovedWarning)
        small, _ = slim(params, spec=discover(fn, params, *inputs))
    for one, other in zip(
        jax.tree.leaves(fn(small, *inputs)), jax.tree.leaves(fn(params, *inputs)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    return small


def constant(params: Any, bias: float, first: str = "up") -> dict[str, np.ndarray]:
    """Two channels read nothing and put out what becomes of their bias."""
    values = values_of(params)
    values[first][..., :2] = 0
    values["b"][:2] = bias
    return values


TOKENS = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)


def dense(p: Any, x: Any, act: Callable[[Any], Any]) -> Any:
    return act(x @ p["up"] + p["b"]) @ p["down"] + p["c"]


@pytest.mark.parametrize(
    ("act", "bias"),
    [
        (lambda h: jnp.minimum(jax.nn.relu(h), 50), 100.0),
        (lambda h: jnp.clip(h, -1e4, 1e4), 1e5),
        (lambda h: jnp.round(h * 20) / 20, 0.1234),
        (lambda h: jnp.where(h > 0.1, h, 0), np.float32(0.1)),
        (lambda h: h.astype(jnp.int32).astype(jnp.float32), 1.7),
        (lambda h: h.astype(bool).astype(jnp.float32), 1.7),
        (lambda h: jax.lax.reduce_precision(h, 4, 3), 1.7),
        (jax.lax.round, 0.5),
    ],
    ids=["clip50", "clip1e4", "grid", "step", "int", "bool", "float8", "halves"],
)
def test_another_function_is_not_taken_for_one_with_a_name(act: Any, bias: float) -> None:
    check_cut(functools.partial(dense, act=act), constant(PLAIN, bias), TOKENS)


def test_what_is_nearly_silent_is_not() -> None:
    (pair,) = discover(functools.partial(dense, act=lambda h: h + 1e-6), PLAIN, X)
    assert pair.activation == "x + 1e-06"


@pytest.mark.parametrize(
    "view",
    [
        lambda w, x: 0.5 * w,
        lambda w, x: w * x.mean(),
        lambda w, x: w * (jnp.arange(D) > 1),
        lambda w, x: jnp.where(jnp.arange(D) > 1, w, -w),
        lambda w, x: w.astype(jnp.int32).astype(jnp.float32),
    ],
)
def test_a_constant_is_not_folded_by_way_of_a_scaled_layer(view: Any) -> None:
    """What a constant adds would be scaled as the layer is."""

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["up"] + p["b"]) @ view(p["down"], x) + p["c"]

    def by_hand(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["up"] + p["b"])
        return (h[..., None] * view(p["down"], x)).sum(-2) + p["c"]

    for each in (fn, by_hand):
        check_cut(each, constant(PLAIN, 0.7), TOKENS)


def test_a_bias_is_that_of_a_sum_only_if_nothing_comes_between() -> None:
    def fn(p: Any, x: Any) -> Any:
        return (jnp.tanh(x @ p["up"] + p["b"]) @ p["down"]).astype(jnp.int32) + p["c"]

    check_cut(fn, constant(PLAIN, 0.7), TOKENS)


OTHERS = np.random.default_rng(2).normal(size=(2, 7, D)).astype(np.float32)


def _scores(x: Any, y: Any) -> Any:
    return jnp.einsum("btd,bsd->bts", x, y)


@pytest.mark.parametrize(
    "weights",
    [
        lambda x, y: jnp.swapaxes(jax.nn.softmax(_scores(y, x), -1), 1, 2),
        lambda x, y: jnp.broadcast_to(jax.nn.softmax(x[..., :1], -1), (2, 5, 7)),
        lambda x, y: (lambda e: e / e.sum(-1)[:, None])(jnp.exp(_scores(x, y[:, :5]))),
        lambda x, y: (lambda e: e / e.sum(-1)[:, None])(jnp.exp(_scores(x, x))),
        lambda x, y: (
            jnp.sort(_scores(x, y), -1) / jnp.cumsum(_scores(x, y), -1).sum(-1, keepdims=True)
        ),
    ],
    ids=["transposed", "broadcast", "columns", "columns of itself", "another sum"],
)
def test_weights_that_do_not_sum_to_one_average_nothing(weights: Any) -> None:
    def fn(p: Any, x: Any, y: Any) -> Any:
        w = weights(x, y)
        return w @ (y[:, : w.shape[-1]] @ p["up"] + p["b"]) @ p["down"] + p["c"]

    (pair,) = discover(fn, PLAIN, X, OTHERS)
    assert pair.activation is None
    check_cut(fn, constant(PLAIN, 0.7), TOKENS, OTHERS)


def test_weights_that_sum_to_one_average_wherever_they_were_moved() -> None:
    def fn(p: Any, x: Any, y: Any) -> Any:
        w = jnp.swapaxes(jax.nn.softmax(_scores(y, x), 1), 1, 2).reshape(2, 1, 5, 7)
        return (w @ (y @ p["up"] + p["b"])[:, None])[:, 0] @ p["down"] + p["c"]

    (pair,) = discover(fn, PLAIN, X, OTHERS)
    assert pair.activation == "identity"
    assert check_cut(fn, constant(PLAIN, 0.7), TOKENS, OTHERS)["b"].shape == (F - 2,)


@pytest.mark.parametrize(
    "combine",
    [
        lambda g, u, w: g * u + (u - jnp.swapaxes(u, 0, 1)),
        lambda g, u, w: jax.nn.silu(g) * u + (g - w @ g),
        lambda g, u, w: jax.nn.silu(g) * u + (u - w @ u),
        lambda g, u, w: jnp.where(u != jnp.swapaxes(u, 0, 1), 5.0, g * u),
        lambda g, u, w: jax.nn.silu(g) * jnp.clip(u, -20, 20),
        lambda g, u, w: jax.nn.silu(g) * jnp.round(u * 10) / 10,
    ],
    ids=["moved", "averaged gate", "averaged", "compared", "clipped", "grid"],
)
def test_what_was_moved_is_not_the_same_value(combine: Any) -> None:
    """A gate that is zero leaves no term in which what it gates stands by itself."""

    def fn(p: Any, x: Any) -> Any:
        w = jax.nn.softmax(_scores(x, x), -1)
        return combine(x @ p["g"], x @ p["u"], w) @ p["down"]

    x = np.random.default_rng(3).normal(size=(4, 4, D)).astype(np.float32)
    for name in ("g", "u"):
        values = values_of(GATED)
        values[name][:, :2] = 0
        check_cut(fn, values, x)
    (pair,) = discover(fn, GATED, x)
    assert not pair.gated


def test_a_row_that_is_not_there_may_be_another_number() -> None:
    def fn(p: Any, tokens: Any) -> Any:
        rows = jnp.take(p["e"], tokens, axis=0, mode="fill", fill_value=3.0)
        return rows @ p["down"] + p["c"]

    values = values_of({"e": shape(9, F), "down": shape(F, D), "c": shape(D)})
    values["e"][:, :2] = 0
    check_cut(fn, values, np.array([[0, 1, 99]]))


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (lambda n, x: jnp.zeros(n), "the shape of an output follows from its size"),
        (lambda n, x: n, "a number that it returns follows from its size"),
        (
            lambda n, x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, n // 3, 1), (1, 1, 1), "SAME"
            ),
            "a number in it follows from its size (reduce_window_max at",
        ),
        (lambda n, x: jnp.cumsum(x, 1 if n == F else 2), "along another axis at another size"),
    ],
    ids=["shape", "number", "window", "axis"],
)
def test_what_else_tells_how_many_channels_there_are(told: Any, why: str) -> None:
    def fn(p: Any, x: Any) -> Any:
        return mlp(p, x), told(p["up"].shape[1], x)

    assert why in explain(fn, PLAIN, "up", X)


def test_a_window_of_one_may_still_move() -> None:
    def shifted(h: Any) -> Any:
        around = ((0, 0), (0, 0), (-1, 1))
        return jax.lax.reduce_window(h, -9.0, jax.lax.max, (1, 1, 1), (1, 1, 1), around)

    text = explain(functools.partial(mlp, between=shifted), PLAIN, "up", X)
    assert "a window slides along it" in text


@pytest.mark.parametrize(
    "between",
    [
        lambda h: jnp.concatenate([jnp.zeros((2, 5, 0)), h], -1),
        lambda h: jnp.concatenate([h[:, :0], h], 1),
        lambda h: h + h[:, :0].reshape(-1, 1).sum(),
        lambda h: h + jnp.split(h[:, :0].sum(-1), 1, 1)[0].sum(),
        lambda h: h * jax.lax.bitcast_convert_type(h, jnp.uint8).sum(-1),
        lambda h: jnp.where(h > 0, h, np.finfo(np.float64).min),
        lambda h: jax.vmap(lambda h: jax.lax.psum(h, "i"), axis_name="i")(h),
        lambda h: jax.vmap(lambda h: h - jax.lax.pmax(h, "i"), axis_name="i")(h),
    ],
    ids=["empty", "empty time", "empty reshape", "empty split", "bits", "float64", "psum", "pmax"],
)
def test_nothing_but_a_flaxslim_error_is_raised(between: Any) -> None:
    with enable_x64():
        assert explain(functools.partial(mlp, between=between), PLAIN, "up", X)


def test_a_parameter_may_be_a_number() -> None:
    (pair,) = discover(lambda p, x: mlp(p, x) * p["s"], {**PLAIN, "s": 1.5}, X)
    assert str(pair) == LINE


def test_keys_that_cannot_be_sorted() -> None:
    with pytest.raises(UnsupportedTreeError, match="cannot flatten the tree"):
        discover(mlp, {**PLAIN, 7: shape(3)}, X)
    with pytest.raises(DiscoveryError, match="cannot flatten the inputs"):
        discover(lambda p, x: mlp(p, x["x"]), PLAIN, {"x": X, 7: X})


def test_a_flattened_image_is_summed_over_with_its_channels() -> None:
    """Each place of the image has rows of its own for a channel, and its constant adds up."""

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.sigmoid(x @ p["up"] + p["b"])
        return h.reshape(h.shape[0], -1) @ p["down"] + p["c"]

    params = {"up": shape(D, F), "b": shape(F), "down": shape(5 * F, 3), "c": shape(3)}
    (pair,) = spec = discover(fn, params, X)
    assert (pair.second_axes, pair.activation, pair.second_bias) == ("(n5 f) d", "sigmoid", "c")
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
    values["up"][:, 2:4] = 0  # constants
    values["down"].reshape(5, F, 3)[:, :2] = 0  # nobody reads them
    with enable_x64():
        small, _ = slim(values, spec=spec)
        x = rng.normal(size=X.shape)
        np.testing.assert_allclose(fn(small, x), fn(values, x), rtol=1e-12)
    assert small["down"].shape == (5 * (F - 4), 3)


# --- what is inside of a channel --------------------------------------------------------------


def _heads_of(p: Any, name: str, x: Any) -> Any:
    return (x @ p[name]["kernel"] + p[name]["bias"]).reshape(*x.shape[:-1], -1, 4)


def _normed_heads(p: Any, x: Any) -> Any:
    """Attention whose heads are normed, each over its own values."""
    q, k, v = (_heads_of(p, name, x) for name in "qkv")
    o = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k)), v)
    o = o * jax.lax.rsqrt((o**2).mean(-1, keepdims=True) + 1e-5)
    return o.reshape(*x.shape[:-1], -1) @ p["o"]["kernel"] + p["o"]["bias"]


def _centred(p: Any, x: Any) -> Any:
    v = _heads_of(p, "v", x)
    v = jax.nn.relu(v - v.mean(-1, keepdims=True))
    return v.reshape(*x.shape[:-1], -1) @ p["o"]["kernel"] + p["o"]["bias"]


def _reordered(p: Any, x: Any) -> Any:
    """The values of each channel change places between the layers."""
    v = jnp.swapaxes(_heads_of(p, "v", x).reshape(*x.shape[:-1], -1, 2, 2), -1, -2)
    return jax.nn.relu(v).reshape(*x.shape[:-1], -1) @ p["o"]["kernel"] + p["o"]["bias"]


def _mixed(p: Any, x: Any) -> Any:
    v = jnp.tanh(_heads_of(p, "v", x))
    return jnp.swapaxes(v, -1, -2) @ p["mix"]["kernel"] + p["mix"]["bias"]


@pytest.mark.parametrize("fn", [_normed_heads, _centred, _reordered, _mixed])
def test_what_mixes_the_values_of_a_channel_claims_no_activation(fn: Any) -> None:
    """Its constants are not those of its bias, value by value."""
    rng = np.random.default_rng(0)

    def dense(n: int, m: int) -> Any:
        return {name: rng.normal(size=size) for name, size in (("kernel", (n, m)), ("bias", m))}

    x = rng.normal(size=(2, 5, 6)).astype(np.float32)
    p: Any = {name: dense(6, 12) for name in "qkv"}
    p |= {"o": dense(12, 6), "mix": dense(3, 3)}
    p = jax.tree.map(lambda a: a.astype(np.float32), p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = discover(fn, p, x)
        assert {pair.activation for pair in spec} == {None}
        p["v"]["kernel"][:, :8] = 0
        small, _ = slim(p, spec=spec)
    np.testing.assert_allclose(fn(small, x), fn(p, x), rtol=1e-4, atol=1e-5)
