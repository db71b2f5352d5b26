"""A config object -> the text of a config.json."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxslim.errors import ConfigError

_DTYPES = ("dtype", "torch_dtype")


def config_text(cfg: Any, dtype: Any = None) -> str:
    """The JSON of a config, with `dtype` as the dtype of its weights if one is given.

    Numpy scalars become Python's and dtypes their names. Raises `ConfigError` for anything else
    that is no plain data.

    >>> print(config_text({"d_ff": np.int64(3)}).rstrip())
    {
      "d_ff": 3
    }
    """
    values = {key: _plain(value, str(key)) for key, value in _values(cfg).items()}
    if dtype is not None:
        # "torch_dtype" is the older spelling, which all releases of transformers 4 read.
        if not any(key in values for key in _DTYPES):
            values["torch_dtype"] = None
        values = _with_dtype(values, np.dtype(dtype).name)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _with_dtype(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values with another dtype, also of the parts of a composite."""
    return {
        key: name
        if key in _DTYPES
        else _with_dtype(value, name)
        if isinstance(value, dict)
        else value
        for key, value in values.items()
    }


def _values(cfg: Any) -> dict[Any, Any]:
    if isinstance(cfg, Mapping):
        return dict(cfg)
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return dataclasses.asdict(cfg)
    # A class has the same methods, and no values.
    known: Any = None if isinstance(cfg, type) else cfg
    if hasattr(known, "to_diff_dict"):  # a PretrainedConfig
        # One of no family writes its class's model_type, an empty one.
        return {**known.to_diff_dict(), "model_type": known.model_type}
    if hasattr(known, "to_dict"):
        return dict(known.to_dict())
    raise ConfigError(
        "this config cannot be written as JSON",
        seen=type(cfg).__name__,
        expected="a PretrainedConfig, a dict, a dataclass instance, or an object with to_dict()",
        mend="pass a dict of its values",
    )


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            name.item() if isinstance(name, np.generic) else name: _plain(child, f"{key}.{name}")
            for name, child in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(child, f"{key}[{index}]") for index, child in enumerate(value)]
    if isinstance(value, np.generic):
        return _plain(value.item(), key)
    name = _dtype_name(value)
    if name is None:
        raise ConfigError(
            "a value of the config cannot be written as JSON",
            path=key,
            seen=type(value).__name__,
            expected="a number, a string, None, a dtype, or lists and dicts of these",
            mend="replace the value, or leave it out",
        )
    return name


def _dtype_name(value: Any) -> str | None:
    """ "float32" for np.float32, jnp.float32 and np.dtype("float32"); None for no dtype."""
    if isinstance(value, type) and issubclass(value, np.generic):
        return np.dtype(value).name
    # jnp.float32 is a class that has a dtype; an array has one too, and is none.
    dtype = getattr(value, "dtype", None) if isinstance(value, type) else value
    return dtype.name if isinstance(dtype, np.dtype) else None
