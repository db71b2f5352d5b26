"""The tasks that recipes train on: what is read, what is learnt, what is measured.

A task is a class. What concerns a single batch needs no instance, so that a recipe can be checked
without its data; an instance holds the data.
"""

import abc
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

Batch = dict[str, Any]
Logits = tuple[Any, ...]


class Forward(Protocol):
    """A model that is being measured: the inputs of a batch -> its logits."""

    def __call__(self, inputs: Mapping[str, Any], /) -> Logits: ...


class Task(abc.ABC):
    """What a model is trained on.

    Class attributes:
      Data: the dataclass of the recipe's section [data].
      head: how the name of the model's class ends.
      primary: the metric that counts most, a key of what `evaluate` gives.
    """

    Data: ClassVar[type]
    head: ClassVar[str]
    primary: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def load(cls, data: Any, source: str | None) -> "Task":
        """Read the data; `source` is the checkpoint that the model starts from."""

    @classmethod
    @abc.abstractmethod
    def random(cls, data: Any, cfg: Any, size: int, rng: Any) -> Batch:
        """A batch of the shape that real ones have, of random numbers; no file is read."""

    # --- one batch, on the device -------------------------------------------------------------

    @staticmethod
    @abc.abstractmethod
    def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model is called with."""

    @staticmethod
    def logits(outputs: Any) -> Logits:
        """What of the model's outputs counts; one array, unless a task says more."""
        return (outputs.logits,)

    @staticmethod
    @abc.abstractmethod
    def loss(logits: Logits, batch: Mapping[str, Any]) -> Any:
        """The mean loss of a batch, a scalar."""

    @staticmethod
    def mask(batch: Mapping[str, Any]) -> Any:
        """Which tokens count in distillation; None for all, or where there are none."""
        return batch.get("attention_mask")

    def check(self, cfg: Any) -> None:
        """Raise `CalibrationError` if a model of this config cannot read the data."""
        from flaxslim.posttraining._tokens import check

        check([self.example()], cfg, "data")

    # --- all of them --------------------------------------------------------------------------

    @abc.abstractmethod
    def batches(self, size: int, rng: Any) -> Iterator[Batch]:
        """Training batches without end, the same for the same `rng`; `rows` says which examples."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many training examples there are."""

    @abc.abstractmethod
    def all_logits(self, forward: Forward, size: int) -> Logits:
        """The logits of every training example, in the order that `rows` counts."""

    @staticmethod
    def rows_of(table: Logits, batch: Mapping[str, Any]) -> Logits:
        """The logits of a batch out of those of all examples."""
        return tuple(logits[batch["rows"]] for logits in table)

    @abc.abstractmethod
    def evaluate(self, forward: Forward, size: int) -> dict[str, float]:
        """The metrics on data that were not trained on."""

    @abc.abstractmethod
    def example(self) -> dict[str, Any]:
        """Inputs of the model for the proof and for its latency."""

    def save_beside(self, folder: Any) -> None:  # noqa: B027
        """What a model needs besides to be used, such as a tokenizer; none unless a task says."""

    @staticmethod
    def show(value: float) -> str:
        """A metric as people read it."""
        return f"{value:.3f}"


def _task(module: str, name: str) -> Callable[[], type[Task]]:
    return lambda: getattr(importlib.import_module(f"{__name__}.{module}"), name)


# By the name that a recipe gives; imported when asked for.
TASKS: dict[str, Callable[[], type[Task]]] = {
    "digits": _task("_digits", "Digits"),
    "language": _task("_language", "Language"),
    "squad": _task("_question_answering", "QuestionAnswering"),
}


def in_rounds(count: int, size: int, rng: Any) -> Iterator[Any]:
    """Rows of batches without end: all of them in a new order, then again.

    >>> import numpy as np
    >>> rounds = in_rounds(5, 2, np.random.default_rng(0))
    >>> sorted(int(i) for _ in range(2) for i in next(rounds)).__len__()
    4
    """
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def in_parts(arrays: Mapping[str, Any], size: int) -> Iterator[tuple[dict[str, Any], int]]:
    """All rows in order, `size` at a time, with how many of a part count.

    The last part is filled up with its last row, so that one program serves all.
    """
    import numpy as np

    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        rows = np.arange(start, start + size).clip(max=count - 1)
        yield {name: x[rows] for name, x in arrays.items()}, min(size, count - start)


def over_all(forward: Forward, arrays: Mapping[str, Any], size: int) -> Logits:
    """The logits of all rows, in order."""
    import numpy as np

    parts = []
    for inputs, count in in_parts(arrays, size):
        parts.append([np.asarray(x)[:count] for x in forward(inputs)])
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
