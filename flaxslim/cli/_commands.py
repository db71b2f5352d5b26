"""The commands and their help. Each returns its exit code.

`prune` and `sweep` are in `_prune_commands.py`, what several commands take in `_options.py`.
"""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from flaxslim.cli._options import (
    ByLayer,
    Heads,
    HeadsMultipleOf,
    Json,
    MultipleOf,
    Overwrite,
    Revision,
    Source,
    Threshold,
    Whole,
    Width,
)
from flaxslim.errors import FlaxslimError


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
    json: Json = False,
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
    overwrite: Overwrite = False,
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
    Nothing is written when nothing can go (exit code 3) or when the proof fails (exit code 4).
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
            proof=_way(by_layer, whole, verify=verify),
            shard_size=None if shard_size is None else parse_bytes(shard_size),
            dry_run=dry_run,
            revision=revision,
        ),
    )


def _way(
    by_layer: bool, whole: bool, *, verify: bool = True
) -> Literal["by-layer", "whole", "auto"]:
    """How the proof goes, by flags of which one at most is given."""
    _one_of({"--no-verify": not verify, "--by-layer": by_layer, "--whole": whole})
    return "by-layer" if by_layer else "whole" if whole else "auto"


def _one_of(given: Mapping[str, bool]) -> None:
    """Raise `FlaxslimError` if more than one of some flags is given."""
    if len(flags := [flag for flag, is_given in given.items() if is_given]) > 1:
        raise FlaxslimError(
            "these flags exclude each other", seen=" ".join(flags), mend="give one of them"
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
    json: Json = False,
    revision: Annotated[
        str | None, arg(help="branch, tag or commit of BEFORE, if that is a Hub repository")
    ] = None,
) -> int:
    """Run two checkpoints on the same inputs and show whether they compute the same function.

    Exit code 4 if they do not, whatever the record of the cut says.
    Example: flaxslim verify path/to/folder smaller
    """
    from flaxslim.cli import NOT_PROVEN, _verify
    from flaxslim.cli._console import console, messages

    way = _way(by_layer, whole)
    found, hint = _verify.verify(before, after, approximate=approximate, way=way, revision=revision)
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


def run(
    recipe: Annotated[
        Positional[str],
        arg(metavar="RECIPE", help="a TOML file, or the name of a shipped one, such as digits"),
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
    json: Annotated[
        bool, arg(help="print the report, or what --check found, as JSON instead of tables")
    ] = False,
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
    Example: flaxslim run digits --set pruning.sparsity=0.8 --out out/digits
    """
    from flaxslim.cli import _demo, _execute, _recipe_prune, _recipe_read
    from flaxslim.cli._recipe import toml_value

    tree, book = _recipe_read.load(_demo.shipped(recipe), set)
    if _recipe_prune.COMMAND in tree:
        asked = [name for name, given in (("--check", check), ("--json", json)) if given]
        return _execute.prune(tree, book, out, overwrite=overwrite, dry_run=dry_run, refused=asked)
    _one_of({"--dry-run": dry_run, "--check": check, "--overwrite": overwrite})
    _one_of({"--dry-run": dry_run, "--json": json})
    if out is not None:
        _recipe_read.override(book, tree, f"output.folder={toml_value(str(out))}")
    read = _recipe_read.checked(tree, book, files=not (dry_run or check))
    if dry_run:
        return _execute.show(read)
    if check:
        return _execute.check(read, json=json)
    return _execute.execute(read, overwrite=overwrite, json=json)


def report(
    out: Annotated[
        Positional[Path],
        arg(metavar="OUT", help="a folder that flaxslim slim, prune or run has written"),
    ],
    *,
    html: Annotated[
        Path | None,
        arg(help="write the report to this file: one page that needs no network and no script"),
    ] = None,
    overwrite: Annotated[
        bool, arg(help="replace the file if it exists, and is an earlier report")
    ] = False,
) -> int:
    """Show what was cut from a checkpoint, and what was measured: widths, proof, sizes, speed.

    All of it is read from OUT: its flaxslim.json, its config, and the report.json of a run. No
    model is run.
    Example: flaxslim report smaller --html report.html
    """
    from flaxslim.cli import _page, _slimming, _table
    from flaxslim.cli._console import console, messages

    if html is not None:
        _page.check(html, overwrite=overwrite)
    elif overwrite:
        raise FlaxslimError(
            "there is no file to replace", seen="--overwrite", mend="--html FILE --overwrite"
        )
    found = _slimming.read(out)
    if html is None:
        console.print(_table.slimming(found))
    else:
        _page.write(found, html)
        messages.print(f"written to {html}", markup=False, soft_wrap=True)
    return 0


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
    class computes. A dozen lines with jax, safetensors and flatbuffers load it: see
    docs/guides/serving.md.
    Numbers in place of symbolic sizes give programs that a compiler can make more of, and serve
    classes that cannot be traced without numbers.
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
