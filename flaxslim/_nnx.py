"""The attributes of nnx modules that hold sizes; nnx itself never checks them against its arrays.

A layer that owns a tensor says its sizes in `in_features`, `out_features`, `kernel_shape` and the
like; a module around it says how many heads there are, by the names that the spec gives
(`Pair.modules`).

An `nnx.State` has no attributes: whoever slims one and merges it with the old graph gets a module
that says its old sizes, so pass the module. What is not in the graph is the caller's: a cache that
was made by the old config (`init_cache(cfg)`) is made anew by the new one.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.tree_util import tree_flatten_with_path

from flaxslim import _config
from flaxslim._axes import Axes
from flaxslim._norms import PER_CHANNEL, norms_beside
from flaxslim._pair import measure
from flaxslim._plan import Cut, Plan
from flaxslim._roots import beside, table_path
from flaxslim._spec import Site, Spec
from flaxslim._tree import flatten, name_of
from flaxslim.errors import LayoutError, PlanError, nearest


def modules(tree: Any) -> Iterator[tuple[str, nnx.Module]]:
    """The nnx modules in a tree by path: of a module those below it, of a container all in it."""
    graphs = (nnx.Module, nnx.Optimizer)
    pairs, _ = tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, graphs))
    for keys, graph in pairs:
        for names, node in nnx.iter_graph(graph) if isinstance(graph, graphs) else ():
            if isinstance(node, nnx.Module):
                yield "/".join(filter(None, (name_of(keys), *map(str, names)))), node


def mended(tree: Any, plan: Plan, *, places: Iterable[str] = ("",), expanded: bool = False) -> Any:
    """The tree, whose nnx modules say the sizes after the cut (before it, if `expanded`).

    `places` are the paths of the copies of the parameters in it.
    """
    nodes, left = dict(modules(tree)), plan.shapes
    for place in places if nodes else ():
        prefix = f"{place}/" if place else ""
        own = {at.removeprefix(prefix): node for at, node in nodes.items() if at.startswith(prefix)}
        own |= {"": nodes[place]} if place in nodes else {}
        _refuse_tied(own, plan)
        for cut in plan.cuts:
            _mend_layers(own, cut, left, expanded)
            _mend_modules(own, cut, expanded)
    return tree


def _refuse_tied(nodes: Mapping[str, Any], plan: Plan) -> None:
    """Raise `PlanError` if a variable that is cut belongs to another module, too.

    It has one path, so the spec sees one of its places, and the rules have judged that one alone.
    """
    holders: dict[int, list[str]] = {}
    for at, node in {id(node): (at, node) for at, node in nodes.items()}.values():
        for name, value in vars(node).items():
            if isinstance(value, nnx.Variable):
                holders.setdefault(id(value), []).append(f"{at}/{name}".strip("/"))
    tied = {path: paths for paths in holders.values() if len(paths) > 1 for path in paths}
    for site in (cut.site for cut in plan.cuts if cut.removed):
        for path in (tensor.path for tensor in site.tensors if tensor.path in tied):
            raise PlanError(
                "two modules hold one variable that would be cut, and the rules have judged one",
                path=path,
                seen=", ".join(tied[path]),
                mend="give each a variable of its own, nnx.Param(x[...]); or share the whole "
                "module, self.b = self.a",
            )


def _mend_layers(
    nodes: Mapping[str, Any], cut: Cut, left: Mapping[str, tuple[int, ...]], expanded: bool
) -> None:
    tables = {table_path(cut.site.root, name) for name in cut.site.pair.tables}
    for tensor in cut.site.cut:
        node = nodes.get(tensor.path.rpartition("/")[0])
        before_after = tensor.shape, left[tensor.path]
        old, new = before_after[::-1] if expanded else before_after
        # What owns a cache is no layer; what owns an embedding is.
        if node is not None and (tensor.path not in tables or isinstance(node, nnx.Embed)):
            _mend_layer(node, tensor.axes, old, new)
        elif isinstance(node, PER_CHANNEL) and old[-1:] == (node.num_features,):
            node.num_features = new[-1]


def _mend_modules(nodes: Mapping[str, Any], cut: Cut, expanded: bool) -> None:
    for path, attributes in cut.site.pair.modules.items():
        at = beside(cut.site.root, path) if path else cut.site.root
        if (node := nodes.get(at)) is not None:
            _mend_module(node, at, attributes, cut, expanded)
        elif _around(nodes, at) and not all(name.endswith("?") for name in attributes):
            raise LayoutError(
                "there is no such module to say its sizes",
                path=at,
                near=nearest(at, list(nodes)),
                mend="correct the paths in the spec: Pair(modules={path: {attribute: axes}}), "
                "below the root of the layer",
            )
    if cut.site.pair.axis == "h" and cut.removed and not expanded:
        _check_heads_told(nodes, cut)


def _around(nodes: Mapping[str, Any], path: str) -> bool:
    """Whether a path lies in a module, and not among plain parameters beside one."""
    return any(_within(path, at) for at in nodes)


def _within(path: str, place: str) -> bool:
    return not place or path == place or path.startswith(f"{place}/")


def _check_heads_told(nodes: Mapping[str, Any], cut: Cut) -> None:
    """Raise `LayoutError` if a module still counts the heads that there were.

    Most classes divide by that number, and no shape of nnx's would tell.
    """
    for below, name in _counting(nodes, cut.site.root, cut.site.size):
        at = beside(cut.site.root, below) if below else cut.site.root
        raise LayoutError(
            "an attribute still says how many heads there were, and the spec does not name it",
            path=f"{at}.{name}" if at else name,
            seen=cut.site.size,
            expected=cut.width,
            mend="name it in the spec, by the path of its module below the layer: "
            f'Pair(modules={{"{below}": {{"{name}": "h"}}}})',
        )


def _counting(
    nodes: Mapping[str, Any], root: str, count: int, word: str = "head"
) -> Iterator[tuple[str, str]]:
    """The modules below a root, and their attributes that count so many heads, by their names."""
    for at, node in nodes.items():
        for name, value in vars(node).items() if _within(at, root) else ():
            counts = word in name.lower() and not any(x in name.lower() for x in ("dim", "size"))
            if counts and type(value) is int and value == count:
                yield at.removeprefix(root).strip("/"), name


def with_counts(spec: Spec, module: nnx.Module, cfg: Any) -> Spec:
    """The spec, whose pairs name the attributes of the module that count their heads.

    For a discovered spec, which knows arrays alone.
    """
    nodes, named = dict(modules(module)), []
    for pair in spec:
        sites = Spec(name=spec.name, pairs=pair).bind(module, cfg)[0] if pair.axis == "h" else ()
        each = [_counts(nodes, site) for site in sites]
        alike = bool(each) and all(one == each[0] for one in each)
        named.append(dataclasses.replace(pair, modules=each[0]) if alike else pair)
    return dataclasses.replace(spec, pairs=tuple(named))


def _counts(nodes: Mapping[str, Any], site: Site) -> dict[str, dict[str, str]]:
    """What the modules of a site call its number of heads, and that of their groups."""
    found: dict[str, dict[str, str]] = {}
    for below, name in _counting(nodes, site.root, site.size):
        found.setdefault(below, {})[name] = "h"
    for below, name in _counting(nodes, site.root, len(site.groups)):
        if "kv" in name or "key" in name:
            found.setdefault(below, {})[name] = "g"
    if site.groups:
        for below, name in _counting(nodes, site.root, site.size // len(site.groups), "n_rep"):
            found.setdefault(below, {})[name] = "h/g"
    inner = site.pair.inner - {site.pair.axis, site.pair.group}
    if isinstance(nodes.get(site.root), nnx.MultiHeadAttention) and len(inner) == 1:
        found.setdefault("", {})["qkv_features"] = f"(h {''.join(inner)})"
    return found


def told_before(module: Any, plan: Plan) -> list[str]:
    """Attributes of a module after the cut that still say an old number of channels.

    A layer says its own sizes; what is around it may compute with a number that it was given, or
    hold the config that the numbers came from.
    """
    nodes = dict(modules(module))
    found = (
        f"{at}/{name}".strip("/").replace("/", ".") + f" = {cut.site.size}"
        for cut in plan.cuts
        if cut.site.pair.axis == "f" and cut.removed
        for at, node in nodes.items()
        if any(at != layer and _within(layer, at) for layer in _layers(cut.site))
        for name in _of_size(node, cut.site, inside=_within(at, cut.site.root))
    )
    norms = (
        f"{at} of {cut.site.size} features".replace("/", ".")
        + f" (a {type(nodes[at]).__name__}, which the spec does not name, or not all of it: "
        f"Pair(tables={{'{at.rpartition('/')[2]}/scale': 'f', ...}}))"
        for cut in plan.cuts
        if cut.site.pair.axis == "f" and cut.removed
        for at in norms_beside(nodes, cut.site, PER_CHANNEL)
    )
    return list(dict.fromkeys((*found, *norms)))


def _layers(site: Site) -> set[str]:
    return {tensor.path.rpartition("/")[0] for tensor in site.cut}


def _of_size(node: Any, site: Site, *, inside: bool) -> Iterator[str]:
    """Attributes that are as many as a site has channels, and configs that say so.

    Numbers only `inside` of the layer: further out as many may be something else.
    """
    key = site.pair.config + (site.pair.width or "")
    for name, value in vars(node).items():
        if type(value) is int:
            if inside and value == site.size:
                yield name
        elif not site.pair.width or isinstance(value, nnx.Module):
            continue
        elif _config.has(value, key) and _config.read(value, key) == site.size:
            yield f"{name}.{key}"


def check_shapes(module: Any, plan: Plan, cfg: Any) -> None:
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
    if cfg is None and any(pair.sized_by_config for pair in plan.spec):
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
    if isinstance(node, nnx.Conv) and node.feature_group_count == old[-1]:  # depthwise
        node.feature_group_count = node.in_features = new[-1]
    if stacked := {axes.dimension(name) for name in axes.stack}:
        one = [tuple(n for i, n in enumerate(s) if i not in stacked) for s in (old, new)]
        _mend_echoes(node, *one)


def _mend_echoes(node: Any, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Attributes that echo the shape of a tensor: all of it, its inputs, or its outputs."""
    sizes = dict(_sizes(node))
    outputs = [_as_sizes(v) for name, v in sizes.items() if name.startswith(("out_", "features"))]
    out = max((len(size) for size in outputs if size == old[-len(size) :]), default=1)
    for name, value in sizes.items():
        size = _as_sizes(value)
        if size == old and (len(old) > 1 or name.endswith("_shape")):
            after = new
        elif name.startswith("in_") and size == old[-out - len(size) : -out]:
            after = new[-out - len(size) : -out]
        elif name.startswith(("out_", "features")) and size == old[-len(size) :]:
            after = new[-len(size) :]
        else:
            continue
        setattr(node, name, after if isinstance(value, tuple) else after[0])


