"""The config key that says a width: by tracing at another value, or by the number that it holds."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flaxslim import _config
from flaxslim._activation import activation_name, named
from flaxslim._discover._atoms import size_of
from flaxslim._discover._groups import Group
from flaxslim._discover._pairs import Paired
from flaxslim._pair import Pair
from flaxslim._tree import flatten
from flaxslim.errors import ConfigError, DiscoveryError

# A config, and the shapes of the parameters of the model that it stands for.
Rebuild = Callable[[Any], Any]

# The dimensions of tensors that have another size when a key has another value, and which.
Moved = Mapping[tuple[str, int], int]


def with_keys(
    pairs: Sequence[Paired], cfg: Any, rebuild: Rebuild | None, leaves: Mapping[str, Any]
) -> tuple[list[Paired], list[str]]:
    """The pairs with the keys of their widths and activations, and how these were found.

    Raises `ConfigError` if the config has no keys at all, and `DiscoveryError` if `rebuild` does
    not make the parameters at hand from it.
    """
    if cfg is None:
        return list(pairs), []
    if not _config.keys(cfg):
        raise ConfigError(
            "the config has no keys",
            seen=type(cfg).__name__,
            expected="a dict, a dataclass, or another object with the sizes of the model",
        )
    numbers = dict(_numbers(cfg))
    changed = _changes(cfg, rebuild, leaves, numbers, pairs) if rebuild is not None else {}
    shared = _shared(pairs, changed)
    new, notes = [], []
    for pair, groups in pairs:
        width, how = _width(pair, groups, numbers, changed)
        notes += [f"{_name(pair)}: {how}"] if how else []
        seen_alone = rebuild is not None and not how
        sizes = {
            name: _size(int(size), width, numbers, alone=seen_alone)
            for name, size in pair.sizes.items()
        }
        keyed = dataclasses.replace(
            pair,
            width=width,
            group_width=_group_width(pair, groups, numbers) if width is not None else None,
            sizes=sizes,
            activation=_activation(pair.activation, cfg),
        )
        # Another value was tried, and the model did not change as the channels would. (Of heads in
        # groups, keys and values would not.)
        stiff = rebuild is not None and bool(how) and pair.group is None
        if width is not None and (stiff or _is_tied(width, sizes, shared)):
            keyed = dataclasses.replace(keyed, fixed=True)
        new.append((keyed, groups))
    return new, notes


def _group_width(pair: Pair, groups: Sequence[Group], numbers: Mapping[str, Any]) -> str | None:
    """The key of the number of key/value groups."""
    if pair.group is None:
        return None
    size = groups[0].size
    return _by_name(size, numbers, "key_value") or _only(size, numbers)


def _is_tied(width: str, sizes: Mapping[str, str], shared: set[str]) -> bool:
    """Whether the key of a width says more than that: a size beside it, or other tensors."""
    return width.partition(" ")[0] in shared or any(f"/{width}" in size for size in sizes.values())


def _name(pair: Pair) -> str:
    return "/".join(filter(None, (pair.at, pair.second)))


def _numbers(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers in a config by key, nested ones too, and what is None."""
    common = _common(cfg)
    for key in (key for key in _config.keys(cfg) if key not in common):
        value = _config.read(cfg, key)
        if (isinstance(value, int | float) and not isinstance(value, bool)) or value is None:
            yield prefix + key, value
        elif (_config.keys(value) if not isinstance(value, str | list | tuple) else ()) and (
            prefix.count(".") < 3
        ):
            yield from _numbers(value, f"{prefix}{key}.")


def _common(cfg: Any) -> frozenset[str]:
    """What every config of transformers has (`top_k`, `eos_token_id`): no sizes of a model."""
    bases = (base for base in type(cfg).__mro__ if base.__name__ == "PretrainedConfig")
    plain = next(bases, None)  # not imported: that takes seconds
    return frozenset(_config.keys(plain()) if plain is not None else ())


def size_of_channels(pair: Pair, group: Group) -> int:
    """The number of channels of a pair: of heads in groups, that of the heads."""
    if pair.group is None:
        return group.size
    dim = group.factors[next((m.path, m.dimension) for m in group.members
                             if m.path == group.seconds[0])]  # fmt: skip
    inside = math.prod(int(size) for size in pair.sizes.values()) if pair.sizes else 1
    return size_of(dim) // inside if inside else group.size


# --- by another value -------------------------------------------------------------------------


