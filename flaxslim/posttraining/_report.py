"""What pruning without training did, site by site."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One site.

    Attributes:
      path: the second kernel.
      unit: what is counted, "channels" or "heads".
      before, after: how many there were, and are.
      predicted: the relative squared error of its output, as the ranking says: |x - y|^2 over the
        variance of y (over |y|^2 where it has no bias); None where the score says none.
      measured: the same, measured on all calibration data after the refit, with what the site
        reads in the network as it is pruned by then if the method is sequential.
      ridge: that of the refit; the largest of its rows.
    """

    path: str
    unit: str
    before: int
    after: int
    predicted: float | None
    measured: float
    ridge: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `prune` did: `str(report)` is a table with a bar for each site.

    Attributes:
      rows: one for each site.
      samples, positions: how much calibration data there was.
      output_error: distance of the outputs from those of the dense model: the mean over outputs of
        the Kullback-Leibler divergence of logits (nats), and of the relative squared error of
        others.
      measure: which of these it is, and on which batches, in words.
      tuned: loss on what was held out before and after, and after how many steps; empty if nothing
        was tuned.
      cost: what was asked of the budget and what is predicted, by name; empty without a budget.
      notes: what the reader should know.
    """

    rows: tuple[Row, ...]
    samples: int
    positions: int
    output_error: float
    measure: str = ""
    tuned: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def said_of_outputs(self) -> str:
        """How far the outputs are from the dense ones, in a line."""
        of = f" ({self.measure})" if self.measure else ""
        return f"outputs: {self.output_error:.3g} from the dense ones{of}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"pruned on {self.samples:,} samples, {self.positions:,} positions; of what each layer "
            "puts out, the relative squared error:"
        ]
        wide = max(len(row.path) for row in self.rows)
        for row in self.rows:
            share = row.after / max(row.before, 1)
            bar = ("█" * round(20 * share)).ljust(20, "·")
            told = "" if row.predicted is None else f", predicted {row.predicted:.3g}"
            lines.append(
                f"{row.path:<{wide}}  {bar}  {row.after:>6,} of {row.before:>6,} {row.unit}  "
                f"error {row.measured:.3g}{told}"
            )
        lines.append(self.said_of_outputs)
        if self.tuned:
            lines.append(
                f"tuned for {self.tuned['step']:.0f} steps: loss {self.tuned['before']:.3g} to "
                f"{self.tuned['after']:.3g} on what was held out"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
