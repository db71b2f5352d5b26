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
    class puts before it ("/" in front where a spec names no root: then it is the whole path). A
    number is a width; a list says which heads are left, by their indices in the dense model. The
    key/value groups that are left are those with a head left. A spec that is not one of flaxslim's
    own is kept under "spec".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxslim import _config
from flaxslim._errors import ConfigError, LayoutError
from flaxslim._spec import Pair, Site, Spec

LAYOUT, PER_LAYER = "flaxslim_layout", "per_layer_config"
VERSION = 1

Recorded = int | tuple[int, ...]


def entry(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """The `flaxslim_layout` of a config, or of the part under `prefix`; empty if there is none.

    Raises `LayoutError` if it is of a later version, or is none at all.
    """
    key = prefix + LAYOUT
    if cfg is None or not _config.has(cfg, key) or not (value := _config.read(cfg, key)):
        return {}
    if not isinstance(value, Mapping) or not isinstance(value.get("version"), int):
        raise LayoutError(
            "the config's layout cannot be read",
            path=key,
            seen=str(value)[:80],
            expected='{"version": 1, "sites": {site: width or heads}}',
            mend="use the config.json that was saved with these parameters",
        )
    if value["version"] > VERSION:
        raise LayoutError(
            "the layout was written by a later version of flaxslim",
            path=key,
            seen=f"version {value['version']}",
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
                mend="use the config.json that was saved with these parameters",
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
            mend="use the config.json that was saved with these parameters",
        ) from None


def is_laid_out(cfg: Any, prefix: str = "") -> bool:
    """Whether a config, or a part of it, says sizes that plain keys cannot."""
    return bool(entry(cfg, prefix).get("sites") or per_layer(cfg, prefix))


def said(cfg: Any, pair: Pair, name: str, layer: int | None) -> int | None:
    """How many channels a config says that a site has; None if it has no key for it."""
    recorded = sites(cfg, pair.config).get(name)
    if recorded is not None:
        return recorded if isinstance(recorded, int) else len(recorded)
    if pair.width_expression is None:
        return None
    own = per_layer(cfg, pair.config).get(layer, {}) if layer is not None else {}
    return pair.width_expression.read(cfg, own)


def heads_left(cfg: Any, site: Site) -> np.ndarray:
    """The heads of a site by their indices in the dense model, `(h,)`."""
    recorded = sites(cfg, site.pair.config).get(site.name)
    if isinstance(recorded, tuple):
        return np.asarray(recorded, int)
    return np.arange(site.size)


def groups_left(cfg: Any, pair: Pair, name: str) -> tuple[int, ...] | None:
    """How many heads each key/value group has that is left; None if no layout says it."""
    recorded = sites(cfg, pair.config).get(name)
    if not isinstance(recorded, tuple):
        return None
    heads, groups = pair.width_expression, pair.group_expression
    if heads is None or groups is None:
        raise ConfigError(
            "the layout says which heads are left, and the spec does not say how they are grouped",
            path=name,
            mend="name the config keys in the spec: Pair(width=..., group_width=...)",
        )
    each = heads.read(cfg) // groups.read(cfg)
    _, counts = np.unique(np.asarray(recorded, int) // each, return_counts=True)
    return tuple(counts.tolist())


def written(cfg: Any, spec: Spec | None, sites: Mapping[str, Recorded]) -> dict[str, Any]:
    """The value of `flaxslim_layout` for these sites, with what leads a reader of it on."""
    names = _config.read(cfg, "architectures") if _config.has(cfg, "architectures") else None
    stem = names[0].removeprefix("Flax") if names else "...Model"
    value: dict[str, Any] = {
        "version": VERSION,
        "load": f"flaxslim.from_pretrained(Flax{stem}, folder)",
        "sites": {
            name: list(left) if isinstance(left, tuple) else left for name, left in sites.items()
        },
    }
    return value if spec is None else {**value, "spec": spec.to_dict()}
