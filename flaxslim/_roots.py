"""Where in a tree the layers of a pair lie: the layer roots, and the paths below them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flaxslim._pair import Pair, as_tuple

_ANYWHERE = r"(?:[^/]+/)*?"  # as few as will do: a layer's name may have several parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    """Where layers of a pair are: their kernels, and what the placeholders of `at` stand for."""

    prefix: str
    place: str
    names: tuple[str, ...]
    kernels: dict[str, str]

    @property
    def path(self) -> str:
        return (self.prefix + self.place).rstrip("/")

    @property
    def stack(self) -> str:
        """What all layers of one stack have in common."""
        return "/".join([self.prefix, *(name for name in self.names if not name.isdigit())])


def root_regex(pair: Pair) -> str:
    """A regular expression for everything before a layer's own name: groups `prefix`, `place`.

    Of a place in `at`, the name that it stands for is a group too.
    """
    prefix = "" if pair.at.startswith("/") else _ANYWHERE
    if pair.tree:
        prefix = re.escape(pair.tree) + "/" + prefix
    place = ""
    for name in filter(None, pair.at.split("/")):
        if name == "**":
            place += _ANYWHERE
        else:
            pieces = re.split(r"(\{\w*\})", name)
            place += "".join("([^/]+)" if p.startswith("{") else re.escape(p) for p in pieces)
            place += "/"
    return rf"(?P<prefix>{prefix})(?P<place>{place})"


def site_name(pair: Pair, prefix: str, place: str) -> str:
    """What a layout calls a site; see `flaxslim._record`."""
    if place and not pair.at.startswith("/"):
        return place.removeprefix("params/") + pair.second  # which "**" may stand for
    return whole_name(pair, prefix + place)


def whole_name(pair: Pair, root: str) -> str:
    """The same by the whole path in the part of the tree that is the pair's."""
    inside = root.lstrip("/").removeprefix(f"{pair.tree}/" if pair.tree else "")
    # A Linen module does not know in which collection its parameters lie.
    return "/" + inside.removeprefix("params/") + pair.second


def find_roots(pair: Pair, leaves: Mapping[str, Any]) -> list[Root]:
    """Every root where at least one layer of the pair is."""
    layers = "|".join(re.escape(name) for name in sorted(pair.layers, key=len, reverse=True))
    regex = re.compile(rf"{root_regex(pair)}(?P<layer>{layers})(?:/{re.escape(pair.kernel)})?")
    found: dict[str, Root] = {}
    for path in leaves:
        if match := regex.fullmatch(path):
            names = match.groups()[2:-1]  # between the prefix and place, and the layer
            new = Root(prefix=match["prefix"], place=match["place"], names=names, kernels={})
            found.setdefault(new.path, new).kernels[match["layer"]] = path
    return list(found.values())


def meant(pair: Pair, found: Root, leaves: Mapping[str, Any]) -> set[str]:
    """The tensors in the tree that a pair names: its kernels, and the biases by name."""
    biases = (*as_tuple(pair.first_bias or ()), *as_tuple(pair.second_bias or ()))
    paths = {join(found.path, name.removesuffix("?")) for name in biases}
    return {*found.kernels.values(), *(paths & leaves.keys())}


def beside(root: str, name: str) -> str:
    """The path of a tensor that is named from a root, perhaps by way of ".."."""
    parts = root.split("/") if root else []
    for part in name.split("/"):
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def table_path(root: str, name: str) -> str | None:
    """The path of a table that a pair names; None if there can be none.

    A root has the same path in another collection of Linen, where it lies in a collection at all.

    >>> table_path("params/block_0", "batch_stats:bn/mean"), table_path("block_0", "../bias")
    ('batch_stats/block_0/bn/mean', 'bias')
    """
    collection, colon, path = name.partition(":")
    if not colon:
        return beside(root, name)
    top, _, place = root.partition("/")
    return f"{collection}/{beside(place, path)}" if top == "params" else None


def join(*names: str) -> str:
    return "/".join(filter(None, names))
