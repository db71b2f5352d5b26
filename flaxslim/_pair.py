"""`Pair`: what one place in the network looks like, as data.

It names tensors and axes and holds no code.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.core import FrozenDict

from flaxslim import _activation
from flaxslim._axes import STACK, WINDOW, Axes
from flaxslim._config import Width
from flaxslim.errors import AxisPatternError, SpecError

_MAPPINGS = ("readers", "also", "tables", "sizes", "modules", "arguments")

# What a field of a Pair may hold, by its annotation; and what to type, where that is not plain.
_KINDS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    str | None: lambda value: value is None or isinstance(value, str),
    str | tuple[str, ...]: lambda value: isinstance(value, str) or _texts(value),
    str | tuple[str, ...] | None: lambda value: (
        value is None or isinstance(value, str) or _texts(value)
    ),
    tuple[int, ...]: lambda value: (
        isinstance(value, tuple) and all(type(part) is int for part in value)
    ),
    bool: lambda value: isinstance(value, bool),
    Mapping[str, str]: lambda value: _maps(value, str),
    Mapping[str, Mapping[str, str]]: lambda value: (
        _maps(value, Mapping) and all(_maps(inner, str) for inner in value.values())
    ),
}
_EXAMPLES = {
    "first": '"up_proj" or ("gate_proj", "up_proj")',
    "first_bias": '"up_bias"',
    "width": '"intermediate_size" or "4*hidden_size"',
    "group_width": '"num_key_value_heads"',
    "readers": '{"gate_head": "f o"}',
    "also": '{"query": "d (h k)"}',
    "tables": '{"relative_attention_bias/embedding": "b h"}',
    "sizes": '{"k": "hidden_size/num_attention_heads"}',
    "modules": '{"self": {"config.num_attention_heads": "h"}}',
    "arguments": '{"self": {"head_mask": "h"}}',
    "parts": "(2,)",
}


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) for text in value)


def _maps(value: Any, to: type) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(child, to) for key, child in value.items()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What one place in the network looks like: `y = act(x @ first) @ second`.

    Attributes:
      first: the layer (or layers) whose outputs are the hidden channels, by path below `at`. In
        a gated pair the one under the activation comes first: `("gate_proj", "up_proj")`. A
        layer is a module with a kernel and perhaps a bias, or a tensor itself. Of attention it is
        the value projection: a head puts out what it reads there.
      second: the layer that reads the hidden channels.
      at: the layer root, a path such as `"encoder/layer/{i}"`. `{i}` stands for one name or
        part of one, `**` for any number of names. It may begin anywhere in the tree, or only at
        its top if it starts with "/".
      first_axes, second_axes: the axis patterns of the kernels. Those of the biases follow. `d` is
        the embedding on either side; `l` and `e` are stacked layers and experts, each with
        channels of its own.
      first_bias, second_bias: the biases, where they are not `<layer>/bias`. One that may be
        absent ends in "?".
      width: the config key of the number of channels, if there is one, or an expression over
        keys: `"n_inner or 4*n_embd"` (what the None of a key stands for),
        `"mlp_ratio*hidden_size"`, `"hidden_size/num_attention_heads"`.
      readers: other layers that read the hidden channels, with their patterns:
        `{"gate_head": "f o"}`. They are cut along, and a channel that nothing reads is one that
        none of them reads. Nothing but zero is ever folded into a bias then.
      activation: its name in Hugging Face's configs ("relu"), where a config holds it
        ("config.hidden_act"), with "jax." in front of either if it is that of `jax.nn` ("jax.gelu",
        the approximate one); or an expression in `x` ("x * tanh(log1p(exp(x)))"): `+ - * / **`, one
        comparison at a time, and functions by their names in JAX. It is never run as Python.
      gated: the hidden value is act(gate) * up. Gate and up are two first layers, or the two
        halves of one whose pattern has a factor 2.
      axis: the prunable axis in the patterns.
      kernel, bias: what the tensors of a layer are called.
      config, tree: the part of a composite's config that the pair belongs to ("decoder."), and
        the subtree of that part.
      optional: not every model of the family has it, so its absence is not worth a word.

    For attention heads:
      also: layers that are cut along and have no say, with their patterns:
        `{"query": "d (h k)", "key": "d (g k)"}`.
      tables: tensors that may be there and are cut along, such as a relative position bias per
        head: `{"relative_attention_bias/embedding": "b h"}`. One that fewer sites own than use
        it is shared by its stack, whose sites then keep the same heads. A name may begin with
        another collection of Linen, in which the layer root has the same path below "params":
        `{"batch_stats:bn/mean": "f"}`. Of channels that have some (or `also`), which may change
        what the second layer reads, only those go that nothing reads.
      parts: of a fused first layer (a literal factor in its pattern), which parts are the hidden
        value: `(2,)` of `"d (3 h k)"`.
      group, group_width: the axis of key/value groups in the patterns, and its config key.
      sizes: config expressions of axes whose size does not follow from the shapes, such as
        `{"k": "hidden_size/num_attention_heads"}`.
      fold_unless: a config key (or `key=value`) under which a head with constant values is not
        constant, since its attention weights do not sum to one. Nor is it where no config says it,
        but for a key that ends in "?", which a class may lack.
      scaled_by: the same for a class that scales heads by their number, so that none can go, nor
        where no config says it: `"query_pre_attn_norm=*div_num_heads"`. Values may have wildcards;
        their case is no matter.

    For the classes that run it (docs/how/layouts.md):
      modules: what the module at a path below `at` calls its sizes:
        `{"self": {"config.num_attention_heads": "h", "config.hidden_size": "(h k)"}}`. A name
        that it may lack ends in "?".
      arguments: arguments of a module's call that carry the axis: `{"self": {"head_mask": "h"}}`.
        A pattern with a 1 in its place: what one layer hands to the next, the same for all heads.
      fixed: the stock class ties the width to other sizes, so that only a layout can change it.
      ragged: the class can carry groups of unequal size.

    >>> print(Pair(first="Dense_0", second="Dense_1", activation="relu", width="hidden"))
    Dense_0 "d f" -> relu -> Dense_1 "f d", width hidden
    """

    first: str | tuple[str, ...]
    second: str
    at: str = ""
    first_axes: str = "d f"
    second_axes: str = "f d"
    first_bias: str | tuple[str, ...] | None = None
    second_bias: str | None = None
    readers: Mapping[str, str] = FrozenDict()
    width: str | None = None
    activation: str | None = None
    gated: bool = False
    axis: str = "f"
    kernel: str = "kernel"
    bias: str = "bias"
    config: str = ""
    tree: str = ""
    optional: bool = False
    also: Mapping[str, str] = FrozenDict()
    tables: Mapping[str, str] = FrozenDict()
    parts: tuple[int, ...] = ()
    group: str | None = None
    group_width: str | None = None
    sizes: Mapping[str, str] = FrozenDict()
    fold_unless: str | None = None
    scaled_by: str | None = None
    modules: Mapping[str, Mapping[str, str]] = FrozenDict()
    arguments: Mapping[str, Mapping[str, str]] = FrozenDict()
    fixed: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        for name in ("first", "first_bias", "parts"):
            if isinstance(value := getattr(self, name), list):  # or a Pair could not be hashed
                object.__setattr__(self, name, tuple(value))
        self._check_kinds()
        for name in _MAPPINGS:
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        for width in (self.width, self.group_width, *self.sizes.values()):
            if width is not None:
                Width(expression=width)
        _activation.check(self.activation)
        self._check_axes()
        self._check_readers()
        self._check_modules()
        if not self.firsts or not all(self.layers):
            raise SpecError(
                "a pair needs a first and a second layer",
                seen=f"first={self.first!r}, second={self.second!r}",
                expected='first="up", second="down"',
            )
        if self.first_bias is not None and len(as_tuple(self.first_bias)) != len(self.firsts):
            raise AxisPatternError(
                "as many first biases as first layers are needed",
                seen=f"first={self.first!r}, first_bias={self.first_bias!r}",
            )

    def _check_kinds(self) -> None:
        for field in dataclasses.fields(self):
            value, plain = getattr(self, field.name), "True" if field.type is bool else '"..."'
            if not _KINDS[field.type](value):
                raise SpecError(
                    f"{field.name}= of a Pair is of the wrong kind",
                    seen=f"{field.name}={value!r}",
                    expected=f"{field.name}={_EXAMPLES.get(field.name, plain)}",
                )

    def _check_axes(self) -> None:
        for pattern in (self.second_axes, *self.also.values(), *self.tables.values()):
            self.axis_in(pattern)
        if self.group is None or self.group not in Axes(self.first_axes).names:
            self.axis_in(self.first_axes)
        halves = any(2 in dim for dim in Axes(self.first_axes).dimensions)
        if self.gated and len(self.firsts) != 2 and not (len(self.firsts) == 1 and halves):
            raise AxisPatternError(
                "a gated pair needs a gate and an up layer",
                seen=f"first={self.first!r} with pattern {self.first_axes!r}",
                expected="first=(gate, up), or one fused layer with a factor 2 in its pattern",
            )
        self._check_parts()

    def _check_parts(self) -> None:
        count = next((f for f in Axes(self.first_axes).factors if isinstance(f, int)), 0)
        if self.parts and not all(0 <= part < count for part in self.parts):
            raise AxisPatternError(
                "the first layer has no such part",
                seen=f"parts={self.parts} of pattern {self.first_axes!r}",
                expected="a literal factor in the pattern, and parts counted from 0",
            )
        if self.parts and self.gated and len(self.parts) != 2:
            raise AxisPatternError(
                "a fused layer that is gated has two parts: the gate and up",
                seen=f"parts={self.parts}",
                expected="parts=(0, 1), or none, which means the same",
            )
        whole = self.gated or count in (0, 1, *Axes(self.second_axes).factors)  # or: shards
        if self.activation and not self.parts and not whole:
            raise AxisPatternError(
                "which part of the fused first layer has the activation?",
                seen=f"pattern {self.first_axes!r}, activation={self.activation!r}",
                expected="gated=True (act(gate) * up), or parts=(2,): what is the hidden value, "
                "counted from 0",
            )

    def _check_readers(self) -> None:
        for name, pattern in self.readers.items():
            if self.axis not in Axes(pattern).names:
                raise AxisPatternError(
                    f"what reads the channels has no axis {self.axis!r}",
                    seen=f"readers={{{name!r}: {pattern!r}}}",
                )
            if name in (*self.firsts, self.second, *self.also):
                raise SpecError(
                    "a reader is a layer beside the others of its pair, and cannot be one of them",
                    seen=f"{name!r} in readers=, and in first=, second= or also=",
                )

    def _check_modules(self) -> None:
        others = (*self.readers.values(), *self.also.values(), *self.tables.values())
        patterns = (self.first_axes, self.second_axes, *others)
        known = {name for pattern in patterns for name in Axes(pattern).names}
        for attributes in self.modules.values():
            for name, size in attributes.items():
                if size != "h/g" and (unknown := {*Axes(size).names} - known):
                    raise AxisPatternError(
                        f"the size that modules= gives {name!r} has an unknown axis",
                        seen=", ".join(sorted(unknown)),
                        expected='a product of axes of the pair, such as "h" or "(h k)", or "h/g"',
                        near=sorted(known),
                    )

    def axis_in(self, pattern: str) -> str:
        """The axis of a pattern along which it is cut: that of the channels, or of their groups."""
        names = Axes(pattern).names
        if self.axis in names:
            return self.axis
        if self.group is not None and self.group in names:
            return self.group
        raise AxisPatternError(
            f"the pattern has no axis {self.axis!r}, which the pair prunes", seen=repr(pattern)
        )

    @property
    def between(self) -> bool:
        """Whether it names tensors that may change what the first layers hand to the second.

        Of attention such are queries, keys, and biases of the scores: no part of the values.
        """
        return self.axis != "h" and bool(self.also or self.tables)

    @property
    def sized_by_config(self) -> bool:
        """Whether the size of an axis follows from the config alone, so that none can be told."""
        return any(Width(expression=expression).keyed for expression in self.sizes.values())

    @property
    def unit(self) -> str:
        """What one of those that are pruned is called, in the plural."""
        return "heads" if self.axis == "h" else "channels"

    @property
    def firsts(self) -> tuple[str, ...]:
        return as_tuple(self.first)

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that must be there, each once."""
        return tuple(dict.fromkeys((*self.firsts, *self.also, self.second, *self.readers)))

    @property
    def inner(self) -> frozenset[str]:
        """The axes over which the second layer sums: the channels, and what is inside of them."""
        shared = {*Axes(self.first_axes).names} & {*Axes(self.second_axes).names}
        own = {self.axis, *filter(None, (self.group,))}
        return frozenset((shared | own) - {"d", *STACK, *WINDOW})

    @property
    def width_expression(self) -> Width | None:
        return None if self.width is None else Width(expression=self.width, prefix=self.config)

    @property
    def group_expression(self) -> Width | None:
        if self.group_width is None:
            return None
        return Width(expression=self.group_width, prefix=self.config)

    def __str__(self) -> str:
        first = " * ".join(f'{name} "{self.first_axes}"' for name in self.firsts)
        act = f"{self.activation} -> " if self.activation else ""
        width = f", width {self.width_expression}" if self.width else ""
        place = "/".join(filter(None, (self.tree, self.at)))
        at = f"{place}: " if place else ""
        gated = ", gated" if self.gated else ""
        also = f", with {', '.join(self.also)}" if self.also else ""
        read = f", also read by {', '.join(self.readers)}" if self.readers else ""
        return f'{at}{first} -> {act}{self.second} "{self.second_axes}"{read}{also}{gated}{width}'


def measure(expression: str, sizes: Mapping[str, int], groups: Sequence[int] = ()) -> Any:
    """What a module is to be told: a product of axes, or how many heads a group has.

    The latter, "h/g", is an array where groups differ.

    >>> measure("(h k)", {"h": 3, "k": 8}), measure("h/g", {}, (2, 2)), measure("h/g", {}, (2, 1))
    (24, 2, array([2, 1]))
    """
    if expression == "h/g":
        return groups[0] if len({*groups}) == 1 else np.asarray(groups, int)
    factors = Axes(expression).factors
    return _product(f if isinstance(f, int) else sizes[f] for f in factors)


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _product(shape: Iterable[int]) -> int:
    return int(np.prod(tuple(shape), dtype=np.int64))
