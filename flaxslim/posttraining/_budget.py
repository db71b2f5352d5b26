"""Which width each place gets: the least total error that a limit on the total cost allows.

A knapsack of which one choice for each item is taken, solved by dynamic programming over the cost
in bins. What an item costs beyond its cheapest width is rounded up to whole bins, so that what the
table holds does fit; what the rounding has left over is spent afterwards. Costs that are multiples
of one number, few enough of them, are not rounded at all: then the least error is exact. Of so many
items that all are small against a bin, a price for cost, the same for all, comes nearer.
"""

import dataclasses
import decimal
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Literal

import numpy as np

from flaxslim.errors import BudgetError

Unit = Literal["parameters", "bytes", "FLOPs", "ms"]

# Sums of the same floats in another order: a limit that is the dense cost is to give the dense one.
_ROUNDING = 1e-13
# Measured times that differ by less say nothing.
_FLAT = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """A place in the network whose width is to be chosen.

    Attributes:
      name: of the place, for messages.
      widths: `(w,)`, ascending: units that may be kept; the last is the dense width.
      errors: `(w,)`, what is lost at each width; 0 at the last.
      costs: `(w,)`, what the place costs at each width, in any unit, from any zero. A narrower
        width that costs more and is not better is never chosen.

    Raises `BudgetError` if they are not of one length, not finite, or the widths do not ascend.
    """

    name: str
    widths: np.ndarray
    errors: np.ndarray
    costs: np.ndarray

    def __post_init__(self):
        widths, errors, costs = map(np.asarray, (self.widths, self.errors, self.costs))
        if not len(widths) == len(errors) == len(costs) > 0:
            problem = "the widths, errors and costs of a place are not as many, or none"
        elif not (np.isfinite(errors).all() and np.isfinite(costs).all()):
            problem = "an error or a cost of a place is not finite"
        elif (np.diff(widths) <= 0).any():
            problem = "the widths of a place do not ascend"
        else:
            return
        raise BudgetError(
            problem,
            path=self.name,
            seen=f"widths {widths}, errors {errors}, costs {costs}",
            expected="one finite error and cost for each width, the narrowest first",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Front:
    """What is worth choosing of an item, the cheapest first: each costs more, and errs less."""

    choices: np.ndarray  # indices into the item's widths
    errors: np.ndarray
    extra: np.ndarray  # beyond the cheapest
    least: float

    @classmethod
    def of(cls, item: Item) -> "_Front":
        errors, costs = np.asarray(item.errors, float), np.asarray(item.costs, float)
        # By cost, then error; of equals the widest comes first, and only the first is taken.
        order = np.lexsort((-np.arange(len(costs)), errors, costs))
        lowest = np.minimum.accumulate(np.append(np.inf, errors[order][:-1]))
        choices = order[errors[order] < lowest]
        least = float(costs[choices[0]])
        extra = costs[choices] - least
        return cls(choices=choices, errors=errors[choices], extra=extra, least=least)


def solve(
    items: Sequence[Item],
    limit: float,
    *,
    fixed: float = 0.0,
    bins: int = 4096,
    unit: Unit = "parameters",
) -> list[int]:
    """The index into its widths for each item, with the least total error within a limit.

    Args:
      items: the places, at most some hundred.
      limit: on `fixed` and the sum of all costs, in the unit of the costs.
      fixed: what everything else costs.
      bins: into how many the room between the cheapest choice and the limit is divided. The least
        error is exact if all costs are whole multiples of a number of which that room has at most
        so many; else it is near.
      unit: of the costs, for messages.

    Of choices that err alike the cheaper is taken, of those that cost as much too the wider.

    Raises `BudgetError` if the cheapest choice exceeds the limit, or if measured times do not fall
    with width and the limit is below the dense one.

    >>> item = Item(name="ffn", widths=np.array([0, 4, 8]), errors=np.array([9.0, 1.0, 0.0]),
    ...             costs=np.array([0, 40, 80]))
    >>> solve([item, item], 100, fixed=20)
    [1, 1]
    """
    fronts = [_Front.of(item) for item in items]
    least = fixed + math.fsum(front.least for front in fronts)
    tolerance = _ROUNDING * max(abs(limit), abs(fixed))
    _check(items, limit, fixed=fixed, least=least, tolerance=tolerance, unit=unit)
    room = max(limit - least, 0.0)
    best = [len(front.choices) - 1 for front in fronts]
    if _spent(fronts, best) <= room + tolerance:
        chosen = best
    elif room == 0:
        chosen = [0] * len(fronts)
    else:
        with np.errstate(over="ignore"):  # of ratios to almost nothing, infinity is near enough
            found = (_from_table(fronts, room, bins), _by_price(fronts, room))
            chosen = min((_upgraded(fronts, row, room) for row in found), key=_lost(fronts))
    return [int(front.choices[k]) for front, k in zip(fronts, chosen, strict=True)]


def _check(
    items: Sequence[Item], limit: float, *, fixed: float, least: float, tolerance: float, unit: Unit
) -> None:
    if not math.isfinite(limit):
        raise BudgetError(
            "a limit is a number", seen=limit, mend=f"name one of {unit}, above {least:.4g}"
        )
    dense = fixed + math.fsum(float(item.costs[-1]) for item in items)
    # Numbers of parameters are exact: of them, one per cent less is one per cent less.
    if unit == "ms" and items and limit < dense - tolerance and least >= (1 - _FLAT) * dense:
        raise BudgetError(
            "latency does not fall with width on this device",
            seen=f"{shown(dense, unit)} dense, {shown(least, unit)} at the least widths",
            expected=f"a limit of at least {shown(dense, unit, decimal.ROUND_CEILING)}, the dense "
            f"one; the limit is {shown(limit, unit)}",
            mend="measure with a larger batch or longer sequences, which keep the device busy; "
            "or name a number of parameters as the goal",
        )
    if least > limit + tolerance:
        # Rounded away from each other, so that they never look alike, and the mend mends.
        reachable = shown(least, unit, decimal.ROUND_CEILING)
        # Where costs are counted down from the dense one, `fixed` is no part of the least.
        share = f", of which {shown(fixed, unit)} cannot be cut" if 0 < fixed < least else ""
        raise BudgetError(
            "even the cheapest widths exceed the limit",
            seen=f"a limit of {shown(limit, unit, decimal.ROUND_FLOOR)}",
            expected=f"at least {reachable}{share}",
            mend=f"raise the limit to {reachable}, or let more places and smaller widths be "
            'chosen: spec="all", width="per_layer"',
        )


def _spent(fronts: Sequence[_Front], chosen: Sequence[int]) -> float:
    return math.fsum(float(front.extra[k]) for front, k in zip(fronts, chosen, strict=True))


def _lost(fronts: Sequence[_Front]) -> Callable[[Sequence[int]], float]:
    return lambda row: math.fsum(float(f.errors[k]) for f, k in zip(fronts, row, strict=True))


def _from_table(fronts: Sequence[_Front], room: float, bins: int) -> list[int]:
    """By dynamic programming: the best row of choices found that fits the room."""
    divisor = _divisor(fronts)
    if divisor and room // divisor <= bins:
        size = int(room // divisor) + 1
        units = [(front.extra / divisor).astype(int) for front in fronts]
    else:
        # Each item is rounded up by less than one bin, so that as many bins beyond the limit may
        # hold a row that fits.
        size = bins + len(fronts) + 1
        units = [np.ceil(front.extra / room * bins) for front in fronts]
        units = [np.minimum(unit, size).astype(int) for unit in units]
    best, choice = _table(fronts, units, size)
    for last in reversed(range(size)):
        # What errs as little in a smaller bin is cheaper.
        bin_ = int(np.argmax(best <= best[last]))
        chosen = [0] * len(fronts)
        for i in reversed(range(len(fronts))):
            chosen[i] = int(choice[i, bin_])
            bin_ -= units[i][chosen[i]]
        if _spent(fronts, chosen) <= room:
            return chosen
    return [0] * len(fronts)


def _divisor(fronts: Sequence[_Front]) -> int:
    """What all costs are whole multiples of; 0 if they are not whole numbers."""
    extra = np.concatenate([front.extra for front in fronts])
    if (extra != np.rint(extra)).any() or extra.max() >= 2**53:
        return 0
    return int(np.gcd.reduce(extra.astype(np.int64)))


def _table(
    fronts: Sequence[_Front], units: Sequence[np.ndarray], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The least error with at most so many bins, `(size,)`; the choice for it, `(items, size)`."""
    best = np.zeros(size)
    choice = np.zeros((len(fronts), size), np.int32)
    for i, front in enumerate(fronts):
        new = best + front.errors[0]
        for k in range(1, len(front.errors)):
            cost = int(units[i][k])
            if cost >= size:
                break
            other = best[: size - cost] + front.errors[k]
            better = other < new[cost:]
            np.copyto(new[cost:], other, where=better)
            np.copyto(choice[i, cost:], k, where=better)
        best = new
    return best, choice


def _by_price(fronts: Sequence[_Front], room: float) -> list[int]:
    """The least of error plus price times cost, at the lowest price at which that fits the room.

    Of few items it misses rows that the table holds, of hundreds it comes nearer than bins can.
    """
    errors, extra = _padded(fronts)
    steps = [(f.errors[0] - f.errors[-1]) / f.extra[1] for f in fronts if len(f.extra) > 1]
    # At the highest price all take their cheapest width. None is 0, of which infinity has no share.
    low = float(np.finfo(float).tiny)
    high = min(max(2 * float(max(steps)), low), float(np.finfo(float).max))
    best = [0] * len(fronts)
    for _ in range(100):
        price = low + (high - low) / 2
        row = (errors + price * extra).argmin(1).tolist()
        if _spent(fronts, row) <= room:
            high, best = price, row
        else:
            low = price
    return best


def _padded(fronts: Sequence[_Front]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and extra costs, `(items, w)`; infinite where an item has fewer choices."""
    errors, extra = np.full((2, len(fronts), max(len(f.errors) for f in fronts)), np.inf)
    for i, front in enumerate(fronts):
        errors[i, : len(front.errors)], extra[i, : len(front.extra)] = front.errors, front.extra
    return errors, extra


def _upgraded(fronts: Sequence[_Front], chosen: Sequence[int], room: float) -> list[int]:
    """What is left of the room is spent, on whatever saves the most error for its cost."""
    errors, extra = _padded(fronts)
    rows, now = np.arange(len(fronts)), np.array(chosen)
    while True:
        more = extra - extra[rows, now][:, None]
        less = errors[rows, now][:, None] - errors
        # The sum anew each time: adding up differences would drift past the limit.
        fits = (more > 0) & (less > 0) & (more <= room - _spent(fronts, now.tolist()))
        gain = np.divide(less, more, out=np.full_like(more, -np.inf), where=fits)
        i, k = np.unravel_index(int(gain.argmax()), gain.shape)
        trial = now.copy()
        trial[i] = k
        if not fits[i, k] or _spent(fronts, trial.tolist()) > room:
            return now.tolist()
        now = trial


# --- in words ---------------------------------------------------------------------------------

_PREFIXES: Mapping[str, Sequence[tuple[int, str]]] = {
    "parameters": ((9, "B"), (6, "M"), (3, "k")),
    "bytes": ((12, "T"), (9, "G"), (6, "M"), (3, "k")),
    "FLOPs": ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")),
    "ms": (),
}
_NAMES: Mapping[str, str] = {"parameters": " parameters", "bytes": "B"}


def shown(value: float, unit: Unit, rounding: str = decimal.ROUND_HALF_EVEN) -> str:
    """An amount as people say it, to four digits.

    >>> shown(15_200_000, "parameters"), shown(30_400, "bytes"), shown(3.41, "ms")
    ('15.2 M parameters', '30.4 kB', '3.41 ms')
    """
    number = decimal.Context(prec=4, rounding=rounding).create_decimal(repr(float(value)))
    fitting = ((p, name) for p, name in _PREFIXES[unit] if abs(number) >= 10**p)
    power, prefix = next(fitting, (0, ""))
    digits = f"{number.scaleb(-power).normalize():f}"
    return f"{digits} {prefix}{_NAMES.get(unit, unit)}".replace("  ", " ")


# --- goals that people type -------------------------------------------------------------------

# The exponent is kept short: a number of a billion digits would be written out.
_AMOUNT = re.compile(
    r"\s*((?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,2})?)\s*([a-zµ×]*)\s*",
    re.ASCII | re.IGNORECASE,
)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TIMES = {"": Decimal(1), "ms": Decimal(1), "s": Decimal(1000)}
_TIMES |= dict.fromkeys(("us", "µs"), Decimal("0.001"))
_FACTORS = {"": 1, "x": 1, "×": 1}


def parse_count(text: str | float) -> int:
    """A number of parameters or operations. Raises `BudgetError` if it is not a whole one above 0.

    >>> parse_count("15M"), parse_count("1.5B"), parse_count("350k"), parse_count(12)
    (15000000, 1500000000, 350000, 12)
    """
    return _whole(text, _COUNTS, "count", '"15M", "1.5B", "350k" or 15000000')


def parse_bytes(text: str | float) -> int:
    """A number of bytes, MB being 10^6 and MiB 2^20. Raises `BudgetError` as `parse_count` does.

    >>> parse_bytes("30MB"), parse_bytes("1.2 GB"), parse_bytes("1KiB")
    (30000000, 1200000000, 1024)
    """
    return _whole(text, _BYTES, "number of bytes", '"30MB", "1.2GB", "64MiB" or 30000000')


def parse_ms(text: str | float) -> float:
    """A time in milliseconds. Raises `BudgetError` if it is none above 0.

    >>> parse_ms("4ms"), parse_ms("0.004s"), parse_ms("4 ms"), parse_ms(4.0)
    (4.0, 4.0, 4.0, 4.0)
    """
    return float(_read(text, _TIMES, "time", '"4ms", "0.004s" or 4.0, which is in ms'))


def parse_speedup(text: str | float) -> float:
    """How many times as fast. Raises `BudgetError` if it is not a number from 1 on.

    >>> parse_speedup("1.5x"), parse_speedup(2)
    (1.5, 2.0)
    """
    found = _read(text, _FACTORS, "speedup", '"1.5x" or 1.5')
    if found < 1:
        raise BudgetError(
            "a speedup below 1 would be slower",
            seen=repr(text),
            expected='from 1 on, such as "1.5x"',
            mend=f'for {float(found):.4g} times the time, type "{float(1 / found):.4g}x"',
        )
    return float(found)


def _whole(text: str | float, factors: Mapping[str, int], what: str, such: str) -> int:
    found = _read(text, factors, what, such)
    nearest = round(found)
    # 1.1 * 1e9 in floats is not quite whole.
    if not nearest or abs(found - nearest) > Decimal("1e-9") * nearest:
        raise _nonsense(text, f"a {what} is a whole number", such)
    return nearest


def _read(
    text: str | float, factors: Mapping[str, int] | Mapping[str, Decimal], what: str, such: str
) -> Decimal:
    """A number, with the factor that its suffix stands for."""
    # True is a number to Python, and a slip to everybody else.
    match = None if isinstance(text, bool | np.bool_) else _AMOUNT.fullmatch(str(text))
    factor = factors.get(match[2].lower()) if match else None
    if not match or factor is None:
        raise _nonsense(text, f"this is no {what}", such)
    found = Decimal(match[1]) * factor
    if not found:
        raise _nonsense(text, f"a {what} is above 0", such)
    return found


def _nonsense(text: object, problem: str, such: str) -> BudgetError:
    return BudgetError(problem, seen=repr(text), expected=f"such as {such}")
