"""The commands and their help. Each returns its exit code."""

import json as json_module
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

Source = Annotated[
    Positional[str],
    arg(metavar="SOURCE", help="a folder, or the id of a repository on the Hub (org/name)"),
]
Revision = Annotated[str | None, arg(help="branch, tag or commit of a Hub repository")]
Threshold = Annotated[
    float,
    arg(
        help="also cut channels whose second row has at most this norm, relative to the largest "
        "of the layer; 0 is exact, anything above is approximate"
    ),
]
MultipleOf = Annotated[
    int, arg(help="round FFN widths up to a multiple of this (128 suits most accelerators)")
]
HeadsMultipleOf = Annotated[
    int, arg(help="round numbers of heads up to a multiple of this, with --heads")
]
Width = Annotated[
    Literal["uniform", "per_layer"],
    arg(
        help="uniform: one width for each config key, which stock classes load by themselves; "
        "per_layer: each layer its own, so that all that is dead goes (flaxslim.from_pretrained "
        "loads it into the stock class)"
    ),
]
Heads = Annotated[
    bool,
    arg(help="cut dead attention heads too; most families need --width per_layer for it"),
]
ByLayer = Annotated[
    bool,
    arg(
        help="the proof one layer at a time: each before and after the cut on random inputs, and "
        "every tensor compared. It takes the memory of one layer, and is what happens anyway where "
        "both models do not fit into the memory that is free"
    ),
]
Whole = Annotated[bool, arg(help="run both models, however much memory is free")]
Calibration = Annotated[
    Path,
    arg(
        help="some hundred samples of what the model will see: text (.txt, one a line), JSON lines "
        "or a table (with --fields), an .npz of arrays, or a folder of images"
    ),
]
Fields = Annotated[
    tuple[str, ...],
    arg(help="names of the texts in JSON lines; names or numbers of columns; arrays of an .npz"),
]
Samples = Annotated[int, arg(help="how many of them to use")]
Length = Annotated[int, arg(help="tokens of a sample at most; of each window for causal models")]
BatchSize = Annotated[int, arg(help="samples of a batch; latency is measured at one")]
Packed = Annotated[
    Literal["auto", "yes", "no"],
    arg(
        help="join the texts and cut them into windows of --length tokens; auto: for causal models"
    ),
]
Preset = Literal["fast", "balanced", "best", "fisher"]
AnyHeads = Annotated[
    bool, arg(help="prune attention heads too; most families need --width per_layer for it")
]
LowMemory = Annotated[
    bool, arg(help="the statistics of one layer at a time; as many passes over the data as layers")
]
Evaluate = Annotated[
    str | None,
    arg(
        help="measure before and after: perplexity, lambada or stsb (on --evaluation), or "
        "module:function, called with (params, config)"
    ),
]
Evaluation = Annotated[Path | None, arg(help="the data that --evaluate reads")]
Seed = Annotated[int, arg(help="of all that is random; the same seed gives the same bytes")]


def inspect(
    source: Source,
    *,
    width: Width = "uniform",
    heads: Heads = False,
    threshold: Threshold = 0.0,
    multiple_of: MultipleOf = 1,
    heads_multiple_of: HeadsMultipleOf = 1,
    discover: Annotated[
        bool,
        arg(
            help="find the prunable pairs in what the Flax class of the config computes, instead "
            "of by a spec of ours: also for families that have none (ResNet), with the reason "
            "for each axis that cannot be cut, and the spec as Python for slim(params, cfg, spec)"
        ),
    ] = False,
    json: Annotated[bool, arg(help="print JSON instead of tables")] = False,
    revision: Revision = None,
) -> int:
    """Show the prunable sites of a checkpoint, what of them is dead, and how much would go.

    Writes nothing. A family without a spec of ours is traced with --discover.
    Example: flaxslim inspect path/to/folder --width per_layer --heads
    """
    from flaxslim.cli import _inspect, _slim, _table
    from flaxslim.cli._console import console, messages

    with messages.status(f"reading {source}"):
        report = _inspect.inspect(
            source,
            _slim.Choice(
                width=width,
                heads=heads,
                threshold=threshold,
                multiple_of=multiple_of,
                heads_multiple_of=heads_multiple_of,
            ),
            revision,
            discover=discover,
        )
    if json:
        print(json_module.dumps(report.to_dict(), indent=1))
    else:
        if report.discovered is not None:
            console.print(_table.discovery(report.discovered), markup=False, soft_wrap=True)
        console.print(_table.inspection(report))
    return 0


