"""The plan: which channels stay at each site, a value that can be printed, stored, composed."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from flaxslim._spec import Site, Spec, Tensor
from flaxslim.errors import PlanError

# What removes more where a stock config can say no smaller width.
PER_LAYER = 'width="per_layer"'

# Channels of a site, ascending; of a stacked one, a row (a tuple) for each index of its stack.
Channels = tuple[Any, ...]


def channels(site: Site, mask: np.ndarray) -> Channels:
    """The channels where a mask `(s, f)` is true."""
    rows = tuple(tuple(np.flatnonzero(row).tolist()) for row in mask)
    return rows if site.stack else rows[0]


def counted(numbers: Iterable[tuple[Site, int]]) -> str:
    """Channels and heads by their names, "72 channels and 1 head"; empty if there are none."""
    counts = Counter[str]()
    for site, number in numbers:
        counts[site.pair.unit] += number
    return " and ".join(many(count, unit) for unit, count in counts.items() if count)


def check_is_plan(plan: Any) -> None:
    """Raise `PlanError` unless it is a `Plan`."""
    if not isinstance(plan, Plan):
        raise PlanError(
            "the first argument is not a Plan",
            seen=f"a {type(plan).__name__}",
            mend="make one, flaxslim.plan(params, cfg, spec), or read a stored one: "
            "Plan.from_json(text), or Plan.from_dict(data)",
        )


def many(count: int, names: str) -> str:
    """How many there are of something whose name is given in the plural.

    >>> many(1, "heads"), many(1200, "channels")
    ('1 head', '1,200 channels')
    """
    return f"{count:,} {names.removesuffix('s') if count == 1 else names}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What happens at one site.

    Attributes:
      site: where, and which tensors.
      keep: the channels that stay, ascending; of a stacked site one such row for each index of
        its stack, all of the same length.
      dead: how many channels are dead, over all rows (of these, `removed` go).
      rules: how many dead channels each rule found.
      weak: how many of those that go are not dead, but given up by a threshold.
      folds: the channels (as in `keep`) that go but put out a constant, which times their second
        rows is added to the second bias.
      activation: its name, by which the constants follow from the first biases.
    """

    site: Site
    keep: Channels
    dead: int
    rules: Mapping[str, int]
    weak: int = 0
    folds: Channels = ()
    activation: str | None = None

    def __hash__(self) -> int:  # `rules` is a dict
        return hash((self.site, self.keep, self.dead, self.weak, self.folds, self.activation))

    @property
    def kept(self) -> np.ndarray:
        """`keep` as an array `(s, w)`."""
        return np.asarray(self.keep, int).reshape(self.site.rows, -1)

    @property
    def folded(self) -> np.ndarray:
        """`folds` as a mask `(s, f)`."""
        mask = np.zeros((self.site.rows, self.site.size), bool)
        for row, some in zip(mask, self.folds if self.site.stack else [self.folds], strict=False):
            row[list(some)] = True
        return mask

    @property
    def width(self) -> int:
        """How many channels stay, in each row."""
        return self.kept.shape[-1]

    @property
    def removed(self) -> int:
        """How many channels go, over all rows."""
        return (self.site.size - self.width) * self.site.rows

    def indices(self, tensor: Tensor) -> np.ndarray:
        """What is kept along the axis of one of the site's tensors, `(s, w)`."""
        if self.site.axis(tensor) == self.site.pair.axis:
            return self.kept
        owners = self.site.owners
        return np.asarray([np.unique(owners[row]) for row in self.kept], int)

    @property
    def groups(self) -> tuple[int, ...]:
        """How many heads each key/value group has that is left."""
        if not self.site.groups:
            return ()
        _, counts = np.unique(self.site.owners[self.kept[0]], return_counts=True)
        return tuple(counts.tolist())

    def share_gone(self, tensor: Tensor) -> Fraction:
        """How much of one of the site's tensors goes."""
        before = tensor.axes.sizes(tensor.shape)[self.site.axis(tensor)]
        return Fraction(before - self.indices(tensor).shape[-1], max(before, 1))

    @property
    def removed_parameters(self) -> int:
        return sum(int(self.share_gone(t) * math.prod(t.shape)) for t in self.site.cut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """A width before and after, by its config key; `least` and `after` differ among layers."""

    width: str
    before: int
    after: int
    least: int

    @classmethod
    def of(cls, width: str, cuts: Sequence[Cut]) -> "Resize":
        """What becomes of a width that some cuts share."""
        after = [cut.width for cut in cuts]
        before = max(cut.site.size for cut in cuts)
        return cls(width=width, before=before, after=max(after), least=min(after))

    def __str__(self) -> str:
        return self.counted("channels")

    def counted(self, unit: str) -> str:
        """In a line, with what is counted."""
        after = (
            f"{self.after:,}" if self.least == self.after else f"{self.least:,} to {self.after:,}"
        )
        return f"{self.width}: {self.before:,} -> {after} {unit}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `apply` will do to a tree, and to its config. `str(plan)` is a table.

    `second @ first` is the one plan that does what `first` and then `second` do, where `second` was
    made for what `first` leaves.

    Attributes:
      spec: the spec that found the sites.
      cuts: one for each site.
      resizes: one for each width, for the reader.
      values: what the config is to say afterwards, by (nested) key.
      threshold: the relative norm up to which channels were given up; 0.0 is exact.
      notes: what the reader should know (unknown activation, pairs without a site, ...).
      blocked: widths that no config of the stock class can say, so nothing goes there.
    """

    spec: Spec
    cuts: tuple[Cut, ...]
    resizes: tuple[Resize, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    threshold: float = 0.0
    notes: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    def __hash__(self) -> int:  # `values` is a dict
        return hash((self.spec, self.cuts, self.threshold))

    @property
    def removed(self) -> int:
        """How many channels go, over all sites."""
        return sum(cut.removed for cut in self.cuts)

    @property
    def removed_parameters(self) -> int:
        return sum(cut.removed_parameters for cut in self.cuts)

    @property
    def exact(self) -> bool:
        """Whether every channel that goes is dead by one of the exact rules."""
        # Those that only the threshold gave up stay first where a width is filled up.
        return not any(cut.weak for cut in self.cuts)

    @property
    def origins(self) -> dict[str, np.ndarray]:
        """Where the channels that are left come from, by the path of the second kernel.

        `origins[path][j]` is the old index of channel j; of a stacked site there is one row for
        each index of its stack.
        """
        return {
            cut.site.second.path: np.asarray(cut.keep, int).reshape(*cut.site.stack, cut.width)
            for cut in self.cuts
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that it leaves, by path; a tensor may lose two axes."""
        left: dict[str, tuple[int, ...]] = {}
        for cut in self.cuts:
            for t in cut.site.tensors:
                shape = left.get(t.path, t.shape)
                if t is not cut.site.second_bias:
                    count = cut.indices(t).shape[-1]
                    shape = t.axes.resized(shape, cut.site.axis(t), count)
                left[t.path] = shape
        return left

    @property
    def why_nothing(self) -> str | None:
        """Why no channel goes, in a sentence; None if some do."""
        if self.removed:
            return None
        if self.blocked:
            return "; ".join(self.blocked)
        where = f"{many(len(self.cuts), 'sites')} of {self.spec.name}"
        if dead := counted((cut.site, cut.dead) for cut in self.cuts):
            are = "is" if sum(cut.dead for cut in self.cuts) == 1 else "are"
            return (
                f"{dead} at {where} {are} dead, but none can go: layers that share a width "
                "keep the largest need among them, rounded up to multiple_of; heads that share a "
                f"table, or a key/value group, go together; {PER_LAYER} asks less of them"
            )
        return (
            f"no channel at {where} is dead; prune first (make rows of the second layers zero), "
            "or give a threshold"
        )

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [("site", "channels", "dead", "kept", "by rule")]
        for cut in self.cuts:
            by = ", ".join(f"({name}) {count}" for name, count in cut.rules.items() if count)
            times = f"{cut.site.rows} x " if cut.site.stack else ""
            size, kept = f"{times}{cut.site.size}", f"{times}{cut.width}"
            rows.append((cut.site.root or "(top)", size, cut.dead, kept, by))
        widths = [max(len(str(row[i])) for row in rows) for i in range(5)]
        lines = [f"plan by {self.spec.name}, {'exact' if self.exact else 'approximate'}"]
        for row in rows:
            numbers = (str(row[i]).rjust(widths[i]) for i in (1, 2, 3))
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[4]]).rstrip())
        expressions = ((pair.width_expression, pair.unit) for pair in self.spec)
        units = {expression.label: unit for expression, unit in expressions if expression}
        lines += [resize.counted(units.get(resize.width, "channels")) for resize in self.resizes]
        gone = counted((cut.site, cut.removed) for cut in self.cuts)
        parameters = f"{self.removed_parameters:,} parameters"
        go = "goes" if self.removed == 1 else "go"
        lines.append(f"{gone} {go}, with {parameters}" if gone else "nothing goes")
        return "\n".join([*lines, *(f"note: {note}" for note in (*self.blocked, *self.notes))])

    def __matmul__(self, first: "Plan") -> "Plan":
        """`second @ first`: one plan that does what `first` and then `second` do."""
        if not isinstance(first, Plan):
            return NotImplemented
        from flaxslim._compose import composed

        return composed(self, first)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        from flaxslim._plan_json import to_dict

        return to_dict(self)

    def to_json(self) -> str:
        import json

        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote; `PlanError` for anything else."""
        from flaxslim._plan_json import from_dict

        return from_dict(data)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        import json

        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(
                "this is not JSON", seen=str(error), expected="what Plan.to_json() writes"
            ) from error
        return cls.from_dict(data)
