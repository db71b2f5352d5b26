"""Contexts and modules: code that builds the stock class itself, and what it costs."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hand_written import by_hand
from kill import kill
from test_layout import BERT, IDS, bert, close, gpt2, hidden, make  # noqa: F401
from transformers import BertConfig, FlaxAutoModel, FlaxBertModel
from transformers.models.bert.modeling_flax_bert import FlaxBertEncoder, FlaxBertModule

import flaxslim
from flaxslim import Pair, Spec, layout, module, slim
from flaxslim.errors import LayoutError
from flaxslim.specs import spec_for

# --- the context ------------------------------------------------------------------------------


def test_code_that_builds_the_stock_class_runs_inside(bert):  # noqa: F811
    with layout():
        model = FlaxAutoModel.from_pretrained(bert.folder)
        inside = jax.jit(lambda p: hidden(model, params=p))
        close(bert.small, inside(model.params))
        again: Any = FlaxBertModel(bert.model.config)
        assert jax.tree.map(jnp.shape, again.params) == jax.tree.map(jnp.shape, model.params)
    # What was compiled inside stays usable; what is traced anew does not run.
    close(bert.small, inside(model.params))
    with pytest.raises(flax.errors.ScopeParamShapeError):
        hidden(model)


def test_a_dense_model_inside_is_not_touched(bert):  # noqa: F811
    before = hidden(bert.dense)
    with layout(bert.model.config):
        np.testing.assert_array_equal(before, hidden(bert.dense))
        close(bert.small, hidden(bert.dense, params=bert.zeroed))


def test_contexts_nest_and_only_the_innermost_acts(bert, tmp_path):  # noqa: F811
    other = make(FlaxBertModel, BERT, tmp_path / "other", seed=7)
    with layout(bert.model.config), layout(other.model.config), layout():
        close(other.states, hidden(other.model))
        close(bert.states, hidden(bert.model))


class Distillation(nn.Module):
    """A root with a config that is no model's, and with two models in it."""

    config: Any
    teacher_config: BertConfig
    student_config: BertConfig

    def setup(self) -> None:
        self.teacher = FlaxBertModule(self.teacher_config)
        self.student = FlaxBertModule(self.student_config)

    def __call__(self, *inputs: Any) -> tuple[Any, Any]:
        return self.teacher(*inputs)[0], self.student(*inputs)[0]


@pytest.mark.parametrize("config", [None, {"learning_rate": 1e-3}])
@pytest.mark.parametrize("given", [False, True])
def test_models_inside_of_a_larger_module_run_at_their_own_layouts(given, config, bert):  # noqa: F811
    dense, slimmed = bert.dense.config, bert.model.config
    both = Distillation(config, dense, slimmed)
    inputs = (IDS, np.ones_like(IDS), np.zeros_like(IDS), np.arange(9)[None].repeat(4, 0), None)
    with layout(slimmed) if given else layout():
        shapes = jax.eval_shape(lambda: both.init(jax.random.key(0), *inputs))["params"]
        for name, model in (("teacher", bert.dense), ("student", bert.model)):
            assert jax.tree.map(jnp.shape, shapes[name]) == jax.tree.map(jnp.shape, model.params)
        params = {"teacher": bert.zeroed, "student": bert.model.params}
        teacher, student = jax.jit(lambda p: both.apply({"params": p}, *inputs))(params)
    close(teacher, student)
    close(teacher, bert.small)


def test_a_context_holds_in_its_own_thread_only(bert):  # noqa: F811
    errors: list[BaseException] = []

    def work() -> None:
        try:
            FlaxAutoModel.from_pretrained(bert.folder)
        except ValueError as error:
            errors.append(error)

    with layout():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "incompatible with the model shape" in str(errors[0])


