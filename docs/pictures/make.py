"""The pictures of the docs that real runs give: a plan, a training run, a sweep.

    python docs/pictures/make.py DATA            # all
    python docs/pictures/make.py DATA sweep      # one

DATA holds `stories260K`, a trained LLaMA with its tokens. Writes `plan.svg`, `training.svg` and
`sweep.svg` beside this file, by the functions and commands that a reader has:

plan
    a stock ViT on the digits, in whose six layers one pool of channels dies by magnitude; with the
    scores by which they died.
training
    `flaxslim run digits`, narrower: dense at first, then while channels die, and after the cut.
sweep
    `flaxslim sweep` on stories260K: the error of its outputs on calibration stories.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import flaxslim
from flaxslim.cli import main as command
from flaxslim.plots import _style

HERE = Path(__file__).parent
PRESETS = "balanced,wanda,magnitude,random"
STEPS = 240


def plan() -> None:
    """A stock ViT in whose layers one pool of channels dies, and the scores by which it does."""
    from sklearn.datasets import load_digits
    from transformers import FlaxViTForImageClassification, ViTConfig

    digits: Any = load_digits()
    images, labels = (digits.images / 16).astype("float32")[:, None], digits.target
    cfg = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_labels=10,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = FlaxViTForImageClassification(cfg)
    schedule = flaxslim.cubic(0.0, 0.5, begin=40, end=200, every=20)
    spec = flaxslim.VIT_FFN
    tx = flaxslim.pruning(optax.adamw(1e-3), spec, schedule, "magnitude", allocation="global")

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = model(x, params=params).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = model.params, tx.init(model.params)
    pick = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = pick.integers(0, len(images), 128)
        params, state = step(params, state, images[batch], labels[batch])
    chosen = flaxslim.plan(params, cfg, width="per_layer")
    print(chosen)
    figure = flaxslim.plot_plan(chosen, scores=flaxslim.sparsity(state))
    _style.write(figure, HERE / "plan.svg")


def training() -> None:
    """The recipe `digits`, smaller: dense steps, then steps while channels die."""
    from flaxslim.cli import _metrics, _output

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "digits"
        said = ["model.config.hidden_size=96", "model.config.intermediate_size=768"]
        said += ["output.log_every=5", "output.plot=false"]
        flags = [word for key in said for word in ("--set", key)]
        if code := command(["run", "digits", *flags, "--out", str(out)]):
            raise SystemExit(code)
        rows = [vars(row) for row in _metrics.read(out)]
        assert (out / _output.REPORT).is_file()
    _style.write(flaxslim.plot_training(rows, shrunk=[161]), HERE / "training.svg")


def sweep(data: Path) -> None:
    """Four methods at five sizes, on calibration stories."""
    folder = data / "stories260K"
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "sweep.csv"
        flags = ["--calibration", str(folder / "tinystories_tokens.npz")]
        flags += ["--fields", "calibration_ids", "calibration_mask", "--presets", PRESETS]
        flags += ["--keep", "0.9,0.8,0.7,0.5,0.3", "--csv", str(table)]
        if code := command(["sweep", str(folder), *flags]):
            raise SystemExit(code)
        with table.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    _style.write(flaxslim.plot_sweep(rows), HERE / "sweep.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("which", nargs="*", default=["plan", "training", "sweep"])
    given = parser.parse_args()
    for name in given.which:
        sweep(given.data) if name == "sweep" else {"plan": plan, "training": training}[name]()
        print(f"{name}.svg: {(HERE / f'{name}.svg').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
