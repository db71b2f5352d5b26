"""The rules by the names of their primitives."""

from collections.abc import Callable
from typing import TypeVar

from flaxslim._discover._trace import Call, Rule

_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[str, Rule] = {}
CALLS: dict[str, Call] = {}


def axis_rule(*primitives: str) -> Callable[[_Rule], _Rule]:
    """Teach `discover` and `explain` primitives by name; a later rule replaces an earlier one.

    The decorated function takes an equation and returns the dimensions of each output, as
    CONTRIBUTING.md shows. The decorator gives it back as it is.

    >>> @axis_rule("my_negation")
    ... def my_negation(e):
    ...     return [e.inputs[0].dims]
    """

    def register(rule: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def axis_call(*primitives: str) -> Callable[[Call], Call]:
    """The same for primitives that run jaxprs of their own, of which nothing is looked along."""

    def register(rule: Call) -> Call:
        CALLS.update(dict.fromkeys(primitives, rule))
        return rule

    return register
