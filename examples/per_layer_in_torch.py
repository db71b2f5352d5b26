"""A checkpoint with an FFN width for each layer, in the stock class of PyTorch.

    python examples/per_layer_in_torch.py FOLDER...

Needs torch and transformers 4.57 or later (5 too): nothing of flaxslim, and no JAX. Each
folder is one that `flaxslim.save(..., format="torch")` wrote, with an `expected.npz` beside the
weights: arrays `inputs/NAME` for the model and `outputs/NAME`, what it has to give for them. The
exit code is 1 if any output differs by more than 1e-5 of its largest value.

transformers 5.14 and later read and check `per_layer_config`, but their stock classes build every
layer from the config of the whole model, which then refuses to name a width: that is what
`load_per_layer` does for them.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

TOLERANCE = 1e-5


def load_per_layer(cls: Any, folder: str | Path, **kwargs: Any) -> Any:
    """`cls.from_pretrained(folder, ...)`, with each layer at the sizes of its `per_layer_config`.

    A plain instance of `cls` comes back: it runs, trains, generates and saves as ever, and what it
    saves is loaded in this way again. `cls` is a stock class, such as `BertModel` (no Auto class;
    for a composite of two families, import a class of each first). Layers are counted as they are
    built, so load one model at a time; afterwards nothing in transformers is changed. A shape that
    does not fit is an error, as in `from_pretrained`, and `kwargs` are its own: `dtype=`, ...
    """

    def sized(init: Any, count: dict[int, int]) -> Any:
        def build(self: Any, config: Any, *args: Any, **named: Any) -> None:
            # By config: a model may have two stacks of one class, as CLIP has.
            number = count[id(config)] = count.get(id(config), -1) + 1
            shared, sizes = config.__dict__, config.to_dict().get("per_layer_config") or {}
            # The values are lent, not copied: all layers go on to share one config.
            config.__dict__, config.per_layer_config = dict(shared), None
            config.update({int(n): own for n, own in sizes.items()}.get(number, {}))
            init(self, config, *args, **named)
            config.__dict__ = shared

        return build

    with ExitStack() as stack:
        for layer in GradientCheckpointingLayer.__subclasses__():
            stack.enter_context(patch.object(layer, "__init__", sized(layer.__init__, {})))
        return cls.from_pretrained(folder, **kwargs)


def stock_class(folder: Path) -> Any:
    """The class that `architectures` names, else the bare one of the family."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.architectures:
        return getattr(transformers, config.architectures[0])
    return transformers.MODEL_MAPPING[type(config)]


def expected(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """The inputs and outputs that are stored with a model."""
    with np.load(folder / "expected.npz") as file:
        arrays = {name: file[name] for name in file.files}
    inputs = {
        name.removeprefix("inputs/"): torch.tensor(x if x.dtype.kind == "f" else x.astype(np.int64))
        for name, x in arrays.items()
        if name.startswith("inputs/")
    }
    outputs = {
        name.removeprefix("outputs/"): x
        for name, x in arrays.items()
        if name.startswith("outputs/")
    }
    return inputs, outputs


def difference(model: Any, inputs: Mapping[str, Any], outputs: Mapping[str, np.ndarray]) -> float:
    """How far a model is off, relative to the largest value of each output."""
    with torch.no_grad():
        result = model.eval()(**inputs)
    apart = [
        np.abs(result[name].numpy() - x).max() / np.abs(x).max() for name, x in outputs.items()
    ]
    return float(np.max(apart))  # unlike max(), it lets a NaN through


def saved_again(model: Any, inputs: Mapping[str, Any], outputs: Mapping[str, np.ndarray]) -> float:
    """The same for the model that comes back from `save_pretrained`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return difference(load_per_layer(type(model), folder), inputs, outputs)


def generates(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether `generate` gives the same tokens with a cache and without one."""
    start = inputs["input_ids"][:1, :4]
    cached, anew = (
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            pad_token_id=0,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    return bool(torch.equal(cached, anew))


def check(folder: Path) -> bool:
    """Load, run, save and load again, and say how far the outputs are from the stored ones."""
    inputs, outputs = expected(folder)
    model = load_per_layer(stock_class(folder), folder)
    apart, again = difference(model, inputs, outputs), saved_again(model, inputs, outputs)
    ok = apart <= TOLERANCE and again <= TOLERANCE
    line = f"{folder.name} ({type(model).__name__}): outputs differ by {apart:.1e}"
    line += f", saved and loaded again by {again:.1e}"
    if model.can_generate():
        same = generates(model, inputs)
        ok = ok and same
        line += ", generates alike with a cache and without" if same else ", its cache is wrong"
    print(line if ok else f"{line}: WRONG", flush=True)
    return ok


def main(folders: Sequence[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    wrong = [folder for folder in folders if not check(Path(folder))]
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
