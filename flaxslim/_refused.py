"""What `plan` refuses before it looks for dead channels, and what it finds it cannot trust."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxslim import _config, _policy
from flaxslim._dead import Marks
from flaxslim._scales import beside, companions
from flaxslim._spec import Site
from flaxslim.errors import (
    IncompletePairError,
    UnsupportedDtypeError,
    UnsupportedTreeError,
    WidthError,
)


def refuse_states(params: Any, sites: Sequence[Site]) -> None:
    """Raise `UnsupportedTreeError` if some sites are no layers: an optimizer's copies of them.

    Moments have dead channels of their own, so that they would keep others than the parameters do.
    """
    from flaxslim._state_kinds import is_held, is_state, optax_fields

    fields = dict(optax_fields(params))
    states = [site.second.path for site in sites if is_state(site.second.path, fields)]
    layers = {(s.pair, s.second.shape) for s in sites if s.second.path not in states}
    # A module may be called so, if it is no copy of another.
    copied = any(s.second.path in states and (s.pair, s.second.shape) in layers for s in sites)
    if copied or any(is_held(path, fields) for path in states):
        raise UnsupportedTreeError(
            "the tree holds what an optimizer keeps, too: copies of the parameters, which would be "
            "cut as if they were layers",
            path=states[0],
            seen=f"{len(sites) - len(states)} sites of layers, {len(states)} of copies",
            mend="pass the parameters alone (state.params, model), and cut all of it by the same "
            "plan: p = plan(params, cfg, spec), apply(p, state, like=params); or use shrink",
        )


def refuse_quantised(sites: Sequence[Site], cfg: Any, leaves: Mapping[str, Any]) -> None:
    mend = "slim before quantising, or dequantise first; a plan made then also cuts the scales: "
    mend += "apply(plan, quantised, like=params)"
    if _config.has(cfg, "quantization_config") and _config.read(cfg, "quantization_config"):
        raise UnsupportedDtypeError(
            "the config says that the weights are quantised",
            path="quantization_config",
            seen=str(_config.read(cfg, "quantization_config"))[:80],
            mend=mend,
        )
    for path in companions(sites, leaves):
        raise UnsupportedDtypeError(
            "a kernel that would be cut is quantised: its scales stand beside it",
            path=path,
            mend=mend,
        )


def refuse_unnamed_biases(
    sites: Sequence[Site], leaves: Mapping[str, Any], marks: Mapping[str, Marks]
) -> None:
    """Raise `IncompletePairError` for what looks like a first bias that the spec does not name.

    Channels were found dead by a bias that the rules took for zero.
    """
    unbiased = {
        t.path: site
        for site in sites
        if any(marks[site.second.path].rules[name] for name in ("ii", "iii", "iv"))
        for t, bias in zip(site.first, site.first_biases, strict=True)
        if bias is None and site.size not in _outside(site)
    }
    for path, kernel, site in beside(sites, leaves) if unbiased else ():
        if kernel.path in unbiased and np.shape(leaves[path]) == (site.size,):
            raise IncompletePairError(
                "a vector with a number for each channel stands beside a first layer that has no "
                "bias by the spec",
                path=path,
                seen=f"shape {np.shape(leaves[path])}, beside {kernel.path} {kernel.shape}",
                expected=f"a bias called {site.pair.bias!r}",
                mend="name it, if it is added there: Pair(first_bias=...), or bias= if all biases "
                "are called so; if it is something else, put it into a folder of its own",
            )


def _outside(site: Site) -> set[int]:
    """The sizes of what the channels of a site are computed from, and of what reads them."""
    return {
        size
        for t in (*site.first, *site.reading)
        for name, size in t.axes.sizes(t.shape).items()
        if name != site.axis(t)
    }


def check_arguments(width: str, multiple_of: Any, threshold: float) -> None:
    if width not in _policy.WIDTHS:
        raise WidthError(
            f"there is no width policy {width!r}",
            expected=" or ".join(f'"{name}"' for name in _policy.WIDTHS),
            mend='"uniform" is what stock classes load by themselves, "per_layer" removes more',
        )
    entries = multiple_of if isinstance(multiple_of, Mapping) else {"f": multiple_of}
    for name, number in entries.items():
        whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
        if not whole or number < 1 or not isinstance(name, str):
            raise WidthError(
                "multiple_of must be a positive whole number, or a mapping of names to such",
                seen=repr(multiple_of),
                expected='128, or by axis or site: {"f": 128, "h": 2}',
            )
    if not isinstance(threshold, numbers.Real) or not 0 <= float(threshold) < 1:
        raise WidthError(
            "threshold is relative to the largest row norm of a layer",
            seen=repr(threshold),
            expected="0.0 (exact) up to, but not including, 1.0",
        )
