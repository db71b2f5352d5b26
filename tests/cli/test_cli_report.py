"""`flaxslim report`: what the record tells is on the page, as text, and the page stands alone."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flaxslim
from cli.tiny import WIDTH
from flaxslim._proof import Change, Control, ControlRow, OutputRow, Proof
from flaxslim.checkpoint import read
from flaxslim.cli import _page, _slim, _slimming
from flaxslim.errors import CorruptFileError

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)"


def proof() -> Proof:
    """What `verify` would find; to run models takes longer than all else here."""
    rows = tuple(
        ControlRow(site=f"layer/{i}", channels=1, living=32, relative=0.003 + i, seen=True)
        for i in range(2)
    )
    row = OutputRow(
        path="logits",
        shape=(2, 8, 30),
        dtype="float32",
        largest=2.0,
        difference=4e-7,
        relative=2e-7,
    )
    return Proof(
        outputs=(row,),
        tolerance=1e-5,
        tolerance_reason="of float32",
        control=Control(rows=rows, sites=2, bar=2e-5),
        milliseconds=Change(before=11.1, after=7.1),
        parameters=Change(before=20_000, after=15_000),
        bytes=Change(before=80_000, after=60_000),
        flops=Change(before=3_000_000, after=2_000_000),
        device="cpu (cpu)",
        dtype="float32",
    )


def slimmed_to(out: Path, source: Path) -> Path:
    """What `flaxslim slim source out --width per_layer` writes, but for running the models."""
    before = read(source)
    chosen = flaxslim.plan(before.params, before.config, width="per_layer")
    params, cfg = flaxslim.slim(before.params, before.config, width="per_layer")
    record = _slim.record(str(source), chosen, proof())
    return flaxslim.save(out, params, cfg, like=before, record=record)


@pytest.fixture(scope="module")
def slimmed(checkpoints, tmp_path_factory) -> Path:
    return slimmed_to(tmp_path_factory.mktemp("report") / "smaller", checkpoints["flax"])


@pytest.fixture(scope="module")
def page(slimmed) -> str:
    return _page.page(_slimming.read(slimmed))


class _Page(HTMLParser):
    """A page as its texts, tags and attributes; every tag is closed in its turn."""

    VOID = ("meta", "rect")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]


# --- what is on it ----------------------------------------------------------------------------


def test_the_page_tells_what_the_record_tells(page, slimmed):
    record = json.loads((slimmed / "flaxslim.json").read_text())
    found = _Page(page)
    words = " ".join(" ".join(found.texts).split())  # cells side by side
    for cut in record["plan"]["cuts"]:
        path, _, shape, _ = cut["second"]
        assert f"{path} {shape[0]} {len(cut['keep'])}" in re.sub(r" +", " ", words)
    for told in (
        "equal to rounding: largest difference 2.0e-07 of the largest output (tolerance 1.0e-05)",
        "parameters 20,000 15,000 1.33x",
        "FLOPs, one forward pass 3,000,000 2,000,000 1.50x",
        "latency 11.1 ms 7.1 ms 1.56x",
        "logits 2 × 8 × 30 float32 2.0e+00 4.0e-07 2.0e-07",
        "a wrong cut on purpose shows (more than 2.0e-05) at 2 of 2 sites tried, of 2",
        "layer/0 1 of 32 3.0e-03 yes",
        "Measured on cpu (cpu)",
    ):
        assert told in words
    assert json.loads(
        "".join(found.texts).partition("config.json")[2].rpartition("}")[0] + "}"
    ) == (json.loads((slimmed / "config.json").read_text()))


def test_a_bar_is_as_long_as_its_layer_is_wide(page, slimmed):
    bars = re.findall(r'class="before" width="(\S+)".*?class="channels" width="(\S+)"', page)
    cuts = json.loads((slimmed / "flaxslim.json").read_text())["plan"]["cuts"]
    assert len(bars) == len(cuts) == 2
    for (before, after), cut in zip(bars, cuts, strict=True):
        assert float(before) == 100
        assert float(after) == pytest.approx(100 * len(cut["keep"]) / 72, abs=0.01)


def test_a_proof_that_failed_is_not_called_one(slimmed, tmp_path):
    folder = shutil.copytree(slimmed, tmp_path / "wrong")
    record = json.loads((folder / "flaxslim.json").read_text())
    record["proof"]["outputs"][0]["relative"] = 0.5
    record["proof"] |= {"ok": True, "reasons": []}  # what it says of itself does not count
    (folder / "flaxslim.json").write_text(json.dumps(record))
    text = _page.page(_slimming.read(folder))
    assert 'class="verdict bad"' in text
    assert "NOT EQUAL" in text
    assert "differs by 5.0e-01" in text


def test_without_a_proof_none_is_claimed(slimmed, tmp_path):
    folder = shutil.copytree(slimmed, tmp_path / "unproven")
    record = json.loads((folder / "flaxslim.json").read_text())
    (folder / "flaxslim.json").write_text(json.dumps({**record, "proof": None}))
    text = _page.page(_slimming.read(folder))
    assert 'class="verdict unknown"' in text
    assert "no proof was recorded" in text
    assert "equal to rounding" not in text


# --- the page ---------------------------------------------------------------------------------


def test_the_page_stands_alone(page):
    found = _Page(page)
    assert "script" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    addresses = [value for name, value in found.attributes if name in ("href", "src")]
    assert addresses
    assert {address.removeprefix("#") for address in addresses} <= set(found.ids)
    assert not re.search(r"url\(|@import|https?:", page)
    assert len(found.ids) == len(set(found.ids))
    assert ("lang", "en") in found.attributes


def test_the_keyboard_reaches_all(page):
    found = _Page(page)
    headings = [id for id in found.ids if id != "main"]
    assert [v for n, v in found.attributes if n == "href"] == [
        f"#{id}" for id in ("main", *headings)
    ]
    scrolled = page.count('class="scroll"')
    assert scrolled == len(
        re.findall(r'class="scroll" tabindex="0" role="region" aria-label=', page)
    )
    assert page.count("<details") == page.count("<summary>")


def _colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def _luminance(colour: str) -> float:
    """Of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_enough_in_light_and_dark(page):
    """AA of WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    light, dark = (_colours(block) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL))
    assert light.keys() == dark.keys()
    for own in (light, dark):
        for text in ("text", "quiet", "link"):
            for under in ("page", "box"):
                assert contrast(own[text], own[under]) >= 4.5, (text, under)
        for drawn in ("channels", "heads", "good", "near", "bad"):
            assert contrast(own[drawn], own["page"]) >= 3, drawn


# --- what others wrote ------------------------------------------------------------------------


def test_nothing_that_others_wrote_becomes_markup(slimmed, tmp_path):
    folder = shutil.copytree(slimmed, tmp_path / "<img src=x onerror=alert(1)>")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": HOSTILE, "architectures": [HOSTILE], HOSTILE: {"deep": [HOSTILE]}}
    (folder / "config.json").write_text(json.dumps(config))
    record = json.loads((folder / "flaxslim.json").read_text())
    record |= {"flaxslim": HOSTILE, "card": f"`{HOSTILE}`\n\n$name ${{x}} {HOSTILE}"}
    record["plan"]["notes"] = [HOSTILE]
    for row in (*record["proof"]["outputs"], *record["proof"]["control"]["rows"]):
        row |= {name: HOSTILE for name in ("path", "site", "dtype") if name in row}
    record["proof"] |= {"device": HOSTILE, "tolerance_reason": HOSTILE, "notes": [HOSTILE]}
    (folder / "flaxslim.json").write_text(json.dumps(record))
    (folder / "report.json").write_text(json.dumps(_run({HOSTILE: {HOSTILE: 1.0}})))
    text = _page.page(_slimming.read(folder))
    assert text.count(html.escape(HOSTILE)) >= 12
    found = _Page(text)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "$name ${x}" in text


def _run(scores: dict[str, dict[str, float]]) -> dict[str, object]:
    change = {"before": 2.0, "after": 1.0}
    return {"scores": scores, **dict.fromkeys(_slimming._MEASURED, change)}


BROKEN = {
    "proof": {"outputs": 3},
    "plan": {"version": 2},
    "prune": {"report": []},
    "sites": [{"path": "a"}],
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_record_of_another_kind_is_an_error(run, key, slimmed, tmp_path):
    folder = shutil.copytree(slimmed, tmp_path / "broken")
    (folder / "flaxslim.json").write_text(json.dumps({key: BROKEN[key]}))
    result = run("report", folder, "--html", tmp_path / "r.html")
    assert result.code == 1
    assert "error:" in result.err
    assert "unexpected" not in result.err
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(flaxslim.FlaxslimError):
        _slimming.read(folder)


def test_a_record_that_is_no_json_is_an_error(slimmed, tmp_path):
    folder = shutil.copytree(slimmed, tmp_path / "cut off")
    (folder / "flaxslim.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not JSON"):
        _slimming.read(folder)


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_the_same(run, slimmed):
    result = run("report", slimmed)
    assert result.code == 0, result.err
    for words in ("smaller: bert (BertForMaskedLM)", "equal to rounding", "control:", "latency"):
        assert words in result.out
    assert re.search(rf"output/dense/kernel +│ channels +│ +72 +│ +{WIDTH} +│", result.out)


def test_there_is_no_page_to_replace_where_none_is_written(run, slimmed):
    result = run("report", slimmed, "--overwrite")
    assert result.code == 1
    assert "--html FILE --overwrite" in result.err


def test_only_an_earlier_report_is_replaced(run, slimmed, tmp_path):
    file = tmp_path / "deep" / "r.html"
    assert run("report", slimmed, "--html", file).code == 0
    written = file.read_text()
    again = run("report", slimmed, "--html", file)
    assert again.code == 1
    assert "--overwrite" in again.err
    assert run("report", slimmed, "--html", file, "--overwrite").code == 0
    file.write_text("my own page")
    foreign = run("report", slimmed, "--html", file, "--overwrite")
    assert foreign.code == 1
    assert "something else than a report" in foreign.err
    assert file.read_text() == "my own page" != written
    assert [path.name for path in file.parent.iterdir()] == ["r.html"]


def test_what_was_written_stays_if_the_new_one_cannot_be(run, slimmed, tmp_path, monkeypatch):
    file = tmp_path / "r.html"
    assert run("report", slimmed, "--html", file).code == 0
    written = file.read_text()

    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = run("report", slimmed, "--html", file, "--overwrite")
    assert result.code == 1
    assert "No space left" in result.err
    assert file.read_text() == written
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_folder_without_a_record(run, flax_folder, tmp_path):
    result = run("report", flax_folder, "--html", tmp_path / "r.html")
    assert result.code == 1
    assert "no flaxslim.json" in result.err
    assert list(tmp_path.iterdir()) == []
