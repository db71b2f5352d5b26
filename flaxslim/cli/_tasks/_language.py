"""Language modelling: the next token of token arrays that lie in an .npz file."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flaxslim.cli._kinds import Count
from flaxslim.cli._tasks import Batch, Forward, Logits, Task, in_parts, in_rounds, over_all
from flaxslim.errors import CalibrationError, CorruptFileError
from flaxslim.posttraining._arrays import read_arrays
from flaxslim.posttraining._padding import counted
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
        import jax.numpy as jnp
        import optax

        counts = counted(batch["attention_mask"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[0][:, :-1], batch["input_ids"][:, 1:]
        )
        return (losses * counts).sum() / jnp.maximum(counts.sum(), 1)

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
            counts = counted(inputs["attention_mask"][:count])
            total += float((np.asarray(losses(logits, inputs["input_ids"]))[:count] * counts).sum())
            tokens += float(counts.sum())
        return {"perplexity": math.exp(total / tokens)}

    def example(self) -> dict[str, Any]:
        return {name: x[:4] for name, x in self.test.items()}


def _read(data: LanguageData, name: str) -> dict[str, Any]:
    names = (f"{name}_ids", f"{name}_mask")
    try:
        found = read_arrays(data.tokens, names)
    except CalibrationError as error:
        raise CorruptFileError(
            error.problem,
            path=error.path,
            seen=error.seen,
            expected=error.expected,
            near=error.near,
            mend=f"write {names[0]} and {names[1]} of one shape, (texts, tokens), or name others "
            "in the recipe: data.train, data.evaluation",
        ) from error
    arrays = {own: x[:, : data.length] for own, x in found.items()}
    if not counted(arrays["attention_mask"]).any():
        raise CorruptFileError(
            f"of {names[0]} there is no token to predict",
            path=str(data.tokens),
            seen=f"{names[1]} of {int(arrays['attention_mask'].sum())} tokens, in "
            f"{len(arrays['input_ids'])} texts of {data.length} tokens at most",
            expected="two tokens or more that count, one after the other",
            mend="write a mask of ones where there is text; or raise data.length",
        )
    return arrays
