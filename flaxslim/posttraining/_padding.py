"""Padding at the left of token arrays becomes padding at the right.

There positions that count from 0 are those of the text, and what is cut off at the end is padding
before it is text.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
_IGNORED = -100  # a label of nothing


def padded_right(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays `(n, t)`, each row turned until the first token that counts stands first.

    All that stand beside the encoder's mask turn with it, `inputs_embeds` `(n, t, d)` too. What
    the decoder reads stays: the token that it starts with is often that for padding, of mask 0.

    >>> left = {"input_ids": np.array([[0, 0, 7, 8]]), "attention_mask": np.array([[0, 0, 1, 1]])}
    >>> [x.tolist() for x in padded_right(left).values()]
    [[[7, 8, 0, 0]], [[1, 1, 0, 0]]]
    """
    turned = dict(arrays)
    mask = arrays.get("attention_mask")
    if mask is None or mask.ndim != 2 or not (first := (mask != 0).argmax(axis=1)).any():
        return turned
    columns = (first[:, None] + np.arange(mask.shape[1])) % mask.shape[1]
    rows = np.arange(len(mask))[:, None]
    return turned | {name: x[rows, columns] for name, x in arrays.items() if _turns(name, arrays)}


def _turns(name: str, arrays: Mapping[str, Any]) -> bool:
    """Whether something stands beside the encoder's tokens, one of it for each."""
    x, mask = arrays[name], arrays["attention_mask"]
    if x.shape[:2] != mask.shape or name.startswith("decoder_") or name == "pixel_values":
        return False
    if name != "labels":
        return True
    # Those of a decoder are of another text; those of the tokens ignore padding, or repeat it.
    if _has_decoder(arrays) or x.shape != mask.shape:
        return False
    beside, ids = x == _IGNORED, arrays.get("input_ids")
    if ids is not None and ids.shape == x.shape:
        beside = beside | (x == ids)
    return bool(beside[mask == 0].all())


def counted(mask: Any) -> Any:
    """Which tokens `(b, t - 1)` are predicted: those that count, and follow one that does."""
    return (mask[:, 1:] != 0) & (mask[:, :-1] != 0)


def mask_of(name: str, arrays: Mapping[str, Any]) -> Any:
    """The mask of what stands beside tokens, of the encoder or the decoder; ones without any."""
    x = arrays[name]
    mask = arrays.get(MASKS[ids_of(name, arrays)])
    return mask if mask is not None and mask.shape == x.shape else np.ones_like(x)


def ids_of(name: str, arrays: Mapping[str, Any]) -> str:
    """The name of the tokens that something stands beside."""
    decodes = name.startswith("decoder_") or (name == "labels" and _has_decoder(arrays))
    return "decoder_input_ids" if decodes else "input_ids"


def is_cut(name: str, arrays: Mapping[str, Any]) -> bool:
    """Whether a length that is asked for is one of this: of tokens, and of what is beside them.

    A mask of sounds or of embeddings has their length, and these are not cut.
    """
    x = arrays[name]
    if not _is_of_tokens(x):
        return False
    own = ids_of(name, arrays)
    if name == own or (own in arrays and arrays[own].shape == x.shape):
        return True
    return not any(x.shape[1] in y.shape[1:] for y in arrays.values() if not _is_of_tokens(y))


def _is_of_tokens(x: Any) -> bool:
    return x.ndim == 2 and x.dtype == np.int32


def _has_decoder(arrays: Mapping[str, Any]) -> bool:
    return any(name.startswith("decoder_") for name in arrays)
