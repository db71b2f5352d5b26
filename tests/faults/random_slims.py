"""Slim random models by random wishes, and prove each: none may be wrong, none silently uncut.

python tests/faults/random_slims.py --count 10000 --seed 0
python tests/faults/random_slims.py --only 1234 --seed 0      # one again, by itself

Models are the families of transformers at random tiny sizes, the layouts of other libraries, and
networks of our own whose function numpy computes. Channels and heads die at random by every rule,
from none at all to whole layers. Each result is proved layer by layer; those of libraries and of
our own by their functions in float64, too; of the families each fiftieth by the stock class. Which
channels must go is known from how they died, not from the plan.
"""

import argparse
import collections
import dataclasses
import functools
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import ml_dtypes
import numpy as np
import strategies
import test_libraries
import zoo
from kill import kill_by_every_rule
from kill_rows import kill_rows, need
from test_libraries import LIBRARIES
from zoo import CASES, Case

import flaxslim
from flaxslim import Plan, Site, Spec
from flaxslim._compat import parameter_shapes
from flaxslim._inputs import inputs_for
from flaxslim._tree import flatten
from flaxslim.checkpoint._leaf import nest
from flaxslim.errors import WidthError
from flaxslim.specs import spec_for

FAMILIES = [case for case in CASES if case.short]
DTYPES = (np.float32, np.float32, ml_dtypes.bfloat16, np.float16)
SIZES_EACH = 4  # sets of random sizes of each family: to find the shapes of one takes a second
WHOLE = 50  # of as many families one is run in its stock class


