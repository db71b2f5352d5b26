"""Handwritten digits: scikit-learn's 1,797 images of 8 x 8, which need no download."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from flaxslim.cli._tasks import Batch, Forward, Logits, Task, in_rounds, over_all
from flaxslim.errors import FlaxslimError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsData:
    """[data] of the task: nothing to say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """Pixels (n, 1, 8, 8), standardised, and labels (n,); three quarters of them to train on."""

    Data: ClassVar = DigitsData
    head: ClassVar = "ForImageClassification"
    primary: ClassVar = "accuracy"

    train: tuple[Any, Any]
    test: tuple[Any, Any]

    @classmethod
    def load(cls, data: DigitsData, source: str | None) -> "Digits":
        """Always the same split."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise FlaxslimError(
                "the task is scikit-learn's digits, and scikit-learn is not installed",
                mend="pip install 'flaxslim[demo]', or pip install scikit-learn",
            ) from error
        images, labels = load_digits(return_X_y=True)
        pixels = ((images - images.mean()) / images.std()).reshape(-1, 1, 8, 8).astype("float32")
        x, x_test, y, y_test = train_test_split(
            pixels, labels, test_size=0.25, random_state=0, stratify=labels
        )
        return cls(train=(x, y), test=(x_test, y_test))

    @classmethod
    def random(cls, data: DigitsData, cfg: Any, size: int, rng: Any) -> Batch:
        pixels = rng.standard_normal((size, 1, 8, 8), np.float32)
        return {"pixel_values": pixels, "labels": rng.integers(10, size=size)}

    @staticmethod
    def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"]}

    @staticmethod
    def loss(logits: Logits, batch: Mapping[str, Any]) -> Any:
        """Mean cross entropy."""
        import optax

        return optax.softmax_cross_entropy_with_integer_labels(logits[0], batch["labels"]).mean()

    def batches(self, size: int, rng: Any) -> Iterator[Batch]:
        x, y = self.train
        for rows in in_rounds(len(x), size, rng):
            yield {"pixel_values": x[rows], "labels": y[rows], "rows": rows}

    @property
    def count(self) -> int:
        return len(self.train[1])

    def all_logits(self, forward: Forward, size: int) -> Logits:
        return over_all(forward, {"pixel_values": self.train[0]}, size)

    def evaluate(self, forward: Forward, size: int) -> dict[str, float]:
        """The share of test images whose digit is right."""
        x, y = self.test
        (logits,) = over_all(forward, {"pixel_values": x}, size)
        return {"accuracy": float((logits.argmax(-1) == y).mean())}

    def example(self) -> dict[str, Any]:
        return {"pixel_values": self.test[0][:32]}

    @staticmethod
    def show(value: float) -> str:
        return f"{value:.2%}"
