"""The sizes that a config records, as what each Linen module has to be told.

A stock class asks its config for one width and one number of heads. Where a layer has others
(`flaxslim._record`), its modules are told so while they are traced (`flaxslim._intercept`): a
`Dense` its features, an attention module its heads. `Layout.of(config)` says which module is told
what, by its path.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _config, _record, specs
from flaxslim._axes import Axes
from flaxslim._config import Width
from flaxslim._pair import Pair, measure
from flaxslim._roots import beside, root_regex
from flaxslim._spec import Spec
from flaxslim._told import Argument, Told, both
from flaxslim.errors import LayoutError, nearest


class Layout:
    """What the modules of a model are told, by their paths."""

    def __init__(
        self,
        told: Mapping[tuple[str, str], Told],
        everywhere: Sequence[tuple[re.Pattern[str], Told]] = (),
    ):
        """`told` by subtree of a composite ("" for all) and path below some prefix of it.

        A path with "/" in front has no prefix. `layers` are the names of all that are told the
        sizes of a kernel. `everywhere`: what all sites of a pair are told if
        any of them is told something, by what the whole path of the module looks like.
        """
        self._everywhere = tuple(everywhere)
        self._told: dict[str, list[tuple[str, Told]]] = {}
        for (tree, path), what in told.items():
            self._told.setdefault(path, []).append((tree, what))
        self._found: dict[tuple[str, ...], Told | None] = {}
        self.layers = frozenset(
            path.rpartition("/")[2] for (_, path), what in told.items() if what.dims
        )

    @classmethod
    def of(cls, cfg: Any, spec: Spec | None = None) -> "Layout | None":
        """The layout of a config; None if its plain keys say all.

        `spec` is only needed for a model of one's own whose config does not keep it.
        Raises `LayoutError` if it cannot be read, or says what the spec does not know.
        """
        spec = spec or _record.spec_of(cfg)
        if spec is None:
            if any(_record.is_laid_out(cfg, prefix) for prefix in _record.parts(cfg)):
                specs.spec_for(cfg, "all")  # which says what is unknown
            return None
        told: dict[tuple[str, str], Told] = {}
        known: set[tuple[str, str]] = set()
        everywhere: list[tuple[re.Pattern[str], Told]] = []
        family = specs.known(cfg)
        for pair in spec:
            found = list(_sites(pair, cfg, ours=pair in family))
            for name, place, size in found:
                known.add((pair.config, name))
                for path, what in _told(pair, cfg, name, place, size):
                    before = told.get(at := (pair.tree, path))
                    told[at] = what if before is None else both(before, what, path)
            everywhere += _passed_on(pair) if found else ()
        _check_all_known(spec, cfg, known)
        return cls(told, everywhere) if told else None

    @functools.cached_property
    def key(self) -> str:
        """What two layouts have in common that tell all modules the same; quickly hashed."""
        told = sorted((path, tree, t) for path, own in self._told.items() for tree, t in own)
        return repr(_plain([told, self._everywhere]))

    def at(self, path: tuple[str, ...]) -> Told | None:
        """What the module at a path is told, if anything; `LayoutError` if that is absurd."""
        if path not in self._found:
            self._found[path] = self._find(path)
        if (told := self._found[path]) is not None and told.wrong is not None:
            raise told.wrong
        return told

    def _find(self, path: tuple[str, ...]) -> Told | None:
        for i in range(len(path)):
            name = "/".join(path[i:])
            for tree, told in self._told.get(name, ()):
                if path[: len(parts := _parts(tree))] == parts:
                    return told
            for tree, told in self._told.get(f"/{name}", ()):
                if path[:i] == _parts(tree):
                    return told
        whole = "/".join(path)
        return next((told for regex, told in self._everywhere if regex.fullmatch(whole)), None)


def _plain(value: Any) -> Any:
    """Arrays, dataclasses and regular expressions, one in the other, as lists that say all."""
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    if isinstance(value, np.ndarray):
        return [value.shape, value.tolist()]
    if dataclasses.is_dataclass(value):
        return _plain([*vars(value).values()])
    return value.pattern if isinstance(value, re.Pattern) else value


def _parts(tree: str) -> tuple[str, ...]:
    return tuple(filter(None, tree.split("/")))


def name_regex(pair: Pair) -> re.Pattern[str]:
    """What the name of a site of this pair looks like: `front` if it is a whole path, `place`."""
    unprefixed = dataclasses.replace(pair, tree="", at="/" + pair.at.lstrip("/"))
    whole = "" if not pair.at or pair.at.startswith("/") else "?"
    front = f"(?:/(?P<front>(?:[^/]+/)*?)){whole}"
    return re.compile(front + root_regex(unprefixed) + re.escape(pair.second))


def _sites(pair: Pair, cfg: Any, *, ours: bool) -> Iterator[tuple[str, str, _record.Recorded]]:
    """The sites of a pair that a config has a size of its own for: name, place, size.

    `ours`: the pair is of the family that the config names, whose layers it counts.
    """
    regex = name_regex(pair)
    recorded = _record.sites(cfg, pair.config)
    for name, size in recorded.items():
        # What does not fit may be another pair's at the same place: layers that are scanned.
        if (match := regex.fullmatch(name)) and _record.fits(pair, size):
            if ours:
                _check_layer(pair, cfg, name, match.groups()[3:])
            front = "" if match["front"] is None else "/" + match["front"]
            place = front + match["place"]
            yield name, place, _record.checked(cfg, pair, name, size)
    for layer in _record.per_layer(cfg, pair.config):
        name = _record.by_number(pair, layer)
        size = _record.own_width(cfg, pair, layer)
        if name is not None and name not in recorded and size is not None:
            if ours:
                _check_layer(pair, cfg, name, (str(layer),))
            yield name, name.removesuffix(pair.second), size


_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
_COUNTS += ("decoder_layers", "num_decoder_layers")


def _check_layer(pair: Pair, cfg: Any, name: str, places: Sequence[str]) -> None:
    """Raise `LayoutError` for a layer that the family's class does not have."""
    keys = [pair.config + key for key in _COUNTS if _config.has(cfg, pair.config + key)]
    counts = [count for key in keys if type(count := _config.read(cfg, key)) is int]
    if len(places) != 1 or not counts:
        return
    if not places[0].isdigit() or int(places[0]) >= max(counts):
        raise LayoutError(
            "the layout has a layer that the model does not have",
            path=name,
            seen=f"layer {places[0]}",
            expected=f"0 to {max(counts) - 1}",
            mend="use the config.json that was saved with these parameters",
        )


