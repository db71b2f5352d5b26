"""What a config is to say after a cut: in plain keys where they can, else in a layout.

A plan's `values` are a patch: plain keys as they will be, and of `per_layer_config` and
`flaxslim_layout` the entries of the plan's own sites alone (None: take it out). So two plans that
were made from one config do not undo each other.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flaxslim import _config, _record
from flaxslim._config import Width
from flaxslim._layout import name_regex
from flaxslim._pair import Pair
from flaxslim._plan import Cut, Resize
from flaxslim._record import LAYOUT, PER_LAYER, Recorded
from flaxslim._spec import Site, Spec
from flaxslim.errors import ConfigKeptWarning, FlaxslimError, LayoutError, NothingMatchedError
from flaxslim.specs import known


def values(
    spec: Spec, cuts: Sequence[Cut], cfg: Any, policy: str, shared: Collection[str] = ()
) -> tuple[dict[str, Any], tuple[Resize, ...]]:
    """The (nested) keys and values to write, and what became of each width, for the reader.

    The keys in `shared` say the widths of other sites, too, and stay as they are.
    """
    written: dict[str, Any] = {}
    resizes: list[Resize] = []
    layouts: dict[str, _Layout] = {}
    for members in _by_key(cuts, cfg):
        pair, expression = members[0].site.pair, members[0].site.pair.width_expression
        layout = layouts.setdefault(pair.config, _Layout(spec, cfg, pair.config))
        if expression is None:
            layout.say_again(members)
            continue
        resizes.append(Resize.of(expression.label, members))
        if policy == "per_layer":
            base = _base(members, cfg, shared)
        else:
            base = members[0] if resizes[-1].after < members[0].site.size else None
        plain = expression.read(cfg) if base is None else base.width
        if base is not None and plain != expression.read(cfg):
            written |= _plain(expression, base, cfg)
        for cut in members if policy == "per_layer" or base is not None else ():
            layout.say(cut, expression, None if cut.width == plain else cut.width)
    if written or any(layout.changes for layout in layouts.values()):
        for layout in layouts.values():
            written |= layout.patch()
    return written, tuple(resizes)


def untold(cuts: Iterable[Cut], cfg: Any) -> list[Pair]:
    """The pairs that were cut and whose size no key of the config says: channels or groups."""
    pairs = {
        cut.site.pair: None
        for cut in cuts
        if cut.removed
        and _untold(cut)
        and cut.site.name not in _record.sites(cfg, cut.site.pair.config)
    }
    return list(pairs)


def _untold(cut: Cut) -> bool:
    pair, before = cut.site.pair, cut.site.groups
    return pair.width is None or (pair.group_width is None and len(cut.groups) != len(before))


def _by_key(cuts: Iterable[Cut], cfg: Any) -> list[list[Cut]]:
    """The cuts that share a width key, and what it says (or a pair, where there is none)."""
    groups: dict[Any, list[Cut]] = {}
    for cut in cuts:
        expression = cut.site.pair.width_expression
        key = (expression.label, expression.read(cfg)) if expression else cut.site.pair
        groups.setdefault((key, expression is None and cut.site.size), []).append(cut)
    return list(groups.values())


def _plain(expression: Width, cut: Cut, cfg: Any) -> dict[str, Any]:
    """One width in plain keys; of heads in groups, the number of groups as well."""
    written = expression.write(cfg, cut.width)
    if (groups := cut.site.pair.group_expression) is not None and cut.site.groups:
        written |= groups.write(cfg, len(cut.groups))
    return written


def _base(cuts: Sequence[Cut], cfg: Any, shared: Collection[str]) -> Cut | None:
    """The cut whose width the plain key is to say; None if it stays as it is.

    Heads are numbered by the plain keys, which therefore change only if no layout is needed.
    """
    pair, expression = cuts[0].site.pair, cuts[0].site.pair.width_expression
    assert expression is not None
    if pair.fixed or expression.key is None or expression.key in shared:
        return None
    step = expression.step(cfg)
    sayable = [cut for cut in cuts if cut.width and cut.width % step == 0]
    largest = max(sayable, key=lambda cut: cut.width, default=None)
    if pair.axis != "h" or largest is None:
        return largest
    even = len({cut.groups for cut in cuts}) == 1 and len({*cuts[0].groups}) <= 1
    same = len({cut.width for cut in cuts}) == 1
    return largest if even and same else None


def shared_keys(spec: Spec, sites: Sequence[Site], params: Any, cfg: Any) -> dict[str, str]:
    """The width keys that cannot change with the widths of these sites, and why."""
    said: dict[str, set[int]] = {}
    for expression in {site.pair.width_expression for site in sites}:
        if expression is not None and expression.key:
            said.setdefault(expression.key, set()).add(expression.read(cfg))
    several = [key for key, widths in said.items() if len(widths) > 1]
    unnamed = "is the width of other layers, too, which the spec does not name: give the spec of "
    return {
        **dict.fromkeys(_unnamed_keys(spec, sites, params, cfg), f"{unnamed}them all"),
        **dict.fromkeys(several, "says the widths of several layers, each in a way of its own"),
    }


def _unnamed_keys(spec: Spec, sites: Sequence[Site], params: Any, cfg: Any) -> frozenset[str]:
    """The width keys that say the widths of more sites of the model than these.

    So it is where a spec names only some of the layers of a family.
    """
    named, keys = {*spec}, {key for pair in spec if (key := _key(pair))}
    family = tuple(pair for pair in _record.spec_of(cfg) or () if _key(pair) in keys)
    if all(named & {pair, _in_torch(pair)} for pair in family):
        return frozenset()
    whole = Spec(name="", pairs=family)
    covered = {site.second.path for site in sites}
    try:
        others = (whole + whole.torch()).sites(params, cfg)
    except NothingMatchedError:
        return frozenset()
    except FlaxslimError:  # other layers are there, and cannot be told
        return frozenset(keys)
    return frozenset(
        key for site in others if site.second.path not in covered and (key := _key(site.pair))
    )


def _key(pair: Pair) -> str | None:
    return pair.width_expression.key if pair.width_expression else None


def _in_torch(pair: Pair) -> Pair:
    return next(iter(Spec(name="", pairs=pair).torch()))


class _Layout:
    """What the layout of one part of a config is to say of the sites that are cut."""

    def __init__(self, spec: Spec, cfg: Any, prefix: str):
        self.cfg, self.prefix, self.spec = cfg, prefix, spec
        self._sites, self._layers = _record.sites(cfg, prefix), _record.per_layer(cfg, prefix)
        part = _config.read(cfg, prefix.rstrip(".")) if prefix and cfg is not None else cfg
        whole = (_record.spec_of(cfg) or spec) + spec
        self._one_stack = _one_stack(whole, prefix) and _config.model_type(part) is not None
        self._cut: list[Site] = []
        # By site; by layer and key. None: the plain key says it.
        self._new: dict[str, Recorded | None] = {}
        self._own: dict[int, dict[str, Any]] = {}
        self._said: dict[str, Recorded | None] = {}

    def say(self, cut: Cut, expression: Width | None, width: int | None) -> None:
        """Record a width, or that the plain key says it (None)."""
        site, key = cut.site, (expression and expression.key) or ""
        value = None if width is None else self._value(cut, width)
        if self._said.setdefault(site.name, value) != value:
            raise _one_name(site, self.prefix, (self._said[site.name], value))
        self._cut.append(site)
        by_number = None
        if key and site.layer is not None and _record.by_number(site.pair, site.layer) == site.name:
            if expression and width is not None and self._one_stack and site.pair.axis == "f":
                sayable = width % expression.step(self.cfg) == 0
                by_number = expression.write(self.cfg, width)[key] if sayable else None
            own = self._own.setdefault(site.layer, {})
            own[key.removeprefix(self.prefix)] = by_number
        self._new[site.name] = value if by_number is None else None

    def say_again(self, cuts: Sequence[Cut]) -> None:
        """Keep up what is recorded of sites whose pair has no width key."""
        for cut in cuts:
            if cut.site.name in self._sites:
                self.say(cut, None, cut.width)

    def _value(self, cut: Cut, width: int) -> Recorded:
        if cut.site.pair.axis != "h" or cut.site.stack:
            return width
        before = self._sites.get(cut.site.name)
        left = before if isinstance(before, tuple) else range(cut.site.size)
        return tuple(left[i] for i in cut.kept[0].tolist())

    @property
    def changes(self) -> bool:
        return any(self._sites.get(name) != value for name, value in self._new.items()) or any(
            self._layers.get(layer, {}).get(key) != value
            for layer, own in self._own.items()
            for key, value in own.items()
        )

    def patch(self) -> dict[str, Any]:
        """The entries of these sites that there are to be, and those that there were (None)."""
        sites = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._new.items()
            if value is not None or name in self._sites
        }
        layers: dict[str, dict[str, Any]] = {}
        for layer, own in self._own.items():
            before = self._layers.get(layer, {})
            if kept := {k: v for k, v in own.items() if v is not None or k in before}:
                layers[str(layer)] = kept
        if not sites and not layers:
            return {}
        family = [(pair, name_regex(pair)) for pair in known(self.cfg)]
        own = tuple(dict.fromkeys(site.pair for site in self._cut if not _is_read(site, family)))
        spec = {"spec": Spec(name=self.spec.name, pairs=own).to_dict()} if own else {}
        patch: dict[str, Any] = {self.prefix + LAYOUT: {"sites": sites, **spec}}
        return patch | ({self.prefix + PER_LAYER: layers} if layers else {})


def _is_read(site: Site, family: Iterable[tuple[Pair, re.Pattern[str]]]) -> bool:
    """Whether a pair of the family says all of a site, be it under PyTorch names."""
    return any(
        pair.config == site.pair.config
        and pair.second == site.pair.second
        and {*site.pair.layers} <= {*pair.layers}
        and regex.fullmatch(site.name)
        for pair, regex in family
    )


def _one_stack(spec: Spec, prefix: str) -> bool:
    """Whether a number says which layer: the widths of the part are those of one stack."""
    pairs = [pair for pair in spec if pair.config == prefix]
    places = {pair.at for pair in pairs if pair.axis == "f" and "{" in pair.at}
    return len(places) == 1 and next(iter(places)).count("{") == 1


def _one_name(site: Site, prefix: str, values: Sequence[Recorded | None]) -> LayoutError:
    return LayoutError(
        "two sites of the model have one name, by which a layout cannot tell them apart",
        path=f"{prefix}{LAYOUT}.sites.{site.name}",
        seen=" and ".join("as the plain key says" if v is None else str(v) for v in values),
        expected="the same of both",
        mend="slim each of them alone, with a config of its own; or give the pairs a config part "
        "each: Pair(config=...)",
    )


# --- such values joined, and put into a config ------------------------------------------------


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The values of two plans, of which the second follows the first."""
    both = {**first, **second}
    for key in first.keys() & second.keys():
        name = key.rpartition(".")[2]
        if name == PER_LAYER:
            both[key] = _overlaid(first[key], second[key])
        elif name == LAYOUT:
            both[key] = {"sites": {**first[key]["sites"], **second[key]["sites"]}}
            specs = [Spec.from_dict(v[key]["spec"]) for v in (first, second) if "spec" in v[key]]
            if specs:
                both[key]["spec"] = functools.reduce(Spec.__add__, specs).to_dict()
    return both


