"""What each primitive does to the axes of its inputs: a table, to which others can add.

    @axis_rule("rev")
    def reverse(e):
        ...
        return [dims]

A rule gets an `Equation` and returns for each output its dimensions, or a `Value` where it knows
how that came about. It joins dimensions that are the same axis (`e.same`), notes sums (`e.sum`),
and blocks what cannot be cut (`e.block`); dimensions of an output along which indices are no longer
those of an input are new (`e.fixed`, or `e.new` where all entries are the same). What has no rule
blocks everything that enters it and is named.
"""

# Each fills the table.
from flaxslim._discover._rules import _calls as _calls
from flaxslim._discover._rules import _devices as _devices
from flaxslim._discover._rules import _elementwise as _elementwise
from flaxslim._discover._rules import _indexing as _indexing
from flaxslim._discover._rules import _moves as _moves
from flaxslim._discover._rules import _reductions as _reductions
from flaxslim._discover._rules import _sums as _sums
from flaxslim._discover._rules._table import CALLS, RULES
from flaxslim._discover._trace import Call, Equation, Rule


def rule_for(primitive: str) -> Rule:
    """The rule of a primitive; what has none blocks all that enters it."""
    return RULES.get(primitive, Equation.unknown)


def call_for(primitive: str) -> Call | None:
    """The rule of a primitive that runs jaxprs of its own."""
    return CALLS.get(primitive)
