"""What `--evaluate` measures: perplexity, LAMBADA, STS-B, or a function of the user's."""

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim.errors import CalibrationError, FlaxslimError, in_short, nearest
from flaxslim.posttraining._text import decoded, lines, read_texts
from flaxslim.posttraining._tokens import check, load_tokenizer, positions, stream_of

# (class, params, cfg, folder of the tokenizer) -> numbers by name.
Metric = Callable[[Any, Any, Any, Path], Mapping[str, float]]
NAMES = ("perplexity", "lambada", "stsb")


def metric(name: str | None, data: Path | None) -> Metric | None:
    """The metric by its name; None for none.

    "perplexity", "lambada" and "stsb" read `data` (a text file, or an .npz with `eval_ids` and
    `eval_mask`; JSON lines with "text", or one passage a line; the STS-B table), "module:function"
    is imported and called with (params, cfg). Raises `CalibrationError` for a name that is none, or
    for data that are missing.
    """
    if name is None:
        if data is not None:
            raise CalibrationError(
                "nothing says what is measured on the data",
                seen=f"--evaluation {data}",
                mend=f"name it, too: --evaluate {' | '.join(NAMES)}",
            )
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
    of = {"perplexity": _perplexity, "lambada": _lambada, "stsb": _stsb}[name]
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
        try:
            value = found(params, cfg)
            numbers = value if isinstance(value, Mapping) else {function: value}
            return {str(key): float(x) for key, x in numbers.items()}
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise CalibrationError(
                "the metric gave no number",
                path=name,
                seen=f"{type(error).__name__}: {error}, {last.filename}:{last.lineno}",
                expected="a number, or numbers by name, of (params, config)",
            ) from error

    return measured


def _model(cls: Any, params: Any, cfg: Any) -> Callable[..., Any]:
    """The stock class at the sizes of its config, under jit."""
    import jax

    from flaxslim.posttraining._function import function_of

    if getattr(cfg, "is_encoder_decoder", False) and not cls.__name__.endswith("ForCausalLM"):
        raise CalibrationError(
            "this metric is of models that read one text, and this one reads two",
            seen=cls.__name__,
            mend="measure it by a function of your own: --evaluate module:function",
        )
    run = jax.jit(function_of(cls, params, cfg))
    on_device = jax.device_put(params)

    def checked(batch: Mapping[str, Any]) -> Any:
        check([batch], cfg, cls.__name__)
        try:
            return run(on_device, batch)
        except FlaxslimError:
            raise
        except Exception as error:  # what a class lacks, or does not take, it says in any words
            raise CalibrationError(
                "the class does not run on texts alone, by which this metric measures",
                path=cls.__name__,
                seen=in_short(error),
                expected="a class that takes input_ids and attention_mask",
                mend="measure it by a function of your own: --evaluate module:function",
            ) from error

    return checked


def _language_model(cls: Any, params: Any, cfg: Any) -> Callable[[Mapping[str, Any]], Any]:
    """The logits of each next token, `(b, t, v)`, of a causal class that puts out such."""
    run, checked = _model(cls, params, cfg), False

    def logits(batch: Mapping[str, Any]) -> Any:
        nonlocal checked
        found = getattr(run(batch), "logits", None)
        if found is None or found.ndim != 3 or found.shape[:2] != batch["input_ids"].shape:
            raise _no_language_model("puts out no logits of tokens", cls)
        if not checked and not _is_causal(run, batch, found):
            raise _no_language_model("sees the token that it is asked for", cls)
        checked = True
        return found

    return logits


