"""Whether the activation of a pair may be claimed: the rules of `_dead` rest on it."""

from flaxslim._discover._atoms import Atom, all_roots, roots, size_of
from flaxslim._discover._formula import Formula
from flaxslim._discover._function import Walked
from flaxslim._discover._groups import Group
from flaxslim._discover._trace import Sum


def layer_of(path: str) -> str:
    """The layer whose kernel a tensor is, or the tensor itself."""
    return path.removesuffix("/kernel")


def usable(form: Formula, group: Group, heads: Group | None, seen: Walked) -> Formula:
    """The formula, without its activation where a rule of `_dead` would be wrong by it.

    `heads` are those of which the group is a key/value group.
    """
    claimed = (
        form.activation is not None
        and _reads_one_way(form, group)
        and _parts_can_be_said(form, group, seen)
        and _biases_are_told(form, group, seen)
        and _inside_stays(form, group, heads, seen)
    )
    return form if claimed else Formula(sources=form.sources)


def _inside_stays(form: Formula, group: Group, heads: Group | None, seen: Walked) -> bool:
    """Whether the values of a channel reach the second layer one by one, in their order.

    A constant is folded value by value: so the axes inside of a channel, which the second layer
    sums over with it, must be those of each first layer.
    """
    second = group.seconds[0]
    summed = {atom for total in group.sums_with(second) for atom in all_roots(total.dims)}
    beside = {group.atom, *(atom for source in form.sources for atom in roots(source.parts))}
    beside |= {*group.stack} - summed

    def inside(path: str) -> list[Atom]:
        dims = seen.dims[path]
        near = {atom for dim in dims if group.atom in roots(dim) for atom in roots(dim)}
        return [a for a in all_roots(dims) if a in summed | near and a not in beside]

    own = heads.atom if heads is not None else None
    read = [atom for atom in inside(second) if atom is not own]
    for source in form.sources:
        values = [atom for atom in inside(source.path) if atom is not own]
        # Without any a channel is one number, at every place that the second layer sums over.
        # Twice the same axis: one may be swapped for the other.
        if values and (values != read or len({*read}) < len(read)):
            return False
    return True


def _reads_one_way(form: Formula, group: Group) -> bool:
    """Whether no first layer is a second one too: its zero rows would be zero columns."""
    return not {source.path for source in form.sources} & {*group.seconds}


def _parts_can_be_said(form: Formula, group: Group, seen: Walked) -> bool:
    """Whether gate and up are halves of one layer, or two whole ones; and parts come first.

    The first literal factor of a pattern is the one that counts the parts.
    """
    if form.gated and len({source.path for source in form.sources}) == 1:
        if any(size_of(source.parts) != 2 for source in form.sources):
            return False
    elif form.gated and any(source.part is not None for source in form.sources):
        return False
    for source in form.sources:
        parts = [*roots(source.parts)]
        dims = [[*roots(dim)] for dim in seen.dims[source.path]]
        factors = [a for dim in dims for a in dim if dim == parts or group.atom in dim]
        if parts and [a for a in factors if a.literal][:1] != parts:
            return False
    return True


def _biases_are_told(form: Formula, group: Group, seen: Walked) -> bool:
    """Whether what stands at the place of a bias is one, so that constants may be folded there."""
    others = {*group.paths} - {source.bias for source in form.sources}
    if any(f"{layer_of(source.path)}/bias" in others for source in form.sources):
        return False
    second = group.seconds[0]
    added = bias_of(group, second, seen)
    if added is None:
        return f"{layer_of(second)}/bias" not in seen.leaves
    beside = [a for dim in seen.dims[second] if group.atom in roots(dim) for a in roots(dim)]
    stack = {*group.stack}  # of which it has the outputs of each
    outputs = [dim for dim in seen.dims[added] if not {*roots(dim)} <= stack]
    return len(outputs) == 1 and not any(atom.literal for atom in beside)


def bias_of(group: Group, second: str, seen: Walked) -> str | None:
    """The parameter that is added to every sum with the second layer, and is all that follows.

    The layer must be summed as it is: scaled, it would scale what a constant channel adds.
    """
    walk = seen.walk
    sums = list(group.sums_with(second))
    axes = {*all_roots(seen.dims[second])}
    if not all(_reads_plainly(t, second) and {*all_roots(t.dims)} <= axes for t in sums):
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
