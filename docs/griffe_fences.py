"""Examples of docstrings as code: Markdown would take `>>>` for a quotation in a quotation."""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_DIRECTIVE = re.compile(r"  # doctest: .*$", re.MULTILINE)
# Google's docstrings know no two lists of attributes, but the second may have a title.
_MORE = re.compile(r"^(For .+):$", re.MULTILINE)
# What follows a space would be taken for the type of the name before it.
_NAMES = re.compile(r"^ +\w+(?:, \w+)+: ", re.MULTILINE)


class Fences(griffe.Extension):
    """Puts fences around the examples of each docstring, before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
        text = _MORE.sub(lambda found: "Attributes: " + found[1].replace("`", ""), text)
        text = _NAMES.sub(lambda found: found[0].replace(", ", ",\N{NO-BREAK SPACE}"), text)
        obj.docstring.value = _DIRECTIVE.sub("", text)
