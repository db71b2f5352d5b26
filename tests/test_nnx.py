"""nnx modules: what comes back is new, whole, and says its sizes; caches and training included."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import older
import optax
import pytest
from flax import nnx

if not hasattr(nnx, "List"):
    pytest.skip("the models are written as flax >= 0.12 wants them", allow_module_level=True)

from kill_rows import Dead, kill_rows, need
from nnx_models import LENGTH, STYLES, VOCABULARY, Style, qwen_cache, start_cache
from strategies import gap

from flaxslim import (
    ConfigKeptWarning,
    NothingRemovedWarning,
    Pair,
    Site,
    Spec,
    apply,
    discover,
    expand,
    plan,
    slim,
    verify,
)
from flaxslim._nnx import check_shapes
from flaxslim._tree import flatten, replace
from flaxslim.errors import FlaxslimError, LayoutError, PlanError, SpecError
from flaxslim.specs._libraries import BONSAI_GEMMA3_HEADS, BONSAI_QWEN3_HEADS

TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, VOCABULARY)


@dataclasses.dataclass
class Case:
    """A model of a style, pruned so that each policy has something to remove everywhere."""

    style: Style
    model: Any
    sites: tuple[Site, ...]
    dead: dict[str, Dead]

    @property
    def sized(self) -> bool:
        """Whether the style's library has a config to write to."""
        return "hidden" not in self.style.keys

    def of(self, axis: str) -> list[Site]:
        return [site for site in self.sites if site.pair.axis == axis]

    def config(self, sites: list[Site]) -> Any:
        """The config of a model in which these sites set the sizes."""
        f, h = ([s for s in sites if s.pair.axis == axis] for axis in "fh")
        groups = max(
            sum(row[s.owners == g].any() for g in range(len(s.groups)))
            for s in h
            for row in ~self.dead[s.second.path].mask
        )
        return self.style.sized(need(f, self.dead, 1), need(h, self.dead, 1), int(groups))


_cases: dict[str, Case] = {}


def case(name: str) -> Case:
    if name not in _cases:
        style = STYLES[name]
        model = style.make()
        sites = style.spec.sites(model, style.cfg)
        for seed in range(300):
            pruned, dead = killed(model, sites, seed)
            made = Case(style=style, model=pruned, sites=sites, dead=dead)
            if all(
                0 < need([site], dead, 0) < site.size
                and 1 < need(made.of(axis), dead, 1) < site.size
                for axis in "fh"
                for site in made.of(axis)
            ):
                break
        else:
            raise AssertionError("no seed lets something go everywhere")
        _cases[name] = made
    return _cases[name]


def killed(model: Any, sites: tuple[Site, ...], seed: int) -> tuple[Any, dict[str, Dead]]:
    leaves = flatten(model)
    arrays = {t.path: np.array(leaves[t.path], order="C") for site in sites for t in site.tensors}
    dead = kill_rows(arrays, sites, np.random.default_rng(seed))
    return replace(model, {path: jnp.asarray(a) for path, a in arrays.items()}), dead


def attributes(module: Any) -> dict[str, Any]:
    """All that the modules of a graph say by whole numbers and tuples of them."""
    found: dict[str, Any] = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in vars(node).items():
                if isinstance(value, int) or (
                    isinstance(value, tuple) and all(isinstance(v, int) for v in value)
                ):
                    found["/".join([*map(str, path), name])] = value
    return found


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(module).items()}


@nnx.jit
def outputs(model: Any, tokens: jax.Array = TOKENS) -> Any:
    return model(tokens)


def below(path: str, found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name.startswith(path)}


# --- the same function ------------------------------------------------------------------------


@pytest.mark.parametrize("name", STYLES)
def test_a_slimmed_module_is_what_its_class_builds_at_the_new_sizes(name):
    c = case(name)
    leaves, said = flatten(c.model), attributes(c.model)
    small, cfg = slim(c.model, c.style.cfg if c.sized else None, c.style.spec)

    expected = c.config(list(c.sites))
    assert cfg == (expected if c.sized else None)
    fresh = c.style.shape(expected)
    assert type(small) is type(c.model)
    assert shapes(small) == shapes(fresh)
    assert attributes(small) == attributes(fresh) != said

    # The module that went in is what it was, and shares nothing that is cut.
    after = flatten(c.model)
    assert all(after[path] is leaf for path, leaf in leaves.items())
    assert attributes(c.model) == said

    before, now = ((m, k) if c.sized else m for m, k in ((c.model, c.style.cfg), (small, cfg)))
    proof = verify(before, now, inputs=TOKENS, spec=c.style.spec, repeats=0)
    proof.raise_if_failed()
    assert proof.relative <= 2e-6
    assert proof.control is not None
    assert proof.control.smallest is not None
    assert proof.control.smallest > 1e-4
    assert len(proof.control.rows) == len(c.sites)


