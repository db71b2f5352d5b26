"""`flaxslim report`: what the record of a checkpoint says of its slimming."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flaxslim._plan import Plan
from flaxslim._proof import Change, Proof
from flaxslim.checkpoint._folder import CONFIG, RECORD, inside, read_json, reading
from flaxslim.cli import _output, _table
from flaxslim.errors import CorruptFileError, FlaxslimError, MissingFileError
from flaxslim.plots._widths import SiteWidth, widths
from flaxslim.posttraining._report import Report, Row

# Of a run: what its report measured before and after.
_MEASURED = ("parameters", "bytes", "step_flops", "step_milliseconds", "latency")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slimming:
    """What was cut, and what was measured.

    Attributes:
      name: of the folder.
      kind: the `model_type` of the config, and the classes that it names.
      version: of flaxslim, when it was cut.
      said: what the model card says of it, as Markdown.
      widths: of each site; empty if the record tells none.
      proof: None if none was recorded.
      error: a line on the outputs of what was pruned by data; empty for all else.
      changes: has a `Change` for each of the `amounts` of `_table` that was measured.
      scores: metrics by model.
      config: of the slimmed model.
    """

    name: str
    kind: str
    version: str
    said: str
    widths: tuple[SiteWidth, ...]
    proof: Proof | None
    error: str
    changes: Any
    scores: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Its name, and what it is."""
        return f"{self.name}: {self.kind}, slimmed by flaxslim {self.version}"

    @property
    def verdict(self) -> str:
        """Whether it computes the same, in a line or two."""
        proof = "no proof was recorded" if self.proof is None else _table.verdict(self.proof)
        return "\n".join(filter(None, (proof, self.error)))


def read(folder: Path) -> Slimming:
    """What a folder tells. Nothing is run, and no weights are read.

    Raises `MissingFileError` if it holds no record, `CorruptFileError` if that is none of ours.
    """
    folder = folder.expanduser()
    if not inside(folder, RECORD).is_file():
        raise MissingFileError(
            f"there is no {RECORD} in this folder, so nothing is known of a cut",
            path=str(folder),
            expected="a folder that flaxslim slim, prune or run has written",
            mend="name such a folder; flaxslim verify BEFORE AFTER measures any two",
        )
    record, config = _json(folder, RECORD), _json(folder, CONFIG)
    with _ours(folder / RECORD):
        found = _found(record, _run_of(folder))
        return Slimming(
            name=folder.resolve().name,
            kind=_kind(config),
            version=str(record.get("flaxslim", "of unknown version")),
            said=str(record.get("card") or ""),
            config=config,
            **found,
        )


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, name)
    with reading(path):
        return read_json(path)


@contextmanager
def _ours(path: Path) -> Iterator[None]:
    """Whatever goes wrong within is the fault of a record that is not as we write it."""
    try:
        yield
    except FlaxslimError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CorruptFileError(
            "this record is not as flaxslim writes it",
            path=str(path),
            seen=f"{type(error).__name__}: {error}",
            mend="write the checkpoint anew, by the same version of flaxslim",
        ) from error


def _run_of(folder: Path) -> Mapping[str, Any]:
    """The report that a run leaves beside its model; empty if it was no run."""
    return _json(folder, _output.REPORT) if inside(folder, _output.REPORT).is_file() else {}


def _found(record: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What depends on the command that wrote the record."""
    pruned = record.get("prune") or {}
    report = _pruning(pruned["report"]) if pruned else None
    plan = Plan.from_dict(record["plan"]) if record.get("plan") else None
    told = record.get("proof") or pruned.get("measured")
    proof = Proof.from_dict(told) if told else None
    source = plan or report
    if source is not None:
        sites = widths(source)
    else:
        sites = tuple(map(_site, record.get("sites") or ()))
    changes: Any = proof
    if run:
        changes = SimpleNamespace(**{name: Change(**run[name]) for name in _MEASURED})
    notes = (
        *(() if plan is None else (*plan.blocked, *plan.notes)),
        *(() if report is None else report.notes),
        *(() if proof is None else proof.notes),
    )
    return {
        "widths": sites,
        "proof": proof,
        "error": "" if report is None else report.said_of_outputs,
        "changes": changes,
        "scores": _scores(run.get("scores") or pruned.get("scores") or {}),
        "notes": notes,
    }


def _pruning(data: Mapping[str, Any]) -> Report:
    return Report(**{**data, "rows": tuple(Row(**row) for row in data["rows"])})


def _site(data: Mapping[str, Any]) -> SiteWidth:
    return SiteWidth(
        path=str(data["path"]),
        unit=str(data["unit"]),
        before=int(data["before"]),
        after=int(data["after"]),
    )


def _scores(data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        str(model): {str(name): float(x) for name, x in metrics.items()}
        for model, metrics in data.items()
    }


def _kind(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ()
    classes = ", ".join(map(str, names)) if isinstance(names, list | tuple) else str(names)
    kind = str(config.get("model_type", "a model of one's own"))
    return f"{kind} ({classes})" if classes else kind
