"""`flaxslim demo`, so small and short that it learns little: the story must hold all the same."""

import re

import pytest

from cli.tiny import RUN
from flaxslim.cli import _demo


def test_demo_tells_the_whole_story(run, tmp_path, monkeypatch, untimed):
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    from transformers import ViTConfig

    overrides = _demo.overrides
    monkeypatch.setattr(_demo, "overrides", lambda steps: [*overrides(steps), *RUN])
    result = run("demo", "--steps", "10", "--out", tmp_path / "vit")
    assert result.code == 0, result.err
    accuracy = dict(re.findall(r"(dense|pruned|slimmed, reloaded)\W+([\d.]+%)", result.out))
    assert accuracy.keys() == {"dense", "pruned", "slimmed, reloaded"}
    assert accuracy["pruned"] == accuracy["slimmed, reloaded"]
    assert "equal to rounding" in result.out
    assert f"saved in {tmp_path / 'vit'}" in result.out
    assert ViTConfig.from_pretrained(tmp_path / "vit").intermediate_size == 12


def test_demo_says_what_to_install(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run("demo")
    assert result.code == 1
    assert "scikit-learn is not installed" in result.err
    assert "pip install" in result.err