@pytest.mark.filterwarnings("ignore::flaxslim.DiscoveryWarning")  # of what runs at one width only
@pytest.mark.parametrize("name", [n for n in STYLES if n.startswith(("bonsai", "flax"))])
def test_a_discovered_spec_names_what_counts_the_heads(name):
    c = case(name)
    spec = discover(c.model, TOKENS)
    small, _ = slim(c.model, None, spec)
    known, _ = slim(c.model, c.style.cfg if c.sized else None, c.style.spec)
    assert attributes(small) == attributes(known) != attributes(c.model)
    np.testing.assert_allclose(outputs(small), outputs(c.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in STYLES if name != "maxtext scanned"])
def test_each_layer_keeps_its_own_width(name):
    c = case(name)
    # No config is needed to run, only to tell an activation or the size of a head; and a
    # dataclass has no place for layers that differ.
    told = name in ("bonsai gemma3", "maxtext")
    cfg = dataclasses.asdict(c.style.cfg) if told else None
    small, laid_out = slim(c.model, cfg, c.style.spec, width="per_layer")
    said, have = attributes(small), shapes(small)
    for i in range(2):
        own = [site for site in c.sites if f"layers/{i}/" in f"{site.root}/"]
        assert len(own) == 2
        fresh = c.style.shape(c.config(own))
        layer = f"{'decoder/' if 'decoder' in own[0].root else ''}layers/{i}/"
        assert below(layer, said) == below(layer, attributes(fresh))
        assert below(layer, have) == below(layer, shapes(fresh))
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(small), outputs(c.model)) <= 2e-6
    if told:
        assert set(laid_out["flaxslim_layout"]["sites"]) <= {site.name for site in c.sites}


# --- with a cache -----------------------------------------------------------------------------


def greedy(model: Any, cache: Any, start: int = 0, tokens: Any = None) -> tuple[Any, Any]:
    """Tokens and logits, one at a time, until the cache is full."""

    @nnx.jit
    def step(model: Any, cache: Any, token: jax.Array, t: Any) -> Any:
        logits, new = model(token[:, None], cache, t)
        # A cache that is a module has changed by itself.
        return logits[:, 0], None if isinstance(cache, nnx.Module) else new

    given = TOKENS[:, :3] if tokens is None else tokens
    seen = []
    for t in range(start, LENGTH):
        logits, new = step(model, cache, given[:, t], jnp.asarray(t))
        cache = cache if new is None else new
        seen.append(logits)
        if given.shape[1] <= t + 1:
            given = jnp.concatenate([given, logits.argmax(-1)[:, None]], axis=1)
    return given, jnp.stack(seen, axis=1)


def caches(c: Case, model: Any, cfg: Any) -> Any:
    return start_cache(model) if c.style.cache is None else c.style.cache(cfg)


# One cache that is made from a config, and one inside of the modules. That those of the others have
# their sizes follows from what their modules say of themselves.
DECODED = ("bonsai qwen3", [*STYLES][-1])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DECODED else pytest.mark.long)
        for name in STYLES
        if name != "maxtext scanned"
    ],
)
def test_decoding_with_a_cache_gives_the_same_tokens(name):
    c = case(name)
    small, _ = slim(c.model, c.style.cfg if c.sized else None, c.style.spec)
    # What makes a cache inside of the module must not do so in the shared one.
    zeroed = nnx.merge(*nnx.split(c.model))
    with jax.default_matmul_precision("highest"):
        before, logits = greedy(zeroed, caches(c, zeroed, c.style.cfg))
        after, found = greedy(small, caches(c, small, c.config(list(c.sites))))
        np.testing.assert_array_equal(after, before)
        assert gap(found, logits) <= 2e-6
        # The cache does what it should: all at once it is the same.
        assert gap(outputs(c.model, before[:, :LENGTH]), logits) <= 1e-5


