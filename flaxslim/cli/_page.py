"""The report of a slimming as one HTML file: it opens offline, and has no script.

Whatever comes from a folder (names, paths, configs) is text that somebody else wrote: all of it
goes through `_text`. The page's own rules forbid scripts and anything from elsewhere besides.
"""

import html
import json
import re
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from flaxslim._proof import Control, Proof
from flaxslim.checkpoint._atomic import check_file, fresh_file
from flaxslim.cli import _table
from flaxslim.cli._slimming import Slimming
from flaxslim.plots._widths import SiteWidth, by_unit

_MARK = '<meta name="generator" content="flaxslim report">'
_FOLDED = 24  # rows; a longer table is closed at first


def check(path: Path, *, overwrite: bool) -> None:
    """Raise `TargetError` if the page may not be written there."""
    target = path.expanduser()
    check_file(target, overwrite=overwrite, ours=_is_page, what="a report of flaxslim")


def _is_page(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return _MARK in file.read(1000)


def write(found: Slimming, path: Path) -> None:
    """Write the page; it appears whole or not at all."""
    with fresh_file(path.expanduser()) as new:
        new.write_text(page(found), encoding="utf-8")


def page(found: Slimming) -> str:
    """The page as a string."""
    sections = [
        ("sizes", "Sizes and speed", _sizes(found)),
        ("widths", "Widths", _widths(found.widths)),
        ("proof", "Proof", "" if found.proof is None else _proof(found.proof)),
        ("scores", "Scores", _scores(found)),
        ("notes", "Notes", _list(found.notes)),
        ("config", "Config", _config(found)),
    ]
    sections = [section for section in sections if section[2]]
    template = resources.files("flaxslim.cli").joinpath("page.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        mark=_MARK,
        name=_text(found.name),
        kind=_text(found.kind),
        version=_text(found.version),
        verdict="".join(f"<p>{_text(line)}</p>" for line in found.verdict.splitlines()),
        state=_state(found.proof),
        said="".join(f"<p>{_prose(part)}</p>" for part in found.said.split("\n\n") if part),
        links="".join(f'<li><a href="#{id}">{heading}</a></li>' for id, heading, _ in sections),
        sections="".join(
            f'<section aria-labelledby="{id}"><h2 id="{id}" tabindex="-1">{heading}</h2>'
            f"{body}</section>"
            for id, heading, body in sections
        ),
    )


# --- sections ---------------------------------------------------------------------------------


def _sizes(found: Slimming) -> str:
    rows = list(_table.amounts(found.changes))
    if not rows:
        return ""
    where = "" if found.proof is None else f"<p>Measured on {_text(found.proof.device)}.</p>"
    return _rows("Sizes and speed", ("", "before", "after", "ratio"), rows) + where


def _widths(sites: Sequence[SiteWidth]) -> str:
    parts = []
    for unit, own in by_unit(sites).items():
        largest = max(site.before for site in own)
        rows = [
            (
                site.path,
                f"{site.before:,}",
                f"{site.after:,}",
                _Markup(_bar(site, largest)),
                *([site.note] if any(one.note for one in own) else []),
            )
            for site in own
        ]
        head = ("second layer", "before", "after", "what stays", "relative squared error")[
            : len(rows[0])
        ]
        what = f"{unit.capitalize()} of each layer"
        parts.append(_folded(f"{what} ({len(rows)})", _rows(what, head, rows), len(rows)))
    return "".join(parts)


def _bar(site: SiteWidth, largest: int) -> str:
    """What stays, of what there was, of the widest; the numbers stand beside it."""
    before, after = (round(100 * n / max(largest, 1), 2) for n in (site.before, site.after))
    kind = "channels" if site.unit == "channels" else "heads"
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="before" width="{before:g}" height="10"/>'
        f'<rect class="{kind}" width="{after:g}" height="10"/></svg>'
    )


def _proof(proof: Proof) -> str:
    facts = [
        ("largest difference, of the largest output", f"{proof.relative:.1e}"),
        *(
            [("tolerance", f"{proof.tolerance:.1e}"), ("tolerance is", proof.tolerance_reason)]
            if proof.exact
            else [("tolerance", "none: the cut is approximate")]
        ),
        ("parameters are", proof.dtype),
        ("run on", proof.device),
    ]
    reasons = f"<p>Why it is not proven:</p>{_list(proof.reasons)}" if proof.reasons else ""
    return (
        reasons
        + _rows("What was asked and found", ("", ""), facts)
        + _outputs(proof)
        + ("" if proof.control is None else _control(proof.control))
    )


def _outputs(proof: Proof) -> str:
    rows = [
        (
            row.path,
            " × ".join(map(str, row.shape)) or "scalar",
            row.dtype,
            f"{row.largest:.1e}",
            f"{row.difference:.1e}",
            row.fault or f"{row.relative:.1e}",
        )
        for row in proof.outputs
    ]
    head = ("output", "shape", "dtype", "largest", "difference", "relative")
    table = _rows("Outputs, compared on the same inputs", head, rows)
    return _folded(f"Outputs ({len(rows)})", table, len(rows))


def _control(control: Control) -> str:
    """The wrong cuts on purpose."""
    rows = [
        (
            row.site,
            "all" if row.channels is None else f"{row.channels:,} of {row.living:,}",
            f"{row.relative:.1e}",
            "yes" if row.seen else "NO",
        )
        for row in control.rows
    ]
    head = ("second layer", "channels", "difference", "seen")
    seen = sum(row.seen for row in control.rows)
    words = (
        f"Control: a wrong cut on purpose shows (more than {control.bar:.1e}) at {seen} of "
        f"{len(control.rows)} sites tried, of {control.sites}."
    )
    table = _rows("Wrong cuts on purpose, and the difference that each makes", head, rows)
    return f"<p>{_text(words)}</p>" + _folded(f"Wrong cuts ({len(rows)})", table, len(rows))


def _scores(found: Slimming) -> str:
    names = list(dict.fromkeys(name for metrics in found.scores.values() for name in metrics))
    rows = [
        (model, *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names))
        for model, metrics in found.scores.items()
    ]
    return _rows("Scores of each model", ("model", *names), rows) if rows else ""


def _config(found: Slimming) -> str:
    text = json.dumps(found.config, indent=1, ensure_ascii=False)
    return f'<details><summary>config.json</summary><pre tabindex="0">{_text(text)}</pre></details>'


# --- parts ------------------------------------------------------------------------------------


class _Markup(str):
    """What is HTML already."""


def _text(value: object) -> str:
    """Anything as text of a page, in an element or in a quoted attribute."""
    return html.escape(str(value), quote=True)


def _prose(markdown: str) -> str:
    """A paragraph of a model card; of Markdown it knows code in backticks alone."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(markdown))


def _state(proof: Proof | None) -> str:
    if proof is None:
        return "unknown"
    return "good" if proof.ok and proof.exact else "near" if proof.ok else "bad"


def _list(items: Iterable[str]) -> str:
    rows = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<ul>{rows}</ul>" if rows else ""


def _rows(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column names the row; it scrolls by itself where the page is narrow."""
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head) if any(head) else ""
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(
            f"<td>{cell if isinstance(cell, _Markup) else _text(cell)}</td>" for cell in row[1:]
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f'<caption class="unseen">{_text(caption)}</caption>'
        f"{f'<thead><tr>{top}</tr></thead>' if top else ''}<tbody>{body}</tbody></table></div>"
    )


def _folded(summary: str, body: str, count: int) -> str:
    is_open = " open" if count <= _FOLDED else ""
    return f"<details{is_open}><summary>{_text(summary)}</summary>{body}</details>"
