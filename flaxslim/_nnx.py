"""The attributes of nnx modules that hold sizes; nnx itself never checks them against its arrays.

A layer that owns a tensor says its sizes in `in_features`, `out_features`, `kernel_shape` and the
like; a module around it says how many heads there are, by the names that the spec gives
(`Pair.modules`).

What is not in the graph is the caller's: a cache that was made by the old config
(`init_cache(cfg)`) is made anew by the new one.
"""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from flaxslim import _config
from flaxslim._axes import Axes
from flaxslim._errors import LayoutError, PlanError
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
    shapes = plan.shapes
    for cut in plan.cuts:
        tables = {beside(cut.site.root, name) for name in cut.site.pair.tables}
        for tensor in cut.site.cut:
            node = nodes.get(tensor.path.rpartition("/")[0])
            # What owns a cache is no layer; what owns an embedding is.
            if node is not None and (tensor.path not in tables or isinstance(node, nnx.Embed)):
                before_after = tensor.shape, shapes[tensor.path]
                _mend_layer(node, tensor.axes, *(before_after[::-1] if expanded else before_after))
        for path, attributes in cut.site.pair.modules.items():
            at = beside(cut.site.root, path) if path else cut.site.root
            if (node := nodes.get(at)) is not None:
                _mend_module(node, at, attributes, cut, expanded)
    return module


def check_shapes(module: nnx.Module, plan: Plan, cfg: Any) -> None:
    """Raise `PlanError` or `SiteShapeError` unless a module has the sizes that the plan says.

    nnx takes arrays of any shape, so nothing else would tell before the module runs. `cfg` is the
    config after the cut, by which whoever comes next reads the module.
    """
    leaves = flatten(module)
    for path, expected in plan.shapes.items():
        if (seen := tuple(leaves[path].shape)) != expected:
            raise PlanError(
                "a tensor of the module has another shape than the plan says",
                path=path,
                seen=seen,
                expected=expected,
                mend="make a new plan for this module",
            )
    if cfg is None and any(pair.sizes for pair in plan.spec):
        return  # a stored plan may come without the config that the spec needs
    found = {site.second.path: site for site in plan.spec.bind(module, cfg)[0]}
    for cut in plan.cuts:
        site = found.get(cut.site.second.path)
        if site is None or (site.size, site.groups) != (cut.width, cut.groups):
            raise PlanError(
                "the spec reads other sizes from the module than the plan says",
                path=cut.site.second.path,
                seen=None if site is None else f"{site.size} channels, groups {site.groups}",
                expected=f"{cut.width} channels, groups {cut.groups}",
                mend="correct the sizes that the spec takes from the config: Pair(sizes=...)",
            )


def _mend_layer(node: Any, axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Mend the attributes of a layer that owns a tensor.

    A layer that `nnx.vmap` made says the sizes of one of its stack.
    """
    _mend_echoes(node, old, new)
    if stacked := {axes.dimension(name) for name in axes.stack}:
        one = [tuple(n for i, n in enumerate(s) if i not in stacked) for s in (old, new)]
        _mend_echoes(node, *one)


def _mend_echoes(node: Any, old: tuple[int, ...], new: tuple[int, ...]) -> None:
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
