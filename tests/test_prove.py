"""The proof: right cuts pass, wrong cuts fail, and inputs that show nothing are called out."""

import json
from collections.abc import Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ScopeParamShapeError

from flaxslim import Pair, Spec, apply, plan, slim, verify
from flaxslim._proof import Proof
from flaxslim.errors import InputsError, NothingMatchedError, ProofError

D, F, OUT = 6, 24, 5
DEAD = (1, 2, 5, 11, 17, 23)
KEEP = tuple(j for j in range(F) if j not in DEAD)
MLP = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden", activation="gelu"))

X = np.random.default_rng(7).normal(size=(4, D)).astype(np.float32)


def weights(seed: int = 0, dtype: Any = np.float32) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    down = rng.normal(size=(F, OUT))
    down[list(DEAD)] = 0
    tree = {
        "up": {"kernel": rng.normal(size=(D, F)), "bias": rng.normal(size=F)},
        "down": {"kernel": down, "bias": rng.normal(size=OUT)},
    }
    return jax.tree_util.tree_map(lambda x: x.astype(dtype), tree)


def cut(tree: Any, keep: tuple[int, ...] = KEEP) -> dict[str, dict[str, np.ndarray]]:
    index = list(keep)
    up, down = tree["up"], tree["down"]
    return {
        "up": {"kernel": up["kernel"][:, index], "bias": up["bias"][index]},
        "down": {"kernel": down["kernel"][index], "bias": down["bias"]},
    }


def wrong(tree: Any) -> dict[str, dict[str, np.ndarray]]:
    """A living channel is lost, a dead one stays."""
    return cut(tree, (DEAD[0], *KEEP[1:]))


def mlp(params: Any, x: Any) -> Any:
    hidden = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]


class LinenMLP(linen.Module):
    hidden: int = F

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = jax.nn.gelu(linen.Dense(self.hidden, name="up")(x))
        x = linen.Dropout(0.5)(x, deterministic=not train)
        return linen.Dense(OUT, name="down")(x)


class NnxMLP(nnx.Module):
    def __init__(self, tree: Any):
        self.up = self._linear(tree["up"])
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(3))
        self.down = self._linear(tree["down"])

    @staticmethod
    def _linear(layer: Any) -> nnx.Linear:
        linear = nnx.Linear(*layer["kernel"].shape, rngs=nnx.Rngs(0))
        linear.kernel = nnx.Param(jnp.asarray(layer["kernel"]))
        linear.bias = nnx.Param(jnp.asarray(layer["bias"]))
        return linear

    def __call__(self, x: Any) -> Any:
        return self.down(self.drop(jax.nn.gelu(self.up(x))))


@pytest.fixture(scope="module")
def bert() -> Any:
    """A tiny stock BERT with dead channels that differ by layer, and its slimmed self."""
    from transformers import BertConfig, FlaxBertModel

    from flaxslim._compat import parameter_shapes

    cfg = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=64,
    )
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        parameter_shapes(FlaxBertModel, cfg),
    )
    for i in (0, 1):
        kernel = params["encoder"]["layer"][str(i)]["output"]["dense"]["kernel"]
        kernel[rng.permutation(72)[: 30 + i]] = 0
    return (params, cfg), slim(params, cfg)


# --- each kind of model -----------------------------------------------------------------------


def test_function() -> None:
    before = weights()
    proof = verify(before, cut(before), mlp, inputs=X, spec=MLP)
    assert proof.ok
    assert proof.relative < 1e-6
    assert proof.tolerance == 1e-5
    assert "float32" in proof.tolerance_reason
    assert proof.parameters.before == D * F + F + F * OUT + OUT
    assert proof.parameters.after == proof.parameters.before - len(DEAD) * (D + 1 + OUT)
    assert (proof.bytes.after or 0) == 4 * (proof.parameters.after or 0)
    assert proof.milliseconds.before is not None
    assert proof.milliseconds.before > 0
    assert proof.flops.ratio is not None
    assert 0.6 < proof.flops.ratio < 0.9
    assert "cpu" in proof.device
    assert proof.dtype == "float32"
    assert proof.control is not None
    (row,) = proof.control.rows
    assert (row.site, row.channels, row.living) == ("down/kernel", 1, len(KEEP))
    assert row.relative > 1000 * max(proof.relative, 1e-7)
    proof.raise_if_failed()


