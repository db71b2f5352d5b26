"""Which channels stay at each site: the plan, a value that can be printed, stored, applied."""

import dataclasses
import itertools
import json
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _bits, _config
from flaxslim._activation import ACTIVATIONS, activation, activation_name
from flaxslim._axes import Axes
from flaxslim._dead import RULES, Marks, mark
from flaxslim._errors import (
    ConfigError,
    PlanError,
    SiteShapeError,
    UnsupportedDtypeError,
    WidthError,
)
from flaxslim._spec import Site, Spec, Tensor
from flaxslim._tree import flatten
from flaxslim.specs import spec_for

_JSON_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What happens at one site.

    Attributes:
      site: where, and which tensors.
      keep: the channels that stay, ascending.
      dead: how many channels are dead (of these, `site.size - len(keep)` go).
      rules: how many dead channels each rule found.
      folds: (channel, constant) of the channels that go but put out a constant, which times
        their second row is added to the second bias.
      activation: its name, by which the constants follow from the first biases.
    """

    site: Site
    keep: tuple[int, ...]
    dead: int
    rules: Mapping[str, int]
    folds: tuple[tuple[int, float], ...] = ()
    activation: str | None = None

    @property
    def removed(self) -> int:
        return self.site.size - len(self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """A width before and after, by its config key, and what the config is to say then."""

    width: str
    before: int
    after: int
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `apply` will do to a tree, and to its config. `str(plan)` is a table.

    Attributes:
      spec: the spec that found the sites.
      cuts: one for each site.
      resizes: one for each width.
      threshold: the relative norm up to which channels were given up; 0.0 is exact.
      notes: what the reader should know (unknown activation, pairs without a site, ...).
      blocked: widths that no config of the stock class can say, so nothing goes there.
    """

    spec: Spec
    cuts: tuple[Cut, ...]
    resizes: tuple[Resize, ...]
    threshold: float = 0.0
    notes: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        """How many channels go, over all sites."""
        return sum(cut.removed for cut in self.cuts)

    @property
    def removed_parameters(self) -> int:
        return sum(cut.removed * cut.site.per_channel for cut in self.cuts)

    @property
    def exact(self) -> bool:
        """Whether every channel that goes is dead by one of the exact rules."""
        # Those that only the threshold gave up stay first where a width is filled up.
        return all(cut.removed <= cut.dead - cut.rules.get("threshold", 0) for cut in self.cuts)

    @property
    def why_nothing(self) -> str | None:
        """Why no channel goes, in a sentence; None if some do."""
        if self.removed:
            return None
        if self.blocked:
            return "; ".join(self.blocked)
        where = f"{len(self.cuts)} sites of {self.spec.name}"
        if dead := sum(cut.dead for cut in self.cuts):
            return (
                f"{dead} channels at {where} are dead, but none can go: layers that share a width "
                "keep the largest need among them, rounded up to multiple_of"
            )
        return (
            f"no channel at {where} is dead; prune first (make rows of the second layers zero), "
            "or give a threshold"
        )

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [("site", "channels", "dead", "kept", "by rule")]
        for cut in self.cuts:
            by = ", ".join(f"({name}) {count}" for name, count in cut.rules.items() if count)
            rows.append((cut.site.root or "(top)", cut.site.size, cut.dead, len(cut.keep), by))
        widths = [max(len(str(row[i])) for row in rows) for i in range(5)]
        lines = [f"plan by {self.spec.name}, {'exact' if self.exact else 'approximate'}"]
        for row in rows:
            numbers = (str(row[i]).rjust(widths[i]) for i in (1, 2, 3))
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[4]]).rstrip())
        for resize in self.resizes:
            lines.append(f"{resize.width}: {resize.before:,} -> {resize.after:,} channels")
        lines.append(
            f"{self.removed:,} channels go, with {self.removed_parameters:,} parameters"
            if self.removed
            else "nothing goes"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in (*self.blocked, *self.notes))])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        pairs = list(self.spec)
        return {
            "version": _JSON_VERSION,
            "spec": self.spec.to_dict(),
            "threshold": self.threshold,
            "notes": list(self.notes),
            "blocked": list(self.blocked),
            "resizes": [dataclasses.asdict(resize) for resize in self.resizes],
            "cuts": [
                {
                    "root": cut.site.root,
                    "pair": pairs.index(cut.site.pair),
                    "size": cut.site.size,
                    "first": [_tensor_to_list(t) for t in cut.site.first],
                    "first_biases": [_tensor_to_list(t) for t in cut.site.first_biases],
                    "second": _tensor_to_list(cut.site.second),
                    "second_bias": _tensor_to_list(cut.site.second_bias),
                    "keep": list(cut.keep),
                    "dead": cut.dead,
                    "rules": dict(cut.rules),
                    "folds": [list(fold) for fold in cut.folds],
                    "activation": cut.activation,
                }
                for cut in self.cuts
            ],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote; `PlanError` for anything else."""
        try:
            if data["version"] != _JSON_VERSION:
                raise PlanError(
                    "the plan was written by another version of flaxslim",
                    seen=f"version {data['version']}",
                    expected=f"version {_JSON_VERSION}",
                    mend="make the plan anew, or use that version",
                )
            spec = Spec.from_dict(data["spec"])
            pairs = list(spec)
            return cls(
                spec=spec,
                threshold=data["threshold"],
                notes=tuple(data["notes"]),
                blocked=tuple(data["blocked"]),
                resizes=tuple(Resize(**resize) for resize in data["resizes"]),
                cuts=tuple(
                    Cut(
                        site=Site(
                            root=cut["root"],
                            pair=pairs[cut["pair"]],
                            size=cut["size"],
                            first=tuple(_tensor(t) for t in cut["first"]),
                            first_biases=tuple(t and _tensor(t) for t in cut["first_biases"]),
                            second=_tensor(cut["second"]),
                            second_bias=cut["second_bias"] and _tensor(cut["second_bias"]),
                        ),
                        keep=_kept(cut),
                        dead=cut["dead"],
                        rules=cut["rules"],
                        folds=_folds(cut),
                        activation=cut["activation"],
                    )
                    for cut in data["cuts"]
                ),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                "this is not the JSON of a plan",
                seen=f"{type(error).__name__}: {error}",
                expected="what Plan.to_json() writes",
            ) from error

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError("this is not JSON", seen=str(error)) from error
        return cls.from_dict(data)


def _tensor_to_list(tensor: Tensor | None) -> list[Any] | None:
    return tensor and [tensor.path, str(tensor.axes), list(tensor.shape)]


def _kept(cut: Mapping[str, Any]) -> tuple[int, ...]:
    """The channels that stay; a device gather would clip one that is out of range, silently."""
    keep = tuple(cut["keep"])
    whole = all(type(channel) is int for channel in keep)
    if not whole or any(b <= a for a, b in itertools.pairwise((-1, *keep, cut["size"]))):
        raise PlanError(
            "the channels that stay are not ascending indices of a site",
            path=cut["root"],
            seen=str(keep) if len(keep) <= 16 else f"{len(keep)} of them",
            expected=f"indices from 0 to {cut['size'] - 1}, each once",
        )
    return keep


def _folds(cut: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    folds = tuple((channel, float(value)) for channel, value in cut["folds"])
    gone = {*range(cut["size"])}.difference(cut["keep"])
    if any(channel not in gone or not math.isfinite(value) for channel, value in folds):
        raise PlanError(
            "a constant is to be folded for a channel that does not go",
            path=cut["root"],
            seen=str(folds[:4]),
        )
    return folds


def _tensor(data: Sequence[Any]) -> Tensor:
    path, axes, shape = data
    return Tensor(path=path, axes=Axes(axes), shape=tuple(shape))


def plan(
    params: Any,
    cfg: Any = None,
    spec: Spec | None = None,
    *,
    width: str = "uniform",
    multiple_of: int = 1,
    threshold: float = 0.0,
) -> Plan:
    """Find the dead channels of a model and choose which channels stay.

    Args:
      params: the parameters, in any container (see `flaxslim._tree`). Untouched.
      cfg: the config that holds the widths; may be None if no pair of the spec has a width key.
      spec: where the pairs are; found by `cfg.model_type` if left out.
      width: "uniform": one width for each config key, the largest that any layer needs, filled
        up with dead channels, lowest index first (those of the threshold before the exact ones).
      multiple_of: round each width up to a multiple of this (128 suits most accelerators).
      threshold: also give up channels whose second row has at most this L2 norm, relative to
        the largest row norm of the layer. 0.0 is exact; anything above is approximate.

    Raises `FlaxslimError`s: nothing matched, half a pair, a wrong shape, NaN, quantised tensors,
    tracers, or a config that contradicts the tensors.

    >>> import numpy as np
    >>> w2 = np.diag([1.0, 0.0, 1.0])
    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": w2}}
    >>> from flaxslim import Pair, Spec
    >>> p = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> p.cuts[0].keep
    (0, 2)
    """
    chosen = draw(params, cfg, spec, width=width, multiple_of=multiple_of, threshold=threshold)
    check_finite(chosen, flatten(params))
    return chosen


def check_finite(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raise `NonFiniteError` for NaN or infinity in the first kernels, which `draw` did not read.

    A channel that nothing reads is not dead if it is NaN: zero times NaN is NaN.
    """
    for cut in plan.cuts:
        for tensor in cut.site.first:
            _bits.check_finite(leaves[tensor.path], tensor)


def draw(
    params: Any,
    cfg: Any,
    spec: Spec | None,
    *,
    width: str = "uniform",
    multiple_of: int = 1,
    threshold: float = 0.0,
) -> Plan:
    """`plan`, without a search for NaN in the first kernels: `apply` does that while it cuts."""
    _check_arguments(width, multiple_of, threshold)
    spec = spec_for(cfg) if spec is None else spec
    if not isinstance(spec, Spec):
        raise PlanError(
            "spec is not a Spec",
            seen=repr(spec),
            mend="pass a constant such as flaxslim.BERT_FFN, or leave it out",
        )
    sites, unmatched = spec.bind(params)
    leaves = flatten(params)
    _refuse_quantised(sites, cfg, leaves)
    groups = _groups(sites, cfg)

    # By the path of the second kernel, which belongs to one site only; a Site is slow to hash.
    marks: dict[str, Marks] = {}
    for site in sites:
        act = activation(site.pair.activation, cfg, site.pair.config)
        marks[site.second.path] = mark(site, leaves, act, threshold)

    cuts: dict[str, Cut] = {}
    resizes: list[Resize] = []
    blocked: list[str] = []
    for members in groups:
        target, why = _target(
            [marks[site.second.path] for site in members], members[0], cfg, multiple_of
        )
        blocked += [why] if why else []
        for site in members:
            cuts[site.second.path] = _cut(site, marks[site.second.path], target, cfg)
        expression = members[0].pair.width_expression
        if expression is not None:
            size = members[0].size
            values = expression.write(cfg, target) if target < size else {}
            resizes.append(
                Resize(
                    width=expression.key or str(expression),
                    before=size,
                    after=target,
                    values=values,
                )
            )
    return Plan(
        spec=spec,
        cuts=tuple(cuts[site.second.path] for site in sites),
        resizes=tuple(resizes),
        threshold=threshold,
        notes=(*_notes(sites, cfg, leaves), *(f"no site for {pair}" for pair in unmatched)),
        blocked=tuple(blocked),
    )


def check_dead(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raise `PlanError` if an exact plan, made for other parameters, would cut living channels."""
    for cut in plan.cuts if plan.exact else ():
        living = ~mark(cut.site, leaves, ACTIVATIONS.get(cut.activation or "")).dead
        living[list(cut.keep)] = False
        if living.any():
            raise PlanError(
                f"the plan would cut {int(living.sum())} channels that are alive here",
                path=cut.site.second.path,
                seen=f"channel {int(living.argmax())} contributes to the output",
                mend="make a new plan for these parameters; `apply` cuts by a plan whatever the "
                "values are",
            )


# Tensors that quantised kernels come with; cutting the kernel alone would leave them behind.
_COMPANION = re.compile(
    r"(.*_)?(scales?|scale_inv|q?zeros|zero_points?|g_idx|absmax|quant_map|SCB)", re.IGNORECASE
)


def _refuse_quantised(sites: Sequence[Site], cfg: Any, leaves: Mapping[str, Any]) -> None:
    mend = "slim before quantising, or dequantise first"
    if _config.has(cfg, "quantization_config") and _config.read(cfg, "quantization_config"):
        raise UnsupportedDtypeError(
            "the config says that the weights are quantised",
            path="quantization_config",
            seen=str(_config.read(cfg, "quantization_config"))[:80],
            mend=mend,
        )
    for path, _, _ in _beside(sites, leaves):
        if _COMPANION.fullmatch(path.rpartition("/")[2]):
            raise UnsupportedDtypeError(
                "a kernel that would be cut is quantised: its scales stand beside it",
                path=path,
                mend=mend,
            )


def _beside(sites: Sequence[Site], leaves: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Site]]:
    """The tensors in the folder of a kernel that is cut which no spec names, with that kernel."""
    known = {t.path for site in sites for t in site.tensors}
    others: dict[str, list[str]] = {}
    for path in leaves:
        if path not in known:
            others.setdefault(path.rpartition("/")[0], []).append(path)
    for site in sites:
        for t in site.cut:
            if len(t.shape) > 1:
                for path in others.get(t.path.rpartition("/")[0], ()):
                    yield path, t, site


def _check_arguments(width: str, multiple_of: int, threshold: float) -> None:
    if width != "uniform":
        raise WidthError(
            f"width={width!r} is not available",
            expected='"uniform"',
            mend="per-layer widths come with a later release; the stock classes load one width "
            "for each config key",
        )
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise WidthError("multiple_of must be a positive whole number", seen=repr(multiple_of))
    if not isinstance(threshold, numbers.Real) or not 0 <= float(threshold) < 1:
        raise WidthError(
            "threshold is relative to the largest row norm of a layer",
            seen=repr(threshold),
            expected="0.0 (exact) up to, but not including, 1.0",
        )


def _groups(sites: Sequence[Site], cfg: Any) -> list[list[Site]]:
    """The sites that share a width, checked against each other and against the config."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        expression = site.pair.width_expression
        # Without a key nothing says which sites must agree: those of one pair and size do.
        key = (expression.key or str(expression)) if expression else (site.pair, site.size)
        groups.setdefault(key, []).append(site)
    for key, members in groups.items():
        odd = next((site for site in members if site.size != members[0].size), None)
        if odd is not None:
            raise SiteShapeError(
                f"two sites that share the width {key!r} have different sizes",
                path=odd.second.path,
                seen=f"{odd.size} channels",
                expected=f"{members[0].size} channels, as at {members[0].second.path}",
                mend="give the pairs a width key each; per-layer widths come with a later release",
            )
        expression = members[0].pair.width_expression
        if expression is not None and (said := expression.read(cfg)) != members[0].size:
            raise ConfigError(
                "the config contradicts the tensors",
                path=members[0].second.path,
                seen=f"{members[0].size} channels in a tensor of shape {members[0].second.shape}",
                expected=f"{said}, from {expression} of the config",
                mend="pass the config that was saved with these parameters",
            )
    return list(groups.values())


def _target(
    marks: Sequence[Marks], site: Site, cfg: Any, multiple_of: int
) -> tuple[int, str | None]:
    """The common width of some sites, and the reason if no config can say a smaller one."""
    # No stock class can be built at width 0, so one dead channel stays in that case.
    need = max(1, *(int((~m.dead).sum()) for m in marks))
    expression = site.pair.width_expression
    step = expression.step(cfg) if expression else 1
    if expression is not None and expression.key is None and need < site.size:
        return site.size, (
            f"this class hard-codes its width ({expression} = {site.size}): its config cannot say "
            f"the {need} that is needed; per-layer layouts, which can, come with a later release"
        )
    unit = math.lcm(multiple_of, step)
    target = min(site.size, math.ceil(need / unit) * unit)
    if target == site.size and math.ceil(need / multiple_of) * multiple_of < site.size:
        return target, (
            f"{need} of {site.size} channels are needed, but the config ({expression}) can only "
            f"say multiples of {step}; per-layer layouts, which can say any, come with a later "
            "release"
        )
    return target, None


def _cut(site: Site, marks: Marks, target: int, cfg: Any) -> Cut:
    keep = ~marks.dead
    # Filling is free of loss if it takes the weak first: a dead channel is missed by nobody.
    filling = np.flatnonzero(marks.weak), np.flatnonzero(marks.dead & ~marks.weak)
    keep[np.concatenate(filling)[: target - int(keep.sum())]] = True
    folded = np.flatnonzero(~keep & (marks.constants != 0))
    return Cut(
        site=site,
        keep=tuple(np.flatnonzero(keep).tolist()),
        dead=int(marks.dead.sum()),
        rules={name: count for name, count in marks.rules.items() if count},
        activation=activation_name(site.pair.activation, cfg, site.pair.config),
        folds=tuple(zip(folded.tolist(), marks.constants[folded].tolist(), strict=True)),
    )


def _notes(sites: Sequence[Site], cfg: Any, leaves: Mapping[str, Any]) -> list[str]:
    notes = []
    for pair in dict.fromkeys(site.pair for site in sites):
        if activation(pair.activation, cfg, pair.config) is None:
            name = activation_name(pair.activation, cfg, pair.config)
            rules = "(i) and (ii), up only" if pair.gated else "(i)"
            notes.append(
                f"the activation of {pair.at or pair.second} is unknown ({name or 'not given'}): "
                f"of the rules {', '.join(f'({r})' for r in RULES)} only {rules} were used"
            )
    return notes + _neighbours(sites, leaves)


def _neighbours(sites: Sequence[Site], leaves: Mapping[str, Any]) -> list[str]:
    """Notes on tensors beside a kernel that is cut that might need the same cut (LoRA matrices)."""
    return [
        f"{path} stands beside {t.path} and may have an axis of the same {site.size} channels; "
        "the spec does not name it, so it stays as it is"
        for path, t, site in _beside(sites, leaves)
        if site.size in getattr(leaves[path], "shape", ())
    ]
