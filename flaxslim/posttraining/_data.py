"""Calibration data: a file of texts or arrays, or a folder of images, as batches for a model."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim.errors import CalibrationError, CalibrationWarning, neighbours
from flaxslim.posttraining import _arrays, _images, _padding, _text, _tokens

_MULTIPLE = 16  # of which the lengths of padded batches are: each is compiled for once


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationData:
    """Batches for a model, and what became of the samples.

    Attributes:
      batches: dicts of arrays by the names of the model's arguments; first axes count samples.
      samples: how many are in the batches, which are all of one size: a smaller last one is left
        out, unless it is the only one.
      tokens: positions that count, those of the encoder where there are two; None without text.
      truncated: how many of the samples were cut to the length that was asked for.
      source: where they are from.
    """

    batches: list[dict[str, np.ndarray]] = dataclasses.field(repr=False)
    samples: int
    tokens: int | None
    truncated: int
    source: str


def read_calibration(
    path: str | os.PathLike,
    *,
    folder: str | os.PathLike,
    cfg: Any,
    samples: int = 128,
    length: int = 128,
    batch_size: int = 16,
    fields: Sequence[str] = (),
    seed: int = 0,
    packed: bool | None = None,
) -> CalibrationData:
    """Some samples of a file or a folder, drawn at random, as batches for a model.

    Text is tokenized by the tokenizer in `folder`: `input_ids` and `attention_mask`, (b, t) int32.
    An `.npz` file is taken as it is; a folder of images goes through the image processor in
    `folder`: `pixel_values`, (b, c, h, w) float32. Nothing is downloaded, and no code of a
    checkpoint is run. The same seed gives the same bytes.

    Args:
      path: text (a sample a line), `.jsonl` or `.json` (an object a line), `.csv` or `.tsv`,
        `.npz`, or a folder of images.
      folder: the checkpoint's.
      cfg: its config.
      samples: how many to draw.
      length: tokens of each at most; of each exactly if `packed`.
      batch_size: samples of a batch.
      fields: names in a `.jsonl`; names or numbers, from 1, of columns in a table; in an `.npz`
        the arrays of `input_ids` and `attention_mask`. By default "text", "sentence" or "content".
        Two are a pair for the tokenizer, more of them lines of one text.
      seed: what the draw depends on.
      packed: whether texts are joined, with the end-of-sequence token between them, and cut into
        windows. Otherwise each is a sample, padded to the longest of its batch. By default true
        for causal language models.

    Raises `CalibrationError` if there is nothing to read, or it does not fit the model. Warns of
    fewer samples than were asked for, and if all of them were truncated.

    >>> data = read_calibration("stories.txt", folder=folder, cfg=cfg)  # doctest: +SKIP
    >>> data.batches[0]["input_ids"].shape, data.samples, data.tokens  # doctest: +SKIP
    ((16, 128), 128, 16384)
    """
    ask = _Ask(
        path=Path(path).expanduser(),
        folder=Path(folder).expanduser(),
        cfg=cfg,
        samples=_positive("samples", samples),
        length=_positive("length", length),
        size=_positive("batch_size", batch_size),
        fields=(fields,) if isinstance(fields, str) else tuple(map(str, fields)),
        rng=np.random.default_rng(seed),
    )
    if ask.path.is_dir():
        ask.refuse(fields=bool(fields), packed=packed)
        data, there = _from_images(ask)
    elif not ask.path.exists():
        raise CalibrationError(
            "there is no such file or folder",
            path=str(ask.path),
            near=neighbours(ask.path),
            expected=_text.KINDS,
            mend="check the spelling",
        )
    elif ask.path.suffix.lower() == ".npz":
        ask.refuse(packed=packed)
        data, there = _from_arrays(ask)
    elif _tokens.is_causal(cfg) if packed is None else packed:
        data, there = _from_stream(ask)
    else:
        data, there = _from_texts(ask)
    _tokens.check(data.batches, cfg, data.source)
    if there < samples:
        warnings.warn(
            f"{data.source} has {there} samples where {samples} were asked for; {data.samples} are "
            "used: give more of them, or ask for fewer",
            CalibrationWarning,
            stacklevel=2,
        )
    if data.truncated == data.samples:
        warnings.warn(
            f"all {data.samples} samples of {data.source} were cut to {length} tokens: ask for a "
            "greater length, if the model has so many positions",
            CalibrationWarning,
            stacklevel=2,
        )
    return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ask:
    """What `read_calibration` was asked for."""

    path: Path
    folder: Path
    cfg: Any
    samples: int
    length: int
    size: int
    fields: tuple[str, ...]
    rng: np.random.Generator

    def refuse(self, **given: bool | None) -> None:
        """What means nothing for this kind of data is no option of it."""
        for name in (name for name, value in given.items() if value):
            raise CalibrationError(
                f"{name}= is for text, and this is none", path=str(self.path), mend="leave it out"
            )

    def drawn(self, count: int) -> np.ndarray:
        """Indices of samples, in the order of the draw: asking for more only adds to them."""
        return self.rng.permutation(count)[: self.samples]

    def whole(self, rows: Any) -> Any:
        """Those that fill batches, or all if they do not fill one."""
        return rows[: len(rows) // self.size * self.size or None]

    def batches(self, count: int) -> list[slice]:
        return [slice(start, start + self.size) for start in range(0, count, self.size)]

    def data(
        self, batches: list[dict[str, np.ndarray]], *, tokens: int | None = None, truncated: int = 0
    ) -> CalibrationData:
        return CalibrationData(
            batches=batches,
            samples=sum(len(next(iter(batch.values()))) for batch in batches),
            tokens=tokens,
            truncated=truncated,
            source=str(self.path),
        )


# --- the kinds --------------------------------------------------------------------------------


def _from_images(ask: _Ask) -> tuple[CalibrationData, int]:
    found = _images.find_images(ask.path)
    keys = ("num_channels", "vision_config.num_channels")
    channels = next(filter(None, (_tokens.get(ask.cfg, key) for key in keys)), 3)
    read = _images.pixel_reader(ask.folder, channels)
    rows = ask.whole(ask.drawn(len(found)))
    batches = [
        {"pixel_values": read([found[row] for row in rows[part]])}
        for part in ask.batches(len(rows))
    ]
    return ask.data(batches), len(found)


def _from_arrays(ask: _Ask) -> tuple[CalibrationData, int]:
    arrays = _arrays.read_arrays(ask.path, ask.fields)
    there = len(next(iter(arrays.values())))
    rows = ask.whole(ask.drawn(there))
    cut = np.zeros(len(rows), bool)
    taken = {}
    for name, x in arrays.items():
        taken[name] = x[rows]
        if _padding.is_cut(name, arrays) and x.shape[1] > ask.length:
            # Padding that goes is no loss; what has no mask is all text.
            cut |= (_padding.mask_of(name, arrays)[rows, ask.length :] != 0).any(axis=1)
            taken[name] = taken[name][:, : ask.length]
    batches = [{name: x[part] for name, x in taken.items()} for part in ask.batches(len(rows))]
    tokens = None
    if (ids := taken.get("input_ids")) is not None:
        tokens = int(taken.get("attention_mask", np.ones_like(ids)).sum())
    return ask.data(batches, tokens=tokens, truncated=int(cut.sum())), there


def _from_stream(ask: _Ask) -> tuple[CalibrationData, int]:
    texts = ["\n".join(sample) for sample in _text.read_texts(ask.path, ask.fields)]
    stream = _tokens.stream_of(texts, _tokens.load_tokenizer(ask.folder))
    cut = _tokens.windows(stream, ask.length)
    if not len(cut):
        raise CalibrationError(
            "the texts do not fill one window",
            path=str(ask.path),
            seen=f"{len(stream)} tokens",
            expected=f"at least {ask.length}, better {ask.samples * ask.length}",
            mend=f"pass more text, or a length of at most {len(stream)}; or packed=False to take "
            "each text by itself",
        )
    rows = ask.whole(ask.drawn(len(cut)))
    ids = cut[rows]
    batches = [
        _tokens.inputs_of(ask.cfg, ids[part], np.ones_like(ids[part]))
        for part in ask.batches(len(rows))
    ]
    return ask.data(batches, tokens=ids.size), len(cut)


def _from_texts(ask: _Ask) -> tuple[CalibrationData, int]:
    texts = _text.read_texts(ask.path, ask.fields)
    tokenizer = _tokens.load_tokenizer(ask.folder)
    pair = len(ask.fields) == 2
    chosen = [texts[row] for row in ask.drawn(len(texts))]
    told, cut = _tokens.encode(tokenizer, chosen, pair=pair, length=ask.length)
    sizes = [len(ids) for ids in told["input_ids"]]
    # Dropped before sorting, or it would always be the longest that go.
    rows = ask.whole([row for row, size in enumerate(sizes) if size > 0])
    if not rows:
        raise CalibrationError(
            "the tokenizer makes no token of any text",
            path=str(ask.path),
            mend="pass text in a language that the model knows",
        )
    rows.sort(key=lambda row: sizes[row])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = []
    for part in ask.batches(len(rows)):
        taken = rows[part]
        # Not beyond the length, beyond which the model may have no position.
        width = min(-(-sizes[taken[-1]] // _MULTIPLE) * _MULTIPLE, ask.length)
        ids = _tokens.padded([told["input_ids"][row] for row in taken], width, pad)
        mask = _tokens.padded([[1] * sizes[row] for row in taken], width, 0)
        batch = _tokens.inputs_of(ask.cfg, ids, mask)
        if pair and "token_type_ids" in told and _tokens.takes(ask.cfg, "token_type_ids"):
            kinds = [told["token_type_ids"][row] for row in taken]
            batch["token_type_ids"] = _tokens.padded(kinds, width, tokenizer.pad_token_type_id)
        batches.append(batch)
    # Of batches in the order of their lengths every fourth, which is held out, would be longer.
    batches = [batches[i] for i in ask.rng.permutation(len(batches))]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return ask.data(batches, tokens=tokens, truncated=sum(cut[row] for row in rows)), len(texts)


# --- small things -----------------------------------------------------------------------------


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise CalibrationError(
            f"{name} is no count", seen=repr(value), expected="a whole number from 1"
        )
    return int(value)