def _overlaid(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    layers = dict.fromkeys((*below, *above))
    return {layer: {**below.get(layer, {}), **above.get(layer, {})} for layer in layers}


def left_plain(values: Mapping[str, Any], site: Site) -> bool:
    """Whether the values of a plan record nothing of a site, so that the plain key says it."""
    prefix, name = site.pair.config, site.name
    if values.get(prefix + LAYOUT, {"sites": {}})["sites"].get(name) is not None:
        return False
    key, layers = _key(site.pair), values.get(prefix + PER_LAYER, {})
    own = layers.get(str(site.layer), {}) if site.layer is not None else {}
    return own.get((key or "").removeprefix(prefix)) is None


def replaced(cfg: Any, values: Mapping[str, Any]) -> Any:
    """The config with the values of a plan; what a layout says of other sites stays."""
    layouts = {key for key in values if key.rpartition(".")[2] in (LAYOUT, PER_LAYER)}
    written = {key: value for key, value in values.items() if key not in layouts}
    for prefix in {key.removesuffix(LAYOUT) for key in layouts if key.endswith(LAYOUT)}:
        written |= _merged(cfg, prefix, values)
    told = {k: v for k, v in written.items() if v is not None}
    new = _config.replace(cfg, told)
    if computed := _config.computed(cfg, new, told):
        warnings.warn(
            "fields of the config were computed from those that were cut, and they stay as "
            f"they are: {'; '.join(computed)}. If the model is built by one that should follow, "
            "set it in the new config, or make it a field(init=False)",
            ConfigKeptWarning,
            stacklevel=5,  # of `slim`
        )
    for key in (key for key, value in written.items() if value is None):
        new = _without(new, key)
    return new


def _merged(cfg: Any, prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Both layout keys of one part of a config, None where one has nothing to say any more."""
    patch = values[prefix + LAYOUT]
    sites = {**_record.sites(cfg, prefix), **patch["sites"]}
    sites = {name: value for name, value in sites.items() if value is not None}
    own = {int(layer): entries for layer, entries in values.get(prefix + PER_LAYER, {}).items()}
    layers = {
        layer: kept
        for layer, entries in sorted(_overlaid(_record.per_layer(cfg, prefix), own).items())
        if (
            kept := {
                k: v for k, v in entries.items() if v is not None or k not in own.get(layer, ())
            }
        )
    }
    specs = [Spec.from_dict(patch["spec"])] if "spec" in patch else []
    specs = [*filter(None, [_record.kept(cfg, prefix)]), *specs]
    spec = functools.reduce(Spec.__add__, specs) if specs else None
    return {
        prefix + PER_LAYER: {str(layer): entries for layer, entries in layers.items()} or None,
        prefix + LAYOUT: _record.written(cfg, spec, sites) if sites or layers else None,
    }


def _without(cfg: Any, key: str) -> Any:
    """The config without a key, if it is there; where it cannot go (a field), it is None."""
    if not _config.has(cfg, key):
        return cfg
    head, _, tail = key.partition(".")
    if tail:
        return _config.replace(cfg, {head: _without(_config.read(cfg, head), tail)})
    new = _config.replace(cfg, {head: None})
    if isinstance(new, dict):
        del new[head]
    elif hasattr(new, "to_dict") and head in vars(new) and not dataclasses.is_dataclass(new):
        delattr(new, head)  # a config of transformers
    return new
