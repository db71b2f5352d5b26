"""`discover` on random networks: what it says is exact is cut and compared, what it refuses tried.

pytest tests/test_discover_fuzz.py -s            # 50 networks, and a table
pytest tests/test_discover_fuzz.py -s -m long    # 2,000
"""

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from kill_rows import by_row
from networks import Network, network, networks
from strategies import enable_x64

from flaxslim import NothingRemovedWarning, Site, Spec, slim
from flaxslim._discover._atoms import size_of
from flaxslim._discover._discovery import Discovery, discovered
from flaxslim._discover._function import function
from flaxslim._discover._groups import Group, Verdict
from flaxslim._tree import flatten, replace

FEW, MANY = 25, 2_000


@dataclasses.dataclass
class Score:
    """What came out over all networks; `missed` by the reason that was given."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    missed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __str__(self) -> str:
        exact, missed = self.counts["exact groups"], sum(self.missed.values())
        lines = [f"{name:28}{count:8,}" for name, count in self.counts.items()]
        lines.append(f"{'recall':28}{exact / max(exact + missed, 1):8.1%}")
        lines += [f"  missed {count:4} x {why}" for why, count in self.missed.most_common()]
        return "\n".join(lines)


# --- what was said to be exact ----------------------------------------------------------------


def check_exact(net: Network, spec: Spec, score: Score) -> None:
    """Let channels die, of one site at a time and of all, in every way; cut them; compare."""
    rng = np.random.default_rng(0)
    sites = spec.sites(net.params)
    score.counts["sites"] += len(sites)
    score.counts["sites with activation"] += sum(s.pair.activation is not None for s in sites)
    for rule in ("i", "ii", "iii", "iv", "mixed"):
        for site in sites:
            _check_cut(net, spec, [site], rule, rng, score)
    if len(sites) > 1:
        _check_cut(net, spec, sites, "mixed", rng, score)


def _check_cut(
    net: Network, spec: Spec, sites: Sequence[Site], rule: str, rng: Any, score: Score
) -> None:
    leaves = {path: np.array(leaf) for path, leaf in flatten(net.params).items()}
    done = [_kill(leaves, site, rule, rng) for site in sites]
    if not any(done):
        return
    killed = replace(net.params, leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingRemovedWarning)
        small, _ = slim(killed, spec=spec, width="per_layer")
    if small is killed:
        # Rules that rest on act(0) = 0, a constant without a bias to fold it into, or heads of
        # which not as many are dead in each group.
        grouped = any(site.groups for site in sites)
        assert rule != "i" or grouped, f"nothing was cut at {[site.name for site in sites]}"
        return
    for x in (net.x, rng.normal(size=net.x.shape)):
        want = net.run(killed, x)
        if all(np.isfinite(out).all() for out in want):  # zero times infinity is no zero
            assert_same(net, want, net.run(small, x), rule)
    score.counts[f"cuts by rule {rule}"] += 1


def assert_same(
    net: Network, want: Sequence[np.ndarray], got: Sequence[np.ndarray], what: str
) -> None:
    gap = difference(want, got)
    assert gap <= (1e-5 if net.rounded else 1e-9), f"{what}: {gap:.2g} apart"


def difference(want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """The largest one relative to the largest output; infinite for other shapes."""
    if [a.shape for a in want] != [b.shape for b in got]:
        return np.inf
    gaps = [0.0]
    for a, b in zip(want, got, strict=True):
        real = np.isfinite(a)
        if not np.array_equal(real, np.isfinite(b)):
            return np.inf
        scale = np.abs(a[real]).max(initial=0.0) or 1.0
        gaps.append(float(np.abs(a[real] - b[real]).max(initial=0.0) / scale))
    return max(gaps)


def _kill(leaves: dict[str, np.ndarray], site: Site, rule: str, rng: Any) -> bool:
    """Kill as many channels in each row of a site, others in each; whether there is such a way."""
    ways = _ways(site) if rule == "mixed" else [rule] if rule in _ways(site) else []
    if not ways or site.size < 2:
        return False
    count = int(rng.integers(1, site.size))
    for index in np.ndindex(*site.stack):
        for channel in rng.permutation(site.size)[:count].tolist():
            _zero(leaves, site, index, str(rng.choice(ways)), channel, rng)
    return True


def _ways(site: Site) -> list[str]:
    """The rules by which a channel may be found dead; the activation is judged by `slim`."""
    if site.pair.activation is None:
        return ["i"]
    biased = None not in site.first_biases
    return ["i", "ii" if site.pair.gated else "iii", *(["iv"] if biased else [])]


def _zero(
    leaves: dict[str, np.ndarray], site: Site, index: Any, rule: str, channel: int, rng: Any
) -> None:
    if rule == "i":
        for tensor in site.reading:
            by_row(leaves, site, tensor)[index][channel] = 0
        return
    kernels, biases = list(_parts(leaves, site, site.first)), []
    if rule != "iv":
        biases = list(_parts(leaves, site, site.first_biases))
    if rule == "ii":
        part = int(rng.integers(2))
        kernels, biases = kernels[part : part + 1], biases[part : part + 1]
    for view in (*kernels, *biases):
        group = channel * view.shape[len(index)] // site.size  # of heads that share their values
        view[index][group] = 0


def _parts(
    leaves: dict[str, np.ndarray], site: Site, tensors: Sequence[Any]
) -> Iterator[np.ndarray]:
    """A view for each factor of the hidden value: the stack, the channels, the rest."""
    parts = site.pair.parts or ((0, 1) if site.pair.gated and len(site.first) == 1 else ())
    for tensor in filter(None, tensors):
        front = next((i for i, f in enumerate(tensor.axes.factors) if isinstance(f, int)), None)
        stack = [tensor.axes.position(name) for name in site.second.axes.stack]
        order = [*([front] if parts else []), *stack, tensor.axes.position(site.axis(tensor))]
        view = tensor.axes.split(leaves[tensor.path])
        view = np.moveaxis(view, order, range(len(order)))
        assert np.shares_memory(view, leaves[tensor.path])
        yield from (view[part] for part in parts) if parts else (view,)


# --- what was refused -------------------------------------------------------------------------


def check_refused(net: Network, found: Discovery, score: Score) -> None:
    """Count what would have been exact all the same."""
    pairs = {group for _, groups in found.pairs for group in groups}
    score.counts["exact groups"] += len(pairs)
    for group in found.groups:
        if group in pairs or group.size < 2:
            continue
        verdict = group.verdict if group.reason else Verdict.INNER
        score.counts[f"{verdict.value} groups"] += 1
        if verdict is Verdict.REFUSED and _would_be_exact(net, group):
            assert group.reason is not None
            score.missed[_kind(group.reason.why)] += 1


def _kind(why: str) -> str:
    """A reason without the names in it."""
    return " ".join("#" if any(c in word for c in "/0123456789_") else word for word in why.split())


def _would_be_exact(net: Network, group: Group) -> bool:
    """Whether some layers read it, such that an index goes if it is zero in them."""
    weights = {path for total in group.sums for value in total.args for path in value.weights}
    readers = {path for path in group.paths if path in weights}
    choices = {frozenset([path]) for path in group.paths} | {frozenset(readers)}
    return any(
        0 < len(chosen) < len(group.paths) and all(_goes(net, group, chosen, j) for j in (0, -1))
        for chosen in choices
    )


def _goes(net: Network, group: Group, readers: frozenset[str], index: int) -> bool:
    leaves = {path: np.array(leaf) for path, leaf in flatten(net.params).items()}
    for path in readers:
        for view in _views(leaves[path], path, group):
            view[index] = 0
    killed = replace(net.params, leaves)
    small = dict(leaves)
    for path, dimension in group.factors:
        small[path] = _without(small[path], path, dimension, group, index)
    rng = np.random.default_rng(1)
    for _ in range(2):
        x = rng.normal(size=net.x.shape)
        try:
            cut = net.run(replace(net.params, small), x)
        except (TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError):
            return False  # it does not run with fewer
        if difference(net.run(killed, x), cut) > (1e-5 if net.rounded else 1e-9):
            return False
    return True


def _split(x: np.ndarray, path: str, dimension: int, group: Group) -> tuple[np.ndarray, list[int]]:
    """With the factors of a dimension apart, and where among them the group's own axis stands."""
    sizes = [atom.size for atom in group.factors[path, dimension]]
    own = [
        dimension + m.factor for m in group.members if (m.path, m.dimension) == (path, dimension)
    ]
    return x.reshape(*x.shape[:dimension], *sizes, *x.shape[dimension + 1 :]), own


