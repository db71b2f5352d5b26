"""The sizes of a slimmed model as data in its config, where plain keys cannot say them.

Two keys hold them, and every part of a composite's config has its own:

`per_layer_config`
    what transformers 5.14 and later reads, and 4 keeps: a sparse map from the number of a layer
    to the keys that differ there, `{"5": {"intermediate_size": 1024}}`. Used for widths where the
    family has one stack of layers.

`flaxslim_layout`
    all else: two stacks, shared layers, heads, widths that no key can say::

        {"version": 1,
         "load": "flaxslim.from_pretrained(FlaxBertModel, folder)",
         "sites": {"encoder/layer/0/attention/output/dense": [0, 3], ...}}

    A site is named by its second layer, by path from the layer root on, whatever prefix a head
    class puts before it ("/" in front where a spec names no root, or two sites would have one
    name: then it is the whole path). A number is a width; a list says which heads are left, by
    their indices in the dense model. The key/value groups that are left are those with a head
    left. Pairs that are not of the family that the config names are kept under "spec".
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flaxslim import _config
from flaxslim._axes import Axes
from flaxslim._pair import Pair
from flaxslim._spec import Spec
from flaxslim.errors import FlaxslimError, LayoutError, UnknownFamilyError
from flaxslim.specs import known, spec_for

LAYOUT, PER_LAYER = "flaxslim_layout", "per_layer_config"
VERSION = 1

Recorded = int | tuple[int, ...]

_SAVED = "use the config.json that was saved with these parameters"


def entry(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """The `flaxslim_layout` of a config, or of the part under `prefix`; empty if there is none.

    Raises `LayoutError` if it is of a later version, or is none at all.
    """
    key = prefix + LAYOUT
    if cfg is None or not _config.has(cfg, key) or not (value := _config.read(cfg, key)):
        return {}
    version = value.get("version") if isinstance(value, Mapping) else None
    if type(version) is not int or version < 1 or not isinstance(value.get("sites", {}), Mapping):
        raise LayoutError(
            "the config's layout cannot be read",
            path=key,
            seen=str(value)[:80],
            expected='{"version": 1, "sites": {site: width or heads}}',
            mend=_SAVED,
        )
    if version > VERSION:
        raise LayoutError(
            "the layout was written by a later version of flaxslim",
            path=key,
            seen=f"version {version}",
            expected=f"at most version {VERSION}",
            mend="pip install --upgrade flaxslim",
        )
    return dict(value)


def sites(cfg: Any, prefix: str = "") -> dict[str, Recorded]:
    """The recorded sites by name: a width, or which heads are left."""
    found: dict[str, Recorded] = {}
    for name, value in entry(cfg, prefix).get("sites", {}).items():
        heads = isinstance(value, list | tuple)
        numbers = list(value) if heads else [value]
        whole = all(type(n) is int and n >= 0 for n in numbers)
        if not whole or (heads and sorted(set(numbers)) != numbers):
            raise LayoutError(
                "the config's layout has a site that cannot be read",
                path=f"{prefix}{LAYOUT}.sites.{name}",
                seen=str(value)[:80],
                expected="a width, or the ascending indices of the heads that are left",
                mend=_SAVED,
            )
        found[name] = tuple(numbers) if heads else value
    return found


def per_layer(cfg: Any, prefix: str = "") -> dict[int, Mapping[str, Any]]:
    """The `per_layer_config`, by the number of the layer; empty if there is none."""
    key = prefix + PER_LAYER
    if cfg is None or not _config.has(cfg, key) or not (value := _config.read(cfg, key)):
        return {}
    try:
        # transformers 5 pads the numbers with zeros.
        return {int(layer): dict(own) for layer, own in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise LayoutError(
            "per_layer_config cannot be read",
            path=key,
            seen=str(value)[:80],
            expected='{"5": {"intermediate_size": 1024}}',
            mend=_SAVED,
        ) from None


def is_laid_out(cfg: Any, prefix: str = "") -> bool:
    """Whether a config, or a part of it, says sizes that plain keys cannot."""
    return bool(entry(cfg, prefix).get("sites") or per_layer(cfg, prefix))


# --- of one site ------------------------------------------------------------------------------


def fits(pair: Pair, value: Recorded) -> bool:
    """Whether a recorded value is of the kind that a pair has: a list of heads, or a width.

    Of stacked heads there is only a width: each layer of the stack has lost others.
    """
    listed = pair.axis == "h" and not Axes(pair.second_axes).stack
    return isinstance(value, tuple) == listed


def recorded(cfg: Any, pair: Pair, name: str) -> Recorded | None:
    """What the layout says of a site by its name; None if nothing."""
    value = sites(cfg, pair.config).get(name)
    return None if value is None else checked(cfg, pair, name, value)


def checked(cfg: Any, pair: Pair, name: str, value: Recorded) -> Recorded:
    """A recorded value, if it may be one of this pair.

    Raises `LayoutError` for a number of heads in place of a list, and for heads that the dense
    model does not have.
    """
    if not fits(pair, value):
        raise misfit(pair, name, value)
    dense = pair.width_expression and pair.width_expression.read(cfg)
    if isinstance(value, tuple) and dense is not None and value and value[-1] >= dense:
        raise LayoutError(
            "the layout lists a head that the dense model does not have",
            path=f"{pair.config}{LAYOUT}.sites.{name}",
            seen=f"head {value[-1]}",
            expected=f"at most {dense - 1}, by {pair.width_expression} of the config",
            mend=_SAVED,
        )
    return value


def misfit(pair: Pair, name: str, value: Recorded) -> LayoutError:
    """The error for a width where heads are to be listed, or the other way round."""
    listed = isinstance(value, int)
    return LayoutError(
        "the layout has a number where heads are listed"
        if listed
        else "the layout has a list where a width is said",
        path=f"{pair.config}{LAYOUT}.sites.{name}",
        seen=value if listed else list(value),
        expected="the ascending indices of the heads that are left" if listed else "a width",
        mend=_SAVED,
    )


def by_number(pair: Pair, layer: int) -> str | None:
    """The name of the site that a number in `per_layer_config` stands for, if one is enough."""
    if pair.at.count("{") != 1 or "**" in pair.at:
        return None
    return f"{re.sub(r'{.*}', str(layer), pair.at)}/{pair.second}"


def own_width(cfg: Any, pair: Pair, layer: int) -> int | None:
    """The width that `per_layer_config` says for the pair of one layer; None if it says none."""
    expression = pair.width_expression
    own = per_layer(cfg, pair.config).get(layer, {})
    if expression is None or expression.key is None:
        return None
    key = expression.key.removeprefix(pair.config)
    if key not in own:
        return None
    value, step = own[key], expression.step(cfg)
    # A factor of the hidden size may be a fraction (DINOv2's); a width is none.
    kinds = (int,) if step == 1 else (int, float)
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)) or value < 0:
        raise LayoutError(
            "per_layer_config has a width that is none",
            path=f"{pair.config}{PER_LAYER}.{layer}.{key}",
            seen=repr(value),
            expected="a whole number, 0 or more" if step == 1 else "a number, 0 or more",
            mend=_SAVED,
        )
    return expression.read(cfg, own)


def said(cfg: Any, pair: Pair, name: str, layer: int | None) -> int | None:
    """How many channels a config says that a site has; None if it has no key for it."""
    if (found := recorded(cfg, pair, name)) is not None:
        return found if isinstance(found, int) else len(found)
    if pair.width_expression is None:
        return None
    numbered = layer is not None and by_number(pair, layer) == name
    own = own_width(cfg, pair, layer) if numbered and layer is not None else None
    return pair.width_expression.read(cfg) if own is None else own


def groups_left(cfg: Any, pair: Pair, name: str) -> tuple[int, ...] | None:
    """How many heads each key/value group has that is left; None if no layout says it."""
    heads = recorded(cfg, pair, name)
    return group_counts(cfg, pair, name, heads) if isinstance(heads, tuple) else None


def group_counts(cfg: Any, pair: Pair, name: str, heads: tuple[int, ...]) -> tuple[int, ...]:
    """How many of some heads of the dense model each key/value group has, if it has any."""
    all_heads, all_groups = pair.width_expression, pair.group_expression
    if all_heads is None or all_groups is None:
        raise LayoutError(
            "the layout says which heads are left, and the spec does not say how they are grouped",
            path=name,
            mend="name the config keys in the spec: Pair(width=..., group_width=...)",
        )
    count, groups = all_heads.read(cfg), all_groups.read(cfg)
    if groups < 1 or count % groups:
        raise LayoutError(
            "the heads of the config do not divide into its key/value groups",
            path=name,
            seen=f"{all_heads} = {count}, {all_groups} = {groups}",
            mend=_SAVED,
        )
    _, counts = np.unique(np.asarray(heads, int) // (count // groups), return_counts=True)
    return tuple(counts.tolist())


# --- the spec by which it is read -------------------------------------------------------------


def spec_of(cfg: Any) -> Spec | None:
    """All pairs that a config tells of: its family's, and those that its layouts keep."""
    specs = [spec for prefix in parts(cfg) if (spec := kept(cfg, prefix)) is not None]
    with contextlib.suppress(UnknownFamilyError):
        specs.insert(0, spec_for(cfg, "all"))
    return functools.reduce(Spec.__add__, specs) if specs else None


