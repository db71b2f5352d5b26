"""Sizes in a config object: read them, and make a resized copy of the same kind.

A config may be a Hugging Face `PretrainedConfig`, a dict, a dataclass (frozen or not), or any
object with attributes such as `ml_collections.ConfigDict`. Keys may be nested
(`"text_config.intermediate_size"`).

A *width* is a short expression over config keys, because not every family has a plain key::

    intermediate_size                a key
    n_inner or 4*n_embd              a key, and what its None (or absence) stands for
    mlp_ratio*hidden_size            a factor; only multiples of hidden_size can be said
    intermediate_dim/2               KerasHub's Gemma, whose key counts gate and up together
    swiglu(mlp_ratio*hidden_size)    DINOv2: two thirds of it, rounded up to a multiple of 8
    4*hidden_size                    hard-coded in the model: no config can say another width
    hidden_size/num_attention_heads  a size that follows from others, such as that of a head

What no stock config can say (layers that differ, fewer heads than hidden_size stands for) is
recorded under keys of its own: see `flaxslim._record`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxslim._config_kinds import keys as keys
from flaxslim._config_kinds import stale, with_values
from flaxslim.errors import ConfigError, nearest

_MISSING = object()
_NUMBERS = (int, float, np.integer, np.floating)


def _child(cfg: Any, name: str) -> Any:
    if isinstance(cfg, Mapping):
        return cfg.get(name, _MISSING)
    return getattr(cfg, name, _MISSING)


def has(cfg: Any, key: str) -> bool:
    """Whether the config has a (nested) key, be its value None.

    >>> has({"text_config": {"d_ff": None}}, "text_config.d_ff")
    True
    """
    for name in key.split("."):
        cfg = _child(cfg, name)
        if cfg is _MISSING:
            return False
    return True


def read(cfg: Any, key: str) -> Any:
    """The value of a (nested) key; `ConfigError` if it is absent.

    >>> read({"text_config": {"d_ff": 64}}, "text_config.d_ff")
    64
    """
    for depth, name in enumerate(key.split(".")):
        parent, cfg = cfg, _child(cfg, name)
        if cfg is _MISSING:
            raise ConfigError(
                f"the config has no key {key!r}",
                path=".".join(key.split(".")[:depth]) or None,
                seen=f"a {type(parent).__name__} with {len(keys(parent))} keys",
                near=nearest(name, keys(parent)),
                mend="name the key that holds the width in the spec (Pair(width=...)), "
                "or pass the config that belongs to these parameters",
            )
    return cfg


def replace(cfg: Any, values: Mapping[str, Any]) -> Any:
    """A new config of the same kind with some (nested) keys set; the old one is untouched.

    >>> replace({"d_ff": 64, "text": {"d_ff": 32}}, {"text.d_ff": 8})
    {'d_ff': 64, 'text': {'d_ff': 8}}
    """
    own: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        head, _, tail = key.partition(".")
        if tail:
            below.setdefault(head, {})[tail] = value
        else:
            own[head] = value
    for head, inner in below.items():
        own[head] = replace(own[head] if head in own else read(cfg, head), inner)
    return with_values(cfg, own) if own else cfg


def computed(cfg: Any, new: Any, values: Mapping[str, Any]) -> list[str]:
    """Fields of a config that were computed from those that were replaced, in words."""
    found = [f"{name} = {kept!r} (anew: {anew!r})" for name, kept, anew in stale(cfg, new, values)]
    for head in dict.fromkeys(key.partition(".")[0] for key in values if "." in key):
        parts = read(cfg, head), read(new, head)
        inner = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{head}.")}
        found += [f"{head}.{told}" for told in computed(*parts, inner)]
    return [*dict.fromkeys(found)]  # references are found at each depth


def model_type(cfg: Any) -> str | None:
    """The Hugging Face `model_type`, or None.

    >>> model_type({"model_type": "bert"})
    'bert'
    """
    value = _child(cfg, "model_type")
    return value if isinstance(value, str) and value else None


_FACTOR = r"[A-Za-z_][\w.]*|\d+"
_TERM = rf"({_FACTOR})(?:([*/])({_FACTOR}))?"
_WIDTH = re.compile(rf"(swiglu\()?{_TERM}(?(1)\))(?: or {_TERM})?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Term:
    """`key`, `key*other` or `key/other`; each may be a number."""

    key: str
    operator: str | None
    other: str | None

    def read(self, cfg: Any, prefix: str, value: Any) -> Any:
        """What it comes to, given the value of `key`."""
        if self.other is None:
            return value
        other = _positive(cfg, self.other, prefix)
        if self.operator == "*":
            return value * other
        if value % other:
            raise ConfigError(
                f"{prefix}{self.key} is not a multiple of {prefix}{self.other}",
                path=f"{prefix}{self.key}",
                seen=f"{value} / {other}",
                mend="correct the config",
            )
        return value // other


def _number(cfg: Any, name: str, prefix: str) -> Any:
    return int(name) if name.isdigit() else read(cfg, prefix + name)


def _positive(cfg: Any, name: str, prefix: str) -> Any:
    """A factor that a width follows from."""
    value = _number(cfg, name, prefix)
    if not _is_number(value) or value <= 0:
        raise ConfigError(
            "a size in the config is not a positive number",
            path=prefix + name,
            seen=repr(value),
            mend="set it to that of the model",
        )
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, int | np.integer):
        return not isinstance(value, bool)  # `isfinite` makes a float of it, which may be too large
    return isinstance(value, _NUMBERS) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width:
    """A width expression; `prefix` is where a part of a composite has its config ("decoder.")."""

    expression: str
    prefix: str = ""

    def __post_init__(self) -> None:
        if not _WIDTH.fullmatch(self.expression):
            raise ConfigError(
                "cannot read the width of a pair",
                seen=repr(self.expression),
                expected="a config key, 'key or 4*other', 'key*other', 'key/other', or '4*other'",
            )

    def __str__(self) -> str:
        return self.prefix + self.expression

    @property
    def _parts(self) -> tuple[bool, _Term, _Term | None]:
        match = _WIDTH.fullmatch(self.expression)
        assert match is not None  # checked above
        swiglu, *parts = match.groups()
        first, second = (
            _Term(key=key, operator=operator, other=other) if key else None
            for key, operator, other in (parts[:3], parts[3:])
        )
        assert first is not None
        return bool(swiglu), first, second

    @property
    def keyed(self) -> bool:
        """Whether it names a config key at all; "64" is 64 without one."""
        return re.search(r"[A-Za-z_]", self.expression) is not None

    @property
    def key(self) -> str | None:
        """The config key that is written; None if the width is hard-coded in the model."""
        name = self._parts[1].key
        return None if name.isdigit() else self.prefix + name

    def read(self, cfg: Any, own: Mapping[str, Any] | None = None) -> int:
        """The width that the config says; `ConfigError` if it says none.

        `own` are values of one layer alone, by key without the prefix, which go before.
        """
        swiglu, first, second = self._parts
        value = self._value(cfg, first, second is not None, own or {})
        if value is None and second is not None:
            return int(second.read(cfg, self.prefix, _positive(cfg, second.key, self.prefix)))
        if not _is_number(value):
            raise ConfigError(
                "the config's width is not a number",
                path=self.prefix + first.key,
                seen=repr(value),
                mend="set it to the width of the tensors",
            )
        value = first.read(cfg, self.prefix, value)
        if swiglu:  # Dinov2SwiGLUFFN of transformers
            return (int(int(value) * 2 / 3) + 7) // 8 * 8
        return int(value)

    def _value(self, cfg: Any, term: _Term, optional: bool, own: Mapping[str, Any]) -> Any:
        if term.key in own:
            return own[term.key]
        if optional and not has(cfg, self.prefix + term.key):
            return None
        return _number(cfg, term.key, self.prefix)

    @property
    def label(self) -> str:
        """Its name: the key that is written, or the whole where a class hard-codes it."""
        return self.key or str(self)

    def step(self, cfg: Any) -> int:
        """The config can only say multiples of this."""
        swiglu, first, _ = self._parts
        if swiglu:
            return 8
        if first.operator != "*" or first.other is None:
            return 1
        return int(_positive(cfg, first.other, self.prefix))

    def write(self, cfg: Any, width: int) -> dict[str, Any]:
        """The keys and values by which `cfg` says `width`, a multiple of `step`."""
        swiglu, first, _ = self._parts
        assert self.key is not None
        if first.other is None:
            return {self.key: width}
        other = int(_positive(cfg, first.other, self.prefix))
        if first.operator == "/":
            return {self.key: width * other}
        # 1.5 * width rounded down or up still gives `width`, a multiple of 8, by `read`.
        return {self.key: 1.5 * width / other if swiglu else width // other}
