"""Random small networks of every kind that `discover` may meet, for its fuzz test.

A network is a plain function of parameters and an input, which reads all sizes from the shapes of
the parameters, so that it runs on smaller ones too. It is a stack of blocks on a residual stream;
most are feed-forward layers, put together from menus: what makes the hidden channels, what is done
to them, what reads them. Some of the dishes can be cut exactly and some must be refused, and the
menus do not say which.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from numpy_jaxpr import Evaluated

Params = Mapping[str, Any]
Leaf = Callable[[Params], Any]  # finds a tensor in the parameters

BATCH, TIME = 2, 4


@dataclasses.dataclass
class Scope:
    """What the parts of one call share: the stream, hidden values, and further outputs."""

    x: Any
    hidden: list[Any] = dataclasses.field(default_factory=list)
    outputs: list[Any] = dataclasses.field(default_factory=list)
    weights: dict[str, Leaf] = dataclasses.field(default_factory=dict)


# From parameters, a hidden value and the rest, the hidden value or the output.
Op = Callable[[Params, Any, Scope], Any]


@dataclasses.dataclass
class Network:
    """A function of parameters and an input, and what is in it, in words."""

    fn: Callable[[Any, Any], Any]
    params: dict[str, Any]
    x: np.ndarray
    words: tuple[str, ...]
    rounded: bool = False  # something in it is of less than double precision

    @functools.cached_property
    def run(self) -> Evaluated:
        """The function, run by numpy."""
        return Evaluated(self.fn)

    def __repr__(self) -> str:
        return "Network(" + "; ".join(self.words) + ")"


class Draft:
    """A network that is being put together."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, Any] = {}
        self.words: list[str] = []
        self.place = ""
        self.style = "layers"
        self.dim = self.one_of([3, 4, 6])
        # Equal widths, equal to those of the inputs even, are where axes are mixed up.
        self.widths = self.one_of([(4,), (6,), (8,), (4, 6, 8), (5, 7, 10)])
        self.rounded = False
        self.known: list[tuple[int, dict[str, Leaf]]] = []  # the layers of each block so far

    def pick(self, menu: Mapping[str, Any]) -> Any:
        name = self.one_of(list(menu))
        self.words.append(name)
        return menu[name]

    def chance(self, percent: int) -> bool:
        return bool(self.rng.integers(100) < percent)

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def shuffled(self, things: Sequence[Any]) -> list[Any]:
        return [things[i] for i in self.rng.permutation(len(things))]

    def width(self) -> int:
        return self.one_of(self.widths)

    def tensor(self, name: str, *shape: int, positive: bool = False) -> Leaf:
        """A tensor with a name of its own below the place of the block."""
        names = [*self.place.split("/"), *name.split("/")]
        if self.style == "bare":
            names = [*names[:-2], "_".join(names[-2:])] if names[-1] in _LAYER else names
        tree = self.params
        for key in names[:-1]:
            tree = tree.setdefault(key, {})
        while names[-1] in tree:
            names[-1] += "x"
        values = self.rng.uniform(0.2, 0.7, shape)
        tree[names[-1]] = values if positive else values * self.rng.choice([-1.0, 1.0], shape)
        return _leaf(names)

    def kernel(self, name: str, *shape: int) -> Leaf:
        return self.tensor(f"{name}/kernel", *shape)

    def bias(self, name: str, *shape: int) -> Leaf:
        return self.tensor(f"{name}/bias", *shape)


_LAYER = ("kernel", "bias")


def _leaf(names: Sequence[str]) -> Leaf:
    def find(params: Params) -> Any:
        for name in names:
            params = params[name]
        return params

    return find


def _zero(_: Params) -> float:
    return 0.0


# --- activations ------------------------------------------------------------------------------


@jax.custom_jvp
def _custom(x: Any) -> Any:
    return jnp.where(x > 0, x, 0.1 * x)


_custom.defjvps(lambda t, _, x: t * jnp.where(x > 0, 1.0, 0.1))

ACTS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "erf gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "exp": jnp.exp,
    "identity": lambda x: x,
    "relu2": lambda x: jax.nn.relu(x) ** 2,
    "leaky": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "custom jvp": _custom,
    "hard tanh": lambda x: jnp.clip(x, -1, 1),
    "relu6": jax.nn.relu6,
    "cos": jnp.cos,
    "shifted": lambda x: jnp.tanh(x) + 1,
    "scaled": lambda x: 2 * jnp.tanh(0.5 * x),
    "power": lambda x: x**3,
    "checkpointed": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
}

# --- what makes hidden channels: functions of the stream, and the names of their kernels ------

First = tuple[Callable[[Params, Any, Callable[[Any], Any]], Any], dict[str, Leaf]]


def _dense(net: Draft, f: int) -> First:
    w = net.kernel("up", net.dim, f)
    b = net.bias("up", f) if net.chance(60) else _zero
    return lambda p, x, act: act(x @ w(p) + b(p)), {"up": w}


def _transposed(net: Draft, f: int) -> First:
    w = net.kernel("up", f, net.dim)
    b = net.bias("up", f) if net.chance(60) else _zero
    return lambda p, x, act: act(jnp.matmul(x, w(p).T) + b(p)), {"upT": w}


def _lettered(net: Draft, f: int) -> First:
    kernel = net.shuffled(["d", "f"])
    out = net.shuffled(["b", "t", "f"])
    w = net.kernel("up", *({"d": net.dim, "f": f}[letter] for letter in kernel))
    formula = f"btd,{''.join(kernel)}->{''.join(out)}"
    back = [out.index(letter) for letter in "btf"]
    return lambda p, x, act: act(jnp.einsum(formula, x, w(p)).transpose(back)), {
        "up" if kernel[0] == "d" else "upT": w
    }


def _gated(net: Draft, f: int) -> First:
    gate, up = net.kernel("gate", net.dim, f), net.kernel("up", net.dim, f)
    bias = net.chance(50)
    b = net.bias("gate", f) if bias else _zero
    c = net.bias("up", f) if bias or net.chance(20) else _zero
    one = 1.0 if net.chance(15) else 0.0
    if net.chance(50):
        return lambda p, x, act: act(x @ gate(p) + b(p)) * (x @ up(p) + c(p) + one), {"up": up}
    return lambda p, x, act: (x @ up(p) + c(p) + one) * act(x @ gate(p) + b(p)), {"up": up}


def _fused(net: Draft, f: int) -> First:
    w = net.kernel("up", net.dim, 2 * f)
    b = net.bias("up", 2 * f) if net.chance(50) else _zero
    swapped, twice = net.chance(40), net.chance(15)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        g, u = jnp.split(x @ w(p) + b(p), 2, axis=-1)
        g, u = (u, g) if swapped else (g, u)
        return act(g) * (u + g if twice else u)

    return run, {}


