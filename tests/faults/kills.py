"""Kill commands, fill their disks, interrupt them, run two at once: the old stays, or the new is.

python tests/faults/kills.py --command slim --kills 100 --disks 20 --interrupts 20 --pairs 20
python tests/faults/kills.py                    # every command

Half of the kills and interrupts come at a random moment, half before a random operation on files.
After each the target is, bit for bit, what it was or what it was to be, beside it lies at most what
the next run takes up, and the same command ends with the same result and clears up.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from faults import tiny
from faults.server import Server, serving

Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command that writes.

    Attributes:
      arguments: of a run on one of two models (0 or 1) in a folder, which writes a path.
      left: what a run that was killed may leave beside the target for the next one.
      patch: names of modules that are set in its process, so that it takes less time.
    """

    arguments: Callable[[Path, int, Path], list[object]]
    left: tuple[str, ...] = (".out.new", ".out.old")
    file: bool = False
    patch: dict[str, Any] = dataclasses.field(default_factory=dict)


def _slim(*more: object) -> Callable[[Path, int, Path], list[object]]:
    return lambda top, which, out: ["slim", top / f"model{which}", out, "--overwrite", *more]


def _data(top: Path) -> list[object]:
    sizes = ["--samples", 8, "--batch-size", 4, "--length", 8]
    return ["--calibration", top / "data.npz", *sizes]


def _prune(top: Path, which: int, out: Path) -> list[object]:
    how = ["--keep", 0.5, "--preset", "fast", "--overwrite"]
    return ["prune", top / f"model{which}", out, *_data(top), *how]


def _sweep(top: Path, which: int, out: Path) -> list[object]:
    how = ["--keep", "0.5", "--presets", "magnitude", "--csv", out]
    return ["sweep", top / f"model{which}", *_data(top), *how]


def _export(top: Path, which: int, out: Path) -> list[object]:
    sizes = ["--batch", 1, "--length", 4, "--platforms", "cpu", "--no-verify"]
    return ["export", top / f"model{which}", out, *sizes, "--overwrite"]


_RECIPE = {
    "model.config.hidden_size": 8, "model.config.intermediate_size": 12,
    "model.config.num_hidden_layers": 1, "model.config.num_attention_heads": 2,
    "model.config.patch_size": 4, "train.dense_steps": 0, "train.steps": 6, "train.batch_size": 8,
    "train.warmup": 1, "pruning.begin": 1, "pruning.end": 4, "pruning.every": 1, "shrink.at": [],
    "output.log_every": 3, "output.tensorboard": "false", "output.plot": "false",
    "evaluation.batch_size": 450,
}  # fmt: skip


def _run(top: Path, which: int, out: Path) -> list[object]:
    recipe = {**_RECIPE, "seed": which}
    said = [part for key, value in recipe.items() for part in ("--set", f"{key}={value}")]
    return ["run", "digits", *said, "--out", out, "--overwrite"]


COMMANDS: dict[str, Command] = {
    "slim": Command(arguments=_slim("--no-verify", "--shard-size", "1kB")),
    "slim-in-memory": Command(arguments=_slim("--no-verify", "--format", "flax")),
    "prune": Command(arguments=_prune, left=(".out.new", ".out.old", "out.statistics")),
    "run": Command(
        arguments=_run,
        left=("out.partial", "out.old", ".out.new", ".out.old"),
        patch={"flaxslim.cli._report:_TIMED": 0.0, "flaxslim.cli._report:_LEAST": 1},
    ),
    "export": Command(arguments=_export, file=True, left=(".out.new",)),
    "sweep": Command(arguments=_sweep, file=True, left=(".out.new",)),
}


