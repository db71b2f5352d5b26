"""What one Linen module is told of its sizes, and telling it."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from flaxslim import _config
from flaxslim.errors import LayoutError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Argument:
    """An argument of a module's call with an entry for each head, of which some are taken.

    It has as many as the dense model has heads; or, where `dense` is None, as many as the layer
    that it comes from, and all alike, so that one is taken for all.
    """

    name: str
    axis: int
    heads: np.ndarray
    dense: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """What one module is told.

    Attributes:
      dims: of its kernel, the sizes that change; None for the others. Its features follow.
      attributes: names (or "config.key") and values to be set.
      early: set them before the module's setup, which makes tensors by them; else after it, so
        that what it makes for others keeps its size.
      empty: its kernel has no entries, which no initialiser of Linen can draw.
      arguments: what is to be cut out of the arguments of its call.
      outputs, inputs: of a site of width 0, which runs with one channel of zeros: the sizes of the
        last dimensions that a layer puts out (none: whichever is empty is to be 1), and which of
        the last dimensions that the second layer reads is emptied again.
      wrong: two pairs contradict each other about it. Only if it is run: a spec also names what
        not every model has (the one table of biases that all layers of a BEiT may share).
    """

    dims: tuple[int | None, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    early: bool = False
    empty: bool = False
    arguments: tuple[Argument, ...] = ()
    outputs: tuple[int, ...] | None = None
    inputs: int | None = None
    wrong: LayoutError | None = None


def both(a: Told, b: Told, path: str) -> Told:
    """What two sites tell one module."""
    try:
        return _joined(a, b, path)
    except LayoutError as error:
        return Told(wrong=error)


def _joined(a: Told, b: Told, path: str) -> Told:
    def either(x: Any, y: Any, what: str) -> Any:
        if x is None or y is None:
            return y if x is None else x
        if not _same(x, y):
            raise LayoutError(
                f"two pairs of the spec tell one module different {what}",
                path=path,
                seen=f"{x} and {y}",
                mend="give a spec with only those pairs that this model has",
            )
        return x

    def each(xs: Mapping[str, Any], ys: Mapping[str, Any], what: str) -> dict[str, Any]:
        return {name: either(xs.get(name), ys.get(name), what) for name in {**xs, **ys}}

    # Scanned layers have one dimension more, which their modules do not see.
    short, long = sorted((a.dims, b.dims), key=len)
    lacking = (None,) * (len(long) - len(short)) if short else ()
    attributes = each(dict(a.attributes), dict(b.attributes), "sizes")
    ours, theirs = ({x.name: x for x in told.arguments} for told in (a, b))
    return Told(
        dims=either(long, lacking + short or None, "dimensions"),
        attributes=tuple(attributes.items()),
        early=a.early or b.early,
        empty=a.empty or b.empty,
        arguments=tuple(each(ours, theirs, "arguments").values()),
        outputs=either(a.outputs, b.outputs, "outputs"),
        inputs=either(a.inputs, b.inputs, "inputs"),
        wrong=a.wrong or b.wrong,
    )


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Argument):
        return all(np.array_equal(v, vars(y)[name]) for name, v in vars(x).items())
    return np.array_equal(x, y)


# --- telling a module -------------------------------------------------------------------------


def tell(module: Any, told: Told, method: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Before a method runs: the module's sizes, and the arguments of its call."""
    if (told.early or method != "setup") and vars(module).get(_TOLD) is not told:
        set_sizes(module, told)
    if method == "__call__":
        for argument in told.arguments:
            args, kwargs = _cut_out(module, argument, args, kwargs)
        if told.inputs is not None:
            ahead = (slice(None),) * (-told.inputs - 1)
            args = (args[0][(..., slice(0, 0), *ahead)], *args[1:])
    return args, kwargs


_TOLD = "_flaxslim_told"  # on an instance of a module: what it was told already