def test_layers_of_their_own_width_have_caches_of_their_own():
    c = case("bonsai qwen3")
    small, _ = slim(c.model, None, c.style.spec, width="per_layer")
    own = [
        qwen_cache(c.config([s for s in c.sites if f"layers/{i}/" in f"{s.root}/"]))[i]
        for i in range(2)
    ]
    with jax.default_matmul_precision("highest"):
        before, logits = greedy(c.model, qwen_cache(c.style.cfg))
        after, found = greedy(small, older.List(own))
    np.testing.assert_array_equal(after, before)
    assert gap(found, logits) <= 2e-6
    # By the number of the first layer's groups alone, that of the second would not do.
    assert own[0].k_cache.shape != own[1].k_cache.shape


@pytest.mark.parametrize("name", [name for name in STYLES if name.startswith("flax")])
def test_a_cache_inside_of_the_module_is_cut_while_it_is_in_use(name):
    c = case(name)
    whole = nnx.merge(*nnx.split(c.model))
    cache = start_cache(whole)
    with jax.default_matmul_precision("highest"):
        for t in range(4):
            whole(TOKENS[:, t : t + 1], cache, t)
        small, _ = slim(whole, None, c.style.spec)
        mha = small.layers[0].attn.mha
        assert mha.cached_key.shape == (2, LENGTH, mha.num_kv_heads, mha.head_dim)
        assert mha.cache_index[...] == 4
        before, logits = greedy(whole, cache, 4, TOKENS[:, :6])
        after, found = greedy(small, cache, 4, TOKENS[:, :6])
    np.testing.assert_array_equal(after, before)
    assert gap(found, logits) <= 2e-6


# --- key/value groups -------------------------------------------------------------------------


def qwen_without(*heads: tuple[int, ...]) -> Any:
    """Heads that nothing reads, by layer; heads 0 and 1 read the first group, and so on."""
    style = STYLES["bonsai qwen3"]
    model = style.make()
    for layer, dead in zip(model.layers, heads, strict=True):
        kernel = layer.attn.o_proj.kernel
        kernel[...] = kernel[...].at[jnp.array(dead, int)].set(0)
    return model


@pytest.mark.parametrize(
    ("first", "second", "heads", "groups"),
    [
        ((2, 3), (2, 3), 4, 2),  # all heads of a group
        ((0, 1), (4, 5), 4, 2),  # another group in each layer
        ((0, 2, 5), (1, 3, 4), 3, 3),  # one head of each group
        ((0, 1, 2, 5), (0, 3, 4, 5), 2, 2),  # both
        ((0, 1, 2, 3, 5), (0, 1, 2, 3, 4), 1, 1),
        ((0, 1, 2, 3, 4, 5), (0, 1), 4, 2),  # a layer without living heads is filled up
    ],
)
def test_a_group_goes_with_its_heads_and_a_head_if_each_group_can_lose_one(
    first, second, heads, groups
):
    model, style = qwen_without(first, second), STYLES["bonsai qwen3"]
    small, cfg = slim(model, style.cfg, BONSAI_QWEN3_HEADS)
    assert (cfg.num_heads, cfg.num_kv_heads) == (heads, groups)
    for layer in small.layers:
        attn = layer.attn
        assert attn.num_kv_heads == groups
        assert attn.n_rep == heads // groups
        assert attn.q_proj.kernel_shape == (16, heads, 4)
        assert attn.v_proj.kernel_shape == attn.k_proj.kernel_shape == (16, groups, 4)
        assert attn.o_proj.kernel_shape == (heads, 4, 16)
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(small), outputs(model)) <= 2e-6


@pytest.mark.parametrize("width", ["uniform", "per_layer"])
def test_a_lone_dead_head_stays_with_its_group(width):
    model = qwen_without((3,), (0, 2))
    with pytest.warns(NothingRemovedWarning, match="a key/value group, go together"):
        small, _ = slim(model, None, BONSAI_QWEN3_HEADS, width=width)
    assert small is model


def test_groups_stay_even_in_a_module_even_if_the_spec_says_that_its_class_needs_no_even_ones():
    # Nothing would say how many heads belong to which group.
    model = qwen_without((2, 3, 0), (2, 3))
    ragged = Spec(name="RAGGED", pairs=dataclasses.replace(*BONSAI_QWEN3_HEADS, ragged=True))
    small, _ = slim(model, None, ragged, width="per_layer")
    assert [layer.attn.n_rep for layer in small.layers] == [2, 2]
    assert gap(outputs(small), outputs(model)) <= 1e-5


