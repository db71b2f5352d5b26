"""The picture of the idea: one FFN before and after the cut.

    python docs/pictures/idea.py

Writes `idea.svg` beside this file. All colours are of middle lightness, so that the picture can be
read on a light page and on a dark one.
"""

from collections.abc import Iterator
from pathlib import Path

D, F = 4, 9  # sizes of the embedding and of the hidden layer
DEAD = (2, 5, 6)
CELL, GAP = 26, 3
LEFT, TOP = 96, 52
WIDTH, HEIGHT = 780, 392

ALIVE, GONE, TEXT, CUT = "#3f83d1", "#8a929c", "#7a828c", "#d9573f"
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def text(x: float, y: float, words: str, anchor: str = "middle", **style: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{attributes}>{words}</text>'


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" class="arrow" marker-end="url(#head)"/>'


def cell(x: float, y: float, row: int, channel: int, zero: bool) -> str:
    """A number: the darker the larger; an empty box is zero."""
    side = CELL - GAP
    box = f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" rx="3"'
    if zero:
        middle = text(x + side / 2, y + side / 2 + 4, "0", font_size="12")
        return f'{box} fill="none" stroke="{GONE}" stroke-dasharray="2 2"/>{middle}'
    strength = 0.4 + 0.15 * ((3 * row + 7 * channel + row * channel) % 5)
    colour = GONE if channel in DEAD else ALIVE
    return f'{box} fill="{colour}" fill-opacity="{strength:.2f}"/>'


def network(x: float, channels: list[int]) -> Iterator[str]:
    """x enters from the left, the hidden values go down, y leaves to the right."""
    down = TOP + D * CELL + 92
    right = x + len(channels) * CELL
    for at, channel in enumerate(channels):
        here = x + at * CELL
        for row in range(D):
            yield cell(here, TOP + row * CELL, row, channel, zero=False)
            yield cell(here, down + row * CELL, row + D, channel, zero=channel in DEAD)
        yield cell(here, TOP + D * CELL + 8, D, channel, zero=False)
        middle = here + (CELL - GAP) / 2
        yield arrow(middle, TOP + D * CELL + 38, middle, down - 7)
    for row in range(D):
        y = row * CELL + (CELL - GAP) / 2
        yield arrow(x - 26, TOP + y, x - 6, TOP + y)
        yield arrow(right + 2, down + y, right + 22, down + y)
    yield text(x - 36, TOP + D * CELL / 2 + 2, "x", font_style="italic")
    yield text(right + 34, down + D * CELL / 2 + 2, "y", font_style="italic")


def strips(x: float) -> Iterator[str]:
    """What goes of each dead channel: its column, its bias, and its row of zeros."""
    bottom = TOP + 2 * D * CELL + 92
    for channel in DEAD:
        here = x + channel * CELL - GAP / 2 - 1
        yield (
            f'<rect x="{here:g}" y="{TOP - 8}" width="{CELL - 1}" height="{bottom - TOP + 10}" '
            f'rx="6" class="cut"/>'
        )


def picture() -> str:
    """The SVG."""
    living = [channel for channel in range(F) if channel not in DEAD]
    middle = TOP + D * CELL + 64
    small = WIDTH - 66 - len(living) * CELL
    half = LEFT + F * CELL / 2
    parts = [
        *network(LEFT, list(range(F))),
        *strips(LEFT),
        text(LEFT - 52, TOP + D * CELL / 2 + 2, "W1", "end", font_weight="600"),
        text(LEFT - 52, TOP + D * CELL + 24, "b1", "end", font_weight="600"),
        text(LEFT - 52, middle + 3, "act", "end"),
        text(LEFT - 52, TOP + 1.5 * D * CELL + 94, "W2", "end", font_weight="600"),
        text(half + 12, 26, "3 of 9 channels: their rows of W2 are zero"),
        text(half, HEIGHT - 10, "column of W1, entry of b1, row of W2: one strip", fill=CUT),
        arrow(LEFT + F * CELL + 64, middle, small - 84, middle),
        text((LEFT + F * CELL + small - 18) / 2, middle - 12, "slim", font_weight="600"),
        *network(small, living),
        text(small + len(living) * CELL / 2, 26, "6 channels"),
        text(small + len(living) * CELL / 2, HEIGHT - 10, "the same y, for every x"),
    ]
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
width="{WIDTH}" height="{HEIGHT}" font-family="{FONT}" font-size="14" fill="{TEXT}" role="img">
<title>An FFN with three dead channels, and the same FFN without them</title>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" \
orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{TEXT}"/></marker></defs>
<style>.arrow {{ stroke: {TEXT}; stroke-width: 1.4; fill: none }}
.cut {{ stroke: {CUT}; stroke-width: 1.8; stroke-dasharray: 6 4; fill: {CUT}; fill-opacity: 0.08 }}
</style>
{body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