@dataclasses.dataclass(kw_only=True)
class Bench:
    """A command on its folders, and what it leaves there when nothing disturbs it."""

    name: str
    top: Path
    server: Server
    rng: random.Random
    seconds: float = 0.0
    operations: int = 0
    old: Files = dataclasses.field(default_factory=dict)
    new: Files = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> Command:
        return COMMANDS[self.name]

    @property
    def out(self) -> Path:
        return self.top / "disk" / "out"

    def prepare(self) -> None:
        """Two models, what the command makes of the one at the target, and of the other."""
        source = self.top / "source"
        for path in (source, self.top / "disk"):
            path.mkdir()
        make = tiny.torch_folder if self.name.startswith("slim") else tiny.flax_folder
        for which in (0, 1):
            make(source / f"model{which}", seed=which)
        ids = np.random.default_rng(0).integers(0, tiny.WORDS, (16, 8))
        np.savez(source / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
        for which in (1, 0, 0):  # the first one compiles, the last one finds an earlier result
            began = time.perf_counter()
            code, self.operations = self.server.wait(self.start(which=which))
            self.seconds = time.perf_counter() - began
            assert code == 0, self.said()
            if which:
                self.old = state(self.out)
                copy(self.out, self.top / "before")
        self.new = state(self.out)
        assert self.new != self.old
        self.reset()

    def start(self, output: str = "said", which: int = 0, **how: Any) -> int:
        how.setdefault("patch", self.command.patch)
        arguments = self.command.arguments(self.top / "source", which, self.out)
        return self.server.start(arguments, top=self.top / "disk", output=self.top / output, **how)

    def said(self, output: str = "said") -> str:
        return (self.top / output).read_text(errors="replace")

    def reset(self) -> None:
        """The old state."""
        for path in (self.top / "disk").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy(self.top / "before", self.out)

    # --- what is there afterwards -------------------------------------------------------------

    def judge(self, what: str) -> str:
        """Whether the old or the new is there; raises if it is neither."""
        left = {path.name for path in (self.top / "disk").iterdir()} - {"out"}
        if strange := left - {*self.command.left}:
            raise AssertionError(f"{what}: left behind: {sorted(strange)}\n{self.said()}")
        found = state(self.out) if self.out.exists() else {}
        if found == self.old:
            return "old"
        if self.is_new(found):
            return "new"
        lost = sorted({*self.old} - {*found})
        raise AssertionError(f"{what}: neither old nor new; {lost} lost\n{self.said()}")

    def is_new(self, found: Files) -> bool:
        """The same files, and of those that do not tell the time the same bytes."""
        if found.keys() != self.new.keys():
            return False
        return all(found[name] == self.new[name] for name in found if name.endswith(self.same))

    @property
    def same(self) -> tuple[str, ...]:
        """Ends of the names of files that say nothing of the time that was taken."""
        timed = self.name in ("prune", "run")
        return (".safetensors", ".msgpack", "config.json") if timed else ("",)

    def again(self, what: str) -> None:
        """The same command, undisturbed: it ends with the new, and clears up."""
        code, _ = self.server.wait(self.start("again"))
        if code:
            raise AssertionError(
                f"{what}: then the same command ends with {code}\n{self.said('again')}"
            )
        left = {path.name for path in (self.top / "disk").iterdir()}
        if left != {"out"} or not self.is_new(state(self.out)):
            raise AssertionError(f"{what}: then the same command leaves {sorted(left)}")


def state(path: Path) -> Files:
    """The bytes of a file, or of all files in a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def copy(path: Path, to: Path) -> None:
    """A file, or a folder with all that is in it."""
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, to)


# --- what goes wrong --------------------------------------------------------------------------


def kill(bench: Bench, number: int) -> str:
    """SIGKILL at a random moment, or before a random operation on files."""
    bench.reset()
    if number % 2:
        at = bench.rng.randint(1, bench.operations)
        bench.server.wait(bench.start(at=at, signal=signal.SIGKILL))
        what = f"killed before operation {at} of {bench.operations}"
    else:
        what = _signalled(bench, signal.SIGKILL)
    found = bench.judge(what)
    if bench.seconds < 2 or number % 4 == 3:
        bench.again(what)
    return found


def _signalled(bench: Bench, which: signal.Signals) -> str:
    child = bench.start()
    wait = bench.rng.uniform(0, 1.1 * bench.seconds)
    time.sleep(wait)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, which)
    code, _ = bench.server.wait(child)
    return f"{which.name} after {wait:.3f} s of {bench.seconds:.3f}, code {code}"


def interrupt(bench: Bench, number: int) -> str:
    """Ctrl-C: one line, exit code 130, and nothing half-written; or it had ended."""
    bench.reset()
    if number % 2:
        at = bench.rng.randint(1, bench.operations)
        code, _ = bench.server.wait(bench.start(at=at, signal=signal.SIGINT))
        what = f"interrupted before operation {at} of {bench.operations}, code {code}"
    else:
        what = _signalled(bench, signal.SIGINT)
        code = int(what.rpartition(" ")[2])
    found, said = bench.judge(what), bench.said()
    if code not in (0, 130) or "Traceback" in said or "Exception ignored" in said:
        raise AssertionError(f"{what}\n{said}")
    stopped = [line for line in said.splitlines() if "stopped" in line]
    if code == 130 and len(stopped) != 1:
        raise AssertionError(f"{what}: {len(stopped)} lines say so\n{said}")
    if (code == 130) != (found == "old") and not (code == 130 and found == "new"):
        raise AssertionError(f"{what}: exit code {code}, and the {found} is there\n{said}")
    return f"{found}, {code}"


def pair(bench: Bench, number: int) -> str:
    """Two at once into one target: the first stops before an operation while the second runs."""
    bench.reset()
    at = bench.rng.randint(1, bench.operations)
    first = bench.start("first", at=at, signal=signal.SIGSTOP)
    bench.server.stopped(first)
    second, _ = bench.server.wait(bench.start("second"))
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGCONT)
    code, _ = bench.server.wait(first)
    what = f"two at once, the first held before operation {at}: {code} and {second}"
    said = bench.said("first") + bench.said("second")
    if "unexpected" in said or {code, second} - {0, 1} or code + second == 2:
        raise AssertionError(f"{what}\n{said}")
    left = {path.name for path in (bench.top / "disk").iterdir()}
    if left != {"out"} or not bench.is_new(state(bench.out)):
        raise AssertionError(f"{what}: {sorted(left)} is left\n{said}")
    return f"{code} and {second}"


def full_disk(bench: Bench, number: int) -> str:
    """A disk with too little room for what is written beside what is there."""
    bench.reset()
    pages = sum(_pages(len(data)) for data in bench.new.values())
    with _disk(bench, bench.rng.randint(0, pages)) as room:
        code, _ = bench.server.wait(bench.start(room=bool(number % 2)))
        what, said = f"a disk with {room} bytes free, code {code}", bench.said()
        found = bench.judge(what)
        if code == 0 and found == "new":
            return "it was enough"
        if code != 1 or found != "old" or "unexpected" in said or "error:" not in said:
            raise AssertionError(f"{what}, and the {found} is there\n{said}")
        left = {path.name for path in (bench.top / "disk").iterdir()}
        if left - {"out", "out.partial", "out.statistics"}:
            raise AssertionError(f"{what}: {sorted(left)} is left\n{said}")
    return "refused, nothing kept"


def _pages(size: int) -> int:
    return -(-size // 4096)


@contextlib.contextmanager
def _disk(bench: Bench, room: int) -> Iterator[int]:
    """The folder on a file system of its own, in memory, with so many pages free."""
    disk, there = bench.top / "disk", bench.top / "there"
    disk.rename(there)
    disk.mkdir()
    pages = max(room + sum(_pages(p.stat().st_size) for p in there.rglob("*") if p.is_file()), 1)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(disk)], check=True
    )
    try:
        for path in there.iterdir():
            copy(path, disk / path.name)
        yield shutil.disk_usage(disk).free
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        disk.rmdir()
        there.rename(disk)


FAULTS: dict[str, Callable[[Bench, int], str]] = {
    "kills": kill,
    "disks": full_disk,
    "interrupts": interrupt,
    "pairs": pair,
}


@contextlib.contextmanager
def prepared(name: str, server: Server, seed: int = 0) -> Iterator[Bench]:
    """A command that is ready to be disturbed."""
    memory = Path("/dev/shm")  # where to flush a file costs nothing
    where = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="kills-", dir=where) as top:
        bench = Bench(name=name, top=Path(top), server=server, rng=random.Random(seed))
        bench.prepare()
        yield bench


def may_mount() -> bool:
    """Whether this user may put a file system anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        if made.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return made.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--command", choices=COMMANDS, nargs="*", default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    for fault, count in zip(FAULTS, (100, 20, 20, 20), strict=True):
        parser.add_argument(f"--{fault}", type=int, default=count)
    given, bad = parser.parse_args(), 0
    if given.disks and not may_mount():
        print("no full disks: only root may mount one")
        given.disks = 0
    with serving() as server:
        print(f"the server has {server.threads} threads when it forks", flush=True)
        for name in given.command:
            with prepared(name, server, given.seed) as bench:
                head = f"{name}: {bench.operations} operations on files in {bench.seconds:.2f} s"
                print(head, flush=True)
                for fault, happen in FAULTS.items():
                    bad += _many(bench, fault, happen, getattr(given, fault))
    print(f"{bad} wrong")
    return int(bool(bad))


def _many(bench: Bench, fault: str, happen: Callable[[Bench, int], str], count: int) -> int:
    found: collections.Counter[str] = collections.Counter()
    for number in range(count):
        try:
            found[happen(bench, number)] += 1
        except AssertionError as error:
            found["WRONG"] += 1
            print(f"  WRONG {fault} {number}: {error}", flush=True)
    if count:
        text = ", ".join(f"{n} {what}" for what, n in sorted(found.items()))
        print(f"  {count} {fault}: {text}", flush=True)
    return found["WRONG"]


if __name__ == "__main__":
    sys.exit(main())
