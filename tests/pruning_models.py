"""Small networks to prune while they train: parameters, a spec, a loss, and batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxslim import Pair, Spec

MLP = Spec(
    name="MLP",
    pairs=Pair(at="layers/{i}", first="up", second="down", activation="gelu", width="hidden"),
)
GATED = Spec(
    name="GATED",
    pairs=Pair(at="mlp", first=("gate", "up"), second="down", gated=True, activation="silu"),
)
STACKED = Spec(
    name="STACKED",
    pairs=Pair(
        first="up", second="down", first_axes="l d f", second_axes="l f d", activation="relu"
    ),
)
HEADS = Spec(
    name="HEADS",
    pairs=Pair(
        axis="h",
        group="g",
        first="v",
        second="o",
        first_axes="d (g k)",
        second_axes="(h k) d",
        also={"q": "d (h k)", "k": "d (g k)"},
        sizes={"k": "head_dim"},
        group_width="groups",
        width="heads",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """A network: its parameters, its spec, a config if the spec needs one, and its function."""

    params: Any
    spec: Spec
    fn: Callable[[Any, Any], Any]
    cfg: Any = None

    def loss(self, params: Any, batch: tuple[Any, Any]) -> Any:
        x, y = batch
        return jnp.mean((self.fn(params, x) - y) ** 2)


def _normal(rng: Any, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[-2] if len(shape) > 1 else 4)


def mlp(layers: int = 2, d: int = 6, f: int = 10, seed: int = 0) -> Net:
    rng = np.random.default_rng(seed)

    def dense(*shape: int) -> dict[str, Any]:
        return {"kernel": _normal(rng, *shape), "bias": _normal(rng, shape[-1])}

    params = {
        "layers": {str(i): {"up": dense(d, f), "down": dense(f, d)} for i in range(layers)},
        "out": {"kernel": _normal(rng, d, 3)},
    }

    def fn(p: Any, x: Any) -> Any:
        for layer in p["layers"].values():
            h = jax.nn.gelu(x @ layer["up"]["kernel"] + layer["up"]["bias"])
            x = x + h @ layer["down"]["kernel"] + layer["down"]["bias"]
        return x @ p["out"]["kernel"]

    return Net(params=jax.tree.map(jnp.asarray, params), spec=MLP, fn=fn, cfg={"hidden": f})


def gated(d: int = 6, f: int = 10) -> Net:
    rng = np.random.default_rng(1)
    layer = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    params = {"mlp": {name: {"kernel": _normal(rng, *s)} for name, s in layer.items()}}
    params |= {"out": {"kernel": _normal(rng, d, 3)}}

    def fn(p: Any, x: Any) -> Any:
        m = {name: layer["kernel"] for name, layer in p["mlp"].items()}
        return (x + (jax.nn.silu(x @ m["gate"]) * (x @ m["up"])) @ m["down"]) @ p["out"]["kernel"]

    return Net(params=jax.tree.map(jnp.asarray, params), spec=GATED, fn=fn)


def stacked(layers: int = 3, d: int = 6, f: int = 10) -> Net:
    rng = np.random.default_rng(2)
    params = {
        "up": {"kernel": _normal(rng, layers, d, f), "bias": _normal(rng, layers, f)},
        "down": {"kernel": _normal(rng, layers, f, d)},
        "out": {"kernel": _normal(rng, d, 3)},
    }

    def fn(p: Any, x: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            up, bias, down = own
            return x + jax.nn.relu(x @ up + bias) @ down, None

        x, _ = jax.lax.scan(layer, x, (p["up"]["kernel"], p["up"]["bias"], p["down"]["kernel"]))
        return x @ p["out"]["kernel"]

    return Net(params=jax.tree.map(jnp.asarray, params), spec=STACKED, fn=fn)


def heads(d: int = 6, h: int = 6, g: int = 3, k: int = 2) -> Net:
    """Attention of h query heads on g key/value heads, over the rows of x as one sequence."""
    rng = np.random.default_rng(3)
    shapes = {"q": (d, h * k), "k": (d, g * k), "v": (d, g * k), "o": (h * k, d)}
    params = {name: {"kernel": _normal(rng, *shape)} for name, shape in shapes.items()}
    params["out"] = {"kernel": _normal(rng, d, 3)}

    def fn(p: Any, x: Any) -> Any:
        def split(name: str) -> Any:
            return (x @ p[name]["kernel"]).reshape(len(x), -1, k)

        q, key, value = split("q"), split("k"), split("v")
        times = q.shape[1] // key.shape[1]
        key, value = (jnp.repeat(y, times, axis=1) for y in (key, value))
        weights = jax.nn.softmax(jnp.einsum("ihk,jhk->hij", q, key) / np.sqrt(k))
        mixed = jnp.einsum("hij,jhk->ihk", weights, value).reshape(len(x), -1)
        return (x + mixed @ p["o"]["kernel"]) @ p["out"]["kernel"]

    cfg = {"heads": h, "groups": g, "head_dim": k}
    return Net(params=jax.tree.map(jnp.asarray, params), spec=HEADS, fn=fn, cfg=cfg)


NETS: dict[str, Callable[[], Net]] = {
    "mlp": mlp,
    "gated": gated,
    "stacked": stacked,
    "heads": heads,
}


def batches(count: int, size: int = 8, d: int = 6, seed: int = 5) -> tuple[Any, Any]:
    """Inputs `(count, size, d)` and targets `(count, size, 3)` of a fixed random function."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size, d)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(d, 3)).astype(np.float32))
    return jnp.asarray(x), jnp.asarray(y)
