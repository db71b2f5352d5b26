"""How wide each site becomes: the policies, rounding, groups of heads, floors, and bad values."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from strategies import GROUPED, TIED, gap, nets, quick, run

from flaxslim import NothingRemovedWarning, Pair, Plan, Spec, apply, plan, slim
from flaxslim._apply import resized
from flaxslim._plan import Cut
from flaxslim.errors import WidthError

POLICIES = ("uniform", "per_layer")
policies = st.sampled_from(POLICIES)

FFN = Pair(at="layers/{i}", first="up", second="down", width="hidden")
MLP = Spec(name="MLP", pairs=FFN)
HEADS = dataclasses.replace(GROUPED, at="layers/{i}")
ATTENTION = Spec(name="ATTENTION", pairs=HEADS)
RAGGED = Spec(name="RAGGED", pairs=dataclasses.replace(HEADS, ragged=True))

Living = Sequence[Sequence[bool]]  # for each layer, whether each channel lives


def ffn(living: Living) -> dict[str, Any]:
    """A feed-forward layer for each row, whose dead channels nothing reads."""
    made = {}
    for number, lives in enumerate(living):
        up, down = np.ones((2, len(lives))), np.ones((len(lives), 2))
        down[~np.asarray(lives, bool)] = 0
        made[str(number)] = {"up": {"kernel": up}, "down": {"kernel": down}}
    return {"layers": made}


def attention(living: Living, groups: int) -> dict[str, Any]:
    """An attention layer for each row, of heads in groups that share a key and a value."""
    rng = np.random.default_rng(0)
    made = {}
    for number, lives in enumerate(living):
        sizes = {"q": 2 * len(lives), "k": 2 * groups, "v": 2 * groups}
        kernels = {name: rng.normal(size=(3, size)) for name, size in sizes.items()}
        kernels["o"] = rng.normal(size=(len(lives), 2, 3))
        kernels["o"][~np.asarray(lives, bool)] = 0
        kernels["o"] = kernels["o"].reshape(-1, 3)
        made[str(number)] = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    return {"layers": made}


def attend(layer: dict[str, Any], groups: Sequence[int]) -> np.ndarray:
    """An attention layer by plain numpy; `groups` says how many heads each group has."""
    x = np.random.default_rng(1).normal(size=(5, 3))
    q, k, v = ((x @ layer[name]["kernel"]).reshape(5, -1, 2) for name in "qkv")
    owners = np.repeat(np.arange(len(groups)), groups)
    assert (k.shape[1], q.shape[1]) == (len(groups), len(owners))
    weights = np.exp(np.einsum("thk,shk->hts", q, k[:, owners]))
    mixed = np.einsum("hts,shk->thk", weights / weights.sum(-1, keepdims=True), v[:, owners])
    return mixed.reshape(5, -1) @ layer["o"]["kernel"]


def living_in(cut: Cut, living: Living) -> set[int]:
    return set(np.flatnonzero(living[cut.site.layer or 0]).tolist())


def least(need: int, multiple_of: int, full: int, floor: int = 0) -> int:
    """The smallest width that holds the need and is a multiple, or all there are: by trying."""
    allowed = (n for n in range(full + 1) if n % multiple_of == 0 or n == full)
    return next(n for n in allowed if n >= max(need, floor))


@st.composite
def masks(draw: st.DrawFn, sizes: Iterable[int] = range(1, 10)) -> list[list[bool]]:
    """Up to three layers of one size, and which of their channels live."""
    size = draw(st.sampled_from(list(sizes)))
    row = st.lists(st.booleans(), min_size=size, max_size=size)
    return draw(st.lists(row, min_size=1, max_size=3))


# --- channels ---------------------------------------------------------------------------------


@quick
@given(masks(), policies, st.integers(1, 11))
def test_a_width_is_the_least_that_the_policy_allows(living, width, multiple_of):
    """A multiple or all there are; of uniform layers the largest need, and one channel at least."""
    full, needs = len(living[0]), [sum(lives) for lives in living]
    p = plan(ffn(living), {"hidden": full}, MLP, width=width, multiple_of=multiple_of)
    if width == "uniform":
        needs = [max(needs)] * len(needs)
    floor = int(width == "uniform")
    assert [cut.width for cut in p.cuts] == [least(n, multiple_of, full, floor) for n in needs]
    for cut in p.cuts:
        assert living_in(cut, living) <= set(cut.keep)
    assert p.exact


@quick
@given(nets(), policies, st.integers(1, 6))
def test_the_function_is_the_same_at_every_policy(n, width, multiple_of):
    for layer, dead in n.each():
        layer.second[dead] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("gelu"), width=width, multiple_of=multiple_of)
    small = n.layout.layers(apply(p, n.tree))
    assert gap(run(small, "gelu", n.x), run(n.layers, "gelu", n.x)) <= 1e-12
    # And what is compared is not blind: one living channel less is seen.
    for layer in small:
        layer.second = layer.second.copy()
        layer.second[np.flatnonzero(layer.second.any(1))[:1]] = 0
    if any(n.living):
        assert gap(run(small, "gelu", n.x), run(n.layers, "gelu", n.x)) > 1e-9


@quick
@given(masks(), policies, st.integers(1, 11), st.booleans())
def test_what_is_left_is_at_its_least(living, width, multiple_of, grouped):
    """The same question asked again of what is left takes nothing more."""
    full = len(living[0])
    tree, cfg, spec = ffn(living), {"hidden": full}, MLP
    if grouped and full % 2 == 0:
        tree, spec = attention(living, full // 2), ATTENTION
        cfg = {"heads": full, "groups": full // 2, "size": 2}
    by_axis = {"f": multiple_of, "h": multiple_of}
    p = plan(tree, cfg, spec, width=width, multiple_of=by_axis)
    left = resized(p, cfg)
    again = plan(apply(p, tree), left, spec, width=width, multiple_of=by_axis)
    assert (again.removed, again.values) == (0, {})


def test_per_layer_takes_what_uniform_must_leave():
    living = [[True] * 3 + [False] * 5, [False] * 2 + [True] * 6]
    widths = {
        policy: [cut.width for cut in plan(ffn(living), {"hidden": 8}, MLP, width=policy).cuts]
        for policy in POLICIES
    }
    assert widths == {"uniform": [6, 6], "per_layer": [3, 6]}


# --- multiples --------------------------------------------------------------------------------


def _model() -> tuple[dict[str, Any], dict[str, int], Spec]:
    """Two layers of 12 channels and 8 heads, of which 3 and 5, and 1 and 3 live."""
    tree = ffn([[n < need for n in range(12)] for need in (3, 5)])
    single = dataclasses.replace(
        HEADS, first_axes="d (h k)", also={}, group=None, group_width=None, width="heads"
    )
    for number, need in enumerate((1, 3)):
        kernel = np.ones((16, 2))
        kernel[2 * need :] = 0
        tree["layers"][str(number)] |= {"v": {"kernel": np.ones((2, 16))}, "o": {"kernel": kernel}}
    return tree, {"hidden": 12, "heads": 8, "size": 2}, Spec(name="BOTH", pairs=(FFN, single))


def _widths(multiple_of: Any, width: str = "per_layer") -> dict[str, list[int]]:
    """By axis, the width of each layer."""
    p = plan(*_model(), width=width, multiple_of=multiple_of)
    found: dict[str, list[int]] = {}
    for cut in p.cuts:
        found.setdefault(cut.site.pair.axis, []).append(cut.width)
    return found


@pytest.mark.parametrize(
    ("multiple_of", "channels", "heads"),
    [
        (1, [3, 5], [1, 3]),
        (4, [4, 8], [1, 3]),
        (np.int64(4), [4, 8], [1, 3]),
        ({"f": 4}, [4, 8], [1, 3]),
        ({"h": 2}, [3, 5], [2, 4]),
        ({"f": 6, "h": 4}, [6, 6], [4, 4]),
        ({"layers/1": 4}, [3, 8], [1, 3]),
        ({"layers/*": 2}, [4, 6], [1, 3]),
        ({}, [3, 5], [1, 3]),
        (128, [12, 12], [1, 3]),
        ({"f": 128, "h": 5}, [12, 12], [5, 5]),
        ({"h": 6}, [3, 5], [6, 6]),
    ],
)
def test_a_multiple_holds_for_channels_or_for_an_axis_or_for_those_named(
    multiple_of, channels, heads
):
    assert _widths(multiple_of) == {"f": channels, "h": heads}


@pytest.mark.parametrize(
    ("multiple_of", "near"),
    [
        ({"ffn": 8}, "f"),
        ({"f": 8, "heads": 2}, "h"),
        ({"layer/*": 8}, "layers/0"),
        ({"encoder/layers/*": 8}, "layers/0"),
    ],
)
def test_an_entry_that_fits_no_site_is_refused_with_the_nearest_that_do(multiple_of, near):
    with pytest.raises(WidthError, match="fits no site") as caught:
        _widths(multiple_of)
    assert repr([*multiple_of][-1]) in str(caught.value)
    assert near in caught.value.near


def test_one_mapping_serves_specs_of_channels_and_of_heads():
    tree, cfg, spec = _model()
    for pair in spec:
        plan(tree, cfg, Spec(name="ONE", pairs=pair), multiple_of={"f": 4, "h": 2})


# Of four groups of two heads two live whole; of three groups one head each.
@pytest.mark.parametrize(
    ("living", "groups", "multiple_of", "left"),
    [
        ([True] * 4 + [False] * 4, 4, 4, (2, 2)),
        ([True] * 4 + [False] * 4, 4, 3, (2, 2, 2)),
        ([True, False] * 3, 3, 2, (2, 2, 2)),
        ([True] * 4 + [False] * 4, 4, 128, (2, 2, 2, 2)),
    ],
)
def test_a_multiple_is_one_of_heads_and_not_of_their_groups(living, groups, multiple_of, left):
    tree = attention([living], groups)
    p = plan(tree, _cfg([living], groups), ATTENTION, multiple_of={"h": multiple_of})
    assert p.cuts[0].groups == left


def test_of_the_entries_that_fit_a_site_the_last_holds():
    assert _widths({"f": 4, "layers/1": 6})["f"] == [4, 6]
    assert _widths({"layers/1": 6, "f": 4})["f"] == [4, 8]
    assert _widths({"*": 2, "h": 1}) == {"f": [4, 6], "h": [1, 3]}


def test_layers_that_share_a_width_heed_the_multiples_of_each():
    # 5 channels are needed; 6 would suit the one layer alone, and 8 the other.
    assert _widths({"layers/0": 6, "layers/1": 4}, "uniform")["f"] == [12, 12]
    assert _widths({"layers/0": 3, "layers/1": 2}, "uniform")["f"] == [6, 6]
    assert _widths({"layers/0": 6, "layers/1": 4})["f"] == [6, 8]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("width", POLICIES)
def test_a_multiple_beyond_the_size_keeps_all_there_are(width, fixed):
    """And is why nothing goes, whether or not a config could say a smaller width."""
    tree, cfg = ffn([[True, False, False]]), {"hidden": 3}
    spec = Spec(name="MLP", pairs=dataclasses.replace(FFN, fixed=fixed))
    with pytest.warns(NothingRemovedWarning, match="rounded up to multiple_of"):
        small, same = slim(tree, cfg, spec, width=width, multiple_of=4)
    assert small is tree
    assert same is cfg


# --- heads in groups --------------------------------------------------------------------------


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[list[bool]], int]:
    """Layers of heads in groups of one size, which of them live, and how many groups."""
    groups, each = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return draw(masks([groups * each])), groups


def _cfg(living: Living, groups: int) -> dict[str, int]:
    return {"heads": len(living[0]), "groups": groups, "size": 2}


def _check_same_attention(p: Plan, tree: dict[str, Any], groups: int) -> None:
    """What is left of every layer puts out what all of it did."""
    small = apply(p, tree)
    for cut in p.cuts:
        layer = str(cut.site.layer)
        before = attend(tree["layers"][layer], (cut.site.size // groups,) * groups)
        after = attend(small["layers"][layer], cut.groups)
        np.testing.assert_allclose(after, before, atol=1e-12)


@quick
@given(grouped(), policies, st.integers(1, 3))
def test_groups_shrink_evenly_where_the_class_has_one_number_for_them(drawn, width, multiple_of):
    living, groups = drawn
    each, tree = len(living[0]) // groups, attention(living, groups)
    p = plan(tree, _cfg(living, groups), ATTENTION, width=width, multiple_of={"h": multiple_of})
    _check_same_attention(p, tree, groups)
    counts = [np.reshape(lives, (groups, each)).sum(1) for lives in living]
    if width == "uniform":
        counts = [np.stack(counts)] * len(counts)
    for cut, count in zip(p.cuts, counts, strict=True):
        assert living_in(cut, living) <= set(cut.keep)
        assert len(set(cut.groups)) <= 1
        # As many groups as live, and in each as many heads as in the fullest; then the fewest
        # heads, in groups of one size, that are a multiple, or all there are.
        live, fullest = int((count > 0).sum(-1).max()), int(count.max())
        if width == "uniform":
            live, fullest = max(live, 1), max(fullest, 1)
        sizes = [g * e for g in range(live, groups + 1) for e in range(fullest, each + 1)]
        assert cut.width == min((n for n in sizes if n % multiple_of == 0), default=max(sizes))


@quick
@given(grouped(), st.integers(1, 5))
def test_a_head_goes_alone_where_the_class_carries_ragged_groups(drawn, multiple_of):
    living, groups = drawn
    tree, cfg = attention(living, groups), _cfg(living, groups)
    p = plan(tree, cfg, RAGGED, width="per_layer", multiple_of={"h": multiple_of})
    _check_same_attention(p, tree, groups)
    for cut in p.cuts:
        lives = living_in(cut, living)
        assert lives <= set(cut.keep)
        assert cut.width == least(len(lives), multiple_of, len(living[0]))


# Of three groups of two heads: the first dead whole, and one head of the second.
LOPSIDED = [[False, False, False, True, True, True]]


@pytest.mark.parametrize(
    ("spec", "width", "groups"),
    [
        (RAGGED, "per_layer", (1, 2)),
        (ATTENTION, "per_layer", (2, 2)),
        (RAGGED, "uniform", (2, 2)),  # a plain key has one number, whatever the class can carry
    ],
)
def test_who_may_have_ragged_groups(spec, width, groups):
    tree = attention(LOPSIDED, 3)
    p = plan(tree, _cfg(LOPSIDED, 3), spec, width=width)
    assert p.cuts[0].groups == groups
    _check_same_attention(p, tree, 3)


def test_without_a_config_groups_stay_even():
    """Nothing would say which head belongs to which group."""
    kernels = attention(LOPSIDED, 3)["layers"]["0"]
    for name, kernel in kernels.items():
        size = (-1, 2, 3) if name == "o" else (3, -1, 2)
        kernel["kernel"] = kernel["kernel"].reshape(size)
    pair = dataclasses.replace(
        *RAGGED,
        at="",
        first_axes="d g k",
        second_axes="h k d",
        also={"q": "d h k", "k": "d g k"},
        width=None,
        group_width=None,
        sizes={},
    )
    (cut,) = plan(kernels, None, Spec(name="FREE", pairs=pair), width="per_layer").cuts
    assert (cut.keep, cut.groups) == ((2, 3, 4, 5), (2, 2))


# --- sites that are tied ----------------------------------------------------------------------


@quick
@given(masks(range(2, 6)), policies, st.integers(1, 4))
def test_layers_that_share_a_table_keep_the_same_heads(living, width, multiple_of):
    """The table of the first layer has a column for each head, and all of them use it."""
    heads = len(living[0])
    layers = attention(living, heads)["layers"]
    for layer in layers.values():
        del layer["q"], layer["k"]
    layers["0"]["bias"] = {"embedding": np.arange(3.0 * heads).reshape(3, heads)}
    tree, cfg = {"block": layers}, {"heads": heads, "size": 2}
    p = plan(tree, cfg, TIED, width=width, multiple_of={"h": multiple_of})
    (keep,) = {cut.keep for cut in p.cuts}
    anywhere = np.flatnonzero(np.any(living, axis=0))
    assert set(anywhere) <= set(keep)
    assert len(keep) == least(len(anywhere), multiple_of, heads, int(width == "uniform"))
    table = apply(p, tree)["block"]["0"]["bias"]["embedding"]
    np.testing.assert_array_equal(table, layers["0"]["bias"]["embedding"][:, list(keep)])


# --- floors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple_of", [1, 3])
def test_a_layer_that_died_whole_goes_whole_where_each_has_its_own_width(multiple_of):
    living = [[False] * 6, [True, False, True, True, False, True]]
    p = plan(ffn(living), {"hidden": 6}, MLP, width="per_layer", multiple_of=multiple_of)
    assert p.cuts[0].width == 0
    # Stock classes cannot be built of nothing, so that all else leaves one, rounded up.
    dead = ffn([living[0]] * 2)
    p = plan(dead, {"hidden": 6}, MLP, multiple_of=multiple_of)
    assert {cut.width for cut in p.cuts} == {multiple_of}


class Attention(nnx.Module):
    """Heads and channels as modules keep them; all of them dead."""

    def __init__(self) -> None:
        for name, shape in {"q": (3, 4, 2), "k": (3, 2, 2), "v": (3, 2, 2), "up": (3, 4)}.items():
            setattr(self, name, Kernel(np.ones(shape)))
        self.o, self.down = Kernel(np.zeros((4, 2, 3))), Kernel(np.zeros((4, 3)))


class Kernel(nnx.Module):
    def __init__(self, kernel: np.ndarray):
        self.kernel = nnx.Param(kernel)


@pytest.mark.parametrize(("multiple_of", "heads"), [(1, 1), ({"h": 2}, 2)])
def test_a_module_keeps_a_head_and_no_channel(multiple_of, heads):
    """It divides by the number of its heads, of which some have to be left."""
    spec = Spec(
        name="MODULE",
        pairs=(
            Pair(first="up", second="down"),
            Pair(
                first="v",
                second="o",
                first_axes="d g k",
                second_axes="h k d",
                also={"q": "d h k", "k": "d g k"},
                axis="h",
                group="g",
                activation="identity",
            ),
        ),
    )
    p = plan(Attention(), None, spec, width="per_layer", multiple_of=multiple_of)
    widths = {cut.site.pair.axis: cut.width for cut in p.cuts}
    assert widths == {"f": 0, "h": heads}


# --- bad values -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["per-layer", "perlayer", "narrow", "", None, 0.5, 64, ["h"]])
def test_a_policy_that_is_none_is_refused_with_those_that_are(width):
    with pytest.raises(WidthError, match="no width policy") as caught:
        plan(ffn([[True]]), {"hidden": 1}, MLP, width=width)
    assert repr(width) in str(caught.value)
    for name in POLICIES:
        assert f'"{name}"' in str(caught.value)


EXAMPLE = {"f": 128, "h": 2}


@pytest.mark.parametrize(
    "multiple_of",
    [
        *(0, -8, 2.0, "8", None, True, [8], {0: 8}),
        *({"h": bad} for bad in (0, -1, 2.5, "2", False, None)),
    ],
)
@pytest.mark.parametrize("width", POLICIES)
def test_a_multiple_that_is_none_is_refused_with_one_that_is(width, multiple_of):
    tree = ffn([[True, False]])
    with pytest.raises(WidthError, match="positive whole number") as caught:
        slim(tree, {"hidden": 2}, MLP, width=width, multiple_of=multiple_of)
    assert repr(multiple_of) in str(caught.value)
    assert str(EXAMPLE) in str(caught.value).replace('"', "'")


def test_what_the_message_says_to_type_is_right():
    assert _widths(EXAMPLE) == {"f": [12, 12], "h": [2, 4]}
