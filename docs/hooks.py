"""The parts of pages that are made from the code when the site is built, so that none goes stale.

A page says where, by a line that ends in `<!-- generated: families -->`. What stands before is for
readers of the repository, who see it and not what is made: the line gives way as a whole. So does
a line that ends in `<!-- unbuilt -->`, to nothing. What is made here is never committed.
"""

import ast
import contextlib
import inspect
import io
import itertools
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flaxslim
import flaxslim.errors
from flaxslim import Pair, Spec
from flaxslim._config import Width
from flaxslim.specs import COMPOSITES, FAMILIES
from flaxslim.training import _score

PLACE = re.compile(r"^.*<!-- generated: (\w+) -->$", re.MULTILINE)
UNBUILT = re.compile(r"^.*<!-- unbuilt -->\n+", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The event of MkDocs: a page before it is rendered."""
    return PLACE.sub(lambda found: GENERATED[found[1]](), UNBUILT.sub("", markdown))


# --- families and specs -----------------------------------------------------------------------


def families() -> str:
    """A row for each model_type: its pairs, and what one width for all layers can say of them."""
    rows: list[tuple[str, ...]] = [("model_type", "pairs", "width", "uniform")]
    for name, specs in sorted(FAMILIES.items()):
        pairs = dict.fromkeys(_of_pair(pair) for spec in specs for pair in spec)
        columns = zip(*pairs, strict=True)
        rows.append((f"`{name}`", *("<br>".join(column) for column in columns)))
    return _table(rows)


def composites() -> str:
    """A row for each family that is made of others."""
    rows = [("model_type", "parts of its config", "where their parameters are")]
    for name, parts in sorted(COMPOSITES.items()):
        places = (f"below `{tree}`" if tree else "at the top" for tree in parts.values())
        rows.append((f"`{name}`", ", ".join(f"`{key}`" for key in parts), ", ".join(places)))
    return _table(rows)


def specs() -> str:
    """A row for each spec constant; those that are the same spec share one."""
    names: dict[Spec, list[str]] = {}
    for name in flaxslim.__all__:
        if name.endswith(("_FFN", "_HEADS")):
            names.setdefault(getattr(flaxslim, name), []).append(f"`{name}`")
    rows = [("constants", "pairs")]
    for spec, same in names.items():
        rows.append((", ".join(same), "<br>".join(f"`{_cell(pair)}`" for pair in spec)))
    return _table(rows)


def _of_pair(pair: Pair) -> tuple[str, str, str]:
    kernels = f'{", ".join(pair.firsts)} "{pair.first_axes}"'
    kernels += f' -> {pair.second} "{pair.second_axes}"'
    width = pair.width_expression
    return f"`{_cell(kernels)}`", f"`{width or ''}`", _uniform(pair, width)


def _uniform(pair: Pair, width: Width | None) -> str:
    """Whether plain keys of a config can say a smaller width."""
    if width is None or width.key is None:
        return "no: hard-coded"
    if pair.fixed:
        return "no"
    first = width.expression.partition(" or ")[0]
    if first.startswith("swiglu"):
        return "multiples of 8"
    return f"multiples of `{first.partition('*')[2]}`" if "*" in first else "yes"


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|")


# --- scores -----------------------------------------------------------------------------------


def scores() -> str:
    """The docstring of the scores, with its table as one, and each source where it is cited."""
    _, *before, table, after, cited = inspect.cleandoc(_score.__doc__ or "").split("\n\n")
    head, *lines = table.splitlines()
    starts = [head.index(name) for name in ("name", "score", "looked", "source")]
    sources = _sources(cited)
    rows: list[tuple[str, ...]] = [("score", "of a channel", "looked at", "source")]
    for line in lines:
        cells = [line[i:j].strip() for i, j in itertools.pairwise([*starts, None])]
        rows.append((f"`{cells[0]}`", f"`{cells[1]}`", cells[2], sources.get(cells[3], cells[3])))
    return "\n\n".join((*before, _table(rows), after))


def _sources(cited: str) -> dict[str, str]:
    """By "[1]", what it stands for."""
    _, *parts = re.split(r"(\[\d+\]) ", " ".join(cited.split()))
    linked = [
        re.sub(r"arXiv ([\d.]*\d)", r"[arXiv \1](https://arxiv.org/abs/\1)", text.strip(" ."))
        for text in parts[1::2]
    ]
    return dict(zip(parts[::2], linked, strict=True))


# --- errors -----------------------------------------------------------------------------------


def errors() -> str:
    """A section for each class of `errors.py`, under the headings of that file."""
    source = Path(inspect.getfile(flaxslim.errors)).read_text()
    messages = _messages()
    parts: list[str] = []
    for verb, name in re.findall(r"^# --- ([\w ]+) -|^class (\w+)", source, re.MULTILINE):
        parts.append(f"## {verb.capitalize()}" if verb else _error(name, messages.get(name, {})))
    return "\n\n".join(parts)


def _error(name: str, messages: dict[str, str]) -> str:
    cls = getattr(flaxslim.errors, name)
    text = inspect.cleandoc(cls.__doc__)
    body = re.sub(r"(?:^    .*\n|^\n(?=    ))+", _fenced, text, flags=re.MULTILINE)
    body = body.replace("\nMend: ", "\n**Mend:** ")
    bases = ", ".join(base.__name__ for base in cls.__bases__)
    parts = [f"### {name}", f"`{name}({bases})`", body]
    if messages:
        parts.append(f'??? note "Messages ({len(messages)}), and what they say to do"')
        rows = [f"- {said}" + (f": *{mend}*" if mend else "") for said, mend in messages.items()]
        parts.append(textwrap.indent("\n".join(rows), "    "))
    return "\n\n".join(parts)


def _fenced(found: re.Match[str]) -> str:
    code = textwrap.dedent(found[0]).strip("\n")
    language = "sh" if code.startswith("flaxslim ") else "python"
    return f"\n```{language}\n{code}\n```\n"


def _messages() -> dict[str, dict[str, str]]:
    """By class, the messages that stand in the source, each with its mend."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(Path(inspect.getfile(flaxslim)).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name, said = _raised(node)
                mends = [_said(x.value) for x in node.keywords if x.arg == "mend"]
                if name and said.strip("… "):
                    found.setdefault(name, {}).setdefault(said, "".join(mends))
    return found


def _raised(call: ast.Call) -> tuple[str, str]:
    """The class of ours that a call makes or warns of, and the message; empty for other calls."""
    for node in (call.func, *call.args[1:2]):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        if isinstance(getattr(flaxslim.errors, name, None), type):
            return name, _said(call.args[0])
    return "", ""


def _said(node: ast.expr) -> str:
    """A text in the source; … stands for what is known only when it is said."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"([*_<>`\[\]])", r"\\\1", text)
        case ast.JoinedStr(values=parts):
            return "".join(map(_said, parts))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _said(left) + _said(right)
        case ast.IfExp(body=one, orelse=other):
            return f"{_said(one)} / {_said(other)}"
    return "…"


# --- the command line -------------------------------------------------------------------------


def commands() -> str:
    """A section for each command, with its own help."""
    from flaxslim import cli

    parts = []
    for name in ("", *cli._by_name()):
        parts += [f"## flaxslim {name}".rstrip(), f"```text\n{_help(name)}\n```"]
    return "\n\n".join(parts)


def _help(command: str) -> str:
    from flaxslim import cli

    out = io.StringIO()
    # Drawn for a page, whatever the terminal is in which the site is built.
    plain = mock.patch.dict(os.environ, {"COLUMNS": "90", "NO_COLOR": "1", "TERM": "dumb"})
    with plain, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*filter(None, [command]), "--help"])
    return "\n".join(line.rstrip() for line in _lines(out.getvalue())).strip()


def _lines(text: str) -> Iterator[str]:
    """Without the escape sequences of colours."""
    yield from re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()


GENERATED = {
    "families": families,
    "composites": composites,
    "specs": specs,
    "scores": scores,
    "errors": errors,
    "commands": commands,
}
