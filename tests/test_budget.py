"""Which width each place gets: against brute force, within the limit, and what people type."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import quick

from flaxslim.errors import BudgetError
from flaxslim.posttraining._budget import (
    Item,
    parse_bytes,
    parse_count,
    parse_ms,
    parse_speedup,
    shown,
    solve,
)


def item(costs, errors, name="layer") -> Item:
    return Item(
        name=name, widths=np.arange(len(costs)), errors=np.asarray(errors), costs=np.asarray(costs)
    )


def total(items, chosen, of="costs") -> float:
    return math.fsum(float(getattr(i, of)[k]) for i, k in zip(items, chosen, strict=True))


@st.composite
def small(draw):
    """Up to 4 items of up to 5 widths: costs in any order, errors that fall to 0."""
    items = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        costs = draw(st.lists(st.integers(-20, 50), min_size=size, max_size=size))
        steps = draw(st.lists(st.integers(0, 30), min_size=size - 1, max_size=size - 1))
        items.append(item(costs, [*np.cumsum(steps)[::-1], 0]))
    return items


@settings(quick, max_examples=200)
@given(small(), st.integers(-100, 200), st.integers(-30, 30))
def test_no_choice_within_the_limit_errs_less(items, limit, fixed):
    rows = itertools.product(*(range(len(i.costs)) for i in items))
    fitting = [row for row in rows if fixed + total(items, row) <= limit]
    if not fitting:
        with pytest.raises(BudgetError, match="even the cheapest widths exceed the limit"):
            solve(items, limit, fixed=fixed)
        return
    # A bin for each unit of the room is enough, and more do no harm.
    room = limit - fixed - sum(min(i.costs) for i in items)
    chosen = solve(items, limit, fixed=fixed, bins=max(room + room // 3, 1))
    best = min((total(items, row, "errors"), total(items, row)) for row in fitting)
    assert fixed + total(items, chosen) <= limit
    # Of those that err alike, none is cheaper.
    assert (total(items, chosen, "errors"), total(items, chosen)) == best


def random_items(rng, count, widths):
    """Costs and errors that are no multiples of anything, as of layers that differ in worth."""
    items = []
    for _ in range(count):
        costs = np.cumsum(rng.uniform(0.1, 1.0, widths))
        errors = np.append(np.cumsum(rng.exponential(size=widths - 1))[::-1] ** 2, 0.0)
        items.append(item(costs, errors * rng.exponential()))
    return items


@quick
@given(st.integers(0, 10**6), st.floats(0.0, 1.1), st.sampled_from([1, 7, 50, 4096]))
def test_the_limit_holds_however_coarse_the_bins_are(seed, share, bins):
    rng = np.random.default_rng(seed)
    items = random_items(rng, rng.integers(1, 9), 6)
    least, most = (total(items, [k] * len(items)) for k in (0, -1))
    limit = least + share * (most - least)
    chosen = solve(items, 3.0 + limit, fixed=3.0, bins=bins)
    assert total(items, chosen) <= limit * (1 + 1e-12)


@quick
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.sampled_from([7, 50, 4096]))
def test_no_room_is_left_for_any_wider_layer(seed, share, bins):
    rng = np.random.default_rng(seed)
    items = random_items(rng, rng.integers(2, 9), 6)
    least, most = (total(items, [k] * len(items)) for k in (0, -1))
    limit = least + share * (most - least)
    chosen = solve(items, limit, bins=bins)
    for i, k in enumerate(chosen):
        for wider in range(k + 1, 6):
            trial = [*chosen[:i], wider, *chosen[i + 1 :]]
            assert total(items, trial) > limit * (1 - 1e-12)


def test_many_layers_come_near_to_what_no_choice_can_beat():
    rng = np.random.default_rng(0)
    items = random_items(rng, 200, 64)
    limit = 0.5 * total(items, [-1] * 200)
    chosen = solve(items, limit)
    # For any price, the least of error plus price times cost is a lower bound.
    bound = max(
        sum((i.errors + price * i.costs).min() for i in items) - price * limit
        for price in np.geomspace(10, 1e4, 400)
    )
    assert total(items, chosen) <= limit
    assert bound <= total(items, chosen, "errors") <= 1.001 * bound


def test_layers_that_matter_more_stay_wider():
    widths = np.arange(0, 1537, 128)
    missing = 1 - widths / 1536
    worth = [1.0, 10.0, 100.0]
    items = [
        Item(name="layer", widths=widths, errors=w * missing**2, costs=769 * widths) for w in worth
    ]
    chosen = solve(items, 769 * 1536 * 1.5)
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[2]


def test_the_dense_cost_as_the_limit_gives_the_dense_widths():
    items = random_items(np.random.default_rng(1), 48, 20)
    for fixed in (0.0, 0.1):
        # Whoever adds up in another order may come out a little lower.
        limit = np.nextafter(fixed + total(items, [-1] * 48), 0)
        assert solve(items, limit, fixed=fixed) == [19] * 48


def test_the_least_cost_as_the_limit_gives_the_narrowest_widths():
    items = random_items(np.random.default_rng(2), 48, 20)
    assert solve(items, np.nextafter(total(items, [0] * 48), 0)) == [0] * 48


@pytest.mark.parametrize(
    ("costs", "errors", "chosen"),
    [
        ([1, 4, 3], [5, 1, 0], 2),  # a wider one that is cheaper
        ([2, 2, 9], [5, 1, 0], 1),  # as cheap
        ([0, 1, 2, 3], [7, 0, 0, 0], 1),  # dead channels cost nothing to lose
        ([2, 2, 2], [0, 0, 0], 2),  # nothing to gain
    ],
)
def test_a_width_that_another_beats_is_never_chosen(costs, errors, chosen):
    assert solve([item(costs, errors)], 3) == [chosen]


def test_nothing_to_choose():
    assert solve([], 5, fixed=5) == []
    with pytest.raises(BudgetError, match="even the cheapest"):
        solve([], 4, fixed=5)


# --- what cannot be -----------------------------------------------------------------------------


def test_an_error_says_what_can_be_reached():
    items = [item([5_240_001, 20_000_000], [1.0, 0.0])] * 2
    with pytest.raises(BudgetError) as error:
        solve(items, 15_000_000, fixed=5_000_000)
    assert "found:    a limit of 15 M parameters" in str(error.value)
    assert "at least 15.49 M parameters, of which 5 M parameters cannot be cut" in str(error.value)
    assert solve(items, parse_count("15.49M"), fixed=5_000_000) == [0, 0]


@pytest.mark.parametrize("unit", ["parameters", "bytes", "FLOPs", "ms"])
def test_what_can_be_reached_never_looks_like_the_limit(unit):
    with pytest.raises(BudgetError) as error:
        solve([item([15_290_001, 90_000_000], [1.0, 0.0])], 15_290_000, unit=unit)
    least, limit = str(error.value.expected), str(error.value.seen)
    assert least.split()[2] != limit.split()[3]


def test_times_that_do_not_fall_with_width_meet_no_limit():
    items = [item([-0.02, -0.01, 0.0], [2.0, 1.0, 0.0])] * 2
    with pytest.raises(BudgetError, match="latency does not fall with width") as error:
        solve(items, 3.0, fixed=3.41, unit="ms")
    assert "3.41 ms dense, 3.37 ms at the least widths" in str(error.value)
    assert "larger batch" in str(error.value)
    assert "a number of parameters as the goal" in str(error.value)
    assert solve(items, 3.41, fixed=3.41, unit="ms") == [2, 2]
    # A number of parameters is exact, and small differences of it are real.
    assert total(items, solve(items, 3.39, fixed=3.41)) <= -0.02


def test_times_that_fall_meet_a_limit():
    items = [item([-1.0, -0.5, 0.0], [4.0, 1.0, 0.0])] * 2
    assert solve(items, 3.0, fixed=4.0, unit="ms") == [1, 1]
    with pytest.raises(BudgetError) as error:
        solve(items, 1.5, fixed=4.0, unit="ms")
    assert error.value.expected == "at least 2 ms"


@pytest.mark.parametrize("limit", [math.nan, math.inf, -math.inf])
def test_a_limit_is_a_number(limit):
    with pytest.raises(BudgetError, match="a limit is a number"):
        solve([item([0, 1], [1, 0])], limit)


@pytest.mark.parametrize(
    ("widths", "errors", "costs", "problem"),
    [
        ([0, 1], [0.0], [0.0, 1.0], "not as many"),
        ([], [], [], "not as many"),
        ([0, 1], [math.nan, 0.0], [0.0, 1.0], "not finite"),
        ([0, 1], [1.0, 0.0], [0.0, math.inf], "not finite"),
        ([1, 0], [1.0, 0.0], [0.0, 1.0], "do not ascend"),
    ],
)
def test_an_item_that_makes_no_sense(widths, errors, costs, problem):
    with pytest.raises(BudgetError, match=problem) as error:
        Item(name="a/b", widths=widths, errors=errors, costs=costs)
    assert error.value.path == "a/b"


# --- in words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (15_200_000, "parameters", "15.2 M parameters"),
        (999, "parameters", "999 parameters"),
        (0, "parameters", "0 parameters"),
        (1.5e9, "parameters", "1.5 B parameters"),
        (999_960, "parameters", "1 M parameters"),
        (30_400_000, "bytes", "30.4 MB"),
        (12, "bytes", "12 B"),
        (2.5e12, "FLOPs", "2.5 TFLOPs"),
        (3.41, "ms", "3.41 ms"),
        (1234.5, "ms", "1234 ms"),
        (-0.25, "ms", "-0.25 ms"),
    ],
)
def test_amounts_are_shown_as_people_say_them(value, unit, text):
    assert shown(value, unit) == text


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "15M", 15_000_000),
        (parse_count, "15 m", 15_000_000),
        (parse_count, "1.5B", 1_500_000_000),
        (parse_count, "1.1B", 1_100_000_000),
        (parse_count, "350k", 350_000),
        (parse_count, ".5k", 500),
        (parse_count, "15_000_000", 15_000_000),
        (parse_count, "15e6", 15_000_000),
        (parse_count, 7, 7),
        (parse_count, np.int64(7), 7),
        (parse_count, 1.1 * 1e9, 1_100_000_000),
        (parse_bytes, "30MB", 30_000_000),
        (parse_bytes, "1.2 GB", 1_200_000_000),
        (parse_bytes, "64 MiB", 64 * 2**20),
        (parse_bytes, "12B", 12),
        (parse_bytes, 12, 12),
        (parse_ms, "4ms", 4.0),
        (parse_ms, " 4 ms ", 4.0),
        (parse_ms, "0.004s", 4.0),
        (parse_ms, "250µs", 0.25),
        (parse_ms, "250 us", 0.25),
        (parse_ms, "3.41", 3.41),
        (parse_ms, 4.0, 4.0),
        (parse_ms, 1e-5, 1e-5),
        (parse_speedup, "1.5x", 1.5),
        (parse_speedup, "2 ×", 2.0),
        (parse_speedup, "1.5", 1.5),
        (parse_speedup, 2, 2.0),
        (parse_speedup, 1.0, 1.0),
    ],
)
def test_goals_are_read_as_people_type_them(parse, text, value):
    found = parse(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_count, "30MB", "15M"),
        (parse_count, "many", "15M"),
        (parse_count, "", "15M"),
        (parse_count, "1.5", "whole"),
        (parse_count, "-5M", "15M"),
        (parse_count, "0", "above 0"),
        (parse_count, "1,5M", "15M"),
        (parse_count, True, "15M"),
        (parse_count, None, "15M"),
        (parse_count, math.nan, "15M"),
        (parse_count, "1e999999999", "15M"),
        (parse_count, "1e-99", "whole"),
        (parse_bytes, "30M", "30MB"),
        (parse_bytes, "1.5B", "whole"),
        (parse_ms, "4x", "4ms"),
        (parse_ms, 0.0, "above 0"),
        (parse_ms, math.inf, "4ms"),
        (parse_speedup, "4ms", "1.5x"),
        (parse_speedup, "0.5x", 'type "2x"'),
    ],
)
def test_nonsense_is_told_what_to_type(parse, text, said):
    with pytest.raises(BudgetError) as error:
        parse(text)
    assert said in str(error.value)
    assert repr(text) in str(error.value)
