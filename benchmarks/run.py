"""Runs the benchmarks, and writes down what they print: JSON, and a part of a page of Markdown.

    python benchmarks/run.py                                   # all of them: many hours
    python benchmarks/run.py --quick                           # small, where a benchmark can be
    python benchmarks/run.py --only slim_speed shrink_gain     # these; the file's others stay
    python benchmarks/run.py --again                           # those that the file lacks
    python benchmarks/run.py --list

A benchmark is a script in this folder that can be run. Each has a process of its own, and is
written down when it ends, also one that failed or was stopped after its time. The exit code is 1 if
there is such a one. What the page has before its mark stays.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
QUICK = {
    "accuracy": "--task stories260K --methods magnitude obs --ratios 0.5",
    "discover_speed": "bert-base",
    "forward_speed": "--layers 2 --repeats 3",
    "large_checkpoint": "--sizes 1",
    "latency_target": "--speedups 1.5 --runs 1 --ffn",
    "layout_cost": "--layers 2 --repeats 3",
    "orbax_convert": "--gigabytes 0.2",
    "peers": "--layers 2 --classes BertForQuestionAnswering",
    "prune_speed": "--widths 768 --layers 2",
    "shrink_gain": "--layers 2 --batch 2 --rounds 2",
    "slim_speed": "bert",
    "training_overhead": "--layers 2 --batch 2 --rounds 2",
}
MARK = "<!-- What follows is written by benchmarks/run.py. -->"
HOUR = 3600.0
SECONDS = {"accuracy": 8 * HOUR}  # others have an hour
PACKAGES = ("jax", "flax", "optax", "numpy", "transformers", "flaxslim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """`exit_code` is None if it was stopped after its time."""

    command: str
    text: str
    seconds: float
    exit_code: int | None

    @property
    def outcome(self) -> str:
        if self.exit_code is None:
            return f"**Stopped** after {self.seconds:.0f} s."
        if self.exit_code:
            return f"**Failed** with exit code {self.exit_code} after {self.seconds:.0f} s."
        return f"Took {self.seconds:.0f} s."


def benchmarks() -> dict[str, Path]:
    """The scripts by name; what has nothing to run is a module of theirs."""
    return {
        path.stem: path
        for path in sorted(FOLDER.glob("*.py"))
        if path.name != Path(__file__).name and "\nif __name__ ==" in path.read_text()
    }


def measured(path: Path, options: Sequence[str], limit: float) -> Result:
    """Run it; it and what it started are ended after `limit` seconds."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    ) as process:
        code: int | None = None
        try:
            text, errors = process.communicate(timeout=limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, errors = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code != 0:
        text = "\n".join([*text.splitlines(), *errors.splitlines()[-20:]])
    return Result(
        command=shlex.join(["python", f"{FOLDER.name}/{path.name}", *options]),
        text=text.replace(f"{ROOT}{os.sep}", "").rstrip(),  # no path of this machine
        seconds=round(time.perf_counter() - began, 1),
        exit_code=code,
    )


def machine() -> dict[str, str]:
    """What the benchmarks run on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # In a process of its own: one that holds an accelerator leaves none of it to the benchmarks.
    ask = "import jax; print(*(f'{d.device_kind} ({d.platform})' for d in jax.devices()), sep=', ')"
    devices = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout
    return {
        "cores": str(os.cpu_count()),
        "CPU": names[0] if names else platform.processor() or platform.machine(),
        "memory": f"{memory / 2**30:.0f} GiB",
        "accelerator": "none" if "(cpu)" in devices else devices.strip() or "unknown",
    }


def versions() -> dict[str, str]:
    return {"Python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def page(setting: dict[str, dict[str, str]], results: dict[str, Result], old: str = "") -> str:
    """The Markdown: a section for each benchmark, and the machine and versions."""
    kept, mark, _ = old.partition(MARK)
    lines = [(kept if mark else "# Benchmarks\n\n") + MARK]
    for name, result in results.items():
        lines += ["", f"## {name}", "", "```sh", result.command, "```", "", result.outcome]
        lines += ["", "```text", result.text, "```"]
    if missing := [name for name in benchmarks() if name not in results]:
        lines += ["", f"Not run: {', '.join(missing)}."]
    lines += ["", "## Machine and versions", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for part in setting.values() for key, value in part.items()]
    return "\n".join([*lines, ""])


def replace(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def kept(path: Path, setting: dict[str, Any]) -> dict[str, Result]:
    """The results that the file has; they must be of this machine and these versions."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    if {name: found[name] for name in setting} != setting:
        raise SystemExit(f"{path} is of another machine or of other versions: name another --json")
    return {name: Result(**result) for name, result in found["benchmarks"].items()}


def main(arguments: Iterable[str] | None = None) -> int:
    scripts = benchmarks()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=scripts, metavar="NAME", default=[])
    parser.add_argument("--again", action="store_true", help="go on with what the file lacks")
    parser.add_argument("--quick", action="store_true", help="small, where a benchmark can be")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--timeout", type=float, help="seconds, of each")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "benchmarks.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "benchmarks.md")
    ask = parser.parse_args(None if arguments is None else list(arguments))
    options = {name: shlex.split(QUICK.get(name, "") if ask.quick else "") for name in scripts}
    if ask.list:
        print("\n".join(shlex.join([name, *options[name]]) for name in scripts))
        return 0
    setting = {"machine": machine(), "versions": versions()}
    results = kept(ask.json, setting) if ask.again or ask.only else {}
    try:
        for name in ask.only or scripts:
            if ask.again and name in results:
                continue
            print(f"{name} ... ", end="", flush=True)
            limit = ask.timeout or SECONDS.get(name, HOUR)
            results[name] = measured(scripts[name], options[name], limit)
            print(results[name].outcome.replace("*", ""))
            results = {name: results[name] for name in scripts if name in results}
            stored = {name: dataclasses.asdict(result) for name, result in results.items()}
            text = json.dumps({**setting, "benchmarks": stored}, indent=1, ensure_ascii=False)
            replace(ask.json, text + "\n")
    finally:
        old = ask.markdown.read_text() if ask.markdown.is_file() else ""
        replace(ask.markdown, page(setting, results, old))
    return int(any(result.exit_code != 0 for result in results.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or what runs would run on
    sys.exit(main())
