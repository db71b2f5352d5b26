"""What `--evaluate` measures: perplexity, Spearman on STS-B, or a function of the user's."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim._errors import CalibrationError, CalibrationWarning, nearest

# (class, params, cfg, folder of the tokenizer) -> numbers by name.
Metric = Callable[[Any, Any, Any, Path], Mapping[str, float]]
NAMES = ("perplexity", "stsb")


def metric(name: str | None, data: Path | None) -> Metric | None:
    """The metric by its name; None for none.

    "perplexity" and "stsb" read `data` (a text file, an .npz with `eval_ids` and `eval_mask`; the
    STS-B table), "module:function" is imported and called with (params, cfg). Raises
    `CalibrationError` for a name that is none, or for data that are missing.
    """
    if name is None:
        return None
    if ":" in name:
        return _of_user(name)
    if name not in NAMES:
        raise CalibrationError(
            "there is no such metric",
            seen=name,
            expected=", ".join(NAMES) + ", or module:function",
            near=nearest(name, NAMES),
        )
    if data is None:
        raise CalibrationError(
            f"{name} is measured on data of its own", mend="name them: --evaluation FILE"
        )
    if not data.is_file():
        raise CalibrationError("there is no such file", path=str(data))
    of = _perplexity if name == "perplexity" else _stsb
    return lambda cls, params, cfg, folder: of(cls, params, cfg, data, folder)


def _of_user(name: str) -> Metric:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CalibrationError(
            "the metric cannot be imported",
            seen=str(error),
            expected="module:function, of a module in this folder or installed",
        ) from error
    finally:
        sys.path.pop(0)

    def measured(cls: Any, params: Any, cfg: Any, folder: Path) -> Mapping[str, float]:
        value = found(params, cfg)
        named = value if isinstance(value, Mapping) else {function: value}
        return {str(key): float(x) for key, x in named.items()}

    return measured


def _model(cls: Any, params: Any, cfg: Any) -> Callable[..., Any]:
    """The stock class at the sizes of its config, under jit."""
    import jax

    from flaxslim.posttraining._function import function_of

    run = jax.jit(function_of(cls, params, cfg))
    on_device = jax.device_put(params)
    return lambda batch: run(on_device, batch)


def _perplexity(cls: Any, params: Any, cfg: Any, data: Path, folder: Path) -> dict[str, float]:
    """exp of the mean loss of the next token, over the tokens of all whole batches of two."""
    import jax
    import optax

    from flaxslim.posttraining._data import read_calibration

    length = min(512, int(getattr(cfg, "max_position_embeddings", 512) or 512))
    fields = ("eval_ids", "eval_mask") if data.suffix == ".npz" else ()
    with warnings.catch_warnings():  # of fewer samples than so many
        warnings.simplefilter("ignore", CalibrationWarning)
        found = read_calibration(
            data, folder=folder, cfg=cfg, samples=10**9, length=length, batch_size=2, fields=fields
        )
    run = _model(cls, params, cfg)
    losses = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    total = tokens = 0.0
    for batch in found.batches:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        counted = np.ones_like(ids)[:, 1:] if mask is None else mask[:, 1:]
        logits = run(batch).logits
        total += float((np.asarray(losses(logits[:, :-1], ids[:, 1:])) * counted).sum())
        tokens += float(counted.sum())
    if not tokens:
        raise CalibrationError("there is no token to measure", path=str(data))
    return {"perplexity": float(np.exp(total / tokens))}


def _stsb(cls: Any, params: Any, cfg: Any, data: Path, folder: Path) -> dict[str, float]:
    """Spearman x 100 of the cosine of mean-pooled embeddings with the score, column 5."""
    import csv

    from scipy.stats import spearmanr
    from transformers import AutoTokenizer

    with data.open(encoding="utf-8") as file:
        table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [row for row in table if len(row) >= 7 and _is_number(row[4])]
    if not rows:
        raise CalibrationError(
            "this is no table of the STS benchmark",
            path=str(data),
            expected="a score in column 5 and sentences in columns 6 and 7, separated by tabs",
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [row[5] for row in rows] + [row[6] for row in rows]
    run, vectors = _model(cls, params, cfg), np.empty((len(texts), cfg.hidden_size))
    for batch, own in of_like_lengths(texts, tokenizer, 100):
        pooled = (np.asarray(run(batch)[0]) * batch["attention_mask"][..., None]).sum(1)
        vectors[own] = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    half = len(rows)
    cosine = (vectors[:half] * vectors[half:]).sum(1)
    found: Any = spearmanr(cosine, [float(row[4]) for row in rows])
    return {"spearman": 100 * float(found.statistic)}


def of_like_lengths(
    texts: Sequence[str], tokenizer: Any, size: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches of texts of like lengths, and which they are: little padding, and few shapes."""
    from flaxslim.posttraining._tokens import padded

    tokens = [tokenizer(text, truncation=True, max_length=128).input_ids for text in texts]
    order = np.argsort([len(t) for t in tokens], kind="stable")
    for i in range(0, len(order), size):
        rows = order[i : i + size]
        length = -(-max(len(tokens[row]) for row in rows) // 16) * 16
        own = [tokens[row] for row in rows]
        ids = padded(own, length, 0)
        mask = padded([[1] * len(t) for t in own], length, 0)
        yield {"input_ids": ids, "attention_mask": mask}, rows


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