def slim(
    source: Annotated[
        Positional[str],
        arg(
            metavar="SOURCE",
            help="a folder, the id of a repository on the Hub (org/name), an address of fsspec "
            "(gs://, s3://), or a checkpoint of Orbax, with --config",
        ),
    ],
    out: Annotated[
        Positional[str], arg(metavar="OUT", help="the folder to write, or an address of fsspec")
    ],
    *,
    config: Annotated[
        Path | None,
        arg(
            help="of a checkpoint of Orbax: MaxText's YAML, which is written anew beside OUT, or a "
            "config.json of transformers, which is written as OUT.json"
        ),
    ] = None,
    width: Width = "uniform",
    heads: Heads = False,
    threshold: Threshold = 0.0,
    multiple_of: MultipleOf = 1,
    heads_multiple_of: HeadsMultipleOf = 1,
    format: Annotated[
        Literal["as-read", "flax", "flax-safetensors", "torch"],
        arg(
            help="as-read keeps the format and the tensor names of the source; flax writes "
            "flax_model.msgpack, torch PyTorch-named safetensors"
        ),
    ] = "as-read",
    overwrite: Annotated[bool, arg(help="replace OUT if it exists, once the new one is whole")] = (
        False
    ),
    verify: Annotated[
        bool, arg(help="run both models on the same inputs and refuse to write unless they agree")
    ] = True,
    by_layer: ByLayer = False,
    whole: Whole = False,
    shard_size: Annotated[
        str | None,
        arg(
            help="the most that a weight file may have, such as 5GB; by default shards stay as "
            "large as they are, 5 GB at most, and one file stays one"
        ),
    ] = None,
    dry_run: Annotated[bool, arg(help="show what would be cut, and stop")] = False,
    revision: Revision = None,
) -> int:
    """Cut the dead channels of a checkpoint, prove that it computes the same, and write it to OUT.

    The result loads in the stock classes, with --width per_layer by flaxslim.from_pretrained.
    Nothing is written when nothing is dead (exit code 3) or when the proof fails (exit code 4).
    Example: flaxslim slim path/to/folder smaller --width per_layer --heads
    """
    from flaxslim.cli import _slim
    from flaxslim.posttraining._budget import parse_bytes

    return _slim.run(
        source,
        out,
        config,
        _slim.Options(
            choice=_slim.Choice(
                width=width,
                heads=heads,
                threshold=threshold,
                multiple_of=multiple_of,
                heads_multiple_of=heads_multiple_of,
            ),
            format=format,
            overwrite=overwrite,
            verify=verify,
            proof="by-layer" if by_layer else "whole" if whole else "auto",
            shard_size=None if shard_size is None else parse_bytes(shard_size),
            dry_run=dry_run,
            revision=revision,
        ),
    )


def verify(
    before: Annotated[Positional[str], arg(metavar="BEFORE", help="the original checkpoint")],
    after: Annotated[Positional[str], arg(metavar="AFTER", help="the slimmed checkpoint")],
    *,
    approximate: Annotated[
        bool, arg(help="only measure the difference, for a cut made with --threshold")
    ] = False,
    by_layer: ByLayer = False,
    whole: Whole = False,
    json: Annotated[bool, arg(help="print JSON instead of tables")] = False,
) -> int:
    """Run two checkpoints on the same inputs and show whether they compute the same function.

    Exit code 4 if they do not, whatever the record of the cut says.
    Example: flaxslim verify path/to/folder smaller
    """
    from flaxslim.cli import NOT_PROVEN, _verify
    from flaxslim.cli._console import console, messages

    way = "by-layer" if by_layer else "whole" if whole else "auto"
    found, hint = _verify.verify(before, after, approximate=approximate, way=way)
    if json:
        print(found.to_json())
    else:
        console.print(str(found), markup=False, soft_wrap=True)
    if hint:
        messages.print(hint, markup=False, soft_wrap=True)
    return 0 if found.ok else NOT_PROVEN


