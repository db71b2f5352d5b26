"""The same dead channels cut by flaxslim and by its peers, each in an environment of its own.

    python benchmarks/peers.py                # makes two environments with PyTorch: 3 GB, minutes
    python benchmarks/peers.py --layers 2 --classes BertForQuestionAnswering

Half of the FFN channels of each layer of a random BERT-base are dead, others in each layer; all
read the one folder. Everything runs on the CPU, in float32, one process after the other. Seconds
are those of the slimming alone: the first call of the process, and the fastest of five more, each
on a model loaded anew; "of CPU" adds up all cores. Peak is the resident memory of the process until
the first call is done, with the model and all that is imported; "of which slimming" is what that
call adds. "Reloaded" is what the slimmed model puts out after it was written and read back: the
largest difference from the model with its dead channels, or the error. Torch-Pruning does not look
for dead channels: it is told the layers and the indices.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forward_speed import pruned
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from transformers import BertConfig

import flaxslim

HERE = Path(__file__).parent / "peers"
CLASSES = ("BertForQuestionAnswering", "BertModel")
INSTALLING = 600  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A script of `peers/`, and what has to be installed for it; nothing: in this environment."""

    script: str
    needs: tuple[str, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


_TORCH = ("torch==2.13.0", "transformers==4.57.6")
CONTENDERS = {
    # As where PyTorch is not installed: transformers would import it beside JAX.
    "flaxslim": Contender(script="ours.py", settings={"USE_TORCH": "0"}),
    "Neural Compressor": Contender(
        script="model_slim.py",
        # It imports six, which it does not ask for, and pkg_resources, which setuptools 82 lacks.
        needs=(
            *("neural-compressor==2.6", "six==1.17.0", "setuptools==80.9.0", "numpy==1.26.4"),
            *_TORCH,
        ),
    ),
    "Torch-Pruning": Contender(
        script="depgraph.py", needs=("torch-pruning==1.6.0", "numpy==2.4.6", *_TORCH)
    ),
}


def checkpoint(folder: Path, cls: str, layers: int) -> Path:
    """A random BERT for this class, half of each FFN dead, with PyTorch's names."""
    cfg = BertConfig(num_hidden_layers=layers, architectures=[cls])
    params = pruned(cfg, 0.5)
    if cls != "BertModel":
        kernel = np.random.default_rng(1).standard_normal((cfg.hidden_size, 2), np.float32)
        head = {"kernel": 0.02 * kernel, "bias": np.zeros(2, np.float32)}
        trunk = {name: part for name, part in params.items() if name != "pooler"}
        params = {"bert": trunk, "qa_outputs": head}
    return flaxslim.save(folder, params, cfg, format="torch")


def environment(folder: Path, needs: Sequence[str]) -> Path:
    """The Python of a virtual environment with exactly these requirements asked for."""
    python, made = folder / "bin" / "python", folder / "needs.txt"
    text = "\n".join(needs)
    if not made.is_file() or made.read_text() != text:
        print(f"installing {', '.join(needs)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        _printed([python, "-m", "pip", "install", "--quiet", *needs], INSTALLING)
        made.write_text(text)
    return python


def measured(contender: Contender, cls: str, folder: Path, place: Path, limit: float) -> Any:
    """What the contender's script says; or, as text, why it says nothing."""
    try:
        python = sys.executable
        if contender.needs:
            python = environment(place / Path(contender.script).stem, contender.needs)
        command = [python, HERE / contender.script, cls, folder]
        out = _printed(command, limit, **contender.settings)
        return json.loads(out.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        return f"stopped after {error.timeout:.0f} s"
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]  # pip's
        return (errors or lines or [f"exit code {error.returncode}"])[-1]


def _printed(command: Sequence[str | Path], limit: float, **settings: str) -> str:
    alike = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **alike, **settings}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=limit, env=env
    ).stdout


def rows(found: dict[str, Any]) -> dict[str, str]:
    """By name, as the table shows them."""
    gone = 1 - found["after"] / found["before"]
    seconds = "{:.2f} s ({:.2f} s of CPU)"
    return {
        "versions": "\n".join(f"{name} {version}" for name, version in found["versions"].items()),
        "slimming, first call": seconds.format(*found["first"]),
        "slimming, later calls": seconds.format(*found["again"]),
        "peak memory": decimal(found["peak"]),
        "of which slimming": decimal(found["extra"]),
        "parameters": f"{found['before']:,}",
        "after it": f"{found['after']:,} ({-gone:.1%})" if gone else "the same: nothing removed",
        "largest difference": f"{found['difference']:.1e} (of outputs up to {found['output']:.1f})",
        **{
            f"reloaded: {way}": _short(f"difference {x:.1e}" if isinstance(x, float) else x)
            for way, x in found["reloaded"].items()
        },
    }


def _short(text: str) -> str:
    line = " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())
    return line if len(line) < 100 else f"{line[:99]}…"


def table(title: str, results: dict[str, Any]) -> Table:
    """A column for each contender; one that failed has its error there."""
    columns = {
        name: {"failed": _short(found)} if isinstance(found, str) else rows(found)
        for name, found in results.items()
    }
    shown = Table("", *columns, title=title, show_lines=True)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        shown.add_row(name, *(Text(column.get(name, "")) for column in columns.values()))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=CLASSES)
    parser.add_argument("--environments", type=Path, default=HERE / ".venv")
    parser.add_argument("--timeout", type=float, default=600, help="seconds, of each process")
    ask = parser.parse_args()
    failed = False
    for cls in ask.classes:
        with tempfile.TemporaryDirectory() as place:
            folder = checkpoint(Path(place) / "bert", cls, ask.layers)
            results = {
                name: measured(contender, cls, folder, ask.environments, ask.timeout)
                for name, contender in CONTENDERS.items()
            }
        failed |= isinstance(results["flaxslim"], str)
        title = f"{cls}, {ask.layers} layers, half of the FFN channels dead"
        Console(width=120).print(table(title, results))
    print(f"on {os.cpu_count()} cores")
    if failed:
        raise SystemExit("flaxslim itself failed")


if __name__ == "__main__":
    main()
