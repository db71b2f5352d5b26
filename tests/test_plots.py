"""The pictures show the numbers that they are given, in our style, and refuse what does not fit."""

import csv
import io
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flaxslim
from flaxslim import FlaxslimError, Pair, Spec, plot_plan, plot_sweep, plot_training
from flaxslim.errors import PlotError, TargetError
from flaxslim.plots import _style
from flaxslim.plots._widths import shortened
from flaxslim.posttraining._report import Report, Row
from flaxslim.training._sparsity import SiteChannels, Sparsity

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

MLP = Spec(name="MLP", pairs=Pair(at="layer/{i}", first="up", second="down"))
LIVING = (3, 1, 6)  # of 8 channels, in three layers


@pytest.fixture(scope="module")
def plan() -> flaxslim.Plan:
    def layer(count: int) -> dict[str, Any]:
        second = np.ones((8, 2))
        second[count:] = 0.0
        return {"up": {"kernel": np.ones((2, 8))}, "down": {"kernel": second}}

    tree = {"layer": {str(i): layer(count) for i, count in enumerate(LIVING)}}
    return flaxslim.plan(tree, spec=MLP, width="per_layer")


def _scores() -> dict[str, np.ndarray]:
    return {f"layer/{i}/down/kernel": np.arange(8.0) for i in range(3)}


def _bars(panel: Any) -> list[float]:
    return [bar.get_width() for bar in panel.patches]


# --- plans ------------------------------------------------------------------------------------


def test_each_site_has_a_bar_before_and_one_after(plan):
    (panel,) = plot_plan(plan).axes
    assert _bars(panel) == [8, 3, 8, 1, 8, 6]
    assert [text.get_text() for text in panel.texts] == ["3 of 8", "1 of 8", "6 of 8"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1", "2"]
    assert panel.get_title(loc="left") == "layer/*/down; dark: what stays"
    assert max(panel.get_xticks()) <= 8, "no width is where the words are"
    assert panel.get_xlabel() == "width, channels"
    top, bottom = panel.get_ylim()
    assert top > bottom, "the first layer is at the top"


def test_the_words_beside_the_bars_are_within_the_picture(plan, tmp_path):
    for source in (plan, _report()):
        for scores in (None, _scores()) if source is plan else (None,):
            figure = plot_plan(source, scores=scores, title="of a plan")
            _style.write(figure, tmp_path / "p.png")
            whole = figure.bbox
            for panel in figure.axes:
                for text in panel.texts:
                    assert text.get_window_extent().x1 <= min(panel.bbox.x1, whole.x1) + 1


def _report() -> Report:
    rows = [("layer/0/down/kernel", "channels", 8, 4, 0.25), ("a/o/kernel", "heads", 4, 3, 0.125)]
    return Report(
        rows=tuple(
            Row(path=p, unit=u, before=b, after=a, predicted=None, measured=e, ridge=None)
            for p, u, b, a, e in rows
        ),
        samples=1,
        positions=1,
        output_error=0.0,
    )


def test_channels_and_heads_have_panels_of_their_own():
    panels = plot_plan(_report()).axes
    assert [panel.get_xlabel() for panel in panels] == ["width, channels", "width, heads"]
    assert [_bars(panel) for panel in panels] == [[8, 4], [4, 3]]
    assert panels[0].texts[0].get_text() == "4 of 8, error 0.25"
    colours = {panel.patches[1].get_facecolor() for panel in panels}
    assert len(colours) == 2


def test_scores_are_a_heat_map_with_the_largest_first(plan):
    scores = _scores()
    scores["layer/1/down/kernel"] = np.asarray([np.nan, *np.arange(7.0)])
    bars, heat, colours = plot_plan(plan, scores=scores).axes
    assert _bars(bars) == [8, 3, 8, 1, 8, 6]
    images = [np.ma.filled(np.ma.asarray(image.get_array()), np.nan)[0] for image in heat.images]
    np.testing.assert_allclose(images[0], np.arange(8.0)[::-1] / 7)
    np.testing.assert_allclose(images[1], [*(np.arange(7.0)[::-1] / 6), np.nan])
    at = {float(np.asarray(line.get_xdata())[0]) for line in heat.lines}
    assert at == {100 * count / 8 for count in LIVING}
    assert colours.get_ylabel() == "score / largest of the site"


def test_sparsity_gives_scores(plan):
    sites = {
        path: SiteChannels(alive=np.ones((1, 8), bool), score=score[None], gone=0)
        for path, score in _scores().items()
    }
    _, heat, _ = plot_plan(plan, scores=Sparsity(sites=sites)).axes
    assert len(heat.images) == 3


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"layer/0/down/kernal": np.zeros(8)}, "layer/0/down/kernal"),
        (_scores() | {"layer/2/down/kernel": np.zeros(6)}, "8 channels"),
        (_scores() | {"layer/2/down/kernel": np.zeros((1, 1, 8))}, "shape"),
    ],
)
def test_scores_of_another_tree_are_refused(plan, scores, words):
    with pytest.raises(PlotError, match=words):
        plot_plan(plan, scores=scores)


