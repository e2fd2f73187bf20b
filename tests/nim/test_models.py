"""Where models come from: directories, the cache, and a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dgemma_nim.configuration import resolve
from dgemma_nim.models import Checkpoint, Repository, engine_directory, fetch, find_source, read_directory
from dgemma_runtime.errors import ConfigurationError, ManifestError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a-token-of-tests"
CONFIG = json.dumps({"model_type": "x", "text_config": {"max_position_embeddings": 4096}}).encode()
FILES = {
    "config.json": CONFIG,
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
}


class Hub(ThreadingHTTPServer):
    """What `snapshot_download` asks of a hub, for one private repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b'{"error": "Invalid token"}', {"X-Error-Code": "GatedRepo"}, body)
        elif self.path.split("?")[0] in ("/api/models/a/b", "/api/models/a/b/revision/main"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            listing = {"id": "a/b", "sha": COMMIT, "siblings": siblings, "private": True, "tags": [], "downloads": 0}
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
        elif self.path.split("?")[0].startswith("/api/models/a/b/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif (name := self.path.rpartition("/")[2]) in FILES:
            data = FILES[name]
            etag = hashlib.sha1(data).hexdigest()
            self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def source(model: str | None, cache: Path) -> object:
    return find_source(resolve(["--model", model] if model else [], {"NIM_CACHE_PATH": str(cache)}).configuration)


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(FILES[name])
    return folder


def test_a_checkpoint_has_its_own_context(demo: Path, cache: Path) -> None:
    assert source(str(demo), cache) == Checkpoint(demo, 262144)


def test_a_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    found = Checkpoint(checkpoint(tmp_path / "x"), 4096)
    first = found.fingerprint
    assert Checkpoint(tmp_path / "x", 4096).fingerprint == first
    (tmp_path / "x" / "model.safetensors").write_bytes(b"others")
    assert found.fingerprint != first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://google/diffusiongemma-26b", Repository("google/diffusiongemma-26b", None)),
        ("hf://a/b:v1.0", Repository("a/b", "v1.0")),
        ("hf://a/b@main", Repository("a/b", "main")),
    ],
)
def test_repositories(text: str, expected: Repository, cache: Path) -> None:
    assert source(text, cache) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ngc://nim/x:1", ["ngc://nim/x:1", "hf://", "mount"]),
        ("hf://only-a-name", ["hf://ORGANISATION/NAME"]),
        ("hf://../../etc", ["hf://ORGANISATION/NAME"]),
        ("/nowhere/at/all", ["/nowhere/at/all", "not a directory"]),
    ],
)
def test_other_sources_are_refused(text: str, words: list[str], cache: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        source(text, cache)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["config.json"]),
        ({"config.json": b"{"}, ["not readable as JSON"]),
        ({"config.json": b"[]"}, ["JSON object"]),
        ({"config.json": CONFIG}, ["*.safetensors"]),
        ({"config.json": b"{}", "x.safetensors": b""}, ["max_position_embeddings", "None"]),
    ],
)
def test_directories_that_are_neither(files: dict[str, bytes], words: list[str], tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigurationError) as error:
        read_directory(tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_engine_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    with pytest.raises(ManifestError, match="format_version"):
        read_directory(tmp_path)


def test_without_a_name_the_cache_may_settle_it(cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="NIM_MODEL_PATH"):
        source(None, cache)
    checkpoint(cache)
    assert source(None, cache) == Checkpoint(cache, 4096)


def test_engines_of_a_cache_lie_under_what_they_were_made_of(tmp_path: Path, cache: Path) -> None:
    found = Checkpoint(checkpoint(tmp_path / "mine"), 4096)
    assert engine_directory(cache, found, "tag") == cache / "engines" / f"mine-{found.fingerprint}" / "tag"


def test_a_model_is_fetched_once_without_pickles_and_code(hub: Hub, cache: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    found = fetch(Repository("a/b", None), cache, True, environment)
    assert found.context == 4096
    assert {path.name for path in found.directory.iterdir()} == set(FILES) - {"pytorch_model.bin", "modeling.py"}
    assert (found.directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    before = len(hub.asked)
    again = fetch(Repository("a/b", None), cache, False, {"HF_ENDPOINT": hub.url})
    assert again == found
    assert len(hub.asked) == before
    gets = [line for line in hub.asked if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(gets) == 1


def test_without_a_token_it_says_so_and_not_which_one_there_was(hub: Hub, cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="HF_TOKEN") as error:
        fetch(Repository("a/b", None), cache, True, {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_wrong"})
    assert "hf_wrong" not in str(error.value)


def test_where_downloads_are_off_it_says_what_to_do(hub: Hub, cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="NIM_DISABLE_MODEL_DOWNLOAD"):
        fetch(Repository("a/b", None), cache, False, {"HF_ENDPOINT": hub.url})
    assert hub.asked == []


def test_a_file_that_leads_out_of_the_cache_is_refused(hub: Hub, cache: Path, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    found = fetch(Repository("a/b", None), cache, True, environment)
    (found.directory / "evil.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"evil\.json"):
        fetch(Repository("a/b", None), cache, False, environment)