def test_a_head_without_values_is_dead_and_one_of_constant_values_moves_into_the_bias():
    style = STYLES["maxtext"]
    model = style.make()
    for layer in model.decoder.layers:
        value = layer.self_attention.value
        value.kernel[...] = value.kernel[...].at[:, :2].set(0)
        value.bias[...] = value.bias[...].at[0].set(0)  # silent; the second group is constant
    p = plan(model, style.cfg, style.spec)
    assert [dict(c.rules) for c in p.cuts if c.site.pair.axis == "h"] == [{"iii": 2, "iv": 2}] * 2
    small, cfg = slim(model, style.cfg, style.spec)
    assert (cfg.base_num_query_heads, cfg.base_num_kv_heads) == (2, 1)
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(small), outputs(model)) <= 2e-6
    out, old = (m.decoder.layers[0].self_attention.out.bias[...] for m in (small, model))
    assert float(jnp.abs(out - old).max()) > 1e-3


# --- the graph --------------------------------------------------------------------------------


def test_it_splits_merges_and_trains_like_any_other():
    c = case("tunix")
    small, _ = slim(c.model, c.style.cfg, c.style.spec)
    graphdef, state = nnx.split(small)
    again = nnx.merge(graphdef, state)
    assert attributes(again) == attributes(small)
    assert shapes(again) == shapes(small)

    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)

    def loss(model: Any) -> jax.Array:
        logits = model(TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer) -> jax.Array:
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    kept = shapes(small)
    losses = [float(step(small, optimizer)) for _ in range(4)]
    np.testing.assert_allclose(losses[0], float(loss(c.model)), rtol=1e-5)
    assert losses[-1] < losses[0]
    assert shapes(small) == kept


def test_what_a_variable_says_of_its_sharding_survives():
    c = case("tunix")
    small, _ = slim(c.model, c.style.cfg, c.style.spec)
    old, new = (
        {path: v.get_metadata() for path, v in nnx.to_flat_state(nnx.state(m))}
        for m in (c.model, small)
    )
    assert old == new
    kernel = small.layers[0].mlp.gate_proj.kernel
    assert kernel.get_metadata()["out_sharding"] == ("fsdp", "tp")
    assert small.layers[1].attn.kv_einsum.w.get_metadata()["out_sharding"][1] == "tp"


def test_a_module_on_a_mesh_stays_there():
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.ones, ("fsdp", "tp"))
    with older.set_mesh(mesh):
        module = nnx.Dict(
            up=nnx.Linear(4, 6, kernel_init=init, rngs=nnx.Rngs(0)),
            down=nnx.Linear(6, 4, kernel_init=init, rngs=nnx.Rngs(0)),
        )
    down: Any = module["down"]
    down.kernel[...] = down.kernel[...].at[:2].set(0)
    small, _ = slim(module, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    expected = NamedSharding(mesh, PartitionSpec("fsdp", "tp"))
    for name, shape in (("up", (4, 4)), ("down", (4, 4))):
        array = small[name].kernel[...]
        assert array.shape == shape
        assert array.sharding == expected


def test_layers_that_are_one_module_are_cut_once():
    c = case("bonsai qwen3")
    model = nnx.merge(*nnx.split(c.model))
    model.layers[1] = model.layers[0]
    small, _ = slim(model, None, c.style.spec, width="per_layer")
    assert small.layers[1] is small.layers[0]
    assert small.layers[0].mlp.up_proj.kernel.shape[1] < 12
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(small), outputs(model)) <= 2e-6


def test_a_layer_may_lose_all_that_it_has_but_for_one_head():
    style = STYLES["flax"]
    model = style.make()
    dead = model.layers[0]
    dead.mlp.down.kernel[...] = 0 * dead.mlp.down.kernel[...]
    dead.attn.mha.out.kernel[...] = 0 * dead.attn.mha.out.kernel[...]
    small, _ = slim(model, None, style.spec, width="per_layer")
    attn, mlp = small.layers[0].attn.mha, small.layers[0].mlp
    # Attention divides by the number of its heads.
    assert (attn.num_heads, attn.num_kv_heads, attn.qkv_features) == (1, 1, 4)
    assert (mlp.up.out_features, mlp.down.in_features) == (0, 0)
    assert small.layers[1].attn.mha.num_heads == 6
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(small), outputs(model)) <= 2e-6