def test_what_tells_of_no_widths_is_refused():
    with pytest.raises(PlotError, match="a Plan"):
        plot_plan({"intermediate_size": 3})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("paths", "labels", "pattern"),
    [
        (["a/0/f", "b/0/f"], ["a", "b"], "*/0/f"),
        (["a/f", "a/f/g"], ["f", "f/g"], "a/*"),
        (["x", "y"], ["x", "y"], ""),
        (["l/1/l/1", "l/1/l/2"], ["1", "2"], "l/1/l/*"),
    ],
)
def test_paths_are_shortened_to_what_tells_them_apart(paths, labels, pattern):
    assert shortened(paths) == (labels, pattern)


# --- sweeps -----------------------------------------------------------------------------------

SWEEP = """preset,keep,parameters,error,accuracy
dense,1.0,200,0.0,0.9
fast,0.5,150,0.2,0.8
fast,0.25,100,0.4,0.7
magnitude,0.5,150,0.3,0.6
magnitude,0.25,100,0.6,0.5
"""


def _rows() -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(SWEEP)))


def test_a_sweep_has_a_panel_for_each_metric_and_a_line_for_each_preset():
    figure = plot_sweep(_rows())
    error, accuracy = figure.axes
    assert [panel.get_ylabel() for panel in figure.axes] == [
        "distance from the dense outputs",
        "accuracy",
    ]
    lines = {str(line.get_label()): line for line in accuracy.lines}
    assert list(lines) == ["fast", "magnitude", "dense"]
    np.testing.assert_allclose(np.asarray(lines["fast"].get_xdata()), [50, 75, 100])
    np.testing.assert_allclose(np.asarray(lines["fast"].get_ydata()), [0.7, 0.8, 0.9])
    assert lines["dense"].get_linestyle() == "--"
    assert lines["fast"].get_marker() != lines["magnitude"].get_marker()
    assert error.get_xlabel() == ""
    assert accuracy.get_xlabel() == "parameters left, %"