def _check_all_known(spec: Spec, cfg: Any, known: set[tuple[str, str]]) -> None:
    for prefix in {pair.config for pair in spec}:
        pairs = [pair for pair in spec if pair.config == prefix]
        for name, size in _record.sites(cfg, prefix).items():
            if (prefix, name) not in known:
                raise _unknown_site(spec, pairs, name, size, [other for _, other in known])
        keys = {
            expression.key.removeprefix(prefix)
            for pair in pairs
            if _record.by_number(pair, 0)
            and (expression := pair.width_expression) is not None
            and expression.key is not None
            and pair.axis == "f"
        }
        for layer, own in _record.per_layer(cfg, prefix).items():
            if unknown := sorted(own.keys() - keys):
                raise LayoutError(
                    "per_layer_config says something that flaxslim cannot run in a stock class",
                    path=f"{prefix}{_record.PER_LAYER}.{layer}.{unknown[0]}",
                    seen=own[unknown[0]],
                    expected="only " + (", ".join(sorted(keys)) or "the layout's sites"),
                    mend="run this model with a class that knows the key",
                )


def _unknown_site(
    spec: Spec, pairs: Sequence[Pair], name: str, size: _record.Recorded, known: Sequence[str]
) -> LayoutError:
    for pair in pairs:
        if name_regex(pair).fullmatch(name):
            return _record.misfit(pair, name, size)
    return LayoutError(
        f"the layout has a site that {spec.name} does not know",
        path=f"{pairs[0].config}{_record.LAYOUT}.sites.{name}",
        expected=" or ".join(f"{pair.at}/{pair.second}" for pair in pairs),
        near=nearest(name, known),
        mend="use the config.json that was saved with these parameters; for a model of your own "
        "give its spec",
    )


# --- what is told at one site -----------------------------------------------------------------


def _told(
    pair: Pair, cfg: Any, name: str, place: str, size: _record.Recorded
) -> Iterator[tuple[str, Told]]:
    """The modules of one site by path, and what each is told."""
    sizes = _Sizes.of(pair, cfg, name, size)
    heads = np.asarray(size, int) if isinstance(size, tuple) else None
    root = place.strip("/")
    for path, what in (
        *_writing(pair, sizes),
        *_reading(pair, sizes),
        *_sized(pair, cfg, sizes, heads),
    ):
        found = beside(root, path) if path else root
        yield f"/{found}" if place.startswith("/") else found, what


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Sizes:
    """The sizes of the axes of one site, and of its key/value groups.

    Attention that is dead as a whole is traced with one head of zeros, which no layer owns: then
    `run`, the sizes that it is traced with, differ from the real ones.
    """

    real: Mapping[str, int]
    groups: tuple[int, ...]
    run: Mapping[str, int]
    run_groups: tuple[int, ...]
    empty: bool

    @classmethod
    def of(cls, pair: Pair, cfg: Any, name: str, size: _record.Recorded) -> "_Sizes":
        width = size if isinstance(size, int) else len(size)
        groups = _groups(pair, cfg, name, size)
        known = {
            name: Width(expression=expression, prefix=pair.config).read(cfg)
            for name, expression in pair.sizes.items()
        }
        own = {pair.axis: width} | ({pair.group: len(groups)} if pair.group else {})
        ghost = width == 0 and bool(pair.modules)
        return cls(
            real=known | own,
            groups=groups,
            run=known | (dict.fromkeys(own, 1) if ghost else own),
            run_groups=(1,) if ghost and pair.group else groups,
            empty=width == 0,
        )

    @property
    def ghost(self) -> bool:
        return self.real != self.run


