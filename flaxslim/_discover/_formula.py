"""The piece of a function between the first layers of a pair and the second: its activation.

Walked back from what the second layer reads, each value is either an elementwise function of
values, or the output of a first layer. What comes out is a formula, which `_expression` recognises.
"""

import dataclasses
from collections.abc import Collection

from flaxslim._discover._atoms import Atom, all_roots, roots, size_of
from flaxslim._discover._expression import (
    BINARY,
    CALLS,
    COMPARE,
    SIZE,
    Source,
    Tree,
    UnclearError,
    is_linear,
    named,
    symbols,
)
from flaxslim._discover._groups import Group
from flaxslim._discover._trace import Node, Part, Sum, Value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formula:
    """What the second layer reads of a channel.

    `sources` are the first layers, the gate before the up layer; `activation` is None if the
    formula is not of the form act(x) or act(gate) * up.
    """

    sources: tuple[Source, ...]
    activation: str | None = None
    gated: bool = False


def formula(group: Group) -> Formula:
    """What all sums over a group read, if they read the same."""
    found = [
        _formula(read, group)
        for total in group.sums
        for second in group.seconds
        for read in _read(total, second)
    ]
    first, *others = found or [Formula(sources=())]
    if any(other != first for other in others):
        sources = dict.fromkeys(source for each in found for source in each.sources)
        return Formula(sources=tuple(sources))
    return first


def _read(total: Sum, second: str) -> list[Node]:
    """What a sum multiplies with a parameter."""
    if len(total.args) == 2:
        one, other = total.args
        return [one.node] if second in other.weights else [other.node] * (second in one.weights)
    (value,) = total.args
    if second not in value.weights:
        return []
    args = value.node.args if value.node.kind == "mul" else ()
    return [next((a for a in args if a.kind != "param"), Node("opaque"))]


def _formula(node: Node, group: Group) -> Formula:
    walk = _Back(group)
    try:
        tree = walk.tree(node)
        walk.check_averages()
    except UnclearError:
        return Formula(sources=tuple(walk.sources))
    met = symbols(tree)
    names = [source for source in walk.sources if source in met]
    if len(names) == 1:
        return Formula(sources=(names[0],), activation=named(tree, {names[0]: "x"}))
    if len(names) == 2:
        for gate, up in (names, names[::-1]):
            if is_linear(tree, gate, up):
                act = named(tree, {gate: "x", up: 1.0})
                return Formula(sources=(gate, up), activation=act, gated=act is not None)
    return Formula(sources=tuple(names))


# --- back through the function ----------------------------------------------------------------


class _Back:
    """Walks back from a value to the first layers of a group."""

    def __init__(self, group: Group):
        self.group, self.own = group, {*group.paths}
        self.sources: dict[Source, None] = {}
        self._known: dict[Node, Tree] = {}
        self._met = 0  # nodes, also those that are being looked at: a deep model is a long formula
        self._atoms: dict[str, set[Atom]] = {}  # of each first layer, its axes
        self._averaged_over: set[Atom] = set()

    def check_averages(self) -> None:
        """Raise `UnclearError` if one is over an axis of a first layer itself.

        Over positions what is constant stays so; over the values of a head it mixes constants.
        """
        if any(atoms & self._averaged_over for atoms in self._atoms.values()):
            raise UnclearError

    def tree(self, node: Node) -> Tree:
        if node not in self._known:
            self._met += 1
            if self._met > SIZE:
                raise UnclearError
            self._known[node] = self._tree(node)
        return self._known[node]

    def _tree(self, node: Node) -> Tree:
        if node.kind == "number":
            return float(node.data)
        if node.kind == "part":
            return self._in_part(self.tree(node.args[0]), node.data, {})
        if (path := self._layer(node)) is not None:
            return self._source(path)
        if node.kind == "sum":
            return self._averaged(node)
        if (values := _mean(node)) is not None:
            self._averaged_over.update(all_roots(node.args[0].data.dims))
            return self.tree(values)
        if node.kind in ("add", "add_any"):
            for one, other in (node.args, node.args[::-1]):
                path = self._layer(one)
                if path is not None and other.kind == "param" and other.data in self.own:
                    return self._source(path, other.data)
        if node.kind in (*BINARY, *COMPARE, *CALLS, "neg", "integer_pow", "select_n", "clamp"):
            return (node, *(self.tree(arg) for arg in node.args))
        raise UnclearError

    def _source(self, path: str, bias: str | None = None, part: Part | None = None) -> Source:
        source = Source(path=path, bias=bias)
        if part is not None:
            source = dataclasses.replace(source, part=part.index, parts=part.axis)
        self.sources[source] = None
        return source

    def _in_part(self, tree: Tree, part: Part, done: dict[int, Tree]) -> Tree:
        """A formula of one part of fused layers; a range of another axis changes nothing.

        `done`: what was changed already, as a value may be used often.
        """
        if isinstance(tree, Source):
            if not self._atoms[tree.path] & {*roots(part.axis)}:
                return tree
            if tree.part is not None:
                raise UnclearError
            self.sources.pop(tree, None)
            return self._source(tree.path, tree.bias, part)
        if not isinstance(tree, tuple):
            return tree
        if id(tree) not in done:
            args = (self._in_part(arg, part, done) for arg in tree[1:])  # pyright: ignore
            done[id(tree)] = (tree[0], *args)
        return done[id(tree)]

    def _layer(self, node: Node) -> str | None:
        """The parameter of a first layer whose output this is."""
        if node.kind == "sum":
            total: Sum = node.data
            if self.group.atom not in all_roots(total.dims):
                weights = [value for value in total.args if value.weights & self.own]
                if len(weights) == 1 and len(total.args) == 2:
                    return self._kernel(weights[0])
        if node.kind == "pick":
            return self._kernel(node.data)
        return None

    def _kernel(self, value: Value) -> str | None:
        """The parameter of which a value is a view."""
        path = _only(value.weights & self.own)
        if path is not None:
            self._atoms.setdefault(path, set()).update(all_roots(value.dims))
        return path

    def _averaged(self, node: Node) -> Tree:
        """Values averaged by weights that sum to one: what is constant stays so."""
        total: Sum = node.data
        if len(total.args) != 2:
            raise UnclearError
        for i, weights in enumerate(total.args):
            if total.axes and weights.shares and weights.shares == {*total.axes[i]}:
                self._averaged_over.update(all_roots(total.dims))
                return self.tree(total.args[1 - i].node)
        raise UnclearError


def _only(names: Collection[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None


def _mean(node: Node) -> Node | None:
    """What is averaged, if this is sum(x) / n over n entries: what is constant stays so."""
    if node.kind != "div" or node.args[0].kind != "sum" or node.args[1].kind != "number":
        return None
    total: Sum = node.args[0].data
    count = size_of(all_roots(total.dims))
    return total.args[0].node if len(total.args) == 1 and node.args[1].data == count else None
