"""Commands in processes that are forked from one which has all imports: milliseconds, not seconds.

The server starts no thread and touches no device before it forks, so that each command starts as
in a new interpreter (`threads` says how many there are). A command can be told to be killed, to be
interrupted or to stop at one of the operations on files that it is about to do: so every state
that a crash can leave behind is reached, also those that last for a microsecond.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",  # or numpy and scipy start threads when they are imported
    "PYTHONPATH": str(TESTS),
    "USE_TORCH": "0",  # as the command of the shell says it, for it takes seconds
    # What one process has compiled the next need not.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
# What the commands would import one after the other.
_IMPORTED = (
    "flaxslim.checkpoint._write",
    "flaxslim.cli._commands",
    "flaxslim.cli._execute",
    "flaxslim.cli._export",
    "flaxslim.cli._prune",
    "flaxslim.cli._prune_commands",
    "flaxslim.cli._run",
    "flaxslim.cli._slim",
    "flaxslim.cli._sweep",
    "transformers.models.llama.modeling_flax_llama",
    "transformers.models.vit.modeling_flax_vit",
    "tyro",
)


class Server:
    """Starts commands of `flaxslim`; see `serving`."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process
        self.threads = self._answer()["threads"]

    def start(self, arguments: Sequence[object], **how: Any) -> int:
        """The process that runs a command.

        Args:
          how: `top`, the folder whose files count; `at` and `signal`: which of its operations on
            files is preceded by a signal to itself; `cwd`; `output`, a file for what it prints;
            `room`: the disk says that it has room, whatever it has; `patch`: values of names
            ("module:NAME") in this process.
        """
        self._ask(start=[str(argument) for argument in arguments], **how)
        return self._answer()["started"]

    def wait(self, child: int) -> tuple[int, int]:
        """Its exit code (less than 0: the signal), and how many operations on files it did."""
        self._ask(wait=child)
        found = self._answer()
        return found["code"], found["operations"]

    def stopped(self, child: int) -> bool:
        """Waits until it has stopped (True) or ended."""
        self._ask(stopped=child)
        return self._answer()["stopped"]

    def _ask(self, **what: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(what, default=str), file=self.process.stdin, flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@contextmanager
def serving() -> Iterator[Server]:
    """A server, which ends with the block."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as programs,
        subprocess.Popen(
            [sys.executable, "-m", "faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": programs},
            cwd=TESTS.parent,
        ) as process,
    ):
        try:
            yield Server(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


# --- the process ------------------------------------------------------------------------------


def serve() -> None:
    """Answers each line of JSON with another."""
    for name in _IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # commands hear it while `main` runs
    gc.collect()
    gc.freeze()  # or each command would copy the heap page by page to look through it
    pipes: dict[int, int] = {}
    _tell(threads=len(os.listdir("/proc/self/task")))
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            reading, writing = os.pipe()
            if not (child := os.fork()):
                os.close(reading)
                _command(asked, writing)
            os.close(writing)
            pipes[child] = reading
            _tell(started=child)
        elif "wait" in asked:
            child = asked["wait"]
            status = os.waitpid(child, 0)[1]
            with os.fdopen(pipes.pop(child), "rb") as pipe:
                operations = int(pipe.read() or 0)
            _tell(code=os.waitstatus_to_exitcode(status), operations=operations)
        else:
            # Leaves an ended process to be waited for.
            found = os.waitid(os.P_PID, asked["stopped"], os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            _tell(stopped=bool(found and found.si_code == os.CLD_STOPPED))


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _command(asked: dict[str, Any], told: int) -> None:
    """Runs a command, and ends the process."""
    code = 70
    try:
        output = os.open(asked.get("output", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(asked.get("cwd", "/"))
        if asked.get("room"):
            _say_room()
        for name, value in asked.get("patch", {}).items():
            module, _, attribute = name.partition(":")
            setattr(sys.modules[module], attribute, value)
        count = _Count(asked.get("top", "/nowhere"), asked.get("at"), asked.get("signal"))
        from flaxslim.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = main(asked["start"])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(told, str(count.done).encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Count:
    """The operations on files below a folder; a signal before one of them."""

    def __init__(self, top: str, at: int | None, number: int | None):
        self.top, self.at, self.number, self.done = os.path.realpath(top), at, number, 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            written = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not written or not isinstance(args[0], str | bytes | os.PathLike):
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"):
            return
        if event == "ctypes.dlsym":  # folders that change places
            if args[1] != "renameat2":
                return
        elif not self._inside(args):
            return
        self.done += 1
        if self.done == self.at:
            os.kill(os.getpid(), self.number or signal.SIGKILL)

    def _inside(self, args: tuple[Any, ...]) -> bool:
        path, *others = args
        if others and isinstance(others[-1], int) and others[-1] >= 0 and not os.path.isabs(path):
            return True  # below the handle of a folder: of shutil.rmtree
        return os.path.abspath(os.fsdecode(path)).startswith(self.top)


def _say_room() -> None:
    import shutil

    stock = shutil.disk_usage
    shutil.disk_usage = lambda path: stock(path)._replace(free=2**50)  # pyright: ignore


if __name__ == "__main__":
    serve()
