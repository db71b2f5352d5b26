"""One group of axes written as a `Pair`, at a concrete place."""

from collections.abc import Collection, Iterable, Sequence

from flaxslim._axes import WINDOW
from flaxslim._discover._atoms import Atom, all_roots, roots, size_of
from flaxslim._discover._formula import formula
from flaxslim._discover._function import Walked
from flaxslim._discover._groups import Group
from flaxslim._discover._rules._calls import SCANNED
from flaxslim._discover._rules._sums import WINDOW as WINDOW_REASON
from flaxslim._discover._usable import bias_of, layer_of, usable
from flaxslim._pair import Pair

# The collection of Linen beside which others hold tensors of the same layers.
_PARAMS = "params"


class Unwritable(Exception):
    """A group cannot be said as a `Pair`; the message says why."""


def pair_of(group: Group, heads: Group | None, seen: Walked) -> Pair:
    """The pair of a group; `heads` are those in it, if it is one of key/value groups.

    Raises `Unwritable`, and what a `Pair` refuses.
    """
    return _Writer(group, heads, seen).pair()


class _Writer:
    """Writes one group as a pair at a concrete place."""

    def __init__(self, group: Group, heads: Group | None, seen: Walked):
        self.group, self.heads, self.seen = group, heads, seen
        self.second, *self.readers = group.seconds
        self.formula = usable(formula(group), group, heads, seen)
        self.firsts = self._firsts()
        kernels = [path for path in group.paths if path.endswith("/kernel")]
        self.root = _root([layer_of(path) for path in (*self.firsts, *group.seconds, *kernels)])
        self.inner = self._inner(self.firsts[0])
        self.axis = "h" if self.inner or heads is not None else "f"
        self.stack = self._stack()
        self.sizes: dict[str, int] = {}

    def pair(self) -> Pair:
        first, second = self.firsts[0], self.second
        axes = {path: self._pattern(path) for path in self.group.paths}
        if any(axes[path] != axes[first] for path in self.firsts):
            raise Unwritable("the layers whose product it is have different shapes")
        bias = bias_of(self.group, second, self.seen)
        usual = f"{layer_of(second)}/bias"
        also = self._also()
        return Pair(
            at=self.root,
            first=_one_or_more(map(self._name, self.firsts)),
            second=self._name(second),
            first_axes=axes[first],
            second_axes=axes[second],
            first_bias=self._first_bias(),
            second_bias=_below(self.root, bias) if bias and bias != usual else None,
            activation=self.formula.activation,
            gated=self.formula.gated,
            axis=self.axis,
            also={self._name(path): axes[path] for path in also},
            readers={self._name(path): axes[path] for path in self.readers},
            tables={_table(self.root, path): axes[path] for path in self._tables(also)},
            parts=self._parts(),
            group="g" if self.heads is not None else None,
            sizes={name: str(size) for name, size in sorted(self.sizes.items())},
        )

    # --- which tensors they are -----------------------------------------------------------------

    def _name(self, path: str) -> str:
        """The name of a layer, from the root on."""
        return _below(self.root, layer_of(path))

    def _biases(self) -> list[str | None]:
        """The bias that the trace adds to each first layer."""
        own = {source.path: source.bias for source in self.formula.sources}
        return [own.get(path) for path in self.firsts]

    def _first_bias(self) -> str | tuple[str, ...] | None:
        """The biases of the first layers, if one of them is not `<layer>/bias`."""
        usual = [f"{layer_of(path)}/bias" for path in self.firsts]
        biases = self._biases()
        if all(bias in (None, name) for bias, name in zip(biases, usual, strict=True)):
            return None
        named = [bias or f"{name}?" for bias, name in zip(biases, usual, strict=True)]
        return _one_or_more(_below(self.root, name) for name in named)

    def _also(self) -> list[str]:
        """The kernels of other layers that have the axis."""
        named = {*self.firsts, *self.group.seconds, *self._biases()}
        return [p for p in self.group.paths if p.endswith("/kernel") and p not in named]

    def _tables(self, also: Collection[str]) -> list[str]:
        """What else has the axis: neither a kernel nor the bias of one."""
        layers = {layer_of(path) for path in (*self.firsts, *also)}
        layers -= {layer_of(path) for path in self.group.seconds}
        named = {*self.firsts, *self.group.seconds, *self._biases(), *also}
        named |= {f"{layer}/bias" for layer in layers}
        return [path for path in self.group.paths if path not in named]

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
                    len(self.seen.dims[path]),
                ),
            )
        ]

    def _inner(self, first: str) -> list[Atom]:
        """What is inside of a channel: summed over with it, and in the first layer too."""
        sums = self.group.sums_with(self.second)
        summed = [atom for total in sums for atom in all_roots(total.dims)]
        own = {*all_roots(self.seen.dims[first])}
        outside = {self.group.atom, *self.group.stack} - {
            a for a in self.group.stack if a in summed and self._after(a)
        }
        heads = {self.heads.atom} if self.heads is not None else set()
        return [a for a in dict.fromkeys(summed) if a in own and a not in outside | heads]

    def _after(self, atom: Atom) -> bool:
        """Whether it stands behind the group's own axis in the second layer."""
        order = all_roots(self.seen.dims[self.second])
        return order.index(atom) > order.index(self.group.atom) if atom in order else False

    def _stack(self) -> dict[Atom, str]:
        """Names of the axes along which each index has channels of its own."""
        names: dict[Atom, str] = {}
        for atom in self.group.stack:
            alone = all(
                [*roots(dim)] == [atom]
                for path in self.group.paths
                for dim in self.seen.dims[path]
                if atom in roots(dim)
            )
            scanned = atom.reason is not None and atom.reason.why == SCANNED
            name = "l" if scanned else "e"
            everywhere = all(atom in all_roots(self.seen.dims[path]) for path in self.group.paths)
            if alone and everywhere and atom not in self.inner and name not in names.values():
                names[atom] = name
        return names

    def _pattern(self, path: str) -> str:
        """The axis pattern of a tensor."""
        return " ".join(self._words(path))

    def _words(self, path: str) -> list[str]:
        """The name of each of its dimensions."""
        dims = [roots(dim) for dim in self.seen.dims[path]]
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
        """Whether a tensor has the shape of the first layer, and the axis where that has it.

        Queries have as many of it as there are heads, keys and values as there are groups.
        """
        axes = [
            [self.group.atom in roots(dim) for dim in self.seen.dims[name]]
            for name in (path, first)
        ]
        return axes[0] == axes[1] and all(
            len(roots(one)) == len(roots(other)) == 0
            or size_of(one) == size_of(other)
            or (self.heads is not None and own)
            for one, other, own in zip(
                self.seen.dims[path], self.seen.dims[first], axes[0], strict=True
            )
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


# --- paths ------------------------------------------------------------------------------------


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
