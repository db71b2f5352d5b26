"""What the second layers read, captured in the traced function of any model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from pruning_models import NETS, mlp
from zoo import CASES, Case, build

from flaxslim import Pair, Spec
from flaxslim._compat import shell
from flaxslim._inputs import inputs_for
from flaxslim._tree import flatten
from flaxslim.errors import CalibrationError
from flaxslim.posttraining._capture import Traced, hidden
from flaxslim.posttraining._refit import kernel, matrix
from flaxslim.specs import spec_for

FAMILIES = [
    "FlaxBertForMaskedLM",
    "FlaxGPT2LMHeadModel-inner",
    "FlaxLlamaForCausalLM-grouped",
    "FlaxT5ForConditionalGeneration-gated",
]


def _params(cases: tuple[Case, ...]) -> list[Any]:
    return [
        pytest.param(case, id=str(case), marks=[] if str(case) in FAMILIES else pytest.mark.long)
        for case in cases
        if case.short
    ]


@pytest.mark.parametrize("case", _params(CASES))
def test_it_is_what_the_linen_module_is_called_with(case: Case):
    """Flax's own interceptor sees the argument of every Dense layer: the same numbers."""
    cls, cfg, params = build(case)
    model, inputs = shell(cls, cfg), inputs_for(cls, cfg, length=case.length)
    seen: dict[str, Any] = {}

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, nn.Module) and args:
            seen.setdefault("/".join(context.module.path), args[0])
        return next_fun(*args, **kwargs)

    def call(p: Any, x: Any) -> Any:
        return model(**x, params=p, train=False)

    def both(p: Any, x: Any) -> Any:
        with nn.intercept_methods(intercept):
            call(p, x)
        reads = traced(p, x, {site.second.path for site in sites})[1]
        return {
            site.second.path: (hidden(site, reads)[0], seen[site.second.path.rpartition("/")[0]])
            for site in sites
        }

    sites = spec_for(cfg, "all").sites(params, cfg)
    traced = Traced(call, params, inputs)
    for path, (ours, theirs) in jax.jit(both)(params, inputs).items():
        np.testing.assert_array_equal(ours[0], theirs.reshape(ours[0].shape), err_msg=path)


@pytest.mark.parametrize("name", NETS)
def test_the_second_layer_of_it_is_what_was_computed(name):
    """On plain, gated, stacked and grouped layouts: x @ W is a sum over what a row reads."""
    net = NETS[name]()
    sites = net.spec.sites(net.params, net.cfg)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, width_of(net))), jnp.float32)
    leaves = flatten(net.params)
    for site in sites:
        reads = Traced(net.fn, net.params, x)(net.params, x, {site.second.path})[1]
        (h,) = hidden(site, reads)
        w = matrix(site, leaves[site.second.path])
        assert h.shape[0] == site.rows
        assert h.shape[-1] == w.shape[1]
        # The gradient of a sum of outputs by the kernel is what was read, times what came back.
        back = jax.grad(lambda own: net.fn(own, x).sum())(net.params)
        rows = matrix(site, flatten(back)[site.second.path])
        dead = np.abs(np.asarray(h)).reshape(site.rows, -1, h.shape[-1]).max(1) == 0
        assert (np.abs(rows).max(-1)[dead] == 0).all()
        assert (np.abs(rows).max(-1)[~dead] > 0).all()


def width_of(net: Any) -> int:
    first = net.spec.sites(net.params, net.cfg)[0].first[0]
    return first.axes.sizes(first.shape)["d"]


@pytest.mark.parametrize("name", NETS)
def test_a_kernel_is_arranged_and_put_back(name):
    net = NETS[name]()
    leaves = flatten(net.params)
    for site in net.spec.sites(net.params, net.cfg):
        leaf = leaves[site.second.path]
        np.testing.assert_array_equal(kernel(site, matrix(site, leaf)), leaf)


def _scanned(params: Any, x: Any) -> Any:
    def layer(x: Any, p: Any) -> Any:
        h = jax.nn.relu(x @ p["up"])
        return x + jax.checkpoint(lambda h: h @ p["down"].astype(jnp.float32))(h), None

    return jax.lax.scan(layer, x, params)[0]


def test_into_scan_and_remat_and_through_casts():
    rng = np.random.default_rng(0)
    params = {
        "up": jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.bfloat16),
    }
    spec = Spec(
        name="SCANNED",
        pairs=Pair(first="up", second="down", first_axes="l d f", second_axes="l f d"),
    )
    (site,) = spec.sites(params)
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    out, reads = Traced(_scanned, params, x)(params, x, {"down"})
    reads = hidden(site, reads)
    np.testing.assert_allclose(out, _scanned(params, x), rtol=1e-6)
    expected = []
    for i in range(3):
        h = jax.nn.relu(x @ params["up"][i])
        expected.append(h)
        x = x + h @ params["down"][i].astype(jnp.float32)
    np.testing.assert_allclose(reads[0], np.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_transposed_table_that_is_used_twice():
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(4, 6)), "down": rng.normal(size=(4, 6))}
    spec = Spec(name="T", pairs=Pair(first="up", second="down", second_axes="d f"))
    (site,) = spec.sites(params)

    def fn(p: Any, x: Any) -> Any:
        for _ in range(2):
            x = jax.nn.relu(x @ p["up"]) @ p["down"].T
        return x

    x = rng.normal(size=(3, 4))
    reads = Traced(fn, params, x)(params, x, {"down"})[1]
    first, second = hidden(site, reads)
    h = np.maximum(x @ params["up"], 0)
    np.testing.assert_allclose(first[0], h, rtol=1e-5)
    np.testing.assert_allclose(
        second[0], np.maximum(h @ params["down"].T @ params["up"], 0), rtol=1e-4, atol=1e-5
    )


def test_nnx_modules():
    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.down(jax.nn.relu(self.up(x)))

    model = Mlp(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    spec = Spec(name="M", pairs=Pair(first="up", second="down"))
    (site,) = spec.sites(model)
    x = jnp.ones((3, 4))
    traced = Traced(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
    (h,) = hidden(site, traced(state, x, {site.second.path})[1])
    np.testing.assert_allclose(h[0], jax.nn.relu(model.up(x)), rtol=1e-6)


def test_what_is_not_read_is_said():
    net = mlp()
    (site, _) = net.spec.sites(net.params, net.cfg)
    x = jnp.ones((2, 6))
    reads = Traced(lambda p, x: x * p["out"]["kernel"].sum(), net.params, x)(
        net.params, x, {site.second.path}
    )[1]
    with pytest.raises(CalibrationError, match="never reads the second layer") as caught:
        hidden(site, reads)
    assert site.second.path in str(caught.value)


def test_what_is_read_in_pieces_is_said():
    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    spec = Spec(name="P", pairs=Pair(first="up", second="down"))
    (site,) = spec.sites(params)

    def fn(p: Any, x: Any) -> Any:
        h = x @ p["up"]
        return h[:, :3] @ p["down"][:3].reshape(3, 4) + h[:, 3:] @ p["down"][3:]

    reads = Traced(fn, params, jnp.ones((2, 4)))(params, jnp.ones((2, 4)), {"down"})[1]
    with pytest.raises(CalibrationError):
        hidden(site, reads)
