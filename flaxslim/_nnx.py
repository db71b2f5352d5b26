"""The attributes of nnx modules that hold sizes; nnx itself never checks them against its arrays.

A layer that owns a tensor says its sizes in `in_features`, `out_features`, `kernel_shape` and the
like; a module around it says how many heads there are, by the names that the spec gives
(`Pair.modules`).
"""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from flaxslim import _config
from flaxslim._errors import LayoutError
from flaxslim._plan import Cut, Plan
from flaxslim._sites import beside
from flaxslim._spec import measure
from flaxslim._tree import flatten


def mended(module: nnx.Module, plan: Plan, *, expanded: bool = False) -> nnx.Module:
    """The module, with attributes that say the sizes after the cut (before it, if `expanded`)."""
    nodes: dict[str, Any] = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
    }
    leaves = flatten(module)
    for cut in plan.cuts:
        tables = {beside(cut.site.root, name) for name in cut.site.pair.tables}
        for tensor in cut.site.cut:
            node = nodes.get(tensor.path.rpartition("/")[0])
            # What owns a cache is no layer; what owns an embedding is.
            if node is not None and (tensor.path not in tables or isinstance(node, nnx.Embed)):
                new = tuple(leaves[tensor.path].shape)
                old = tensor.shape if not expanded else None
                _mend_layer(node, old or _cut_shape(cut, tensor), new)
        for path, attributes in cut.site.pair.modules.items():
            at = "/".join(filter(None, (cut.site.root, path)))
            if (node := nodes.get(at)) is not None:
                _mend_module(node, at, attributes, cut, expanded)
    return module


def _cut_shape(cut: Cut, tensor: Any) -> tuple[int, ...]:
    axis = cut.site.axis(tensor)
    return tensor.axes.resized(tensor.shape, axis, cut.indices(tensor).shape[-1])


def _mend_layer(node: Any, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Attributes that echo the shape of a tensor: all of it, its inputs, or its outputs."""
    sizes = dict(_sizes(node))
    outputs = [as_sizes(v) for name, v in sizes.items() if name.startswith(("out_", "features"))]
    out = max((len(size) for size in outputs if size == old[-len(size) :]), default=1)
    for name, value in sizes.items():
        size = as_sizes(value)
        if size == old and (len(old) > 1 or name.endswith("_shape")):
            after = new
        elif name.startswith("in_") and size == old[-out - len(size) : -out]:
            after = new[-out - len(size) : -out]
        elif name.startswith(("out_", "features")) and size == old[-len(size) :]:
            after = new[-len(size) :]
        else:
            continue
        setattr(node, name, after if isinstance(value, tuple) else after[0])


def as_sizes(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _sizes(node: Any) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """The attributes that are sizes: whole numbers, and tuples of them."""
    for name, value in vars(node).items():
        if all(type(part) is int for part in as_sizes(value)) and value != ():
            yield name, value


def _mend_module(node: Any, at: str, attributes: Any, cut: Cut, expanded: bool) -> None:
    sizes = cut.site.second.axes.sizes(cut.site.second.shape)
    groups = cut.site.groups if expanded else cut.groups
    if not expanded:
        sizes |= {cut.site.pair.axis: cut.width}
    if cut.site.pair.group is not None:
        sizes |= {cut.site.pair.group: len(groups)}
    for name, expression in attributes.items():
        optional, name = name.endswith("?"), name.removesuffix("?")
        head, _, key = name.partition(".")
        if not hasattr(node, head) or (key and not _config.has(getattr(node, head), key)):
            if optional:
                continue
            raise LayoutError(
                "a module has no such attribute to say its sizes by",
                path=f"{at}.{name}",
                seen=f"a {type(node).__name__}",
                mend="correct the names in the spec: Pair(modules={path: {attribute: axes}}); "
                "those that a module may lack end in '?'",
            )
        value = measure(expression, sizes, groups)
        setattr(node, head, _config.replace(getattr(node, head), {key: value}) if key else value)
