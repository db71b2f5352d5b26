"""Stock classes at the sizes of a layout: whatever can be done with an instance still works."""

import copy
import dataclasses
import functools
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from kill import kill
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    FlaxBertForQuestionAnswering,
    FlaxBertModel,
    FlaxGPT2LMHeadModel,
    FlaxLlamaForCausalLM,
    GPT2Config,
    LlamaConfig,
)

import flaxslim
from flaxslim import from_pretrained, slim
from flaxslim._tree import flatten, replace
from flaxslim.errors import FlaxslimError, LayoutError
from flaxslim.specs import spec_for

BERT = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    initializer_range=0.3,
)
IDS = np.random.default_rng(0).integers(5, 60, (4, 9))


def pruned(model: Any, seed: int = 0, **ratio: float) -> Any:
    """The parameters of a model of which each layer has lost other channels and heads."""
    sites = spec_for(model.config, "all").sites(model.params, model.config)
    return jax.device_put(kill(model.params, sites, seed=seed, **(ratio or {"high": 0.9}))[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slimmed:
    """A dense instance, its zeroed parameters, and an instance of what was cut from them."""

    dense: Any
    zeroed: Any
    model: Any
    folder: Any

    def expected(self, **kwargs: Any) -> Any:
        return outputs(self.dense, self.zeroed, **kwargs)

    @functools.cached_property
    def states(self) -> Any:
        """The last states of the zeroed model."""
        return hidden(self.dense, params=self.zeroed)

    @functools.cached_property
    def small(self) -> Any:
        """Those of the instance that was cut."""
        return hidden(self.model)

    @functools.cached_property
    def gradient(self) -> Any:
        return gradient(self.model, self.model.params)


def make(cls: type, cfg: Any, folder: Any, seed: int = 0) -> Slimmed:
    dense: Any = cls(cfg, seed=seed)  # pyright: ignore[reportCallIssue]
    zeroed = pruned(dense, seed)
    params, small = slim(zeroed, dense.config, "all", width="per_layer")
    flaxslim.save(folder, params, small)
    model = from_pretrained(cls, folder)
    return Slimmed(dense=dense, zeroed=zeroed, model=model, folder=folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Slimmed:
    return make(FlaxBertModel, BERT, tmp_path_factory.mktemp("bert") / "slim")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Slimmed:
    cfg = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3
    )
    return make(FlaxGPT2LMHeadModel, cfg, tmp_path_factory.mktemp("gpt2") / "slim", seed=1)


@pytest.fixture(autouse=True)
def _precise() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


def alike(theirs: Any, ours: Any) -> None:
    """Gradients, by the largest of them all: those of a key's bias are rounding alone."""
    theirs, ours = flatten(theirs), flatten(ours)
    scale = max(float(jnp.abs(x).max()) for x in theirs.values())
    for path, gradient in theirs.items():
        np.testing.assert_allclose(ours[path], gradient, atol=1e-5 * scale, err_msg=path)


def outputs(model: Any, params: Any, ids: Any = IDS, **kwargs: Any) -> Any:
    """All of them, compiled: op by op it takes longer."""
    return jax.jit(lambda p, i: model(i, params=p, **kwargs))(params, ids)


def hidden(model: Any, ids: Any = IDS, params: Any = None, **kwargs: Any) -> Any:
    params = model.params if params is None else params
    return outputs(model, params, ids, **kwargs).last_hidden_state


def gradient(model: Any, params: Any) -> Any:
    return jax.jit(jax.grad(lambda p: (hidden(model, params=p) ** 2).mean()))(params)


# --- what an instance can do ------------------------------------------------------------------


def test_it_is_an_instance_of_the_stock_class_with_sizes_that_differ(bert):
    assert type(bert.model) is FlaxBertModel
    layers: Any = bert.model.params["encoder"]["layer"]
    widths = [layers[str(i)]["intermediate"]["dense"]["kernel"].shape[1] for i in range(3)]
    heads = [layers[str(i)]["attention"]["self"]["query"]["kernel"].shape[1] // 8 for i in range(3)]
    assert len(set(widths)) == 3
    assert len(set(heads)) > 1
    close(bert.states, bert.small)


TRANSFORMED: dict[str, Callable[[Any, Any], Any]] = {
    "jit": lambda m, p: jax.jit(lambda p: hidden(m, params=p))(p),
    "vmap": lambda m, p: jax.vmap(lambda i: hidden(m, i[None], params=p)[0])(jnp.asarray(IDS)),
    "scan": lambda m, p: jax.lax.map(lambda i: hidden(m, i[None], params=p)[0], jnp.asarray(IDS)),
    "remat": lambda m, p: jax.checkpoint(lambda p: hidden(m, params=p))(p),
    "eval_shape then eager": lambda m, p: (
        jax.eval_shape(lambda p: hidden(m, params=p), p) and hidden(m, params=p)
    ),
    "pmap": lambda m, p: jax.pmap(lambda i: hidden(m, i, params=p))(IDS[None])[0],
    "shard_map": lambda m, p: jax.jit(
        jax.shard_map(
            lambda i: hidden(m, i, params=p),
            mesh=jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("b",)),
            in_specs=PartitionSpec("b"),
            out_specs=PartitionSpec("b"),
            check_vma=False,
        )
    )(jnp.asarray(IDS)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_runs_under(name, bert):
    if name == "shard_map" and not hasattr(jax, name):
        pytest.skip("this JAX has no jax.shard_map yet")
    close(bert.states, TRANSFORMED[name](bert.model, bert.model.params))


def test_gradients_are_those_of_the_zeroed_model(bert):
    """Of what is left; what was cut is held at zero in the zeroed model."""
    plan = flaxslim.plan(bert.zeroed, bert.dense.config, "all", width="per_layer")
    theirs = flaxslim.apply(plan, gradient(bert.dense, bert.zeroed), fold=False)
    alike(theirs, bert.gradient)


def test_gradient_checkpointing_keeps_the_layout(bert):
    model = from_pretrained(FlaxBertModel, bert.folder)
    model.enable_gradient_checkpointing()
    assert "remat" in str(jax.make_jaxpr(lambda p: gradient(model, p))(model.params))
    alike(bert.gradient, gradient(model, model.params))


def test_without_initialisation_it_comes_with_its_parameters(bert):
    model, params = from_pretrained(FlaxBertModel, bert.folder, _do_init=False)
    close(bert.small, hidden(model, params=params))
    with pytest.raises(ValueError, match="_do_init=False"):
        _ = model.params
    fresh = model.init_weights(jax.random.key(0), (1, 1))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize(
    "again",
    [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_it_can_be_copied(again, bert):
    twin = again(bert.model)
    close(bert.small, hidden(twin))
    twin.enable_gradient_checkpointing()
    close(bert.small, hidden(twin))


def test_parameters_can_be_cast_and_set(bert):
    model = from_pretrained(FlaxBertModel, bert.folder, dtype=jnp.bfloat16)
    model.params = model.to_bf16(model.params)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    out = hidden(model)
    assert out.dtype == jnp.bfloat16
    close(bert.small, out, 0.2)


def test_it_saves_and_reloads_by_itself(bert, tmp_path):
    bert.model.save_pretrained(tmp_path / "again")
    model = from_pretrained(FlaxBertModel, tmp_path / "again")
    np.testing.assert_array_equal(bert.small, hidden(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["flaxslim_layout"]["version"] == 1


def test_a_head_class_reads_a_base_checkpoint_and_the_other_way_round(bert, tmp_path):
    qa = from_pretrained(FlaxBertForQuestionAnswering, bert.folder)
    qa.save_pretrained(tmp_path / "qa")
    base = from_pretrained(FlaxBertModel, tmp_path / "qa", add_pooling_layer=False)
    np.testing.assert_array_equal(bert.small, hidden(base))


def test_threads_run_different_layouts_at_once(bert, tmp_path):
    other = make(FlaxBertModel, BERT, tmp_path / "other", seed=5)
    found: dict[str, Any] = {}

    def work(name: str, model: Any, params: Any) -> None:
        for _ in range(2):
            found[name] = jax.jit(lambda p: hidden(model, params=p))(params)

    jobs = {
        "one": (bert.model, bert.model.params),
        "two": (other.model, other.model.params),
        "dense": (bert.dense, bert.dense.params),
    }
    threads = [threading.Thread(target=work, args=(name, *job)) for name, job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(bert.states, found["one"])
    close(other.states, found["two"])
    np.testing.assert_allclose(hidden(bert.dense), found["dense"], rtol=1e-4, atol=1e-5)


def test_a_teacher_may_run_beside_its_student_in_one_trace(bert):
    @jax.jit
    def distance(student: Any, teacher: Any) -> Any:
        return (
            (hidden(bert.model, params=student) - hidden(bert.dense, params=teacher)) ** 2
        ).sum()

    assert float(distance(bert.model.params, bert.zeroed)) < 1e-6
    assert float(distance(bert.model.params, bert.dense.params)) > 1e-2


# --- heads ------------------------------------------------------------------------------------


def test_a_head_mask_has_an_entry_for_each_head_of_the_dense_model(bert):
    mask = np.ones((3, 4), np.int32)
    mask[0, 0] = mask[1, 2] = mask[2, 3] = mask[2, 1] = 0
    masked = hidden(bert.model, head_mask=mask)
    close(bert.expected(head_mask=mask).last_hidden_state, masked)
    assert np.abs(masked - bert.small).max() > 1e-2


def test_a_head_mask_of_another_size_is_refused(bert):
    with pytest.raises(LayoutError, match="another number of heads") as caught:
        hidden(bert.model, head_mask=np.ones((3, 3), np.int32))
    assert "layer_head_mask" in str(caught.value)
    assert "4 along axis 0" in str(caught.value)


def test_attentions_that_are_put_out_are_those_of_the_heads_that_are_left(bert):
    theirs = bert.expected(output_attentions=True).attentions
    ours = outputs(bert.model, bert.model.params, output_attentions=True).attentions
    sites = bert.model.config.flaxslim_layout["sites"]
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        left = sites.get(f"encoder/layer/{i}/attention/output/dense", range(4))
        close(np.asarray(a)[:, list(left)], b)


def test_generation_with_a_cache_and_beams(gpt2):
    ours, theirs = (
        model.generate(IDS, params=params, max_new_tokens=6, pad_token_id=0, num_beams=3).sequences
        for model, params in ((gpt2.model, gpt2.model.params), (gpt2.dense, gpt2.zeroed))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_the_cache_has_the_heads_that_are_left(gpt2):
    cache = gpt2.model.init_cache(2, 16)
    heads = [cache["transformer"]["h"][str(i)]["attn"]["cached_key"].shape[2] for i in range(3)]
    sites = gpt2.model.config.flaxslim_layout["sites"]
    assert heads == [len(sites.get(f"h/{i}/attn/c_proj", range(4))) for i in range(3)]
    assert len(set(heads)) > 1


@pytest.mark.parametrize(
    "dead", [pytest.param([1], marks=pytest.mark.long), [2, 3], [0, 2, 3], [0, 1, 2, 3, 4]]
)
def test_groups_of_key_value_heads_may_be_ragged(dead, tmp_path):
    cfg = LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    dense: Any = FlaxLlamaForCausalLM(cfg)
    leaves = flatten(dense.params)
    site = flaxslim.LLAMA_HEADS.sites(dense.params, cfg)[1]
    path = site.second.path
    second = site.second.axes.zero(leaves[path], "h", np.asarray(dead))
    zeroed = replace(dense.params, {path: second})
    params, small = slim(zeroed, cfg, "heads", width="per_layer")
    attention = params["model"]["layers"]["1"]["self_attn"]
    kept = [head for head in range(6) if head not in dead]
    assert attention["q_proj"]["kernel"].shape == (48, 8 * len(kept))
    # A key/value group goes when all its query heads are dead.
    assert attention["k_proj"]["kernel"].shape == (48, 8 * len({head // 2 for head in kept}))
    model: Any = from_pretrained(FlaxLlamaForCausalLM, flaxslim.save(tmp_path / "s", params, small))
    close(outputs(dense, zeroed).logits, outputs(model, model.params).logits)
    if dead != [0, 2, 3]:  # one is enough of what takes longest to compile
        return
    sequences = [
        m.generate(IDS, params=p, max_new_tokens=6, pad_token_id=0, do_sample=False).sequences
        for m, p in ((model, model.params), (dense, zeroed))
    ]
    np.testing.assert_array_equal(sequences[0], sequences[1])


# --- classes that cannot -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BertModel, AutoModel, "FlaxBertModel"])
def test_what_is_no_flax_class_is_refused(cls, bert):
    with pytest.raises(LayoutError, match="no Flax class") as caught:
        from_pretrained(cls, bert.folder)
    if cls is not BertModel:
        return
    assert "FlaxBertModel" in str(caught.value)


def test_a_part_of_a_composite_is_not_loaded_as_the_whole(tmp_path):
    """The stock class would be left with random weights, and say so in a log at most."""
    cfg = EncoderDecoderConfig.from_encoder_decoder_configs(BERT, copy.deepcopy(BERT))
    cfg.encoder.flaxslim_layout = {"version": 1, "sites": {"encoder/layer/0/output/dense": 5}}
    cfg.save_pretrained(tmp_path)
    with pytest.raises(LayoutError, match="another family"):
        from_pretrained(FlaxBertModel, tmp_path)


def test_a_config_that_is_given_says_the_layout(bert):
    model = from_pretrained(
        FlaxBertModel, bert.folder / "flax_model.msgpack", config=bert.model.config
    )
    close(bert.small, hidden(model))


def test_a_config_from_before_the_cut_is_not_saved_with_the_tensors_after_it(bert, tmp_path):
    for wrong in (bert.dense.config, BertConfig(**{**BERT.to_dict(), "intermediate_size": 47})):
        with pytest.raises(FlaxslimError, match=r"contradicts|different sizes"):
            flaxslim.save(tmp_path / "wrong", bert.model.params, wrong)
    assert not (tmp_path / "wrong").exists()
