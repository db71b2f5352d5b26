"""A checkpoint of many gigabytes, slimmed tensor by tensor, beside a copy of its folder.

    python benchmarks/large_checkpoint.py                    # 1, 2, 4 and 8 GB
    python benchmarks/large_checkpoint.py --sizes 1 --runs 3 --folder /a/large/disk

LLaMA-shaped (d 4096, f 11008, 32 heads), bfloat16, in shards of 2 GB with PyTorch's names, a
quarter of the FFN channels dead. In turns: `cp -r`, the same with the flush to disk that flaxslim
does too before it puts its folder in place, `flaxslim slim --no-verify`, and that with the proof
layer by layer. Each command runs in a process of its own; peak is the resident memory of that
process. The last row is a straight line through the measured ones, by least squares.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from flaxslim.checkpoint import save

D, F, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SHARD = 2 * 10**9
LAYER = 2 * (4 * D * D + 3 * D * F + 2 * D)  # bytes
OUTSIDE = 2 * (2 * VOCABULARY * D + D)


def checkpoint(folder: Path, gigabytes: float) -> int:
    """Write one of about this size; returns its bytes."""
    layers = max(1, round((gigabytes * 1e9 - OUTSIDE) / LAYER))
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(F * D + 10**6, np.float32)).astype(ml_dtypes.bfloat16)

    def draw(*shape: int) -> np.ndarray:
        start = int(rng.integers(10**6))
        return noise[start : start + int(np.prod(shape))].reshape(shape)

    def table() -> np.ndarray:
        return np.concatenate([draw(VOCABULARY // 4, D) for _ in range(4)])

    def down() -> np.ndarray:
        kernel = draw(D, F).copy()
        kernel[:, rng.permutation(F)[: F // 4]] = 0
        return kernel

    def layer() -> dict[str, np.ndarray]:
        attention = {f"self_attn.{x}_proj.weight": draw(D, D) for x in "qkvo"}
        norms = {f"{x}_layernorm.weight": draw(D) for x in ("input", "post_attention")}
        ffn = {f"mlp.{x}_proj.weight": draw(F, D) for x in ("gate", "up")}
        return {**attention, **norms, **ffn, "mlp.down_proj.weight": down()}

    params = {"model.embed_tokens.weight": table(), "lm_head.weight": table()}
    params["model.norm.weight"] = draw(D)
    for number in range(layers):
        params |= {f"model.layers.{number}.{name}": x for name, x in layer().items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    save(folder, params, config, format="torch", shard_size=SHARD)
    return sum(x.nbytes for x in params.values())


# Runs a command and says how long it took and its peak memory, without those of others.
_TIMED = (
    "import json, resource, subprocess, sys, time; began = time.perf_counter(); "
    "code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
    "print(json.dumps([code, time.perf_counter() - began, "
    "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))"
)


def timed(*command: str) -> tuple[float, float]:
    """Seconds, and the peak of resident bytes."""
    out = subprocess.run(
        [sys.executable, "-c", _TIMED, *command], capture_output=True, text=True, check=True
    )
    code, seconds, peak = json.loads(out.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    return seconds, peak


def measured(source: Path, place: Path, runs: int) -> dict[str, tuple[float, float]]:
    """Medians of seconds and peaks for each command, which take turns."""
    slim = [sys.executable, "-m", "flaxslim", "slim", str(source), str(place / "out")]
    commands = {
        "cp": ["cp", "-r", str(source), str(place / "out")],
        "cp, flushed": ["sh", "-c", f"cp -r '{source}' '{place}/out' && sync '{place}'/out/*"],
        "slim": [*slim, "--no-verify"],
        "slim, proved": [*slim, "--by-layer"],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            subprocess.run(["sync"], check=True)  # what the last one left to write
            time.sleep(1)
            found[name].append(timed(*command))
            shutil.rmtree(place / "out")
    return {
        name: (statistics.median(s for s, _ in pairs), max(peak for _, peak in pairs))
        for name, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 2, 4, 8], help="GB")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; needs three times the size")
    parser.add_argument("--more", nargs="*", type=float, default=[32], help="GB, by the fit")
    options = parser.parse_args()
    table = Table("GB", "cp", "cp, flushed", "slim", "proved", "slim / cp", "peak", "peak, proved")
    points = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            place = Path(folder)
            exact = checkpoint(place / "source", size) / 1e9
            found = measured(place / "source", place, options.runs)
        seconds, peaks = ([pair[i] for pair in found.values()] for i in (0, 1))
        points.append((exact, *seconds, *peaks))
        print(
            f"{exact:.2f} GB:", {name: f"{s:.1f} s" for name, (s, _) in found.items()}, flush=True
        )
    for row in [*points, *(fitted(points, size) for size in options.more if len(points) > 2)]:
        size, copy, flushed, slim, proved, _, _, peak, peak_proved = row
        table.add_row(
            f"{size:.2f}" + (" (by the fit)" if row not in points else ""),
            *(f"{s:.1f} s" for s in (copy, flushed, slim, proved)),
            f"{slim / copy:.2f} ({slim / flushed:.2f} flushed)",
            *(f"{peak / 1e9:.2f} GB" for peak in (peak, peak_proved)),
        )
    Console(width=120).print(table, f"on {os.cpu_count()} cores")


def fitted(points: list[tuple[float, ...]], size: float) -> tuple[float, ...]:
    x, *columns = np.array(points).T
    return (size, *(float(np.polyval(np.polyfit(x, y, 1), size)) for y in columns))


if __name__ == "__main__":
    main()
