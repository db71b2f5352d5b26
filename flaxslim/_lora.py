"""Low-rank matrices beside a kernel: `W + A B`, of which the side that carries the axis is cut.

Of a first layer, whose outputs are the channels, that is B; of a second layer it is A. The names
are those of flax's `nnx.LoRA`, of qwix and tunix (`kernel_lora_a`) and of PEFT (`lora_A/weight`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flaxslim._axes import Axes
from flaxslim._errors import AxisPatternError
from flaxslim._spec import Pair, Tensor

_NAME = re.compile(r"(?:lora/)?(?:\w+_)?lora_?(?P<side>[abAB])(?:/(?:kernel|weight))?")


def side(name: str) -> str | None:
    """ "a" or "b" for the name of a low-rank matrix, by path from the folder of its kernel.

    >>> side("kernel_lora_a"), side("lora_B/weight"), side("bias")
    ('a', 'b', None)
    """
    match = _NAME.fullmatch(name)
    return match["side"].lower() if match else None


def matrices(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that may be low-rank matrices, by path; most trees have none."""
    return {p: tuple(x.shape) for p, x in leaves.items() if "lora" in p.lower()}


def low_rank(
    kernel: Tensor, pair: Pair, shapes: Mapping[str, tuple[int, ...]], *, reads: bool
) -> Iterator[Tensor]:
    """The matrices beside a kernel that have the axis of the pair.

    `reads`: the channels are what the kernel reads (a second layer), not what it writes.
    """
    if kernel.axes.stack:  # adapters of stacked layers have no settled shape
        return
    folder = kernel.path.rpartition("/")[0] + "/"
    for path, shape in shapes.items():
        if not path.startswith(folder) or side(path.removeprefix(folder)) != "ba"[reads]:
            continue
        if (axes := axes_of(kernel, pair, shape, reads=reads)) is not None:
            yield Tensor(path=path, axes=axes, shape=shape)


def axes_of(kernel: Tensor, pair: Pair, shape: tuple[int, ...], *, reads: bool) -> Axes | None:
    """The pattern of such a matrix: its rank `r` beside the dimensions of the axis.

    These may be one dimension. None if the shape does not fit.
    """
    axis = pair.axis_in(kernel.axes.pattern)
    own, sizes = kernel.axes.only({axis, *pair.inner}), kernel.axes.sizes(kernel.shape)
    known = tuple((name, sizes[name]) for name in own.names if name != axis)
    joined = f"({' '.join(map(str, own.factors))})" if len(own.factors) > 1 else own.pattern
    for order in ("{} r", "r {}") if reads else ("r {}", "{} r"):  # Flax's, then PyTorch's
        for inside in (own.pattern, joined):
            axes = Axes(order.format(inside), known)
            try:
                if axes.sizes(shape)[axis] == sizes[axis]:
                    return axes
            except AxisPatternError:
                continue
    return None