def families() -> int:
    """List the model families that are known: model_type, spec, and where the width stands.

    Example: flaxslim families
    """
    from flaxslim.cli import _table
    from flaxslim.cli._console import console

    console.print(_table.families())
    return 0


def prune(
    source: Source,
    out: Annotated[Positional[Path], arg(metavar="OUT", help="the folder to write")],
    *,
    calibration: Calibration,
    keep: Annotated[
        float | None, arg(help="the share of the channels that stays in each layer, such as 0.7")
    ] = None,
    target: Annotated[str | None, arg(help="how many times as fast as it is here: 1.5x")] = None,
    max_params: Annotated[str | None, arg(help="parameters in all, such as 15M")] = None,
    max_bytes: Annotated[str | None, arg(help="bytes in all, such as 60MB")] = None,
    max_flops: Annotated[float | None, arg(help="share of the dense model's FLOPs: 0.6")] = None,
    max_latency: Annotated[str | None, arg(help="time of a batch on this machine: 4ms")] = None,
    preset: Annotated[
        Preset,
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
    overwrite: Annotated[bool, arg(help="replace OUT if it exists, once the new one is whole")] = (
        False
    ),
    revision: Revision = None,
) -> int:
    """Prune a checkpoint without training it, by what it does on some data, and write it to OUT.

    Give one wish: --keep, --target, --max-params, --max-bytes, --max-flops or --max-latency. What
    is left makes up for what goes, so the function is nearly the same, not exactly; both models are
    run and compared. OUT loads in the stock class, with --width per_layer by
    flaxslim.from_pretrained.
    Example: flaxslim prune path/to/folder smaller --calibration texts.txt --keep 0.7
    """
    from flaxslim.cli import _prune

    budget = {
        "speedup": target,
        "params": max_params,
        "bytes": max_bytes,
        "flops": max_flops,
        "latency": max_latency,
    }
    return _prune.run(
        source,
        out,
        _prune.Data(
            calibration=calibration,
            samples=samples,
            length=length,
            batch_size=batch_size,
            fields=fields,
            packed=packed,
            seed=seed,
        ),
        _prune.How(
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
    calibration data that were held out.
    Example: flaxslim sweep path/to/folder --calibration texts.txt --keep 0.9,0.7,0.5
    """
    from flaxslim.cli import _prune

    return _prune.sweep(
        source,
        _prune.Data(
            calibration=calibration,
            samples=samples,
            length=length,
            batch_size=batch_size,
            fields=fields,
            packed=packed,
            seed=seed,
        ),
        _prune.How(
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


def run(
    recipe: Annotated[
        Positional[str],
        arg(metavar="RECIPE", help="a TOML file, or the name of one that is shipped: digits"),
    ],
    *,
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="KEY=VALUE",
            help="set a key of the recipe anew, such as train.steps=100; may be given many times",
        ),
    ] = (),
    out: Annotated[
        Path | None, arg(help="the folder to write, in place of the recipe's output.folder")
    ] = None,
    overwrite: Annotated[
        bool, arg(help="replace the folder of an earlier run, once the new one is whole")
    ] = False,
    dry_run: Annotated[
        bool, arg(help="check the recipe, print it with all its defaults, and stop")
    ] = False,
    check: Annotated[
        bool,
        arg(
            help="take the first training step with random weights on random numbers, and stop: "
            "needs no file and no network"
        ),
    ] = False,
    json: Annotated[bool, arg(help="print the report as JSON instead of tables")] = False,
) -> int:
    """Train a model by a recipe while its channels die, cut them out, prove it, and save it.

    A recipe is a TOML file. It says the task (digits, language, squad), the model, [data],
    [train], and what else it wants: [pruning] (spec, sparsity, score, schedule), [distillation],
    [shrink] (at which steps), [evaluation], [output]. All of it is checked before anything is
    loaded, and each mistake is told with its line. --dry-run shows every key with its value;
    paths in a recipe are relative to it.

    OUT is the slim model with metrics.jsonl, training.png, report.json and recipe.toml beside it;
    until the run is over they grow in OUT.partial. The same recipe gives the same numbers.

    A file with command = "prune" is a recipe for flaxslim prune: its keys are the flags, with _
    for -; --dry-run shows the command.
    Example: flaxslim run configs/digits.toml --set pruning.sparsity=0.8 --set train.steps=300
    """
    from flaxslim.cli import _demo, _execute, _recipe_prune, _recipe_read

    tree, book = _recipe_read.load(_demo.shipped(recipe), set)
    if _recipe_prune.COMMAND in tree:
        asked = [name for name, given in (("--check", check), ("--json", json)) if given]
        return _execute.prune(tree, book, out, overwrite=overwrite, dry_run=dry_run, refused=asked)
    if out is not None:
        _recipe_read.override(book, tree, f"output.folder={str(out)!r}")
    read = _recipe_read.checked(tree, book, files=not (dry_run or check))
    if dry_run:
        return _execute.show(read)
    if check:
        return _execute.check(read)
    return _execute.execute(read, overwrite=overwrite, json=json)


def export(
    source: Source,
    out: Annotated[
        Positional[Path], arg(metavar="FILE", help="the file to write, such as model.jaxexport")
    ],
    *,
    batch: Annotated[
        str,
        arg(help="symbolic: any batch size; or numbers with commas between, a program for each"),
    ] = "symbolic",
    length: Annotated[
        str,
        arg(
            help="the same for the tokens of a sequence, up to as many as the model has positions "
            "(of audio, frames of the encoder)"
        ),
    ] = "symbolic",
    platforms: Annotated[
        str, arg(help="where it is to run: cpu, cuda, rocm, tpu, with commas between")
    ] = "cpu,cuda,tpu",
    model: Annotated[
        str | None,
        arg(help="the Flax class, such as FlaxBertModel; by default the one of the config"),
    ] = None,
    verify: Annotated[
        bool, arg(help="run each program beside the class, and refuse to write unless they agree")
    ] = True,
    overwrite: Annotated[bool, arg(help="replace FILE, if an earlier export wrote it")] = False,
    revision: Revision = None,
) -> int:
    """Write a checkpoint, dense or slimmed, as a file that runs without transformers and Flax.

    FILE holds the parameters (it is a safetensors file) and, as StableHLO by jax.export, what the
    class computes. A dozen lines with jax and safetensors load it: see "Run it without
    transformers" in the README. Numbers in place of symbolic sizes give programs that a compiler
    can make more of, and serve classes that cannot be traced without numbers.
    Example: flaxslim export smaller model.jaxexport --batch 1,8 --length 128
    """
    from flaxslim.cli import _export

    return _export.run(
        source,
        out,
        batch=batch,
        length=length,
        platforms=platforms,
        model=model,
        verify=verify,
        overwrite=overwrite,
        revision=revision,
    )


def demo(
    *,
    out: Annotated[Path | None, arg(help="keep the slimmed model in this folder")] = None,
    steps: Annotated[int, arg(help="training steps, dense; as many again while pruning")] = 100,
) -> int:
    """Train a small stock ViT on scikit-learn's digits, prune half of its FFN, slim, and prove it.

    Needs no network and no file; under two minutes on two cores. Prints the accuracy dense,
    pruned, and slimmed and reloaded. It is `flaxslim run digits`.
    Example: flaxslim demo --out slim-vit
    """
    from flaxslim.cli import _demo

    return _demo.run(out, steps=steps)
