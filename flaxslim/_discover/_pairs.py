"""Groups written as the pairs of a spec, as a person would have written them.

One group is one `Pair` at a concrete place; pairs that differ in the numbers of their layers alone
are one, with `{i}`. Whatever is written is bound to the tree again, and only what binds to the very
tensors of its groups is kept.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flaxslim._axes import WINDOW
from flaxslim._discover._atoms import Atom, Dims, roots, size_of
from flaxslim._discover._formula import Formula, formula
from flaxslim._discover._groups import Group, Verdict
from flaxslim._discover._rules import SCANNED
from flaxslim._discover._rules import WINDOW as WINDOW_REASON
from flaxslim._discover._trace import Walk
from flaxslim._errors import FlaxslimError
from flaxslim._sites import root_regex
from flaxslim._spec import Pair, Spec

# Collections of Linen beside "params" whose tensors a layer has too.
_PARAMS = "params"


class Unwritable(Exception):
    """A group cannot be said as a `Pair`; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """The parameters that were traced: their dimensions as atoms, and what the walk saw of them."""

    dims: Mapping[str, Dims]
    leaves: Mapping[str, Any]
    walk: Walk

    @functools.cached_property
    def folders(self) -> dict[str, list[str]]:
        """The tensors of each layer."""
        found: dict[str, list[str]] = {}
        for path in self.leaves:
            found.setdefault(path.rpartition("/")[0], []).append(path)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What became of the exact groups: pairs with the groups that each stands for, or why none."""

    pairs: tuple[tuple[Pair, tuple[Group, ...]], ...]
    failed: Mapping[Group, str]


def written(found: Sequence[Group], tree: Tree) -> Written:
    """The exact groups as pairs, folded over the layers."""
    within = _within(found)
    heads = {*within.values()}
    failed: dict[Group, str] = {}
    single: dict[Group, Pair] = {}
    folded: dict[Pair, list[Group]] = {}
    taken: set[str] = set()
    for group in found:
        if group.verdict is not Verdict.EXACT or group in heads:
            continue
        if group.seconds[0] in taken:  # a plan knows a pair by its second layer
            failed[group] = "its second layer is that of another pair"
            continue
        try:
            single[group] = _pair(group, within.get(group), tree)
            taken.add(group.seconds[0])
            folded.setdefault(_folded(group, single[group], tree), []).append(group)
        except (Unwritable, FlaxslimError) as error:
            failed[group] = str(error).partition("\n")[0]
    pairs: list[tuple[Pair, tuple[Group, ...]]] = []
    for pair, members in folded.items():
        if _misfit(pair, members, tree.leaves) is None:
            pairs.append((pair, tuple(members)))
            continue
        for group in members:  # the same names hold something else elsewhere
            own = dataclasses.replace(single[group], at="/" + single[group].at)
            misfit = _misfit(own, [group], _beside(group, tree))
            if misfit is None:
                pairs.append((own, (group,)))
            else:
                failed[group] = misfit
    return Written(pairs=tuple(pairs), failed=failed)


def _misfit(pair: Pair, groups: Sequence[Group], leaves: Mapping[str, Any]) -> str | None:
    """Why a pair does not bind to the tensors of these groups, all of them and no others."""
    try:
        sites = Spec(name="DISCOVERED", pairs=pair).sites(_reached(pair, leaves))
    except FlaxslimError as error:
        return error.problem
    bound: dict[str, set[tuple[str, int]]] = {}
    for site in sites:
        axes = {(t.path, t.axes.dimension(site.axis(t))) for t in site.cut}
        if len(axes) < len(site.cut):
            return "one of its tensors would be cut twice, as a bias and as another layer"
        bound.setdefault(site.tied or site.second.path, set()).update(axes)
    wanted = [sorted({(m.path, m.dimension) for m in group.members}) for group in groups]
    if sorted(map(sorted, bound.values())) != sorted(wanted):
        return "the names of its tensors stand for others too"
    return None


def _reached(pair: Pair, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """All that a pair can mean: what is below its root, and what is called as its tables are."""
    root = re.compile(root_regex(pair))
    tables = {re.split("[/:]", name)[-1] for name in pair.tables}
    return {
        path: leaf
        for path, leaf in leaves.items()
        if root.match(path) or path.rpartition("/")[2] in tables
    }


def _beside(group: Group, tree: Tree) -> dict[str, Any]:
    """The tensors of a group, and those in the same layers."""
    layers = {path.rpartition("/")[0] for path in group.paths}
    return {p: tree.leaves[p] for layer in layers for p in tree.folders[layer]}


# --- layers that share a table ----------------------------------------------------------------


def _folded(group: Group, pair: Pair, tree: Tree) -> Pair:
    """The pair of a group for any layer."""
    layers = _by_layer(group)
    if not layers:
        return _with_places(pair)
    try:
        pairs = [_with_places(_pair(layer, None, tree)) for layer in layers]
    except (Unwritable, FlaxslimError):
        return _with_places(pair)
    tables = {name: axes for one in pairs for name, axes in one.tables.items()}
    first, *others = (dataclasses.replace(one, tables=tables) for one in pairs)
    return _with_places(pair) if any(other != first for other in others) else first


def _by_layer(group: Group) -> list[Group]:
    """A group that spans layers by them: those of T5 share a table of position biases.

    Empty if its layers are not alike.
    """
    split = [second.split("/") for second in group.seconds]
    moving = [i for i, names in enumerate(zip(*split, strict=False)) if len({*names}) > 1]
    if len(split) < 2 or len(moving) != 1 or len({len(names) for names in split}) > 1:
        return []
    at = moving[0] + 1
    places = ["/".join(names[:at]) + "/" for names in split]
    layers = []
    for place, second in zip(places, group.seconds, strict=True):
        members = tuple(
            m
            for m in group.members
            if m.path.startswith(place) or not m.path.startswith(tuple(places))
        )
        sums = tuple(t for t in group.sums if any(second in v.weights for v in t.args))
        layers.append(dataclasses.replace(group, members=members, sums=sums, seconds=(second,)))
    return layers


# --- heads in groups --------------------------------------------------------------------------


def _within(found: Sequence[Group]) -> dict[Group, Group]:
    """For key/value groups, the heads in them: an axis always right inside of theirs.

    Both are exact: a group can go with all its heads, and each head by itself. (The values of a
    head lie in the same way inside of it, but its keys do not know of them: see `_groups`.)
    """
    own = {group.atom: group for group in found}
    within: dict[Group, Group] = {}
    for inner in found:
        if inner.verdict is not Verdict.INNER:
            continue
        outers = {
            dims[m.factor - 1] if m.factor else None
            for m in inner.members
            for dims in [inner.factors[m.path, m.dimension]]
        }
        outer = own.get(next(iter(outers))) if len(outers) == 1 else None  # pyright: ignore
        if outer is None or outer.verdict is not Verdict.EXACT or inner.seconds != outer.seconds:
            continue
        firsts = {source.path for source in formula(outer).sources}
        if firsts and not firsts & {*inner.paths}:
            within[outer] = inner
    return within


# --- one group --------------------------------------------------------------------------------


def _pair(group: Group, heads: Group | None, tree: Tree) -> Pair:
    writer = _Writer(group, heads, tree)
    return writer.pair()


class _Writer:
    """Writes one group as a pair at a concrete place."""

    def __init__(self, group: Group, heads: Group | None, tree: Tree):
        self.group, self.heads, self.tree = group, heads, tree
        self.second, *self.readers = group.seconds
        self.formula = _usable(formula(group), group, tree)
        self.firsts = self._firsts()
        self.inner = self._inner(self.firsts[0])
        self.axis = "h" if self.inner or heads is not None else "f"
        self.stack = self._stack()
        self.sizes: dict[str, int] = {}

    def pair(self) -> Pair:
        first, second = self.firsts[0], self.second
        kernels = [path for path in self.group.paths if path.endswith("/kernel")]
        root = _root([_layer(path) for path in (*self.firsts, *self.group.seconds, *kernels)])
        axes = {path: self._pattern(path) for path in self.group.paths}
        if any(axes[path] != axes[first] for path in self.firsts):
            raise Unwritable("the layers whose product it is have different shapes")
        biases = {s.path: s.bias for s in self.formula.sources if s.path in self.firsts}
        layers = {_layer(path) for path in (*self.firsts, *self.group.seconds)}
        taken = {*self.firsts, *self.group.seconds, *filter(None, biases.values())}
        also: dict[str, str] = {}
        for path in self.group.paths:
            if path not in taken and path.endswith("/kernel"):
                also[_below(root, _layer(path))] = axes[path]
                layers.add(_layer(path))
                taken.add(path)
        taken |= {f"{layer}/bias" for layer in layers - {_layer(p) for p in self.group.seconds}}
        tables = {_table(root, p): axes[p] for p in self.group.paths if p not in taken}
        first_bias = tuple(biases.get(path) for path in self.firsts)
        usual = tuple(f"{_layer(path)}/bias" for path in self.firsts)
        own = [b for b, u in zip(first_bias, usual, strict=True) if b is not None and b != u]
        bias = _bias_of(self.group, second, self.tree.walk)
        parts = self._parts()
        return Pair(
            at=root,
            first=_one_or_more([_below(root, _layer(path)) for path in self.firsts]),
            second=_below(root, _layer(second)),
            first_axes=axes[first],
            second_axes=axes[second],
            first_bias=_one_or_more([_below(root, b or f"{u}?") for b, u in
                                     zip(first_bias, usual, strict=True)]) if own else None,
            second_bias=_below(root, bias) if bias and bias != f"{_layer(second)}/bias" else None,
            activation=self.formula.activation,
            gated=self.formula.gated,
            axis=self.axis,
            also=also,
            readers={_below(root, _layer(path)): axes[path] for path in self.readers},
            tables=tables,
            parts=parts,
            group="g" if self.heads is not None else None,
            sizes={name: str(size) for name, size in sorted(self.sizes.items())},
            ragged=False,
        )  # fmt: skip

    def _firsts(self) -> list[str]:
        sources = list(dict.fromkeys(source.path for source in self.formula.sources))
        sources = [path for path in sources if path not in self.group.seconds]
        if self.formula.activation is None:
            sources = sources[:1]
        if sources:
            return sources
        # Whatever else has it; a layer rather than a tensor by itself.
        others = [path for path in self.group.paths if path not in self.group.seconds]
        if not others:
            raise Unwritable("nothing has it but the layers that read it")
        return [
            max(
                others,
                key=lambda path: (
                    path.endswith("/kernel"),
                    len(self._inner(path)),  # of attention the values rather than the keys
                    len(self.tree.dims[path]),
                ),
            )
        ]

    def _inner(self, first: str) -> list[Atom]:
        """What is inside of a channel: summed over with it, and in the first layer too."""
        summed = [
            atom
            for total in self.group.sums
            if any(self.second in value.weights for value in total.args)
            for dim in total.dims
            for atom in roots(dim)
        ]
        own = {atom for dim in self.tree.dims[first] for atom in roots(dim)}
        outside = {self.group.atom, *self.group.stack} - {
            a for a in self.group.stack if a in summed and self._after(a)
        }
        heads = {self.heads.atom} if self.heads is not None else set()
        return [a for a in dict.fromkeys(summed) if a in own and a not in outside | heads]

    def _after(self, atom: Atom) -> bool:
        """Whether it stands behind the group's own axis in the second layer."""
        order = [a for dim in self.tree.dims[self.second] for a in roots(dim)]
        return order.index(atom) > order.index(self.group.atom) if atom in order else False

    def _stack(self) -> dict[Atom, str]:
        """Names of the axes along which each index has channels of its own."""
        names: dict[Atom, str] = {}
        for atom in self.group.stack:
            alone = all(
                [*roots(dim)] == [atom]
                for path in self.group.paths
                for dim in self.tree.dims[path]
                if atom in roots(dim)
            )
            scanned = atom.reason is not None and atom.reason.why == SCANNED
            name = "l" if scanned else "e"
            everywhere = all(
                any(atom in roots(dim) for dim in self.tree.dims[path]) for path in self.group.paths
            )
            if alone and everywhere and atom not in self.inner and name not in names.values():
                names[atom] = name
        return names

    def _pattern(self, path: str) -> str:
        """The axis pattern of a tensor."""
        return " ".join(self._words(path))

    def _words(self, path: str) -> list[str]:
        """The name of each of its dimensions."""
        dims = [roots(dim) for dim in self.tree.dims[path]]
        words = [self._dimension(path, atoms) for atoms in dims]
        first = self.firsts[0]
        if path != first and path not in self.group.seconds and self._is_like(path, first):
            own = self._words(first)
            return [word or named for word, named in zip(words, own, strict=True)]
        # Names that first and second layer share would be those of axes inside of a channel.
        window, others = iter(WINDOW), iter("abc" if path in self.firsts else "opqr")
        outside = [i for i, word in enumerate(words) if word is None and _is_outside(dims[i])]
        named: list[str] = []
        for number, word in enumerate(words):
            if word is None and number in outside:
                # The last is the embedding, as a person would call it.
                word = "d" if number == outside[-1] else next(others, None)
            elif word is None:
                word = next(window, None)
            if word is None:
                raise Unwritable("it has too many dimensions for an axis pattern")
            named.append(word)
        return named

    def _is_like(self, path: str, first: str) -> bool:
        """Whether a tensor has the shape of the first layer, and the axis where that has it."""
        axes = [
            [self.group.atom in roots(dim) for dim in self.tree.dims[name]]
            for name in (path, first)
        ]
        return axes[0] == axes[1] and all(
            len(roots(one)) == len(roots(other)) == 0 or size_of(one) == size_of(other)
            for one, other in zip(self.tree.dims[path], self.tree.dims[first], strict=True)
        )

    def _dimension(self, path: str, atoms: Sequence[Atom]) -> str | None:
        """The name of a dimension, if it is one that matters."""
        if self.group.atom in atoms:
            return self._composite(path, atoms)
        if len(atoms) == 1 and atoms[0] in self.stack:
            return self.stack[atoms[0]]
        if len(atoms) == 1 and any(atoms[0] in roots(s.parts) for s in self.formula.sources):
            return str(atoms[0].size)
        if atoms and all(atom in self.inner for atom in atoms):
            return self._inside(atoms, known=False)
        return None

    def _composite(self, path: str, atoms: Sequence[Atom]) -> str:
        """The dimension with the group's own axis, and what else is in it."""
        words: list[str] = []
        beside: list[Atom] = []
        for number, atom in enumerate(atoms):
            own = atom is self.group.atom
            heads = self.heads is not None and atom is self.heads.atom
            # Of a layer that only goes along it does not matter what its parts are.
            literal = atom.literal and path in (*self.firsts, *self.group.seconds)
            if not (own or heads or literal):
                beside.append(atom)
                continue
            words += [self._inside(beside, known=True)] if beside else []
            beside = []
            if own:
                behind = self.heads is not None and self.heads.atom in atoms[number:]
                words.append("g" if self.heads is not None and not behind else self.axis)
            elif literal:
                words.append(str(atom.size))
        words += [self._inside(beside, known=True)] if beside else []
        return words[0] if len(words) == 1 else f"({' '.join(words)})"

    def _inside(self, atoms: Sequence[Atom], *, known: bool) -> str:
        """A name for an axis beside the channels; in one dimension its size must be known."""
        size = size_of(atoms)
        name = "k" if size == size_of(self.inner) else f"n{size}"
        if known:
            self.sizes[name] = size
        return name

    def _parts(self) -> tuple[int, ...]:
        parts = tuple(s.part for s in self.formula.sources if s.part is not None)
        if self.formula.activation is None or not parts:
            return ()
        return () if self.formula.gated and parts == (0, 1) else parts


