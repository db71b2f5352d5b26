"""Which PyTorch tensors without a place in the Flax tree matter: no buffers, no ties."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flaxslim.checkpoint._leaf import Leaf

# In all T5 files of old, and on the list of what transformers' own T5 classes ignore.
_DEAD_BIAS = "EncDecAttention.relative_attention_bias.weight"


def unplaced(tensors: Mapping[str, Any], names: Collection[str]) -> tuple[str, ...]:
    """Those that are not among `names`, the tensors with a place, and would be lost."""
    return tuple(
        name
        for name, leaf in tensors.items()
        if name not in names
        and not _is_buffer(name, np.asarray(leaf))
        and not twin(name, names, tensors)
    )


def of_dropped_layers(names: Iterable[str], placed: Collection[str], layers: int) -> set[str]:
    """Those of numbered layers that a tree no longer has, though it has others beside them.

    `layers` is how many the checkpoint's config counts: what is numbered on behind them (a block
    that predicts further tokens) the Flax class never had.

    >>> of_dropped_layers(["h.0.w", "h.1.w", "h.2.w"], ["h.0.w"], layers=2)
    {'h.1.w'}
    """
    there = {(before, number) for name in placed for before, number in _numbered(name)}
    stacks = {before for before, _ in there}
    return {
        name
        for name in names
        for before, number in _numbered(name)
        if before in stacks and (before, number) not in there and number < layers
    }


def _numbered(name: str) -> Iterator[tuple[str, int]]:
    """The numbers in a name, each with what is in front of it."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:i]), int(part)


def _is_buffer(name: str, array: np.ndarray) -> bool:
    """Whether a tensor is computed anew by every implementation, or adds nothing."""
    last = name.rsplit(".", 1)[-1]
    if last in ("num_batches_tracked", "inv_freq", "masked_bias") or name.endswith(_DEAD_BIAS):
        return True
    if np.issubdtype(array.dtype, np.integer) and last.endswith(("_ids", "_index")):
        return True
    if last == "bias" and array.ndim == 4:  # GPT-2's and its likes' causal mask, (1, 1, n, n)
        return array.dtype in (np.bool_, np.uint8) or bool(np.all(array == np.tril(array)))
    if last == "bias" and array.ndim == 1:  # of a tied head; anything else has a weight as well
        return not np.any(array)
    return name.endswith("embed_positions.weight") and _is_sinusoidal(array)


def _is_sinusoidal(table: np.ndarray) -> bool:
    """Rows of sines and cosines of the same angles: sin^2 + cos^2 = 1; row 0 is zeros and ones."""
    if table.ndim != 2 or not len(table) or table.shape[1] % 2:
        return False
    values = table.astype(np.float32)
    squares = np.square(values).sum(axis=1)
    # Half floats keep three digits.
    level = np.allclose(squares, table.shape[1] / 2, rtol=1e-2)
    return level and bool(np.isin(values[0], (0, 1)).all())


def twin(name: str, names: Iterable[str], source: Mapping[str, Any]) -> str | None:
    """A tensor of the source that is the same one under another name."""
    array = source[name]
    for other in names:
        found = source[other]
        alike = found.shape == array.shape and found.dtype == array.dtype
        # The first row first: most tensors of the same shape differ there already.
        alike = alike and np.array_equal(found[:1], array[:1])
        if alike and _is_telling(np.asarray(array)) and np.array_equal(found, array):
            return other
    return None


def _is_telling(array: np.ndarray) -> bool:
    """Whether equality says something: zeros, or another constant, are often equal by chance."""
    return array.ndim > 0 and array.size > 0 and bool(np.any(array != array.flat[0]))


def is_tied(leaf: Leaf, leaves: Mapping[str, Leaf]) -> bool:
    """Whether a matrix is there already, under another name."""
    return len(leaf.shape) > 1 and any(
        other.shape == leaf.shape and np.array_equal(other.numpy(), leaf.numpy())
        for other in leaves.values()
    )
