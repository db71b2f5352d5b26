"""Ways to break a file. Each takes a `random.Random`, so that a seed says what was done."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

# Numbers at the edges of what a header can say.
_EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
# Values that a JSON file, or a TOML or YAML one, may say in the place of any other.
_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30,
    10**400, 1e308, math.nan, math.inf, -math.inf, "", "0", "a", "nan", "/", "/etc/passwd",
    "../outside/secret.safetensors", "C:\\x", "..\\x", "a\0b", "\ud800", "x" * 5000, "{i}", "%s",
    "relu", "f d", [], [[]], [None], [-1], [0], [2**32, 2**32], [-1, -8], ["x"], {}, {"": 0},
    {"a": {}}, {"0": 1}, {"model_type": "bert"},
)  # fmt: skip


def broken_bytes(data: bytes, random: Random) -> bytes:
    """Some of the bytes changed, lost, doubled or moved; near the front half of the time."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(min(len(data), 256 if random.random() < 0.5 else len(data)) + 1)
        size = random.choice((1, 1, 2, 4, 8, 64))
        data = random.choice(_BYTES)(data, at, size, random)
    return data


_Change = Callable[[bytes, int, int, Random], bytes]


def _number(data: bytes, at: int, size: int, random: Random) -> bytes:
    size, order = random.choice((1, 2, 4, 8)), random.choice(("big", "little"))
    edge = random.choice(_EDGES) % 2 ** (8 * size)
    return data[:at] + edge.to_bytes(size, order) + data[at + size :]  # pyright: ignore


def _flipped(data: bytes, at: int, size: int, random: Random) -> bytes:
    return (
        data[:at] + bytes(x ^ 1 << random.randrange(8) for x in data[at : at + 1]) + data[at + 1 :]
    )


_BYTES: tuple[_Change, ...] = (
    lambda data, at, size, random: data[:at],
    _flipped,
    _flipped,
    _number,
    _number,
    lambda data, at, size, random: data[:at] + random.randbytes(size) + data[at + size :],
    lambda data, at, size, random: data[:at] + random.randbytes(size) + data[at:],
    lambda data, at, size, random: data[:at] + data[at + size :],
    lambda data, at, size, random: (
        data[:at] + data[at : at + size] * random.choice((2, 9)) + data[at:]
    ),
    lambda data, at, size, random: data[:at] + bytes(size) + data[at + size :],
    lambda data, at, size, random: data + random.randbytes(size),
    lambda data, at, size, random: b"",
    lambda data, at, size, random: random.randbytes(size) + data,
)


# --- trees of JSON ----------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a tree."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*path, key))


def broken_tree(tree: Any, random: Random) -> Any:
    """Another tree, in which some values are hostile, gone, renamed or in another's place."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        paths = list(places(tree))
        if not paths:
            return copy.deepcopy(random.choice(_HOSTILE))
        *parents, last = random.choice(paths)
        node = tree
        for key in parents:
            node = node[key]
        _change(node, last, random, paths, tree)
    return tree


def _change(node: Any, key: Any, random: Random, paths: Any, tree: Any) -> None:
    kind = random.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[random.choice((f"{key}x", key[:-1], "", "x", "__proto__"))] = node.pop(key)
    elif kind == 2:
        other: Any = tree
        for part in random.choice(paths):
            other = other[part]
        node[key] = json.loads(json.dumps(other))
    elif kind == 3 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = random.choice((node[key] + 1, node[key] - 1, -node[key], 2 * node[key], 0.5))
    elif kind == 4 and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == 5:
        node[key] = [node[key]]
    else:
        node[key] = copy.deepcopy(random.choice(_HOSTILE))


def broken_json(text: str, random: Random) -> bytes:
    """The text of a JSON file with something wrong in its values, its keys or its bytes."""
    kind = random.randrange(10)
    if kind == 0:
        return broken_bytes(text.encode(), random)
    if kind == 1:
        depth = random.choice((100, 1000, 10**5))
        opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
        return (opening * depth + "0" + closing * random.choice((0, depth))).encode()
    tree = broken_tree(json.loads(text), random)
    if kind == 2:
        return nested(tree, random)
    out = json.dumps(tree, ensure_ascii=random.random() < 0.7)
    if kind == 3 and (names := [name for name in _names(tree) if name in out]):
        out = out.replace("{", "{" + json.dumps(random.choice(names)) + ": 0, ", 1)  # a name twice
    return out.encode("utf-8", "surrogatepass")


def nested(tree: Any, random: Random) -> bytes:
    """A tree as JSON, in which one value is a very deep list."""
    mark, depth = "@deep@", random.choice((50, 900, 10**5))
    paths = list(places(tree))
    if paths:
        *parents, last = random.choice(paths)
        node = tree
        for key in parents:
            node = node[key]
        node[last] = mark
    text = json.dumps(tree if paths else mark)
    return text.replace(f'"{mark}"', "[" * depth + "]" * depth).encode()


def _names(tree: Any) -> list[str]:
    return sorted({key for path in places(tree) for key in path if isinstance(key, str)})