@pytest.mark.parametrize("name", ["bonsai gemma3", "maxtext scanned", "flax"])
def test_a_module_that_is_expanded_says_its_old_sizes(name):
    c = case(name)
    p = plan(c.model, c.style.cfg if c.sized else None, c.style.spec)
    small, _ = slim(c.model, c.style.cfg if c.sized else None, plan=p)
    full = expand(p, small)
    assert attributes(full) == attributes(c.model)
    assert shapes(full) == shapes(c.model)
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(full), outputs(c.model)) <= 2e-6


# --- what nnx does not check ------------------------------------------------------------------


def test_a_module_that_is_not_what_the_plan_leaves_is_refused():
    c = case("bonsai qwen3")
    p = plan(c.model, c.style.cfg, c.style.spec)
    small, cfg = slim(c.model, c.style.cfg, plan=p)
    check_shapes(small, p, cfg)
    path = "layers/1/mlp/down_proj/kernel"
    wrong = replace(small, {path: jnp.ones((12, 16))})
    with pytest.raises(PlanError, match="another shape than the plan says") as caught:
        check_shapes(wrong, p, cfg)
    assert caught.value.path == path


def test_a_size_of_the_spec_that_no_longer_fits_is_refused():
    # It takes the size of a head from two numbers, of which the cut changes one.
    c = case("bonsai gemma3")
    flat = [*BONSAI_GEMMA3_HEADS][1]
    spec = Spec(
        name="SHARED_OUT",
        pairs=dataclasses.replace(flat, sizes={"k": "inner/num_attention_heads"}),
    )
    cfg = {**dataclasses.asdict(c.style.cfg), "inner": 24}
    with pytest.raises(FlaxslimError, match=r"in an axis|disagree|is not|other sizes"):
        slim(c.model, cfg, spec)


def test_an_attribute_that_the_spec_names_must_be_there_unless_it_says_so():
    model = qwen_without((2, 3), (2, 3))
    for name in ("heads", "heads.count", "n_rep.count"):
        pair = dataclasses.replace(*BONSAI_QWEN3_HEADS, modules={"": {name: "h"}})
        with pytest.raises(LayoutError, match="no such attribute") as caught:
            slim(model, None, Spec(name="WRONG", pairs=pair))
        assert caught.value.path == f"layers/0/attn.{name}"
        pair = dataclasses.replace(pair, modules={"": {f"{name}?": "h"}})
        small, _ = slim(model, None, Spec(name="OPTIONAL", pairs=pair))
        assert small.layers[0].attn.n_rep == 2


# --- containers, and specs that do not tell all -----------------------------------------------


@pytest.mark.parametrize(
    ("inside", "out"),
    [(lambda m: {"model": m}, lambda t: t["model"]), (lambda m: [m], lambda t: t[0])],
    ids=["dict", "list"],
)
def test_a_module_in_a_container_says_its_new_sizes_too(inside, out):
    c = case("flax")
    alone, _ = slim(c.model, None, c.style.spec)
    held, _ = slim(inside(c.model), None, c.style.spec)
    assert attributes(out(held)) == attributes(alone) != attributes(c.model)
    p = plan(c.model, None, c.style.spec)
    beside = apply(p, {"step": jnp.zeros((), int), "model": c.model}, like=c.model)
    assert attributes(beside["model"]) == attributes(alone)
    with jax.default_matmul_precision("highest"):
        assert gap(outputs(out(held)), outputs(c.model)) <= 2e-6


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "still says how many heads"),
        ({"": {"num_attention_heads?": "h"}}, "still says how many heads"),
        ({"att": {"num_heads": "h"}}, "no such module"),
    ],
    ids=["none", "another name", "another path"],
)
def test_heads_that_the_spec_does_not_tell_are_refused(modules, message):
    """The module would split its channels into as many heads as before: another function."""

    class Attention(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.num_heads = 4
            self.q, self.k, self.v, self.out = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))

    model = nnx.Dict(attn=Attention(nnx.Rngs(0)))
    out: Any = model["attn"].out
    out.kernel[...] = out.kernel[...].at[:4].set(0)
    pair = Pair(
        at="attn",
        first="v",
        also={"q": "d (h k)", "k": "d (h k)"},
        second="out",
        first_axes="d (h k)",
        second_axes="(h k) d",
        axis="h",
        activation="identity",
        sizes={"k": "2"},
        modules=modules,
    )
    with pytest.raises(LayoutError, match=message) as caught:
        slim(model, spec=Spec(name="HEADS", pairs=pair))
    assert "modules=" in str(caught.value)
    told = dataclasses.replace(pair, modules={"": {"num_heads": "h"}})
    small, _ = slim(model, spec=Spec(name="HEADS", pairs=told))
    assert small["attn"].num_heads == 2


