"""What a config is to say after a cut: in plain keys where they can, else in a layout."""

from collections.abc import Iterable, Sequence
from typing import Any

from flaxslim import _config, _record
from flaxslim._config import Width
from flaxslim._plan import Cut, Resize
from flaxslim._spec import Spec


def values(
    spec: Spec, cuts: Sequence[Cut], cfg: Any, policy: str
) -> tuple[dict[str, Any], tuple[Resize, ...]]:
    """The (nested) keys and values to write, and what became of each width, for the reader."""
    written: dict[str, Any] = {}
    resizes: list[Resize] = []
    layouts: dict[str, _Layout] = {}
    for members in _by_key(cuts):
        pair, expression = members[0].site.pair, members[0].site.pair.width_expression
        widths = [cut.width for cut in members]
        label = str(expression) if expression else pair.second
        if expression is not None:
            label = expression.key or label
            resizes.append(
                Resize(
                    width=label,
                    before=max(cut.site.size for cut in members),
                    after=max(widths),
                    least=min(widths),
                )
            )
        layout = layouts.setdefault(pair.config, _Layout(spec, cfg, pair.config, cuts))
        if policy == "uniform" or pair.width is None:
            if expression and max(widths) < members[0].site.size:
                written |= _plain(expression, members[0], cfg)
        else:
            written |= _per_layer(layout, members, cfg)
    for prefix, layout in layouts.items():
        written |= {prefix + key: value for key, value in layout.changed().items()}
    return written, tuple(resizes)


def _by_key(cuts: Iterable[Cut]) -> list[list[Cut]]:
    """The cuts that share a width key (or a pair, where there is none)."""
    groups: dict[Any, list[Cut]] = {}
    for cut in cuts:
        expression = cut.site.pair.width_expression
        key = (expression.key or str(expression)) if expression else (cut.site.pair, cut.site.size)
        groups.setdefault(key, []).append(cut)
    return list(groups.values())


def _plain(expression: Width, cut: Cut, cfg: Any) -> dict[str, Any]:
    """One width in plain keys; of heads in groups, the number of groups as well."""
    written = expression.write(cfg, cut.width)
    if (groups := cut.site.pair.group_expression) is not None and cut.site.groups:
        written |= groups.write(cfg, len(cut.groups))
    return written


def _per_layer(layout: "_Layout", cuts: Sequence[Cut], cfg: Any) -> dict[str, Any]:
    """Widths that may differ: the plain key says the largest it can, the layout the others."""
    expression = cuts[0].site.pair.width_expression
    assert expression is not None
    base = _base(cuts, cfg)
    plain: dict[str, Any] = {}
    if base is not None and base.width != expression.read(cfg):
        plain = _plain(expression, base, cfg)
    width = expression.read(cfg) if base is None else base.width
    for cut in cuts:
        layout.say(cut, expression, None if cut.width == width else cut.width)
    return plain


def _base(cuts: Sequence[Cut], cfg: Any) -> Cut | None:
    """The cut whose width the plain key is to say; None if it stays as it is.

    Heads are numbered by the plain keys, which therefore change only if no layout is needed.
    """
    pair, expression = cuts[0].site.pair, cuts[0].site.pair.width_expression
    assert expression is not None
    if pair.fixed or expression.key is None:
        return None
    step = expression.step(cfg)
    sayable = [cut for cut in cuts if cut.width and cut.width % step == 0]
    largest = max(sayable, key=lambda cut: cut.width, default=None)
    if pair.axis != "h" or largest is None:
        return largest
    even = len({cut.groups for cut in cuts}) == 1 and len({*cuts[0].groups}) <= 1
    same = len({cut.width for cut in cuts}) == 1
    return largest if even and same else None


class _Layout:
    """The layout of one part of a config while it is made: what is there, and what changes."""

    def __init__(self, spec: Spec, cfg: Any, prefix: str, cuts: Sequence[Cut]):
        self.spec, self.cfg, self.prefix = spec, cfg, prefix
        self.sites = dict(_record.sites(cfg, prefix))
        self.layers = {layer: dict(own) for layer, own in _record.per_layer(cfg, prefix).items()}
        self._before = (dict(self.sites), {n: dict(own) for n, own in self.layers.items()})
        self._single = _one_stack(spec, prefix) and _config.model_type(self._part(cfg)) is not None
        self._pairs = {cut.site.pair for cut in cuts if cut.site.pair.config == prefix}

    def _part(self, cfg: Any) -> Any:
        return _config.read(cfg, self.prefix.rstrip(".")) if self.prefix else cfg

    def say(self, cut: Cut, expression: Width, width: int | None) -> None:
        """Record a width, or that the plain key says it (None)."""
        site, key = cut.site, (expression.key or "").removeprefix(self.prefix)
        if site.layer is not None:
            own = self.layers.get(site.layer, {})
            own.pop(key, None)
        heads = self.sites.pop(site.name, None)
        if width is None:
            return
        sayable = expression.key is not None and width % expression.step(self.cfg) == 0
        if self._single and sayable and site.pair.axis == "f" and site.layer is not None:
            new = expression.write(self.cfg, width)
            own = {name.removeprefix(self.prefix): value for name, value in new.items()}
            self.layers.setdefault(site.layer, {}).update(own)
        elif site.pair.axis == "h" and not site.stack:
            left = heads if isinstance(heads, tuple) else range(site.size)
            self.sites[site.name] = tuple(left[i] for i in cut.kept[0].tolist())
        else:
            self.sites[site.name] = width

    def changed(self) -> dict[str, Any]:
        """The keys to write, if anything changed."""
        self.layers = {layer: own for layer, own in self.layers.items() if own}
        if (self.sites, self.layers) == self._before:
            return {}
        written: dict[str, Any] = {}
        if self.layers or self._before[1]:
            written[_record.PER_LAYER] = {
                str(n): self.layers[n] for n in sorted(self.layers)
            } or None
        written[_record.LAYOUT] = (
            _record.written(self.cfg, self._own_spec(), self.sites)
            if self.sites or self.layers
            else None
        )
        return written

    def _own_spec(self) -> Spec | None:
        """The spec, if flaxslim would not find its pairs by the config."""
        from flaxslim.specs import known

        return None if self._pairs <= known(self.cfg) else self.spec


def _one_stack(spec: Spec, prefix: str) -> bool:
    """Whether a number says which layer: the widths of the part are those of one stack."""
    pairs = [pair for pair in spec if pair.config == prefix]
    places = {pair.at for pair in pairs if pair.axis == "f" and "{" in pair.at}
    return len(places) == 1 and next(iter(places)).count("{") == 1
