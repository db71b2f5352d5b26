"""What a key of a recipe takes, said in the annotation of its field."""

import dataclasses
import math
from typing import Annotated

from flaxslim._kinds import MOST_SEED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`; `open` leaves `low` itself out.

    >>> 0 in Range(low=0, open=True), 3 in Range(low=0), str(Range(low=0, high=1))
    (False, True, 'from 0 to 1')
    """

    low: float
    high: float = math.inf
    open: bool = False

    def __contains__(self, x: float) -> bool:
        return (self.low < x if self.open else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            high = self.high if isinstance(self.high, int) else f"{self.high:g}"
            return f"from {self.low:g} to {high}"
        return f"above {self.low:g}" if self.open else f"{self.low:g} or more"


class Source:
    """Marks a text that is a folder or the id of a repository on the Hub."""


Seed = Annotated[int, Range(low=0, high=MOST_SEED)]
Count = Annotated[int, Range(low=1)]
Steps = Annotated[int, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]
Positive = Annotated[float, Range(low=0, open=True)]
Weight = Annotated[float, Range(low=0)]
Checkpoint = Annotated[str, Source()]
