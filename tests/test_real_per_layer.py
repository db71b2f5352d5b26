"""Trained checkpoints at widths and heads of each layer's own, reloaded in a new process."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kill import kill

import flaxslim
from flaxslim.checkpoint import read
from flaxslim.checkpoint._names import spec_named
from flaxslim.cli import main
from flaxslim.specs import spec_for


@pytest.fixture(autouse=True)
def _stock_rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


def _pruned(source: Path, folder: Path, part: str = "all") -> Any:
    """The checkpoint with another share of each layer dead: 10% to 80%."""
    before = read(source)
    spec = spec_named(before.config, part, before.naming)
    params, _ = kill(before.params, spec.sites(before.params, before.config), low=0.1, high=0.8)
    flaxslim.save(folder, params, before.config, like=before)
    return spec


def _in_a_new_process(code: str, *arguments: Path) -> dict[str, np.ndarray]:
    """Run `code` on paths, `sys.argv[2:]`; what it writes to the file `sys.argv[1]`."""
    out = arguments[0].parent / "out.npz"
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(out), *map(str, arguments)],
        check=True,
        env=environment,
        timeout=600,
    )
    with np.load(out) as found:
        return dict(found)


_STORIES = """
    import sys, jax, numpy as np
    from transformers import FlaxLlamaForCausalLM
    import flaxslim

    def perplexity_and_tokens(folder):
        model, params = flaxslim.from_pretrained(FlaxLlamaForCausalLM, folder, _do_init=False)
        run = jax.jit(lambda i, m: jax.nn.log_softmax(model(i, m, params=params).logits))
        total, count = 0.0, 0
        for some, hidden in zip(np.split(ids, 10), np.split(mask, 10)):
            logs = np.asarray(run(some, hidden))[:, :-1]
            picked = np.take_along_axis(logs, some[:, 1:, None].astype(int), -1)[..., 0]
            total -= picked[hidden[:, 1:] == 1].sum(dtype=np.float64)
            count += int((hidden[:, 1:] == 1).sum())
        prompts = ids[:2, :4]
        out = model.generate(prompts, params=params, max_new_tokens=60, do_sample=False)
        return np.exp(total / count), count, out.sequences

    out, zeroed, slim, tokens = sys.argv[1:]
    with np.load(tokens) as stories:
        ids, mask = stories["eval_ids"].astype("int32"), stories["eval_mask"]
    theirs, ours = map(perplexity_and_tokens, (zeroed, slim))
    np.savez(out, perplexity=[theirs[0], ours[0]], count=ours[1], theirs=theirs[2], ours=ours[2])
"""


@pytest.mark.long
def test_stories_have_the_same_perplexity_and_go_on_with_the_same_tokens(data, tmp_path):
    zeroed, slim = tmp_path / "zeroed", tmp_path / "slim"
    _pruned(data / "stories260K", zeroed)
    assert main(["slim", str(zeroed), str(slim), "--width", "per_layer", "--heads"]) == 0
    before, after = read(zeroed), read(slim)
    cut = spec_for(after.config, "all").sites(after.params, after.config)
    assert len({site.size for site in cut if site.pair.axis == "f"}) >= 4
    assert len({site.size for site in cut if site.pair.axis == "h"}) >= 3
    assert flaxslim.plan(after.params, after.config, "all", width="per_layer").removed == 0
    tokens = data / "stories260K" / "tinystories_tokens.npz"
    found = _in_a_new_process(_STORIES, zeroed, slim, tokens)
    assert found["count"] == 31306
    theirs, ours = found["perplexity"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert found["ours"].shape == (2, 64)
    np.testing.assert_array_equal(found["ours"], found["theirs"])
    assert before.params.keys() == after.params.keys()


_SENTENCES = """
    import json, sys, jax, numpy as np
    from transformers import AutoTokenizer, FlaxBertModel
    import flaxslim

    def embeddings(folder):
        model = flaxslim.from_pretrained(FlaxBertModel, folder)
        states = jax.jit(lambda b: model(**b).last_hidden_state)(batch)
        mean = (np.asarray(states) * mask).sum(1) / mask.sum(1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    out, sentences, *folders = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folders[-1])
    batch = dict(tokenizer(json.load(open(sentences)), padding=True, return_tensors="np"))
    mask = batch["attention_mask"][..., None]
    zeroed, slim, dense = map(embeddings, folders)
    np.savez(out, zeroed=zeroed, slim=slim, dense=dense)
"""


@pytest.mark.long
def test_sentences_have_the_same_embeddings(data, tmp_path):
    """A PyTorch-named checkpoint, cut in place and loaded by the Flax class."""
    zeroed, slim = tmp_path / "zeroed", tmp_path / "slim"
    spec = _pruned(data / "sentence-encoder", zeroed)
    assert main(["slim", str(zeroed), str(slim), "--width", "per_layer", "--heads"]) == 0
    after = read(slim)
    assert after.naming == "torch"
    cut = spec.sites(after.params, after.config)
    assert len({site.size for site in cut if site.pair.axis == "f"}) == 6
    assert main(["verify", str(zeroed), str(slim)]) == 0
    with (data / "stsb" / "sts-dev.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    (tmp_path / "sentences.json").write_text(json.dumps([row[5] for row in rows[:64]]))
    dense = _copy(data / "sentence-encoder", tmp_path / "dense")
    found = _in_a_new_process(_SENTENCES, tmp_path / "sentences.json", zeroed, slim, dense)
    assert np.abs(found["slim"] - found["zeroed"]).max() <= 1e-5 * np.abs(found["zeroed"]).max()
    assert np.abs(found["dense"] - found["zeroed"]).max() > 0.1


def _copy(source: Path, folder: Path) -> Path:
    before = read(source)
    return flaxslim.save(folder, before.params, before.config, like=before)
