"""Where the prunable pairs of a model family are: `Spec`, and the `Site`s that it binds to.

A spec is data: it names tensors and axes and holds no code. Bound to a parameter tree
(`flaxslim._sites`) it yields sites, one for each place where a pair occurs.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim._axes import Axes
from flaxslim._pair import Pair
from flaxslim.errors import SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a site: its path, its axis pattern, and its shape."""

    path: str
    axes: Axes
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One concrete place of a pair in one tree.

    Attributes:
      root: the path of the layer root.
      name: what a layout calls the site: the second layer, by path from `at` on.
      layer: the number that `{i}` stands for, if the pair's `at` has one such place.
      size: the number of channels.
      first, first_biases, second, second_bias, readers: as in `Pair`.
      also: other tensors that are cut along: of the layers and tables that `Pair` names.
      lora: (kernel, tensor): the low-rank matrix beside a kernel that has the axis too.
      stack: the sizes of the axes `l` and `e`.
      groups: how many heads each key/value group has, where there are groups.
      tied: sites with the same tag keep the same channels.
    """

    root: str
    pair: Pair
    size: int
    first: tuple[Tensor, ...]
    first_biases: tuple[Tensor | None, ...]
    second: Tensor
    second_bias: Tensor | None
    name: str = ""
    layer: int | None = None
    readers: tuple[Tensor, ...] = ()
    also: tuple[Tensor, ...] = ()
    lora: tuple[tuple[str, Tensor], ...] = ()
    stack: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    tied: str | None = None

    @property
    def cut(self) -> tuple[Tensor, ...]:
        """The tensors that lose channels (the second bias does not)."""
        biases = filter(None, self.first_biases)
        return (*self.first, *biases, *self.also, *(t for _, t in self.lora), *self.reading)

    @property
    def reading(self) -> tuple[Tensor, ...]:
        """The kernels that read the channels: the second, and that of each reader."""
        return (self.second, *self.readers)

    def reads(self, tensor: Tensor) -> bool:
        """Whether a tensor of the site reads the channels, and not writes them."""
        return any(tensor is t for t in self.reading)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.cut if self.second_bias is None else (*self.cut, self.second_bias)

    @property
    def rows(self) -> int:
        """How many sets of channels it has: one for each stacked layer or expert."""
        return int(np.prod(self.stack, dtype=int))

    @property
    def owners(self) -> np.ndarray:
        """The key/value group of each head, `(h,)`."""
        return np.repeat(np.arange(len(self.groups)), self.groups)

    def axis(self, tensor: Tensor) -> str:
        """The axis along which a tensor is cut: that of the channels, or of their groups."""
        return self.pair.axis_in(tensor.axes.pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A named, declarative description of a model family: where its pairs are.

    `spec + other` has the pairs of both.

    >>> MLP = Spec(name="MLP", pairs=Pair(first="Dense_0", second="Dense_1", activation="relu"))
    >>> import numpy as np
    >>> tree = {"Dense_0": {"kernel": np.ones((3, 8))}, "Dense_1": {"kernel": np.ones((8, 2))}}
    >>> [site.size for site in MLP.sites({"params": tree})]
    [8]
    """

    name: str
    pairs: tuple[Pair, ...] | Pair

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise SpecError(
                "name= of a Spec is what messages call it",
                seen=f"name={self.name!r}",
                expected='name="MLP"',
            )
        pairs = self.pairs if isinstance(self.pairs, list | tuple) else (self.pairs,)
        if not pairs or not all(isinstance(pair, Pair) for pair in pairs):
            raise SpecError(
                "pairs= of a Spec is a Pair, or several",
                seen=f"pairs={self.pairs!r}",
                expected='pairs=Pair(first="up", second="down"), or a tuple of such',
            )
        object.__setattr__(self, "pairs", tuple(pairs))

    def __iter__(self) -> Iterator[Pair]:
        assert isinstance(self.pairs, tuple)
        return iter(self.pairs)

    def __add__(self, other: "Spec") -> "Spec":
        if not isinstance(other, Spec):
            raise SpecError(
                "only specs can be added to a spec",
                seen=f"{self.name} and a {type(other).__name__}, {other!r}",
                expected="BERT_FFN + BERT_HEADS",
                mend='of pairs make one first: Spec(name="MLP", pairs=...)',
            )
        pairs = tuple(dict.fromkeys((*self, *other)))
        return self if pairs == self.pairs else Spec(name=f"{self.name}+{other.name}", pairs=pairs)

    __radd__ = __add__  # what comes first is no Spec: `None + spec`, `sum(specs)`

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {pair}" for pair in self)])

    def under(self, *, tree: str, config: str) -> "Spec":
        """The same family as a part of a composite: its subtree and its part of the config."""
        return self._each(
            lambda p: dataclasses.replace(
                p,
                tree="/".join(filter(None, (tree, p.tree))),
                config=f"{config}.{p.config}",
            )
        )

    def torch(self) -> "Spec":
        """The same family in a tree of PyTorch names: `a/b/kernel` is `a/b/weight`, reversed."""
        return self._each(
            lambda p: dataclasses.replace(
                p,
                kernel="weight",
                first_axes=str(Axes(p.first_axes).reversed()),
                second_axes=str(Axes(p.second_axes).reversed()),
                readers={layer: str(Axes(axes).reversed()) for layer, axes in p.readers.items()},
                also={layer: str(Axes(axes).reversed()) for layer, axes in p.also.items()},
                tables={_torch_table(name): axes for name, axes in p.tables.items()},
            )
        )

    def _each(self, change: Any) -> "Spec":
        return dataclasses.replace(self, pairs=tuple(change(pair) for pair in self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: only what differs from a Pair's defaults."""
        from flaxslim._spec_text import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Spec":
        from flaxslim._spec_text import from_dict

        return from_dict(data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """The spec that `to_json` wrote; a `FlaxslimError` for anything else."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise SpecError(
                "this is not JSON", seen=str(error), expected="what Spec.to_json() writes"
            ) from error
        return cls.from_dict(data)

    def source(self) -> str:
        """The Python that makes this spec, as a person would write it.

        >>> print(Spec(name="MLP", pairs=Pair(first="Dense_0", second="Dense_1")).source())
        from flaxslim import Pair, Spec
        <BLANKLINE>
        MLP = Spec(
            name="MLP",
            pairs=Pair(
                first="Dense_0",
                second="Dense_1",
            ),
        )
        <BLANKLINE>
        """
        from flaxslim._spec_text import source

        return source(self)

    def sites(self, params: Any, cfg: Any = None) -> tuple[Site, ...]:
        """Every place where a pair of this spec occurs in the tree, in natural order.

        `cfg` is needed for heads that lie side by side in one dimension, whose size the shapes do
        not tell. Raises `NothingMatchedError`, `IncompletePairError` (half a pair),
        `SiteShapeError` or `AxisPatternError` (a wrong shape), each with the path and the nearest
        candidates.
        """
        return self.bind(params, cfg)[0]

    def unmatched(self, params: Any, cfg: Any = None) -> tuple[Pair, ...]:
        """The pairs that occur nowhere in the tree (a head that this model does not have)."""
        return self.bind(params, cfg)[1]

    def bind(self, params: Any, cfg: Any = None) -> tuple[tuple[Site, ...], tuple[Pair, ...]]:
        """The sites in the tree, and the pairs that have none."""
        from flaxslim._sites import bind

        return bind(self, params, cfg)


# What the user may give for a spec: none for the family's FFN, the name of a part, or several.
SpecLike = Spec | str | Sequence[Spec | str] | None


def _torch_table(name: str) -> str:
    """A table by its PyTorch name; there the statistics of a batch norm stand beside its weight."""
    collection, _, path = name.rpartition(":")
    place, slash, last = path.rpartition("/")
    if collection == "batch_stats" and last in ("mean", "var"):
        return f"{place}{slash}running_{last}"
    renamed = slash and last in ("embedding", "scale") and not collection
    return f"{place}/weight" if renamed else name