def _owners(pair: Pair) -> dict[str, str]:
    """The modules whose kernels are cut along their outputs, and the patterns of these."""
    tables = {_module_of(name): axes for name, axes in pair.tables.items()}
    return {**dict.fromkeys(pair.firsts, pair.first_axes), **pair.also, **tables}


def _writing(pair: Pair, sizes: _Sizes) -> Iterator[tuple[str, Told]]:
    """What puts the channels out."""
    carried = {pair.axis, *pair.inner}
    for path, pattern in _owners(pair).items():
        if path in pair.modules:
            continue
        outputs = None
        if sizes.ghost:
            outputs = tuple(d for d in _dims(pattern, pair, sizes.run, carried) if d is not None)
        dims = _dims(pattern, pair, sizes.real, {pair.axis_in(pattern)})
        yield path, Told(dims=dims, early=True, empty=sizes.empty, outputs=outputs)


def _reading(pair: Pair, sizes: _Sizes) -> Iterator[tuple[str, Told]]:
    """What reads them, where there are none."""
    carried = {pair.axis, *pair.inner}
    reading = {pair.second: pair.second_axes, **pair.readers}
    for path, pattern in reading.items() if sizes.empty else ():
        read = [dim for dim in Axes(pattern).dimensions if {*dim} & carried]
        inputs = next(i for i, dim in enumerate(read) if pair.axis in dim) - len(read)
        yield path, Told(empty=True, inputs=inputs if sizes.ghost else None)


def _sized(
    pair: Pair, cfg: Any, sizes: _Sizes, heads: np.ndarray | None
) -> Iterator[tuple[str, Told]]:
    """What has sizes of its own by name, or arguments with an entry for each head."""
    owners = _owners(pair)
    for path in {*pair.modules, *pair.arguments}:
        early = path in owners
        # What makes tensors makes them without a head, and gives out one of zeros.
        own = (sizes.real, sizes.groups) if early else (sizes.run, sizes.run_groups)
        attributes = pair.modules.get(path, {})
        yield (
            path,
            Told(
                attributes=tuple((name, measure(size, *own)) for name, size in attributes.items()),
                early=early,
                outputs=() if early and sizes.ghost else None,
                arguments=tuple(_arguments(pair, cfg, path, heads)),
            ),
        )


def _module_of(table: str) -> str:
    """The module that owns a table, in whichever collection of its it lies.

    >>> _module_of("batch_stats:bn/mean"), _module_of("../relative_bias/embedding")
    ('bn', '../relative_bias')
    """
    return table.rpartition(":")[2].rpartition("/")[0]


def _groups(pair: Pair, cfg: Any, name: str, size: _record.Recorded) -> tuple[int, ...]:
    if pair.group is None:
        return ()
    if isinstance(size, int):
        raise LayoutError(
            "a layout cannot say how the heads of stacked layers are grouped",
            path=name,
            seen=f"{size} heads for all layers of a stack, in groups of key/value heads",
            mend="build the class with a config that says both numbers in its plain keys",
        )
    return _record.group_counts(cfg, pair, name, size)


def _dims(
    pattern: str, pair: Pair, sizes: Mapping[str, int], carried: set[str]
) -> tuple[int | None, ...]:
    """The dimensions of a kernel that carry some axes, as sizes; None for the others."""
    dims: list[int | None] = []
    for factors in Axes(pattern).dimensions:
        if {*factors} & carried and all(isinstance(f, int) or f in sizes for f in factors):
            dims.append(int(np.prod([f if isinstance(f, int) else sizes[f] for f in factors])))
        else:
            dims.append(None)
    return tuple(dims)


def _arguments(pair: Pair, cfg: Any, path: str, heads: np.ndarray | None) -> Iterator[Argument]:
    expression = pair.width_expression
    if heads is None or expression is None:
        return
    for name, pattern in pair.arguments.get(path, {}).items():
        if pair.axis in Axes(pattern).names:
            yield Argument(
                name=name,
                axis=Axes(pattern).dimension(pair.axis),
                heads=heads if len(heads) else np.zeros(1, int),
                dense=expression.read(cfg),
            )
        else:
            yield _one_for_all(name, pattern)


def _one_for_all(name: str, pattern: str) -> Argument:
    axis = Axes(pattern).factors.index(1)
    return Argument(name=name, axis=axis, heads=np.zeros(1, int), dense=None)


def _passed_on(pair: Pair) -> Iterator[tuple[re.Pattern[str], Told]]:
    """Arguments that one layer gets from another, which may have another number of heads."""
    for path, patterns in pair.arguments.items():
        shared = tuple(
            _one_for_all(name, pattern)
            for name, pattern in patterns.items()
            if pair.axis not in Axes(pattern).names
        )
        if shared:
            regex = root_regex(pair).removesuffix("/)") + ")" + (f"/{path}" if path else "")
            yield re.compile(regex), Told(arguments=shared)
