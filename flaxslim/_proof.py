"""What `verify` found, as data: it can be printed, stored as JSON, and asked for its verdict.

Nothing here runs a model. The verdict (`Proof.ok`) and its reasons are derived from the
measured numbers, so a proof read back from JSON gives the same ones.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from flaxslim.errors import ProofError

WIDTH = 100  # columns of the printed table

NO_CONTROL = (
    "no control: give spec=, which says where a wrong cut can be made; without one nothing shows "
    "that these inputs would have brought it to light"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One quantity of the model before and after; None where it could not be measured."""

    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """after / before."""
        if self.before is None or self.after is None or not self.before:
            return None
        return self.after / self.before


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputRow:
    """One output array, compared.

    Attributes:
      largest: the largest magnitude before, masked entries left aside: the scale.
      difference: the largest absolute difference, masked entries left aside.
      relative: difference / largest, or the largest difference of a masked entry relative to
        itself if that is more. Of integers: 0 if all are equal, else infinity.
      masked: how many entries are infinite or a sentinel of the model's own (-1e6, finfo.min).
      fault: what makes the comparison itself fail (NaN, another shape), or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    largest: float
    difference: float
    relative: float
    masked: int = 0
    fault: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlRow:
    """One site with living channels taken away: the difference that a wrong cut makes there.

    Attributes:
      site: the path of its second kernel; without a spec, of a tensor that was cut.
      channels: how many of its `living` channels were zeroed; both are None if the whole tensor
        was, for want of a spec.
      relative: the difference that this made, measured as in `OutputRow`.
      seen: whether it stands out from rounding. If not, all living channels were tried.
    """

    site: str
    channels: int | None
    living: int | None
    relative: float
    seen: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """The proof put to the test: wrong cuts on purpose, one site at a time.

    Attributes:
      sites: how many sites the model has (without a spec: tensors that were cut); `rows` may
        hold fewer.
      bar: a wrong cut is seen if its relative difference is above this.
    """

    rows: tuple[ControlRow, ...]
    sites: int
    bar: float

    @property
    def coarse(self) -> bool:
        """Whether whole tensors were zeroed, since no spec says what a channel is."""
        return any(row.channels is None for row in self.rows)

    @property
    def smallest(self) -> float | None:
        """The difference at the site where a wrong cut is hardest to see."""
        return min((row.relative for row in self.rows), default=None)

    @property
    def unseen(self) -> tuple[ControlRow, ...]:
        """The sites of which the proof says nothing."""
        return tuple(row for row in self.rows if not row.seen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """The comparison of two models on the same inputs, and what it cost to run them.

    Attributes:
      control: None if none could be made, or if it was of no use (see `notes`).
      milliseconds: medians of one call each, after warm-up; parameters, bytes, flops: sizes.
      dtype: of the parameters before.
      exact: False if channels that do contribute were cut on purpose (a threshold); then no
        tolerance is asked for, and the differences are a measurement.
    """

    outputs: tuple[OutputRow, ...]
    tolerance: float
    tolerance_reason: str
    control: Control | None
    milliseconds: Change
    parameters: Change
    bytes: Change
    flops: Change
    device: str
    dtype: str
    notes: tuple[str, ...] = ()
    exact: bool = True

    @property
    def relative(self) -> float:
        """The largest difference of any output, relative to the largest value of that output."""
        return max((row.relative for row in self.outputs if row.fault is None), default=math.inf)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the two models are not shown to be the same function; empty if they are."""
        reasons = [f"output {row.path}: {row.fault}" for row in self.outputs if row.fault]
        if not self.outputs:
            reasons.append("the model has no outputs to compare")
        for row in self.outputs:
            if self.exact and row.fault is None and not row.relative <= self.tolerance:
                reasons.append(
                    f"output {row.path}: differs by {_short(row.relative)} of its largest value, "
                    f"more than {_short(self.tolerance)}"
                    if math.isfinite(row.relative)
                    else f"output {row.path}: differs where it must be equal"
                )
        if self.control is not None and self.control.unseen:
            unseen, tried = self.control.unseen, len(self.control.rows)
            names = ", ".join(row.site for row in unseen[:4])
            more = f" and {len(unseen) - 4} more" if len(unseen) > 4 else ""
            what, wrong = ("sites", "taking all their living channels away")
            if self.control.coarse:
                what, wrong = ("tensors that were cut", "zeroing each of them")
            reasons.append(
                f"these inputs do not reach {len(unseen)} of {tried} {what}, so the proof says "
                f"nothing about them ({wrong} changes no output by more than "
                f"{_short(self.control.bar)}): {names}{more}"
            )
        if self.control is None and not reasons:
            reasons.append(NO_CONTROL)
        return tuple(reasons)

    @property
    def ok(self) -> bool:
        return not self.reasons

    def raise_if_failed(self) -> None:
        """Raises `ProofError` with every reason and the likely causes."""
        if self.ok:
            return
        unseen = self.control is not None and bool(self.control.unseen)
        if self.reasons == (NO_CONTROL,):
            problem = "the proof cannot tell a right cut from a wrong one"
            mend = "give the spec by which the model was cut: verify(..., spec=Spec(...))"
        elif unseen and len(self.reasons) == 1:
            problem = "the proof cannot tell a right cut from a wrong one"
            mend = (
                "check (a) that the inputs reach every layer (a mask of zeros, an unused "
                "decoder?) and give others by inputs=, (b) that the model uses these sites at "
                "all; if it does not, narrow the spec, (c) that the computation is precise "
                "enough to show one layer: float32, or x64 enabled"
            )
        else:
            problem = "the two models are not shown to compute the same function"
            mend = (
                "check (a) that channels which contribute were not cut: a plan made from other "
                "parameters, or with a threshold (then say approximate=True), (b) that the "
                "config says the activation and the widths which the model was trained with, "
                "(c) that the model is deterministic and finite on these inputs, and precise "
                "enough: 16-bit arithmetic rounds at every step"
            )
        raise ProofError(
            problem,
            seen="; ".join(self.reasons),
            expected=f"at most {_short(self.tolerance)} of the largest output "
            f"({self.tolerance_reason})",
            mend=mend,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinity and NaN are written as strings."""
        return {**_plain(dataclasses.asdict(self)), "ok": self.ok, "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Proof":
        """The proof that `to_dict` wrote; its verdict is derived anew."""
        data = {k: v for k, v in data.items() if k not in ("ok", "reasons")}
        control = data["control"]
        changes = ("milliseconds", "parameters", "bytes", "flops")
        data |= {
            "outputs": tuple(
                _build(OutputRow, {**r, "shape": tuple(r["shape"])}) for r in data["outputs"]
            ),
            "control": control
            and _build(
                Control, {**control, "rows": tuple(_build(ControlRow, r) for r in control["rows"])}
            ),
            "notes": tuple(data["notes"]),
            **{name: Change(**data[name]) for name in changes},
        }
        return _build(cls, data)

    def to_json(self) -> str:
        """The proof as a JSON document."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Proof":
        """The proof that `to_json` wrote; its verdict is derived anew."""
        return cls.from_dict(json.loads(text))

    def __str__(self) -> str:
        return "\n".join(line for part in _PARTS for line in part(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _build(cls: Any, data: Mapping[str, Any]) -> Any:
    floats = {f.name for f in dataclasses.fields(cls) if f.type is float}
    return cls(**{k: float(v) if k in floats else v for k, v in data.items()})


# --- the table --------------------------------------------------------------------------------


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _amount(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _cell(text: str, width: int) -> str:
    """`text` in `width` columns; of a long path the end is what tells it from its neighbours."""
    return text if len(text) <= width else "..." + text[3 - width :]


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    """Like `textwrap.wrap`, with the following lines indented and long paths left whole."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def _verdict(p: Proof) -> list[str]:
    if not p.ok:
        return [
            "NOT PROVED",
            *(line for reason in p.reasons for line in _wrapped(f"- {reason}")),
        ]
    if not p.exact:
        return [f"approximate: outputs differ by up to {_short(p.relative)} of their largest value"]
    return _wrapped(
        f"same function: outputs differ by {_short(p.relative)} of their largest value at most, "
        f"allowed are {_short(p.tolerance)} ({p.tolerance_reason})"
    )


def _sizes(p: Proof) -> list[str]:
    lines = [f"{'':<14}{'before':>22}{'after':>22}{'after / before':>18}"]
    for name, change in (
        ("parameters", p.parameters),
        ("bytes", p.bytes),
        ("FLOPs", p.flops),
        ("milliseconds", p.milliseconds),
    ):
        if change.before is not None or change.after is not None:
            ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
            before, after = _amount(change.before), _amount(change.after)
            lines.append(f"{name:<14}{before:>22}{after:>22}{ratio:>18}")
    return ["", *lines]


def _outputs(p: Proof) -> list[str]:
    lines = [
        "",
        f"{'output':<40} {'shape':<17} {'dtype':<9} {'largest':>9} {'differs':>9} {'relative':>9}",
    ]
    for row in p.outputs:
        shape = _cell("x".join(map(str, row.shape)) or "scalar", 17)
        lines.append(
            f"{_cell(row.path, 40):<40} {shape:<17} {_cell(row.dtype, 9):<9} "
            f"{_short(row.largest):>9} {_short(row.difference):>9} {_short(row.relative):>9}"
        )
    if masked := [f"{row.masked:,} of {row.path}" for row in p.outputs if row.masked]:
        lines += _wrapped(
            f"masked entries (infinite, or sentinels like -1e6), each compared with itself: "
            f"{', '.join(masked)}"
        )
    return lines


def _control(p: Proof) -> list[str]:
    if p.control is None:
        return []
    control = p.control
    head = "control: wrong cut at"
    if control.coarse:
        head = "control: tensor zeroed"
    lines = ["", f"{head:<67} {'' if control.coarse else 'channels':>18} {'relative':>9}"]
    shown = sorted(control.rows, key=lambda row: (row.seen, row.relative))[:6]
    for row in shown:
        count = "" if row.channels is None else f"{row.channels} of {row.living}"
        unseen = "" if row.seen else "  !"
        lines.append(f"{_cell(row.site, 67):<67} {count:>18} {_short(row.relative):>9}{unseen}")
    what = "tensors" if control.coarse else "sites"
    if len(control.rows) > len(shown):
        lines.append(f"... and {len(control.rows) - len(shown)} more {what}, each plainer to see")
    seen = sum(row.seen for row in control.rows)
    lines += _wrapped(
        f"a wrong cut shows (more than {_short(control.bar)}) at {seen} of {len(control.rows)} "
        f"{what} tried, of {control.sites}"
    )
    return lines


def _surroundings(p: Proof) -> list[str]:
    notes = [line for note in p.notes for line in _wrapped(f"note: {note}")]
    return ["", f"parameters {p.dtype}, run on {p.device}", *notes]


_PARTS = (_verdict, _sizes, _outputs, _control, _surroundings)
