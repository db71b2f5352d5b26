"""The section of a model card that says what was cut."""

import re
from collections.abc import Mapping
from typing import Any

from flaxslim import _record

HEADING = "## What flaxslim cut"
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING = re.compile(r"#{1,2} ")


def with_section(card: str, body: str) -> str:
    """The card with the section replaced where it stands, or added at its end.

    >>> print(with_section("# Model", "Half of it."))
    # Model
    <BLANKLINE>
    ## What flaxslim cut
    <BLANKLINE>
    Half of it.
    <BLANKLINE>
    """
    before, after, part, fenced = [], [], "before", False
    for line in card.splitlines():
        if not fenced and line.strip() == HEADING:
            part = "section"
        elif part == "section" and not fenced and _HEADING.match(line):
            part = "after"
        if _FENCE.match(line):
            fenced = not fenced
        if part == "before":
            before.append(line)
        elif part == "after":
            after.append(line)
    blocks = ["\n".join(before).rstrip(), HEADING, body.strip(), "\n".join(after).rstrip()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def section(record: Mapping[str, Any] | None) -> str:
    """What the section says of a record.

    The record's own "card" (Markdown by the caller) if it has one, else its plain values; the
    rest is in the JSON file beside the card.
    """
    if not record:
        return "This checkpoint was written by flaxslim; nothing was recorded about a cut."
    text = record.get("card")
    if not isinstance(text, str):
        rows = [
            f"- {name}: {value}"
            for name, value in record.items()
            if isinstance(value, str | int | float | bool) and "\n" not in str(value)
        ]
        text = "Channels that contribute nothing were removed by flaxslim."
        text += "\n\n" + "\n".join(rows) if rows else ""
    what = "The plan and the proof are" if record.get("proof") else "The record is"
    return text.strip() + f"\n\n{what} in `flaxslim.json`."


def how_to_load(cfg: Any, format: str) -> str:
    """What a card says of a model whose sizes plain config keys cannot say; empty for others.

    `format` is that of the weights: PyTorch has use for its own.
    """
    parts = list(_record.parts(cfg))
    if not any(_record.is_laid_out(cfg, part) for part in parts):
        return ""
    name = _record.class_name(cfg)
    if name is None:
        return _OF_ONES_OWN.strip()
    text = _IN_FLAX.replace("CLASS", f"Flax{name}")
    if format == "torch" and not any(_record.sites(cfg, part) for part in parts):
        text += _IN_TORCH.replace("CLASS", name)
    return text.strip()


_OF_ONES_OWN = """
### How to load it

The layers differ in size, as `config.json` says under `flaxslim_layout`. flaxslim (`pip install
flaxslim`) runs the Linen class that was slimmed, here `YourModule`, at these sizes:

```python
import flaxslim

params, cfg = flaxslim.load("this/folder")
model = flaxslim.module(YourModule, cfg)
```
"""

_IN_FLAX = """
### How to load it

The layers differ in size, as `config.json` says under `per_layer_config` and `flaxslim_layout`. The
stock class runs them if it is loaded by flaxslim (`pip install flaxslim`); by itself it refuses the
shapes. Never pass `ignore_mismatched_sizes`: it makes new, random weights.

```python
import flaxslim
from transformers import CLASS

model = flaxslim.from_pretrained(CLASS, "this/folder")
```
"""

# The same as `load_per_layer` of examples/per_layer_in_torch.py; a test runs both.
_IN_TORCH = """
In PyTorch, with transformers 4.57 or later (5 too), one model at a time; it then runs, trains,
generates and saves as ever:

```python
import contextlib, unittest.mock as mock
from transformers import CLASS, modeling_layers
def load_per_layer(cls, folder, **kwargs):
    def sized(init, count):
        def build(self, config, *args, **named):
            number = count[id(config)] = count.get(id(config), -1) + 1
            shared, sizes = config.__dict__, config.to_dict().get("per_layer_config") or {}
            config.__dict__, config.per_layer_config = dict(shared), None
            config.update({int(n): own for n, own in sizes.items()}.get(number, {}))
            init(self, config, *args, **named)
            config.__dict__ = shared
        return build
    with contextlib.ExitStack() as stack:
        for layer in modeling_layers.GradientCheckpointingLayer.__subclasses__():
            stack.enter_context(mock.patch.object(layer, "__init__", sized(layer.__init__, {})))
        return cls.from_pretrained(folder, **kwargs)
model = load_per_layer(CLASS, "this/folder")
```
"""
