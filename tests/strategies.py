"""Small networks of feed-forward layers, computed by plain numpy, for the core's tests.

A layer is held in one canonical form, whatever layout its parameters have in the tree. The
layouts are packed and unpacked by hand here, so that a mistake in `flaxslim._axes` cannot hide.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

from flaxslim import Pair, Plan, Spec

quick = hypothesis.settings(max_examples=30, deadline=None)

_erf = np.vectorize(math.erf, otypes=[np.float64])

# Zero at zero, so that a silent channel adds nothing; and not.
QUIET: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "tanh": np.tanh,
}
LOUD: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
}
ACTS = QUIET | LOUD


@dataclasses.dataclass
class Ffn:
    """first (parts, d, f), first_bias (parts, f) or None, second (f, d), second_bias (d,) or None.

    One part is plain, two are (gate, up).
    """

    first: np.ndarray
    first_bias: np.ndarray | None
    second: np.ndarray
    second_bias: np.ndarray | None

    @property
    def width(self) -> int:
        return len(self.second)

    def __call__(self, x: np.ndarray, act: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        bias = 0.0 if self.first_bias is None else self.first_bias[:, None]
        h = np.einsum("nd,pdf->pnf", x, self.first.astype(np.float64)) + bias
        h = act(h[0]) * h[1] if len(h) == 2 else act(h[0])
        y = h @ self.second.astype(np.float64)
        return y if self.second_bias is None else y + self.second_bias


def run(layers: list[Ffn], act: str, x: np.ndarray) -> np.ndarray:
    """A residual stack in float64."""
    for layer in layers:
        x = x + layer(x, ACTS[act])
    return x


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a canonical layer lies in a tree: the pair that says so, and the way there and back."""

    pair: Mapping[str, Any]
    parts: int
    pack: Callable[[np.ndarray], dict[str, np.ndarray]]  # (parts, d, f) or (parts, f)
    unpack: Callable[[dict[str, np.ndarray]], np.ndarray]
    transposed: bool = False

    def kernel(self, x: np.ndarray) -> np.ndarray:
        return x.T if self.transposed else x

    def pack_layer(self, ffn: Ffn) -> dict[str, Any]:
        tree: dict[str, Any] = {"down": {"kernel": self.kernel(ffn.second)}}
        if ffn.second_bias is not None:
            tree["down"]["bias"] = ffn.second_bias
        for name, kernel in self.pack(ffn.first).items():
            tree[name] = {"kernel": self.kernel(kernel)}
        if ffn.first_bias is not None:
            for name, bias in self.pack(ffn.first_bias).items():
                tree[name]["bias"] = bias
        return tree

    def unpack_layer(self, tree: Mapping[str, Any]) -> Ffn:
        first = {k: np.asarray(v["kernel"]) for k, v in tree.items() if k != "down"}
        biases = {k: np.asarray(v["bias"]) for k, v in tree.items() if k != "down" and "bias" in v}
        second_bias = tree["down"].get("bias")
        return Ffn(
            first=self.unpack({k: self.kernel(v) for k, v in first.items()}),
            first_bias=self.unpack(biases) if biases else None,
            second=self.kernel(np.asarray(tree["down"]["kernel"])),
            second_bias=None if second_bias is None else np.asarray(second_bias),
        )

    def tree(self, layers: list[Ffn]) -> dict[str, Any]:
        return {"layers": {str(i): self.pack_layer(layer) for i, layer in enumerate(layers)}}

    def layers(self, tree: Mapping[str, Any]) -> list[Ffn]:
        return [self.unpack_layer(tree["layers"][str(i)]) for i in range(len(tree["layers"]))]

    def spec(self, activation: str | None) -> Spec:
        pair = Pair(
            second="down",
            at="layers/{i}",
            width="hidden",
            activation=activation,
            gated=self.parts == 2,
            **self.pair,
        )
        return Spec(name="TEST_FFN", pairs=pair)