def test_one_metric_with_a_reference_from_elsewhere():
    (panel,) = plot_sweep(_rows(), metrics=["accuracy"], reference={"accuracy": 0.75}).axes
    (dashed,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert dashed.get_label() == "reference"
    assert list(np.asarray(dashed.get_ydata())) == [0.75, 0.75]


def test_colours_and_markers_tell_twelve_presets_apart():
    rows = [{"preset": "dense", "parameters": 2, "error": 0.0}]
    rows += [{"preset": f"p{i}", "parameters": 1, "error": i} for i in range(12)]
    (panel,) = plot_sweep(rows).axes
    looks = {(line.get_color(), line.get_marker()) for line in panel.lines[:-1]}
    assert len(looks) == 12


WRONG: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no dense": ([{"preset": "fast", "parameters": 1, "error": 0}], {}, "0 of them dense"),
    "dense alone": (_rows()[:1], {}, "without a method"),
    "no metric": ([{"preset": "dense", "parameters": 1}], {}, "no metric"),
    "such a metric": (_rows(), {"metrics": ["eror"]}, "error, accuracy"),
    "no number": ([*_rows(), {"preset": "fast", "parameters": 1}], {}, "no number 'error'"),
    "no preset": ([*_rows(), {"parameters": 1}], {}, "1 without a preset"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_sweep_is_refused(name):
    rows, more, words = WRONG[name]
    with pytest.raises(PlotError, match=words):
        plot_sweep(rows, **more)


# --- training ---------------------------------------------------------------------------------


def test_training_has_a_panel_for_what_the_rows_hold():
    rows = [
        {"step": 5, "sparsity": 0.25, "loss": 2.0, "ms_per_step": 7.0, "learning_rate": 0.1},
        {"step": 10, "sparsity": 0.5, "loss": 1.0, "ms_per_step": 5.0, "learning_rate": 0.1},
    ]
    dead, loss, time = plot_training(rows, shrunk=[10], title="digits").axes
    assert list(np.asarray(dead.lines[0].get_ydata())) == [25.0, 50.0]
    assert list(np.asarray(loss.lines[0].get_ydata())) == [2.0, 1.0]
    assert list(np.asarray(time.lines[0].get_ydata())) == [7.0, 5.0]
    assert [panel.get_ylabel() for panel in (dead, loss, time)] == [
        "dead channels, %",
        "loss",
        "time of a step, ms",
    ]
    assert time.get_xlabel() == "step"
    for panel in (dead, loss, time):
        assert panel.lines[1].get_linestyle() == "--"
        assert list(np.asarray(panel.lines[1].get_xdata())) == [10, 10]


def test_a_loop_of_ones_own_gives_what_sparsity_says():
    half = SiteChannels(alive=np.asarray([[True, False]]), score=np.zeros((1, 2)), gone=0)
    rows = [{"step": 1, "sparsity": Sparsity(sites={"down/kernel": half})}]
    (dead,) = plot_training(rows).axes
    assert list(np.asarray(dead.lines[0].get_ydata())) == [50.0]


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"loss": 1.0}], [{"step": 1, "loss": "x"}]])
def test_rows_with_nothing_to_draw_are_refused(rows):
    with pytest.raises(PlotError):
        plot_training(rows)


# --- style ------------------------------------------------------------------------------------


# Viénot, Brettel and Mollon 1999: what those see who lack the red, or the green cones.
_BLIND = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


@pytest.mark.parametrize("kind", _BLIND)
def test_neighbouring_colours_differ_for_the_colour_blind(kind):
    seen = []
    for colour in _style.COLOURS:
        rgb = np.asarray([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
        seen.append(np.clip(np.asarray(_BLIND[kind]) @ rgb, 0, 1) ** (1 / 2.2))
    for one, two in itertools.combinations(seen, 2):
        assert np.abs(one - two).max() > 0.1


def test_what_is_written_is_the_same_each_time(plan, tmp_path):
    for kind in _style.KINDS:
        paths = [tmp_path / f"{n}{kind}" for n in "ab"]
        for path in paths:
            _style.write(plot_plan(plan), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_our_style_is_not_left_behind(plan):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_plan(plan)
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_says_what_to_install(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FlaxslimError, match=r"flaxslim\[plots\]"):
        plot_plan(plan)


def test_where_no_picture_can_be_is_said_first(tmp_path):
    with pytest.raises(FlaxslimError, match=r"\.png, \.svg or \.pdf"):
        _style.check(tmp_path / "a.gif")
    with pytest.raises(TargetError, match="no such folder"):
        _style.check(Path(tmp_path / "nowhere" / "a.png"))
