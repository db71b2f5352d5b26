"""Times by width, on a clock that only the fake model moves: noise, sums, and the cache."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from flaxslim.errors import BudgetError
from flaxslim.posttraining import _latency
from flaxslim.posttraining._budget import Item, solve
from flaxslim.posttraining._latency import Curve, Table, default_cache, measure, rising

DENSE = {"f": 1536, "h": 12}
GRID = {"f": [0, 512, 1024], "h": [0, 3, 6]}


class Machine:
    """A model on a machine that is busy at times: `true` milliseconds, times its load."""

    def __init__(
        self, noise: float = 0.0, drift: float = 0.0, hiccup: int = 0, compiling: float = 0.0
    ):
        self.now, self.calls = 0.0, 0
        self.noise, self.drift, self.hiccup, self.compiling = noise, drift, hiccup, compiling
        self.rng = np.random.default_rng(0)
        self.asked: list[dict[str, int]] = []

    @staticmethod
    def true(f: int, h: int) -> float:
        return 2.0 + 4.0 * f / 1536 + 2.0 * h / 12

    def run(self, widths):
        self.asked.append(dict(widths))
        first = True

        def once():
            nonlocal first
            self.calls += 1
            load = (1 + self.drift * self.calls) * (1 + self.noise * self.rng.exponential())
            if first:
                load += self.compiling
            if self.hiccup and self.calls % self.hiccup == 0:
                load *= 50
            first = False
            self.now += 1e-3 * self.true(**widths) * load

        return once

    def measure(self, grid: Any = GRID, **how: Any) -> Table:
        how = {"device": "toy", "dtype": "float32", "shapes": "8 128"} | how
        return measure(self.run, DENSE, grid, clock=lambda: self.now, **how)


def test_a_quiet_machine_is_measured_exactly():
    machine = Machine(compiling=1e4)
    table = machine.measure()
    assert table.base == pytest.approx(8.0)
    assert table.curves["f"].widths == (0, 512, 1024, 1536)
    assert table.curves["f"].ms == pytest.approx([4.0, 16 / 3, 20 / 3, 8.0])
    assert table.curves["h"].ms == pytest.approx([6.0, 6.5, 7.0, 8.0])
    assert (table.device, table.dtype, table.shapes) == ("toy", "float32", "8 128")


def test_one_group_is_narrow_at_a_time():
    machine = Machine()
    machine.measure({"f": [1024, 512, 1536, 512], "h": []})
    assert machine.asked == [DENSE, DENSE | {"f": 512}, DENSE | {"f": 1024}]


def test_a_machine_that_gets_busier_does_not_bend_the_curve():
    # From the first call to the last it becomes several times as slow.
    table = Machine(drift=0.05).measure(repeats=16)
    shares = np.array(table.curves["f"].ms) / table.base
    np.testing.assert_allclose(shares, [0.5, 2 / 3, 5 / 6, 1.0], rtol=0.002)


def test_a_hiccup_now_and_then_is_not_seen():
    table = Machine(hiccup=11).measure()
    assert table.base == pytest.approx(8.0)
    assert table.curves["f"].ms == pytest.approx([4.0, 16 / 3, 20 / 3, 8.0])


def test_noise_is_mostly_gone_from_the_ratios():
    table = Machine(noise=0.1).measure(repeats=51)
    for curve, true in zip(
        (table.curves["f"], table.curves["h"]),
        ([0.5, 2 / 3, 5 / 6, 1.0], [0.75, 0.8125, 0.875, 1.0]),
        strict=True,
    ):
        np.testing.assert_allclose(np.array(curve.ms) / table.base, true, rtol=0.05)


@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_times_never_fall_as_widths_rise(noise):
    table = Machine(noise=noise).measure({"f": range(0, 1536, 64)}, repeats=3)
    assert (np.diff(table.curves["f"].ms) >= 0).all()
    assert table.curves["f"].ms[-1] == table.base


def test_every_width_is_warmed_up_and_told_of():
    machine, told = Machine(), []
    machine.measure(repeats=5, told=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    assert machine.calls == 6 * 2 * (3 + 5)


def test_an_empty_grid_measures_the_dense_model():
    table = Machine().measure({})
    assert table.base == pytest.approx(8.0)
    assert table.predict({}) == table.base


# --- prediction ---------------------------------------------------------------------------------


def table() -> Table:
    return Machine().measure()


@quick
@given(
    st.lists(st.integers(0, 1536), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
)
def test_what_sites_save_adds_up(f, h):
    found = table()
    both = found.predict({"f": f, "h": h})
    saved = [found.base - found.predict(one) for one in ({"f": f}, {"h": h})]
    assert both == pytest.approx(found.base - sum(saved))
    costs = [found.costs("f", f, len(f)), found.costs("h", h, len(h))]
    assert both == pytest.approx(found.base + sum(map(np.sum, costs)))
    assert all((cost <= 0).all() for cost in costs)


def test_all_sites_of_a_group_at_a_width_take_what_was_measured():
    found = table()
    assert found.predict({"f": [512] * 12}) == pytest.approx(found.curves["f"].ms[1])
    assert found.predict({"f": [1536] * 12, "h": [12] * 12}) == found.base


def test_lines_are_drawn_between_widths_and_none_below_them():
    found = Machine().measure({"f": [512, 1024]})
    assert found.predict({"f": [768]}) == pytest.approx(6.0)
    assert found.predict({"f": [0]}) == found.predict({"f": [512]})


def test_costs_are_what_a_budget_is_solved_with():
    found, widths = table(), np.array([0, 512, 1024, 1536])
    errors = np.array([9.0, 4.0, 1.0, 0.0])
    items = [
        Item(name=str(n), widths=widths, errors=n * errors, costs=found.costs("f", widths, 4))
        for n in range(1, 5)
    ]
    limit = found.base / 1.3
    chosen = solve(items, limit, fixed=found.base, unit="ms")
    assert found.predict({"f": [int(widths[k]) for k in chosen]}) <= limit


def test_a_group_that_was_not_measured_is_named():
    with pytest.raises(BudgetError, match="no times were measured") as error:
        table().predict({"ff": [1]})
    assert error.value.near == ("f",)


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"g": [1]}, "one of f, h"),
        ({"f": [1537]}, "from 0 to 1536"),
        ({"f": [-1]}, "from 0 to 1536"),
    ],
)
def test_a_grid_that_cannot_be_cut(grid, said):
    machine = Machine()
    with pytest.raises(BudgetError, match=said):
        machine.measure(grid)
    assert not machine.calls


def test_a_clock_that_stands_still():
    with pytest.raises(BudgetError, match="the clock stands still"):
        measure(Machine().run, DENSE, GRID, device="toy", clock=lambda: 0.0)


def test_no_round_measures_nothing():
    with pytest.raises(BudgetError, match="repeats=0"):
        Machine().measure(repeats=0)


# --- the rising fit -----------------------------------------------------------------------------


values = st.lists(st.floats(-1e3, 1e3), max_size=12)


@quick
@given(values, st.data())
def test_no_rising_sequence_is_nearer(y, data):
    fit = np.array(rising(y))
    assert len(fit) == len(y)
    assert (np.diff(fit) >= -1e-9).all()
    other = np.sort(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=len(y), max_size=len(y))))
    for step in (1.0, 0.1, 0.01):  # towards any other one, since near ones tell more
        trial = fit + step * (other - fit)
        assert ((fit - y) ** 2).sum() <= ((trial - y) ** 2).sum() + 1e-6


@quick
@given(values)
def test_what_rises_is_left_as_it_is(y):
    assert rising(sorted(y)) == sorted(y)
    assert math.fsum(rising(y)) == pytest.approx(math.fsum(y), abs=1e-6)


# --- the cache ----------------------------------------------------------------------------------


def test_json_keeps_every_bit():
    found = Machine(noise=0.3).measure()
    assert Table.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("old", "new"),
    [('"base": ', f'"base": 1{400 * "0"}, "x": '), ('"widths": [', '"widths": [Infinity,')],
)
def test_numbers_that_are_none_are_no_table(old, new):
    text = Machine().measure().to_json()
    assert old in text
    with pytest.raises(ValueError, match="not a table of times"):
        Table.from_json(text.replace(old, new))


def test_a_table_is_measured_once(tmp_path: Path):
    first = Machine(noise=0.1)
    found = first.measure(cache=tmp_path / "a" / "b")
    again = Machine(noise=0.2)
    assert again.measure(cache=tmp_path / "a" / "b") == found
    assert not again.asked
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1  # and nothing temporary


@pytest.mark.parametrize(
    "other",
    [
        {"device": "another"},
        {"dtype": "bfloat16"},
        {"shapes": "1 128"},
        {"key": "another config"},
        {"grid": {"f": [0, 512]}},
    ],
)
def test_a_table_of_something_else_is_not_taken(tmp_path: Path, other):
    Machine().measure(cache=tmp_path)
    machine = Machine()
    machine.measure(**other, cache=tmp_path)
    assert machine.asked


def test_a_table_of_another_dense_model_is_not_taken(tmp_path: Path):
    machine = Machine()
    for heads in (12, 24):
        measure(
            machine.run,
            {"f": 1536, "h": heads},
            {"f": [0]},
            device="toy",
            cache=tmp_path,
            clock=lambda: machine.now,
        )
    assert machine.asked[-1] == {"f": 0, "h": 24}


def test_a_table_of_another_jax_is_not_taken(tmp_path: Path, monkeypatch):
    Machine().measure(cache=tmp_path)
    monkeypatch.setattr(_latency.jax, "__version__", "99.0")
    machine = Machine()
    machine.measure(cache=tmp_path)
    assert machine.asked


def broken(text: str) -> list[str]:
    """What a file may become: cut off, of another program, or with times that are none."""
    data = json.loads(text)
    other = [data | {"asked": {}}, {"asked": data["asked"]}, data | {"table": [1]}]
    for change in (
        {"base": None},
        {"base": -1.0},
        {"base": math.nan},
        {"curves": {"f": [1, 2]}},
        {"curves": {"f": {"widths": [0, 1], "ms": [1.0]}}},
        {"curves": {"f": {"widths": [0, 1], "ms": [1.0, math.inf]}}},
        {"curves": {"f": {"widths": [1, 0], "ms": [1.0, 2.0]}}},
    ):
        other.append(data | {"table": data["table"] | change})
    return ["", text[: len(text) // 2], "[]", "null", "[" * 10_000, *map(json.dumps, other)]


def test_a_corrupt_file_is_measured_anew_and_rewritten(tmp_path: Path):
    found = Machine().measure(cache=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_text()
    bad = [text.encode() for text in broken(good)]
    for text in (*bad, b"\xff\xfe\x00"):
        path.write_bytes(text)
        machine = Machine()
        assert machine.measure(cache=tmp_path) == found, text[:60]
        assert machine.asked
        assert path.read_text() == good


def test_a_folder_that_cannot_be_written_costs_no_table(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    assert Machine().measure(cache=tmp_path / "file").base == pytest.approx(8.0)
    assert "are not kept" in caplog.text


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch):
    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    Machine().measure(cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_cache_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Machine().measure()
    assert not list(tmp_path.iterdir())


def test_the_folder_of_tables_is_where_the_desktop_keeps_its_caches(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "flaxslim" / "latency"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache() == Path.home() / ".cache" / "flaxslim" / "latency"


def test_the_device_is_named():
    found = measure(Machine().run, DENSE, {}, clock=iter(range(10**6)).__next__)
    assert found.device == _latency.this_device()
    assert found.device.startswith("cpu (")


def test_a_curve_has_a_time_for_each_width():
    with pytest.raises(ValueError, match="not a time for each width"):
        Curve(widths=(0, 1), ms=(1.0,))