def _is_outside(atoms: Sequence[Atom]) -> bool:
    """Whether a dimension is one of inputs or outputs, not a window or of size 1."""
    windows = [atom.reason is not None and atom.reason.why == WINDOW_REASON for atom in atoms]
    return bool(atoms) and not any(windows)


def _usable(form: Formula, group: Group, tree: Tree) -> Formula:
    """The formula, without its activation where a rule of `_dead` would be wrong by it.

    The rules also fold what is constant into the second bias, so that the trace must show that
    this is added to the sum, and nothing else happens to that.
    """
    second = group.seconds[0]
    plain = Formula(sources=form.sources)
    if form.activation is None:
        return plain
    # One layer, two factors of one, or two layers.
    if {source.path for source in form.sources} & {*group.seconds}:
        return plain  # its zero rows are zero columns too
    # A gate and what it is multiplied with are halves of a layer, or two layers.
    paths = {source.path for source in form.sources}
    halves = [size_of(s.parts) == 2 for s in form.sources]
    whole = all(source.part is None for source in form.sources)
    if form.gated and not (all(halves) if len(paths) == 1 else whole):
        return plain
    # The first literal factor of a pattern is the one that counts the parts.
    for source in form.sources:
        dims = [[*roots(dim)] for dim in tree.dims[source.path]]
        parts = [*roots(source.parts)]
        factors = [a for dim in dims for a in dim if dim == parts or group.atom in dim]
        literals = [a for a in factors if a.literal]
        if parts and literals[:1] != parts:
            return plain
    biases = {source.bias for source in form.sources} - {None}
    extra = {*group.paths} - biases
    if any(f"{_layer(source.path)}/bias" in extra for source in form.sources):
        return plain  # a bias that is no bias
    usual = f"{_layer(second)}/bias"
    added = _bias_of(group, second, tree.walk)
    if added is None and usual in tree.leaves:
        return plain
    literal = any(
        atom.literal for dim in tree.dims[second] for atom in roots(dim) if group.atom in roots(dim)
    )
    if added is not None and literal:
        return plain
    stack = {*group.stack}  # of which it has the outputs of each
    if added is not None and sum(not {*roots(dim)} <= stack for dim in tree.dims[added]) != 1:
        return plain
    return form


