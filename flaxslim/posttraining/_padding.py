"""Padding at the left of token arrays becomes padding at the right.

There positions that count from 0 are those of the text, and what is cut off at the end is padding
before it is text.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def padded_right(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays `(n, t)`, each row turned until the first token that counts stands first.

    All that have the shape of their mask turn with it.

    >>> left = {"input_ids": np.array([[0, 0, 7, 8]]), "attention_mask": np.array([[0, 0, 1, 1]])}
    >>> [x.tolist() for x in padded_right(left).values()]
    [[[7, 8, 0, 0]], [[1, 1, 0, 0]]]
    """
    turned = dict(arrays)
    for name in MASKS.values():
        mask = arrays.get(name)
        if mask is None or mask.ndim != 2 or not (first := (mask != 0).argmax(axis=1)).any():
            continue
        columns = (first[:, None] + np.arange(mask.shape[1])) % mask.shape[1]
        for own, x in arrays.items():
            if mask_of(own, arrays) is mask:
                turned[own] = np.take_along_axis(x, columns, axis=1)
    return turned


def counted(mask: Any) -> Any:
    """Which tokens `(b, t - 1)` are predicted: those that count, and follow one that does."""
    return (mask[:, 1:] != 0) & (mask[:, :-1] != 0)


def mask_of(name: str, arrays: Mapping[str, Any]) -> Any:
    """The mask of what stands beside tokens, of the encoder or the decoder; ones without any."""
    x = arrays[name]
    mask = arrays.get(MASKS["decoder_input_ids" if name.startswith("decoder_") else "input_ids"])
    return mask if mask is not None and mask.shape == x.shape else np.ones_like(x)
