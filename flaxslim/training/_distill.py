"""Distillation: a loss that draws a pruned model toward its dense original.

A model that loses hidden channels and heads keeps its embedding width, so its hidden states
compare with those of its teacher as they are, without a projection.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxslim._divergence import divergence
from flaxslim.errors import TrainingError

# Logits over the positions of a sequence: what is masked is no answer, whoever asks.
_SPANS = ("start_logits", "end_logits")

_UNNAMED = "output"  # as an array is called that has only a number

# Of an encoder and decoder, the states of the tokens that have the logits.
_HIDDEN = ("hidden_states", "decoder_hidden_states")


def distill_loss(
    student: Any,
    teacher: Any,
    *,
    temperature: Any = 1.0,
    layers: Mapping[int, int] | str | None = None,
    logits_weight: Any = 1.0,
    hidden_weight: Any = 0.0,
    mask: Any = None,
) -> jax.Array:
    """How far a student is from its teacher, by their logits and hidden states: a scalar.

    `logits_weight * T**2 * KL(softmax(z_teacher / T), softmax(z_student / T))`, the mean over
    tokens and over the outputs that both have, plus `hidden_weight * (h_student - h_teacher)**2`,
    the mean over tokens, `d` and the layers that are mapped. T**2 keeps the size of the gradient
    whatever the temperature is. No gradient reaches the teacher. Computed in float32 at least.

    Args:
      student, teacher: outputs of Hugging Face models (`*logits`, `hidden_states`), an array of
        logits `(..., v)`, or a tuple of such.
      temperature: T, the same for both.
      layers: {student layer: teacher layer}, counted as `hidden_states` is: 0 is the embedding,
        -1 the last. Or "last", or "all" (as None): each one, and of a deeper teacher those at
        even distances.
      logits_weight, hidden_weight: of the two terms; a term whose weight is a plain 0 is not
        computed. All numbers may be traced, so they can follow a schedule.
      mask: `(b, t)`, true for the tokens that count, as the `attention_mask` of the batch. Of
        logits over positions, `(b, t)`, it removes what is masked from both distributions. Logits
        of whole sequences, `(b, v)` by their shape or name, have no tokens to mask.

    Raises `TrainingError` where the two outputs do not compare.

    References: Hinton et al. 2015, Distilling the Knowledge in a Neural Network (section 2); Jiao
    et al. 2020, TinyBERT (equation 8, without its projection, and section 3.1 for "all").

    >>> teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> print(distill_loss(teacher, teacher, temperature=2.0))
    0.0
    >>> print(f"{distill_loss(teacher[::-1], teacher, temperature=2.0):.3f}")
    1.061
    """
    _check_temperature(temperature)
    terms = []
    if not _absent(logits_weight):
        terms.append(logits_weight * _logits_term(student, teacher, temperature, mask))
    if not _absent(hidden_weight):
        terms.append(hidden_weight * _hidden_term(student, teacher, layers, mask))
    elif layers is not None:
        raise TrainingError(
            "layers= are mapped, and hidden states have no weight",
            seen=f"layers={layers!r}, hidden_weight={hidden_weight!r}",
            mend="pass hidden_weight=1.0 too",
        )
    if not terms:
        raise TrainingError(
            "both terms of the distillation have weight 0, so there is nothing to learn from",
            seen=f"logits_weight={logits_weight!r}, hidden_weight={hidden_weight!r}",
        )
    return jnp.asarray(sum(terms))


def _absent(weight: Any) -> bool:
    return isinstance(weight, int | float) and weight == 0


def _check_temperature(temperature: Any) -> None:
    known = not isinstance(temperature, Tracer)
    if known and not (np.isfinite(temperature) and temperature > 0):
        raise TrainingError(
            "a temperature is above 0",
            seen=f"temperature={temperature}",
            expected="1 for the distributions as they are, 2 to 5 for softer ones",
        )


# --- logits -----------------------------------------------------------------------------------


def _logits_term(student: Any, teacher: Any, temperature: Any, mask: Any) -> jax.Array:
    ours, theirs = _logits(student, "student"), _logits(teacher, "teacher")
    common = [name for name in ours if name in theirs]
    one_for_one = isinstance(student, Mapping) or len(ours) == len(theirs)
    if not common or not one_for_one:
        raise TrainingError(
            "student and teacher have no logits in common",
            seen=f"{', '.join(ours)} of the student, {', '.join(theirs)} of the teacher",
            mend="give both in the same form: the outputs of two models, or their logits",
        )
    losses = [_divergence(name, ours[name], theirs[name], temperature, mask) for name in common]
    return sum(losses, jnp.zeros(())) / len(losses)


def _logits(output: Any, who: str) -> dict[str, Any]:
    """The logits of an output by name; arrays that have none are numbered."""
    if isinstance(output, Mapping):
        named = {k: v for k, v in output.items() if "logits" in k and v is not None}
        if not named:
            raise TrainingError(
                f"the {who} has no logits",
                seen=", ".join(output),
                mend="take a class with a head, or pass logits_weight=0 and hidden_weight=1.0",
            )
        return named
    arrays = output if isinstance(output, tuple | list) else (output,)
    if not arrays or not all(hasattr(x, "shape") and len(x.shape) for x in arrays):
        raise TrainingError(
            f"the {who} is no output that can be compared",
            seen=f"a {type(output).__name__}",
            expected="the output of a Hugging Face model (return_dict=True), an array of logits, "
            "or a tuple of such arrays",
        )
    return {f"{_UNNAMED} {i}": x for i, x in enumerate(arrays)}


def _divergence(name: str, student: Any, teacher: Any, temperature: Any, mask: Any) -> jax.Array:
    """T**2 times the KL divergence of the student's distribution from the teacher's."""
    if student.shape != teacher.shape:
        raise TrainingError(
            "student and teacher have logits of different shapes",
            path=name,
            seen=f"{student.shape} of the student, {teacher.shape} of the teacher",
        )
    z, target = _wide(student) / temperature, _wide(_fixed(teacher)) / temperature
    counted = None
    if mask is not None and (mask := jnp.asarray(mask) != 0).shape == student.shape[:-1]:
        counted = mask
    elif (
        mask is not None
        and mask.shape == student.shape
        and (name in _SPANS or name.startswith(f"{_UNNAMED} "))
    ):
        counted = mask.any(axis=-1)
        lowest = jnp.finfo(z.dtype).min
        z, target = jnp.where(mask, z, lowest), jnp.where(mask, target, lowest)
    elif mask is not None and (name in _SPANS or student.ndim > mask.ndim):
        raise _misfit(name, student.shape, mask.shape)
    found = divergence(jax.nn.log_softmax(target), jax.nn.log_softmax(z))
    return temperature**2 * _mean(found, counted)


# --- hidden states ----------------------------------------------------------------------------


def _hidden_term(student: Any, teacher: Any, layers: Any, mask: Any) -> jax.Array:
    """The mean squared error over the mapped layers."""
    ours, theirs = _states(student, "student"), _states(teacher, "teacher")
    pairs = _layer_map(layers, len(ours), len(theirs))
    losses = [_error(f"layer {i}", ours[i], theirs[j], mask) for i, j in pairs.items()]
    return sum(losses, jnp.zeros(())) / len(losses)


def _states(output: Any, who: str) -> tuple[Any, ...]:
    named = output if isinstance(output, Mapping) else {}
    for name in _HIDDEN:
        if named.get(name) is not None:
            return tuple(named[name])
    raise TrainingError(
        f"the {who} has no hidden states",
        seen=", ".join(named) or f"a {type(output).__name__}",
        mend="call the model with output_hidden_states=True, and pass its whole output",
    )


def _layer_map(layers: Any, ours: int, theirs: int) -> dict[int, int]:
    """Which layer learns from which, of so many hidden states (the embedding is the first)."""
    if layers == "last":
        return {-1: -1}
    if layers in ("all", None):
        step, rest = divmod(theirs - 1, max(ours - 1, 1))
        if rest or not step:
            raise TrainingError(
                'layers="all" needs a teacher with a multiple of the layers of its student',
                seen=f"{ours - 1} layers of the student, {theirs - 1} of the teacher",
                mend="say which learns from which: layers={1: 2, 2: 5}",
            )
        return {i: i * step for i in range(ours)}
    if not isinstance(layers, Mapping) or not layers:
        raise TrainingError(
            "layers= is no map of layers",
            seen=f"layers={layers!r}",
            expected='"all", "last", or {student layer: teacher layer} such as {1: 2, 2: 4}',
        )
    for who, count, numbers in (
        ("student", ours, layers),
        ("teacher", theirs, layers.values()),
    ):
        if wrong := [i for i in numbers if type(i) is not int or not -count <= i < count]:
            raise TrainingError(
                f"the {who} has no hidden states of layer {wrong[0]!r}",
                seen=f"layers={dict(layers)}",
                expected=f"0 (the embedding) to {count - 1} (the last layer), or from the end, -1",
            )
    return dict(layers)


def _error(name: str, student: Any, teacher: Any, mask: Any) -> jax.Array:
    if student.shape != teacher.shape:
        raise TrainingError(
            "hidden states compare where student and teacher have the same width",
            path=name,
            seen=f"{student.shape} of the student, {teacher.shape} of the teacher",
            expected="a student that was pruned by flaxslim: it loses hidden channels and heads, "
            "and keeps its embedding width",
            mend="pass hidden_weight=0, or project the student's hidden states first",
        )
    squares = (_wide(student) - _wide(_fixed(teacher))) ** 2
    if mask is not None and (mask := jnp.asarray(mask) != 0).shape != student.shape[:-1]:
        raise _misfit(name, student.shape, mask.shape)
    return _mean(squares.mean(axis=-1), mask)


# --- both -------------------------------------------------------------------------------------


def _fixed(x: Any) -> jax.Array:
    return jax.lax.stop_gradient(jnp.asarray(x))


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean(x: jax.Array, counted: jax.Array | None) -> jax.Array:
    """The mean of those that count, 0 of none."""
    if counted is None:
        return x.mean()
    return jnp.where(counted, x, 0).sum() / jnp.maximum(counted.sum(), 1)


def _misfit(name: str, shape: tuple[int, ...], mask: tuple[int, ...]) -> TrainingError:
    return TrainingError(
        "the mask does not fit the outputs",
        path=name,
        seen=f"a mask {mask}, and {name} {shape}",
        expected=f"a mask {shape if name in _SPANS else shape[:-1]}, one entry for each token",
    )
