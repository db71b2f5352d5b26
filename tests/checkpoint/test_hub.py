"""The Hub, played by a server on the loopback interface that is spoken to over real HTTP."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils._http import reset_sessions
from huggingface_hub.utils.tqdm import disable_progress_bars
from initialised import drawn
from transformers import BertConfig, FlaxBertModel

from flaxslim import errors
from flaxslim._tree import flatten
from flaxslim.checkpoint import _write, load, read, save

CONFIG = BertConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
    architectures=["BertModel"],
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """The few endpoints that huggingface_hub asks for, for one repository "owner/tiny".

    `faults` maps a file or repository name to a status with an X-Error-Code, or to "drop".
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder: Path = folder
        self.faults: dict = {}
        self.seen: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def got(self):
        """Names of the files whose content was asked for."""
        return {line.split("/", 5)[-1] for line in self.seen if line.startswith("GET /owner")}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        self.server.seen.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        api = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", self.path)
        file = re.fullmatch(r"/(owner/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        match = api or file
        assert match is not None, self.path
        repo, revision = match.groups()[:2]
        fault = self.server.faults.get(repo) or self.server.faults.get(file and file[3])
        if fault == "drop":
            self._drop(file and file[3])
        elif fault:
            self._refuse(*fault)
        elif repo != "owner/tiny":
            self._refuse(404, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif api:
            names = [p.relative_to(self.server.folder) for p in self.server.folder.rglob("*.*")]
            siblings = [{"rfilename": name.as_posix()} for name in names]
            self._send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif file:
            self._send((self.server.folder / file[3]).read_bytes(), body=body, file=True)

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _drop(self, name):
        """Promise the file, send half of it, and hang up."""
        data = (self.server.folder / name).read_bytes() if name else b""
        if self.command == "HEAD":
            self._send(data, body=False, file=True)
            return
        if name:
            self._headers(data, 200)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def _headers(self, data, status):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()

    def _send(self, data, *, body=True, file=False):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if file and body and start:
            rest = data[int(start[1]) :]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start[1]}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest)
            return
        self._headers(data, 200)
        if body:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def params():
    return drawn(FlaxBertModel, CONFIG)


@pytest.fixture
def hub(tmp_path, params, monkeypatch):
    """A Hub with one PyTorch-named repository, and an empty cache."""
    folder = save(tmp_path / "remote", params, CONFIG, format="torch")
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "README.md", "tf_model.h5", "1_Pooling/config.json"):
        (folder / name).write_text(json.dumps({"I am": name}))
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    _point(monkeypatch, server.url, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _point(monkeypatch, url, cache):
    """What HF_ENDPOINT and HF_HUB_CACHE do; huggingface_hub reads them once, at its import."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    disable_progress_bars()


@pytest.fixture
def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 does."""

    def switch():
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        reset_sessions()

    yield switch
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    reset_sessions()


def _same(have, want):
    have, want = flatten(have), flatten(want)
    assert have.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(have[path], want[path], path)


# --- what is fetched --------------------------------------------------------------------------


def test_only_what_is_needed_is_fetched(hub, params):
    loaded, cfg = load("owner/tiny")
    _same(loaded, params)
    assert cfg.intermediate_size == 40
    assert hub.got() == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "1_Pooling/config.json",
    }
    hub.seen.clear()
    load("owner/tiny")
    assert hub.got() == set()  # the cache has them


def test_the_msgpack_is_fetched_where_there_is_one(hub, params, tmp_path):
    flax = save(tmp_path / "flax", params, CONFIG)
    (flax / "flax_model.msgpack").rename(hub.folder / "flax_model.msgpack")
    assert read("owner/tiny").weight_files == ("flax_model.msgpack",)
    assert "model.safetensors" not in hub.got()


def test_shards_are_fetched_by_their_index(hub, params, tmp_path, monkeypatch):
    monkeypatch.setattr(_write, "_SHARD", 20_000)
    (hub.folder / "model.safetensors").unlink()
    for path in save(tmp_path / "s", params, CONFIG, format="torch").glob("model*"):
        path.rename(hub.folder / path.name)
    (hub.folder / "model-left-over.safetensors").write_text("x")
    found = read("owner/tiny")
    assert found.sharded
    assert len(found.weight_files) > 1
    assert "model-left-over.safetensors" not in hub.got()
    _same(load("owner/tiny")[0], params)


