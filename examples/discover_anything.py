"""Models that nobody wrote a spec for: find their prunable pairs, cut them, prove it.

    python examples/discover_anything.py

Five models, each written in another way: home-made Linen, nnx, plain functions on a pytree, stock
convolutions of transformers, and a ViT as big_vision writes it. For each the spec is discovered
from shapes alone, random channels are killed, and the slimmed model is compared with the one
before. Needs no network and no weights.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import tree_map_with_path
from rich.console import Console
from rich.table import Table

import flaxslim

D = 32  # the embedding
TOKENS = np.random.default_rng(1).standard_normal((2, 10, D)).astype(np.float32)
IMAGES = np.random.default_rng(2).standard_normal((2, 32, 32, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A line of the table."""

    name: str
    pairs: int
    seconds: float
    before: int
    after: int
    difference: float
    equal: bool


# --- what is the same for all models ----------------------------------------------------------


def discover(name: str, fn: Any, params: Any, *inputs: Any, **more: Any) -> tuple[Any, float]:
    """The spec and the seconds it took; prints it, and what could not be told."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec = flaxslim.discover(fn, params, *inputs, name=name.upper().replace(" ", "_"), **more)
    seconds = time.perf_counter() - start
    print(f"\n{spec}\n({seconds:.2f} s)")
    for warning in caught:
        if issubclass(warning.category, flaxslim.DiscoveryWarning):
            print(f"note: {warning.message}")
    return spec, seconds


def randomly(shapes: Any) -> Any:
    """Random float32 parameters; variances are positive."""
    rng = np.random.default_rng(0)

    def values(keys: tuple[Any, ...], leaf: Any) -> np.ndarray:
        normal = rng.standard_normal(leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        last = path(keys).rpartition("/")[2]
        normal = 1 + 0.1 * normal if last in ("var", "scale") else normal
        return np.asarray(normal, np.float32)

    return tree_map_with_path(values, shapes)


def path(keys: tuple[Any, ...]) -> str:
    """The path of a leaf as flaxslim calls it."""
    names = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in keys
    ]
    return "/".join(names[:-1] if names[-1] in ("value", "raw_value") else names)


def kill(params: Any, spec: Any, cfg: Any = None) -> Any:
    """The parameters with a third to a half of each site's channels read by nobody."""
    rng = np.random.default_rng(0)
    sites = spec.sites(params, cfg)
    dead = []
    for site in sites:
        count = int(rng.uniform(0.33, 0.5) * site.size)
        dead.append((site, rng.permutation(site.size)[: max(1, count)]))

    def zeroed(keys: tuple[Any, ...], leaf: Any) -> Any:
        for site, channels in dead:
            for tensor in site.reading:
                if tensor.path == path(keys):
                    leaf = tensor.axes.zero(leaf, site.pair.axis, channels)
        return leaf

    return tree_map_with_path(zeroed, params)


def result(name: str, spec: Any, seconds: float, proof: Any) -> Result:
    """What a proof says of a cut, for the table; raises if the two are not equal."""
    proof.raise_if_failed()
    line = Result(
        name=name,
        pairs=len(spec.pairs),
        seconds=seconds,
        before=proof.parameters.before,
        after=proof.parameters.after,
        difference=proof.relative,
        equal=proof.ok,
    )
    print(f"{name}: {line.before:,} -> {line.after:,} parameters, equal: {line.equal}")
    return line


def cut(name: str, fn: Callable[..., Any], shapes: Any, x: Any) -> Result:
    """Discover, kill, slim and prove, for a function that takes its sizes from its parameters."""
    spec, seconds = discover(name, fn, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype))
    params = kill(randomly(shapes), spec)
    small, _ = flaxslim.slim(params, spec=spec, width="per_layer")
    proof = flaxslim.verify(params, small, fn, inputs=x, spec=spec, repeats=0)
    return result(name, spec, seconds, proof)


# --- Linen, with an activation and an attention of its own --------------------------------------


class Layer(nn.Module):
    hidden: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((self.heads, 8), name=name)(h) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8))
        h = jnp.einsum("bhts,bshk->bthk", weights, v)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="out")(h)
        h = nn.Dense(self.hidden, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(D, name="down")(h * jnp.sin(2 * h) ** 2)


class Encoder(nn.Module):
    hidden: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(3):
            x = Layer(self.hidden, self.heads, name=f"layer_{i}")(x)
        return x


def linen() -> Result:
    """The module is built at the widths that are left: `cfg` and `rebuild` find their keys."""
    cfg: dict[str, Any] = {"hidden": 96, "heads": 6}
    key, x = jax.random.key(0), jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)

    def rebuild(cfg: Any) -> Any:
        return jax.eval_shape(Encoder(**cfg).init, key, x)

    shapes = rebuild(cfg)
    spec, seconds = discover("Linen", Encoder(**cfg), shapes, x, cfg=cfg, rebuild=rebuild)
    params = kill(randomly(shapes), spec, cfg)
    small, small_cfg = flaxslim.slim(params, cfg, spec)
    print(f"{cfg} -> {small_cfg}")
    proof = flaxslim.verify(
        (params, cfg), (small, small_cfg), lambda cfg: Encoder(**cfg), inputs=TOKENS, spec=spec,
        repeats=0,
    )  # fmt: skip
    return result("Linen", spec, seconds, proof)


