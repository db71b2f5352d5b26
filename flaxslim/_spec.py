"""Where the prunable pairs of a model family are: `Pair`, `Spec`, and the `Site`s they bind to.

A spec is data: it names tensors and axes and holds no code. Bound to a parameter tree it yields
sites, one for each place where a pair occurs.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flaxslim._axes import Axes
from flaxslim._config import Width
from flaxslim._errors import (
    AxisPatternError,
    IncompletePairError,
    NothingMatchedError,
    SiteShapeError,
    nearest,
)
from flaxslim._tree import flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What one place in the network looks like: `y = act(x @ first) @ second`.

    Attributes:
      first: the layer (or layers) whose outputs are the hidden channels, by path below `at`. In
        a gated pair the one under the activation comes first: `("gate_proj", "up_proj")`. A
        layer is a module with a kernel and perhaps a bias, or a tensor itself.
      second: the layer that reads the hidden channels.
      at: the layer root, a path such as `"encoder/layer/{i}"`. `{i}` stands for one name or
        part of one, `**` for any number of names. It may begin anywhere in the tree, or only at
        its top if it starts with "/".
      first_axes, second_axes: the axis patterns of the kernels. Those of the biases follow.
      first_bias, second_bias: the biases, where they are not `<layer>/bias`.
      width: the config key of the number of channels (see `flaxslim._config`), if there is one.
      activation: its name ("relu"), or where the config holds it ("config.hidden_act").
      gated: the hidden value is act(gate) * up. Gate and up are two first layers, or the two
        halves of one whose pattern has a factor 2.
      axis: the prunable axis in the patterns.
      kernel, bias: what the tensors of a layer are called.
      config: the part of a composite's config that the pair belongs to ("decoder.").

    >>> print(Pair(first="Dense_0", second="Dense_1", activation="relu", width="hidden"))
    Dense_0 "d f" -> relu -> Dense_1 "f d", width hidden
    """

    first: str | tuple[str, ...]
    second: str
    at: str = ""
    first_axes: str = "d f"
    second_axes: str = "f d"
    first_bias: str | tuple[str, ...] | None = None
    second_bias: str | None = None
    width: str | None = None
    activation: str | None = None
    gated: bool = False
    axis: str = "f"
    kernel: str = "kernel"
    bias: str = "bias"
    config: str = ""

    def __post_init__(self) -> None:
        for name in ("first", "first_bias"):
            if isinstance(value := getattr(self, name), list):  # or a Pair could not be hashed
                object.__setattr__(self, name, tuple(value))
        for pattern in (self.first_axes, self.second_axes):
            if self.axis not in Axes(pattern).names:
                raise AxisPatternError(
                    f"the pattern has no axis {self.axis!r}, which the pair prunes",
                    seen=repr(pattern),
                )
        if self.width is not None:
            Width(expression=self.width)
        halves = any(2 in dim for dim in Axes(self.first_axes).dimensions)
        if self.gated and len(self.firsts) != 2 and not (len(self.firsts) == 1 and halves):
            raise AxisPatternError(
                "a gated pair needs a gate and an up layer",
                seen=f"first={self.first!r} with pattern {self.first_axes!r}",
                expected="first=(gate, up), or one fused layer with a factor 2 in its pattern",
            )
        if self.first_bias is not None and len(_tuple(self.first_bias)) != len(self.firsts):
            raise AxisPatternError(
                "as many first biases as first layers are needed",
                seen=f"first={self.first!r}, first_bias={self.first_bias!r}",
            )

    @property
    def firsts(self) -> tuple[str, ...]:
        return _tuple(self.first)

    @property
    def width_expression(self) -> Width | None:
        return None if self.width is None else Width(expression=self.width, prefix=self.config)

    def __str__(self) -> str:
        first = " * ".join(f'{name} "{self.first_axes}"' for name in self.firsts)
        act = f"{self.activation} -> " if self.activation else ""
        width = f", width {self.width_expression}" if self.width else ""
        at = f"{self.at}: " if self.at else ""
        gated = ", gated" if self.gated else ""
        return f'{at}{first} -> {act}{self.second} "{self.second_axes}"{gated}{width}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a site: its path, its axis pattern, and its shape."""

    path: str
    axes: Axes
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One concrete place of a pair in one tree; `size` is its number of channels."""

    root: str
    pair: Pair
    size: int
    first: tuple[Tensor, ...]
    first_biases: tuple[Tensor | None, ...]
    second: Tensor
    second_bias: Tensor | None

    @property
    def cut(self) -> tuple[Tensor, ...]:
        """The tensors that lose channels (the second bias does not)."""
        return (*self.first, *filter(None, self.first_biases), self.second)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.cut if self.second_bias is None else (*self.cut, self.second_bias)

    @property
    def per_channel(self) -> int:
        """How many parameters one channel owns."""
        return sum(_product(t.shape) for t in self.cut) // max(self.size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A named, declarative description of a model family: where its pairs are.

    >>> MLP = Spec(name="MLP", pairs=Pair(first="Dense_0", second="Dense_1", activation="relu"))
    >>> import numpy as np
    >>> tree = {"Dense_0": {"kernel": np.ones((3, 8))}, "Dense_1": {"kernel": np.ones((8, 2))}}
    >>> [site.size for site in MLP.sites({"params": tree})]
    [8]
    """

    name: str
    pairs: tuple[Pair, ...] | Pair

    def __post_init__(self) -> None:
        pairs = (self.pairs,) if isinstance(self.pairs, Pair) else tuple(self.pairs)
        object.__setattr__(self, "pairs", pairs)

    def __iter__(self) -> Iterator[Pair]:
        assert isinstance(self.pairs, tuple)
        return iter(self.pairs)

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {pair}" for pair in self)])

    def under(self, *, tree: str, config: str) -> "Spec":
        """The same family as a part of a composite: its subtree and its part of the config."""
        return self._each(
            lambda p: dataclasses.replace(
                p, at=f"{tree}/**/{p.at}" if tree else p.at, config=f"{config}.{p.config}"
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
            )
        )

    def _each(self, change: Any) -> "Spec":
        return dataclasses.replace(self, pairs=tuple(change(pair) for pair in self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: only what differs from a Pair's defaults."""
        return {"name": self.name, "pairs": [_as_dict(pair) for pair in self]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Spec":
        pairs: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in pair.items()}
            for pair in data["pairs"]
        ]
        return cls(name=data["name"], pairs=tuple(Pair(**pair) for pair in pairs))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        return cls.from_dict(json.loads(text))

    def sites(self, params: Any) -> tuple[Site, ...]:
        """Every place where a pair of this spec occurs in the tree, in natural order.

        Raises `NothingMatchedError`, `IncompletePairError` (half a pair), `SiteShapeError` or
        `AxisPatternError` (a wrong shape), each with the path and the nearest candidates.
        """
        return self.bind(params)[0]

    def unmatched(self, params: Any) -> tuple[Pair, ...]:
        """The pairs that occur nowhere in the tree (a head that this model does not have)."""
        return self.bind(params)[1]

    def bind(self, params: Any) -> tuple[tuple[Site, ...], tuple[Pair, ...]]:
        """The sites in the tree, and the pairs that have none."""
        leaves = flatten(params)
        sites: list[Site] = []
        unmatched: list[Pair] = []
        partial: list[tuple[Pair, str, dict[str, str]]] = []
        for pair in self:
            found = _find(pair, leaves)
            complete = {r: names for r, names in found.items() if len(names) == _count(pair)}
            partial += [(pair, r, n) for r, n in found.items() if r not in complete]
            sites += [_site(pair, root, names, leaves) for root, names in complete.items()]
            if not complete:
                unmatched.append(pair)
        claimed = {tensor.path for site in sites for tensor in site.cut}
        for pair, root, names in partial:
            # Half of a gated pair is often the whole of a plain one: T5's wo belongs to either.
            if not claimed.issuperset(names.values()):
                raise _incomplete(self, pair, root, names, leaves)
        if not sites:
            raise _nothing(self, leaves)
        _check_claims(sites)
        return tuple(sorted(sites, key=lambda site: _natural(site.second.path))), tuple(unmatched)


def _tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _natural(path: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path)]