def test_a_local_folder_wins(hub, params, tmp_path, monkeypatch):
    save(tmp_path / "owner" / "tiny", params, CONFIG)
    monkeypatch.chdir(tmp_path)
    assert read("owner/tiny").format == "msgpack"
    assert hub.seen == []


def test_revision_and_token_are_sent(hub):
    read("owner/tiny", revision=COMMIT, token="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}
    assert any(COMMIT in line for line in hub.seen if "/api/" in line)


def test_the_slim_checkpoint_takes_the_side_files_of_the_cache(hub, params, tmp_path):
    folder = save(tmp_path / "out", params, CONFIG, like="owner/tiny", record={"version": "1"})
    assert (folder / "tokenizer.json").read_text() == '{"I am": "tokenizer.json"}'
    assert not (folder / "tokenizer.json").is_symlink()
    assert (folder / "1_Pooling" / "config.json").is_file()
    _same(load(folder)[0], params)


def test_the_environment_is_respected(hub, tmp_path):
    code = "from flaxslim.checkpoint import read; print(read('owner/tiny').folder)"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "home"))


# --- what goes wrong --------------------------------------------------------------------------


def test_no_such_repository(hub):
    with pytest.raises(errors.HubError, match="there is no such repository on the Hub") as caught:
        load("owner/tyni")
    assert "owner/tyni" in str(caught.value)
    assert "check the spelling" in str(caught.value)


def test_no_such_revision(hub):
    with pytest.raises(errors.HubError, match="no such revision") as caught:
        load("owner/tiny", revision="v9")
    assert "'v9'" in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["owner/tiny", "config.json"])
def test_a_gated_repository(hub, status, where):
    hub.faults[where] = (status, "GatedRepo")
    with pytest.raises(errors.HubError, match="the repository is gated") as caught:
        load("owner/tiny")
    assert "hf auth login" in str(caught.value)


def test_a_server_that_fails(hub):
    hub.faults["owner/tiny"] = (500, "")
    with pytest.raises(errors.HubError, match="the Hub could not be asked") as caught:
        load("owner/tiny")
    assert "500" in str(caught.value)


def test_a_connection_that_drops_in_a_file(hub, params):
    hub.faults["model.safetensors"] = "drop"
    with pytest.raises(errors.HubError, match="the download did not finish") as caught:
        load("owner/tiny")
    assert "what arrived is kept" in str(caught.value)
    hub.faults.clear()
    _same(load("owner/tiny")[0], params)


def test_a_connection_that_drops_at_once(hub, params):
    hub.faults["owner/tiny"] = "drop"
    with pytest.raises(errors.HubError, match="the Hub cannot be reached, and the cache does not"):
        load("owner/tiny")
    hub.faults.clear()
    load("owner/tiny")
    hub.faults["owner/tiny"] = "drop"
    _same(load("owner/tiny")[0], params)  # from the cache


def test_nobody_listens(monkeypatch, tmp_path):
    _point(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    (tmp_path / "model-1").mkdir()
    (tmp_path / "model-2").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.HubError, match=r"^there is no folder model-l here; ") as caught:
        load("model-l")
    message = str(caught.value)
    assert "the Hub cannot be reached" in message
    assert "nearest:  model-1\n" in message
    assert "check the connection and HF_ENDPOINT" in message
    # The cause alone, not what three libraries made of it.
    assert re.search(r"found:    ConnectionRefusedError: \[Errno \d+\] [\w ]+\n", message)


def test_offline_without_a_cache(hub, offline):
    offline()
    with pytest.raises(errors.HubError, match="offline mode is on, and the cache") as caught:
        load("owner/tiny")
    assert "unset HF_HUB_OFFLINE" in str(caught.value)
    assert hub.seen == []


def test_offline_with_a_cache(hub, offline, params):
    load("owner/tiny")
    hub.seen.clear()
    offline()
    _same(load("owner/tiny")[0], params)
    assert hub.seen == []


def test_offline_with_half_a_cache(hub, offline):
    huggingface_hub.hf_hub_download("owner/tiny", "config.json")
    offline()
    with pytest.raises(errors.HubError, match="the cache has only a part") as caught:
        load("owner/tiny")
    assert "found:    config.json" in str(caught.value)


def test_a_repository_without_weights(hub):
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(errors.HubError, match="no weights that flaxslim reads") as caught:
        load("owner/tiny")
    assert "tf_model.h5" in str(caught.value)
    assert hub.got() == set()


def test_an_index_of_the_hub_that_leads_out(hub):
    (hub.folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a.weight": "../../../../secret.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.UnsafePathError, match="do not trust that repository"):
        load("owner/tiny")
