"""The two real models on which methods without training are compared, and what is measured there.

A task gives the model (stock class, parameters, config), calibration batches by seed, `fn`, and
`evaluate(params)`: the figures of its table, on data that calibration never sees.
"""

import copy
import csv
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxslim import Budget
from flaxslim.cli._evaluate import of_like_lengths

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
Batch = Mapping[str, Any]


class Task:
    """A model, its calibration data, and what is measured."""

    params: Any
    cfg: Any

    def as_many_as(self, share: float) -> tuple[float, Budget]:
        """The share of FFN channels, and the budget, that leave as much as this share of both."""
        from flaxslim.posttraining._allocate import parameters_of
        from flaxslim.posttraining._rank import count_of
        from flaxslim.specs import spec_for

        size = {
            part: sum(
                parameters_of(site) * count_of(site)
                for site in spec_for(self.cfg, part).sites(self.params, self.cfg)
            )
            for part in ("ffn", "all")
        }
        gone = (1 - share) * size["all"]
        whole = sum(x.size for x in jax.tree.leaves(self.params))
        return 1 - gone / size["ffn"], Budget(params=round(whole - gone))


class Stories(Task):
    """stories260K, a LLaMA: perplexity on 70 stories."""

    figures = ("perplexity",)

    def __init__(self) -> None:
        from transformers import FlaxLlamaForCausalLM

        model: Any = FlaxLlamaForCausalLM.from_pretrained(DATA / "stories260K")
        self.cfg, self.params, self._module = model.config, model.params, model.module
        tokens = np.load(DATA / "stories260K" / "tinystories_tokens.npz")
        self._ids, self._mask = tokens["calibration_ids"], tokens["calibration_mask"]
        self._test = (tokens["eval_ids"].astype(np.int32), tokens["eval_mask"].astype(np.int32))
        self._losses = jax.jit(self._losses_of)

    def at(self, cfg: Any) -> "Stories":
        """The same at the sizes of another config."""
        other = copy.copy(self)
        other.cfg, other._module = cfg, self._module.clone(config=cfg)
        other._losses = jax.jit(other._losses_of)
        return other

    def fn(self, params: Any, batch: Batch) -> Any:
        ids = batch["input_ids"]
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = batch["attention_mask"]
        return self._module.apply({"params": params}, ids, mask, positions, True).logits

    def calibration(self, seed: int, *, more: bool = False) -> list[dict[str, np.ndarray]]:
        """128 windows of 128 tokens: the first token, then 127 from a random place.

        `more`: all stories, each cut into such windows.
        """
        if more:
            ids, mask = self._all_windows(np.random.default_rng(seed))
        else:
            rng = np.random.default_rng(seed)
            rows = []
            for _ in range(128):
                story, mask = self._random_story(rng)
                length = int(mask.sum())
                start = int(rng.integers(1, max(2, length - 126)))
                rows.append(np.concatenate([story[:1], story[start : start + 127]]))
            ids = np.stack(rows).astype(np.int32)
            mask = np.ones_like(ids)
        return [
            {"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4]}
            for i in range(0, len(ids) - len(ids) % 4, 4)
        ]

    def _all_windows(self, rng: Any) -> tuple[np.ndarray, np.ndarray]:
        rows, masks = [], []
        for story, mask in zip(self._ids, self._mask, strict=True):
            for start in range(1, int(mask.sum()), 127):
                own = np.arange(start, start + 127)
                inside = own < mask.sum()
                rows.append(np.r_[story[:1], np.where(inside, story[own % len(story)], 0)])
                masks.append(np.r_[1, inside])
        order = rng.permutation(len(rows))
        return np.stack(rows)[order].astype(np.int32), np.stack(masks)[order].astype(np.int32)

    def _random_story(self, rng: Any) -> tuple[np.ndarray, np.ndarray]:
        long = np.flatnonzero(self._mask.sum(1) >= 128)
        row = int(rng.choice(long))
        return self._ids[row], self._mask[row]

    def _losses_of(self, params: Any, ids: Any, mask: Any) -> tuple[Any, Any]:
        logits = self.fn(params, {"input_ids": ids, "attention_mask": mask})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return (losses * mask[:, 1:]).sum(), mask[:, 1:].sum()

    def evaluate(self, params: Any) -> tuple[float, ...]:
        total = tokens = 0.0
        for i in range(0, 70, 10):
            loss, count = self._losses(params, *(x[i : i + 10] for x in self._test))
            total, tokens = total + float(loss), tokens + float(count)
        return (float(np.exp(total / tokens)),)


class Sentences(Task):
    """The sentence encoder, a BERT: Spearman x 100 on STS-B dev, and embedding error x 1000."""

    figures = ("Spearman", "embedding error")

    def __init__(self) -> None:
        from transformers import AutoTokenizer, FlaxBertModel

        folder = DATA / "sentence-encoder"
        model: Any = FlaxBertModel.from_pretrained(folder)
        self.cfg, self.params, self._module = model.config, model.params, model.module
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._train = _sentences(DATA / "stsb" / "sts-train.csv")
        rows = _rows(DATA / "stsb" / "sts-dev.csv")
        self._scores = np.array([float(row[4]) for row in rows])
        self._test = [row[5] for row in rows] + [row[6] for row in rows]
        self._embed = jax.jit(self._embedded)
        self._dense: np.ndarray | None = None

    def fn(self, params: Any, batch: Batch) -> Any:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        types = jnp.zeros_like(ids)
        return self._module.apply({"params": params}, ids, mask, types, positions)[0]

    def _embedded(self, params: Any, batch: Batch) -> Any:
        mask = batch["attention_mask"][..., None]
        summed = (self.fn(params, batch) * mask).sum(1) / mask.sum(1)
        return summed / jnp.linalg.norm(summed, axis=-1, keepdims=True)

    def calibration(self, seed: int, *, more: bool = False) -> list[dict[str, np.ndarray]]:
        """128 sentences of the training part, or 1,024."""
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(self._train), 1024 if more else 128, replace=False)
        texts = [self._train[i] for i in rows]
        batches = [batch for batch, _ in of_like_lengths(self._tokens(texts), 16)]
        return [batches[i] for i in rng.permutation(len(batches))]  # every fourth is held out

    def evaluate(self, params: Any) -> tuple[float, ...]:
        from scipy.stats import spearmanr

        if self._dense is None:
            self._dense = self._embeddings(self.params)
        found = self._embeddings(params)
        half = len(self._scores)
        cosine = (found[:half] * found[half:]).sum(1)
        spearman: Any = spearmanr(cosine, self._scores)
        wrong = ((found - self._dense) ** 2).sum(1).mean()
        return 100 * float(spearman.statistic), 1000 * float(wrong)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return [self._tokenizer(x, truncation=True, max_length=128).input_ids for x in texts]

    def _embeddings(self, params: Any) -> np.ndarray:
        found = np.empty((len(self._test), self.cfg.hidden_size))
        for batch, rows in of_like_lengths(self._tokens(self._test), 100):
            found[rows] = np.asarray(self._embed(params, batch))
        return found


def _rows(path: pathlib.Path) -> list[list[str]]:
    with open(path, encoding="utf8") as file:
        return [r for r in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(r) >= 7]


def _sentences(path: pathlib.Path) -> list[str]:
    return list(dict.fromkeys(text for row in _rows(path) for text in row[5:7]))


TASKS: Mapping[str, Callable[[], Any]] = {"stories260K": Stories, "sentence encoder": Sentences}
