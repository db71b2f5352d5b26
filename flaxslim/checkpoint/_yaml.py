"""A config in a YAML file: read, and written anew with other widths, the rest of its text kept."""

import re
from collections.abc import Mapping
from typing import Any

from flaxslim.errors import ConfigError, CorruptFileError

_MOST = 100_000  # values in a config


def values_of(text: str, path: str) -> dict[str, Any]:
    """The mapping that a YAML text says; `CorruptFileError` if it says none."""
    import yaml

    try:
        values = yaml.safe_load(text)
    # Of numbers and dates that are none it raises what their classes raise.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptFileError("the config is no YAML", path=path, seen=str(error)) from error
    if not isinstance(values, dict):
        raise CorruptFileError("the config is no mapping", path=path, seen=type(values).__name__)
    _check_size(values, path)
    return values


def _check_size(values: Any, path: str) -> None:
    """Some lines of anchors can stand for more values than can be looked at."""
    count, left = 0, [values]
    while left:
        value = left.pop()
        count += 1
        if count > _MOST:
            raise CorruptFileError(
                "the config has too many values",
                path=path,
                expected=f"at most {_MOST:,}, where anchors count as what they stand for",
                mend="write the values out",
            )
        left += value.values() if isinstance(value, dict) else ()
        left += value if isinstance(value, list) else ()


def rewritten(text: str, old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> str:
    """The text with other values, and everything else as it is.

    Raises `ConfigError` if that is not what comes out.

    >>> rewritten("a: 8  # wide\\nb: 1\\n", {"a": 8, "b": 1}, {"a": 5, "b": 1}, "x.yml")
    'a: 5  # wide\\nb: 1\\n'
    """
    for key, value in new.items():
        if key not in old or old[key] != value:
            line = rf"(?m)^({re.escape(key)}[ \t]*:[ \t]*)[^\s#]+"
            text = re.sub(line, lambda match, value=value: f"{match[1]}{value}", text)
    if values_of(text, path) != dict(new):
        changed = [key for key, value in new.items() if old.get(key) != value]
        raise ConfigError(
            "the widths cannot be written into the text of this config",
            path=path,
            seen=", ".join(changed),
            expected="plain lines at the top, such as base_mlp_dim: 8192",
            mend="give the values as a dict, and write the file yourself",
        )
    return text