def test_a_plan_of_a_state_that_leaves_no_head_is_refused_for_the_module():
    style = STYLES["flax"]
    model = style.make()
    kernel = model.layers[0].attn.mha.out.kernel
    kernel[...] = 0 * kernel[...]
    p = plan(nnx.state(model), None, style.spec, width="per_layer")
    with pytest.raises(LayoutError, match="divides by its number of heads"):
        apply(p, model)


def test_an_attribute_that_is_computed_is_refused():
    model = qwen_without((2, 3), (2, 3))
    pair = dataclasses.replace(*BONSAI_QWEN3_HEADS, modules={"": {"num_kv_heads": "g"}})
    with pytest.raises(LayoutError, match="cannot be set"):
        slim(model, None, Spec(name="WRONG", pairs=pair))


class TwoReaders(nnx.Module):
    def __init__(self, hidden: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(3, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, 2, rngs=rngs)
        self.side = nnx.Linear(hidden, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jax.nn.relu(self.up(x))
        return self.down(h), self.side(h)


def test_each_layer_that_reads_the_channels_says_its_new_inputs():
    model = TwoReaders(6, nnx.Rngs(0))
    model.down.kernel[...] = model.down.kernel[...].at[jnp.array([1, 2])].set(0)
    model.side.kernel[...] = model.side.kernel[...].at[jnp.array([2, 3])].set(0)
    pair = Pair(first="up", second="down", readers={"side": "f o"}, activation="relu")
    small, _ = slim(model, None, Spec(name="TWO", pairs=pair))
    assert attributes(small) == attributes(TwoReaders(5, nnx.Rngs(0)))
    x = jnp.arange(12.0).reshape(4, 3)
    for ours, theirs in zip(small(x), model(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


class Depthwise(nnx.Module):
    def __init__(self, hidden: int, rngs: nnx.Rngs):
        self.up = nnx.Conv(3, hidden, (1, 1), rngs=rngs)
        self.each = nnx.Conv(hidden, hidden, (3, 3), feature_group_count=hidden, rngs=rngs)
        self.down = nnx.Conv(hidden, 3, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.each(self.up(x))))


def test_a_depthwise_convolution_says_its_new_groups():
    model = Depthwise(6, nnx.Rngs(0))
    model.down.kernel[...] = model.down.kernel[...].at[:, :, jnp.array([1, 4])].set(0)
    pair = Pair(
        first="each", second="down", first_axes="x y o f", second_axes="x y f d",
        activation="relu", also={"up": "x y d f"},
    )  # fmt: skip
    small, _ = slim(model, None, Spec(name="DEPTHWISE", pairs=pair))
    assert attributes(small) == attributes(Depthwise(4, nnx.Rngs(0)))
    x = jnp.arange(150.0).reshape(2, 5, 5, 3) / 150
    np.testing.assert_allclose(small(x), model(x), rtol=1e-5, atol=1e-6)


# --- numbers that a class keeps ----------------------------------------------------------------


class Scaled(nnx.Module):
    """A layer that computes with the width it was given, and a model that holds its config."""

    def __init__(self, cfg: Any, rngs: nnx.Rngs):
        self.hidden = cfg["hidden"]
        self.up = nnx.Linear(3, self.hidden, rngs=rngs)
        self.down = nnx.Linear(self.hidden, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.up(x))) * self.hidden**-0.5


class Holder(nnx.Module):
    def __init__(self, cfg: Any, rngs: nnx.Rngs):
        self.cfg = cfg
        self.layer = Scaled(cfg, rngs)

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


@pytest.mark.parametrize(
    ("modules", "told"),
    [({}, "layer.hidden = 8, cfg.hidden = 8"), ({"": {"hidden": "f"}}, "cfg.hidden = 8")],
)
def test_a_number_that_a_class_keeps_is_told(modules, told):
    """Where the spec names it, it is mended; so the proof sees what a rebuilt module would do."""
    net = Holder({"hidden": 8}, nnx.Rngs(0))
    net.layer.down.kernel = nnx.Param(net.layer.down.kernel[...].at[:3].set(0.0))
    pair = Pair(at="layer", first="up", second="down", width="hidden", modules=modules)
    spec = Spec(name="SCALED", pairs=pair)
    with pytest.warns(ConfigKeptWarning, match=f"the old width: {told}"):
        small, sizes = slim(net, {"hidden": 8}, spec=spec)
    assert sizes == {"hidden": 5}
    proof = verify(net, small, inputs=jnp.ones((2, 3)), spec=spec)
    assert (small.layer.hidden, proof.ok) == ((5, False) if modules else (8, True))


class Normed(nnx.Module):
    """A norm between the layers of an FFN, which is 3 wide or as wide as its hidden layer."""

    def __init__(self, kind: Any, width: int):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, width, rngs=rngs)
        self.norm = kind(8, rngs=rngs)
        self.down.kernel[...] = self.down.kernel[...].at[:3].set(0.0)
        self.eval()

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.norm(self.up(x))))


