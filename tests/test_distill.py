"""`distill_loss`: against formulas in numpy, under masks and layer maps, on a real FlaxBert."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strategies import enable_x64
from transformers import BertConfig, FlaxBertForQuestionAnswering

from flaxslim._compat import parameter_shapes
from flaxslim.errors import TrainingError
from flaxslim.training._distill import distill_loss

CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    num_labels=2,
)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _kl(teacher: np.ndarray, student: np.ndarray, t: float) -> np.ndarray:
    """By its definition, in float64: sum p log(p / q)."""
    p, q = (np.exp(z / t) / np.exp(z / t).sum(-1, keepdims=True) for z in (teacher, student))
    return (p * np.log(p / q)).sum(-1)


def _outputs(seed: int, *, layers: int = 3, width: int = 4, batch: int = 2, time: int = 5) -> Any:
    hidden = tuple(_normal(batch, time, width, seed=10 * seed + i) for i in range(layers + 1))
    return {"logits": _normal(batch, time, 7, seed=seed), "hidden_states": hidden}


# One program is compiled for a gradient, and not one for each of its operations.
_slope = jax.jit(jax.grad(distill_loss))


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logits_term_is_the_divergence_of_softened_distributions(temperature):
    student, teacher = _normal(3, 5, 7, seed=1), _normal(3, 5, 7, seed=2)
    with enable_x64():
        loss = distill_loss(student, teacher, temperature=temperature)
    wanted = temperature**2 * _kl(teacher, student, temperature).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)


def test_hidden_term_is_the_mean_square_over_mapped_layers():
    student, teacher = _outputs(1), _outputs(2)
    with enable_x64():
        loss = distill_loss(
            student, teacher, layers={1: 3, -1: 0}, logits_weight=0, hidden_weight=0.5
        )
    ours, theirs = student["hidden_states"], teacher["hidden_states"]
    wanted = np.mean([((ours[i] - theirs[j]) ** 2).mean() for i, j in ((1, 3), (3, 0))])
    np.testing.assert_allclose(loss, 0.5 * wanted, rtol=1e-12)


def test_terms_add_up_by_their_weights():
    student, teacher = _outputs(1), _outputs(2)
    logits = distill_loss(student, teacher, temperature=2.0)
    hidden = distill_loss(student, teacher, logits_weight=0, hidden_weight=1.0)
    both = distill_loss(student, teacher, temperature=2.0, logits_weight=0.3, hidden_weight=0.7)
    np.testing.assert_allclose(both, 0.3 * logits + 0.7 * hidden, rtol=1e-6)


@pytest.mark.parametrize("layers", [None, "all", "last", {1: 1}])
def test_equal_models_have_no_loss_and_no_gradient(layers):
    outputs = jax.tree.map(np.float32, _outputs(1))
    loss = functools.partial(distill_loss, temperature=3.0, layers=layers, hidden_weight=1.0)
    value, grads = jax.jit(jax.value_and_grad(loss))(outputs, outputs)
    assert abs(value) < 1e-6
    assert all(np.abs(g).max() < 1e-7 for g in jax.tree.leaves(grads))


def test_all_layers_of_a_deeper_teacher_are_at_even_distances():
    student, teacher = _outputs(1, layers=2), _outputs(2, layers=6)
    spread = distill_loss(student, teacher, layers="all", hidden_weight=1.0)
    assert spread == distill_loss(student, teacher, layers={0: 0, 1: 3, 2: 6}, hidden_weight=1.0)


def test_outputs_in_common_count_alike():
    start, end, other = (_normal(2, 5, seed=i) for i in range(3))
    student, teacher = {"start_logits": start, "end_logits": end}, {"start_logits": other}
    assert distill_loss(student, teacher) == distill_loss(start, other)
    both = distill_loss((start, end), (other, end))
    np.testing.assert_allclose(both, distill_loss(start, other) / 2, rtol=1e-6)


def test_bfloat16_is_computed_in_float32():
    student, teacher = (jnp.asarray(_normal(4, 7, seed=i), jnp.bfloat16) for i in (1, 2))
    loss = distill_loss(student, teacher)
    assert loss.dtype == jnp.float32
    wide = distill_loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    assert loss == wide
    assert _slope(student, teacher).dtype == jnp.bfloat16


def test_what_the_teacher_calls_impossible_gives_no_nan():
    student = jnp.array([[1.0, 2.0, -jnp.inf], [0.0, 1.0, 2.0]])
    teacher = jnp.array([[2.0, 1.0, -jnp.inf], [1.0, 0.0, -jnp.inf]])
    value, grads = jax.jit(jax.value_and_grad(distill_loss))(student, teacher)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


# --- gradients --------------------------------------------------------------------------------


def test_gradient_is_that_of_finite_differences():
    student, teacher = _outputs(1), _outputs(2)
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])

    @jax.jit
    def loss(logits: Any, last: Any) -> Any:
        ours = {"logits": logits, "hidden_states": (*student["hidden_states"][:-1], last)}
        return distill_loss(
            ours, teacher, temperature=2.5, layers="last", hidden_weight=0.8, mask=mask
        )

    with enable_x64():
        at = [jnp.asarray(student["logits"]), jnp.asarray(student["hidden_states"][-1])]
        along = [jnp.asarray(_normal(*x.shape, seed=7)) for x in at]
        slope = sum(jnp.vdot(g, v) for g, v in zip(jax.grad(loss, (0, 1))(*at), along, strict=True))
        step = 1e-5
        ahead, behind = (
            loss(*(x + s * v for x, v in zip(at, along, strict=True))) for s in (step, -step)
        )
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-8)


def test_gradient_of_logits_is_the_difference_of_the_distributions():
    # Hinton et al. 2015, equation 2, times T**2.
    student, teacher, t = _normal(6, seed=1), _normal(6, seed=2), 3.0
    with enable_x64():
        grad = _slope(jnp.asarray(student), teacher, temperature=t)
    q, p = (np.exp(z / t) / np.exp(z / t).sum() for z in (student, teacher))
    np.testing.assert_allclose(grad, t * (q - p), rtol=1e-10)


def test_temperature_keeps_the_size_of_the_gradient():
    student, teacher = jnp.asarray(_normal(50, 10, seed=1)), jnp.asarray(_normal(50, 10, seed=2))
    # The limit is (z_student - z_teacher) / v with the means removed: Hinton et al., equation 4.
    sizes = [float(jnp.linalg.norm(_slope(student, teacher, temperature=t))) for t in (10.0, 100.0)]
    difference = student - teacher
    limit = jnp.linalg.norm(difference - difference.mean(-1, keepdims=True)) / (10 * 50)
    np.testing.assert_allclose(sizes, float(limit), rtol=0.05)


def test_no_gradient_reaches_the_teacher():
    student, teacher = jax.tree.map(jnp.asarray, (_outputs(1), _outputs(2)))
    grads = jax.grad(lambda s, t: distill_loss(s, t, hidden_weight=1.0), argnums=1)(
        student, teacher
    )
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_weights_and_temperature_may_follow_a_schedule():
    student, teacher = _outputs(1), _outputs(2)

    @jax.jit
    def loss(t: Any, a: Any, b: Any) -> Any:
        return distill_loss(student, teacher, temperature=t, logits_weight=a, hidden_weight=b)

    wanted = distill_loss(student, teacher, temperature=2.0, logits_weight=0.2, hidden_weight=0.9)
    np.testing.assert_allclose(loss(2.0, 0.2, 0.9), wanted, rtol=1e-6)


# --- masks ------------------------------------------------------------------------------------

MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_masked_tokens_do_not_count():
    student, teacher = _outputs(1), _outputs(2)
    loss = distill_loss(student, teacher, hidden_weight=1.0, mask=MASK)
    wanted_logits = _kl(teacher["logits"], student["logits"], 1.0)[MASK == 1].mean()
    states = zip(student["hidden_states"], teacher["hidden_states"], strict=True)
    wanted_hidden = np.mean([((s - t) ** 2)[MASK == 1].mean() for s, t in states])
    np.testing.assert_allclose(loss, wanted_logits + wanted_hidden, rtol=1e-6)

    def changed(x: np.ndarray) -> np.ndarray:
        return np.where(MASK[..., None] == 1, x, 1e3)

    noisy = jax.tree.map(changed, student)
    assert distill_loss(noisy, teacher, hidden_weight=1.0, mask=MASK) == loss


def test_masked_positions_leave_both_distributions():
    student, teacher = ({"start_logits": _normal(2, 5, seed=i)} for i in (1, 2))
    kept = [
        _kl(t[m == 1], s[m == 1], 2.0)
        for s, t, m in zip(student["start_logits"], teacher["start_logits"], MASK, strict=True)
    ]
    loss = distill_loss(student, teacher, temperature=2.0, mask=MASK)
    np.testing.assert_allclose(loss, 4.0 * np.mean(kept), rtol=1e-5)
    grads = _slope(jax.tree.map(jnp.asarray, student), teacher, mask=MASK)
    assert (np.asarray(grads["start_logits"])[MASK == 0] == 0).all()


def test_logits_of_whole_sequences_have_no_tokens_to_mask():
    # As many classes as tokens, so that shapes alone could mislead.
    student, teacher = ({"logits": _normal(2, 5, seed=i)} for i in (1, 2))
    assert distill_loss(student, teacher, mask=MASK) == distill_loss(student, teacher)


def test_a_mask_of_nothing_is_no_loss():
    student, teacher = _outputs(1), _outputs(2)
    value, grads = jax.value_and_grad(distill_loss)(
        jax.tree.map(jnp.asarray, student), teacher, hidden_weight=1.0, mask=np.zeros((2, 5))
    )
    assert value == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan, np.inf])
def test_a_temperature_is_above_zero(temperature):
    with pytest.raises(TrainingError, match="a temperature is above 0"):
        distill_loss(_normal(2, 3), _normal(2, 3), temperature=temperature)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({4: 0}, "student has no hidden states of layer 4"),
        ({0: -5}, "teacher has no hidden states of layer -5"),
        ({"1": 1}, "student has no hidden states of layer '1'"),
        ({}, "no map of layers"),
        ("first", "no map of layers"),
        ([1, 2], "no map of layers"),
    ],
)
def test_a_wrong_layer_map_says_what_there_is(layers, message):
    with pytest.raises(TrainingError, match=message):
        distill_loss(_outputs(1), _outputs(2), layers=layers, hidden_weight=1.0)


@pytest.mark.parametrize("depth", [2, 4])
def test_all_layers_need_a_teacher_with_a_multiple(depth):
    with pytest.raises(TrainingError, match=f"3 layers of the student, {depth} of the teacher"):
        distill_loss(_outputs(1), _outputs(2, layers=depth), hidden_weight=1.0)


HIDDEN_ONLY = {"logits_weight": 0, "hidden_weight": 1}
_SPAN = {"end_logits": _normal(2, 3)}


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (_normal(2, 3), _normal(2, 4), {}, "logits of different shapes"),
        (_normal(2, 3), (_normal(2, 3),) * 2, {}, "no logits in common"),
        ({"start_logits": _normal(2, 3)}, {"logits": _normal(2, 3)}, {}, "no logits in common"),
        ({"logits": _normal(2, 3)}, _normal(2, 3), {}, "give both in the same form"),
        ({"last_hidden_state": _normal(2, 3)}, _normal(2, 3), {}, "the student has no logits"),
        (_normal(2, 3), "logits", {}, "a str"),
        (_normal(2, 3), (), {}, "a tuple"),
        (_normal(2, 3), 1.0, {}, "a float"),
        (_normal(2, 3), _normal(2, 3), {"layers": "last"}, "pass hidden_weight=1.0 too"),
        (_normal(2, 3), _normal(2, 3), {"logits_weight": 0}, "nothing to learn from"),
        (_normal(2, 3), _normal(2, 3), {"hidden_weight": 1}, "output_hidden_states=True"),
        (
            _outputs(1),
            {"logits": _outputs(2)["logits"]},
            {"hidden_weight": 1},
            "teacher has no hid",
        ),
        (_outputs(1), _outputs(2, width=8), {"hidden_weight": 1}, "keeps its embedding width"),
        (_outputs(1), _outputs(2), {"mask": np.ones((2, 4))}, "mask does not fit"),
        (_SPAN, _SPAN, {"mask": np.ones((2, 4))}, "mask does not fit"),
        (_outputs(1), _outputs(2), {"mask": np.ones((2, 4)), **HIDDEN_ONLY}, "mask does not fit"),
    ],
)
def test_outputs_that_do_not_compare_are_refused(student, teacher, options, message):
    with pytest.raises(TrainingError, match=message):
        distill_loss(student, teacher, **options)


# --- real models ------------------------------------------------------------------------------


def _bert(cfg: BertConfig, seed: int) -> tuple[Any, Any]:
    """A model and random parameters of it; to draw those of flax takes seconds."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(FlaxBertForQuestionAnswering, cfg)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return FlaxBertForQuestionAnswering(cfg, _do_init=False), params


def test_a_pruned_bert_learns_from_its_dense_original():
    teacher, theirs = _bert(CONFIG, seed=0)
    small = BertConfig(**{**CONFIG.to_dict(), "intermediate_size": 8})
    student, params = _bert(small, seed=1)
    ids = np.random.default_rng(0).integers(5, 40, (2, 6))
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])

    @jax.jit
    def step(params: Any) -> Any:
        def loss(params: Any) -> Any:
            ours = student(ids, mask, params=params, output_hidden_states=True)
            dense = teacher(ids, mask, params=theirs, output_hidden_states=True)
            return distill_loss(ours, dense, temperature=2.0, hidden_weight=1.0, mask=mask)

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    losses = []
    for _ in range(8):
        value, params = step(params)
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
