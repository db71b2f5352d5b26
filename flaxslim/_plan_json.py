"""A plan as plain data for JSON, and back."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flaxslim._axes import Axes
from flaxslim._plan import Channels, Cut, Plan, Resize
from flaxslim._record import LAYOUT, PER_LAYER
from flaxslim._spec import Site, Spec, Tensor
from flaxslim.errors import PlanError

VERSION = 2


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain data: dicts, lists, strings, numbers."""
    pairs = list(plan.spec)
    return {
        "version": VERSION,
        "spec": plan.spec.to_dict(),
        "threshold": plan.threshold,
        "notes": list(plan.notes),
        "blocked": list(plan.blocked),
        "values": dict(plan.values),
        "resizes": [vars(resize) for resize in plan.resizes],
        "sites": len(plan.cuts),
        "cuts": [
            {
                **_site_to_dict(cut.site, pairs.index(cut.site.pair)),
                "keep": _lists(cut.keep),
                "dead": cut.dead,
                "rules": dict(cut.rules),
                "weak": cut.weak,
                "folds": _lists(cut.folds),
                "activation": cut.activation,
            }
            for cut in plan.cuts
        ],
    }


def from_dict(data: Mapping[str, Any]) -> Plan:
    """The plan that `to_dict` wrote; `PlanError` for anything else."""
    try:
        if data["version"] != VERSION:
            raise PlanError(
                "the plan was written by another version of flaxslim",
                seen=f"version {data['version']}",
                expected=f"version {VERSION}",
                mend="make the plan anew, or use that version",
            )
        spec = Spec.from_dict(data["spec"])
        _check_kinds(data, _PLAN_KINDS, "the plan")
        _check_values(data["values"])
        if len(data["cuts"]) != data["sites"]:
            raise PlanError(
                "the plan has not all of its cuts",
                seen=f"{len(data['cuts'])} cuts",
                expected=f"{data['sites']}, one for each site",
                mend="make the plan anew: a width holds for all sites that share it",
            )
        cuts = tuple(_cut(cut, list(spec)) for cut in data["cuts"])
        _check_once(cuts)
        return Plan(
            spec=spec,
            threshold=data["threshold"],
            notes=tuple(data["notes"]),
            blocked=tuple(data["blocked"]),
            values=dict(data["values"]),
            resizes=tuple(_resize(resize) for resize in data["resizes"]),
            cuts=cuts,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            "this is not the JSON of a plan",
            seen=f"{type(error).__name__}: {error}",
            expected="what Plan.to_json() writes",
        ) from error


# What a value may be, by its key; an `int` is no bool.
_PLAN_KINDS: dict[str, Any] = {
    "threshold": int | float,
    "notes": list,
    "blocked": list,
    "values": Mapping,
    "sites": int,
}
_RESIZE_KINDS: dict[str, Any] = {"width": str, "before": int, "after": int, "least": int}
_CUT_KINDS: dict[str, Any] = {
    "root": str,
    "name": str,
    "layer": int | None,
    "pair": int,
    "size": int,
    "tied": str | None,
    "dead": int,
    "rules": Mapping,
    "weak": int,
    "activation": str | None,
}


