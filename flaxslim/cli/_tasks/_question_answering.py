"""Extractive question answering as a task: SQuAD v1.1 files, exact match and F1."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flaxslim.cli._kinds import Checkpoint, Count, Steps
from flaxslim.cli._tasks import Batch, Forward, Logits, Task, _squad, _squad_metric
from flaxslim.errors import RecipeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquadData:
    """[data] of the task.

    Attributes:
      train, evaluation: files in the format of SQuAD v1.1.
      length, stride: tokens of a window of the context, and tokens that two windows share.
      tokenizer: a folder or a Hub id; that of the model unless said.
    """

    train: Path
    evaluation: Path
    length: Count = 384
    stride: Steps = 128
    tokenizer: Checkpoint | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Windows of questions and contexts."""

    Data: ClassVar = SquadData
    head: ClassVar = "ForQuestionAnswering"
    primary: ClassVar = "f1"

    train: _squad.Features
    test: _squad.Features
    examples: Sequence[_squad.Example]
    tokenizer: Any

    @classmethod
    def load(cls, data: SquadData, source: str | None) -> "QuestionAnswering":
        from transformers import AutoTokenizer

        if (name := data.tokenizer or source) is None:
            raise RecipeError(
                "a model at random has no tokenizer",
                path="data.tokenizer",
                mend="name one: a folder or a Hub id",
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        examples = _squad.read(data.evaluation)

        def features(examples: Sequence[_squad.Example], *, labels: bool) -> _squad.Features:
            return _squad.features(
                examples, tokenizer, length=data.length, stride=data.stride, labels=labels
            )

        return cls(
            train=features(_squad.read(data.train), labels=True),
            test=features(examples, labels=False),
            examples=examples,
            tokenizer=tokenizer,
        )

    @classmethod
    def random(cls, data: SquadData, cfg: Any, size: int, rng: Any) -> Batch:
        shape = (size, data.length)
        ids = rng.integers(cfg.vocab_size, size=shape, dtype=np.int32)
        start = rng.integers(data.length, size=size, dtype=np.int32)
        return {
            "input_ids": ids,
            "attention_mask": np.ones(shape, np.int32),
            "starts": start,
            "ends": start,
        }

    @staticmethod
    def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
        return _squad.model_inputs(batch)

    @staticmethod
    def logits(outputs: Any) -> Logits:
        return outputs.start_logits, outputs.end_logits

    @staticmethod
    def loss(logits: Logits, batch: Mapping[str, Any]) -> Any:
        start, end = logits
        return _squad.loss(start, end, batch)

    def batches(self, size: int, rng: Any) -> Iterator[Batch]:
        return _squad.batches(self.train, size, rng)

    @property
    def count(self) -> int:
        return len(self.train)

    def all_logits(self, forward: Forward, size: int) -> Logits:
        return _squad.logits(_pair(forward), self.train, size)

    @staticmethod
    def rows_of(table: Logits, batch: Mapping[str, Any]) -> Logits:
        width = batch["input_ids"].shape[1]
        return tuple(logits[batch["rows"], :width] for logits in table)

    def evaluate(self, forward: Forward, size: int) -> dict[str, float]:
        """F1 and exact match, in percent."""
        found = _squad.logits(_pair(forward), self.test, size)
        texts = _squad.answers(self.test, *found, self.examples)
        golds = {example.id: example.answers for example in self.examples}
        score = _squad_metric.score(texts, golds)
        return {"f1": score.f1, "exact": score.exact}

    def example(self) -> dict[str, Any]:
        """One window in full, as a server has it."""
        longest = int(self.test.lengths.argmax())
        return {name: x[longest : longest + 1] for name, x in self.test.inputs.items()}

    def save_beside(self, folder: Any) -> None:
        self.tokenizer.save_pretrained(folder)

    @staticmethod
    def show(value: float) -> str:
        return f"{value:.2f}"


def _pair(forward: Forward) -> Any:
    """The two logits as host arrays."""
    return lambda inputs: tuple(np.asarray(x) for x in forward(inputs))
