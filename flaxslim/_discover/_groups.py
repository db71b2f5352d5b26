"""Groups of parameter axes that must be cut together, and the verdict on each."""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping

from flaxslim._discover._atoms import Atom, Dim, Dims, Reason, all_roots, roots, size_of
from flaxslim._discover._place import Place
from flaxslim._discover._trace import Sum, Walk


class Verdict(enum.Enum):
    """What may be done with a group."""

    EXACT = "exact"
    INNER = "inner"  # exact, but it lies inside of another, such as the values of a head
    APPROXIMATE = "approximate"  # summed between two computed values: head dim of q and k
    REFUSED = "refused"
    UNUSED = "unused"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """Where a tensor has the axis of a group: the dimension, and the factor in it."""

    path: str
    dimension: int
    factor: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Axes of parameters that must be cut together.

    Attributes:
      atom: the class of the axis.
      members: where parameters have it.
      sums: the sums over it.
      seconds: of each sum, the parameter whose zero row makes its term zero.
      doubt: something that may follow from the size of an exact group. Where the function can be
        traced at another size that settles it (`_retrace`), else the group is refused.
      stack: axes that all values with this axis have too: along them each index has channels of
        its own (experts, scanned layers).
      factors: the classes of each dimension of a member, by path and number.
    """

    atom: Atom
    members: tuple[Member, ...]
    sums: tuple[Sum, ...]
    verdict: Verdict
    reason: Reason | None = None
    seconds: tuple[str, ...] = ()
    doubt: Reason | None = None
    stack: tuple[Atom, ...] = ()
    factors: Mapping[tuple[str, int], tuple[Atom, ...]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    @property
    def size(self) -> int:
        return self.atom.size

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(member.path for member in self.members))

    def sums_with(self, second: str) -> tuple[Sum, ...]:
        """The sums in which a parameter is a factor."""
        return tuple(t for t in self.sums if any(second in value.weights for value in t.args))

    def refused(self, why: str, place: Place, verdict: Verdict = Verdict.REFUSED) -> "Group":
        reason = Reason(why=why, place=place, order=0)
        return dataclasses.replace(self, verdict=verdict, reason=reason)


def groups(walk: Walk, params: Mapping[str, Dims]) -> tuple[Group, ...]:
    """All groups of the axes of some parameters, those first that come first in the tree."""
    members: dict[Atom, list[Member]] = {}
    for path, dims in params.items():
        for number, dim in enumerate(dims):
            for factor, atom in enumerate(roots(dim)):
                member = Member(path=path, dimension=number, factor=factor)
                members.setdefault(atom, []).append(member)
    sums: dict[Atom, list[Sum]] = {}
    for total in walk.sums:
        for atom in dict.fromkeys(all_roots(total.dims)):
            sums.setdefault(atom, []).append(total)
    counted = {a.size for a in sums if a.uniform}
    stacks = _stacks(walk, params, members)
    ranks = {path: len(dims) for path, dims in params.items()}
    found = [
        dataclasses.replace(
            _judged(
                walk, atom, tuple(own), tuple(sums.get(atom, ())), stacks[atom], counted, ranks
            ),
            factors={(m.path, m.dimension): tuple(roots(params[m.path][m.dimension])) for m in own},
        )
        for atom, own in members.items()
    ]
    return tuple(_without_inner(found))


def _stacks(
    walk: Walk, params: Mapping[str, Dims], wanted: Mapping[Atom, object]
) -> dict[Atom, tuple[Atom, ...]]:
    """For each class the others that all values have which have it."""
    common: dict[Atom, dict[Atom, None]] = {}

    def see(dims: Dims, around: Dim = ()) -> None:
        shown = all_roots(dims)
        if not shown:
            return
        everything = dict.fromkeys([*shown, *roots(around)])
        for atom in shown:
            if atom not in wanted:
                continue
            before = common.get(atom)
            if before is None:
                common[atom] = everything
            elif len(before) > 1:
                common[atom] = {a: None for a in before if a in everything}

    for dims in params.values():
        see(dims)
    for seen in walk.seen:
        see(seen.dims, seen.around)
    for total in walk.sums:
        # Summed over by itself, an axis mixes the channels of its indices.
        mixed = {*all_roots(total.dims)}
        for atom in {*all_roots(dim for value in total.args for dim in value.dims)}:
            if atom in common and atom not in mixed:
                common[atom] = {a: None for a in common[atom] if a not in mixed}
    return {atom: tuple(a for a in own if a is not atom) for atom, own in common.items()}


def _judged(
    walk: Walk,
    atom: Atom,
    members: tuple[Member, ...],
    sums: tuple[Sum, ...],
    stack: tuple[Atom, ...],
    counted: set[int],
    ranks: Mapping[str, int],
) -> Group:
    group = Group(atom=atom, members=members, sums=sums, verdict=Verdict.EXACT, stack=stack)
    own = {member.path for member in members}
    if atom.reason is not None:
        return dataclasses.replace(group, verdict=Verdict.REFUSED, reason=atom.reason)
    if not sums:
        where = Place(primitive="no operation")
        return group.refused(
            "nothing sums over it, so nothing would drop it", where, Verdict.UNUSED
        )
    seconds: dict[str, None] = {}
    for total in sums:
        readers = [sorted(value.weights & own) for value in total.args]
        readers = [names for names in readers if names]
        if not readers:
            if len(total.args) == 2:
                why = "it is summed over between two computed values, not with a parameter"
                return group.refused(why, total.place, Verdict.APPROXIMATE)
            return group.refused("it is summed over, not with a parameter", total.place)
        if not any(name in seconds for names in readers for name in names):
            # A kernel rather than the scale of what it reads.
            names = [name for own_names in readers[::-1] for name in own_names]
            seconds[max(names, key=ranks.__getitem__)] = None
    if len(own) < len(members):
        twice = next(m.path for m in members if sum(o.path == m.path for o in members) > 1)
        return group.refused(f"{twice} has it twice, which no axis pattern can say", sums[0].place)
    if len(own) == 1:
        return group.refused("no other parameter has it", sums[0].place)
    doubt = _doubt(walk, atom, sums, counted)
    return dataclasses.replace(group, seconds=tuple(seconds), doubt=doubt)


def _doubt(walk: Walk, atom: Atom, sums: Iterable[Sum], counted: set[int]) -> Reason | None:
    """What may follow from the number of channels, which a trace shows as a mere number."""
    for total in sums:
        for number, place in walk.scaled.get(total, ()):
            if _is_a_count(number, total, atom):
                why = f"the sum over it is scaled by {number:g}, which may follow from its size"
                return Reason(why=why, place=place, order=total.order)
        if atom.size in counted:
            why = f"the code sums over another axis of {atom.size}, which may count the channels"
            return Reason(why=why, place=total.place, order=total.order)
    return None


def _is_a_count(number: float, total: Sum, atom: Atom) -> bool:
    """Whether a number is a size of the sum, its root, or one over these."""
    sizes = {atom.size, size_of(dict.fromkeys(all_roots(total.dims)))}
    powers = (size**power for size in sizes for power in (1, -1, 0.5, -0.5))
    return any(math.isclose(number, value, rel_tol=1e-4) for value in powers)


def _lies_inside(group: Group) -> bool:
    """Whether tensors have it in one dimension behind another axis, as a head has its values.

    In all tensors; or in one, behind an axis that all its values have too.
    """
    outer = [
        {a for a in group.factors[m.path, m.dimension][: m.factor] if not a.literal}
        for m in group.members
    ]
    return all(outer) or not set().union(*outer).isdisjoint(group.stack)


def _without_inner(found: list[Group]) -> list[Group]:
    """Of two exact groups that one parameter sums over together, mark the inner one.

    The channels inside of a head can go only from all heads alike, and few classes can say so.
    """
    exact = {group.atom: group for group in found if group.verdict is Verdict.EXACT}
    inner = {atom for atom, group in exact.items() if _lies_inside(group)}
    for one in exact.values():
        for total in one.sums:
            order = [a for a in dict.fromkeys(all_roots(total.dims)) if a in exact]
            for other in (exact[a] for a in order if a is not one.atom):
                mine, theirs = {*one.paths}, {*other.paths}
                left = order.index(other.atom) < order.index(one.atom)
                clash = any(
                    m.path == o.path and m.dimension == o.dimension
                    for m in one.members
                    for o in other.members
                )
                if mine < theirs or (left and (clash if mine == theirs else not mine > theirs)):
                    inner.add(one.atom)
    return [
        dataclasses.replace(group, verdict=Verdict.INNER) if group.atom in inner else group
        for group in found
    ]
