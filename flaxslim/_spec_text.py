"""A spec as text: plain data for JSON, and the Python that makes it."""

import dataclasses
import keyword
import re
from collections.abc import Mapping
from typing import Any

from flaxslim._pair import Pair
from flaxslim._spec import Spec
from flaxslim.errors import FlaxslimError, SpecError

_WIDTH = 100  # of a line of source

# What a person says first of a pair; the rest follows as `Pair` declares it.
_FIRST = ("at", "first", "first_axes", "first_bias", "second", "second_axes", "second_bias")


def to_dict(spec: Spec) -> dict[str, Any]:
    """Plain data for JSON: only what differs from a Pair's defaults."""
    return {
        "name": spec.name,
        "pairs": [{name: _plain(value) for name, value in _given(pair).items()} for pair in spec],
    }


def from_dict(data: Mapping[str, Any]) -> Spec:
    """The spec that `to_dict` wrote; a `FlaxslimError` for anything else."""
    try:
        pairs: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in pair.items()}
            for pair in data["pairs"]
        ]
        return Spec(name=data["name"], pairs=tuple(Pair(**pair) for pair in pairs))
    except FlaxslimError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpecError(
            "this is not the data of a spec",
            seen=f"{type(error).__name__}: {error}",
            expected="what Spec.to_dict() gives",
        ) from error


def _given(pair: Pair) -> dict[str, Any]:
    """The fields of a pair that differ from their defaults."""
    fields = dataclasses.fields(pair)
    values = {f.name: getattr(pair, f.name) for f in fields}
    return {f.name: values[f.name] for f in fields if values[f.name] != f.default}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return list(value) if isinstance(value, tuple) else value


# --- source -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """A call that is to be written, with its keyword arguments: each on a line of its own."""

    name: str
    arguments: Mapping[str, Any]


def source(spec: Spec) -> str:
    """The Python that makes a spec, laid out as `ruff format` does it."""
    pairs = tuple(_call(pair) for pair in spec)
    whole = _Call(
        name="Spec",
        arguments={"name": spec.name, "pairs": pairs[0] if len(pairs) == 1 else pairs},
    )
    text = _written(f"{variable(spec.name)} = ", whole, "", 0)
    return f"from flaxslim import Pair, Spec\n\n{text}\n"


def variable(name: str) -> str:
    """A name made an identifier.

    >>> variable("BERT_FFN"), variable("A+B"), variable("2 layers"), variable("class")
    ('BERT_FFN', 'A_B', '_2_layers', 'class_')
    """
    text = re.sub(r"\W", "_", name)
    text = text if re.match(r"[^\W\d]", text) else f"_{text}"
    return f"{text}_" if keyword.iskeyword(text) or text in ("Pair", "Spec") else text


def _call(pair: Pair) -> _Call:
    given = _given(pair)
    order = [name for name in _FIRST if name in given]
    return _Call(
        name="Pair", arguments={name: given[name] for name in dict.fromkeys([*order, *given])}
    )


def _written(before: str, value: Any, after: str, depth: int) -> str:
    """A value in its place: in one line if there is room, else its parts on lines of their own."""
    indent = "    " * depth
    if not isinstance(value, _Call) and not _holds_call(value):
        line = f"{indent}{before}{_literal(value)}{after}"
        if len(line) <= _WIDTH or not isinstance(value, Mapping | tuple) or not value:
            return line
    opening, closing, parts = _parts(value)
    lines = [_written(head, part, ",", depth + 1) for head, part in parts]
    return "\n".join([f"{indent}{before}{opening}", *lines, f"{indent}{closing}{after}"])


def _parts(value: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """The brackets of a value, and what stands in them."""
    if isinstance(value, _Call):
        return f"{value.name}(", ")", [(f"{name}=", part) for name, part in value.arguments.items()]
    if isinstance(value, Mapping):
        return "{", "}", [(f"{_literal(key)}: ", part) for key, part in value.items()]
    return "(", ")", [("", part) for part in value]


def _holds_call(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(part, _Call) for part in value)


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, tuple):
        parts = ", ".join(map(_literal, value))
        return f"({parts},)" if len(value) == 1 else f"({parts})"
    if isinstance(value, str) and '"' not in value:
        return f'"{repr(value)[1:-1]}"'
    return repr(value)