def _as_dict(pair: Pair) -> dict[str, Any]:
    fields = dataclasses.fields(pair)
    return {f.name: getattr(pair, f.name) for f in fields if getattr(pair, f.name) != f.default}


def _count(pair: Pair) -> int:
    return len({*pair.firsts, pair.second})


def _root_regex(at: str) -> str:
    """A regular expression for everything before a layer's own name."""
    anywhere = r"(?:[^/]+/)*?"  # as few as will do: a layer's name may have several parts
    regex = "" if at.startswith("/") else anywhere
    for name in filter(None, at.split("/")):
        if name == "**":
            regex += anywhere
        else:
            pieces = re.split(r"(\{\w*\})", name)
            regex += "".join("[^/]+" if p.startswith("{") else re.escape(p) for p in pieces) + "/"
    return regex


def _find(pair: Pair, leaves: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """root -> {layer: path of its kernel}, for every root where at least one layer is."""
    layers = "|".join(
        re.escape(name) for name in sorted({*pair.firsts, pair.second}, key=len, reverse=True)
    )
    regex = re.compile(
        rf"(?P<root>{_root_regex(pair.at)})(?P<layer>{layers})(?:/{re.escape(pair.kernel)})?"
    )
    found: dict[str, dict[str, str]] = {}
    for path in leaves:
        if match := regex.fullmatch(path):
            found.setdefault(match["root"].rstrip("/"), {})[match["layer"]] = path
    return found


def _join(*names: str) -> str:
    return "/".join(filter(None, names))


def _site(pair: Pair, root: str, kernels: Mapping[str, str], leaves: Mapping[str, Any]) -> Site:
    def tensor(path: str, axes: Axes) -> Tensor:
        shape = getattr(leaves[path], "shape", None)
        if shape is None:
            raise SiteShapeError(
                "a tensor of a pair is not an array", path=path, seen=type(leaves[path]).__name__
            )
        axes.sizes(shape, path=path)
        return Tensor(path=path, axes=axes, shape=tuple(shape))

    def bias(layer: str, given: str | None, axes: Axes) -> Tensor | None:
        path = _join(root, given or f"{layer}/{pair.bias}")
        if path in leaves and leaves[path] is not None:
            return tensor(path, axes)
        if given:
            raise IncompletePairError(
                "the spec names a bias that is not in the tree",
                path=path,
                near=nearest(path, leaves),
            )
        return None

    first_axes, second_axes = Axes(pair.first_axes), Axes(pair.second_axes)
    given = _tuple(pair.first_bias) if pair.first_bias else (None,) * len(pair.firsts)
    first_bias_axes = first_axes.without("d")
    first = tuple(tensor(kernels[name], first_axes) for name in pair.firsts)
    first_biases = tuple(
        bias(name, g, first_bias_axes) for name, g in zip(pair.firsts, given, strict=True)
    )
    second = tensor(kernels[pair.second], second_axes)
    second_bias = bias(pair.second, pair.second_bias, second_axes.without(pair.axis))
    size = second.axes.sizes(second.shape)[pair.axis]
    for t in (*first, *filter(None, first_biases)):
        if t.axes.sizes(t.shape)[pair.axis] != size:
            raise SiteShapeError(
                "two layers of one pair disagree about the number of channels",
                path=t.path,
                seen=f'{t.shape} by pattern "{t.axes}"',
                expected=f"{pair.axis} = {size}, as in {second.path} {second.shape}",
                mend="check that the tree is whole, and the axis patterns of the spec "
                "(a transposed kernel?)",
            )
    if second_bias is not None:
        ours, theirs = second_bias.axes.sizes(second_bias.shape), second.axes.sizes(second.shape)
        if any(ours[name] != theirs[name] for name in ours):
            raise SiteShapeError(
                "the bias of the second layer does not fit its kernel",
                path=second_bias.path,
                seen=second_bias.shape,
                expected=f"the outputs of {second.path} {second.shape}",
            )
    return Site(
        root=root,
        pair=pair,
        size=size,
        first=first,
        first_biases=first_biases,
        second=second,
        second_bias=second_bias,
    )


def _check_claims(sites: Iterable[Site]) -> None:
    """No axis of a tensor may belong to two sites: it would be cut twice."""
    claims: dict[tuple[str, int], Site] = {}
    for site in sites:
        for t in site.cut:
            dimension = [site.pair.axis in dim for dim in t.axes.dimensions].index(True)
            other = claims.setdefault((t.path, dimension), site)
            if other is not site:
                raise SiteShapeError(
                    "two pairs of the spec claim the same axis of a tensor",
                    path=t.path,
                    seen=f"{other.pair} and {site.pair}",
                    mend="narrow `at` so that each layer belongs to one pair",
                )


def _incomplete(
    spec: Spec, pair: Pair, root: str, names: Mapping[str, str], leaves: Mapping[str, Any]
) -> IncompletePairError:
    missing = [name for name in (*pair.firsts, pair.second) if name not in names]
    path = _join(root, missing[0], pair.kernel)
    return IncompletePairError(
        f"half a pair of {spec.name}: {', '.join(names.values())} is there, "
        f"{', '.join(missing)} is not",
        path=path,
        expected=f'an array of pattern "{pair.first_axes}" (first) or "{pair.second_axes}" '
        "(second)",
        near=nearest(path, [leaf for leaf in leaves if leaf not in names.values()]),
        mend="pass the whole parameter tree, or narrow `at` in the spec if this layer is "
        "not part of a pair",
    )


def _nothing(spec: Spec, leaves: Mapping[str, Any]) -> NothingMatchedError:
    pair = next(iter(spec))
    wanted = _join(pair.at.replace("{i}", "0"), pair.firsts[0], pair.kernel)
    return NothingMatchedError(
        f"spec {spec.name} matches nothing in this tree of {len(leaves)} tensors",
        expected=" or ".join(_join(p.at or "**", n) for p in spec for n in (*p.firsts, p.second)),
        near=nearest(wanted, leaves),
        mend="check (a) that the spec is the one of this family (`flaxslim families`), "
        "(b) that the tree holds the layers and not just a head, "
        "(c) the layer root `at` and the layer names of a spec of your own",
    )
