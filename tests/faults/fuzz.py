"""Break files at random, and see that every reader refuses them in our words, or reads them right.

python tests/faults/fuzz.py --minutes 60 --seed 0
python tests/faults/fuzz.py --reader msgpack --case 123 --seed 0     # one case again, by itself

A finding is: an exception that is no `FlaxslimError`, a hang of 20 seconds, memory beyond twice
the files and 200 MB, or a file that is opened for writing, or outside of the folder.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from faults.reader import Reader
from faults.readers import READERS
from flaxslim.errors import FlaxslimError

HANG, MEMORY = 20, 200 * 10**6  # seconds; bytes beside twice the files


class Hang(BaseException):
    """Of which nothing is caught on its way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """`kind` is "refused", "read", or what is wrong; `said` the message or the traceback."""

    kind: str
    said: str = ""

    @property
    def finding(self) -> bool:
        return self.kind not in ("refused", "read")


class Watch:
    """What is opened while a case is read. An audit hook stays for the life of the process."""

    def __init__(self) -> None:
        self.top: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.top is None or event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if not isinstance(args[0], str | bytes | os.PathLike):
            return
        path, top = os.path.abspath(os.fsdecode(args[0])), self.top
        written = event != "open" or (
            isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (written and not path.startswith("/dev/")) or f"{top}/outside" in os.path.realpath(path):
            self.seen.append(f"{event} {path}")

    @contextlib.contextmanager
    def on(self, top: Path) -> Iterator[None]:
        self.top, self.seen = str(top.resolve()), []
        try:
            yield
        finally:
            self.top = None


def judged(reader: Reader, folder: Path, random: Random, watch: Watch) -> Outcome:
    """What comes of reading a folder, in which a case lies."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    before = _memory()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(HANG)
    try:
        with watch.on(folder.parent), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.open(folder, random)
        found = Outcome(kind="read")
    except FlaxslimError as error:
        found = Outcome(kind="refused", said=str(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # that of Rust's panics is no Exception
        lines = traceback.format_exception(error)
        said = "".join(line for line in lines if f"{os.sep}flaxslim{os.sep}" in line)
        found = Outcome(kind=type(error).__name__, said=said[-3000:] + lines[-1][:300])
    finally:
        signal.alarm(0)
    if (taken := _memory() - before) > 2 * size + MEMORY:
        return Outcome(kind="memory", said=f"{taken / 1e6:.0f} MB for files of {size} bytes")
    if watch.seen:
        return Outcome(kind="touched", said="; ".join(watch.seen[:5]))
    return found


def _hang(*_: Any) -> None:
    raise Hang


def _memory() -> int:
    """The most memory since the last call, in bytes."""
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(text.partition("VmHWM:")[2].split()[0])
    return 0


@contextlib.contextmanager
def workshop(name: str) -> Iterator[Path]:
    """A folder with a good file of a reader in it, and files outside that nobody may read."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        READERS[name].make(Path(top, "good"))
        with contextlib.suppress(FlaxslimError):  # and what is imported has been
            READERS[name].open(Path(top, "good"), Random(0))
        outside = Path(top, "outside")
        outside.mkdir()
        for file in sorted(Path(top, "good").rglob("*.safetensors"))[:1]:
            shutil.copy(file, outside / "secret.safetensors")
        yield Path(top)


def case(name: str, top: Path, random: Random, watch: Watch) -> Outcome:
    """A broken copy of the good file, and what comes of it."""
    folder = top / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(top / "good", folder)
    READERS[name].spoil(folder, random)
    return judged(READERS[name], folder, random, watch)


def random_of(name: str, seed: int, number: int) -> Random:
    return Random(f"{seed} {name} {number}")


# --- long runs --------------------------------------------------------------------------------


def work(name: str, seed: int, seconds: float, progress: Path) -> None:
    """In a process of its own: cases until the time is over; counts go to a file as JSON."""
    counts: collections.Counter[str] = collections.Counter()
    findings: dict[str, Any] = {}
    ends, number, watch = time.monotonic() + seconds, 0, Watch()
    with workshop(name) as top:
        while time.monotonic() < ends:
            progress.write_text(json.dumps([number, counts, findings]))
            found = case(name, top, random_of(name, seed, number), watch)
            counts[found.kind] += 1
            if found.finding:
                where = [line for line in found.said.splitlines() if line.startswith("  File")]
                same = " ".join([found.kind, *where[-1:]])
                findings.setdefault(same, {"case": number, "said": found.said})
            number += 1
    progress.write_text(json.dumps([number, counts, findings]))


def run(names: list[str], seed: int, minutes: float, at_once: int) -> int:
    """All readers in turns, `at_once` of them at a time; prints a table, returns the findings."""
    waiting, running, bad = list(names), {}, 0
    seconds = 60 * minutes * at_once / len(names)
    print(f"{'reader':14}{'cases':>9}{'refused':>9}{'read':>9}{'findings':>10}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                progress = Path(folder, name)
                command = [sys.executable, __file__, "--work", name, str(progress)]
                command += ["--seed", str(seed), "--minutes", str(seconds / 60)]
                running[name] = (subprocess.Popen(command), time.monotonic() + seconds + 120)
            time.sleep(0.5)
            for name, (process, ends) in list(running.items()):
                if process.poll() is None and time.monotonic() < ends:
                    continue
                del running[name]
                if process.poll() is None:
                    process.kill()
                bad += _told(name, Path(folder, name), process.wait())
    print(f"{bad} findings")
    return bad


def _told(name: str, progress: Path, code: int) -> int:
    number, counts, findings = (
        json.loads(progress.read_text()) if progress.is_file() else (0, {}, {})
    )
    if code:
        findings[f"ended with {code}"] = {"case": number, "said": ""}
    fine = counts.get("refused", 0), counts.get("read", 0)
    row = "".join(f"{n:>9,}" for n in (number, *fine))
    print(f"{name:14}{row}{sum(counts.values()) - sum(fine):>10,}")
    for kind, found in findings.items():
        print(f"  {kind}\n  --reader {name} --case {found['case']}")
        print("    " + "\n    ".join(found["said"].splitlines()[-20:]), flush=True)
    return len(findings)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, nargs="*", default=list(READERS))
    parser.add_argument("--at-once", type=int, default=1, help="processes")
    parser.add_argument("--case", type=int, help="only this one, of one reader")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], given.seed, 60 * given.minutes, Path(given.work[1]))
        return 0
    if given.case is not None:
        (name,) = given.reader
        with workshop(name) as top:
            found = case(name, top, random_of(name, given.seed, given.case), Watch())
            print(f"{found.kind}\n{found.said}\nin {top}/case:")
            for path in sorted(p for p in (top / "case").rglob("*") if p.is_file()):
                print(f"  {path.relative_to(top / 'case')}: {path.read_bytes()[:2000]!r}")
        return int(found.finding)
    return int(run(given.reader, given.seed, given.minutes, given.at_once) > 0)


if __name__ == "__main__":
    sys.exit(main())
