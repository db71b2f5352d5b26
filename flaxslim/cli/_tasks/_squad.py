"""Extractive question answering: SQuAD v1.1 files, windows of tokens, batches, loss, answers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxslim.checkpoint._folder import read_json, reading
from flaxslim.errors import CorruptFileError, FlaxslimError

if TYPE_CHECKING:
    import jax
    from jax.typing import ArrayLike

Batch = dict[str, np.ndarray]

# Batches are sorted by length within so many, so that a batch holds windows of like length.
_CHUNK = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A question, its context, and its gold answers: texts, and their first characters."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Windows of n (question, context) pairs, t tokens each.

    `inputs` are what the model is called with, (n, t) each; `offsets` (n, t, 2) the characters of
    the context that a token covers, -1 outside of it; `example` (n,) which example a window is of;
    `labels` (n, 2) the first and the last token of the answer.
    """

    inputs: Mapping[str, np.ndarray]
    offsets: np.ndarray
    example: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.example)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that are no padding, (n,)."""
        return self.inputs["attention_mask"].sum(axis=1)


# --- read -------------------------------------------------------------------------------------


def read(path: Path | str) -> list[Example]:
    """The questions of a SQuAD v1.1 file.

    Raises `MissingFileError`, or `CorruptFileError` for what is no such file.
    """
    path = Path(path)
    with reading(path):
        tree = read_json(path)
    try:
        examples = [
            _example(str(qa["id"]), qa["question"], paragraph["context"], qa["answers"], path)
            for article in tree["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        lacking = isinstance(error, KeyError)
        raise _not_squad(path, f"no {error}" if lacking else str(error)) from None
    if not examples:
        raise _not_squad(path, "no question")
    if len({example.id for example in examples}) < len(examples):
        raise _not_squad(path, "two questions of the same id")
    return examples


def _example(id: str, question: str, context: str, golds: Sequence[Any], path: Path) -> Example:
    texts = tuple(gold["text"].strip() for gold in golds)
    # Whitespace around an answer is no part of it.
    starts = tuple(
        gold["answer_start"] + len(gold["text"]) - len(gold["text"].lstrip()) for gold in golds
    )
    if not texts:
        raise _not_squad(path, f"question {id} has no answer (as in SQuAD v2)")
    for text, start in zip(texts, starts, strict=True):
        if not text or start < 0 or not context.startswith(text, start):
            raise _not_squad(
                path, f"question {id}: no {text!r} at character {start} of its context"
            )
    return Example(id=id, question=question.strip(), context=context, answers=texts, starts=starts)


def _not_squad(path: Path, seen: str) -> CorruptFileError:
    return CorruptFileError(
        "not a SQuAD v1.1 file",
        path=str(path),
        seen=seen,
        expected='{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": '
        '[{"text", "answer_start"}]}]}]}]}',
        mend="give a file in the format of SQuAD v1.1, each question with an answer cut from its "
        "context",
    )


# --- features ---------------------------------------------------------------------------------


def features(
    examples: Sequence[Example], tokenizer: Any, *, length: int, stride: int, labels: bool
) -> Features:
    """Windows of `length` tokens, of which two that follow each other share `stride`.

    Labels are those of the first gold answer; a window that does not hold it all says position 0
    (`[CLS]` in BERT). Raises `FlaxslimError` for a tokenizer without offsets, and for a length that
    leaves too little room beside a question.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FlaxslimError(
            "this tokenizer does not tell which characters a token covers",
            seen=type(tokenizer).__name__,
            expected="a fast tokenizer",
            mend="load it with AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    if not examples:
        raise FlaxslimError("no question to make features of", mend="give at least one example")
    questions = [example.question for example in examples]
    _check_room(questions, tokenizer, length, stride)
    encoded = tokenizer(
        questions,
        [example.context for example in examples],
        truncation="only_second",
        max_length=length,
        stride=stride,
        padding="max_length",
        padding_side="right",
        return_attention_mask=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = [*tokenizer.model_input_names, "attention_mask"]
    inputs = {name: np.array(encoded[name], np.int32) for name in names if name in encoded}
    second = [[part == 1 for part in window.sequence_ids] for window in encoded.encodings]
    offsets = np.array(encoded["offset_mapping"], np.int32)
    offsets[~np.array(second)] = -1
    example = np.array(encoded["overflow_to_sample_mapping"], np.int32)
    where = _labels(examples, example, offsets) if labels else None
    return Features(inputs=inputs, offsets=offsets, example=example, labels=where)


def _check_room(questions: Sequence[str], tokenizer: Any, length: int, stride: int) -> None:
    """Each window must advance by a token of the context at least."""
    counts = [len(ids) for ids in tokenizer(questions, add_special_tokens=False).input_ids]
    taken = max(counts) + tokenizer.num_special_tokens_to_add(pair=True)
    if stride < 0 or length - taken <= stride:
        raise FlaxslimError(
            "the windows are too short for their stride and the longest question",
            path=f"question {questions[int(np.argmax(counts))]!r}",
            seen=f"length {length}, stride {stride}, {taken} tokens of question and marks",
            expected=f"0 <= stride < {length - taken}, what is left of the context"
            if length > taken
            else f"a length of more than {taken}",
            mend="raise the length, or lower the stride",
        )


def _labels(examples: Sequence[Example], example: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """First and last token of the first gold answer in each window, (n, 2)."""
    spans = [(e.starts[0], e.starts[0] + len(e.answers[0])) for e in examples]
    first, past = np.array(spans)[example].T[..., None]
    starts, ends = offsets[..., 0], offsets[..., 1]
    context = starts >= 0
    whole = (np.where(context, starts, past).min(1) <= first[:, 0]) & (ends.max(1) >= past[:, 0])
    # Several tokens may cover one character (bytes of it): the answer is all of them.
    start = (context & (ends > first)).argmax(1)
    end = ends.shape[1] - 1 - (context & (starts < past))[:, ::-1].argmax(1)
    found = whole & (start <= end)
    return np.where(found[:, None], np.stack([start, end], axis=1), 0).astype(np.int32)


# --- batches ----------------------------------------------------------------------------------


def batches(
    features: Features, size: int, rng: np.random.Generator, *, bucket: int = 64
) -> Iterator[Batch]:
    """Training batches without end: inputs (b, t), `starts` and `ends` (b,), `rows` (b,).

    An epoch is ceil(n / size) batches and has every window; the last batch of an epoch is filled up
    with others. Windows of like length come together, so that a batch is cut to the multiple of
    `bucket` tokens that its longest needs.
    """
    _check_sizes(size, bucket)
    if features.labels is None:
        raise FlaxslimError(
            "features without labels cannot be trained on", mend="make them with labels=True"
        )
    lengths, count = features.lengths, len(features)
    while True:
        order = rng.permutation(count)
        order = np.resize(order, -(-count // size) * size)
        for at in range(0, len(order), _CHUNK * size):
            chunk = order[at : at + _CHUNK * size]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")].reshape(-1, size)
            for rows in rng.permutation(chunk):
                start, end = features.labels[rows].T
                yield {**_cut(features, rows, bucket), "starts": start, "ends": end}


def in_order(features: Features, size: int, *, bucket: int = 64) -> Iterator[Batch]:
    """Evaluation batches: every window once, the shortest first; inputs (b, t), `rows` (b,).

    All have `size` rows, so that few shapes compile: the last repeats its last window.
    """
    _check_sizes(size, bucket)
    order = np.argsort(features.lengths, kind="stable")
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        rows = np.pad(rows, (0, size - len(rows)), mode="edge")
        yield _cut(features, rows, bucket)


def _check_sizes(size: int, bucket: int) -> None:
    if size < 1 or bucket < 1:
        raise FlaxslimError(
            "a batch needs a window, and a bucket a token",
            seen=f"size {size}, bucket {bucket}",
            expected="1 or more",
            mend="raise it",
        )


def _cut(features: Features, rows: np.ndarray, bucket: int) -> Batch:
    """Windows without the padding that all of them have, up to a multiple of `bucket`."""
    width = -(-int(features.lengths[rows].max()) // bucket) * bucket
    inputs = {name: array[rows, :width] for name, array in features.inputs.items()}
    return {**inputs, "rows": rows.astype(np.int32)}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model is called with.

    >>> model_inputs({"input_ids": 1, "attention_mask": 2, "rows": 3, "starts": 4, "ends": 5})
    {'input_ids': 1, 'attention_mask': 2}
    """
    return {name: batch[name] for name in batch if name not in ("rows", "starts", "ends")}


# --- loss and answers -------------------------------------------------------------------------


def loss(
    start_logits: "ArrayLike", end_logits: "ArrayLike", batch: Mapping[str, Any]
) -> "jax.Array":
    """Mean cross entropy of the first and of the last token, from logits (b, t); a scalar.

    Padding is no candidate, whatever its logits.
    """
    import jax.numpy as jnp
    import optax

    real = jnp.asarray(batch["attention_mask"]) > 0

    def one(logits: Any, labels: Any) -> "jax.Array":
        # In float32, whatever the model computes in: a sum over hundreds of tokens.
        logits = jnp.where(real, jnp.asarray(logits, jnp.float32), -jnp.inf)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return (one(start_logits, batch["starts"]) + one(end_logits, batch["ends"])) / 2


def logits(
    forward: Callable[[dict[str, Any]], tuple[Any, Any]],
    features: Features,
    size: int,
    *,
    bucket: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits of every window, (n, t) each; -inf where nothing was computed.

    `forward` maps the inputs of a batch, (b, t), to its start and end logits, (b, t).
    """
    shape = features.offsets.shape[:2]
    start, end = (np.full(shape, -np.inf, np.float32) for _ in range(2))
    for batch in in_order(features, size, bucket=bucket):
        first, last = forward(model_inputs(batch))
        width = batch["input_ids"].shape[1]
        start[batch["rows"], :width], end[batch["rows"], :width] = first, last
    return start, end


def answers(
    features: Features,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    examples: Sequence[Example],
    *,
    best: int = 20,
    longest: int = 30,
) -> dict[str, str]:
    """The text of the best span for each question's id, from logits (n, t) of all its windows.

    A span starts and ends at one of the `best` tokens of the context, has at most `longest` tokens,
    and its score is the sum of its two logits. "" where there is no such span.
    """
    if not len(features) == len(start_logits) == len(end_logits):
        raise FlaxslimError(
            "logits of other windows",
            seen=f"{len(start_logits)} and {len(end_logits)} rows for {len(features)} windows",
            expected="a row for each window, in the order of the features",
            mend="put the rows of the batches back in order, as `logits` does",
        )
    score, first, last = _best_spans(features, start_logits, end_logits, best, longest)
    texts = {example.id: "" for example in examples}
    # The best window of an example comes last and stays; of two that are equal, the first one.
    for row in np.argsort(-score, kind="stable")[::-1].tolist():
        if score[row] > -np.inf:
            example = examples[int(features.example[row])]
            at, to = features.offsets[row, first[row], 0], features.offsets[row, last[row], 1]
            texts[example.id] = example.context[at:to]
    return texts


def _best_spans(
    features: Features, start: np.ndarray, end: np.ndarray, best: int, longest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, first and last token of the best span in each window, (n,) each."""
    context = features.offsets[..., 0] >= 0
    tops = []
    for values in (start, end):
        values = np.where(context, np.asarray(values, np.float32), -np.inf)
        tokens = np.argsort(-values, axis=1, kind="stable")[:, :best]
        tops.append((tokens, np.take_along_axis(values, tokens, axis=1)))
    (firsts, high), (lasts, low) = tops
    size = lasts[:, None, :] - firsts[:, :, None] + 1
    total = high[:, :, None] + low[:, None, :]
    total = np.where((size >= 1) & (size <= longest), total, -np.inf)
    total = total.reshape(len(total), -1)
    i, j = np.divmod(total.argmax(axis=1), lasts.shape[1])
    rows = np.arange(len(total))
    return total.max(axis=1, initial=-np.inf), firsts[rows, i], lasts[rows, j]
