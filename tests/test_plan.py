"""Which channels stay: widths, rounding, filling, and the plan as a value."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import PLAIN, net, nets, quick

from flaxslim import Pair, Plan, Spec, plan
from flaxslim.errors import FlaxslimError, PlanError, UnsupportedDtypeError, WidthError

SPEC = Spec(name="MLP", pairs=Pair(first="up", second="down", width="hidden"))


def layers(*dead: list[int], width: int = 8) -> dict:
    """A tree with one MLP for each list of dead channels."""
    tree = {}
    for number, channels in enumerate(dead):
        second = np.ones((width, 2))
        second[channels] = 0
        tree[str(number)] = {"up": {"kernel": np.ones((2, width))}, "down": {"kernel": second}}
    return tree


def kept(p: Plan) -> list[tuple[int, ...]]:
    return [cut.keep for cut in p.cuts]


# --- widths -----------------------------------------------------------------------------------


@quick
@given(
    nets(),
    st.integers(1, 12),
)
def test_uniform_width_is_the_largest_need_rounded_up(n, multiple_of):
    for ffn, dead in n.each():
        ffn.second[dead] = 0
    p = plan(n.tree, n.cfg, n.layout.spec("relu"), multiple_of=multiple_of)
    width = n.layers[0].width
    expected = min(width, math.ceil(n.need / multiple_of) * multiple_of)
    (resize,) = p.resizes
    assert (resize.width, resize.before, resize.after) == ("hidden", width, expected)
    assert p.values == ({"hidden": expected} if expected < width else {})
    for cut, living, dead in zip(p.cuts, n.living, n.dead, strict=True):
        filling = sorted(dead.tolist())[: expected - len(living)]
        assert cut.keep == tuple(sorted(living | set(filling)))
        assert cut.dead == len(dead)
        assert cut.removed == width - expected


def test_filling_is_the_lowest_dead_index():
    p = plan(layers([1, 4, 6, 7], [0]), {"hidden": 8}, SPEC)
    assert kept(p) == [(0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7)]


def test_a_layer_that_is_dead_whole_keeps_one_channel():
    p = plan(layers(list(range(8))), {"hidden": 8}, SPEC)
    assert kept(p) == [(0,)]
    assert p.cuts[0].dead == 8


def test_each_key_has_its_own_width():
    tree = {"enc": layers([0, 1, 2])["0"], "dec": layers([0], width=6)["0"]}
    pair = Pair(first="up", second="down")
    spec = Spec(
        name="TWO",
        pairs=(
            dataclasses.replace(pair, at="enc", width="encoder_dim"),
            dataclasses.replace(pair, at="dec", width="decoder_dim"),
        ),
    )
    p = plan(tree, {"encoder_dim": 8, "decoder_dim": 6}, spec)
    assert {r.width: (r.before, r.after) for r in p.resizes} == {
        "encoder_dim": (8, 5),
        "decoder_dim": (6, 5),
    }


def test_without_a_width_key_sites_of_one_size_go_together():
    tree = {"a": layers([0, 1])["0"], "b": layers([0])["0"], "c": layers([0, 1, 2], width=5)["0"]}
    p = plan(tree, spec=Spec(name="FREE", pairs=Pair(first="up", second="down")))
    assert [len(keep) for keep in kept(p)] == [7, 7, 2]
    assert p.resizes == ()


def test_multiple_of_beyond_the_width_removes_nothing():
    p = plan(layers([0, 1]), {"hidden": 8}, SPEC, multiple_of=128)
    assert p.removed == 0
    assert p.cuts[0].dead == 2


@pytest.mark.parametrize("multiple_of", [0, -1, 2.0, "2", True, None])
def test_multiple_of_must_be_a_positive_whole_number(multiple_of):
    with pytest.raises(WidthError, match="positive whole number") as caught:
        plan(layers([0]), {"hidden": 8}, SPEC, multiple_of=multiple_of)
    assert repr(multiple_of) in str(caught.value)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 1.5, math.inf, math.nan])
def test_threshold_must_be_relative(threshold):
    with pytest.raises(WidthError, match="relative to the largest row norm") as caught:
        plan(layers([0]), {"hidden": 8}, SPEC, threshold=threshold)
    assert repr(threshold) in str(caught.value)


@pytest.mark.parametrize("width", ["per-layer", "Uniform", ""])
def test_other_widths_are_refused(width):
    with pytest.raises(WidthError) as caught:
        plan(layers([0]), {"hidden": 8}, SPEC, width=width)
    assert repr(width) in str(caught.value)
    assert '"per_layer"' in str(caught.value)


# --- as a value -------------------------------------------------------------------------------


@quick
@given(nets(first_bias=True), st.integers(1, 4), st.sampled_from([0.0, 0.5]))
def test_a_plan_is_deterministic_and_survives_json(n, multiple_of, threshold):
    for ffn, dead in n.each():
        ffn.second[dead[::2]] = 0
        ffn.first[:, :, dead[1::2]] = 0  # constants, which are folded
    args = (n.tree, n.cfg, n.layout.spec("gelu"))
    p = plan(*args, multiple_of=multiple_of, threshold=threshold)
    assert plan(*args, multiple_of=multiple_of, threshold=threshold) == p
    again = Plan.from_json(p.to_json())
    assert again == p
    assert again.to_json() == p.to_json()
    assert str(again) == str(p)
    assert (again.exact, again.removed) == (p.exact, p.removed)


def test_what_happens_to_a_site_can_be_read():
    tree = layers([0, 1, 2], [5])
    tree["0"]["note"] = np.ones(3)
    p = plan(tree, {"hidden": 8}, SPEC)
    text = str(p)
    lines = text.splitlines()
    assert lines[0] == "plan by MLP, exact"
    assert lines[1].split() == ["site", "channels", "dead", "kept", "by", "rule"]
    assert lines[2].split() == ["0", "8", "3", "7", "(i)", "3"]
    assert lines[3].split() == ["1", "8", "1", "7", "(i)", "1"]
    assert "hidden: 8 -> 7 channels" in text
    assert p.removed == 2
    assert p.removed_parameters == 2 * (2 + 2)
    assert "2 channels go, with 8 parameters" in text
    assert "nothing goes" in str(plan(layers([]), {"hidden": 8}, SPEC))


def test_a_tensor_beside_a_kernel_that_may_need_the_cut_is_noted():
    n = net(PLAIN["plain"], seed=2, depth=1, f=7, d=3)
    n.dead = [np.array([1])]
    n.layers[0].second[1] = 0
    tree = n.tree
    tree["layers"]["0"]["up"] |= {"mask_a": np.ones((3, 2)), "mask_b": np.ones((2, 7))}
    p = plan(tree, n.cfg, n.layout.spec("relu"))
    notes = [note for note in p.notes if "mask" in note]
    assert len(notes) == 1
    assert "layers/0/up/mask_b stands beside" in notes[0]
    assert "7 channels" in notes[0]
    assert notes[0] in str(p)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is not JSON"),
        ("{", "this is not JSON"),
        ("null", "not the JSON of a plan"),
        ("[]", "not the JSON of a plan"),
        ("{}", "KeyError: 'version'"),
        ('{"version": 99}', "another version"),
        ('{"version": 1}', "another version"),
        ('{"version": 2}', "KeyError"),
        ('{"version": 2, "spec": {"name": "x", "pairs": [1]}}', "not the JSON of a plan"),
    ],
)
def test_json_that_is_no_plan_is_refused(text, message):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["second_bias", "first_biases"])
def test_a_plan_with_an_empty_text_for_a_tensor_is_refused(name):
    data = json.loads(plan(layers([0, 3]), {"hidden": 8}, SPEC).to_json())
    data["cuts"][0][name] = "" if name == "second_bias" else [""]
    with pytest.raises(PlanError, match="not the JSON of a plan"):
        Plan.from_dict(data)


def test_a_plan_with_a_part_missing_is_refused():
    data = plan(layers([0, 3]), {"hidden": 8}, SPEC).to_dict()
    for key in data:
        with pytest.raises(PlanError, match="not the JSON of a plan"):
            Plan.from_dict({k: v for k, v in data.items() if k != key})
    for key in data["cuts"][0]:
        broken = json.loads(json.dumps(data))
        del broken["cuts"][0][key]
        with pytest.raises(PlanError, match="not the JSON of a plan"):
            Plan.from_dict(broken)


@pytest.mark.parametrize("keep", [[0, 8], [-1, 3], [3, 1], [1, 1], [0, "x"], None])
def test_a_plan_that_keeps_channels_which_are_not_there_is_refused(keep):
    data = plan(layers([0, 3]), {"hidden": 8}, SPEC).to_dict()
    data["cuts"][0]["keep"] = keep
    with pytest.raises(PlanError):
        Plan.from_dict(data)


def _broken(key: str, value: object) -> dict:
    """The JSON of a plan with one value of a cut, or of the plan, replaced."""
    data = json.loads(plan(layers([0, 3], [1]), {"hidden": 8}, SPEC).to_json())
    (data["cuts"][0] if key in data["cuts"][0] else data)[key] = value
    return data


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 999),
        ("groups", [4]),
        ("weak", "x"),
        ("dead", True),
        ("rules", {"i": "x"}),
        ("layer", "0"),
        ("activation", 1),
        ("threshold", "0"),
        ("notes", "x"),
        ("values", [1]),
        ("resizes", [{"width": "hidden", "before": "8", "after": 7, "least": 7}]),
        ("sites", 1),
    ],
)
def test_a_plan_with_a_value_of_the_wrong_kind_is_refused(key, value):
    with pytest.raises(PlanError):
        Plan.from_dict(_broken(key, value))


def test_a_plan_that_lost_a_cut_is_refused():
    """The config would say the new width of a layer that keeps the old one."""
    data = _broken("layer", None)
    del data["cuts"][1]
    with pytest.raises(PlanError, match="not all of its cuts"):
        Plan.from_dict(data)


@pytest.mark.parametrize("text", [None, 3, {}])
def test_what_is_no_text_is_no_plan(text):
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json(text)


def test_heads_are_called_heads():
    tree = layers([0, 3])["0"]
    tree |= {"v": {"kernel": np.ones((2, 6))}, "o": {"kernel": np.ones((6, 2))}}
    tree["o"]["kernel"][:4] = 0
    heads = Pair(
        first="v",
        second="o",
        first_axes="d (h k)",
        second_axes="(h k) d",
        axis="h",
        width="heads",
        sizes={"k": "k"},
    )
    cfg = {"hidden": 8, "heads": 3, "k": 2}
    p = plan(tree, cfg, SPEC + Spec(name="HEADS", pairs=heads))
    assert "hidden: 8 -> 6 channels\nheads: 3 -> 1 heads\n" in str(p)
    assert "2 channels and 2 heads go, with" in str(p)
    kept = plan(tree, cfg, Spec(name="HEADS", pairs=heads), multiple_of={"h": 3})
    assert (kept.why_nothing or "").startswith("2 heads at 1 site of HEADS are dead")


def test_one_is_no_plural():
    assert "\n1 channel goes, with" in str(plan(layers([1]), {"hidden": 8}, SPEC))
    kept = plan(layers([], [1]), {"hidden": 8}, SPEC)
    assert (kept.why_nothing or "").startswith("1 channel at 2 sites of MLP is dead")


def test_all_errors_are_of_one_family():
    with pytest.raises(FlaxslimError):
        plan(layers([0]), {"hidden": 9}, SPEC)


# --- quantised kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight_scale", "scales", "qzeros", "g_idx", "kernel_scale"])
def test_a_kernel_with_scales_is_refused(name):
    tree = {
        "up": {"kernel": np.ones((3, 4)), name: np.ones((4, 1))},
        "down": {"kernel": np.zeros((4, 3))},
    }
    with pytest.raises(UnsupportedDtypeError, match="quantised") as caught:
        plan(tree, spec=Spec(name="MLP", pairs=Pair(first="up", second="down")))
    assert caught.value.path == f"up/{name}"


def test_a_config_that_says_quantised_is_refused():
    tree = {"up": {"kernel": np.ones((3, 4))}, "down": {"kernel": np.zeros((4, 3))}}
    cfg = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UnsupportedDtypeError, match="the weights are quantised"):
        plan(tree, cfg, Spec(name="MLP", pairs=Pair(first="up", second="down")))
