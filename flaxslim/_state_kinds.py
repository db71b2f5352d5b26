"""What the copies in a tree hold: parameters, or what an optimizer made of them.

Parameters take up the constants of channels that go; moments and gradients must not. Where a copy
stands tells which it is: by the table of optax where its types are left, else by exact names.
"""

import enum
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import optax
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from flaxslim._tree import name_of


class Kind(enum.Enum):
    """What a copy holds; of one that is unknown, only the caller can say it."""

    PARAMETERS = enum.auto()
    STATE = enum.auto()
    UNKNOWN = enum.auto()


# The fields of optax, beside those with "param" in their names, that hold parameters.
_PARAMETER_FIELDS = {
    "ScheduleFreeState": "z",
    "MadgradState": "x0",
    "MechanicState": "x0",
    "COCOBState": "init_particles",
    "SAMState": "cache",
}

# Plain names, and fields of optax in a checkpoint, where their types are lost.
_MOMENTS = re.compile(
    r"mu|nu|nu_max|trace|exp_avg|exp_avg_sq|sum_of_squares|e_g|e_x|m1|m2|step_sizes|subgradients"
    r"|moments?|momentum|velocity"
)
_GRADIENTS = frozenset({"grad", "grads", "gradient", "gradients", "updates"})
_STATES = re.compile(r"(.*_)?(opt|optim|optimizer|inner)_?states?")
_LABELLED = "inner_states"  # of optax.multi_transform: below it are names of the caller's

# Words for parameters, and those that go with them. Any other word beside one that does not end
# the name may say that it is no network: "param_delta", "fisher_ema".
_NOUNS = re.compile(
    r".*(params?|parameters?|models?|networks?|encoders?|decoders?|variables|targets?|teachers?"
    r"|students?|actors?|critics?|adapters?|lora)"
)
_AVERAGES = re.compile(r"ema|averag.*|polyak|swa|online")
_BESIDE = re.compile(
    r"a|b|avg|best|exponential|fast|final|first|frozen|init|initial|last|momentum|moving|net|new|of"
    r"|old|policy|running|second|slow|state|the|train|trained|value|weights?"
)
_DERIVED = re.compile(
    r"deltas?|diffs?|updates?|fisher|sq|squared?s?|controls?|var|variances?|hessians?|errors?"
    r"|importances?|corrections?|noise|masks?"
)


def kinds(tree: Any, paths: Collection[str], *, fold: bool) -> dict[str, Kind]:
    """What the copies at some paths hold; where nothing tells, `fold` is the caller's word."""
    fields = dict(optax_fields(tree))
    found = {path: _kind(path, fields, paths, fold=fold) for path in paths}
    unknown = Kind.UNKNOWN if fold else Kind.STATE
    return {path: unknown if kind is Kind.UNKNOWN else kind for path, kind in found.items()}


def is_state(path: str, fields: Collection[str]) -> bool:
    """Whether a tensor lies in an optimizer's state, or in other fields of optax's named tuples.

    >>> is_state("opt_state/0/mu/block/up/kernel", ()), is_state("params/block/up/kernel", ())
    (True, False)
    """
    *places, _ = path.split("/")
    return is_held(path, fields) or any(_STATES.fullmatch(name) for name in places)


def is_held(path: str, fields: Collection[str]) -> bool:
    """Whether it lies in a field of optax's, or in one called as their moments in a state."""
    *places, _ = path.split("/")
    above = {"/".join(places[: i + 1]) for i in range(len(places))}
    at = next((i for i, name in enumerate(places) if _STATES.fullmatch(name)), len(places))
    return not above.isdisjoint(fields) or any(_MOMENTS.fullmatch(name) for name in places[at:])


