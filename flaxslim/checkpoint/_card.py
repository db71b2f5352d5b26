"""The section of a model card that says what was cut."""

import re
from collections.abc import Mapping
from typing import Any

HEADING = "## What flaxslim cut"
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING = re.compile(r"#{1,2} ")


def with_section(card: str, body: str) -> str:
    """The card with the section replaced where it stands, or added at its end.

    >>> print(with_section("# Model", "Half of it."))
    # Model
    <BLANKLINE>
    ## What flaxslim cut
    <BLANKLINE>
    Half of it.
    <BLANKLINE>
    """
    before, after, part, fenced = [], [], "before", False
    for line in card.splitlines():
        if not fenced and line.strip() == HEADING:
            part = "section"
        elif part == "section" and not fenced and _HEADING.match(line):
            part = "after"
        if _FENCE.match(line):
            fenced = not fenced
        if part == "before":
            before.append(line)
        elif part == "after":
            after.append(line)
    blocks = ["\n".join(before).rstrip(), HEADING, body.strip(), "\n".join(after).rstrip()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def section(record: Mapping[str, Any] | None) -> str:
    """What the section says of a record.

    The record's own "card" (Markdown by the caller) if it has one, else its plain values; the
    rest is in the JSON file beside the card.
    """
    if not record:
        return "This checkpoint was written by flaxslim; nothing was recorded about a cut."
    text = record.get("card")
    if not isinstance(text, str):
        rows = [
            f"- {name}: {value}"
            for name, value in record.items()
            if isinstance(value, str | int | float | bool) and "\n" not in str(value)
        ]
        text = "Channels that contribute nothing were removed by flaxslim."
        text += "\n\n" + "\n".join(rows) if rows else ""
    return text.strip() + "\n\nThe plan and the proof are in `flaxslim.json`."
