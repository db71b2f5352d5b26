"""What is killed, interrupted or left without a disk leaves the old or the new, and all of it.

The ordinary run looks at one command; `python tests/faults/kills.py` at all of them, and often.
Kills of the streaming one are in `checkpoint/test_stream.py`.
"""

from collections.abc import Iterator

import pytest

from faults import kills
from faults.kills import COMMANDS, FAULTS, Bench, may_mount, prepared
from faults.server import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def bench(server: Server) -> Iterator[Bench]:
    with prepared("slim", server) as found:
        yield found


def test_the_server_has_no_threads_when_it_forks(server: Server):
    assert server.threads == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_the_old_or_the_new_is_there(bench: Bench, fault: str):
    if fault == "disks" and not may_mount():
        pytest.skip("only root may mount a disk")
    for number in range(2):
        FAULTS[fault](bench, number)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_often(server: Server, name: str):
    with prepared(name, server) as found:
        for fault, happen in FAULTS.items():
            if fault != "disks" or may_mount():
                for number in range(20):
                    happen(found, number)


# --- what would be seen -----------------------------------------------------------------------


def test_a_file_that_is_lost_is_seen(bench: Bench):
    bench.reset()
    next(bench.out.glob("*.safetensors")).unlink()
    with pytest.raises(AssertionError, match="neither old nor new"):
        bench.judge("a loss")


def test_a_mixture_is_seen(bench: Bench):
    bench.reset()
    one = next(iter(sorted(bench.out.glob("*.safetensors"))))
    one.write_bytes(bench.new[one.name])
    with pytest.raises(AssertionError, match="neither old nor new"):
        bench.judge("a mixture")


def test_what_lies_about_is_seen(bench: Bench):
    bench.reset()
    (bench.out.parent / "rest").touch()
    with pytest.raises(AssertionError, match=r"left behind: \['rest'\]"):
        bench.judge("a rest")
    assert kills.state(bench.out) == bench.old
