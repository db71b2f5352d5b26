"""A spec bound to a tree: which tensors each pair means there."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flaxslim import _record
from flaxslim._axes import WINDOW, Axes
from flaxslim._config import Width
from flaxslim._lora import Loras, low_rank, matrices
from flaxslim._pair import Pair, as_tuple
from flaxslim._roots import Root, find_roots, join, meant, site_name, table_path, whole_name
from flaxslim._spec import Site, Spec, Tensor
from flaxslim._tree import flatten
from flaxslim.errors import (
    AxisPatternError,
    ConfigError,
    FlaxslimError,
    IncompletePairError,
    NothingMatchedError,
    SiteShapeError,
    nearest,
)


def bind(spec: Spec, params: Any, cfg: Any) -> tuple[tuple[Site, ...], tuple[Pair, ...]]:
    """The sites of a spec in a tree, and the pairs that have none; raises as `Spec.sites` does."""
    leaves = flatten(params)
    loras = matrices(leaves)
    sites: list[Site] = []
    unmatched: list[Pair] = []
    partial: list[tuple[Pair, Root]] = []
    misfits: list[tuple[set[str], FlaxslimError]] = []
    for pair in spec:
        found = find_roots(pair, leaves)
        complete = [f for f in found if len(f.kernels) == len(pair.layers)]
        partial += [(pair, f) for f in found if len(f.kernels) < len(pair.layers)]
        fitting: list[tuple[Site, Root]] = []
        for f in complete:
            try:
                fitting.append((_site(pair, f, leaves, loras, cfg), f))
            except FlaxslimError as error:
                misfits.append((meant(pair, f, leaves), error))
        sites += _tie(fitting, leaves)
        if not fitting:
            unmatched.append(pair)
    sites = _fullest(sites)
    claimed = {tensor.path for site in sites for tensor in site.tensors}
    # The same names may hold another layout, which another pair describes: scanned layers.
    if unclaimed := [error for tensors, error in misfits if not claimed >= tensors]:
        # Of several, that of a pair whose patterns have as many dimensions at least.
        raise min(unclaimed, key=lambda error: isinstance(error, AxisPatternError))
    for pair, found in partial:
        # Half of a gated pair is often the whole of a plain one: T5's wo belongs to either.
        if not claimed.issuperset(found.kernels.values()):
            raise _incomplete(spec, pair, found, leaves)
    if not sites:
        raise _nothing(spec, leaves)
    _check_claims(sites)
    sites = _named(sites)
    return tuple(sorted(sites, key=lambda site: _natural(site.second.path))), tuple(unmatched)


def _natural(path: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path)]


# --- one site ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Tensors:
    """The tensors of a pair at one of its roots; `known` are sizes that the shapes do not tell."""

    pair: Pair
    found: Root
    leaves: Mapping[str, Any]
    known: tuple[tuple[str, int], ...]

    def axes(self, pattern: str) -> Axes:
        return Axes(pattern, self.known)

    def at(self, path: str, axes: Axes) -> Tensor:
        shape = getattr(self.leaves[path], "shape", None)
        if shape is None:
            raise SiteShapeError(
                "a tensor of a pair is not an array",
                path=path,
                seen=type(self.leaves[path]).__name__,
            )
        axes.sizes(shape, path=path)
        return Tensor(path=path, axes=axes, shape=tuple(shape))

    def kernel(self, layer: str, pattern: str) -> Tensor:
        return self.at(self.found.kernels[layer], self.axes(pattern))

    def bias(self, layer: str, given: str | None, axes: Axes) -> Tensor | None:
        name = given.removesuffix("?") if given else f"{layer}/{self.pair.bias}"
        path = join(self.found.path, name)
        if self.leaves.get(path) is not None:
            return self.at(path, axes)
        if given and not given.endswith("?"):
            raise IncompletePairError(
                "the spec names a bias that is not in the tree",
                path=path,
                near=nearest(path, self.leaves),
            )
        return None

    def first_biases(self, carried: set[str]) -> tuple[Tensor | None, ...]:
        pair = self.pair
        axes = self.axes(pair.first_axes).bias(carried)
        given = as_tuple(pair.first_bias) if pair.first_bias else (None,) * len(pair.firsts)
        return tuple(
            self.bias(layer, name, axes) for layer, name in zip(pair.firsts, given, strict=True)
        )

    def second_bias(self) -> Tensor | None:
        pair, axes = self.pair, self.axes(self.pair.second_axes)
        # What is in one dimension with the channels is summed over with them.
        summed = axes.dimensions[axes.dimension(pair.axis)]
        outside = {*axes.names} - {pair.axis, *pair.inner, *WINDOW, *summed}
        # A second layer with one output, as a vector, has no axis that a bias could have.
        return self.bias(pair.second, pair.second_bias, axes.bias(outside)) if outside else None

    def also(self, carried: set[str]) -> Iterator[Tensor]:
        for layer, pattern in self.pair.also.items():
            yield self.kernel(layer, pattern)
            bias = self.bias(layer, None, self.axes(pattern).bias(carried))
            yield from filter(None, [bias])
        for name, pattern in self.pair.tables.items():
            path = table_path(self.found.path, name)
            if path is not None and self.leaves.get(path) is not None:
                yield self.at(path, self.axes(pattern))


def _site(pair: Pair, found: Root, leaves: Mapping[str, Any], loras: Loras, cfg: Any) -> Site:
    tensors = _Tensors(pair=pair, found=found, leaves=leaves, known=_known(pair, cfg))
    stack = tensors.axes(pair.second_axes).stack
    carried = {pair.axis, *pair.inner, *stack}
    first = tuple(tensors.kernel(name, pair.first_axes) for name in pair.firsts)
    first_biases = tensors.first_biases(carried)
    second = tensors.kernel(pair.second, pair.second_axes)
    second_bias = tensors.second_bias()
    readers = tuple(tensors.kernel(layer, axes) for layer, axes in pair.readers.items())
    also = tuple(tensors.also(carried))
    sizes = second.axes.sizes(second.shape)
    numbered = len(found.names) == 1 and re.fullmatch(r"\d+", found.names[0])
    site = Site(
        root=found.path,
        pair=pair,
        name=site_name(pair, found.prefix, found.place),
        layer=int(found.names[0]) if numbered else None,
        size=sizes[pair.axis],
        first=first,
        first_biases=first_biases,
        second=second,
        second_bias=second_bias,
        readers=readers,
        also=also,
        lora=tuple(
            (t.path, matrix)
            for layers, reads in (((*first, *also), False), ((second, *readers), True))
            for t in layers
            if len(t.shape) > 1
            for matrix in low_rank(t, pair, loras, reads=reads)
        ),
        stack=tuple(sizes[name] for name in stack),
    )
    return _checked(dataclasses.replace(site, groups=_groups(site, cfg)), sizes)


def _known(pair: Pair, cfg: Any) -> tuple[tuple[str, int], ...]:
    widths = {
        name: Width(expression=expression, prefix=pair.config)
        for name, expression in pair.sizes.items()
    }
    if asked := [name for name, width in widths.items() if width.keyed and cfg is None]:
        raise ConfigError(
            f"the config is needed to tell the sizes of {', '.join(asked)}",
            path=pair.at or None,
            expected="a config with " + ", ".join(pair.sizes[name] for name in asked),
            mend="pass it: slim(params, cfg, ...), spec.sites(params, cfg)",
        )
    known = {name: width.read(cfg) for name, width in widths.items()}
    if wrong := [name for name, size in known.items() if size < 1]:
        raise ConfigError(
            f"the config says that axis {wrong[0]!r} has no size",
            path=pair.sizes[wrong[0]],
            seen=known[wrong[0]],
            expected="at least 1",
        )
    return tuple(known.items())


def _groups(site: Site, cfg: Any) -> tuple[int, ...]:
    """How many heads each key/value group has; empty if there are no groups."""
    pair = site.pair
    grouped = [t for t in site.cut if pair.group is not None and site.axis(t) == pair.group]
    if not grouped or pair.group is None:
        return ()
    count = grouped[0].axes.sizes(grouped[0].shape)[pair.group]
    left = _record.groups_left(cfg, pair, site.name)
    if left is not None and len(left) == count and sum(left) == site.size:
        return left
    if left is not None or site.size % max(count, 1) or (site.size and not count):
        raise SiteShapeError(
            "the heads do not divide into the key/value groups",
            path=grouped[0].path,
            seen=f"{count} groups for the {site.size} heads of {site.second.path}",
            expected="as many heads in each group, or the groups that the config's layout says"
            + (f": {left}" if left is not None else ""),
            mend="pass the config that was saved with these parameters",
        )
    return (site.size // count,) * count if count else ()


def _checked(site: Site, sizes: Mapping[str, int]) -> Site:
    """The site, if all its tensors agree about the axes that they share."""
    pair = site.pair
    expected = {name: size for name, size in sizes.items() if name in (pair.axis, *pair.inner)}
    expected |= dict(zip(site.second.axes.stack, site.stack, strict=True))
    if pair.group is not None:
        expected[pair.group] = len(site.groups)
    for t in site.cut:
        own = t.axes.sizes(t.shape)
        wrong = [name for name in own if name in expected and own[name] != expected[name]]
        lacking = [name for name in site.second.axes.stack if name not in own]
        if wrong:
            raise SiteShapeError(
                "two layers of one pair disagree about the number of channels",
                path=t.path,
                seen=f'{t.shape} by pattern "{t.axes}"',
                expected=f"{wrong[0]} = {expected[wrong[0]]}, as in {site.second.path} "
                f"{site.second.shape}",
                mend="check that the tree is whole, and the axis patterns of the spec "
                "(a transposed kernel?)",
            )
        if lacking:
            raise SiteShapeError(
                f"a tensor of a stacked pair has no axis {lacking[0]!r}",
                path=t.path,
                seen=f'{t.shape} by pattern "{t.axes}"',
                expected=f'the stack of {site.second.path}, "{site.second.axes}"',
                mend="name the axis in the pattern of every tensor, or in none",
            )
    if (bias := site.second_bias) is not None:
        ours, theirs = bias.axes.sizes(bias.shape), site.second.axes.sizes(site.second.shape)
        if any(ours[name] != theirs[name] for name in ours):
            raise SiteShapeError(
                "the bias of the second layer does not fit its kernel",
                path=bias.path,
                seen=bias.shape,
                expected=f"the outputs of {site.second.path} {site.second.shape}",
            )
    return site


# --- all sites --------------------------------------------------------------------------------


def _tie(found: Sequence[tuple[Site, Root]], leaves: Mapping[str, Any]) -> list[Site]:
    """The sites of one pair; those of a stack that shares a table are tied to each other.

    Such a table is cut once, with the first site that has it.
    """
    stacks: dict[str, list[Site]] = {}
    for site, place in found:
        stacks.setdefault(place.stack, []).append(site)
    tied: list[Site] = []
    for stack, members in stacks.items():
        tables = [_tables(site, leaves) for site in members]
        shared = set().union(*tables)
        if not shared or (all(tables) and sum(map(len, tables)) == len(shared)):
            tied += members
            continue
        tag = f"{members[0].pair.at} of {stack.strip('/') or 'the stack'}"
        for site in members:
            also = tuple(t for t in site.also if t.path not in shared or not _taken(t, tied))
            tied.append(dataclasses.replace(site, also=also, tied=tag))
    return tied


def _tables(site: Site, leaves: Mapping[str, Any]) -> set[str]:
    """The tables that a site uses."""
    paths = (table_path(site.root, name) for name in site.pair.tables)
    return {path for path in paths if path is not None and path in leaves}


def _taken(tensor: Tensor, sites: Iterable[Site]) -> bool:
    return any(t.path == tensor.path for site in sites for t in site.also)


def _fullest(sites: Sequence[Site]) -> list[Site]:
    """The sites, without those of a pair that another pair has as well, with more tensors.

    A gated layer has all that a plain one has, and a biased one all of one without.
    """
    by_second: dict[str, list[Site]] = {}
    for site in sites:
        by_second.setdefault(site.second.path, []).append(site)
    paths = {id(site): {t.path for t in site.tensors} for site in sites}
    return [
        site
        for site in sites
        if not any(paths[id(site)] < paths[id(other)] for other in by_second[site.second.path])
    ]


def _check_claims(sites: Iterable[Site]) -> None:
    """No axis of a tensor may belong to two sites, or to one twice: it would be cut twice.

    Nor may two sites have one second layer, by which a plan knows its cuts.
    """
    claims: dict[tuple[str, int], Site] = {}
    for site in sites:
        for t in site.cut:
            axis = t.path, t.axes.dimension(site.axis(t))
            if (other := claims.get(axis)) is site:
                raise SiteShapeError(
                    "a pair names one tensor twice, which would be cut twice",
                    path=t.path,
                    seen=str(site.pair),
                    mend="name it once; biases of layers are found by themselves, and need no "
                    "place in tables=",
                )
            if other is not None:
                raise SiteShapeError(
                    "two pairs of the spec claim the same axis of a tensor",
                    path=t.path,
                    seen=f"{other.pair} and {site.pair}",
                    mend="narrow `at` so that each layer belongs to one pair",
                )
            claims[axis] = site
    seconds: dict[str, Site] = {}
    for site in sites:
        if (other := seconds.setdefault(site.second.path, site)) is not site:
            raise SiteShapeError(
                "two pairs of the spec have the same second layer",
                path=site.second.path,
                seen=f"{other.pair} and {site.pair}",
                mend="cut by the one first and then by the other: two specs, one after another",
            )


def _named(sites: Sequence[Site]) -> list[Site]:
    """The sites, by their whole paths where a name would not tell two of them apart."""
    counts = Counter((site.pair.config, site.name) for site in sites)
    return [
        site
        if counts[site.pair.config, site.name] == 1
        else dataclasses.replace(site, name=whole_name(site.pair, site.root + "/"))
        for site in sites
    ]


def _incomplete(
    spec: Spec, pair: Pair, found: Root, leaves: Mapping[str, Any]
) -> IncompletePairError:
    missing = [name for name in pair.layers if name not in found.kernels]
    path = join(found.path, missing[0], pair.kernel)
    there = found.kernels.values()
    return IncompletePairError(
        f"half a pair of {spec.name}: {', '.join(there)} is there, {', '.join(missing)} is not",
        path=path,
        expected=f'an array of pattern "{pair.first_axes}" (first) or "{pair.second_axes}" '
        "(second)",
        near=nearest(path, [leaf for leaf in leaves if leaf not in there]),
        mend="pass the whole parameter tree, or narrow `at` in the spec if this layer is "
        "not part of a pair",
    )


def _nothing(spec: Spec, leaves: Mapping[str, Any]) -> NothingMatchedError:
    pair = next(iter(spec))
    wanted = join(pair.at.replace("{i}", "0"), pair.firsts[0], pair.kernel)
    return NothingMatchedError(
        f"spec {spec.name} matches nothing in this tree of {len(leaves)} tensors",
        expected=" or ".join(join(p.at or "**", n) for p in spec for n in (*p.firsts, p.second)),
        near=nearest(wanted, leaves),
        mend="check (a) that the spec is the one of this family (`flaxslim families`), "
        "(b) that the tree holds the layers and not just a head, "
        "(c) the layer root `at` and the layer names of a spec of your own",
    )