PLAIN = {
    "plain": Layout({"first": "up"}, 1, lambda w: {"up": w[0]}, lambda t: t["up"][None]),
    "transposed": Layout(
        {"first": "up", "first_axes": "f d", "second_axes": "d f"},
        1,
        lambda w: {"up": w[0]},
        lambda t: t["up"][None],
        transposed=True,
    ),
}
GATED = {
    "gated": Layout(
        {"first": ("gate", "up")},
        2,
        lambda w: {"gate": w[0], "up": w[1]},
        lambda t: np.stack([t["gate"], t["up"]]),
    ),
    "fused": Layout(
        {"first": "up", "first_axes": "d (2 f)"},
        2,
        lambda w: {"up": np.concatenate(list(w), axis=-1)},
        lambda t: np.stack(np.split(t["up"], 2, axis=-1)),
    ),
    "fused transposed": Layout(
        {"first": "up", "first_axes": "(2 f) d", "second_axes": "d f"},
        2,
        lambda w: {"up": np.concatenate(list(w), axis=-1)},
        lambda t: np.stack(np.split(t["up"], 2, axis=-1)),
        transposed=True,
    ),
    "interleaved": Layout(
        {"first": "up", "first_axes": "d (f 2)"},
        2,
        lambda w: {"up": np.stack(list(w), axis=-1).reshape(*w.shape[1:-1], -1)},
        lambda t: np.stack([t["up"][..., 0::2], t["up"][..., 1::2]]),
    ),
    "stacked": Layout(
        {"first": "up", "first_axes": "2 d f"}, 2, lambda w: {"up": w}, lambda t: t["up"]
    ),
}
LAYOUTS = PLAIN | GATED


@dataclasses.dataclass
class Net:
    """A network, and the channels of each layer that a test may make die."""

    layout: Layout
    layers: list[Ffn]
    dead: list[np.ndarray]
    x: np.ndarray

    @property
    def cfg(self) -> dict[str, Any]:
        return {"hidden": self.layers[0].width}

    @property
    def living(self) -> list[set[int]]:
        return [
            set(range(n.width)) - set(d.tolist())
            for n, d in zip(self.layers, self.dead, strict=True)
        ]

    @property
    def need(self) -> int:
        return max(1, *map(len, self.living))

    @property
    def tree(self) -> dict[str, Any]:
        return self.layout.tree(self.layers)

    def each(self) -> list[tuple[Ffn, np.ndarray]]:
        return list(zip(self.layers, self.dead, strict=True))


def net(
    layout: Layout,
    *,
    seed: int,
    d: int = 3,
    f: int = 7,
    depth: int = 2,
    first_bias: bool = True,
    second_bias: bool = True,
    share: float | None = None,
) -> Net:
    """A random network with no zero anywhere, and a random dead set for each layer."""
    rng = np.random.default_rng(seed)
    layers = [
        Ffn(
            first=_random(rng, layout.parts, d, f),
            first_bias=_random(rng, layout.parts, f) if first_bias else None,
            second=_random(rng, f, d),
            second_bias=_random(rng, d) if second_bias else None,
        )
        for _ in range(depth)
    ]
    dead = [
        np.flatnonzero(rng.random(f) < (rng.random() if share is None else share)) for _ in layers
    ]
    return Net(layout=layout, layers=layers, dead=dead, x=rng.normal(size=(5, d)))


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(0.3, 1.0, shape) * rng.choice([-1.0, 1.0], shape)


@st.composite
def nets(
    draw: st.DrawFn,
    layouts: Mapping[str, Layout] = LAYOUTS,
    *,
    first_bias: bool | None = None,
    second_bias: bool | None = None,
) -> Net:
    return net(
        layouts[draw(st.sampled_from(sorted(layouts)))],
        seed=draw(st.integers(0, 2**32 - 1)),
        d=draw(st.integers(1, 4)),
        f=draw(st.integers(1, 9)),
        depth=draw(st.integers(1, 3)),
        first_bias=draw(st.booleans()) if first_bias is None else first_bias,
        second_bias=draw(st.booleans()) if second_bias is None else second_bias,
    )


def rules_of(plan: Plan) -> set[str]:
    return {name for cut in plan.cuts for name in cut.rules}


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference relative to the largest output."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@contextlib.contextmanager
def enable_x64() -> Iterator[None]:
    """float64 on the device; the context manager of that name has moved between releases."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


# Attention with key/value groups, in four bare layers.
GROUPED = Pair(
    first="v",
    second="o",
    first_axes="d (g k)",
    second_axes="(h k) d",
    also={"q": "d (h k)", "k": "d (g k)"},
    axis="h",
    group="g",
    width="heads",
    group_width="groups",
    sizes={"k": "size"},
    activation="identity",
)

# The same without groups, in blocks that share a table, so that all of them keep the same heads.
TIED = Spec(
    name="TIED",
    pairs=dataclasses.replace(
        GROUPED,
        at="block/{i}",
        first_axes="d (h k)",
        also={},
        group=None,
        group_width=None,
        tables={"bias/embedding": "b h"},
    ),
)