def kept(cfg: Any, prefix: str = "") -> Spec | None:
    """The spec that the layout of a config, or of a part of it, keeps; None if it keeps none."""
    if (value := entry(cfg, prefix).get("spec")) is None:
        return None
    try:
        return Spec.from_dict(value)
    except (AttributeError, KeyError, TypeError, ValueError, FlaxslimError) as error:
        raise LayoutError(
            "the layout's spec cannot be read",
            path=f"{prefix}{LAYOUT}.spec",
            seen=f"{type(error).__name__}: {error}",
            mend=_SAVED,
        ) from error


def parts(cfg: Any, prefix: str = "", depth: int = 3) -> Iterator[str]:
    """The prefixes of all parts of a config: "" and, say, "decoder."."""
    yield prefix
    for key in _config.keys(cfg) if depth else ():
        part = _config.read(cfg, key) if key not in (LAYOUT, PER_LAYER) else None
        if isinstance(part, Mapping) or dataclasses.is_dataclass(part) or hasattr(part, "to_dict"):
            yield from (prefix + inner for inner in parts(part, f"{key}.", depth - 1))


def written(cfg: Any, spec: Spec | None, sites: Mapping[str, Recorded]) -> dict[str, Any]:
    """The value of `flaxslim_layout` for these sites, with what leads a reader of it on."""
    value: dict[str, Any] = {
        "version": VERSION,
        "load": _how_to_load(cfg),
        "sites": {
            name: list(left) if isinstance(left, tuple) else left for name, left in sites.items()
        },
    }
    return value if spec is None else {**value, "spec": spec.to_dict()}


def _how_to_load(cfg: Any) -> str:
    if (name := class_name(cfg)) is None:
        return "flaxslim.module(YourModule, cfg)"
    return f"flaxslim.from_pretrained(Flax{name}, folder)"


def class_name(cfg: Any) -> str | None:
    """The class of transformers, without "Flax"; None for a model of one's own."""
    names = _config.read(cfg, "architectures") if _config.has(cfg, "architectures") else None
    if names:
        return names[0].removeprefix("Flax")
    return "AutoModel" if known(cfg) else None
