"""`plan`: find the dead channels of a model, and choose which stay under a width policy."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flaxslim import _bits, _multiples, _policy, _processes, _record, _refused, _resize, _widths
from flaxslim._activation import activation, activation_name, named
from flaxslim._dead import RULES, Marks, mark
from flaxslim._lazy import Lazy
from flaxslim._nnx import modules
from flaxslim._norms import refuse_norms
from flaxslim._plan import Cut, Plan, channels
from flaxslim._scales import beside
from flaxslim._spec import Site, SpecLike
from flaxslim._tree import flatten
from flaxslim.errors import (
    ConfigError,
    PlanError,
    SiteShapeError,
)
from flaxslim.specs import chosen


def plan(
    params: Any,
    cfg: Any = None,
    spec: SpecLike = None,
    *,
    width: str = "uniform",
    multiple_of: int | Mapping[str, int] = 1,
    threshold: float = 0.0,
) -> Plan:
    """Find the dead channels of a model and choose which channels stay.

    Args:
      params: the parameters, in any container: dicts, nnx modules, other pytrees. Untouched.
      cfg: the config that holds the widths; may be None if no pair of the spec has a width key,
        and for an nnx module, which runs without one.
      spec: where the pairs are: a Spec, several, or of the family that `cfg.model_type` names
        "ffn" (the default), "heads" or "all".
      width: "uniform": one width for each config key, the largest that any layer needs, filled
        up with dead channels, lowest index first (those of the threshold before the exact ones).
        "per_layer": each site its own, down to 0 (of heads in an nnx module: 1); what plain
        config keys cannot say is recorded beside them (docs/how/layouts.md), and
        `flaxslim.from_pretrained` runs it.
      multiple_of: round each width of channels up to a multiple of this (128 suits most
        accelerators); by axis, or by the root of channels, if a mapping: `{"f": 128, "h": 2,
        "decoder/*": 64}`. The last that fits holds. Heads are rounded only by an "h" of their own.
        Where a mesh splits the channels of a tensor over devices, each width is rounded up to what
        these divide, too, so that all arrays keep their mesh and `PartitionSpec`.
      threshold: also give up channels whose second row has at most this L2 norm, relative to
        the largest row norm of the layer. 0.0 is exact; anything above is approximate.

    Of arrays that span processes each process makes the plan, by the same arguments.

    Raises `FlaxslimError`s: nothing matched, half a pair, a wrong shape, NaN, quantised tensors,
    tracers, a config that contradicts the tensors, or processes that come to other plans or run
    other releases (`ProcessError`).

    >>> import numpy as np
    >>> w2 = np.diag([1.0, 0.0, 1.0])
    >>> tree = {"up": {"kernel": np.ones((2, 3))}, "down": {"kernel": w2}}
    >>> from flaxslim import Pair, Spec
    >>> p = plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    >>> p.cuts[0].keep
    (0, 2)
    """
    made = draw(params, cfg, spec, width=width, multiple_of=multiple_of, threshold=threshold)
    check_finite(made, flatten(params))
    return made


def check_finite(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raise `NonFiniteError` for NaN or infinity in what `draw` did not read.

    That is all but the kernels that read the channels.
    A channel that nothing reads is not dead if it is NaN: zero times NaN is NaN.
    """
    for cut in plan.cuts:
        for tensor in cut.site.cut:
            if not cut.site.reads(tensor):
                _bits.check_finite(leaves[tensor.path], tensor)


