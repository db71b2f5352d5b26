"""`benchmarks/run.py`: nothing that failed is dropped, and nothing that is done is done again.

Also of `benchmarks/peers.py`: a peer that fails has its error in the table.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import peers
import pytest
import run
from rich.console import Console

SCRIPTS = {
    "broken": 'print("begun")\nraise ValueError("no such thing")',
    "good": 'print("fine")',
    # What it starts holds its output open: to end the script alone would take as long.
    "slow": 'import subprocess\nprint("begun")\nsubprocess.run(["sleep", "100"])',
}
SETTING = {"cores": "2", "CPU": "a CPU", "memory": "24 GiB", "accelerator": "none"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks, and of a module that is none."""
    folder = tmp_path / "marks"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        body = "".join(f"    {line}\n" for line in text.splitlines())
        (folder / f"{name}.py").write_text(f'import sys\nif __name__ == "__main__":\n{body}')
    (folder / "helper.py").write_text("x = 1\n")
    monkeypatch.setattr(run, "FOLDER", folder)
    monkeypatch.setattr(run, "machine", lambda: SETTING)
    return tmp_path


def ran(place: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the results in the JSON, and the Markdown."""
    files = place / "out" / "x.json", place / "out" / "x.md"
    code = run.main([*arguments, "--json", str(files[0]), "--markdown", str(files[1])])
    return code, json.loads(files[0].read_text())["benchmarks"], files[1].read_text()


def test_the_list_has_all_benchmarks_and_no_module_of_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"slim_speed", "forward_speed", "peers"} <= set(listed)
    assert not {"run", "bert_training", "accuracy_tasks", "hand_written"} & set(listed)
    assert {*run.QUICK, *run.SECONDS} <= set(listed)


def test_what_fails_and_what_is_stopped_is_shown_as_such(place: Path) -> None:
    code, results, page = ran(place, "--timeout", "3")
    assert code == 1
    assert list(results) == ["broken", "good", "slow"]
    assert [x["exit_code"] for x in results.values()] == [1, 0, None]
    assert results["slow"]["seconds"] < 50
    assert results["slow"]["text"] == "begun"
    assert results["good"] | {"seconds": 0} == {
        "command": "python marks/good.py",
        "text": "fine",
        "seconds": 0,
        "exit_code": 0,
    }
    broken, good, slow = page.split("\n## ")[1:4]
    assert "**Failed** with exit code 1" in broken
    assert broken.index("begun") < broken.index("ValueError: no such thing")
    assert "```text\nfine\n```" in good
    assert "ailed" not in good
    assert "**Stopped** after" in slow
    assert "| CPU | a CPU |\n" in page
    assert "| flaxslim | " in page


def test_what_was_interrupted_goes_on_with_what_is_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "marks" / "slow.py").unlink()

    def interrupted(path: Path, *rest: Any) -> run.Result:
        if path.stem == "good":
            raise KeyboardInterrupt
        return measured(path, *rest)

    measured = run.measured
    monkeypatch.setattr(run, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran(place)
    monkeypatch.setattr(run, "measured", measured)
    assert "Not run: good." in (place / "out" / "x.md").read_text()
    stored = json.loads((place / "out" / "x.json").read_text())
    stored["benchmarks"]["broken"]["text"] = "as it was"
    (place / "out" / "x.json").write_text(json.dumps(stored))

    code, results, page = ran(place, "--again")
    assert code == 1
    assert {name: x["text"] for name, x in results.items()} == {
        "broken": "as it was",
        "good": "fine",
    }
    assert "Not run" not in page
    _, results, _ = ran(place, "--only", "broken")
    assert "ValueError" in results["broken"]["text"]
    assert results["good"]["text"] == "fine"


def test_what_a_person_wrote_before_the_mark_stays(place: Path) -> None:
    page = place / "out" / "x.md"
    page.parent.mkdir()
    page.write_text(f"# Our own words\n\n{run.MARK}\n\n## good\n\nas it was\n")
    _, _, text = ran(place, "--only", "good")
    assert text.startswith(f"# Our own words\n\n{run.MARK}\n\n## good\n")
    assert "as it was" not in text
    assert "```text\nfine\n```" in text


def test_results_of_two_machines_are_not_mixed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(place, "--only", "good")
    monkeypatch.setattr(run, "machine", lambda: {**SETTING, "cores": "64"})
    with pytest.raises(SystemExit, match="another machine"):
        ran(place, "--again")


def test_a_peer_that_fails_is_in_the_table_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "HERE", tmp_path)
    (tmp_path / "works.py").write_text("print('a log')\nprint('{\"first\": 1}')")
    (tmp_path / "fails.py").write_text("raise OSError('[Errno 5] no wheel')")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(100)")

    def measured(script: str, *needs: str, limit: float = 50) -> Any:
        contender = peers.Contender(script=script, needs=needs)
        return peers.measured(contender, "BertModel", tmp_path, tmp_path, limit)

    def not_installed(folder: Path, needs: Any) -> Path:
        said = f"WARNING: slow\nERROR: no {needs[0]}\n[notice] a new pip"
        raise subprocess.CalledProcessError(1, "pip", stderr=said)

    monkeypatch.setattr(peers, "environment", not_installed)
    assert measured("works.py") == {"first": 1}
    results = {
        "one": measured("fails.py"),
        "other": measured("hangs.py", limit=1),
        "third": measured("works.py", "nothing==1"),
    }
    console = Console(width=200)
    with console.capture() as shown:
        console.print(peers.table("title", results))
    assert "OSError: [Errno 5] no wheel" in shown.get()
    assert "stopped after 1 s" in shown.get()
    assert "ERROR: no nothing==1" in shown.get()
