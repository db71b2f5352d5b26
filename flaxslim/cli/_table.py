"""Tables and progress bars, with rich."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flaxslim._plan import Cut, many
from flaxslim.cli._console import messages


@contextlib.contextmanager
def training(task: str, steps: int) -> Iterator[Callable[..., None]]:
    """A progress bar; tell it the step that was taken, and the last row of metrics."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=messages) as progress:
        number = progress.add_task(task, total=steps, said="")

        def said(step: int, row: Any = None) -> None:
            progress.update(number, completed=step)
            if row is not None:
                progress.update(number, said=_row(row))

        yield said


def _row(row: Any) -> str:
    widths = dict.fromkeys((row.width_min, row.width_max))
    return (
        f"loss {row.loss:.3f}  dead {row.sparsity:.0%}  "
        f"width {' to '.join(f'{width:,}' for width in widths)}  {row.ms_per_step:.1f} ms"
    )


def _table(label: str, *numbers: str) -> Table:
    """Labels are folded where the screen is narrow; numbers are never cut off."""
    table = Table()
    table.add_column(label, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else ""


# What can change, by the name of its `Change`: how it is called, and shown.
_AMOUNTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", "{:,.0f}".format),
    "bytes": ("bytes", lambda n: decimal(int(n), precision=2)),
    "flops": ("FLOPs, one forward pass", "{:,.0f}".format),
    "step_flops": ("FLOPs, one training step", "{:,.0f}".format),
    "step_milliseconds": ("training step", "{:.1f} ms".format),
    "milliseconds": ("latency", "{:.1f} ms".format),
    "latency": ("latency", "{:.1f} ms".format),
}


def amounts(report: Any) -> Iterator[tuple[str, str, str, str]]:
    """What changed, before, after, and the ratio, of whatever has sizes or times before and after.

    What could not be measured is left out.
    """
    for name, (label, show) in _AMOUNTS.items():
        change = getattr(report, name, None)
        if change is not None and change.before is not None and change.after is not None:
            ratio = _ratio(change.before, change.after)
            yield label, show(change.before), show(change.after), ratio


def _changes(report: Any, *columns: str) -> Table:
    table = _table("", *columns)
    for row in amounts(report):
        table.add_row(*row)
    return table


def before_after(report: Any) -> Table:
    """What slimming changed."""
    return _changes(report, "before", "after", "ratio")


def verdict(proof: Any) -> str:
    """Whether slimming changed the function, in a line or two."""
    word, of, asked = "equal to rounding", "", f" (tolerance {proof.tolerance:.1e})"
    if not proof.exact:
        word, of, asked = "approximate", " of any one value", ""
    lines = [
        f"{word if proof.ok else 'NOT EQUAL'}: largest difference{of} {proof.relative:.1e} of the "
        f"largest output{asked}, on {proof.device}"
    ]
    if proof.control is not None and proof.control.smallest is not None:
        lines.append(
            f"control: cutting one wrong channel changes the output by {proof.control.smallest:.1e}"
            f" or more, at each of {len(proof.control.rows)} sites"
        )
    return "\n".join(lines)


def discovery(found: Any) -> str:
    """What was discovered, what was refused and why, and the spec."""
    parts = (
        f"{found.cls.__name__}, traced on shapes: {found.discovery}",
        "the spec, for flaxslim.slim(params, cfg, spec), or spec.torch() in PyTorch's names:",
        found.spec.source(),
    )
    return "\n\n".join(parts)


def inspection(report: Any) -> Group:
    """The sites of a checkpoint and what would go."""
    plan = report.plan
    title = f"{report.source}: {report.model_type}, {', '.join(report.files)}"
    heads = report.heads
    channels = [cut for cut in plan.cuts if cut.site.pair.axis != "h"]
    asked = any(cut.site.pair.axis == "h" for cut in plan.cuts)
    known = report.discovered is None
    names = ("FFN", "attention") if known else ("second layer", "second layer of heads")
    totals = _table("", "now", "slimmed", "ratio")
    for resize in plan.resizes:
        same = resize.least == resize.after
        totals.add_row(
            resize.width,
            f"{resize.before:,}",
            f"{resize.after:,}" if same else f"{resize.least:,} to {resize.after:,}",
            _ratio(resize.before, resize.after) if same else "",
        )
    for row in amounts(report):
        totals.add_row(*row)
    notes = [f"note: {note}" for note in report.all_notes]
    if known and not asked and (note := heads_note(heads)):
        notes.append(note)
    if not plan.removed:
        notes.append("nothing would be removed")
    return Group(
        Text(title),
        *([_sites(names[0], "channels", channels, show_gone=True)] if channels or known else []),
        *([_sites(names[1], "heads", heads, show_gone=asked)] if heads else []),
        totals,
        *map(Text, notes),
    )