def _changes(
    cfg: Any,
    rebuild: Rebuild,
    leaves: Mapping[str, Any],
    numbers: Mapping[str, Any],
    pairs: Sequence[Paired],
) -> dict[str, Moved]:
    """By "key=value", which dimensions have another size at it, and which."""
    sizes = {size_of_channels(pair, group) for pair, groups in pairs for group in groups}
    before = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    _check_rebuild(cfg, rebuild, before)
    found: dict[str, Moved] = {}
    for key, value in numbers.items():
        for trial in _trials(value, sizes):
            try:
                after = _shapes(rebuild(_config.replace(cfg, {key: trial})))
            except Exception:  # a class refuses some values as it likes
                continue
            if after.keys() != before.keys():  # it is a number of layers, or changes these
                found[f"{key}={trial}"] = {}
                continue
            moved = {
                (path, axis): after[path][axis]
                for path in before
                if len(before[path]) == len(after[path])
                for axis in range(len(before[path]))
                if before[path][axis] != after[path][axis]
            }
            if moved:
                found[f"{key}={trial}"] = moved
    return found


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def _check_rebuild(cfg: Any, rebuild: Rebuild, before: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `DiscoveryError` unless the config as it is makes the parameters at hand."""
    mend = "rebuild=lambda cfg: jax.eval_shape(Model(**cfg).init, key, x), of the same model"
    try:
        after = _shapes(rebuild(cfg))
    except Exception as error:  # whatever the user's own code raises
        raise DiscoveryError(
            "rebuild= does not make parameters of the config",
            seen=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            expected="a function of a config that returns the shapes of its model's parameters",
            mend=mend,
        ) from error
    for path in (*before, *after):
        if before.get(path) != after.get(path):
            raise DiscoveryError(
                "rebuild= makes other parameters of the config than those that were given",
                path=path,
                seen=f"shape {after[path]}" if path in after else "no such parameter",
                expected=f"shape {before[path]}" if path in before else "no such parameter",
                mend=mend,
            )


def _trials(value: Any, sizes: set[int]) -> list[int]:
    """Other values of a key that may be the width: of one that is it, or that is not set."""
    if value is None:
        return sorted({size // 2 for size in sizes if size > 1})[:3]
    return [value // 2 if value % 2 == 0 else value - 1] if value in sizes and value > 1 else []


def _axes(groups: Sequence[Group]) -> set[tuple[str, int]]:
    return {(m.path, m.dimension) for group in groups for m in group.members}


def _shared(pairs: Sequence[Paired], changed: Mapping[str, Moved]) -> set[str]:
    """The keys at whose other value more changes than the pairs that go by them.

    The hidden layer of a classifier that is as wide as the hidden size: the key must stay.
    """
    shared = set()
    for setting, moved in changed.items():
        own = [axes for _, groups in pairs if (axes := _axes(groups)) <= moved.keys()]
        if not moved.keys() <= set().union(*own):
            shared.add(setting.partition("=")[0])
    return shared


def _by_change(groups: Sequence[Group], changed: Mapping[str, Moved]) -> list[str]:
    """The keys at whose other value all axes of these groups change as the channels do."""
    wanted = _axes(groups)
    return list(dict.fromkeys(
        setting.partition("=")[0] for setting, moved in changed.items()
        if wanted <= moved.keys() and _scales(groups, moved, int(setting.partition("=")[2]))
    ))  # fmt: skip


def _scales(groups: Sequence[Group], moved: Moved, trial: int) -> bool:
    """Whether the axes change as the channels do, whatever else is in their dimensions."""
    for group in groups:
        for (path, axis), atoms in group.factors.items():
            inside = size_of(atoms) // group.size
            if moved[path, axis] != inside * trial:
                return False
    return True


# --- by the number ----------------------------------------------------------------------------


def _width(
    pair: Pair,
    groups: Sequence[Group],
    numbers: Mapping[str, Any],
    changed: Mapping[str, Moved],
) -> tuple[str | None, str]:
    """The width of a pair, and what is to be said of how it was found."""
    sizes = {size_of_channels(pair, group) for group in groups}
    if len(sizes) > 1:
        return None, f"no key of the config is its widths {', '.join(map(str, sorted(sizes)))}"
    (size,) = sizes
    keys = _by_change(groups, changed)
    if len(keys) == 1:
        (key,) = keys
        if numbers[key] is None:
            multiple = [k for k, v in numbers.items() if v and size == 4 * v]
            return (f"{key} or 4*{multiple[0]}" if multiple else key), ""
        return key, ""
    if pair.axis == "h" and (key := _by_name(size, numbers, "head")):
        return key, f"its width {key} is the only number of heads in the config that is {size}"
    # A key that was tried, and changed something else, is another width.
    others = {setting.partition("=")[0] for setting in changed}
    if key := _only(size, {k: value for k, value in numbers.items() if k not in others}):
        return key, f"its width {key} is the only key of the config that is {size}"
    many = [k for k, value in numbers.items() if value == size and k not in others]
    if many:
        return None, (
            f"which of {', '.join(many)} is its width {size} is not known: set width= of the pair"
        )
    return None, f"no key of the config is its width {size}: set width= of the pair, if one is"


def _only(size: int, numbers: Mapping[str, Any]) -> str | None:
    keys = [key for key, value in numbers.items() if value == size]
    return keys[0] if len(keys) == 1 else None


def _by_name(size: int, numbers: Mapping[str, Any], word: str) -> str | None:
    """The key of that number with a word in its name; of several, the one without more words."""
    keys = [key for key, value in numbers.items() if value == size and word in key]
    if word == "head":
        keys = [key for key in keys if "key_value" not in key and "dim" not in key]
    return keys[0] if len(keys) == 1 else None


def _size(size: int, width: str | None, numbers: Mapping[str, Any], *, alone: bool) -> str:
    """The size of an axis beside the channels as the config says it, or as a number.

    `alone`: the width was seen to change without it, so that it is no share of anything.
    """
    if alone:
        return _only(size, numbers) or str(size)
    if width is not None and " " not in width and numbers.get(width):
        whole = [k for k, value in numbers.items() if value == size * numbers[width]]
        plain = [k for k, value in numbers.items() if value == size and "head" in k]
        if len(whole) == 1 and not plain:
            return f"{whole[0]}/{width}"
        if len(plain) == 1:
            return plain[0]
    return str(size)


def _activation(act: str | None, cfg: Any) -> str | None:
    """Where the config names the activation, if one key does."""
    if act is None:
        return None
    function = named(act)
    keys = [
        key
        for key in _config.keys(cfg)
        if "act" in key and isinstance(_config.read(cfg, key), str)
        if function is not None and named(activation_name(f"config.{key}", cfg)) is function
    ]
    return f"config.{keys[0]}" if len(keys) == 1 else act