TABLES = {f"norm/{name}": "f" for name in ("mean", "var", "scale", "bias")}


@pytest.mark.parametrize("named", [0, 2, 4])
def test_a_batch_norm_between_the_layers_says_its_width(named):
    """Named, it is mended, and back again; what of it is not named is told."""
    net, x = Normed(nnx.BatchNorm, 3), jnp.ones((2, 3))
    tables = dict([*TABLES.items()][:named])
    spec = Spec(name="NORMED", pairs=Pair(first="up", second="down", tables=tables))
    if named < 4:
        with pytest.warns(ConfigKeptWarning, match=r"norm of 8 features \(a BatchNorm"):
            slim(net, None, spec)
        return
    p = plan(net, spec=spec)
    small = slim(net, None, plan=p)[0]
    assert (small.norm.num_features, expand(p, small).norm.num_features) == (5, 8)
    np.testing.assert_allclose(small(x), net(x), rtol=1e-6)


def group_norm(width: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, num_groups=1, rngs=rngs)


def bare_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, use_scale=False, use_bias=False, rngs=rngs)


def bare_groups(width: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, num_groups=1, use_scale=False, use_bias=False, rngs=rngs)


@pytest.mark.parametrize("kind", [nnx.LayerNorm, nnx.RMSNorm, group_norm, bare_norm, bare_groups])
@pytest.mark.parametrize("named", [False, True])
def test_a_norm_over_the_channels_leaves_none_of_them(kind, named):
    """Its mean is that of what is left: without one of the channels all others change."""
    net = Normed(kind, 3)
    tables = {name: "f" for name in TABLES if named and name in flatten(net)}
    with pytest.raises(SpecError, match="a norm over the channels"):
        slim(net, None, Spec(name="NORMED", pairs=Pair(first="up", second="down", tables=tables)))


def test_a_norm_that_may_be_of_the_inputs_is_not_told():
    net = Normed(nnx.LayerNorm, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slim(net, None, Spec(name="NORMED", pairs=Pair(first="up", second="down")))


class Tied(nnx.Module):
    """An FFN, and another layer that has a variable in common with it."""

    def __init__(self, name: str):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.zero = nnx.Linear(4, 8, rngs=rngs) if name == "up" else nnx.Linear(8, 4, rngs=rngs)
        self.zero.kernel = getattr(self, name).kernel


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_variable_that_another_module_holds_too_is_not_cut(name):
    """A path has one of its places, and the rules see that one alone."""
    model = Tied(name)
    spec = Spec(name="MLP", pairs=Pair(first="up", second="down"))
    model.down.kernel[...] = model.down.kernel[...].at[:2].set(0)
    with pytest.raises(PlanError, match="two modules hold one variable") as caught:
        slim(model, spec=spec)
    assert {f"{name}/kernel", "zero/kernel"} == set(str(caught.value.seen).split(", "))
    model.zero.kernel = nnx.Param(model.zero.kernel[...])
    assert slim(model, spec=spec)[0].down.kernel.shape == (6, 4)


def test_a_plan_that_was_made_without_the_config_is_refused_with_it():
    """Or the config would go on to say the old width."""
    model = Tied("up")
    model.zero.kernel = nnx.Param(model.zero.kernel[...])
    model.down.kernel[...] = model.down.kernel[...].at[:2].set(0)
    p = plan(model, spec=Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden")))
    with pytest.raises(PlanError, match="made without this config"):
        slim(model, {"hidden": 8}, plan=p)
    assert slim(model, plan=p)[0].up.kernel.shape == (4, 6)