def _is_causal(run: Callable[..., Any], batch: Mapping[str, Any], logits: Any) -> bool:
    """Whether the first half of a text knows nothing of the second: it is run with another one."""
    ids = np.asarray(batch["input_ids"])
    mask = np.asarray(batch.get("attention_mask", np.ones_like(ids)))
    row = int((mask != 0).sum(1).argmax())
    text = np.flatnonzero(mask[row])
    before, after = np.split(text, [len(text) // 2])
    if not len(before):
        return True
    other = ids.copy()
    other[row, after] = ids[row, after] == 0
    first, again = logits[row, before], run({**batch, "input_ids": other}).logits[row, before]
    return not abs(first - again).max() > 1e-6 * abs(first).max()


def _no_language_model(why: str, cls: Any) -> CalibrationError:
    return CalibrationError(
        f"the class {why}, so no next token can be measured",
        seen=cls.__name__,
        expected="a causal language model, such as FlaxGPT2LMHeadModel",
        mend="prune a checkpoint of the whole language model, or choose another metric",
    )


def _perplexity(cls: Any, params: Any, cfg: Any, data: Path, folder: Path) -> dict[str, float]:
    """exp of the mean loss of the next token, over all tokens but the first of each window.

    Windows are of what the model takes, and of 512 tokens at most; the last may be shorter.
    """
    import jax
    import optax

    from flaxslim.posttraining._padding import counted

    samples = _texts(data, folder, min(512, _longest(cfg)))
    logits = _language_model(cls, params, cfg)
    losses = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    total = tokens = 0.0
    for batch in _in_pairs(samples):
        ids, counts = batch["input_ids"], counted(batch["attention_mask"])
        total += float((np.asarray(losses(logits(batch)[:, :-1], ids[:, 1:])) * counts).sum())
        tokens += float(counts.sum())
    if not tokens:
        raise CalibrationError(
            "there is no token to measure",
            path=str(data),
            expected="texts of two tokens or more that count, one after the other",
            mend="name a file of longer texts: --evaluation FILE",
        )
    return {"perplexity": float(np.exp(total / tokens))}


def _texts(data: Path, folder: Path, length: int) -> list[dict[str, np.ndarray]]:
    """Ids and mask `(1, t)` of a file's windows of at most so many tokens; the last one is padded.

    Texts are one stream, whatever the class is called: what is measured predicts the next token.
    """
    from flaxslim.posttraining._arrays import read_arrays

    if data.suffix.lower() == ".npz":
        return list(_cut(read_arrays(data, ("eval_ids", "eval_mask")), length))
    texts = ["\n".join(sample) for sample in read_texts(data, ())]
    stream = stream_of(texts, load_tokenizer(folder))[None]
    return list(_cut({"input_ids": stream, "attention_mask": np.ones_like(stream)}, length))


def _cut(arrays: Mapping[str, np.ndarray], length: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows, those that are too long in parts of one length, without parts of padding alone."""
    width = arrays["input_ids"].shape[1]
    length = max(min(length, width), 1)
    filled = {name: np.pad(x, [(0, 0), (0, -width % length)]) for name, x in arrays.items()}
    for row in range(len(arrays["input_ids"])):
        for start in range(0, width, length):
            part = {name: x[row : row + 1, start : start + length] for name, x in filled.items()}
            if part["attention_mask"].any():
                yield part


def _in_pairs(samples: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Two at a time, and the last one alone if their number is odd."""
    for i in range(0, len(samples), 2):
        own = samples[i : i + 2]
        yield {name: np.concatenate([one[name] for one in own]) for name in own[0]}


def _longest(cfg: Any) -> int:
    """The tokens that a model takes at most, as far as its config says."""
    own = (positions(cfg), *(getattr(cfg, name, None) for name in ("n_positions", "seq_length")))
    return min(int(n or 2048) for n in own)


def _lambada(cls: Any, params: Any, cfg: Any, data: Path, folder: Path) -> dict[str, float]:
    """The percentage of passages whose last word is what the model finds likeliest, token by token.

    Paperno et al. 2016 (arXiv 1606.06031). The beginning of a passage that is too long is left out.
    """
    tokenizer = load_tokenizer(folder)
    passages = [text for text in _passages(data) if len(text.split()) > 1]
    if not passages:
        raise CalibrationError(
            "there is no passage of two words or more",
            path=str(data),
            expected='JSON lines, {"text": "..."}, or one passage a line',
        )
    tokens = [_without_end(tokenizer, text) for text in passages]
    before = [_without_end(tokenizer, text.rsplit(maxsplit=1)[0]) for text in passages]
    words = np.array([max(len(t) - len(b), 1) for t, b in zip(tokens, before, strict=True)])
    logits, right = _language_model(cls, params, cfg), 0
    shortened = [t[-_longest(cfg) :] for t in tokens]
    for batch, own in of_like_lengths(shortened, 8, limit=_longest(cfg)):
        found = np.asarray(logits(batch).argmax(-1))
        for guess, row in zip(found, own, strict=True):
            end = len(shortened[row])
            start = max(end - int(words[row]), 1)
            right += bool((guess[start - 1 : end - 1] == shortened[row][start:]).all())
    return {"lambada": 100 * right / len(passages)}


def _without_end(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those by which some tokenizers end each."""
    ids = list(tokenizer(text).input_ids)
    while ids and ids[-1] in tokenizer.all_special_ids and ids[-1] != tokenizer.unk_token_id:
        ids.pop()
    return ids


def _passages(data: Path) -> Iterator[str]:
    """Of JSON lines the field "text"; of other files each line."""
    for number, line in lines(decoded(data)):
        if data.suffix not in (".jsonl", ".json"):
            yield line.strip()
            continue
        try:
            yield str(json.loads(line)["text"]).strip()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                "this line holds no passage",
                path=f"{data}:{number}",
                seen=line[:60],
                expected='{"text": "..."}',
            ) from error


def _stsb(cls: Any, params: Any, cfg: Any, data: Path, folder: Path) -> dict[str, float]:
    """Spearman x 100 of the cosine of mean-pooled embeddings with the score, column 5."""
    from scipy.stats import spearmanr

    table = (line.split("\t") for _, line in lines(decoded(data)))
    rows = [row for row in table if len(row) >= 7 and _is_number(row[4])]
    if not rows:
        raise CalibrationError(
            "this is no table of the STS benchmark",
            path=str(data),
            expected="a score in column 5 and sentences in columns 6 and 7, separated by tabs",
        )
    tokenizer = load_tokenizer(folder)
    texts = [row[5] for row in rows] + [row[6] for row in rows]
    run, vectors = _model(cls, params, cfg), {}
    limit = min(128, _longest(cfg))
    tokens = [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]
    for batch, own in of_like_lengths(tokens, 100, limit=limit):
        if (hidden := getattr(run(batch), "last_hidden_state", None)) is None:
            raise CalibrationError(
                "the class puts out no hidden states, so texts cannot be compared",
                seen=cls.__name__,
                expected="a class without a head, such as FlaxBertModel",
                mend="prune a checkpoint of the encoder, or choose another metric",
            )
        pooled = (np.asarray(hidden) * batch["attention_mask"][..., None]).sum(1)
        pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
        vectors |= dict(zip(own, pooled, strict=True))
    half = len(rows)
    cosine = [float(vectors[i] @ vectors[half + i]) for i in range(half)]
    found: Any = spearmanr(cosine, [float(row[4]) for row in rows])
    return {"spearman": 100 * float(found.statistic)}


def of_like_lengths(
    tokens: Sequence[Sequence[int]], size: int, *, limit: int = 10**9
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Batches of texts of like lengths, and which they are: little padding, and few shapes.

    `limit` is what the model takes at most, and no text is longer.
    """
    from flaxslim.posttraining._tokens import padded

    order = np.argsort([len(t) for t in tokens], kind="stable")
    for i in range(0, len(order), size):
        rows = order[i : i + size]
        length = min(-(-max(len(tokens[row]) for row in rows) // 16) * 16, limit)
        own = [tokens[row] for row in rows]
        ids = padded(own, length, 0)
        mask = padded([[1] * len(t) for t in own], length, 0)
        yield {"input_ids": ids, "attention_mask": mask}, rows


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