class Wrong(AssertionError):
    """A model that is not what it was, or a cut that was not made and nobody was told."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """A model with dead channels, and which live of each site, `(s, f)` by its second kernel."""

    name: str
    params: Any
    cfg: Any
    spec: Spec
    living: Mapping[str, np.ndarray]
    dtype: Any
    case: Case


# --- models -----------------------------------------------------------------------------------


@functools.cache
def shaped(name: str, number: int) -> tuple[Case, Any, dict[str, tuple[int, ...]]]:
    """A family at one set of sizes: its config, and the shapes of its parameters."""
    case = next(case for case in FAMILIES if str(case) == name)
    cfg = case.config()
    if number:
        resize(cfg, spec_for(cfg, "all"), np.random.default_rng(number))
    try:
        shapes = parameter_shapes(case.cls, cfg)
        spec_for(cfg, "all").sites(shapes, cfg)
    except Exception:  # heads that the class does not take with the rest of its sizes
        if not number:
            raise
        return shaped(name, 0)
    return case, cfg, {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}


def resize(cfg: Any, spec: Spec, rng: np.random.Generator) -> None:
    """Other widths and numbers of heads where a plain key says them."""
    done: set[str] = set()
    for pair in spec:
        part = functools.reduce(getattr, filter(None, pair.config.split(".")), cfg)
        key = (pair.width or "").partition(" or ")[0]
        if not key.isidentifier() or pair.config + key in done:
            continue
        done.add(pair.config + key)
        if pair.axis == "f":
            setattr(part, key, int(rng.integers(2, 40)))
        elif pair.group_width is None:
            setattr(part, key, int(rng.choice((2, 4, 8))))
        else:
            group = pair.group_width.partition(" or ")[0]
            setattr(part, key, 4)
            setattr(part, group, int(rng.choice((1, 2, 4))))


def family(rng: np.random.Generator) -> Start:
    name = str(FAMILIES[int(rng.integers(len(FAMILIES)))])
    case, cfg, shapes = shaped(name, int(rng.integers(SIZES_EACH)))
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    flat = {path: _values(rng, path, shape, dtype) for path, shape in shapes.items()}
    params = nest(flat, "/")
    spec = spec_for(cfg, ("ffn", "heads", "all", "all")[int(rng.integers(4))])
    sites = spec.sites(params, cfg)
    unit = getattr(cfg, "attention_type", "") != "block_sparse"  # whose weights sum to more than 1
    chosen = sites if rng.random() < 0.7 else _some(sites, rng)
    low, high = ((0.0, 1.0), (0.3, 0.9), (1.0, 1.0), (0.0, 0.0))[_kind(rng)]
    params, deaths = kill_by_every_rule(
        params,
        chosen,
        seed=int(rng.integers(2**32)),
        low=low,
        high=high,
        folds=lambda site: unit and site.pair.fold_unless is None,
    )
    living = {site.second.path: np.ones((site.rows, site.size), bool) for site in sites}
    for path, died in deaths.items():
        for death in died:
            living[path][:, death.channels] = False
    return Start(
        name=name, params=params, cfg=cfg, spec=spec, living=living, dtype=dtype, case=case
    )


def _values(rng: np.random.Generator, path: str, shape: Any, dtype: Any) -> np.ndarray:
    """As the zoo draws them, and none of them zero when they are rounded."""
    values = zoo._random(rng, path, jax.ShapeDtypeStruct(shape, np.float32))
    return np.where(np.abs(values) < 1e-3, 1e-3, values).astype(dtype)


def _some(sites: Sequence[Site], rng: np.random.Generator) -> list[Site]:
    """A part of the sites, those that share a table together."""
    tags = {site.tied or site.second.path for site in sites}
    taken = {tag for tag in sorted(tags) if rng.random() < 0.5}
    return [site for site in sites if (site.tied or site.second.path) in taken]


def _kind(rng: np.random.Generator) -> int:
    return int(rng.choice(4, p=(0.4, 0.5, 0.07, 0.03)))


# --- what must have come of it ----------------------------------------------------------------


def check_family(start: Start, rng: np.random.Generator, *, whole: bool) -> str:
    """Plan, cut and prove; returns what it was: "cut", "nothing dead" or "refused"."""
    width = ("uniform", "per_layer")[int(rng.integers(2))]
    wishes: tuple[Any, ...] = (1, 1, 1, 2, 3, 8, {"f": 4, "h": 2}, {"h": 3})
    multiple = wishes[int(rng.integers(len(wishes)))]
    chosen = flaxslim.plan(start.params, start.cfg, start.spec, width=width, multiple_of=multiple)
    check_plan(start, chosen, width, multiple)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            small, cfg = flaxslim.slim(
                start.params, start.cfg, start.spec, width=width, multiple_of=multiple
            )
        except WidthError as error:
            if chosen.removed or not chosen.blocked:
                raise Wrong("refused, though something could go") from error
            return "refused"
    told = {warning.category for warning in caught}
    if not chosen.removed:
        if small is not start.params or flaxslim.NothingRemovedWarning not in told:
            raise Wrong("nothing goes, and nothing is said of it")
        return "nothing goes"
    if chosen.blocked and flaxslim.DeadKeptWarning not in told:
        raise Wrong("something dead stays, and nothing is said of it")
    sizes = {site.second.path: site.size for site in start.spec.sites(small, cfg)}
    if sizes != {cut.site.second.path: cut.width for cut in chosen.cuts}:
        raise Wrong("the sizes are not those of the plan")
    if not proved(start, small, cfg):
        return "cut, too coarse to be proved"
    if rng.random() < 0.1:
        check_control(start, chosen, cfg)
    if whole and start.dtype == np.float32:
        flaxslim.verify(
            (start.params, start.cfg),
            (small, cfg),
            start.case.cls,
            inputs=inputs_for(start.case.cls, start.cfg, length=start.case.length),
            spec=start.spec,
            repeats=0,
        ).raise_if_failed()
        return "cut, run in the stock class"
    return "cut"


def proved(start: Start, small: Any, cfg: Any) -> bool:
    """Whether a model is proved to be the same, layer by layer; raises if it is not the same.

    Where constants are folded into biases of 16 bits, a small site may be below the rounding.
    """
    proof = flaxslim.verify_by_layer((start.params, start.cfg), (small, cfg), spec=start.spec)
    same = all(not row.fault and row.relative <= proof.tolerance for row in proof.outputs)
    if not same or start.dtype == np.float32:
        proof.raise_if_failed()
    return proof.ok


def check_plan(start: Start, chosen: Plan, width: str, multiple: Any) -> None:
    """What lives stays, and of what is dead no more stays than the wish or the config asks for."""
    if {cut.site.second.path for cut in chosen.cuts} != start.living.keys():
        raise Wrong("a site is missing")
    needed: dict[Any, int] = {}
    for cut in chosen.cuts:
        site, living = cut.site, start.living[cut.site.second.path]
        for row, keep in zip(living, cut.kept, strict=True):
            if not {*np.flatnonzero(row).tolist()} <= {*keep.tolist()}:
                raise Wrong(f"a living channel goes: {site.second.path}")
        if cut.dead != (~living).sum():
            raise Wrong(f"{cut.dead} of {(~living).sum()} dead are found: {site.second.path}")
        key = _shared(site, width)
        needed[key] = max(needed.get(key, int(width == "uniform")), int(living.sum(1).max()))
    for cut in chosen.cuts:
        site = cut.site
        step = _multiple(site, multiple)
        if width == "uniform" and site.pair.width_expression is not None:
            step = math.lcm(step, site.pair.width_expression.step(start.cfg))
        want = min(site.size, -(-needed[_shared(site, width)] // step) * step)
        even = bool(site.groups) and (width == "uniform" or step > 1)
        if cut.width < needed[_shared(site, width)] * (width == "per_layer") or (
            cut.width < want and not even
        ):
            raise Wrong(f"{cut.width} stay where {want} are needed: {site.second.path}")
        if cut.width > want and not even and not chosen.blocked:
            raise Wrong(f"{cut.width} stay where {want} would do: {site.second.path}")


def _shared(site: Site, width: str) -> Any:
    if width == "per_layer":
        return site.tied or site.second.path
    expression = site.pair.width_expression
    return expression.label if expression else (site.pair, site.size)


def _multiple(site: Site, multiple: Any) -> int:
    given = multiple if isinstance(multiple, Mapping) else {"f": multiple}
    return given.get(site.pair.axis, 1)


def check_control(start: Start, chosen: Plan, cfg: Any) -> None:
    """A dead channel in the place of one that lives must be seen."""
    for cut in chosen.cuts:
        living = start.living[cut.site.second.path]
        row = cut.kept[0]
        lives = [channel for channel in row if living[0, channel]]
        gone = np.setdiff1d(np.arange(cut.site.size), row)
        if not lives or not len(gone) or cut.site.groups:
            continue
        keep: Any = tuple(np.sort([gone[0], *row[row != lives[0]]]).tolist())
        keep = (keep, *cut.keep[1:]) if cut.site.stack else keep
        cuts = tuple(dataclasses.replace(c, keep=keep) if c is cut else c for c in chosen.cuts)
        other = flaxslim.apply(dataclasses.replace(chosen, cuts=cuts), start.params, fold=False)
        if flaxslim.verify_by_layer((start.params, start.cfg), (other, cfg), spec=start.spec).ok:
            raise Wrong(f"a wrong cut is not seen: {cut.site.second.path}")
        return


# --- other libraries, and networks of our own -------------------------------------------------


def library(rng: np.random.Generator) -> tuple[str, str]:
    """One layout of another library; its name, and what it was."""
    name = list(LIBRARIES)[int(rng.integers(len(LIBRARIES)))]
    own = LIBRARIES[name]
    tree, x = own.tree(rng), rng.normal(size=(4, test_libraries.SIZES["d"]))
    sites = own.spec.sites(tree, own.cfg)
    dead = kill_rows(tree, sites, rng)
    chosen = flaxslim.plan(tree, own.cfg, own.spec, width="per_layer")
    for cut in chosen.cuts:
        if dict(cut.rules) != dead[cut.site.second.path].rules:
            raise Wrong(f"not all dead are found: {cut.site.second.path}")
        if cut.width != need((cut.site,), dead, 0):
            raise Wrong(f"{cut.width} stay: {cut.site.second.path}")
    small, cfg = test_libraries.slimmed(tree, own.cfg, own.spec, width="per_layer")
    before = own.run(tree, x)
    whole = all(cut.width for cut in chosen.cuts) or sites[0].pair.axis == "f"
    # `not <=`, since what is NaN is no proof.
    if whole and not strategies.gap(own.run(small, x), before) <= 1e-12:
        raise Wrong("another function")
    flaxslim.verify_by_layer((tree, own.cfg), (small, cfg), spec=own.spec).raise_if_failed()
    if own.width is not None:
        small, _ = test_libraries.slimmed(tree, own.cfg, own.spec)
        if not strategies.gap(own.run(small, x), before) <= 1e-12:
            raise Wrong("another function, of one width for all")
    return name, "cut" if chosen.removed else "nothing goes"


def own(rng: np.random.Generator) -> tuple[str, str]:
    """A network of feed-forward layers in one of our layouts."""
    name = sorted(strategies.LAYOUTS)[int(rng.integers(len(strategies.LAYOUTS)))]
    act = sorted(strategies.ACTS)[int(rng.integers(len(strategies.ACTS)))]
    layout = strategies.LAYOUTS[name]
    net = strategies.net(
        layout,
        seed=int(rng.integers(2**32)),
        d=int(rng.integers(1, 6)),
        f=int(rng.integers(1, 12)),
        depth=int(rng.integers(1, 4)),
        first_bias=bool(rng.integers(2)),
        second_bias=bool(rng.integers(2)),
    )
    for layer, dead in net.each():
        for channel in dead:
            _die(layer, int(channel), act, rng)
    spec, before = layout.spec(act), strategies.run(net.layers, act, net.x)
    if not np.isfinite(before).all():  # zero times infinity is no zero
        return f"our own, {name}", "infinite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flaxslim.NothingRemovedWarning)
        small, _ = flaxslim.slim(net.tree, net.cfg, spec)
        apart, _ = flaxslim.slim(net.tree, net.cfg, spec, width="per_layer")
    for tree in (small, apart):
        if not strategies.gap(strategies.run(layout.layers(tree), act, net.x), before) <= 1e-12:
            raise Wrong("another function")
    widths = [layer.width for layer in layout.layers(apart)]
    if widths != [len(living) for living in net.living]:
        raise Wrong(f"{widths} stay of {net.living}")
    if any(layer.width != net.need for layer in layout.layers(small)):
        raise Wrong(f"not {net.need} stay in each layer")
    return f"our own, {name}", "cut" if any(len(dead) for dead in net.dead) else "nothing goes"


def _die(layer: strategies.Ffn, channel: int, act: str, rng: np.random.Generator) -> None:
    """By one of the rules that can know of it."""
    rules = ["i"]
    if act in strategies.QUIET or len(layer.first) == 2:
        rules.append("silent")
    if layer.first_bias is not None and layer.second_bias is not None:
        rules.append("constant")
    rule = str(rng.choice(rules))
    if rule == "i":
        layer.second[channel] = 0
        return
    parts = range(len(layer.first))
    if rule == "silent" and len(layer.first) == 2:  # gate, if act(0) = 0; or up
        parts = (int(rng.integers(2)) if act in strategies.QUIET else 1,)
    for part in parts:
        layer.first[part][:, channel] = 0
        if rule == "silent" and layer.first_bias is not None:
            layer.first_bias[part][channel] = 0


# --- many -------------------------------------------------------------------------------------


def one(seed: int, number: int, *, whole: bool | None = None) -> tuple[str, str]:
    """One slim: what model it was, and what came of it. Raises if that is wrong."""
    rng = np.random.default_rng([seed, number])
    kind = rng.random()
    if kind < 0.15:
        return library(rng)
    if kind < 0.3:
        return own(rng)
    start = family(rng)
    whole = number % WHOLE == 0 if whole is None else whole
    return start.name, check_family(start, rng, whole=whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--only", type=int, help="this one alone")
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.count)
    numbers = numbers if given.only is None else (given.only,)
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failed: list[int] = []
    began = time.perf_counter()
    for number in numbers:
        try:
            name, what = one(given.seed, number)
            kinds[name][what] += 1
        except Exception as error:
            failed.append(number)
            text = "".join(traceback.format_exception(error)[-3:])
            print(f"WRONG --seed {given.seed} --only {number}\n{text}", flush=True)
        if number % 500 == 499:
            taken = time.perf_counter() - began
            print(f"up to {number:,} in {taken:.0f} s, {len(failed)} wrong", flush=True)
    total = sum(kinds.values(), collections.Counter())
    for name in sorted(kinds):
        print(f"{name:50}" + ", ".join(f"{n:,} {what}" for what, n in sorted(kinds[name].items())))
    taken = time.perf_counter() - began
    print(f"{len(numbers):,} slims of {len(kinds)} kinds of model in {taken:.0f} s: ", end="")
    print(", ".join(f"{n:,} {what}" for what, n in total.items()) + f"; {len(failed)} wrong")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
