"""A config copied with other values, by its kind: mappings, dataclasses, pydantic models, objects.

All values of one object are set at once, since a class may check its fields against each other
(`heads * size == hidden`). The class's own code runs, and what it raises is a `ConfigError`.
"""

import copy
import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from flaxslim.errors import ConfigError


def keys(cfg: Any) -> list[str]:
    """The names in a config."""
    if isinstance(cfg, Mapping) or _is_config_dict(cfg):
        return [key for key in cfg if isinstance(key, str)]
    # A NamedTuple has `_fields`, a class with slots `__slots__`.
    kinds = _attributes(cfg), *(getattr(type(cfg), kind, ()) for kind in ("_fields", "__slots__"))
    return [key for key in next(filter(None, kinds), ()) if not key.startswith("_")]


def _attributes(cfg: Any) -> Mapping[str, Any]:
    """What hangs on an object itself, past a `__getattr__` of its class."""
    try:
        return object.__getattribute__(cfg, "__dict__")
    except AttributeError:  # slots
        return {}


def with_values(cfg: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a config with some of its own keys set, all in one."""
    if isinstance(cfg, type | types.ModuleType):
        raise ConfigError(
            "a config is an object: a class or a Python module cannot be copied with another size",
            seen=str(cfg),
            mend="pass an instance of a class or dataclass, or a dict",
        )
    try:
        new = _copied(cfg, values)
    except ConfigError:
        raise
    except Exception as error:  # a class's own code may raise anything, asserts among it
        raise _refused(cfg, values, error) from error
    for name in [name for name in _attributes(new) if name not in values and _cached(new, name)]:
        del new.__dict__[name]  # it was computed from the old values
    return new


def _copied(cfg: Any, values: Mapping[str, Any]) -> Any:
    if dataclasses.is_dataclass(cfg):
        return _dataclass(cfg, values)
    if _is_pydantic(cfg):
        return _pydantic(cfg, values)
    if _is_config_dict(cfg):
        return _config_dict(cfg, values)
    if isinstance(cfg, MutableMapping):
        return _mapping(cfg, values)
    if isinstance(cfg, Mapping):
        return type(cfg)({**cfg, **values})  # pyright: ignore[reportCallIssue]
    return _object(cfg, values)


def _cached(cfg: Any, name: Any) -> bool:
    kind = getattr(type(cfg), name, None) if isinstance(name, str) else None
    return isinstance(kind, functools.cached_property)


def _mapping(cfg: Any, values: Mapping[str, Any]) -> Any:
    # A mapping that is no dict may hold one, which a shallow copy would share with the caller's.
    new = copy.copy(cfg) if isinstance(cfg, dict) else copy.deepcopy(cfg)
    if _attributes(cfg) is cfg:  # `self.__dict__ = self`: its keys are its attributes
        object.__setattr__(new, "__dict__", new)
    new.update(values)
    for name, value in values.items():
        if name not in cfg or not _says(cfg, name, cfg[name]):
            continue
        if name in _attributes(new):  # an attribute stands beside the key
            new.__dict__[name] = value
        if not _says(new, name, value):
            raise _no_field(cfg, name, keys(cfg))
    return new


def _says(cfg: Any, name: str, value: Any) -> bool:
    """Whether an attribute has the value; only for keys that are there, lest one be made."""
    return _equal(getattr(cfg, name, dataclasses.MISSING), value)


def _dataclass(cfg: Any, values: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    for name in values:
        if name not in fields or not fields[name].init:
            raise _no_field(cfg, name, [*fields])
    try:
        new = dataclasses.replace(cfg, **values)
    except ValueError as error:
        if "InitVar" not in str(error):
            raise
        raise _no_field(cfg, next(iter(values)), [*fields], error) from error
    # `replace` makes anew what is no argument of the class. What its own code computes is right
    # so; what was put there by hand since stays.
    missing = dataclasses.MISSING
    slots = {name: getattr(cfg, name, missing) for name, field in fields.items() if not field.init}
    own = {
        name: value
        for name, value in {**_attributes(cfg), **slots}.items()
        if not (name in fields and fields[name].init) and not _cached(cfg, name)
    }
    same = dataclasses.replace(cfg) if own else cfg
    for name, value in own.items():
        if value is not missing and not _equal(getattr(same, name, missing), value):
            object.__setattr__(new, name, value)
    return new


def _is_pydantic(cfg: Any) -> bool:
    """By its class, as for each kind: an instance may answer to any name."""
    return hasattr(type(cfg), "model_copy") and hasattr(type(cfg), "model_fields")


def _pydantic(cfg: Any, values: Mapping[str, Any]) -> Any:
    """A copy, once the class has let the new values pass.

    Only those are taken from what it made of them: its validators already ran over the others,
    and need not give the same again.
    """
    if cfg.model_extra is None:  # the class has no room for other keys
        fields = type(cfg).model_fields
        for name in values:
            if name not in fields:
                raise _no_field(cfg, name, [*fields])
    checked = _validated(cfg, values)
    return cfg.model_copy(update={name: getattr(checked, name) for name in values}, deep=True)


def _validated(cfg: Any, values: Mapping[str, Any], without: str | None = None) -> Any:
    """A pydantic model made anew, from what the old one was given and some new values."""
    fields = type(cfg).model_fields
    given = {name: getattr(cfg, name) for name in fields if name in cfg.model_fields_set}
    given |= {**(cfg.model_extra or {}), **values}
    return type(cfg).model_validate(
        {
            _argument(name, fields[name]) if name in fields else name: value
            for name, value in given.items()
            if name != without
        }
    )


def _argument(name: str, field: Any) -> str:
    """The name by which pydantic takes a field: its own, or an alias."""
    alias = field.validation_alias or field.alias
    choices = getattr(alias, "choices", [alias])  # of `AliasChoices`
    return next((choice for choice in choices if isinstance(choice, str)), name)


def _is_config_dict(cfg: Any) -> bool:
    """Whether it is an `ml_collections.ConfigDict`, or the like."""
    return hasattr(type(cfg), "unlock") and hasattr(type(cfg), "keys")


def _config_dict(cfg: Any, values: Mapping[str, Any]) -> Any:
    if hasattr(type(cfg), "as_configdict"):  # a frozen one
        return type(cfg)(_config_dict(cfg.as_configdict(), values))
    new = copy.deepcopy(cfg)
    for name, value in values.items():
        # Set in place, a reference (`cfg.get_ref`) would change every key that refers to it.
        if name in new and hasattr(type(new), "unlocked"):
            with new.unlocked():
                del new[name]
                new[name] = value
            continue
        try:
            setattr(new, name, value)
        except (AttributeError, KeyError, TypeError) as error:  # it is locked
            raise _no_field(cfg, name, keys(cfg), error) from error
    return new


def _object(cfg: Any, values: Mapping[str, Any]) -> Any:
    name = next(iter(values))
    try:
        new = copy.deepcopy(cfg)
        for name, value in values.items():
            setattr(new, name, value)
    except (AttributeError, TypeError) as error:  # slots, a NamedTuple
        raise _no_field(cfg, name, keys(cfg), error) from error
    return new


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are alike; those of one kind that cannot be compared count as such."""
    if a is b or (type(a) is type(b) and type(a).__eq__ is object.__eq__):
        return True
    try:
        if hasattr(type(a), "__array__") or hasattr(type(b), "__array__"):
            return np.array_equal(a, b)
        return bool(a == b)
    except Exception:  # arrays in a list, and what else has no truth
        return type(a) is type(b)


# --- what a class computes from other values ---------------------------------------------------


def stale(cfg: Any, new: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Fields that the code of a class had computed from keys that are set: name, kept, anew.

    They are arguments as well, so the copy was given their old values. Which is right cannot be
    told: `2 * width` should follow, and `hidden // heads` should not once heads were cut.
    """
    if _is_config_dict(cfg):
        yield from _referring(cfg, new, values)
        return
    own = {key.partition(".")[0] for key in values}
    for name, default in _optional(cfg):
        kept = getattr(new, name, default)
        if name in own or _equal(default, kept):
            continue  # the default was not computed; to make the class anew may cost, or do, much
        try:
            if not _equal(_anew(cfg, name), kept):
                continue
            anew = _anew(new, name)
        except Exception:  # the class's own code: it needs the field, or an InitVar
            continue
        if not _equal(anew, kept):
            yield name, kept, anew


def _optional(cfg: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that a class may compute if they are not given, and what stands for them."""
    missing = dataclasses.MISSING
    if _is_pydantic(cfg):
        for name, info in type(cfg).model_fields.items():
            if not info.is_required():  # a factory that takes the other fields computes
                yield name, _made(functools.partial(info.get_default, call_default_factory=True))
    elif dataclasses.is_dataclass(cfg) and hasattr(type(cfg), "__post_init__"):
        for field in dataclasses.fields(cfg):
            if field.init and field.default is not missing:
                yield field.name, field.default
            elif field.init and field.default_factory is not missing:
                yield field.name, _made(field.default_factory)


def _made(factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception:  # the class's own code
        return dataclasses.MISSING


def _anew(cfg: Any, name: str) -> Any:
    """What a field comes to if the class is made anew without it."""
    if _is_pydantic(cfg):
        return getattr(_validated(cfg, {}, without=name), name)
    fields = [field.name for field in dataclasses.fields(cfg) if field.init]
    return getattr(type(cfg)(**{f: getattr(cfg, f) for f in fields if f != name}), name)


def _referring(cfg: Any, new: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that would have followed, had the values been set in place."""
    if hasattr(type(cfg), "as_configdict") or not hasattr(type(cfg), "unlocked"):
        return  # a frozen one has no references any more
    followed = copy.deepcopy(cfg)
    try:
        with followed.unlocked():
            for key, value in values.items():
                *parts, name = key.split(".")
                functools.reduce(operator.getitem, parts, followed)[name] = value
    except Exception:  # a value of another type cannot be set in place
        return
    yield from _differing(new, followed, values, "")


def _differing(
    new: Any, followed: Any, values: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    for name in keys(new):
        key = prefix + name
        if key in values:
            continue
        try:
            kept, anew = new[name], followed[name]
        except Exception:  # a placeholder that is required has no value yet
            continue
        if _is_config_dict(kept) and _is_config_dict(anew):
            yield from _differing(kept, anew, values, f"{key}.")
        elif not _equal(kept, anew):
            yield key, kept, anew


# --- what is refused --------------------------------------------------------------------------


def _no_field(
    cfg: Any, name: str, names: Sequence[str], error: Exception | None = None
) -> ConfigError:
    return ConfigError(
        f"a {type(cfg).__name__} has no field to say this in"
        if name not in names
        else f"a field of a {type(cfg).__name__} cannot be set",
        path=name,
        seen=f"the fields {', '.join(names)}" + (f"; {error}" if error else ""),
        mend=f'give it a field "{name}" that may be None and can be set; or keep one width for '
        'all layers (width="uniform"), or pass a dict',
    )


def _refused(cfg: Any, values: Mapping[str, Any], error: Exception) -> ConfigError:
    """What the code of a class raised, in the words of it."""
    told = str(error).strip()
    return ConfigError(
        f"a {type(cfg).__name__} refuses the sizes after the cut",
        path=", ".join(values),
        seen=", ".join(f"{name}={value!r}" for name, value in values.items())
        + f"; {type(error).__name__}"
        + (f": {told}" if told else ""),
        expected="values that the class's own checks let pass",
        mend="name in the spec every key that follows from the width; or take widths that the "
        "class can say (multiple_of=...); or pass a dict of the config's values, which checks "
        "nothing",
    )
