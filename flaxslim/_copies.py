"""The copies of the parameters in a tree: where they are, and which parameter a leaf stands for."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flaxslim import _lora, _scales
from flaxslim._state_kinds import Kind, kinds

# What `flaxslim.pruning` keeps for the channels that a second kernel reads.
_OF_CHANNELS = re.compile(r"(?P<second>.+)/(?P<part>alive|score|fading|gone)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What a leaf stands for: a parameter, or the matrix or scale of one, or its channels.

    Attributes:
      parameter: the path of the parameter in the plan.
      matrix: the low-rank matrix that it is.
      scale: whether it is a scale, a zero point or the like.
      channels: what it says of the channels that this kernel reads: "alive", "score", "gone".
    """

    parameter: str
    matrix: _lora.Matrix | None = None
    scale: bool = False
    channels: str = ""

    @property
    def is_parameter(self) -> bool:
        return self.matrix is None and not self.scale and not self.channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy of the parameters, or of some of them.

    Attributes:
      path: where it is in the tree.
      places: what its leaves stand for, by their paths in the tree.
      kind: whether it holds parameters of its own (an average), or moments and gradients.
    """

    path: str
    places: Mapping[str, Place]
    kind: Kind

    @property
    def parameters(self) -> dict[str, str]:
        """The paths in the tree of its parameters, by their paths in the plan."""
        return {p.parameter: path for path, p in self.places.items() if p.is_parameter}

    def arrays(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        """As `parameters`, without those for which a single number stands."""
        return {name: path for name, path in self.parameters.items() if np.shape(leaves[path])}


def of_channels(name: str) -> tuple[str, str] | None:
    """The second kernel and the part, of a leaf that `flaxslim.pruning` keeps for channels.

    >>> of_channels("down/kernel/alive")
    ('down/kernel', 'alive')
    """
    match = _OF_CHANNELS.fullmatch(name)
    return (match["second"], match["part"]) if match else None


class Names:
    """The paths of the parameters: whole, and without the collection ("params") in front."""

    def __init__(self, params: Mapping[str, Any]):
        self.parameters = {path: path for path in params}
        # How many numbers they are: what optax.flatten makes one vector of.
        self.total = sum(math.prod(np.shape(x)) for x in params.values())
        if any(path.startswith("params/") for path in params):
            for path in sorted(params, key=lambda path: not path.startswith("params/")):
                self.parameters.setdefault(path.partition("/")[2], path)
        self._kernels = _lora.kernels({name: params[p] for name, p in self.parameters.items()})

    def place(self, name: str) -> Place | None:
        """What a leaf stands for, by its path in a copy."""
        if (parameter := self.parameters.get(name)) is not None:
            return Place(parameter=parameter)
        if (found := of_channels(name)) and found[0] in self.parameters:
            return Place(parameter=self.parameters[found[0]], channels=found[1])
        if (match := _scales.PART.fullmatch(name)) and match["kernel"] in self.parameters:
            kernel = self.parameters[match["kernel"]]
            return Place(parameter=kernel, scale=match["part"] != "qvalue")
        if (m := _lora.matrix(name)) is not None:
            kernel = _lora.owner(m.kernel, self._kernels.get(m.folder, ()))
            return Place(parameter=self.parameters[kernel], matrix=m) if kernel else None
        folder, _, last = name.rpartition("/")
        if match := _scales.COMPANION.fullmatch(last):
            kernel = _lora.owner(match["kernel"] or "", self._kernels.get(folder, ()))
            return Place(parameter=self.parameters[kernel], scale=True) if kernel else None
        return None


def splits(path: str) -> Iterator[tuple[str, str]]:
    """All ways to part a path in two, the first part growing.

    >>> list(splits("0/mu"))
    [('', '0/mu'), ('0', 'mu')]
    """
    names = path.split("/")
    for i in range(len(names)):
        yield "/".join(names[:i]), "/".join(names[i:])


def copies(tree: Any, leaves: Mapping[str, Any], names: Names, *, fold: bool) -> list[Copy]:
    """The copies of the parameters in a tree."""
    found: dict[str, dict[str, Place]] = {}
    places = {path: [(at, names.place(rest)) for at, rest in splits(path)] for path in leaves}
    # A number for the whole tensor, or a count, is at home anywhere.
    strange = {
        at
        for path, own in places.items()
        for at, place in own
        if place is None and np.shape(leaves[path])
    }
    for path, own in places.items():
        for at, place in own:
            if place is not None and at not in strange:
                found.setdefault(at, {})[path] = place
                break
    kind = kinds(tree, found, fold=fold)
    return [Copy(path=at, places=own, kind=kind[at]) for at, own in found.items()]
