"""Language modelling: the next token of token arrays that lie in an .npz file."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flaxslim.cli._kinds import Count
from flaxslim.cli._tasks import Batch, Forward, Logits, Task, in_parts, in_rounds, over_all
from flaxslim.errors import CorruptFileError, nearest
from flaxslim.posttraining._tokens import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageData:
    """[data] of the task.

    Attributes:
      tokens: an .npz file with arrays `<name>_ids` and `<name>_mask`, (n, t).
      train, evaluation: the names there.
      length: tokens of each text that are used.
    """

    tokens: Path
    train: str = "train"
    evaluation: str = "eval"
    length: Count = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language(Task):
    """Token ids and masks, (n, t) each."""

    Data: ClassVar = LanguageData
    head: ClassVar = "ForCausalLM"
    primary: ClassVar = "perplexity"

    train: Mapping[str, Any]
    test: Mapping[str, Any]

    @classmethod
    def load(cls, data: LanguageData, source: str | None) -> "Language":
        return cls(train=_read(data, data.train), test=_read(data, data.evaluation))

    @classmethod
    def random(cls, data: LanguageData, cfg: Any, size: int, rng: Any) -> Batch:
        shape = (size, data.length)
        ids = rng.integers(cfg.vocab_size, size=shape, dtype=np.int32)
        return {"input_ids": ids, "attention_mask": np.ones(shape, np.int32)}

    @staticmethod
    def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    @staticmethod
    def loss(logits: Logits, batch: Mapping[str, Any]) -> Any:
        """Mean cross entropy over the tokens that count."""
        import optax

        counted = batch["attention_mask"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[0][:, :-1], batch["input_ids"][:, 1:]
        )
        return (losses * counted).sum() / counted.sum()

    def check(self, cfg: Any) -> None:
        check([self.train, self.test], cfg, "data.tokens")

    def batches(self, size: int, rng: Any) -> Iterator[Batch]:
        for rows in in_rounds(len(self.train["input_ids"]), size, rng):
            yield {**{name: x[rows] for name, x in self.train.items()}, "rows": rows}

    @property
    def count(self) -> int:
        return len(self.train["input_ids"])

    def all_logits(self, forward: Forward, size: int) -> Logits:
        return over_all(forward, self.train, size)

    def evaluate(self, forward: Forward, size: int) -> dict[str, float]:
        """Perplexity: exp of the mean loss over all tokens of all texts."""
        import jax
        import optax

        @jax.jit
        def losses(logits: Any, ids: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])

        total = tokens = 0.0
        for inputs, count in in_parts(self.test, size):
            (logits,) = forward(inputs)
            counted = inputs["attention_mask"][:count, 1:]
            total += float(
                (np.asarray(losses(logits, inputs["input_ids"]))[:count] * counted).sum()
            )
            tokens += float(counted.sum())
        return {"perplexity": math.exp(total / tokens)}

    def example(self) -> dict[str, Any]:
        return {name: x[:4] for name, x in self.test.items()}


def _read(data: LanguageData, name: str) -> dict[str, Any]:
    names = (f"{name}_ids", f"{name}_mask")
    try:
        with np.load(data.tokens, allow_pickle=False) as file:
            missing = [n for n in names if n not in file]
            arrays = [] if missing else [file[n][:, : data.length].astype(np.int32) for n in names]
            there = list(file)
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise whatever the bytes say
        raise CorruptFileError(
            "this is no .npz file of arrays", path=str(data.tokens), seen=str(error)
        ) from error
    if missing:
        raise CorruptFileError(
            f"the file has no array {missing[0]}",
            path=str(data.tokens),
            seen=", ".join(there),
            near=nearest(missing[0], there),
            mend="name another one in the recipe: data.train, data.evaluation",
        )
    return {"input_ids": arrays[0], "attention_mask": arrays[1]}
