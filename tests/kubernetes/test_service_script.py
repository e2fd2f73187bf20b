"""What the pods of `helm test` run, as they run it, against a stand-in for the API."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dgemma_build.chart.kinds import Object


@dataclass
class Api:
    """Answers as the front end does; notes what it was asked."""

    url: str = ""
    content: str = '{"name": "Ada"}'
    ready: bool = True
    asked: list[tuple[str, str | None, Any]] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "dgemma"}]}
        if path == "/v1/chat/completions":
            return 200, {"choices": [{"message": {"content": self.content}}]}
        return (200 if self.ready or path.endswith("/live") else 503), {"status": "ready"}


def respond(handler: BaseHTTPRequestHandler, state: Api) -> None:
    length = int(handler.headers.get("Content-Length") or 0)
    body = json.loads(handler.rfile.read(length)) if length else None
    state.asked.append((handler.path, handler.headers.get("Authorization"), body))
    status, answer = state.answer(handler.path)
    handler.send_response(status)
    handler.end_headers()
    handler.wfile.write(json.dumps(answer).encode())


@pytest.fixture
def api() -> Iterator[Api]:
    state = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self, state)

        def do_POST(self) -> None:
            respond(self, state)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def run(objects: list[Object], test: str, url: str, key: str = "") -> subprocess.CompletedProcess[str]:
    """The test pod's own command, with another address."""
    (pod,) = [item for item in objects if item["kind"] == "Pod" and item["metadata"]["name"].endswith(test)]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python3", "-c"]
    script, name, address, *rest = container["args"]
    assert (name, address.startswith("http")) == (test, True)
    environment = {"API_KEY": key} if key else {}
    command = [sys.executable, "-c", script, name, url, *rest]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_health_asks_both(api: Api, rendered: dict[str, list[Object]]) -> None:
    assert run(rendered["defaults"], "health", api.url).returncode == 0
    assert [path for path, _, _ in api.asked] == ["/v1/health/live", "/v1/health/ready"]


def test_health_fails_where_the_model_is_not_ready(api: Api, rendered: dict[str, list[Object]]) -> None:
    api.ready = False
    done = run(rendered["defaults"], "health", api.url)
    assert done.returncode != 0
    assert "503" in done.stderr


def test_completion_asks_the_first_model(api: Api, rendered: dict[str, list[Object]]) -> None:
    done = run(rendered["defaults"], "completion", api.url)
    assert done.returncode == 0, done.stderr
    path, authorization, body = api.asked[-1]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", None, "dgemma")


def test_completion_sends_the_key(api: Api, rendered: dict[str, list[Object]]) -> None:
    assert run(rendered["secure"], "completion", api.url, key="one-key").returncode == 0
    assert {authorization for _, authorization, _ in api.asked} == {"Bearer one-key"}


def test_completion_fails_where_the_model_has_another_name(api: Api, rendered: dict[str, list[Object]]) -> None:
    done = run(rendered["nim-llm"], "completion", api.url)
    assert done.returncode != 0
    assert "model.name is 'nvidia/diffusiongemma-26b-a4b-it'; served are ['dgemma']" in done.stderr


def test_completion_fails_on_an_empty_answer(api: Api, rendered: dict[str, list[Object]]) -> None:
    api.content = ""
    done = run(rendered["defaults"], "completion", api.url)
    assert done.returncode != 0
    assert "the answer is empty" in done.stderr
