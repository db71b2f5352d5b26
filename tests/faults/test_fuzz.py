"""Broken files are refused in our words, or read right; and the fuzzer sees all that it is for."""

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import fuzz
from faults.fuzz import Watch, case, judged, workshop
from faults.reader import Reader
from faults.readers import HEAVY, READERS
from flaxslim.errors import CorruptFileError


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n in HEAVY else []) for n in READERS],
)
def test_what_is_broken_is_refused_or_read_right(name: str, watch: Watch):
    with workshop(name) as top:

        @hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
        @given(st.randoms(use_true_random=False))
        def broken(random: Random) -> None:
            found = case(name, top, random, watch)
            assert not found.finding, f"{found.kind}\n{found.said}"

        broken()


@pytest.mark.parametrize("name", [n for n in READERS if n not in HEAVY])
def test_what_is_not_broken_is_read(name: str, watch: Watch):
    """Or the test above would be content with readers that refuse everything."""
    with workshop(name) as top:
        assert judged(READERS[name], top / "good", Random(0), watch).kind == "read"


# --- what the fuzzer sees ---------------------------------------------------------------------


def _refuses(folder: Path, random: Random) -> None:
    raise CorruptFileError("no")


def _looks_outside(folder: Path, random: Random) -> None:
    (folder / "../outside/secret").read_bytes()


def _writes(folder: Path, random: Random) -> None:
    (folder / "new").write_text("x")


def _hangs(folder: Path, random: Random) -> None:
    while True:
        try:
            time.sleep(1)
        except Exception:
            continue


def _takes_memory(folder: Path, random: Random) -> None:
    np.ones(300 * 10**6, np.uint8)


def _fails(folder: Path, random: Random) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("open", "kind"),
    [
        (_refuses, "refused"),
        (lambda folder, random: None, "read"),
        (_fails, "KeyError"),
        (_looks_outside, "touched"),
        (_writes, "touched"),
        (_hangs, "Hang"),
        (_takes_memory, "memory"),
    ],
)
def test_a_reader_of_each_kind(open: Any, kind: str, watch: Watch, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "HANG", 1)
    for name in ("case", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "secret").write_text("x")
    reader = Reader(make=lambda _: None, spoil=lambda *_: None, open=open)
    found = judged(reader, tmp_path / "case", Random(0), watch)
    assert found.kind == kind
    assert found.finding == (kind not in ("refused", "read"))


def test_a_case_is_the_same_each_time(watch: Watch):
    def files(number: int) -> Iterator[bytes]:
        with workshop("safetensors") as top:
            case("safetensors", top, fuzz.random_of("safetensors", 0, number), watch)
            yield from (p.read_bytes() for p in sorted((top / "case").iterdir()))

    assert [*files(3)] == [*files(3)]
    assert [*files(3)] != [*files(4)]