def _views(x: np.ndarray, path: str, group: Group) -> Iterator[np.ndarray]:
    for own, dimension in [key for key in group.factors if key[0] == path]:
        split, places = _split(x, own, dimension, group)
        yield from (np.moveaxis(split, place, 0) for place in places)


def _without(x: np.ndarray, path: str, dimension: int, group: Group, index: int) -> np.ndarray:
    split, places = _split(x, path, dimension, group)
    for place in places:
        split = np.delete(split, index, axis=place)
    factors = group.factors[path, dimension]
    left = size_of(factors) // group.size ** len(places) * (group.size - 1) ** len(places)
    return split.reshape(*x.shape[:dimension], left, *x.shape[dimension + 1 :])


# --- the tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_networks_run_by_numpy_are_what_jax_makes_of_them(seed):
    with enable_x64():
        net = network(seed, 3)
        want = [np.asarray(out) for out in jax.jit(net.fn)(net.params, net.x)]
        assert difference(want, net.run(net.params, net.x)) < (1e-5 if net.rounded else 1e-12)


def check(net: Network, score: Score) -> None:
    score.counts["networks"] += 1
    found = discovered(function(net.fn, net.params, (net.x,)))
    # Where sizes are written into the function its own note says that it cannot be told.
    stiff = any("does not run at another width" in note for note in found.notes)
    score.counts["of them not to be run smaller"] += stiff
    if found.pairs and not stiff:
        check_exact(net, found.spec("FUZZ"), score)
    check_refused(net, found, score)