def _as_sizes(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _sizes(node: Any) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """The attributes that are sizes: whole numbers, and tuples of them."""
    for name, value in vars(node).items():
        if all(type(part) is int for part in _as_sizes(value)) and value != ():
            yield name, value


def _mend_module(node: Any, at: str, attributes: Any, cut: Cut, expanded: bool) -> None:
    sizes = cut.site.second.axes.sizes(cut.site.second.shape)
    groups = cut.site.groups if expanded else cut.groups
    if cut.site.pair.axis == "h" and not (cut.width or expanded):
        raise LayoutError(
            "an nnx module divides by its number of heads, so that one must stay",
            path=at,
            seen="a plan that leaves none",
            mend="make the plan for the module itself: plan(module, ...)",
        )
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
        if np.ndim(value):
            raise LayoutError(
                "the groups of heads are not equal, and a module can say one number only",
                path=f"{at}.{name}",
                seen=f"groups {tuple(groups)}",
                expected="equal groups, of one head or more",
                mend="leave out ragged=True in the spec's Pair",
            )
        try:
            setattr(
                node, head, _config.replace(getattr(node, head), {key: value}) if key else value
            )
        except AttributeError as error:
            raise LayoutError(
                "the attribute cannot be set",
                path=f"{at}.{name}",
                seen=str(error),
                mend="name in the spec's Pair(modules=...) the attribute that it is computed from",
            ) from error