def optax_fields(tree: Any) -> Iterator[tuple[str, type]]:
    """The places of the fields of optax's named tuples, with the classes of these."""

    def is_named(x: Any) -> bool:
        return isinstance(x, tuple) and hasattr(x, "_fields")

    def visit(node: Any, at: tuple[Any, ...]) -> Iterator[tuple[str, type]]:
        for keys, child in tree_flatten_with_path(node, is_leaf=is_named)[0]:
            for name in child._fields if is_named(child) else ():
                below = (*at, *keys, GetAttrKey(name))
                if type(child).__module__.partition(".")[0] == "optax":
                    yield name_of(below), type(child)
                yield from visit(getattr(child, name), below)

    return visit(tree, ())


def _kind(path: str, fields: Mapping[str, type], paths: Collection[str], *, fold: bool) -> Kind:
    """From the outside in: what is further in knows better, until a place is final."""
    names = path.split("/") if path else []
    alone = Kind.PARAMETERS if fold else Kind.STATE
    if all(name.isdigit() for name in names):  # a copy alone, or in a list of the caller's,
        first = min(p for p in paths if all(name.isdigit() for name in p.split("/") if p))
        return alone if path == first else Kind.UNKNOWN  # where another may be of gradients
    kind, wrapped = Kind.UNKNOWN, False
    for i, name in enumerate(names):
        if i and names[i - 1] == _LABELLED:
            continue
        cls = fields.get("/".join(names[: i + 1]))
        if cls is optax.EmaState and kind is not Kind.STATE:
            # It averages updates in a chain; elsewhere it was fed parameters, or it is alone.
            if wrapped or i == 0:
                return Kind.UNKNOWN if wrapped else alone
            container = "/".join(names[: i - 1])
            beside = any(p and p.rpartition("/")[0] == container for p in paths)
            return Kind.PARAMETERS if beside else Kind.UNKNOWN
        if cls is not None and "state" in name:
            wrapped = True
        elif cls is not None:
            return _of_field(cls, name)
        elif (said := _of_name(name, in_state=wrapped or kind is Kind.STATE)) is not None:
            kind, final = said
            if final:
                return kind
    return Kind.STATE if wrapped else kind


def _of_field(cls: type, field: str) -> Kind:
    name = cls.__name__
    held = field == _PARAMETER_FIELDS.get(name) or "Params" in name
    held |= "param" in field and not field.startswith("hyper")
    return Kind.PARAMETERS if held else Kind.STATE


def _of_name(name: str, *, in_state: bool) -> tuple[Kind, bool] | None:
    """What a plain name says, and whether nothing below it can say otherwise."""
    name = name.lower()
    gradients = not _GRADIENTS.isdisjoint(name.split("_"))
    if _MOMENTS.fullmatch(name):
        # Of contrastive learning "momentum" is a network.
        maybe = name.startswith(("moment", "velocity")) and not in_state
        return (Kind.UNKNOWN if maybe else Kind.STATE), True
    if name in _PARAMETER_FIELDS.values():
        return Kind.PARAMETERS, True
    if _STATES.fullmatch(name):
        return Kind.STATE, False
    if in_state:  # where "params" alone is the collection of a moment, and "model" a layer
        return (Kind.PARAMETERS, True) if "param" in name and name != "params" else None
    if gradients:  # or a network: "no_grad_params"
        return (Kind.UNKNOWN, False) if _is_network(name) else (Kind.STATE, True)
    return (Kind.PARAMETERS, False) if _is_network(name) else None


def _is_network(name: str) -> bool:
    """Whether a name says that there are parameters.

    >>> [_is_network(name) for name in ("ema_params", "unet_model", "params_ema", "slow")]
    [True, True, True, False]
    >>> [_is_network(name) for name in ("param_delta", "fisher_ema", "ema_of_squares")]
    [False, False, False]
    """
    words = re.findall(r"[a-z]+", name)
    others = [w for w in words if not _NOUNS.fullmatch(w) and not _AVERAGES.fullmatch(w)]
    if len(others) == len(words) or any(_DERIVED.fullmatch(word) for word in words):
        return False
    return bool(_NOUNS.fullmatch(words[-1])) or all(_BESIDE.fullmatch(word) for word in others)
