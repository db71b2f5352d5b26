"""`flaxslim demo`: the whole story on one small real task, with no network and no file needed."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from flaxslim._errors import FlaxslimError
from flaxslim.cli import _table
from flaxslim.cli._console import console

# Half of the channels of each FFN die in five rounds, with training in between.
_ROUNDS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits: pixels (n, 1, 8, 8), standardised, labels (n,)."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]


def load_digits() -> Digits:
    """Three quarters to train on, one quarter to test on, always the same."""
    try:
        from sklearn.datasets import load_digits as stock
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise FlaxslimError(
            "the demo trains on scikit-learn's digits, and scikit-learn is not installed",
            mend="pip install 'flaxslim[demo]', or pip install scikit-learn",
        ) from error
    images, labels = stock(return_X_y=True)
    pixels = ((images - images.mean()) / images.std()).reshape(-1, 1, 8, 8).astype("float32")
    x, x_test, y, y_test = train_test_split(
        pixels, labels, test_size=0.25, random_state=0, stratify=labels
    )
    return Digits(train=(x, y), test=(x_test, y_test))


def run(folder: pathlib.Path | None = None, *, steps: int = 500, seed: int = 0) -> int:
    """Train, prune, slim, verify, save, reload; print accuracy and the proof.

    Returns the exit code.
    """
    import jax
    import numpy as np
    import optax
    from transformers import FlaxViTForImageClassification, ViTConfig
    from transformers.utils import logging

    import flaxslim
    from flaxslim._spec import Site

    logging.set_verbosity_error()
    started = time.perf_counter()
    digits = load_digits()
    cfg = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.12,  # the default, 0.02, is for widths of 768
        architectures=["ViTForImageClassification"],
    )
    model: Any = FlaxViTForImageClassification(cfg, seed=seed)
    sites = flaxslim.VIT_FFN.sites(model.params)

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = model(x, params=params).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    # The learning rate falls to zero twice: once dense, once while pruning.
    once = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 10), steps)
    tx = optax.adamw(optax.join_schedules([once, once], [steps]), weight_decay=1e-2)

    @jax.jit
    def step(params: Any, state: Any, alive: list[Any], x: Any, y: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return _masked(optax.apply_updates(params, updates), sites, alive), state

    def train(params: Any, state: Any, alive: list[Any], count: int, task: str) -> tuple[Any, Any]:
        batches = _batches(digits.train, 64, np.random.default_rng(seed))
        for _ in _table.track(range(count), task):
            params, state = step(params, state, alive, *next(batches))
        return params, state

    def accuracy(model: Any, params: Any) -> float:
        x, y = digits.test
        logits = jax.jit(lambda p, x: model(x, params=p).logits)(params, x)
        return float((np.asarray(logits).argmax(-1) == y).mean())

    def ranking(site: Site, params: Any) -> Any:
        """Channels, the least important first: by the norm of their second row."""
        from flaxslim._tree import flatten

        return np.argsort(site.second.axes.norm(flatten(params)[site.second.path], "f"))

    alive = [np.ones(site.size, np.float32) for site in sites]
    params, state = train(model.params, tx.init(model.params), alive, steps, "training")
    results = {"dense": accuracy(model, params)}
    for share in _ROUNDS:
        for site, mask in zip(sites, alive, strict=True):
            mask[ranking(site, params)[: int(share * site.size)]] = 0
        params, state = train(
            params, state, alive, steps // len(_ROUNDS), f"training, {share:.0%} of the FFN dead"
        )
    params = _masked(params, sites, alive)
    results["pruned"] = accuracy(model, params)

    slimmed, small_cfg = flaxslim.slim(params, cfg)
    proof = flaxslim.verify(
        (params, cfg),
        (slimmed, small_cfg),
        FlaxViTForImageClassification,
        inputs={"pixel_values": digits.test[0][:32]},
    )
    proof.raise_if_failed()
    with tempfile.TemporaryDirectory() as scratch:
        target = folder or pathlib.Path(scratch) / "slim-vit"
        flaxslim.save(target, slimmed, small_cfg, record={"proof": proof.to_dict()})
        reloaded: Any = FlaxViTForImageClassification.from_pretrained(target)
        results["slimmed, reloaded"] = accuracy(reloaded, reloaded.params)

    console.print(_table.accuracies(results))
    console.print(_table.before_after(proof))
    console.print(_table.verdict(proof), markup=False, soft_wrap=True)
    where = f", saved in {folder}" if folder else ""
    console.print(f"done in {time.perf_counter() - started:.0f} s{where}")
    return 0


def _masked(params: Any, sites: Any, alive: list[Any]) -> Any:
    """The parameters with the second rows of dead channels at zero."""
    from flaxslim._tree import flatten, replace

    leaves = flatten(params)
    return replace(
        params,
        {
            site.second.path: leaves[site.second.path] * mask[:, None]
            for site, mask in zip(sites, alive, strict=True)
        },
    )


def _batches(data: tuple[Any, Any], size: int, rng: Any) -> Iterator[tuple[Any, Any]]:
    x, y = data
    while True:
        order = rng.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            index = order[start : start + size]
            yield x[index], y[index]