def draw(
    params: Any,
    cfg: Any,
    spec: SpecLike,
    *,
    width: str = "uniform",
    multiple_of: int | Mapping[str, int] = 1,
    threshold: float = 0.0,
    beside: Mapping[str, Sequence[Any]] | None = None,
) -> Plan:
    """`plan`, without a search for NaN in the first kernels: `apply` does that while it cuts.

    `beside` are other arrays that will be cut by it, by the paths of the parameters; of these only
    the shardings count.
    """
    _refused.check_arguments(width, multiple_of, threshold)
    found = chosen(spec, cfg)
    sites, unmatched = found.bind(params, cfg)
    leaves = flatten(params)
    _refused.refuse_states(params, sites)
    _processes.agree(leaves.values())
    _widths.check_entries(multiple_of, sites)
    _refused.refuse_quantised(sites, cfg, leaves)
    nodes = dict(modules(params))
    in_nnx = bool(nodes)
    sized = cfg is not None or not in_nnx
    shared: Mapping[str, str] = {}
    if sized:
        check_config(sites, cfg)
        shared = _resize.shared_keys(found, sites, params, cfg)

    marks = _marked(sites, leaves, cfg, threshold)
    _refused.refuse_unnamed_biases(sites, leaves, marks)
    asked = {site.second.path: _multiples.on_mesh(site, leaves, beside) for site in sites}
    cuts: dict[str, Cut] = {}
    blocked: list[str] = []
    for members in _policy.sharing(_policy.clusters(sites, marks), width, sized):
        # Nobody stands between an nnx class and its heads, by whose number it divides.
        least = int(in_nnx and members[0].sites[0].pair.axis == "h")
        own = [site for cluster in members for site in cluster.sites]
        multiples = _multiples.common(own, multiple_of, asked)
        target, why = _policy.target(
            members, cfg if sized else None, width, multiples, least, shared
        )
        blocked += [why] if why else []
        for cluster in members:
            mask = _widths.keep(cluster, target)
            for site in cluster.sites:
                cuts[site.second.path] = _cut(site, marks[site.second.path], mask, cfg)
    ordered = tuple(cuts[site.second.path] for site in sites)
    for cut in ordered:
        if cut.removed:
            refuse_norms(cut.site, nodes)
    values, resizes = _resize.values(found, ordered, cfg, width, shared) if sized else ({}, ())
    made = Plan(
        spec=found,
        cuts=ordered,
        resizes=resizes,
        values=values,
        threshold=float(threshold),
        notes=(
            *_notes(sites, ordered, cfg, leaves),
            *_multiples.notes(ordered, asked),
            *(f"no site for {pair}" for pair in unmatched if not pair.optional),
        ),
        blocked=tuple(blocked),
    )
    _processes.agree_on(made, leaves.values())
    return made


def check_whole(plan: Plan, params: Any, cfg: Any) -> None:
    """Raise `PlanError` if a plan, made for a smaller model, knows only some of the layers."""
    if cfg is None and any(pair.sized_by_config for pair in plan.spec):
        return  # which layers there are cannot be told without the config
    found = {site.second.path for site in plan.spec.bind(params, cfg)[0]}
    known = {cut.site.second.path for cut in plan.cuts}
    if unknown := sorted(found - known):
        raise PlanError(
            f"the plan does not know {len(unknown)} of the layers that its spec finds here",
            path=unknown[0],
            seen=f"{len(found)} layers",
            expected=f"{len(known)}, as in the model that it was made for",
            mend="make a new plan for this model",
        )


def check_dead(plan: Plan, leaves: Mapping[str, Any], cfg: Any) -> None:
    """Raise `PlanError` if an exact plan, made for another model, would cut living channels."""
    for cut in plan.cuts if plan.exact else ():
        _check_activation(cut, cfg)
        _check_conditions(cut, cfg)
        folded = cut.folded
        found = mark(cut.site, leaves, named(cut.activation), foldable=bool(folded.any()))
        living = ~found.dead | (found.folded & ~folded)
        living[np.arange(len(living))[:, None], cut.kept] = False
        if living.any():
            raise PlanError(
                f"the plan would cut {int(living.sum())} channels that are alive here",
                path=cut.site.second.path,
                seen=f"channel {int(np.argwhere(living)[0][-1])} contributes to the output",
                mend="make a new plan for these parameters; `apply` cuts by a plan whatever the "
                "values are",
            )


def _check_activation(cut: Cut, cfg: Any) -> None:
    pair = cut.site.pair
    if cfg is None or not cut.removed or {*cut.rules} <= {"i"}:
        return
    if (said := activation_name(pair.activation, cfg, pair.config)) != cut.activation:
        raise PlanError(
            "the plan is for another activation, by which channels were found dead",
            path=cut.site.second.path,
            seen=f"{said}, by {pair.activation} of the config",
            expected=cut.activation,
            mend="make a new plan, with this config",
        )


def _check_conditions(cut: Cut, cfg: Any) -> None:
    """Raise `PlanError` if the config forbids what the one that the plan was made by allowed."""
    pair = cut.site.pair
    forbidden = {
        pair.fold_unless: "a constant be folded" if cut.folded.any() else "",
        pair.scaled_by: f"{pair.unit} go" if cut.removed else "",
    }
    for condition, what in forbidden.items():
        if what and _policy.says(condition, pair, cfg) is not False:
            raise PlanError(
                f"only a config that says otherwise lets {what}, and the plan does so",
                path=cut.site.second.path,
                seen="no config" if cfg is None else f"a config in which {condition} may hold",
                mend="pass the config that belongs to these parameters, or make a new plan",
            )


def _marked(
    sites: Sequence[Site], leaves: Mapping[str, Any], cfg: Any, threshold: float
) -> dict[str, Marks]:
    """By the path of the second kernel, which belongs to one site only; a Site is slow to hash."""

    def judged(site: Site) -> Marks:
        act = activation(site.pair.activation, cfg, site.pair.config)
        foldable = _policy.says(site.pair.fold_unless, site.pair, cfg) is False
        return mark(site, leaves, act, threshold, foldable=foldable)

    paths = (site.second.path for site in sites)
    return dict(zip(paths, _each(judged, sites, leaves), strict=True))