# What the fuzz test found: ways in which the number of channels comes to be known.
TOLD: dict[str, Callable[[Any, Any, Any], Any]] = {
    "largest of iota": lambda h, x, y: y / (1.0 + jnp.arange(h.shape[-1]).max()),
    "last of iota": lambda h, x, y: y / jnp.arange(1.0, 1 + h.shape[-1])[-1],
    "last of cumsum": lambda h, x, y: y / jnp.cumsum(jnp.ones(h.shape[-1]))[-1],
    "dot of ones": lambda h, x, y: y / (jnp.ones(h.shape[-1]) @ jnp.ones(h.shape[-1])),
    "trace of eye": lambda h, x, y: y / jnp.trace(jnp.eye(h.shape[-1])),
    "product": lambda h, x, y: y / jnp.prod(jnp.full(h.shape[-1], 1.1)),
    "rounds of a loop": lambda h, x, y: jax.lax.fori_loop(0, h.shape[-1], lambda _, a: 1.1 * a, y),
    "index": lambda h, x, y: y + x[:, h.shape[-1] // 3][:, None],
    "index modulo": lambda h, x, y: y + x[:, h.shape[-1] % 4][:, None],
    "shift": lambda h, x, y: y + jnp.roll(x, h.shape[-1] // 3, 1),
    "array": lambda h, x, y: y * np.full(y.shape[-1], 1 / h.shape[-1]),
    "array along it": lambda h, x, y: y * np.full(h.shape[-1], 1 / h.shape[-1])[:1],
    "padding": lambda h, x, y: y + jnp.pad(x[0, :, 0], (h.shape[-1], 0), constant_values=1).sum(),
    "random key": lambda h, x, y: y * jax.random.uniform(jax.random.key(h.shape[-1]), y.shape),
}


@pytest.mark.parametrize("told", TOLD)
def test_a_function_that_knows_the_number_of_channels_is_refused(told):
    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.relu(x @ p["up"])
        return TOLD[told](h, x, h @ p["down"])

    params = {"up": np.ones((4, 8), np.float32), "down": np.ones((8, 4), np.float32)}
    assert not discovered(function(fn, params, (np.ones((2, 4, 4), np.float32),))).pairs


@contextlib.contextmanager
def _whole_tracebacks() -> Iterator[None]:
    """To filter them takes long, and those of functions that do not run smaller are not shown."""
    before = jax.config.jax_traceback_filtering  # pyright: ignore
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


def _fuzz(count: int) -> None:
    score = Score()

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    @given(networks())
    def each(net: Network) -> None:
        check(net, score)

    with enable_x64(), _whole_tracebacks():
        each()
    print(f"\n{score}")
    assert score.counts["sites"] > count / 4, "the networks are such that hardly any can be cut"


def test_what_is_said_to_be_exact_in_random_networks_is_so():
    _fuzz(FEW)


@pytest.mark.long
def test_what_is_said_to_be_exact_in_many_random_networks_is_so():
    _fuzz(MANY)