def test_somebody_elses_interceptor_may_act_at_the_same_time(bert):  # noqa: F811
    seen: Counter[str] = Counter()

    def quantised(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """What qwix does: a Dense computed by other means, from its own parameters."""
        if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        seen[str(context.module.name)] += 1
        kernel = context.module.param(
            "kernel", context.module.kernel_init, (args[0].shape[-1], context.module.features)
        )
        bias = context.module.param("bias", context.module.bias_init, (context.module.features,))
        return args[0] @ kernel + bias

    expected = bert.small
    with nn.intercept_methods(quantised):
        close(expected, hidden(bert.model))
        with layout():
            stock: Any = FlaxAutoModel.from_pretrained(bert.folder)
            close(expected, hidden(stock))
    with layout(), nn.intercept_methods(quantised):
        close(expected, hidden(stock))
    assert seen["query"] >= 9


# --- modules ----------------------------------------------------------------------------------


def test_a_bare_linen_module_runs_at_the_layout(bert):  # noqa: F811
    cfg, params = bert.model.config, bert.model.params
    bare = module(FlaxBertModule, cfg, dtype=jnp.float32)
    assert isinstance(bare, FlaxBertModule)
    ones = jnp.ones_like(IDS)
    mask = jnp.ones((3, 4))
    inputs = (jnp.asarray(IDS), ones, ones * 0, jnp.arange(9)[None], mask)
    close(bert.small, jax.jit(bare.apply)({"params": params}, *inputs)[0])
    fresh = jax.eval_shape(bare.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)

    # As a part of another module, by the context: the whole tree is at the root's sizes.
    class Head(nn.Module):
        @nn.compact
        def __call__(self, *inputs: Any) -> Any:
            backbone: Any = FlaxBertModule(cfg, name="backbone")
            return backbone(*inputs)[0]

    with layout(cfg):
        states = jax.jit(Head().apply)({"params": {"backbone": params}}, *inputs)
    close(bert.small, states)


MLP = Spec(
    name="MLP",
    pairs=Pair(
        at="Block_{i}", first="Dense_0", second="Dense_1", width="hidden", activation="relu"
    ),
)


class Block(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Dense(self.hidden)(x))
        return x + nn.Dense(x.shape[-1])(h)


class Net(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = Block(self.hidden)(x)
        return x


def net_with_dead_channels(counts: tuple[int, ...]) -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (5, 6))
    params: Any = Net(hidden=8).init(jax.random.key(0), x)
    for i, count in enumerate(counts):
        kernel = params["params"][f"Block_{i}"]["Dense_1"]["kernel"]
        params["params"][f"Block_{i}"]["Dense_1"]["kernel"] = kernel.at[:count].set(0.0)
    return params, x


@pytest.mark.parametrize("counts", [(1, 5, 3), (8, 0, 8), (8, 8, 8)])
def test_a_model_of_ones_own_keeps_its_spec_in_its_config(counts):
    params, x = net_with_dead_channels(counts)
    small, cfg = slim(params, {"hidden": 8}, MLP, width="per_layer")
    widths = [small["params"][f"Block_{i}"]["Dense_0"]["kernel"].shape[1] for i in range(3)]
    assert widths == [8 - count for count in counts]
    made = module(Net, cfg)
    close(Net(hidden=8).apply(params, x), made.apply(small, x))
    proof = flaxslim.verify((params, {"hidden": 8}), (small, cfg), Net, inputs=x, spec=MLP)
    assert proof.relative <= 1e-5
    if 8 not in counts:
        proof.raise_if_failed()
    shapes = jax.eval_shape(made.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)


class Sloped(nn.Module):
    """Heads with slopes of their own, which no parameter holds."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: Any, slopes: Any) -> Any:
        q, k, v = (
            nn.Dense(self.heads * 3, name=name)(x).reshape(len(x), self.heads, 3) for name in "qkv"
        )
        scores = jnp.einsum("thk,shk->hts", q, k) + slopes[:, None, None] * jnp.arange(len(x))
        heads = jnp.einsum("hts,shk->thk", nn.softmax(scores), v)
        return nn.Dense(5, name="o")(heads.reshape(len(x), -1))


SLOPED = Spec(
    name="SLOPED",
    pairs=Pair(
        at="attn",
        first="v",
        first_axes="d (h k)",
        also={"q": "d (h k)", "k": "d (h k)"},
        second="o",
        second_axes="(h k) d",
        axis="h",
        sizes={"k": "3"},
        width="heads",
        fixed=True,
        modules={"": {"heads": "h"}},
        arguments={"": {"slopes": "h"}},
    ),
)


@pytest.mark.skipif(not hasattr(jax, "make_user_context"), reason="JAX cannot be told of layouts")
def test_a_jitted_function_is_compiled_for_each_layout():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Sloped(name="attn")(x, 2.0 ** -jnp.arange(4.0))

    model, x = Outer(), jax.random.normal(jax.random.key(0), (6, 5))
    variables: Any = model.init(jax.random.key(1), x)
    run: Any = jax.jit(model.apply)
    for gone in (slice(0, 6), slice(6, 12), slice(0, 6)):
        kernel = variables["params"]["attn"]["o"]["kernel"].at[gone].set(0)
        zeroed = flaxslim._tree.replace(variables, {"params/attn/o/kernel": kernel})
        small, cfg = slim(zeroed, {"heads": 4}, SLOPED, width="per_layer")
        before: Any = model.apply(zeroed, x)
        with layout(cfg, spec=SLOPED):
            np.testing.assert_allclose(run(small, x), before, rtol=1e-4, atol=1e-5)


def test_equal_widths_need_no_layout():
    params, x = net_with_dead_channels((3, 3, 3))
    small, cfg = slim(params, {"hidden": 8}, MLP, width="per_layer")
    assert cfg == {"hidden": 5}
    close(Net(hidden=8).apply(params, x), Net(**cfg).apply(small, x))


@pytest.mark.skipif(
    not hasattr(jax.sharding.NamedSharding, "update"),
    reason="the nn.scan of flax >= 0.11 needs jax >= 0.7",
)
def test_a_scanned_stack_and_rematerialised_layers_run_at_the_layout():
    class Scanned(nn.Module):
        hidden: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            class Step(nn.Module):
                hidden: int

                @nn.compact
                def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
                    return nn.remat(Block)(self.hidden, name="block")(x), None

            stack = nn.scan(
                Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return stack(self.hidden, name="layers")(x, None)[0]

    x = jax.random.normal(jax.random.key(1), (5, 6))
    params: Any = Scanned(hidden=8).init(jax.random.key(0), x)
    block = params["params"]["layers"]["block"]
    dead = np.zeros((3, 8, 1), bool)
    dead[0, :5], dead[1, 2:7], dead[2, ::2] = True, True, True
    block["Dense_1"]["kernel"] = jnp.where(dead, 0.0, block["Dense_1"]["kernel"])
    spec = Spec(
        name="SCANNED",
        pairs=Pair(
            at="layers/block",
            first="Dense_0",
            second="Dense_1",
            first_axes="l d f",
            second_axes="l f d",
            width="4*hidden",  # as if the class hard-coded it
            activation="relu",
        ),
    )
    small, cfg = slim(params, {"hidden": 2}, spec, width="per_layer")
    assert small["params"]["layers"]["block"]["Dense_0"]["kernel"].shape == (3, 6, 4)
    close(Scanned(hidden=8).apply(params, x), module(Scanned, cfg, hidden=8).apply(small, x))


# --- what it costs ----------------------------------------------------------------------------


def _primitives(jaxpr: Any) -> Counter[str]:
    """How many equations of each kind, those inside of others counted too."""
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    found += _primitives(inner)
    return found


def test_no_equation_more_than_in_a_module_written_by_hand(bert):  # noqa: F811
    """Not one: heads are taken from their mask by slices, where by hand they are gathered."""
    cfg, params = bert.model.config, bert.model.params
    x, mask, head_mask = jnp.ones((2, 9, 32)), jnp.ones((2, 9)), jnp.ones((3, 4))
    encoder, hand_params = by_hand(cfg, params["encoder"]["layer"])
    theirs = jax.make_jaxpr(encoder.apply)(hand_params, x, mask, head_mask)

    class Stock(nn.Module):
        config: BertConfig

        @nn.compact
        def __call__(self, *inputs: Any) -> Any:
            return FlaxBertEncoder(self.config, name="encoder")(*inputs)[0]

    stock = module(Stock, cfg)
    variables = {"params": {"encoder": params["encoder"]}}
    ours = jax.make_jaxpr(stock.apply)(variables, x, mask, head_mask)
    counts, by_hand_counts = _primitives(ours.jaxpr), _primitives(theirs.jaxpr)
    assert counts - by_hand_counts <= Counter(slice=4, concatenate=1)
    assert counts.total() <= by_hand_counts.total()
    close(
        jax.jit(encoder.apply)(hand_params, x, mask, head_mask),
        jax.jit(stock.apply)(variables, x, mask, head_mask),
    )


def test_no_equation_more_than_in_the_dense_model(gpt2):  # noqa: F811
    """A class that takes no argument by heads: the same equations, smaller."""
    ours, theirs = (
        jax.make_jaxpr(lambda p, m=model: m(IDS, params=p).logits)(params)
        for model, params in ((gpt2.model, gpt2.model.params), (gpt2.dense, gpt2.zeroed))
    )
    assert _primitives(ours.jaxpr) == _primitives(theirs.jaxpr)


def test_the_program_does_not_tell_which_heads_went():
    """Heads out of the middle: no operation more than where the last ones went.

    The mask of ones that the class multiplies by is left out by the compiler only as long as it
    sees that what is taken from it are ones.
    """
    cfg = BertConfig(**{**BERT.to_dict(), "num_hidden_layers": 1, "architectures": None})
    dense = FlaxBertModel(cfg, _do_init=False)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), dense.params_shape_tree)
    (site,) = spec_for(cfg, "heads").sites(params, cfg)
    found = []
    for gone in (1, site.size - 1):
        alive = np.arange(site.size) != gone
        kernel = params["encoder"]["layer"]["0"]["attention"]["output"]["dense"]["kernel"]
        rows = np.repeat(alive, len(kernel) // site.size)
        zeroed = flaxslim._tree.replace(params, {site.second.path: kernel * rows[:, None]})
        small, new = slim(zeroed, cfg, "heads", width="per_layer")
        model = FlaxBertModel(new, _do_init=False)
        with flaxslim.layout():
            found.append(_compiled(model, small).as_text())
    first, last = (Counter(re.findall(r"= \S+ ([a-z-]+)\(", text)) for text in found)
    assert first == last
    assert "gather" in first  # of the embeddings: the pattern finds operations


def test_a_layer_of_width_0_costs_nothing(tmp_path):
    """As many products, and as many softmaxes, as in a stock model without those layers."""
    cfg = BertConfig(**{**BERT.to_dict(), "num_hidden_layers": 4, "architectures": None})
    dense, two = (
        FlaxBertModel(BertConfig(**{**cfg.to_dict(), "num_hidden_layers": n}), _do_init=False)
        for n in (4, 2)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(0.3 * rng.normal(size=x.shape), x.dtype), dense.params_shape_tree
    )
    sites = spec_for(cfg, "all").sites(params, cfg)
    whole = [site for site in sites if {"0", "2"} & {*site.root.split("/")}]
    assert len(whole) == 4
    zeroed, _ = kill(params, whole, low=1.0, high=1.0)
    flaxslim.save(tmp_path / "slim", *slim(zeroed, cfg, "all", width="per_layer"))
    model, small = flaxslim.from_pretrained(FlaxBertModel, tmp_path / "slim", _do_init=False)
    theirs, ours, before = (
        _compiled(two, two.params_shape_tree),
        _compiled(model, small),
        _compiled(dense, zeroed),
    )
    assert _instructions(ours) == _instructions(theirs)
    assert min((_instructions(before) - _instructions(ours)).values()) > 0  # the control
    close(before(zeroed), ours(small))


def _compiled(model: Any, params: Any) -> Any:
    return jax.jit(lambda p: model(IDS, params=p).last_hidden_state).lower(params).compile()


def _instructions(compiled: Any) -> Counter[str]:
    """How many of those that the sizes of a layer decide about are left by the compiler."""
    return Counter(re.findall(r" (dot|exponential|convolution)\(", compiled.as_text()))


def test_a_training_step_is_traced_once(bert):  # noqa: F811
    traces: list[int] = []

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        traces.append(1)
        grads = jax.grad(lambda p: (hidden(bert.model, params=p) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    tx = optax.sgd(1e-3)
    params, state = bert.model.params, tx.init(bert.model.params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


@pytest.fixture(autouse=True)
def _precise() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


# --- bad input --------------------------------------------------------------------------------


def test_what_is_no_linen_class_is_refused(bert):  # noqa: F811
    classes: list[Any] = [FlaxBertModel, FlaxBertModule(BERT)]
    for wrong in classes:
        with pytest.raises(LayoutError, match="takes a class") as caught:
            module(wrong, bert.model.config)
        assert "FlaxBertModule" in str(caught.value)


def test_a_class_of_another_family_is_refused(bert):  # noqa: F811
    from transformers import FlaxGPT2Model, FlaxRobertaModel

    for cls in (FlaxGPT2Model, FlaxRobertaModel):
        with pytest.raises(LayoutError, match="another family") as caught:
            flaxslim.from_pretrained(cls, bert.folder)
        assert "'bert'" in str(caught.value)
        assert "flaxslim.from_pretrained(Flax" in str(caught.value)


def test_a_spec_whose_module_lacks_the_attribute_is_refused():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Inner(name="Block_0")(x)

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.LayerNorm(name="Dense_0")(x)

    cfg = {"hidden": 8, "flaxslim_layout": {"version": 1, "sites": {"Block_0/Dense_1": 3}}}
    with pytest.raises(LayoutError, match="neither features nor a shape") as caught:
        module(Other, cfg, spec=MLP).init(jax.random.key(0), jnp.ones((1, 6)))
    assert caught.value.path == "Block_0/Dense_0"


READ = Spec(
    name="READ",
    pairs=Pair(
        at="Reads_{i}",
        first="up",
        second="down",
        readers={"side": "f o"},
        width="hidden",
        activation="relu",
    ),
)


class Reads(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Dense(self.hidden, name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(h) * nn.Dense(x.shape[-1], name="side")(h)


class ReadNet(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = x + Reads(self.hidden)(x)
        return x


@pytest.mark.parametrize("counts", [(1, 5, 3), (8, 0, 8)])
def test_layers_with_two_readers_run_at_a_layout(counts):
    x = jax.random.normal(jax.random.key(1), (5, 6))
    params: Any = ReadNet(hidden=8).init(jax.random.key(0), x)
    for i, count in enumerate(counts):
        for name in ("down", "side"):
            layer = params["params"][f"Reads_{i}"][name]
            layer["kernel"] = layer["kernel"].at[:count].set(0.0)
    small, cfg = slim(params, {"hidden": 8}, READ, width="per_layer")
    widths = [small["params"][f"Reads_{i}"]["side"]["kernel"].shape[0] for i in range(3)]
    assert widths == [8 - count for count in counts]
    made = module(ReadNet, cfg)
    close(ReadNet(hidden=8).apply(params, x), made.apply(small, x))
    shapes = jax.eval_shape(made.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, small)
    fresh: Any = made.init(jax.random.key(0), x)  # an empty kernel is drawn, too
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small)
