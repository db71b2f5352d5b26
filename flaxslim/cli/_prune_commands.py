"""The commands that prune by data, without training, and their help; each returns its exit code."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from flaxslim.cli._options import (
    AnyHeads,
    BatchSize,
    Calibration,
    Evaluate,
    Evaluation,
    Fields,
    HeadsMultipleOf,
    Length,
    LowMemory,
    MultipleOf,
    Overwrite,
    Packed,
    Revision,
    Samples,
    Seed,
    Source,
    Width,
)


def prune(
    source: Source,
    out: Annotated[Positional[Path], arg(metavar="OUT", help="the folder to write")],
    *,
    calibration: Calibration,
    keep: Annotated[
        float | None, arg(help="the share of the channels that stays in each layer, such as 0.7")
    ] = None,
    speedup: Annotated[str | None, arg(help="how many times as fast as it is here: 1.5x")] = None,
    max_params: Annotated[str | None, arg(help="parameters in all, such as 15M")] = None,
    max_bytes: Annotated[str | None, arg(help="bytes in all, such as 60MB")] = None,
    max_flops: Annotated[float | None, arg(help="share of the dense model's FLOPs: 0.6")] = None,
    max_latency: Annotated[str | None, arg(help="time of a batch on this machine: 4ms")] = None,
    preset: Annotated[
        Literal["fast", "balanced", "best", "fisher"],
        arg(
            help="fast: by activations, refitted; balanced: greedy by exact error, refitted; best: "
            "the same, then tuned against the dense model; fisher: Kwon et al. 2022"
        ),
    ] = "balanced",
    width: Width = "uniform",
    heads: AnyHeads = False,
    multiple_of: MultipleOf = 1,
    heads_multiple_of: HeadsMultipleOf = 1,
    samples: Samples = 128,
    length: Length = 128,
    batch_size: BatchSize = 16,
    fields: Fields = (),
    packed: Packed = "auto",
    evaluate: Evaluate = None,
    evaluation: Evaluation = None,
    plot: Annotated[
        Path | None, arg(help="draw the widths that are left to this file (.png, .svg)")
    ] = None,
    low_memory: LowMemory = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> int:
    """Prune a checkpoint without training it, by what it does on some data, and write it to OUT.

    Give one wish: --keep, --speedup, --max-params, --max-bytes, --max-flops or --max-latency. What
    is left makes up for what goes, so the function is nearly the same, not exactly; both models are
    run and compared. OUT loads in the stock class, with --width per_layer by
    flaxslim.from_pretrained.
    Example: flaxslim prune path/to/folder smaller --calibration texts.txt --keep 0.7
    """
    from flaxslim.cli import _calibrated, _prune

    budget = {
        "speedup": speedup,
        "params": max_params,
        "bytes": max_bytes,
        "flops": max_flops,
        "latency": max_latency,
    }
    return _prune.run(
        source,
        out,
        _calibrated.Data(
            calibration=calibration,
            samples=samples,
            length=length,
            batch_size=batch_size,
            fields=fields,
            packed=packed,
            seed=seed,
        ),
        _calibrated.How(
            preset=preset,
            width=width,
            heads=heads,
            multiple_of=multiple_of,
            heads_multiple_of=heads_multiple_of,
            low_memory=low_memory,
            seed=seed,
        ),
        keep=keep,
        budget=budget,
        evaluate=evaluate,
        evaluation=evaluation,
        plot=plot,
        overwrite=overwrite,
        revision=revision,
    )


def sweep(
    source: Source,
    *,
    calibration: Calibration,
    keep: Annotated[str, arg(help="shares of the channels that stay, with commas between")] = (
        "0.9,0.7,0.5,0.3"
    ),
    presets: Annotated[
        str,
        arg(
            help="presets to compare, with commas between; also what the literature compares "
            "with: random, magnitude, wanda, magnitude+ls, wanda+ls, obs"
        ),
    ] = "fast,balanced,magnitude,wanda",
    width: Width = "uniform",
    heads: AnyHeads = False,
    multiple_of: MultipleOf = 1,
    heads_multiple_of: HeadsMultipleOf = 1,
    samples: Samples = 128,
    length: Length = 128,
    batch_size: BatchSize = 16,
    fields: Fields = (),
    packed: Packed = "auto",
    evaluate: Evaluate = None,
    evaluation: Evaluation = None,
    low_memory: LowMemory = False,
    seed: Seed = 0,
    csv: Annotated[Path | None, arg(help="write the table to this file")] = None,
    plot: Annotated[Path | None, arg(help="draw it to this file (.png, .svg)")] = None,
    revision: Revision = None,
) -> int:
    """Prune at several sizes by several presets, and show what each keeps of the model.

    Writes no model. The error is the distance of the outputs from those of the dense model, on
    calibration data (if a preset tunes, on a part that no preset learns from): compare by it, and
    judge what you ship on data of your own (--evaluate).
    Example: flaxslim sweep path/to/folder --calibration texts.txt --keep 0.9,0.7,0.5
    """
    from flaxslim.cli import _calibrated, _sweep

    return _sweep.run(
        source,
        _calibrated.Data(
            calibration=calibration,
            samples=samples,
            length=length,
            batch_size=batch_size,
            fields=fields,
            packed=packed,
            seed=seed,
        ),
        _calibrated.How(
            preset="",
            width=width,
            heads=heads,
            multiple_of=multiple_of,
            heads_multiple_of=heads_multiple_of,
            low_memory=low_memory,
            seed=seed,
        ),
        keep=keep,
        presets=presets,
        evaluate=evaluate,
        evaluation=evaluation,
        csv_file=csv,
        plot=plot,
        revision=revision,
    )