def _bias_of(group: Group, second: str, walk: Walk) -> str | None:
    """The parameter that is added to every sum with the second layer, and is all that follows."""
    sums = [t for t in group.sums if any(second in value.weights for value in t.args)]
    uses = [walk.uses.get(total, []) for total in sums]
    first = uses[0][0] if uses and uses[0] else None
    if first is None or any(use != [first] for use in uses) or not all(t.plain for t in sums):
        return None
    # Used elsewhere too, it would bring the constant there.
    return first if walk.added.get(first) == sums else None


# --- paths ------------------------------------------------------------------------------------


def _layer(path: str) -> str:
    return path.removesuffix("/kernel")


def _below(root: str, path: str) -> str:
    return path.removeprefix(f"{root}/") if root else path


def _root(layers: Collection[str]) -> str:
    """The folder that all layers are in."""
    split = [layer.split("/")[:-1] for layer in layers]
    shared = []
    for names in zip(*split, strict=False):
        if len({*names}) > 1:
            break
        shared.append(names[0])
    return "/".join(shared)


def _table(root: str, path: str) -> str:
    """A tensor by its path from the root, perhaps by way of "..", or in another collection."""
    collection, _, rest = path.partition("/")
    top, _, inside = root.partition("/")
    if top == _PARAMS and collection != _PARAMS and rest:
        return f"{collection}:{_relative(inside, rest)}"
    return _relative(root, path)


def _relative(root: str, path: str) -> str:
    names, steps = root.split("/") if root else [], []
    while names and not path.startswith("/".join(names) + "/"):
        names.pop()
        steps.append("..")
    rest = path.removeprefix("/".join(names) + "/") if names else path
    return "/".join([*steps, rest])


def _one_or_more(names: Iterable[str]) -> str | tuple[str, ...]:
    names = tuple(names)
    return names[0] if len(names) == 1 else names


def _with_places(pair: Pair) -> Pair:
    """The same pair at `{i}` instead of a number."""
    letters = iter("ijkmnopq")
    at = re.sub(
        r"(?<![^/_])\d+(?=/|$)", lambda _: f"{{{next(letters, 'r')}}}", pair.at
    )  # layer/0, block_0; but dinov2
    at = f"{at}/".removeprefix("params/").rstrip("/")
    return dataclasses.replace(pair, at=at)
