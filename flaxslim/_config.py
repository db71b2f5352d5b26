"""Sizes in a config object: read them, and make a resized copy of the same kind.

A config may be a Hugging Face `PretrainedConfig`, a dict, a dataclass (frozen or not), or any
object with attributes such as `ml_collections.ConfigDict`. Keys may be nested
(`"text_config.intermediate_size"`).

A *width* is a short expression over config keys, because not every family has a plain key::

    intermediate_size              the key itself
    n_inner or 4*n_embd            a key, and what its None stands for
    mlp_ratio*hidden_size          a factor; only multiples of hidden_size can be said
    swiglu(mlp_ratio*hidden_size)  DINOv2: two thirds of it, rounded up to a multiple of 8
    4*hidden_size                  hard-coded in the model: no config can say another width
"""

import copy
import dataclasses
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from flaxslim._errors import ConfigError, nearest

_MISSING = object()
_NUMBERS = (int, float, np.integer, np.floating)


def _child(cfg: Any, name: str) -> Any:
    if isinstance(cfg, Mapping):
        return cfg.get(name, _MISSING)
    return getattr(cfg, name, _MISSING)


def keys(cfg: Any) -> list[str]:
    """The names in a config, for messages."""
    if isinstance(cfg, Mapping):
        return [str(key) for key in cfg]
    return [key for key in getattr(cfg, "__dict__", {}) if not key.startswith("_")]


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
    for key, value in values.items():
        head, _, tail = key.partition(".")
        if tail:
            value = replace(read(cfg, head), {tail: value})
        cfg = _with(cfg, head, value)
    return cfg


def _with(cfg: Any, name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return dataclasses.replace(cfg, **{name: value})
    if isinstance(cfg, MutableMapping) and not hasattr(cfg, "unlock"):
        # dict and its subclasses; a ConfigDict has `unlock` and is copied below.
        new = copy.copy(cfg)
        new[name] = value
        return new
    if isinstance(cfg, Mapping) and not hasattr(cfg, "unlock"):
        return type(cfg)({**cfg, name: value})  # pyright: ignore[reportCallIssue]
    new = copy.deepcopy(cfg)
    setattr(new, name, value)
    return new


def model_type(cfg: Any) -> str | None:
    """The Hugging Face `model_type`, or None.

    >>> model_type({"model_type": "bert"})
    'bert'
    """
    value = _child(cfg, "model_type")
    return value if isinstance(value, str) and value else None


_FACTOR = r"[A-Za-z_][\w.]*|\d+"
_WIDTH = re.compile(
    rf"(?P<swiglu>swiglu\()?(?P<key>{_FACTOR})(?:\*(?P<times>{_FACTOR}))?(?(swiglu)\))"
    rf"(?: or (?P<n>{_FACTOR})\*(?P<m>{_FACTOR}))?"
)


def _number(cfg: Any, name: str, prefix: str) -> Any:
    return int(name) if name.isdigit() else read(cfg, prefix + name)


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
                expected="a config key, 'key or 4*other', 'key*other', or '4*other'",
            )

    def __str__(self) -> str:
        return self.prefix + self.expression

    @property
    def _parts(self) -> dict[str, str | None]:
        match = _WIDTH.fullmatch(self.expression)
        assert match is not None  # checked above
        return match.groupdict()

    @property
    def key(self) -> str | None:
        """The config key that is written; None if the width is hard-coded in the model."""
        name = self._parts["key"] or ""
        return None if name.isdigit() else self.prefix + name

    def read(self, cfg: Any) -> int:
        """The width that the config says; `ConfigError` if it says none."""
        p = self._parts
        assert p["key"] is not None
        value = _number(cfg, p["key"], self.prefix)
        if value is None and p["n"] and p["m"]:
            return _number(cfg, p["n"], self.prefix) * _number(cfg, p["m"], self.prefix)
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise ConfigError(
                "the config's width is not a number",
                path=self.prefix + p["key"],
                seen=repr(value),
                mend="set it to the width of the tensors",
            )
        if p["times"]:
            value = value * _number(cfg, p["times"], self.prefix)
        if p["swiglu"]:  # Dinov2SwiGLUFFN of transformers
            return (int(int(value) * 2 / 3) + 7) // 8 * 8
        return int(value)

    def step(self, cfg: Any) -> int:
        """The config can only say multiples of this."""
        p = self._parts
        if p["swiglu"]:
            return 8
        return int(_number(cfg, p["times"], self.prefix)) if p["times"] else 1

    def write(self, cfg: Any, width: int) -> dict[str, Any]:
        """The keys and values by which `cfg` says `width`, a multiple of `step`."""
        p = self._parts
        assert self.key is not None
        if not p["times"]:
            return {self.key: width}
        times = int(_number(cfg, p["times"], self.prefix))
        # 1.5 * width rounded down or up still gives `width`, a multiple of 8, by `read`.
        return {self.key: 1.5 * width / times if p["swiglu"] else width // times}