# --- nnx --------------------------------------------------------------------------------------


class Mixer(nnx.Module):
    """Layers that share a stream of their own width, and a gate."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.enter, self.leave = linear(D, 40), linear(40, 5)
        self.gate, self.up, self.down = linear(40, 80), linear(40, 80), linear(80, 40)

    def __call__(self, x: Any) -> Any:
        h = self.enter(x)
        h = h + self.down(nnx.silu(self.gate(h)) * self.up(h))
        return self.leave(h)


def in_nnx() -> Result:
    """A new module comes back, of the same class."""
    model = Mixer(nnx.Rngs(0))
    spec, seconds = discover("nnx", model, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, kill(state, spec))
    small, _ = flaxslim.slim(model, spec=spec)
    print(f"stream {model.enter.out_features} -> {small.enter.out_features}")
    proof = flaxslim.verify(model, small, inputs=TOKENS, spec=spec, repeats=0)
    return result("nnx", spec, seconds, proof)


# --- a pytree and functions ---------------------------------------------------------------------


def scanned(p: Any, x: Any) -> Any:
    """Six gated layers in one scan, with norms of their own, in dicts and lists."""

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        h = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["norm"]
        gate, up = (h @ w for w in p["in"])
        return x + (jax.nn.mish(gate) * up) @ p["out"], None

    x = x @ p["embed"][0] + p["embed"][1]
    return jax.lax.scan(layer, x, p["layers"])[0]


def pytree() -> Result:
    def init() -> Any:
        layers = {
            "norm": jnp.zeros((6, D)),
            "in": [jnp.zeros((6, D, 72)), jnp.zeros((6, D, 72))],
            "out": jnp.zeros((6, 72, D)),
        }
        return {"embed": [jnp.zeros((D, D)), jnp.zeros(D)], "layers": layers}

    return cut("pytree", scanned, jax.eval_shape(init), TOKENS)


# --- stock convolutions -----------------------------------------------------------------------


def at_own_sizes(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """For `nn.intercept_methods`: a layer is as wide as its kernel."""
    module = context.module
    if isinstance(module, nn.Conv | nn.Dense) and context.method_name == "__call__":
        kernel = module.get_variable("params", "kernel")
        object.__setattr__(module, "features", kernel.shape[-1])
    return next_fun(*args, **kwargs)


def resnet() -> Result:
    """The statistics of each batch norm are cut too.

    The class takes its widths from code (a quarter of `hidden_sizes`), so no config can say those
    that are left: `flaxslim.layout` knows no convolutions. An interceptor of Linen sizes them.
    """
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    cfg = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=7)
    model: Any = FlaxResNetForImageClassification(
        cfg, input_shape=(1, *IMAGES.shape[1:]), _do_init=False
    )

    def fn(params: Any, images: Any) -> Any:
        with nn.intercept_methods(at_own_sizes):
            pixels = images.transpose(0, 3, 1, 2)
            return model(pixels, params=params, train=False).logits

    return cut("ResNet", fn, model.params_shape_tree, IMAGES)


# --- a ViT by the names of big_vision -----------------------------------------------------------


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.gelu(nn.Dense(4 * D)(x))
        return nn.Dense(D)(x)


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, deterministic=True)(h, h)
        return x + MlpBlock()(nn.LayerNorm()(x))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(4):
            x = Encoder1DBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = nn.Conv(D, (8, 8), strides=(8, 8), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, D)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], D))
        x = Transformer(name="Transformer")(x)
        return nn.Dense(10, name="head")(x.mean(axis=1))


def vit() -> Result:
    """The class is at fixed sizes; its parameters are run at those that each layer has left."""
    x = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    shapes = jax.eval_shape(ViT().init, jax.random.key(0), x)

    def fn(params: Any, images: Any) -> Any:
        with nn.intercept_methods(heads_too):
            return ViT().apply(params, images)

    return cut("ViT", fn, shapes, IMAGES)


def heads_too(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """As `at_own_sizes`, and attention has as many heads as its kernels."""
    module = context.module
    if isinstance(module, nn.MultiHeadDotProductAttention) and context.method_name == "__call__":
        _, heads, size = module.get_variable("params", "query")["kernel"].shape
        object.__setattr__(module, "num_heads", heads)
        object.__setattr__(module, "qkv_features", heads * size)
    return at_own_sizes(next_fun, args, kwargs, context)


# --- all ----------------------------------------------------------------------------------------


def results() -> Iterator[Result]:
    for one in (linen, in_nnx, pytree, resnet, vit):
        yield one()


def table(lines: list[Result]) -> Table:
    made = Table(title="discovered, cut, proven")
    for column in ("model", "pairs", "discover s", "parameters", "slimmed", "difference", "equal"):
        made.add_column(column, justify="left" if column == "model" else "right")
    for line in lines:
        made.add_row(
            line.name,
            str(line.pairs),
            f"{line.seconds:.2f}",
            f"{line.before:,}",
            f"{line.after:,}",
            f"{line.difference:.1e}",
            str(line.equal),
        )
    return made


def main() -> list[Result]:
    lines = list(results())
    Console().print(table(lines))
    return lines


if __name__ == "__main__":
    main()