def _check_kinds(data: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key, kind in kinds.items():
        value = data[key]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise PlanError(
                f"a value of the plan is of the wrong kind: {key}",
                path=where,
                seen=repr(value)[:80],
                expected=getattr(kind, "__name__", str(kind)),
                mend="pass what Plan.to_json() or to_dict() wrote, or make the plan anew",
            )


def _check_values(values: Mapping[str, Any]) -> None:
    """What is to be written into a config: that of layouts has a form of its own."""
    for key, value in values.items():
        name = key.rpartition(".")[2]
        if name == LAYOUT:
            fine = isinstance(value, Mapping) and isinstance(value.get("sites"), Mapping)
            fine = fine and isinstance(value.get("spec", {}), Mapping)
        elif name == PER_LAYER:
            fine = isinstance(value, Mapping) and all(
                layer.isdecimal() and isinstance(own, Mapping) for layer, own in value.items()
            )
        else:
            fine = value is None or isinstance(value, int | float | str)
        if not fine:
            raise PlanError(
                "a value of the plan for the config is none", path=key, seen=repr(value)[:80]
            )


def _resize(data: Mapping[str, Any]) -> Resize:
    _check_kinds(data, _RESIZE_KINDS, "resizes")
    return Resize(**data)


def _lists(channels: Channels) -> list[Any]:
    return [list(row) if isinstance(row, tuple) else row for row in channels]


def _tensor_to_list(tensor: Tensor | None) -> list[Any] | None:
    return tensor and [
        tensor.path,
        str(tensor.axes),
        list(tensor.shape),
        dict(tensor.axes.known),
    ]


def _tensor(data: Sequence[Any]) -> Tensor:
    path, axes, shape, known = data
    if not isinstance(path, str) or not all(type(n) is int and n >= 0 for n in shape):
        raise PlanError(
            "a tensor of the plan has no path, or no shape", seen=repr([path, shape])[:80]
        )
    tensor = Tensor(path=path, axes=Axes(axes, tuple(known.items())), shape=tuple(shape))
    tensor.axes.sizes(tensor.shape, path=path)
    return tensor


def _site_to_dict(site: Site, pair: int) -> dict[str, Any]:
    return {
        "root": site.root,
        "name": site.name,
        "layer": site.layer,
        "pair": pair,
        "size": site.size,
        "first": [_tensor_to_list(t) for t in site.first],
        "first_biases": [_tensor_to_list(t) for t in site.first_biases],
        "second": _tensor_to_list(site.second),
        "second_bias": _tensor_to_list(site.second_bias),
        # Only where the pair names some: plans without them are as they ever were.
        **({"readers": [_tensor_to_list(t) for t in site.readers]} if site.pair.readers else {}),
        "also": [_tensor_to_list(t) for t in site.also],
        "lora": [[kernel, _tensor_to_list(t)] for kernel, t in site.lora],
        "stack": list(site.stack),
        "groups": list(site.groups),
        "tied": site.tied,
    }


def _check_size(site: Site) -> None:
    """Every tensor has all the channels, or all the groups; and the groups have all the heads."""
    if site.groups and sum(site.groups) != site.size:
        raise PlanError(
            "the groups of a site do not have its size",
            path=site.second.path,
            seen=f"size {site.size}, groups {list(site.groups)}",
        )
    for tensor in site.cut:
        axis = site.axis(tensor)
        whole = site.size if axis == site.pair.axis else len(site.groups)
        if (size := tensor.axes.sizes(tensor.shape).get(axis)) != whole:
            raise PlanError(
                "a site has another size than its tensors",
                path=tensor.path,
                seen=f"size {site.size}, groups {list(site.groups)}",
                expected=f"{size}, from the shape {tensor.shape}",
            )
    if len(site.first_biases) != len(site.first):
        raise PlanError("a site has not one bias for each first layer", path=site.root)


def _check_once(cuts: Sequence[Cut]) -> None:
    """A tensor of two sites is cut along an axis of each."""
    seen = set[tuple[str, int]]()
    for cut in cuts:
        for tensor in cut.site.cut:
            place = tensor.path, tensor.axes.position(cut.site.axis(tensor))
            if place in seen:
                raise PlanError("a tensor would be cut twice along one axis", path=tensor.path)
            seen.add(place)


def _cut(data: Mapping[str, Any], pairs: Sequence[Any]) -> Cut:
    _check_kinds(data, _CUT_KINDS, str(data["root"]))
    _check_kinds(data["rules"], dict.fromkeys(data["rules"], int), f"{data['root']}: rules")
    pair = pairs[data["pair"]]
    site = Site(
        root=data["root"],
        name=data["name"],
        layer=data["layer"],
        pair=pair,
        size=data["size"],
        first=tuple(_tensor(t) for t in data["first"]),
        first_biases=tuple(None if t is None else _tensor(t) for t in data["first_biases"]),
        second=_tensor(data["second"]),
        second_bias=None if (bias := data["second_bias"]) is None else _tensor(bias),
        readers=tuple(_tensor(t) for t in (data["readers"] if pair.readers else ())),
        also=tuple(_tensor(t) for t in data["also"]),
        lora=tuple((kernel, _tensor(t)) for kernel, t in data["lora"]),
        stack=tuple(data["stack"]),
        groups=tuple(data["groups"]),
        tied=data["tied"],
    )
    _check_size(site)
    keep = _channels(site, data["keep"])
    rows = keep if site.stack else (keep,)
    if len({len(row) for row in rows}) != 1 or len(rows) != site.rows:
        raise PlanError(
            "the rows of a stacked site do not keep equally many channels", path=site.root
        )
    folds = _channels(site, data["folds"])
    gone = zip(folds if site.stack else (folds,), rows, strict=False)
    if any(set(some) & set(row) for some, row in gone):
        raise PlanError(
            "a constant is to be folded for a channel that does not go",
            path=site.root,
            seen=str(folds)[:80],
        )
    return Cut(
        site=site,
        keep=keep,
        dead=data["dead"],
        rules=data["rules"],
        weak=data["weak"],
        folds=folds,
        activation=data["activation"],
    )


def _channels(site: Site, data: Sequence[Any]) -> Channels:
    """Channels; a device gather would clip one that is out of range, silently."""
    rows = [tuple(row) for row in (data if site.stack else [data])]
    for row in rows:
        whole = all(type(channel) is int for channel in row)
        if not whole or any(b <= a for a, b in itertools.pairwise((-1, *row, site.size))):
            raise PlanError(
                "the channels that stay, or are folded, are not ascending indices of a site",
                path=site.root,
                seen=str(row) if len(row) <= 16 else f"{len(row)} of them",
                expected=f"indices from 0 to {site.size - 1}, each once",
            )
    return tuple(rows) if site.stack else rows[0]
