"""Token ids of calibration texts, as the inputs of a model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim import _config
from flaxslim.errors import CalibrationError, UnknownFamilyError

_FILES = ("tokenizer.json", "tokenizer_config.json")
_CAUSAL = ("gpt2", "llama", "opt", "gptj", "gpt_neo", "bloom", "mistral", "gemma", "xglm")


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer("a", verbose=False)  # a wrong value in its config is seen only now
        return tokenizer
    except Exception as error:  # transformers raises whatever the missing file leads to
        seen = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        if not any((folder / name).is_file() for name in _FILES):
            seen = f"neither {' nor '.join(_FILES)}"
        raise CalibrationError(
            "the model's folder has no tokenizer that can be loaded",
            path=str(folder),
            seen=seen,
            expected=f"{' and '.join(_FILES)}, or those of its class",
            mend="pass an .npz of token ids, or save the tokenizer into the folder: "
            "tokenizer.save_pretrained(folder)",
        ) from error


def joined(texts: Iterable[Sequence[int]], between: int | None) -> np.ndarray:
    """One stream, (n,) int32, of the tokens of all texts, with a token between them.

    Raises `CalibrationError` for tokens that are no int32.

    >>> joined([[5, 6], [], [7]], 2)
    array([5, 6, 2, 7], dtype=int32)
    """
    stream: list[int] = []
    for ids in texts:
        if stream and ids and between is not None:
            stream.append(between)
        stream += ids
    return _int32(stream)


def stream_of(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    """The tokens of all texts, `(n,)` int32, with the end-of-sequence token between them."""
    # Beginnings and ends of sequences would be a tenth of all tokens where lines are short.
    told = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return joined(told["input_ids"], tokenizer.eos_token_id)


def windows(stream: np.ndarray, length: int) -> np.ndarray:
    """The stream cut into windows, (n, length), without the remainder that fills none.

    >>> windows(np.arange(7), 3)
    array([[0, 1, 2],
           [3, 4, 5]])
    """
    count = len(stream) // length
    return stream[: count * length].reshape(count, length)


def padded(rows: Sequence[Sequence[int]], width: int, value: int) -> np.ndarray:
    """At the right, where positions that start from 0 stay what they are."""
    out = np.full((len(rows), width), value, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = _int32(row)
    return out


def _int32(ids: Sequence[int]) -> np.ndarray:
    if ids and not 0 <= min(ids) <= max(ids) < 2**31:
        raise CalibrationError(
            "the tokenizer gives a token that no vocabulary has",
            seen=f"{min(ids):,} to {max(ids):,}",
            expected="from 0 to vocab_size - 1",
            mend="save the tokenizer of this model into its folder: "
            "tokenizer.save_pretrained(folder)",
        )
    return np.asarray(ids, np.int32)


def encode(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], *, pair: bool, length: int
) -> tuple[Any, list[bool]]:
    """What the tokenizer says of each text, or pair of them, and which of them were cut."""
    special = tokenizer.num_special_tokens_to_add(pair)
    if length <= special:
        raise CalibrationError(
            "the length leaves no room for text",
            seen=f"a length of {length}, of which {special} tokens are special",
            mend="ask for a greater length",
        )
    lines = ["\n".join(sample) for sample in texts]
    columns = [[sample[i] for sample in texts] for i in range(2)] if pair else [lines]
    full = tokenizer(*columns, verbose=False)
    told = tokenizer(*columns, truncation=True, max_length=length, verbose=False)
    return told, [len(ids) > length for ids in full["input_ids"]]


def inputs_of(cfg: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Ids and mask, for an encoder and a decoder where there are two."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if get(cfg, "is_encoder_decoder") and not names_causal(cfg):
        start = get(cfg, "decoder_start_token_id")
        if start is None:
            raise CalibrationError(
                "the config does not say what a decoder starts with",
                seen="decoder_start_token_id is None",
                mend="set it in the config, or pass an .npz of all inputs",
            )
        first = np.full((len(ids), 1), start, np.int32)
        inputs["decoder_input_ids"] = np.concatenate([first, ids[:, :-1]], axis=1)
        # Not shifted: it is as many tokens that are predicted as there are in the text.
        inputs["decoder_attention_mask"] = mask
    return inputs


def takes(cfg: Any, name: str) -> bool:
    """Whether the stock class takes an input; True where there is none."""
    import inspect

    from flaxslim._inputs import model_class_for

    try:
        call: Any = model_class_for(cfg).__call__
    except UnknownFamilyError:
        return True
    return name in inspect.signature(call).parameters


# Where a config says how many tokens there are, of what the encoder (or the only one) reads and of
# what the decoder does: the first that is there.
_VOCABULARIES = {
    "input_ids": ("vocab_size", "text_config.vocab_size", "encoder.vocab_size"),
    "decoder_input_ids": (
        *("decoder.vocab_size", "decoder_vocab_size"),
        *("vocab_size", "text_config.vocab_size"),
    ),
}
_PARTS = {"input_ids": ("text_config", "encoder"), "decoder_input_ids": ("decoder", "text_config")}


def check(batches: Sequence[Mapping[str, Any]], cfg: Any, source: str) -> None:
    """Raise `CalibrationError` if the model has no such tokens or no such positions.

    JAX does not notice an index beyond a table: it reads another row, or NaN.
    """
    for name, keys in _VOCABULARIES.items():
        found = ((key, get(cfg, key)) for key in keys)
        key, vocabulary = next(((k, v) for k, v in found if isinstance(v, int)), ("", None))
        for batch in batches:
            if (ids := batch.get(name)) is not None and ids.size:
                _check_tokens(name, ids, key, vocabulary, source)
                _check_positions(name, ids, cfg, source)


def _check_tokens(name: str, ids: Any, key: str, vocabulary: int | None, source: str) -> None:
    if ids.min() >= 0 and (vocabulary is None or ids.max() < vocabulary):
        return
    known = f"{vocabulary - 1}, the config's {key}" if vocabulary else "vocab_size - 1"
    mend = "use the tokenizer that the model was trained with"
    if ids.min() < 0:
        mend = "write the padding token's id in the place of what is below 0, and 0 in its mask"
        mend += ": -100 is of labels alone" if (ids == -100).any() else ""
    raise CalibrationError(
        "a token is not in the model's vocabulary",
        path=source,
        seen=f"{name} from {ids.min()} to {ids.max()}",
        expected=f"from 0 to {known}",
        mend=mend,
    )


def _check_positions(name: str, ids: Any, cfg: Any, source: str) -> None:
    longest = positions(cfg)
    for part in (get(cfg, key) for key in _PARTS[name]):
        longest = positions(part) if longest is None and part is not None else longest
    if longest is not None and ids.shape[-1] > longest:
        raise CalibrationError(
            "samples are longer than the model has positions",
            path=source,
            seen=f"{ids.shape[-1]} tokens" + ("" if name == "input_ids" else f" of {name}"),
            expected=f"at most {longest}",
            mend=f"ask for a length of {longest}",
        )


def positions(cfg: Any) -> int | None:
    """How many tokens a model takes at most, if its config says that."""
    value = get(cfg, "max_position_embeddings")
    if not isinstance(value, int) or value <= 0:
        return None
    # RoBERTa counts positions from the one after the padding token's id.
    roberta = "roberta" in (_config.model_type(cfg) or "")
    return value - ((get(cfg, "pad_token_id") or 0) + 1 if roberta else 0)


def is_causal(cfg: Any) -> bool:
    """Whether the model writes on, one token after the other, and has no encoder."""
    return names_causal(cfg) or _config.model_type(cfg) in _CAUSAL


def names_causal(cfg: Any) -> bool:
    return any(str(name).endswith("ForCausalLM") for name in get(cfg, "architectures") or ())


def get(cfg: Any, key: str) -> Any:
    return _config.read(cfg, key) if _config.has(cfg, key) else None