def heads_note(cuts: Iterable[Cut]) -> str | None:
    """Of heads that nobody asked for: how many are dead, and by which flags they go."""
    dead = sum(min(cut.dead, cut.removed) for cut in cuts)
    if not dead:
        return None
    are, them = ("is", "it") if dead == 1 else ("are", "them")
    return f"note: {many(dead, 'heads')} {are} dead; --heads --width per_layer cuts {them}"


def _sites(what: str, unit: str, cuts: Iterable[Any], *, show_gone: bool) -> Table:
    """A row for each site; what goes only where that was asked for.

    Sites are known by their roots, where these are not shared with another pair.
    """
    table = _table(what, unit, "dead", *(["kept", "parameters\nthat go"] if show_gone else []))
    for cut in cuts:
        times = f"{cut.site.rows} x " if cut.site.stack else ""
        name = cut.site.second.path if what.startswith("second") else cut.site.root or "(top)"
        row = [name, f"{times}{cut.site.size:,}", f"{cut.dead:,}"]
        if show_gone:
            row += [f"{times}{cut.width:,}", f"{cut.removed_parameters:,}"]
        table.add_row(*row)
    return table


def families() -> Table:
    """Every model_type that has specs."""
    from flaxslim.specs import COMPOSITES, FAMILIES

    table = Table(box=SIMPLE)
    table.add_column("model_type", no_wrap=True)
    table.add_column("specs", overflow="fold")
    table.add_column("widths and heads in the config", overflow="fold")
    for name, specs in sorted(FAMILIES.items()):
        widths = dict.fromkeys(str(pair.width_expression) for spec in specs for pair in spec)
        table.add_row(name, ", ".join(spec.name for spec in specs), ", ".join(widths))
    for name, parts in sorted(COMPOSITES.items()):
        table.add_row(name, "of its parts", ", ".join(f"{part}.*" for part in parts))
    return table


def scores(results: Mapping[str, Mapping[str, float]], show: Callable[[float], str]) -> Table:
    """The metrics of each model."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    table = _table("model", *names)
    for model, metrics in results.items():
        table.add_row(model, *(show(metrics[name]) if name in metrics else "" for name in names))
    return table


def trained(report: Any) -> Table:
    """What a run has done to size and speed."""
    return _changes(report, "dense", "slim", "ratio")


def slimming(found: Any) -> Group:
    """What the record of a checkpoint says."""
    table = _table("second layer", "unit", "before", "after")
    for site in found.widths:
        table.add_row(site.path, site.unit, f"{site.before:,}", f"{site.after:,}")
    parts = [
        Text(found.title),
        *([table] if found.widths else []),
        *([before_after(found.changes)] if any(amounts(found.changes)) else []),
        *(map(Text, found.verdict.splitlines())),
        *(Text(f"note: {note}") for note in found.notes),
    ]
    return Group(*parts)


def step_time(report: Any) -> str | None:
    """How the time of a step compares with what FLOPs say; None where nothing was cut."""
    if not report.shrunk or report.predicted is None or report.measured is None:
        return None
    beyond = report.measured / report.predicted
    return (
        f"a training step takes {report.measured:.2f} of its time, and FLOPs say "
        f"{report.predicted:.2f}: {beyond:.2f} times as long as predicted"
    )


def swept(rows: list[dict[str, Any]]) -> Table:
    """What each preset keeps of a model at each size."""
    every = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in every if name not in ("preset", "keep", "parameters")]
    table = _table("preset", "keep", "parameters", *names)
    for row in rows:
        numbers = (f"{row[name]:.4g}" if name in row else "" for name in names)
        table.add_row(row["preset"], f"{row['keep']:.0%}", f"{row['parameters']:,}", *numbers)
    return table