def _each(judged: Any, sites: Sequence[Site], leaves: Mapping[str, Any]) -> Iterable[Marks]:
    """The verdicts on the sites; by two threads where tensors are read first."""
    if not any(isinstance(leaf, Lazy) for leaf in leaves.values()):
        return map(judged, sites)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(judged, sites))


# --- the config -------------------------------------------------------------------------------


def check_config(sites: Sequence[Site], cfg: Any) -> None:
    """Sites that share a width agree with each other and with the config."""
    first: dict[str, Site] = {}
    for site in sites:
        if site.pair.width is None and site.name not in _record.sites(cfg, site.pair.config):
            continue
        said = _record.said(cfg, site.pair, site.name, site.layer)
        other = first.setdefault(str(site.pair.width_expression), site)
        if said == site.size:
            _check_groups(site, cfg)
            continue
        if other.size != site.size and not _record.is_laid_out(cfg, site.pair.config):
            raise SiteShapeError(
                f"two sites that share the width {str(site.pair.width_expression)!r} have "
                "different sizes",
                path=site.second.path,
                seen=f"{site.size} channels",
                expected=f"{other.size} channels, as at {other.second.path}",
                mend="pass the config that was saved with these parameters, which says the width "
                "of each layer; or give the pairs a width key each",
            )
        raise ConfigError(
            "the config contradicts the tensors",
            path=site.second.path,
            seen=f"{site.size} channels in a tensor of shape {site.second.shape}",
            expected=f"{said}, from {site.pair.width_expression or 'the layout'} of the config",
            mend="pass the config that was saved with these parameters",
        )


def _check_groups(site: Site, cfg: Any) -> None:
    """The config says as many key/value groups as there are, where no layout says which."""
    expression = site.pair.group_expression
    if expression is None or not site.groups:
        return
    if _record.recorded(cfg, site.pair, site.name) is not None:
        return
    if (said := expression.read(cfg)) != len(site.groups):
        raise ConfigError(
            "the config contradicts the tensors",
            path=site.first[0].path,
            seen=f"{len(site.groups)} key/value groups for the {site.size} heads",
            expected=f"{said}, from {expression} of the config",
            mend="pass the config that was saved with these parameters",
        )


def _cut(site: Site, marks: Marks, mask: np.ndarray, cfg: Any) -> Cut:
    gone = ~mask
    return Cut(
        site=site,
        keep=channels(site, mask),
        dead=int(marks.dead.sum()),
        rules={name: count for name, count in marks.rules.items() if count},
        weak=int((gone & marks.weak).sum()),
        folds=channels(site, gone & marks.folded),
        activation=activation_name(site.pair.activation, cfg, site.pair.config),
    )


# --- what the reader should know --------------------------------------------------------------


def _notes(
    sites: Sequence[Site], cuts: Sequence[Cut], cfg: Any, leaves: Mapping[str, Any]
) -> list[str]:
    notes = []
    for pair in dict.fromkeys(site.pair for site in sites):
        if activation(pair.activation, cfg, pair.config) is None:
            name = activation_name(pair.activation, cfg, pair.config)
            rules = "(i) and (ii), up only" if pair.gated else "(i)"
            notes.append(
                f"the activation of {pair.at or pair.second} is unknown ({name or 'not given'}): "
                f"of the rules {', '.join(f'({r})' for r in RULES)} only {rules} were used"
            )
        elif pair.between:
            named_too = ", ".join((*pair.also, *pair.tables))
            notes.append(
                f"{named_too} of {pair.at or pair.second} may stand between its layers: only "
                "channels that nothing reads were cut"
            )
        if _policy.says(pair.fold_unless, pair, cfg) is None:
            notes.append(
                f"no config says {pair.config}{str(pair.fold_unless).partition('=')[0]}, under "
                "which values that are constant are not: none was folded into a bias"
            )
    if any(cut.folded.any() and cut.site.pair.axis == "h" for cut in cuts):
        notes.append(
            "heads with constant values were folded into a bias: that is exact while attention "
            "dropout is off and no head_mask names them"
        )
    return notes + _neighbours(sites, leaves)


def _neighbours(sites: Sequence[Site], leaves: Mapping[str, Any]) -> list[str]:
    """Notes on tensors beside a kernel that is cut that might need the same cut."""
    return [
        f"{path} stands beside {t.path} and may have an axis of the same {site.size} channels; "
        "the spec does not name it, so it stays as it is"
        for path, t, site in beside(sites, leaves)
        if site.size in getattr(leaves[path], "shape", ())
    ]