def _interleaved(net: Draft, f: int) -> First:
    w = net.kernel("up", net.dim, 2 * f)
    b = net.bias("up", 2 * f) if net.chance(50) else _zero

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h = x @ w(p) + b(p)
        return act(h[..., ::2]) * h[..., 1::2]

    return run, {}


def _pairs_inside(net: Draft, f: int) -> First:
    w = net.kernel("up", net.dim, 2 * f)
    inside = net.chance(50)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h = x @ w(p)
        h = h.reshape(*h.shape[:-1], *((-1, 2) if inside else (2, h.shape[-1] // 2)))
        return act(h[..., 0]) * h[..., 1] if inside else act(h[..., 0, :]) * h[..., 1, :]

    return run, {}


def _third(net: Draft, f: int) -> First:
    """One of three parts, or two of them."""
    w = net.kernel("up", net.dim, 3 * f)
    b = net.bias("up", 3 * f) if net.chance(50) else _zero
    parts = net.shuffled([0, 1, 2])

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h = jnp.split(x @ w(p) + b(p), 3, axis=-1)
        return act(h[parts[0]]) * h[parts[1]]

    return run, {}


def _stacked_kernel(net: Draft, f: int) -> First:
    w = net.kernel("up", 2, net.dim, f)
    b = net.bias("up", 2, f) if net.chance(50) else None
    swapped = net.chance(30)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h = jnp.einsum("btd,gdf->gbtf", x, w(p))
        g, u = h if b is None else h + b(p)[:, None, None]
        return act(u) * g if swapped else act(g) * u

    return run, {}


def _in_heads(net: Draft, f: int) -> First:
    heads = 2 if f % 2 == 0 else 1
    w = net.kernel("up", net.dim, heads, f // heads)
    b = net.bias("up", heads, f // heads) if net.chance(50) else _zero

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h = act(jnp.einsum("btd,dhk->bthk", x, w(p)) + b(p))
        return h.reshape(*h.shape[:2], -1)

    return run, {}


def _merged(net: Draft, f: int) -> First:
    w, a, b = net.kernel("up", net.dim, f), net.tensor("a", net.dim, 2), net.tensor("b", 2, f)
    return lambda p, x, act: act(x @ (w(p) + 0.5 * a(p) @ b(p))), {"up": w}


def _low_rank(net: Draft, f: int) -> First:
    w, a, b = net.kernel("up", net.dim, f), net.kernel("a", net.dim, 2), net.kernel("b", 2, f)
    return lambda p, x, act: act(x @ w(p) + x @ a(p) @ b(p)), {"up": w}


def _normed_kernel(net: Draft, f: int) -> First:
    w, g, axis = net.kernel("up", net.dim, f), net.tensor("g", f), net.one_of([0, 1])

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        v = w(p)
        return act(x @ (g(p) * v / jnp.sqrt((v * v).sum(axis, keepdims=True))))

    return run, {}


def _standardised(net: Draft, f: int) -> First:
    w, axis = net.kernel("up", net.dim, f), net.one_of([0, 1])
    b = net.bias("up", f) if net.chance(50) else _zero

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        return act(x @ (w(p) - w(p).mean(axis, keepdims=True)) + b(p))

    return run, {}


def _conv(net: Draft, f: int) -> First:
    window = net.one_of([1, 3])
    padding = net.one_of(["SAME", "VALID"]) if window == 3 else "VALID"
    w = net.kernel("up", window, net.dim, f)
    b = net.bias("up", f) if net.chance(60) else _zero
    return lambda p, x, act: act(convolved(x, w(p), padding) + b(p)), {}


def convolved(x: Any, w: Any, padding: str, groups: int = 1) -> Any:
    return jax.lax.conv_general_dilated(
        x, w, (1,), padding, dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


def _looked_up(net: Draft, f: int) -> First:
    table, w = net.tensor("table/embedding", 5, f), net.kernel("up", net.dim, f)
    ids, alone = net.rng.integers(0, 5, (BATCH, TIME)), net.chance(40)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        return act(table(p)[ids] * (1.0 if alone else x @ w(p)))

    return run, {}


def _product(net: Draft, f: int) -> First:
    one, other = net.kernel("one", net.dim, f), net.kernel("other", net.dim, f)
    return lambda p, x, act: act(x @ one(p)) + act(x @ other(p)) * (x @ one(p)), {"up": one}


def _same_twice(net: Draft, f: int) -> First:
    """One kernel makes two hidden values, or one bias is used twice."""
    w, b, c = net.kernel("up", net.dim, f), net.bias("up", f), net.bias("gate", f)
    way = int(net.rng.integers(3 + 1))

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h = x @ w(p)
        if way == 0:
            return act(h + b(p)) * (h + c(p))
        if way == 1:
            return act(h + b(p)) * h  # consumed both before and after the bias is added
        if way == 2:
            return act(h + b(p)) + b(p)
        return act(h + b(p)) * (jnp.flip(x, -1) @ w(p))

    return run, {"up": w}


def _conditional(net: Draft, f: int) -> First:
    w, v = net.kernel("up", net.dim, f), net.kernel("other", net.dim, f)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        return jax.lax.cond(x.sum() > 0, lambda x: act(x @ w(p)), lambda x: act(x @ v(p)) * 0.5, x)

    return run, {"up": w}


def _selected(net: Draft, f: int) -> First:
    w, v = net.kernel("up", net.dim, f), net.kernel("other", net.dim, f)
    by_hidden = net.chance(50)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        h, g = x @ w(p), x @ v(p)
        return act(jnp.where(g > 0 if by_hidden else x[..., :1] > 0, h, g * 0.5))

    return run, {"up": w}


def _iterated(net: Draft, f: int) -> First:
    w, b = net.kernel("up", net.dim, f), net.bias("up", f)
    steps = net.one_of(["fori", "while", "python"])

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        def step(_: Any, h: Any) -> Any:
            return 0.5 * act(h + b(p)) + x @ w(p)

        h = x @ w(p)
        if steps == "while":
            stop = jnp.where(x.sum() > 0, 2, 1)
            return jax.lax.while_loop(
                lambda c: c[0] < stop, lambda c: (c[0] + 1, step(0, c[1])), (0, h)
            )[1]
        if steps == "fori":
            return jax.lax.fori_loop(0, 2, step, h)
        return step(1, step(0, h))

    return run, {"up": w}


def _recurrent(net: Draft, f: int) -> First:
    """A scan over time whose carry has the channels: each by itself, or mixed by a kernel."""
    w, a = net.kernel("up", net.dim, f), net.tensor("decay", f)
    mix = net.kernel("mix", f, f) if net.chance(40) else None
    start = net.tensor("start", f) if net.chance(40) else None

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        def step(h: Any, row: Any) -> tuple[Any, Any]:
            h = act((h @ mix(p) if mix is not None else h * a(p)) + row @ w(p))
            return h, h

        zero = jnp.zeros((x.shape[0], w(p).shape[1]), x.dtype)
        first = zero if start is None else zero + start(p)
        return jnp.swapaxes(jax.lax.scan(step, first, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    return run, {"up": w}


def _uniform_carry(net: Draft, f: int) -> First:
    """A loop whose carry starts as zeros, all the same, and does not stay so."""
    w, v = net.kernel("up", net.dim, f), net.kernel("other", net.dim, f)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        zero = jnp.zeros((*x.shape[:-1], w(p).shape[1]), x.dtype)
        one, other = jax.lax.fori_loop(
            0, 2, lambda _, c: (c[1] + x @ w(p), c[0] * 0.5), (zero, zero)
        )
        return act(one + other) * (x @ v(p))

    return run, {"up": w}


def _mapped(net: Draft, f: int) -> First:
    w, b = net.kernel("up", net.dim, f), net.bias("up", f)

    def run(p: Params, x: Any, act: Callable[[Any], Any]) -> Any:
        return jax.vmap(lambda column, bias: act(x @ column + bias), in_axes=(1, 0), out_axes=-1)(
            w(p), b(p)
        )

    return run, {"up": w}


FIRSTS: dict[str, Callable[[Draft, int], First]] = {
    "dense": _dense,
    "transposed": _transposed,
    "einsum": _lettered,
    "gated": _gated,
    "fused": _fused,
    "interleaved": _interleaved,
    "pairs inside": _pairs_inside,
    "parts of three": _third,
    "stacked gate": _stacked_kernel,
    "heads": _in_heads,
    "merged low rank": _merged,
    "low rank beside": _low_rank,
    "weight norm": _normed_kernel,
    "weight standardised": _standardised,
    "conv": _conv,
    "embedding": _looked_up,
    "product": _product,
    "one kernel twice": _same_twice,
    "cond": _conditional,
    "where": _selected,
    "loop": _iterated,
    "recurrent": _recurrent,
    "uniform carry": _uniform_carry,
    "vmap": _mapped,
}

# --- what is done to hidden channels ----------------------------------------------------------


def _plain(how: Callable[[Any], Any]) -> Callable[[Draft, int], Op]:
    return lambda net, f: lambda p, h, s: how(h)


def _own_scale(net: Draft, f: int) -> Op:
    scale = net.tensor(net.one_of(["gain", "up/bias", "down/gain"]), f)
    return lambda p, h, s: h * scale(p)


def _own_shift(net: Draft, f: int) -> Op:
    shift = net.tensor(net.one_of(["shift", "up/bias", "gate/bias"]), f)
    return lambda p, h, s: h + shift(p)


def _batch_norm(net: Draft, f: int) -> Op:
    mean, var = net.tensor("bn/mean", f), net.tensor("bn/var", f, positive=True)
    scale, bias = net.tensor("bn/gain", f), net.tensor("bn/bias", f)

    def run(p: Params, h: Any, s: Scope) -> Any:
        return (h - mean(p)) / jnp.sqrt(var(p) + 1e-3) * scale(p) + bias(p)

    return run


def _layer_norm(net: Draft, f: int) -> Op:
    scale, bias = net.tensor("ln/gain", f), net.tensor("ln/bias", f)

    def run(p: Params, h: Any, s: Scope) -> Any:
        h = h - h.mean(-1, keepdims=True)
        return h / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6) * scale(p) + bias(p)

    return run


def _rms_norm(net: Draft, f: int) -> Op:
    scale = net.tensor("rms/gain", f)
    return lambda p, h, s: h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * scale(p)


def _group_norm(net: Draft, f: int) -> Op:
    def run(p: Params, h: Any, s: Scope) -> Any:
        groups = h.reshape(*h.shape[:-1], -1, 2 if h.shape[-1] % 2 == 0 else 1)
        return (groups - groups.mean(-1, keepdims=True)).reshape(h.shape)

    return run


def _constant(net: Draft, f: int) -> Op:
    values = net.rng.uniform(0.3, 1, f)
    return lambda p, h, s: h * values


def _uniform_constant(net: Draft, f: int) -> Op:
    values = np.full((TIME, 1) if net.chance(50) else (f,), 0.7)
    return lambda p, h, s: h * values if h.shape[1] == TIME or len(values) == f else h


def _counted_up(net: Draft, f: int) -> Op:
    return lambda p, h, s: h * (1 + 0.1 * jnp.arange(h.shape[-1]))


def _permuted(net: Draft, f: int) -> Op:
    order = net.rng.permutation(f)
    return lambda p, h, s: h[..., order]


def _masked(net: Draft, f: int) -> Op:
    mask = net.rng.random((TIME, 1)) < 0.7
    return lambda p, h, s: jnp.where(mask, h, 0.0) if h.shape[1] == TIME else h


def _dropout(net: Draft, f: int) -> Op:
    seed = int(net.rng.integers(100))
    whole = net.chance(30)

    def run(p: Params, h: Any, s: Scope) -> Any:
        shape = (*h.shape[:-1], 1) if whole else h.shape
        return jnp.where(jax.random.bernoulli(jax.random.key(seed), 0.7, shape), h / 0.7, 0)

    return run


def _shared_scale(net: Draft, f: int) -> Op:
    scale = net.tensor("temperature", 1)
    return lambda p, h, s: h * scale(p)


def _gate_by_stream(net: Draft, f: int) -> Op:
    w = net.kernel("router", net.dim, f)
    return lambda p, h, s: h * jax.nn.sigmoid(s.x @ w(p))[:, : h.shape[1]]


def _with_last(net: Draft, f: int) -> Op:
    """Joined with the hidden value of the block before, where that has the same shape."""
    alike = bool(net.known) and net.known[-1][0] == f
    product = net.chance(50)

    def run(p: Params, h: Any, s: Scope) -> Any:
        if not alike or not s.hidden or s.hidden[-1].shape[:-1] != h.shape[:-1]:
            return h
        return h * s.hidden[-1] if product else h + s.hidden[-1]

    return run


def _heads_back(net: Draft, f: int) -> Op:
    outside = net.chance(50)
    scale = net.tensor("per_head", 2) if f % 2 == 0 else None

    def run(p: Params, h: Any, s: Scope) -> Any:
        if scale is None:
            return h
        shape, n = h.shape, scale(p).shape[0]
        if outside:
            return (h.reshape(*shape[:2], n, -1) * scale(p)[:, None]).reshape(shape)
        return (h.reshape(*shape[:2], -1, n) * scale(p)).reshape(shape)

    return run


def _heads_alone(net: Draft, f: int) -> Op:
    """Into two heads and back, with something done inside of each, or between them."""
    way = int(net.rng.integers(3 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        if f % 2:
            return h
        heads = h.reshape(*h.shape[:2], 2, h.shape[-1] // 2)
        if way == 0:
            heads = jnp.swapaxes(heads, -1, -2)
        elif way == 1:
            heads = jnp.flip(heads, -2)
        elif way == 2:
            heads = heads - heads.mean(-2, keepdims=True)
        else:
            heads = jnp.tanh(heads)
        return heads.reshape(h.shape)

    return run


def _cast(net: Draft, f: int) -> Op:
    net.rounded = True
    return lambda p, h, s: h.astype(jnp.float32).astype(jnp.float64)


def _depthwise(net: Draft, f: int) -> Op:
    w = net.kernel("depthwise", 3, 1, f)
    return lambda p, h, s: convolved(h, w(p), "SAME", h.shape[-1])


def _by_time(net: Draft, f: int) -> Op:
    w = net.tensor("time", TIME, TIME)
    return lambda p, h, s: jnp.einsum("btf,ts->bsf", h, w(p)) if h.shape[1] == TIME else h


def _attended(net: Draft, f: int) -> Op:
    """Averaged over time by the stream's own weights, which sum to one, or do not quite."""
    way = int(net.rng.integers(4))

    def run(p: Params, h: Any, s: Scope) -> Any:
        scores = jnp.einsum("btd,bsd->bts", s.x, s.x)
        if h.shape[1] != TIME:
            return h
        weights = jax.nn.softmax(scores, -2 if way == 1 else -1)
        if way == 2:
            weights = jnp.swapaxes(weights, 1, 2)
        return (jnp.tril(weights) if way == 3 else weights) @ h

    return run


def _self_attended(net: Draft, f: int) -> Op:
    scaled = net.chance(50)

    def run(p: Params, h: Any, s: Scope) -> Any:
        scores = jnp.einsum("btf,bsf->bts", h, h)
        return jax.nn.softmax(scores / (np.sqrt(h.shape[-1]) if scaled else 2.0), -1) @ h

    return run


def _swept(net: Draft, f: int) -> Op:
    """A reader puts back into the channels: squeeze and excite."""
    w, v = net.kernel("squeeze", f, 2), net.kernel("excite", 2, f)
    return lambda p, h, s: h * jax.nn.sigmoid(jax.nn.relu(h.mean(1, keepdims=True) @ w(p)) @ v(p))


def _mixed(net: Draft, f: int) -> Op:
    w = net.kernel("mix", f, f)
    return lambda p, h, s: h + jnp.tanh(h @ w(p))


def _updated(net: Draft, f: int) -> Op:
    way = int(net.rng.integers(2 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        if way == 0:
            return h.at[:, 0].set(0.5)
        return h.at[..., 1].add(0.5) if way == 1 else h.at[:, 1].multiply(2.0)

    return run


HIDDEN: dict[str, Callable[[Draft, int], Op]] = {
    "its scale": _own_scale,
    "its shift": _own_shift,
    "batch norm": _batch_norm,
    "layer norm": _layer_norm,
    "rms norm": _rms_norm,
    "group norm": _group_norm,
    "constant": _constant,
    "uniform constant": _uniform_constant,
    "iota": _counted_up,
    "permuted": _permuted,
    "masked": _masked,
    "dropout": _dropout,
    "temperature": _shared_scale,
    "gate by the stream": _gate_by_stream,
    "with the last hidden": _with_last,
    "head scales": _heads_back,
    "heads": _heads_alone,
    "cast": _cast,
    "depthwise": _depthwise,
    "mixed over time": _by_time,
    "attended": _attended,
    "self attention": _self_attended,
    "squeeze and excite": _swept,
    "mixed": _mixed,
    "updated": _updated,
    "softmax": _plain(lambda h: jax.nn.softmax(h, -1)),
    "softmax over time": _plain(lambda h: jax.nn.softmax(h, 1)),
    "log softmax": _plain(lambda h: jax.nn.log_softmax(h, -1)),
    "cumsum": _plain(lambda h: jnp.cumsum(h, -1)),
    "cumsum over time": _plain(lambda h: jnp.cumsum(h, 1)),
    "sort": _plain(lambda h: jnp.sort(h, -1)),
    "sort over time": _plain(lambda h: jnp.sort(h, 1)),
    "flip": _plain(lambda h: jnp.flip(h, -1)),
    "flip time": _plain(lambda h: jnp.flip(h, 1)),
    "roll": _plain(lambda h: jnp.roll(h, 1, -1)),
    "roll time": _plain(lambda h: jnp.roll(h, 1, 1)),
    "rotated halves": _plain(lambda h: jnp.concatenate(
        [h[..., h.shape[-1] // 2 :], h[..., : h.shape[-1] // 2]], -1
    )),
    "first of time": _plain(lambda h: h[:, :1]),
    "last of time": _plain(lambda h: h[:, -1][:, None]),
    "mean over time": _plain(lambda h: h.mean(1, keepdims=True)),
    "max over time": _plain(lambda h: h.max(1, keepdims=True)),
    "centred": _plain(lambda h: h - h.mean(-1, keepdims=True)),
    "over its size": _plain(lambda h: h / h.shape[-1]),
    "over its root": _plain(lambda h: h / np.sqrt(h.shape[-1])),
    "over a norm": _plain(lambda h: h / (1 + jnp.linalg.norm(h, axis=-1, keepdims=True))),
    "over its largest": _plain(lambda h: h / (1 + jnp.abs(h).max(-1, keepdims=True))),
    "squared": _plain(lambda h: h * h),
    "self gated": _plain(lambda h: h * jax.nn.sigmoid(h)),
    "transposed twice": _plain(lambda h: jnp.swapaxes(jnp.sin(jnp.swapaxes(h, 1, 2)), 1, 2)),
    "flattened": _plain(lambda h: jnp.cos(h.reshape(-1, h.shape[-1])).reshape(h.shape)),
    "all flattened": _plain(lambda h: (h.reshape(-1) * 0.5).reshape(h.shape)),
    "scanned over channels": _plain(lambda h: jnp.moveaxis(
        jax.lax.scan(lambda c, r: (c + r, c + r), 0 * h[..., 0], jnp.moveaxis(h, -1, 0))[1], 0, -1
    )),
    "mapped over channels": _plain(lambda h: jnp.moveaxis(
        jax.lax.map(lambda r: jnp.tanh(r), jnp.moveaxis(h, -1, 0)), 0, -1
    )),
    "counted by ones": _plain(lambda h: h / jnp.ones(h.shape[-1]).sum()),
    "counted by like": _plain(lambda h: h / jnp.ones_like(h).sum(-1, keepdims=True)),
    "counted by iota": _plain(lambda h: h / (1.0 + jnp.arange(h.shape[-1]).max())),
    "counted by last": _plain(lambda h: h / jnp.arange(1.0, 1 + h.shape[-1])[-1]),
    "counted by cumsum": _plain(lambda h: h / jnp.cumsum(jnp.ones(h.shape[-1]))[-1]),
    "counted by dot": _plain(lambda h: h / (jnp.ones(h.shape[-1]) @ jnp.ones(h.shape[-1]))),
    "counted by trace": _plain(lambda h: h / jnp.trace(jnp.eye(h.shape[-1]))),
    "counted by linspace": _plain(lambda h: h / jnp.linspace(0, 3, h.shape[-1])[1]),
    "counted by product": _plain(lambda h: h / jnp.prod(jnp.full(h.shape[-1], 1.1))),
    "counted by mask": _plain(
        lambda h: h / (1 + (jax.lax.stop_gradient(h) < 9e9).sum(-1, keepdims=True))
    ),
    "padded": _plain(lambda h: jnp.pad(h, ((0, 0), (0, 0), (0, 1)))[..., : h.shape[-1]]),
    "gelu of time and rest": _plain(lambda h: jnp.concatenate([jnp.tanh(h[:, :1]), h[:, 1:]], 1)),
}  # fmt: skip

# --- what the hidden channels are brought to: their number may change -------------------------


def _doubled(net: Draft, f: int) -> tuple[Op, int]:
    way = int(net.rng.integers(3 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        if way == 0:
            return jnp.concatenate([h, -h], -1)
        if way == 1:
            return jnp.tile(h, (1, 1, 2))
        if way == 2:
            return jnp.repeat(h, 2, -1)
        return jnp.stack([h, jnp.tanh(h)], -1).reshape(*h.shape[:-1], -1)

    return run, 2 * f


def _beside_another(net: Draft, f: int) -> tuple[Op, int]:
    other = net.width()
    w = net.kernel("beside", net.dim, other)

    def run(p: Params, h: Any, s: Scope) -> Any:
        return jnp.concatenate([h, jnp.tanh(s.x @ w(p))[:, : h.shape[1]]], -1)

    return run, f + other


def _beside_stream(net: Draft, f: int) -> tuple[Op, int]:
    return lambda p, h, s: jnp.concatenate([s.x[:, : h.shape[1]], h], -1), f + net.dim


def _halved(net: Draft, f: int) -> tuple[Op, int]:
    way = int(net.rng.integers(2 + 1)) if f % 2 == 0 else 3

    def run(p: Params, h: Any, s: Scope) -> Any:
        if way == 3:
            return h
        one, other = jnp.split(h, 2, -1)
        return (one * other, other, jnp.maximum(one, other))[way]

    return run, f if way == 3 else f // 2


def _reduced_heads(net: Draft, f: int) -> tuple[Op, int]:
    if f % 2:
        return (lambda p, h, s: h), f
    inner = net.chance(50)

    def run(p: Params, h: Any, s: Scope) -> Any:
        heads = h.reshape(*h.shape[:2], *((-1, 2) if inner else (2, h.shape[-1] // 2)))
        return heads.max(-1) if inner else heads.sum(-2)

    return run, f // 2


def _some(net: Draft, f: int) -> tuple[Op, int]:
    size = min(f, 3)
    top = net.chance(50)
    return (
        lambda p, h, s: jax.lax.top_k(h, size)[0] if top else h[..., :size],
        size,
    )


RESHAPED: dict[str, Callable[[Draft, int], tuple[Op, int]]] = {
    "doubled": _doubled,
    "concat with another": _beside_another,
    "concat with the stream": _beside_stream,
    "halved": _halved,
    "heads reduced": _reduced_heads,
    "some of them": _some,
}

# --- what reads hidden channels ---------------------------------------------------------------


def _second_dense(net: Draft, f: int) -> Op:
    w = net.kernel("down", f, net.dim)
    if net.chance(50):
        return lambda p, h, s: h @ w(p)
    b = net.bias("down", net.dim)
    return lambda p, h, s: h @ w(p) + b(p)


def _second_odd_bias(net: Draft, f: int) -> Op:
    """With a bias that is not added to the sum once and as it is, or not only that."""
    w, b = net.kernel("down", f, net.dim), net.bias("down", net.dim)
    scale = net.tensor("gamma", net.dim)
    way = int(net.rng.integers(8 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        y = h @ w(p)
        mask = jnp.arange(y.shape[1])[:, None] > 0
        return (
            lambda: y + 2 * b(p),
            lambda: y + b(p) + b(p),
            lambda: y * b(p),
            lambda: (y + b(p)) * scale(p),
            lambda: y * 0.5 + b(p),
            lambda: jnp.tanh(y) + b(p),
            lambda: (y + b(p)) * y,
            lambda: jnp.where(mask, y + b(p), y),
            lambda: y + b(p) * s.x[:, : y.shape[1]],
        )[way]()

    return run


def _second_transposed(net: Draft, f: int) -> Op:
    w = net.kernel("down", net.dim, f)
    b = net.bias("down", net.dim) if net.chance(50) else _zero
    return lambda p, h, s: h @ w(p).T + b(p)


def _second_lettered(net: Draft, f: int) -> Op:
    kernel = net.shuffled(["d", "f"])
    w = net.kernel("down", *({"d": net.dim, "f": f}[letter] for letter in kernel))
    formula = f"{''.join(kernel)},btf->btd" if net.chance(50) else f"btf,{''.join(kernel)}->btd"
    first = w if formula.index(",") == 2 else None

    def run(p: Params, h: Any, s: Scope) -> Any:
        return jnp.einsum(formula, *((w(p), h) if first else (h, w(p))))

    return run


def _second_conv(net: Draft, f: int) -> Op:
    window, padding = net.one_of([(1, "VALID"), (3, "SAME")])
    w = net.kernel("down", window, f, net.dim)
    b = net.bias("down", net.dim) if net.chance(60) else _zero
    return lambda p, h, s: convolved(h, w(p), padding) + b(p)


def _second_heads(net: Draft, f: int) -> Op:
    n = 2 if f % 2 == 0 else 1
    w = net.kernel("down", n, f // n, net.dim)
    b = net.bias("down", net.dim) if net.chance(50) else _zero

    def run(p: Params, h: Any, s: Scope) -> Any:
        heads = h.reshape(*h.shape[:-1], *w(p).shape[:2])
        return jnp.einsum("bthk,hkd->btd", heads, w(p)) + b(p)

    return run


def _second_two(net: Draft, f: int) -> Op:
    """Two layers read it, and one bias is added to both, or one to each."""
    w, v = net.kernel("down", f, net.dim), net.kernel("aside", f, net.dim)
    b = net.bias("down", net.dim)
    way = int(net.rng.integers(2 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        y, z = h @ w(p), h @ v(p)
        if way == 0:
            return y + z + b(p)
        return (y + b(p)) * jax.nn.sigmoid(z) if way == 1 else (y + b(p)) * (z + b(p))

    return run


def _second_other_hidden(net: Draft, f: int) -> Op:
    """The same layer reads two hidden values, of which only one may be constant."""
    w, u = net.kernel("down", f, net.dim), net.kernel("again", net.dim, f)
    b = net.bias("down", net.dim) if net.chance(60) else _zero
    kind = int(net.rng.integers(2 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        other = jnp.tanh(s.x @ u(p))[:, : h.shape[1]]
        if kind == 0:
            return (h + other) @ w(p) + b(p)
        if kind == 1:
            return h @ w(p) + b(p) + other @ w(p)
        return h @ w(p) + b(p) + (jax.nn.sigmoid(h) @ w(p) + b(p))

    return run


def _second_merged(net: Draft, f: int) -> Op:
    w = net.kernel("down", f, net.dim)
    a, b = net.tensor("down_a", f, 2), net.tensor("down_b", 2, net.dim)
    return lambda p, h, s: h @ (w(p) + a(p) @ b(p))


def _second_scaled_kernel(net: Draft, f: int) -> Op:
    w = net.kernel("down", f, net.dim)
    way = int(net.rng.integers(4 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        v = w(p)
        return (
            h
            @ (
                lambda: v * 0.5,
                lambda: v - v.mean(0),
                lambda: v - v.mean(1, keepdims=True),
                lambda: v / jnp.abs(v).max(),
                lambda: jnp.tanh(v) + 0.1,
            )[way]()
        )

    return run


def _second_by_hand(net: Draft, f: int) -> Op:
    w = net.kernel("down", f, net.dim)
    mean = net.chance(30)

    def run(p: Params, h: Any, s: Scope) -> Any:
        terms = h[..., None] * w(p)
        return terms.mean(-2) if mean else terms.sum(-2)

    return run


def _second_told(net: Draft, f: int) -> Op:
    """The size of the channels is known to something else, and not as a number that is seen."""
    w = net.kernel("down", f, net.dim)
    way = int(net.rng.integers(14))
    key = jax.random.key(0)

    def run(p: Params, h: Any, s: Scope) -> Any:
        y, x, n = h @ w(p), s.x[:, : h.shape[1]], h.shape[-1]
        i = n % x.shape[1]
        return (
            lambda: jax.lax.fori_loop(0, n, lambda _, a: a * 1.1, y),
            lambda: y + x[:, i][:, None],
            lambda: y + jnp.roll(x, n, 1),
            lambda: y + jax.lax.top_k(x, 1 + n % x.shape[-1])[0].sum(-1, keepdims=True),
            lambda: (jnp.tanh(y) + 1.5) ** n,
            lambda: y * np.full(y.shape[-1], 1 / n),
            lambda: y + jax.random.normal(jax.random.fold_in(key, n), y.shape, y.dtype),
            lambda: y + x[:, np.array([i])],
            lambda: y * jax.nn.one_hot(n % y.shape[-1], y.shape[-1]),
            lambda: y + jnp.pad(x, ((0, 0), (n, 0), (0, 0)), constant_values=1.0).sum(1)[:, None],
            lambda: y * jnp.tri(n).sum(),
            lambda: y + jax.lax.dynamic_slice_in_dim(x, i, 1, 1),
            lambda: (h * np.full(n, 1 / n)) @ w(p),
            lambda: y * jnp.repeat(x[..., :1], n, -1).sum(-1, keepdims=True),
        )[way]()

    return run


def _second_normed(net: Draft, f: int) -> Op:
    """What the sum is divided by follows from the size of the channels, one way or another."""
    w = net.kernel("down", f, net.dim)
    way = int(net.rng.integers(5 + 1))

    def run(p: Params, h: Any, s: Scope) -> Any:
        y, n = h @ w(p), h.shape[-1]
        return (
            lambda: y / n,
            lambda: y / np.sqrt(n),
            lambda: y * jnp.log(1.0 * n),
            lambda: y / jnp.asarray(n, y.dtype),
            lambda: y / jnp.full((), n, y.dtype),
            lambda: y + 0.01 * n,
        )[way]()

    return run


SECONDS: dict[str, Callable[[Draft, int], Op]] = {
    "down": _second_dense,
    "odd bias": _second_odd_bias,
    "down transposed": _second_transposed,
    "down einsum": _second_lettered,
    "down conv": _second_conv,
    "down heads": _second_heads,
    "two downs": _second_two,
    "down of two hiddens": _second_other_hidden,
    "down merged": _second_merged,
    "down scaled": _second_scaled_kernel,
    "down by hand": _second_by_hand,
    "down over the size": _second_normed,
    "down told the size": _second_told,
}

# --- what else looks at them: adds to the output ----------------------------------------------


def _reads(how: Callable[[Any], Any]) -> Callable[[Draft, int], Op]:
    """Something of size one for each token, which is added to the output."""
    return lambda net, f: lambda p, h, s: 0.3 * how(h)


def _gate_reader(net: Draft, f: int) -> Op:
    w = net.kernel("head", f, 1)
    return lambda p, h, s: jax.nn.sigmoid(h @ w(p))


def _gate_reader_of_more(net: Draft, f: int) -> Op:
    w = net.kernel("head", f, 1)
    return lambda p, h, s: jax.nn.sigmoid(jnp.tanh(h) @ w(p))


def _with_constant(net: Draft, f: int) -> Op:
    values = net.rng.normal(size=f)
    return lambda p, h, s: (h @ values)[..., None]


def _bilinear(net: Draft, f: int) -> Op:
    w = net.kernel("other", net.dim, f)
    return lambda p, h, s: (h * (s.x @ w(p))[:, : h.shape[1]]).sum(-1, keepdims=True)


def _output(net: Draft, f: int) -> Op:
    def run(p: Params, h: Any, s: Scope) -> Any:
        s.outputs.append(h)
        return 0.0

    return run


def _penalty(net: Draft, f: int) -> Op:
    """A weight of the block itself appears among the outputs."""
    how = net.one_of([lambda w: (w * w).sum(), jnp.mean, jnp.max, jnp.linalg.norm])

    def run(p: Params, h: Any, s: Scope) -> Any:
        s.outputs += [how(w(p)) for w in s.weights.values()]
        return 0.0

    return run


def _tied_back(net: Draft, f: int) -> Op:
    """The first kernel reads as well."""

    def run(p: Params, h: Any, s: Scope) -> Any:
        for name, w in s.weights.items():
            kernel = w(p).T if name == "upT" else w(p)
            if name in ("up", "upT") and kernel.shape[1] == h.shape[-1]:
                return h @ kernel.T
        return 0.0

    return run


READERS: dict[str, Callable[[Draft, int], Op]] = {
    "gate": _gate_reader,
    "gate of tanh": _gate_reader_of_more,
    "dot constant": _with_constant,
    "bilinear": _bilinear,
    "output": _output,
    "penalty": _penalty,
    "tied": _tied_back,
    "sum": _reads(lambda h: h.sum(-1, keepdims=True)),
    "mean": _reads(lambda h: h.mean(-1, keepdims=True)),
    "max": _reads(lambda h: h.max(-1, keepdims=True)),
    "logsumexp": _reads(lambda h: jax.nn.logsumexp(h, -1, keepdims=True)),
    "top k": _reads(lambda h: jax.lax.top_k(h, 2)[0].sum(-1, keepdims=True)),
    "argmax": _reads(lambda h: 1.0 * jnp.argmax(h, -1)[..., None]),
    "index": _reads(lambda h: h[..., 1:2]),
    "every other": _reads(lambda h: h[..., ::2].sum(-1, keepdims=True)),
    "two of them": _reads(lambda h: h[..., jnp.array([0, 2])].sum(-1, keepdims=True)),
    "norm": _reads(lambda h: jnp.linalg.norm(h, axis=-1, keepdims=True)),
    "itself": _reads(lambda h: jnp.einsum("btf,btf->bt", h, h)[..., None]),
    "any": _reads(lambda h: 1.0 * (h > 0.5).any(-1, keepdims=True)),
    "median": _reads(lambda h: jnp.median(h, -1, keepdims=True)),
    "dot ones": _reads(lambda h: h @ jnp.ones((h.shape[-1], 1))),
    "dot iota": _reads(lambda h: (h @ jnp.arange(1.0 * h.shape[-1]))[..., None]),
    "size": _reads(lambda h: jnp.full((1, 1, 1), 1.0 * h.shape[-1])),
    "count": _reads(lambda h: (h > 0).sum(-1, keepdims=True) / h.shape[-1]),
}

# --- blocks: what is added to the stream ------------------------------------------------------

Block = Callable[[Params, Scope], Any]


def _ffn(net: Draft) -> Block:
    f = net.width()
    first, kernels = net.pick(FIRSTS)(net, f)
    act = net.pick(ACTS)
    done: list[Op] = []
    for _ in range(net.one_of([0, 0, 0, 1, 1, 2])):
        done.append(net.pick(HIDDEN)(net, f))
    before = net.chance(30)
    size = f
    if net.chance(15):
        op, size = net.pick(RESHAPED)(net, f)
        done.append(op)
    second = net.pick(SECONDS)(net, size)
    readers = [net.pick(READERS)(net, size)] if net.chance(20) else []
    net.known.append((size, kernels))

    def run(p: Params, s: Scope) -> Any:
        h = first(p, s.x, (lambda x: x) if before else act)
        s.weights = kernels
        for op in done:
            h = op(p, h, s)
        h = act(h) if before else h
        y = second(p, h, s)
        for reader in readers:
            y = y + reader(p, h, s)
        s.hidden.append(h)
        return y

    return run


def _attention(net: Draft) -> Block:
    heads, size = net.one_of([(2, 2), (4, 2), (2, 3), (4, 1)])
    groups = net.one_of([heads, heads // 2, heads])
    flat, masked, scaled = net.chance(60), net.chance(50), net.chance(40)
    fused, normed, biased = net.chance(20) and groups == heads, net.chance(20), net.chance(40)
    by_size = net.chance(30)

    def shaped(*shape: int) -> tuple[int, ...]:
        return (*shape[:-2], shape[-2] * shape[-1]) if flat else shape

    def layer(name: str, count: int) -> tuple[Leaf, Leaf]:
        w = net.kernel(name, *shaped(net.dim, count, size))
        return w, net.bias(name, *shaped(count, size)) if biased else _zero

    if fused:
        w = net.kernel("qkv", net.dim, 3 * heads * size)
    else:
        q, k, v = layer("q", heads), layer("k", groups), layer("v", groups)
    o = net.kernel("o", *((heads * size, net.dim) if flat else (heads, size, net.dim)))
    ob = net.bias("o", net.dim) if net.chance(50) else _zero
    scale = net.tensor("per_head", heads) if scaled else None
    norm = net.tensor("q_norm", size) if normed else None
    mask = np.tril(np.ones((TIME, TIME), bool))

    def run(p: Params, s: Scope) -> Any:
        def projected(layer: tuple[Leaf, Leaf]) -> Any:
            w, b = layer
            y = jnp.tensordot(s.x, w(p), 1) + b(p)
            return y.reshape(*y.shape[:2], -1, size)

        if fused:
            y = (s.x @ w(p)).reshape(*s.x.shape[:2], 3, -1, size)
            qs, ks, vs = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        else:
            qs, ks, vs = projected(q), projected(k), projected(v)
        if norm is not None:
            qs = qs / jnp.sqrt((qs * qs).mean(-1, keepdims=True) + 1e-6) * norm(p)
        if groups != heads:
            ks, vs = (jnp.repeat(a, qs.shape[2] // max(a.shape[2], 1), axis=2) for a in (ks, vs))
        n = qs.shape[2] if by_size else 2.0
        scores = jnp.einsum("bthk,bshk->bhts", qs, ks) / np.sqrt(size * n)
        scores = jnp.where(mask, scores, -1e9) if masked else scores
        out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), vs)
        if scale is not None:
            out = out * scale(p)[:, None]
        if flat:
            return out.reshape(*out.shape[:2], -1) @ o(p) + ob(p)
        return jnp.einsum("bthk,hkd->btd", out, o(p)) + ob(p)

    return run


def _scanned(net: Draft) -> Block:
    f, depth = net.width(), net.one_of([2, 3])
    act = net.pick(ACTS)
    up, down = net.kernel("up", depth, net.dim, f), net.kernel("down", depth, f, net.dim)
    b = net.bias("up", depth, f) if net.chance(50) else None
    c = net.bias("down", depth, net.dim) if net.chance(50) else None
    shared = net.tensor("shared_gain", f) if net.chance(20) else _one
    remat, out = net.chance(30), net.chance(15)

    def run(p: Params, s: Scope) -> Any:
        def layer(x: Any, w: Any) -> tuple[Any, Any]:
            w1, w2, b1, b2 = w
            h = act(x @ w1 + (0.0 if b1 is None else b1)) * shared(p)
            return x + h @ w2 + (0.0 if b2 is None else b2), h.sum(-1) if out else x[..., 0]

        layers = (up(p), down(p), b(p) if b else None, c(p) if c else None)
        y, ys = jax.lax.scan(jax.checkpoint(layer) if remat else layer, s.x, layers)
        return y + (ys.sum(0)[..., None] if out else 0.0)

    return run


def _one(_: Params) -> float:
    return 1.0


def _experts(net: Draft) -> Block:
    f, count = net.width(), net.one_of([2, 3, 4])
    act = net.pick(ACTS)
    up, down = net.kernel("up", count, net.dim, f), net.kernel("down", count, f, net.dim)
    gate = net.kernel("gate", count, net.dim, f) if net.chance(50) else None
    b = net.bias("up", count, f) if net.chance(40) else None
    c = net.bias("down", count, net.dim) if net.chance(40) else None
    router = net.kernel("router", net.dim, count)
    scale = net.tensor("expert_gain", count, f) if net.chance(20) else None
    shared = net.tensor("shared_gain", f) if net.chance(20) else _one
    picked = net.chance(30)

    def run(p: Params, s: Scope) -> Any:
        weights = jax.nn.softmax(s.x @ router(p), -1)
        if picked:
            top, at = jax.lax.top_k(weights, 1)
            weights = top * jax.nn.one_hot(at[..., 0], weights.shape[-1])
        h = jnp.einsum("btd,edf->ebtf", s.x, up(p))
        h = h + b(p)[:, None, None] if b else h
        h = act(jnp.einsum("btd,edf->ebtf", s.x, gate(p))) * h if gate else act(h)
        h = h * scale(p)[:, None, None] if scale else h
        y = jnp.einsum("ebtf,efd->ebtd", h * shared(p), down(p))
        y = y + c(p)[:, None, None] if c else y
        return jnp.einsum("ebtd,bte->btd", y, weights)

    return run


def _twice(net: Draft) -> Block:
    """One layer applied twice, or around a loop, with the same weights."""
    f = net.width()
    act, way = net.pick(ACTS), net.one_of(["twice", "scan", "cond", "jit", "while"])
    up, down = net.kernel("up", net.dim, f), net.kernel("down", f, net.dim)
    b = net.bias("up", f) if net.chance(60) else _zero
    c = net.bias("down", net.dim) if net.chance(60) else _zero
    net.words.append(way)

    def run(p: Params, s: Scope) -> Any:
        def layer(x: Any) -> Any:
            return x + 0.5 * (act(x @ up(p) + b(p)) @ down(p) + c(p))

        if way == "twice":
            return layer(layer(s.x))
        if way == "scan":
            return jax.lax.scan(lambda x, _: (layer(x), None), s.x, None, length=2)[0]
        if way == "cond":
            return jax.lax.cond(s.x.sum() > 0, layer, lambda x: x * 0.5, s.x)
        if way == "jit":
            return jax.jit(layer)(s.x) + jax.jit(layer)(0.5 * s.x)
        return jax.lax.while_loop(lambda x: (x * x).sum() < 200.0, lambda x: 1.5 * layer(x), s.x)

    return run


def _two_kernels_one_bias(net: Draft) -> Block:
    """Two hidden layers that share a bias, a second kernel, or the first."""
    f = net.width()
    act, other = net.pick(ACTS), net.pick(ACTS)
    up, up2 = net.kernel("up", net.dim, f), net.kernel("up2", net.dim, f)
    down, down2 = net.kernel("down", f, net.dim), net.kernel("down2", f, net.dim)
    b, c = net.bias("up", f), net.bias("down", net.dim)
    way = int(net.rng.integers(5 + 1))

    def run(p: Params, s: Scope) -> Any:
        h, g = s.x @ up(p), s.x @ up2(p)
        if way == 0:
            return act(h + b(p)) @ down(p) + other(g + b(p)) @ down2(p) + c(p)
        if way == 1:
            return act(h + b(p)) @ down(p) + c(p) + (other(g) @ down(p) + c(p))
        if way == 2:
            return act(h + b(p)) @ down(p) + c(p) + (other(h) @ down2(p) + c(p))
        if way == 3:
            return act(h + b(p)) @ down(p) * (1 + c(p)) + c(p)
        if way == 4:
            return (act(h + b(p)) @ down(p) + c(p)) * (other(g) @ down2(p))
        return act(h + b(p)) @ down(p) + c(p) + 0.1 * (b(p) * b(p)).sum() + g @ up2(p).T

    return run


def _chain(net: Draft) -> Block:
    """Three layers: the middle kernel is second of one width and first of the next."""
    f, g = net.width(), net.width()
    act, other = net.pick(ACTS), net.pick(ACTS)
    up, mid, down = (
        net.kernel("fc1", net.dim, f),
        net.kernel("fc2", f, g),
        net.kernel("fc3", g, net.dim),
    )
    b, c = (net.bias("fc1", f), net.bias("fc2", g)) if net.chance(60) else (_zero, _zero)
    skip = f == g and net.chance(40)

    def run(p: Params, s: Scope) -> Any:
        h = act(s.x @ up(p) + b(p))
        k = other(h @ mid(p) + c(p))
        return (k + h if skip else k) @ down(p)

    return run


def _inner_residual(net: Draft) -> Block:
    """A residual stream of its own, without a norm, or with one that forbids to cut it."""
    f, g = net.width(), net.width()
    act, way = net.pick(ACTS), net.one_of(["no norm", "rms", "scale"])
    enter, leave = net.kernel("enter", net.dim, f), net.kernel("leave", f, net.dim)
    layers = [(net.kernel(f"a{i}", f, g), net.kernel(f"b{i}", g, f)) for i in range(2)]
    scale, b = net.tensor("norm/gain", f), net.bias("b0", f)
    net.words.append(way)

    def run(p: Params, s: Scope) -> Any:
        x = s.x @ enter(p)
        for one, other in layers:
            y = x
            if way == "rms":
                y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * scale(p)
            elif way == "scale":
                y = y * scale(p)
            x = x + act(y @ one(p)) @ other(p) + b(p)
        return x @ leave(p)

    return run


BLOCKS: dict[str, Callable[[Draft], Block]] = {
    "ffn": _ffn,
    "attention": _attention,
    "scan": _scanned,
    "experts": _experts,
    "twice": _twice,
    "shared": _two_kernels_one_bias,
    "chain": _chain,
    "inner residual": _inner_residual,
}
_MORE_FFN = dict.fromkeys([f"ffn {i}" for i in range(10)], _ffn)

PLACES = ("layers/{}", "block_{}", "params/l{}", "{}")


def stream_normed(x: Any) -> Any:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3)


def network(seed: int, depth: int) -> Network:
    """The network of a number, of so many blocks."""
    net = Draft(seed)
    place, net.style = net.one_of(PLACES), net.one_of(["layers", "bare"])
    residual, normed = net.chance(70), net.chance(50)
    blocks: list[Block] = []
    for i in range(depth):
        net.place = place.format(i)
        net.words.append(f"{net.place}:")
        blocks.append(net.pick(BLOCKS | _MORE_FFN)(net))

    def fn(params: Params, x: Any) -> Any:
        scope = Scope(x=x)
        for block in blocks:
            stream = scope.x
            scope.x = stream_normed(stream) if normed else stream
            y = block(params, scope)
            y = y if y.shape == stream.shape else y.mean(1, keepdims=True)
            scope.x = stream + y if residual else y + 0 * stream
        return scope.x, *scope.outputs

    return Network(
        fn=fn,
        params=net.params,
        x=net.rng.normal(size=(BATCH, TIME, net.dim)),
        words=(
            f"network({seed}, {depth})", f"dim {net.dim}", net.style, *net.words,
            "residual" * residual, "normed" * normed,
        ),
        rounded=net.rounded,
    )  # fmt: skip


def networks() -> st.SearchStrategy[Network]:
    """Each is made of one number: drawn piece by piece, half of them would be alike."""
    # What hypothesis draws by itself are numbers that repeat; it can shrink the depth.
    seeds = st.randoms(use_true_random=True).map(lambda random: random.getrandbits(32))
    return st.builds(network, seeds, st.sampled_from([1, 1, 2, 2, 3]))
