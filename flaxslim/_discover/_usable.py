"""Whether the activation of a pair may be claimed: the rules of `_dead` rest on it."""

from flaxslim._discover._atoms import Atom, roots, size_of
from flaxslim._discover._formula import Formula
from flaxslim._discover._function import Walked
from flaxslim._discover._groups import Group
from flaxslim._discover._trace import Sum


def layer_of(path: str) -> str:
    """The layer whose kernel a tensor is, or the tensor itself."""
    return path.removesuffix("/kernel")


def usable(form: Formula, group: Group, seen: Walked) -> Formula:
    """The formula, without its activation where a rule of `_dead` would be wrong by it.

    The rules also fold what is constant into the second bias, so that the trace must show that
    this is added to the sum, and nothing else happens to that.
    """
    second = group.seconds[0]
    plain = Formula(sources=form.sources)
    if form.activation is None:
        return plain
    # One layer, two factors of one, or two layers.
    if {source.path for source in form.sources} & {*group.seconds}:
        return plain  # its zero rows are zero columns too
    # A gate and what it is multiplied with are halves of a layer, or two layers.
    paths = {source.path for source in form.sources}
    halves = [size_of(s.parts) == 2 for s in form.sources]
    whole = all(source.part is None for source in form.sources)
    if form.gated and not (all(halves) if len(paths) == 1 else whole):
        return plain
    # The first literal factor of a pattern is the one that counts the parts.
    for source in form.sources:
        dims = [[*roots(dim)] for dim in seen.dims[source.path]]
        parts = [*roots(source.parts)]
        factors = [a for dim in dims for a in dim if dim == parts or group.atom in dim]
        literals = [a for a in factors if a.literal]
        if parts and literals[:1] != parts:
            return plain
    biases = {source.bias for source in form.sources} - {None}
    extra = {*group.paths} - biases
    if any(f"{layer_of(source.path)}/bias" in extra for source in form.sources):
        return plain  # a bias that is no bias
    usual = f"{layer_of(second)}/bias"
    added = bias_of(group, second, seen)
    if added is None and usual in seen.leaves:
        return plain
    literal = any(
        atom.literal for dim in seen.dims[second] for atom in roots(dim) if group.atom in roots(dim)
    )
    if added is not None and literal:
        return plain
    stack = {*group.stack}  # of which it has the outputs of each
    if added is not None and sum(not {*roots(dim)} <= stack for dim in seen.dims[added]) != 1:
        return plain
    return form


def bias_of(group: Group, second: str, seen: Walked) -> str | None:
    """The parameter that is added to every sum with the second layer, and is all that follows.

    The layer must be summed as it is: scaled, it would scale what a constant channel adds.
    """
    walk = seen.walk
    sums = [t for t in group.sums if any(second in value.weights for value in t.args)]
    axes = {atom for dim in seen.dims[second] for atom in roots(dim)}
    if not all(_reads_plainly(t, second) and _atoms(t) <= axes for t in sums):
        return None
    uses = [walk.uses.get(total, []) for total in sums]
    first = uses[0][0] if uses and uses[0] else None
    if first is None or any(use != [first] for use in uses) or not all(t.plain for t in sums):
        return None
    # Used elsewhere too, it would bring the constant there.
    return first if walk.added.get(first) == sums else None


def _reads_plainly(total: Sum, second: str) -> bool:
    """Whether one factor of a sum is a parameter itself, and no more than a view of it."""
    nodes = [value.node for value in total.args]
    if len(nodes) == 1 and nodes[0].kind == "mul":  # multiplied and summed by hand
        nodes = list(nodes[0].args)
    return any(node.kind == "param" and node.data == second for node in nodes)


def _atoms(total: Sum) -> set[Atom]:
    return {atom for dim in total.dims for atom in roots(dim)}
