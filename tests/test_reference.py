"""The reference names every public name once, and its generated parts have all that they are of."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripts import loaded

import flaxslim
import flaxslim.checkpoint
import flaxslim.posttraining
from flaxslim import cli, errors
from flaxslim.specs import COMPOSITES, FAMILIES
from flaxslim.training._score import SCORES

DOCS = Path(__file__).parents[1] / "docs"


def named() -> Counter[str]:
    """How often each name is documented on the pages of the reference."""
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return Counter(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def hooks() -> Any:
    return loaded(DOCS / "hooks.py")


def test_every_public_name_stands_in_one_place(hooks: Any) -> None:
    constants = {name for name in flaxslim.__all__ if name.endswith(("_FFN", "_HEADS"))}
    listed = Counter(re.findall(r"^\| (`.*?`) \|", hooks.specs(), re.MULTILINE))
    in_table = Counter(name for row in listed for name in re.findall(r"`(\w+)`", row))
    assert in_table == Counter(constants)
    rest = {name for name in flaxslim.__all__ if name not in constants | {"__version__"}}
    wanted = {f"flaxslim.{name}" for name in rest}
    for module in (flaxslim.checkpoint, flaxslim.posttraining):
        own = {name for name in vars(module) if not name.startswith("_")}
        own = {name for name in own if callable(getattr(module, name))}
        wanted |= {f"{module.__name__}.{name}" for name in own if name not in rest}
    assert named() == Counter(wanted)


def test_every_generated_part_is_on_a_page(hooks: Any) -> None:
    used = [name for page in DOCS.rglob("*.md") for name in hooks.PLACE.findall(page.read_text())]
    assert sorted(used) == sorted(hooks.GENERATED)


def test_a_page_is_filled_in(hooks: Any) -> None:
    page = "# Title\n\n_In the repository._ <!-- unbuilt -->\n\nIntroduction.\n\n"
    page += "_This table too._ <!-- generated: composites -->\n\nend"
    text = hooks.on_page_markdown(page, page=None, config=None, files=None)
    assert text.startswith("# Title\n\nIntroduction.\n\n| model_type |")
    assert text.endswith("|\n\nend")
    with pytest.raises(KeyError):
        hooks.on_page_markdown("<!-- generated: nothing -->")


def test_what_a_page_lacks_in_the_repository_it_says_there(hooks: Any) -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        seen = re.findall(r"^_.*mkdocs serve.*_ <!-- ", text, re.MULTILINE)
        lacking = re.search(r"^::: |<!-- generated: ", text, re.MULTILINE)
        assert bool(seen) == bool(lacking), page
        assert "_ <!-- " not in hooks.on_page_markdown(text), page


def test_all_scores_have_a_row_with_their_source(hooks: Any) -> None:
    text = hooks.scores()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert rows.keys() == SCORES.keys()
    assert rows["snip"].startswith("`sum of abs(w g)` | when due | Lee et al. 2019, [arXiv")
    assert rows["wanda"].endswith("(https://arxiv.org/abs/2306.11695)")
    assert rows["random"].endswith("| when due | ")
    assert not re.search(r"\| \[\d+\]", text), "a source that is not there"


def test_all_families_have_a_row(hooks: Any) -> None:
    rows = {line.split("`")[1]: line for line in hooks.families().splitlines()[2:]}
    assert rows.keys() == FAMILIES.keys()
    assert "`4*hidden_size`<br>`n_head` | no: hard-coded<br>no |" in rows["bloom"]
    assert '"d (2 f)"' in rows["dinov2"]
    assert "multiples of `hidden_size`<br>multiples of 8<br>no" in rows["dinov2"]
    assert "yes<br>yes" in rows["t5"]
    assert rows["bert"].count("self/value") == 1  # its cross-attention is the same
    composites = hooks.composites()
    assert all(f"`{name}`" in composites for name in COMPOSITES)


def test_all_errors_have_a_section_with_their_messages(hooks: Any) -> None:
    text = hooks.errors()
    names = [name for name in vars(errors) if name.endswith(("Error", "Warning"))]
    assert re.findall(r"^### (\w+)$", text, re.MULTILINE) == names
    section = text.partition("### NothingMatchedError")[2].partition("\n### ")[0]
    assert "```python\nslim(params, cfg, flaxslim.GPT2_FFN)  # wrong" in section
    assert "**Mend:** leave the spec" in section
    assert "- a spec found none" not in section
    patterns = text.partition("### AxisPatternError")[2].partition("\n### ")[0]
    assert "    - unbalanced parentheses in an axis pattern" in patterns
    shell = text.partition("### RecipeError")[2].partition("\n### ")[0]
    assert "```sh\nflaxslim run" in shell


def test_all_commands_have_their_help(hooks: Any) -> None:
    text = hooks.commands()
    headings = re.findall(r"^## flaxslim ?(.*)$", text, re.MULTILINE)
    assert headings == ["", *cli._by_name()]
    for command, flag in (("slim", "--shard-size"), ("prune", "--calibration"), ("run", "--set")):
        section = text.partition(f"## flaxslim {command}\n")[2].partition("\n## ")[0]
        assert flag in section
    assert "\x1b" not in text


def test_the_citation_is_of_this_version() -> None:
    citation = (DOCS.parent / "CITATION.cff").read_text()
    assert f"\nversion: {flaxslim.__version__}\n" in citation