def test_function_with_a_wrong_cut() -> None:
    before = weights()
    proof = verify(before, wrong(before), mlp, inputs=(X,), spec=MLP, repeats=0)
    assert not proof.ok
    assert proof.control is None
    assert proof.milliseconds.before is None
    with pytest.raises(ProofError, match=r"differs by .* of its largest value") as error:
        proof.raise_if_failed()
    for part in ("(a)", "(b)", "(c)", "expected: at most 1.0e-05"):
        assert part in str(error.value)


def test_function_by_keyword_and_with_options() -> None:
    def fn(params: Any, *, x: Any, mode: str, double: bool) -> Any:
        assert mode == "plain"
        assert double is True  # an option, not a tracer
        return 2 * mlp(params, x)

    before = weights()
    inputs = {"x": X.tolist(), "mode": "plain", "double": True}
    assert verify(before, cut(before), fn, inputs=inputs, spec=MLP, repeats=0).ok


@pytest.mark.parametrize(
    "model",
    [LinenMLP(), LinenMLP, lambda cfg: LinenMLP(hidden=cfg["hidden"])],
    ids=["instance", "class", "builder"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_linen(model: Any, wrapped: bool) -> None:
    def wrap(tree: Any) -> Any:
        return {"params": tree} if wrapped else tree

    tree, cfg, small = weights(), {"hidden": F}, {"hidden": len(KEEP)}
    before = (wrap(tree), cfg)
    inputs = {"x": X, "train": False}
    proof = verify(before, (wrap(cut(tree)), small), model, inputs=inputs, spec=MLP, repeats=0)
    assert proof.ok
    assert proof.control is not None
    assert not verify(before, (wrap(wrong(tree)), small), model, inputs=X, spec=MLP, repeats=0).ok


def test_linen_with_a_whole_config() -> None:
    class WithConfig(linen.Module):
        config: Any

        @linen.compact
        def __call__(self, x: Any) -> Any:
            return LinenMLP(hidden=self.config["hidden"], name="mlp")(x)

    tree = weights()
    cfg, small = {"hidden": F}, {"hidden": len(KEEP)}
    assert verify(
        ({"mlp": tree}, cfg),
        ({"mlp": cut(tree)}, small),
        WithConfig(config=cfg),
        inputs=X,
        spec=MLP,
        repeats=0,
    ).ok


def test_nnx() -> None:
    tree = weights()
    module = NnxMLP(tree)
    proof = verify(module, NnxMLP(cut(tree)), inputs=X, spec=MLP, repeats=0)
    assert proof.ok
    assert proof.control is not None
    assert proof.parameters.before == D * F + F + F * OUT + OUT  # no generator's state
    assert not module.drop.deterministic  # was switched off on a copy
    assert verify(module, apply(plan(module, {"hidden": F}, MLP), module), inputs=X, spec=MLP).ok
    assert not verify(module, NnxMLP(wrong(tree)), inputs=X, spec=MLP, repeats=0).ok


def test_hugging_face(bert: Any) -> None:
    before, after = bert
    proof = verify(before, after)  # the config names the class
    assert proof.ok
    assert {row.path for row in proof.outputs} == {"last_hidden_state", "pooler_output"}
    assert proof.control is not None
    assert len(proof.control.rows) == proof.control.sites == 2
    assert proof.control.smallest is not None
    assert proof.control.smallest > 100 * proof.relative
    assert str(proof).startswith("same function")


def test_hugging_face_instance_wrapped_tree_and_own_inputs(bert: Any) -> None:
    from transformers import FlaxBertModel

    (params, cfg), (small, small_cfg) = bert
    ids = [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    inputs = {"input_ids": ids, "attention_mask": (np.array(ids) > 0).astype(int)}
    instance = FlaxBertModel(small_cfg, _do_init=False)
    before, after = ({"params": params}, cfg), ({"params": small}, small_cfg)
    proof = verify(before, after, instance, inputs=inputs, repeats=0)
    assert proof.ok
    assert proof.outputs[0].shape == (2, 5, 32)
    coarse = verify(before, after, FlaxBertModel, inputs=inputs, repeats=0, dtype=jnp.bfloat16)
    assert coarse.outputs[0].dtype == "bfloat16"
    assert coarse.tolerance == 8 * 2**-7
    assert coarse.control is not None


def test_hugging_face_with_a_wrong_cut(bert: Any) -> None:
    from transformers import FlaxBertModel

    before, (params, cfg) = bert
    bad = jax.tree_util.tree_map(np.array, params)
    kernel = bad["encoder"]["layer"]["1"]["output"]["dense"]["kernel"]
    kernel[np.argmax(np.linalg.norm(kernel, axis=1))] = 0
    assert not verify(before, (bad, cfg), FlaxBertModel, repeats=0).ok


def test_a_model_that_fails_says_which_one_it_was(bert: Any) -> None:
    from transformers import FlaxBertModel

    (params, cfg), (small, _) = bert
    with pytest.raises(ScopeParamShapeError) as error:
        verify((params, cfg), (small, cfg), FlaxBertModel)
    assert any("after the cut" in note for note in error.value.__notes__)


# --- the control ------------------------------------------------------------------------------


def test_inputs_that_do_not_reach_a_site_are_called_out() -> None:
    def fn(params: Any, x: Any, gate: Any) -> Any:
        return mlp(params["a"], x) + gate * mlp(params["b"], x)

    tree = {"a": weights(0), "b": weights(1)}
    small = {name: cut(layer) for name, layer in tree.items()}
    one, zero = np.float32(1), np.float32(0)
    assert verify(tree, small, fn, inputs=(X, one), spec=MLP, repeats=0).ok
    proof = verify(tree, small, fn, inputs=(X, zero), spec=MLP, repeats=0)
    assert not proof.ok
    assert proof.control is not None
    (row,) = proof.control.unseen
    assert (row.site, row.relative) == ("b/down/kernel", proof.relative)
    assert "do not reach 1 of 2 sites" in proof.reasons[0]
    assert "b/down/kernel" in proof.reasons[0]
    with pytest.raises(ProofError, match="cannot tell a right cut from a wrong one"):
        proof.raise_if_failed()
    # The wrong cut of what is not reached is exactly what would have slipped through.
    slipped = {"a": small["a"], "b": wrong(tree["b"])}
    assert not verify(tree, slipped, fn, inputs=(X, zero), spec=MLP, repeats=0).ok


def test_function_that_ignores_its_parameters() -> None:
    before = weights()
    proof = verify(before, wrong(before), lambda p, x: x + 1, inputs=X, spec=MLP, repeats=0)
    assert not proof.ok
    assert "do not reach 1 of 1 sites" in proof.reasons[0]


def test_control_passes_over_silent_channels() -> None:
    before = weights()
    strongest = KEEP[3]
    before["down"]["kernel"][strongest] = 100
    before["up"]["bias"][strongest] = -1000  # gelu is 0 there on all inputs
    proof = verify(before, cut(before), mlp, inputs=X, spec=MLP, repeats=0)
    assert proof.ok
    assert proof.control is not None
    assert proof.control.rows[0].channels == 1


def test_control_takes_more_channels_where_one_does_not_show() -> None:
    before = weights(dtype=jnp.bfloat16)
    before["down"]["bias"] = (before["down"]["bias"].astype(np.float32) + 200).astype(jnp.bfloat16)
    inputs = jnp.asarray(X, jnp.bfloat16)
    proof = verify(before, cut(before), mlp, inputs=inputs, spec=MLP, repeats=0)
    assert proof.outputs[0].dtype == "bfloat16"
    assert proof.control is not None
    assert (proof.control.rows[0].channels or 0) > 1


def test_site_without_living_channels() -> None:
    tree = {"a": weights(0), "b": weights(1)}
    tree["b"]["down"]["kernel"][:] = 0

    def fn(params: Any, x: Any) -> Any:
        return mlp(params["a"], x) + mlp(params["b"], x)

    small = {"a": cut(tree["a"]), "b": cut(tree["b"], ())}
    proof = verify(tree, small, fn, inputs=X, spec=MLP, repeats=0)
    assert proof.ok
    assert "1 of 2 sites have no living channel" in proof.notes[0]


def test_many_sites_are_sampled() -> None:
    layer = {"up": np.eye(2, dtype=np.float32), "down": np.eye(2, dtype=np.float32)}
    tree = {f"layer_{i}": layer for i in range(70)}

    def fn(params: Any, x: Any) -> Any:
        return sum(jnp.maximum(x @ p["up"], 0) @ p["down"] for p in params.values())

    proof = verify(tree, tree, fn, inputs=np.ones((1, 2), np.float32), spec=MLP, repeats=0)
    assert proof.ok
    assert proof.control is not None
    assert (len(proof.control.rows), proof.control.sites) == (64, 70)
    assert "64 of 70 sites" in " ".join(proof.notes)
    assert "nothing was cut" in " ".join(proof.notes)


def test_a_site_that_died_unseen_is_not_reached() -> None:
    """Nothing is left after the cut for a wrong one, but there was something before."""
    before = weights()
    after = cut(before)
    after["down"]["kernel"][:] = 0
    proof = verify(before, after, lambda p, x: x + 1, inputs=X, spec=MLP, repeats=0)
    assert "do not reach 1 of 1 sites" in proof.reasons[0]
    dead = {**before, "down": {**before["down"], "kernel": 0 * before["down"]["kernel"]}}
    proof = verify(dead, after, mlp, inputs=X, spec=MLP, repeats=0)
    assert proof.ok, proof.reasons  # here there was nothing


def test_without_a_spec_whole_tensors_are_the_control() -> None:
    before = weights()
    proof = verify(before, cut(before), mlp, inputs=X, repeats=0)
    assert proof.ok
    assert proof.control is not None
    rows = {row.site: (row.channels, row.living, row.seen) for row in proof.control.rows}
    # Not down/bias: its shape is as before.
    assert rows == dict.fromkeys(("up/kernel", "up/bias", "down/kernel"), (None, None, True))
    assert "control: tensor zeroed" in str(proof)
    assert "3 of 3 tensors tried, of 3" in str(proof)
    assert "spec= gives a finer one" in " ".join(str(proof).split())
    assert Proof.from_json(proof.to_json()) == proof
    assert not verify(before, wrong(before), mlp, inputs=X, repeats=0).ok


def test_without_a_spec_a_tensor_that_does_not_show_is_called_out() -> None:
    before = weights()

    def no_bias(params: Any, x: Any) -> Any:
        return x @ params["up"]["kernel"] @ params["down"]["kernel"]

    proof = verify(before, cut(before), no_bias, inputs=X, repeats=0)
    assert "do not reach 1 of 3 tensors that were cut" in proof.reasons[0]
    assert proof.reasons[0].endswith("up/bias")
    with pytest.raises(ProofError, match="cannot tell a right cut from a wrong one"):
        proof.raise_if_failed()


@pytest.mark.parametrize("approximate", [False, True])
def test_without_any_control_there_is_no_proof(approximate: bool) -> None:
    before, x = weights(), np.zeros((2, F), np.float32)
    zeros = jax.tree_util.tree_map(np.zeros_like, before)

    def bare(w: Any, x: Any) -> Any:
        return x[:, : w.shape[0]] @ w

    w = before["down"]["kernel"]
    for old, new, fn in (
        (before, before, mlp),  # no other shapes
        (zeros, cut(zeros), mlp),  # zero already
        (w, w[list(KEEP)], bare),  # no path by which to name it
    ):
        inputs = x if fn is bare else X
        proof = verify(old, new, fn, inputs=inputs, repeats=0, approximate=approximate)
        assert proof.control is None
        assert not proof.ok
        (reason,) = proof.reasons
        assert reason.startswith("no control: give spec=")
        assert str(proof).startswith("NOT PROVED")
        with pytest.raises(ProofError, match="give the spec by which the model was cut"):
            proof.raise_if_failed()


def test_a_spec_that_matches_nothing_is_an_error() -> None:
    before = weights()
    other = Spec(name="OTHER", pairs=Pair(first="fc1", second="fc2"))
    with pytest.raises(NothingMatchedError):
        verify(before, cut(before), mlp, inputs=X, spec=other)


# --- outputs ----------------------------------------------------------------------------------


def test_wrong_cut_beside_a_sentinel_fails() -> None:
    def fn(params: Any, x: Any) -> Any:
        return {"logits": mlp(params, x) - 1e6 * (jnp.arange(OUT) < 3)[None]}

    before = weights()
    assert verify(before, cut(before), fn, inputs=X, spec=MLP, repeats=0).ok
    proof = verify(before, wrong(before), fn, inputs=X, spec=MLP, repeats=0)
    assert not proof.ok
    assert proof.outputs[0].masked == 3 * len(X)
    assert "12 of logits" in str(proof)


def test_infinite_logits() -> None:
    def fn(params: Any, x: Any, hide: Any) -> Any:
        return jnp.where(hide, -jnp.inf, mlp(params, x))

    before, hide = weights(), np.arange(OUT)[None] == 2
    assert verify(before, cut(before), fn, inputs=(X, hide), spec=MLP, repeats=0).ok

    def unlike(params: Any, x: Any, hide: Any) -> Any:
        sign = 1 if params["up"]["bias"].size == F else -1
        return jnp.where(hide, -jnp.inf * sign, mlp(params, x))

    proof = verify(before, cut(before), unlike, inputs=(X, hide), spec=MLP, repeats=0)
    assert "infinite values before and after are not the same" in proof.reasons[0]


def test_nan_is_never_a_proof() -> None:
    before = weights()
    nan = X * np.nan
    for approximate in (False, True):
        proof = verify(
            before, cut(before), mlp, inputs=nan, spec=MLP, repeats=0, approximate=approximate
        )
        assert "NaN on these inputs already before the cut" in proof.reasons[0]
    after = cut(before)
    after["down"]["bias"] = after["down"]["bias"] * np.nan
    proof = verify(before, after, mlp, inputs=X, spec=MLP, repeats=0)
    assert "NaN after, where there is none before" in proof.reasons[0]


def test_other_shapes_and_other_outputs() -> None:
    def fn(params: Any, x: Any) -> Any:
        hidden = x @ params["up"]["kernel"]
        return {"hidden": hidden, "y": mlp(params, x), f"of_{hidden.shape[1]}": x, "none": None}

    before = weights()
    proof = verify(before, cut(before), fn, inputs=X, spec=MLP, repeats=0)
    assert "output hidden: its shape is (4, 24) before and (4, 18) after" in proof.reasons
    assert "output of_24: only the model before has it" in proof.reasons
    assert "output of_18: only the model after has it" in proof.reasons
    assert not any("none" in row.path for row in proof.outputs)


@pytest.mark.parametrize("spec", [MLP, None])
def test_outputs_that_are_no_arrays_are_refused(spec: Spec | None) -> None:
    before = weights()

    def run(fn: Any) -> Proof:
        return verify(before, cut(before), fn, inputs=X, spec=spec, repeats=0)

    for nothing in (None, {}, ()):
        with pytest.raises(InputsError, match="the model gives no array"):
            run(lambda p, x, nothing=nothing: nothing)
    with pytest.raises(InputsError, match=r"no array[\s\S]*at: +name\n +found: +a str"):
        run(lambda p, x: {"y": mlp(p, x), "name": "mlp"})
    with pytest.raises(InputsError, match=r"at: +output\n +found: +a object"):
        run(lambda p, x: object())
    assert run(lambda p, x: (mlp(p, x), 3, True)).ok  # numbers are arrays enough


def test_integers_must_be_equal() -> None:
    def fn(params: Any, x: Any) -> Any:
        y = mlp(params, x)
        return y, jnp.round(1000 * y).astype(jnp.int32), y > 0

    before = weights()
    proof = verify(before, cut(before), fn, inputs=X, spec=MLP, repeats=0)
    assert proof.ok
    assert [row.dtype for row in proof.outputs] == ["float32", "int32", "bool"]
    proof = verify(before, wrong(before), fn, inputs=X, spec=MLP, repeats=0)
    assert "output 1: differs where it must be equal" in proof.reasons


def test_outputs_of_zero() -> None:
    before = weights()
    proof = verify(before, cut(before), lambda p, x: (mlp(p, x), 0 * x), inputs=X, spec=MLP)
    assert proof.ok


# --- precision --------------------------------------------------------------------------------


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64")
def test_float64() -> None:
    before = weights(dtype=np.float64)
    proof = verify(before, cut(before), mlp, inputs=X.astype(np.float64), spec=MLP, repeats=0)
    assert proof.ok
    assert proof.tolerance == 1e-12
    assert proof.dtype == "float64"


def test_float64_without_x64_is_noted() -> None:
    before = weights(dtype=np.float64)
    proof = verify(before, cut(before), mlp, inputs=X, spec=MLP, repeats=0)
    assert proof.ok
    assert "jax_enable_x64 is off" in proof.notes[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_16_bits(dtype: Any) -> None:
    before = weights(dtype=dtype)
    inputs = jnp.asarray(X, dtype)
    proof = verify(before, cut(before), mlp, inputs=inputs, spec=MLP, repeats=0)
    assert proof.ok
    assert proof.tolerance == 8 * float(jnp.finfo(dtype).eps)
    assert proof.dtype == np.dtype(dtype).name
    assert (proof.bytes.before or 0) == 2 * (proof.parameters.before or 0)


@pytest.mark.parametrize("bias", [1.0, -0.00589])  # the second is lost in rounding altogether
def test_a_folded_constant_in_16_bits_is_allowed_its_rounding(bias: float) -> None:
    def wide(params: Any, x: Any) -> Any:
        return mlp(jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), params), x)

    before = weights(dtype=jnp.bfloat16)
    constant = KEEP[0]
    before["up"]["kernel"][:, constant] = 0
    before["up"]["bias"][constant] = bias
    after, _ = slim(before, {"hidden": F}, MLP)
    assert after["up"]["bias"].shape == (len(KEEP) - 1,)
    proof = verify(before, after, wide, inputs=X, spec=MLP, repeats=0)
    assert proof.outputs[0].dtype == "float32"
    assert proof.tolerance == 2 * 2**-7
    assert "constants were folded into biases" in proof.tolerance_reason
    assert proof.ok
    without = verify(before, after, wide, inputs=X, spec=MLP, repeats=0, tolerance=1e-5)
    assert not without.ok
    assert without.tolerance_reason == "as given"


def test_rounded_parameters_are_allowed_their_rounding() -> None:
    before = weights()
    after = jax.tree_util.tree_map(lambda x: x.astype(jnp.bfloat16), cut(before))
    proof = verify(before, after, mlp, inputs=X, spec=MLP, repeats=0)
    assert "rounded from float32 to bfloat16" in proof.tolerance_reason
    assert proof.relative > 1e-5
    assert proof.ok


def test_approximate() -> None:
    before = weights()
    proof = verify(before, wrong(before), mlp, inputs=X, spec=MLP, repeats=0, approximate=True)
    assert proof.ok
    assert not proof.exact
    assert proof.relative > 1e-3
    assert str(proof).startswith("approximate: outputs differ by up to")
    proof = verify(
        before, wrong(before), lambda p, x: x, inputs=X, spec=MLP, repeats=0, approximate=True
    )
    assert "do not reach 1 of 1 sites" in proof.reasons[0]


# --- the report, and what is refused ----------------------------------------------------------


def test_report_fits_and_survives_json() -> None:
    tree = {"a_module_with_quite_a_long_name": {"and_another_one_inside_of_it": weights()}}

    def down(tree: Any) -> Any:
        return tree["a_module_with_quite_a_long_name"]["and_another_one_inside_of_it"]

    def fn(params: Any, x: Any) -> Any:
        return {"an_output_with_a_very_long_name_indeed_it_is": mlp(down(params), x)}

    small = {"a_module_with_quite_a_long_name": {"and_another_one_inside_of_it": cut(down(tree))}}
    bad = {"a_module_with_quite_a_long_name": {"and_another_one_inside_of_it": wrong(down(tree))}}
    for after, inputs in ((small, X), (bad, X), (small, X * np.nan), (small, X * 0)):
        proof = verify(tree, after, fn, inputs=inputs, spec=MLP, repeats=1)
        assert max(map(len, str(proof).splitlines())) <= 100
        text = proof.to_json()
        again = Proof.from_json(text)
        assert again == proof
        assert Proof.from_dict(proof.to_dict()) == proof
        assert json.loads(text) == proof.to_dict()
        assert again.reasons == proof.reasons
        assert json.loads(text)["ok"] is proof.ok


def test_parameters_that_are_a_tuple_of_two() -> None:
    def fn(params: Any, x: Any) -> Any:
        up, down = params
        return mlp({"up": up, "down": down}, x)

    tree = weights()
    small = cut(tree)
    before, after = (tree["up"], tree["down"]), (small["up"], small["down"])
    spec = Spec(name="PAIR", pairs=Pair(first="0", second="1"))
    assert verify(before, after, fn, inputs=X, spec=spec, repeats=0).ok
    # With a config in the second place it is a pair as ever, whatever numbers the config holds.
    for size in (F, np.int64(F)):
        pair, to = ((before, {"hidden": size, "rate": None}), (after, {"hidden": len(KEEP)}))
        assert verify(pair, to, fn, inputs=X, spec=spec, repeats=0).ok


def test_two_families_or_two_classes_are_not_compared(bert: Any) -> None:
    from transformers import BertConfig, FlaxBertForMaskedLM, GPT2Config

    from flaxslim._compat import parameter_shapes

    (params, cfg), _ = bert
    with pytest.raises(InputsError, match=r"different families[\s\S]*'bert' before and 'gpt2'"):
        verify((params, cfg), (params, GPT2Config()))
    head = BertConfig(**{**cfg.to_dict(), "architectures": ["BertForMaskedLM"]})
    shapes = parameter_shapes(FlaxBertForMaskedLM, head)
    other = jax.tree_util.tree_map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    with pytest.raises(
        InputsError, match=r"different classes[\s\S]*FlaxBertModel before and FlaxBertForMaskedLM"
    ):
        verify((params, cfg), (other, head))


def test_missing_model_inputs_or_config() -> None:
    before = weights()
    with pytest.raises(InputsError, match="nothing says how to run"):
        verify(before, cut(before), inputs=X)
    with pytest.raises(InputsError, match="pass inputs="):
        verify(before, cut(before), mlp)
    with pytest.raises(InputsError, match="dtype= is for Hugging Face"):
        verify(before, cut(before), mlp, inputs=X, dtype=jnp.bfloat16)
    from transformers import FlaxBertModel

    with pytest.raises(InputsError, match="needs a config"):
        verify(before, cut(before), FlaxBertModel)


def test_inputs_and_parameters_are_left_alone() -> None:
    before, x = weights(), X.copy()
    after = cut(before)
    kept = jax.tree_util.tree_map(np.array, (before, after))
    verify(before, after, mlp, inputs=x, spec=MLP, repeats=0)
    jax.tree_util.tree_map(np.testing.assert_array_equal, (before, after), kept)
    np.testing.assert_array_equal(x, X)
