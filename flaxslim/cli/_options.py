"""The options that several commands share, and their help."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

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
BatchSize = Annotated[int, arg(help="samples of a batch; latency is that of one such batch")]
Packed = Annotated[
    Literal["auto", "yes", "no"],
    arg(
        help="join the texts and cut them into windows of --length tokens; auto: for causal models"
    ),
]
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
Overwrite = Annotated[bool, arg(help="replace OUT if it exists, once the new one is whole")]
Json = Annotated[bool, arg(help="print JSON instead of tables")]
