"""Axes that must be cut together: a union-find whose classes can be split into factors.

A dimension of an array is a sequence of *atoms*, the outermost first: one as long as nothing takes
it apart, and after `reshape(b, t, h, k)` of a flat `(b, t, h k)` two. Atoms that an operation joins
index by index are one class. To split a class splits it wherever it occurs, so that a kernel which
was `(d, n)` when it was read is `(d, h k)` once its output was reshaped. Dimensions of size 1 have
no atoms.

Along a *uniform* atom all entries are the same: a mask that was broadcast. It goes with any axis
and joins none, so that two layers which share the mask are not one class.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from flaxslim._discover._place import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reason:
    """Why an axis cannot be cut: what forbids it, and where; the first in order counts."""

    why: str
    place: Place
    order: int

    def __str__(self) -> str:
        return f"{self.why} ({self.place})" if self.place.primitive else self.why


class Atom:
    """An axis, or a factor of one. Compared by identity of its class: see `roots`."""

    __slots__ = ("_factors", "_parent", "literal", "reason", "size", "uniform")

    def __init__(
        self,
        size: int,
        reason: Reason | None = None,
        *,
        literal: bool = False,
        uniform: bool = False,
    ):
        self.size = size
        self.reason = reason
        self.literal = literal  # its indices have meanings of their own: gate and up, q, k and v
        self.uniform = uniform
        self._parent: Atom | None = None
        self._factors: tuple[Atom, Atom] | None = None

    def root(self) -> "Atom":
        atom = self
        while atom._parent is not None:
            if atom._parent._parent is not None:
                atom._parent = atom._parent._parent
            atom = atom._parent
        return atom

    def block(self, reason: Reason) -> None:
        for atom in roots([self]):
            if atom.reason is None or reason.order < atom.reason.order:
                atom.reason = reason

    def _split(self, front: int) -> "tuple[Atom, Atom]":
        """The class, a root that is whole, as an outer factor of size `front` and an inner one."""
        outer, inner = (
            Atom(size, self.reason, literal=self.literal, uniform=self.uniform)
            for size in (front, self.size // front)
        )
        self._factors = outer, inner
        return outer, inner

    def _join(self, other: "Atom") -> "Atom":
        """One class of two whole, equally large roots; or the one of them that is not uniform."""
        if self.uniform or other.uniform:
            return other if self.uniform else self
        other._parent = self
        self.literal |= other.literal
        if other.reason is not None:
            self.block(other.reason)
        return self


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def roots(dim: Iterable[Atom]) -> list[Atom]:
    """The classes of a dimension, as finely as it was ever split."""
    found: list[Atom] = []
    stack = list(dim)[::-1]
    while stack:
        atom = stack.pop().root()
        if atom._factors is None:
            found.append(atom)
        else:
            stack += atom._factors[::-1]
    return found


def all_roots(dims: Iterable[Dim]) -> list[Atom]:
    """The classes of several dimensions, one after another."""
    return roots(atom for dim in dims for atom in dim)


def size_of(dim: Iterable[Atom]) -> int:
    return math.prod(atom.size for atom in dim)


def unify(one: Dim, other: Dim) -> Dim | None:
    """Make two dimensions one axis; None if their factors do not line up (6 x 4, 4 x 6)."""
    left, right = list(one)[::-1], list(other)[::-1]
    joined: list[Atom] = []
    while left and right:
        a, b = _next(left), _next(right)
        if a.size != b.size:
            large, rest = (a, left) if a.size > b.size else (b, right)
            small = min(a.size, b.size)
            if not small or large.size % small:
                return None
            front, back = large._split(small)
            rest.append(back)
            a, b = (front, b) if large is a else (a, front)
        joined.append(a if a is b else a._join(b))
    return None if left or right else tuple(joined)


def _next(stack: list[Atom]) -> Atom:
    """Take the outermost class off a reversed dimension."""
    while True:
        atom = stack.pop().root()
        if atom._factors is None:
            return atom
        stack += atom._factors[::-1]


def take_front(dim: Dim, size: int) -> tuple[Dim, Dim] | None:
    """A dimension as an outer part of that size and the rest; None if no factors line up so."""
    stack, front = roots(dim)[::-1], []
    while size > 1:
        if not stack:
            return None
        atom = _next(stack)
        if not atom.size:  # of nothing
            return None
        if size % atom.size == 0:
            front.append(atom)
            size //= atom.size
        elif atom.size % size == 0:
            outer, inner = atom._split(size)
            front.append(outer)
            stack.append(inner)
            size = 1
        else:
            return None
    return tuple(front), tuple(stack[::-1])


def regroup(dims: Sequence[Dim], shape: Sequence[int]) -> Dims | None:
    """The atoms of some dimensions shared out to a new shape; None if they do not line up."""
    rest: Dim = tuple(atom for dim in dims for atom in dim)
    new: list[Dim] = []
    for size in shape:
        taken = take_front(rest, size)
        if taken is None:
            return None
        front, rest = taken
        new.append(front)
    return None if rest else tuple(new)