def set_sizes(module: Any, told: Told) -> None:
    """The module's own fields by what it is told; its kernel is made by them."""
    object.__setattr__(module, _TOLD, told)
    if told.dims:
        _set_features(module, told.dims)
    if told.empty and hasattr(module, "kernel_init"):
        object.__setattr__(module, "kernel_init", linen.initializers.zeros)
    for name, value in told.attributes:
        optional, name = name.endswith("?"), name.removesuffix("?")
        head, _, key = name.partition(".")
        if not hasattr(module, head) or (key and not _config.has(getattr(module, head), key)):
            if optional:
                continue
            raise LayoutError(
                "a module has no such attribute to say its sizes by",
                path=f"{'/'.join(module.path)}.{name}",
                seen=f"a {type(module).__name__}",
                mend="run the layout with a class of the family that it was made for",
            )
        old = getattr(module, head)
        if key:
            if _config.read(old, key) == value:
                continue
            value = _with(old, key, value)
        # A Linen module is frozen but for setup; each trace makes its submodules anew.
        object.__setattr__(module, head, value)


def _with(cfg: Any, key: str, value: Any) -> Any:
    """A shallow copy of a config with one key set: `_config.replace` copies all of it."""
    if isinstance(cfg, Mapping) or dataclasses.is_dataclass(cfg):
        return _config.replace(cfg, {key: value})
    new = copy.copy(cfg)
    setattr(new, key, value)
    return new


def _set_features(module: Any, dims: tuple[int | None, ...]) -> None:
    """`features` (or the `shape` of an einsum layer) by the sizes of the kernel that change."""
    if isinstance(module, linen.BatchNorm):
        return  # it takes its size from its input
    name = "features" if hasattr(module, "features") else "shape"
    old = getattr(module, name, None)
    if isinstance(old, int):
        new = next((dim for dim in dims if dim is not None), old)
    elif isinstance(old, tuple | list) and old:
        tail = dims[-len(old) :]
        new = tuple(a if b is None else b for a, b in zip(old, tail, strict=True))
    else:
        raise LayoutError(
            "a layer has neither features nor a shape to say its sizes by",
            path="/".join(module.path),
            seen=f"a {type(module).__name__}",
            mend="say in the spec what its class calls them: "
            'Pair(modules={"layer": {"hidden": "f"}})',
        )
    object.__setattr__(module, name, new)


def _cut_out(module: Any, argument: Argument, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with the heads that are left of one of them."""
    names = _parameters(type(module))
    if argument.name in kwargs:
        kwargs = {**kwargs, argument.name: _heads_of(kwargs[argument.name], argument, module)}
    elif argument.name in names and (at := names.index(argument.name)) < len(args):
        args = (*args[:at], _heads_of(args[at], argument, module), *args[at + 1 :])
    return args, kwargs


@functools.cache
def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.__call__).parameters)[1:]  # without self


def _heads_of(x: Any, argument: Argument, module: Any) -> Any:
    if x is None or (argument.dense is None and x.shape[argument.axis] == 1):
        return x
    if argument.dense is not None and x.shape[argument.axis] != argument.dense:
        raise LayoutError(
            f"the argument {argument.name} has an entry for another number of heads",
            path="/".join(module.path),
            seen=f"shape {tuple(x.shape)}",
            expected=f"{argument.dense} along axis {argument.axis}: all heads of the dense model, "
            "of which those that are left are taken",
            mend="pass a mask for the heads as the config counts them",
        )
    # Where all are alike the layer that they come from may have fewer.
    return _taken(x, np.minimum(argument.heads, x.shape[argument.axis] - 1), argument.axis)


def _taken(x: Any, index: np.ndarray, axis: int) -> Any:
    """Indices along an axis, run by run.

    Of a mask of ones XLA sees that slices are ones too, and leaves it out; behind a gather it
    computes the whole attention in one slow loop.
    """
    runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
    parts = [jax.lax.slice_in_dim(x, run[0], run[-1] + 1, axis=axis) for run in runs if len(run)]
    return jnp.concatenate(parts, axis) if parts else jax.lax.slice_in_dim(x, 0, 0, axis=axis)
