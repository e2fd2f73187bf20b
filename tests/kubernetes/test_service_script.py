"""What the pods of `helm test` run, as they run it, against the front end over a stand-in for Triton."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from dgemma_build.chart.kinds import Object
from dgemma_client import Client, MockTransport
from dgemma_client.events import ServerInfo
from dgemma_client.mock import reply
from dgemma_openai.app import create_app
from dgemma_openai.settings import ApiKey, Settings

FACTS = {"max_model_len": "4096", "canvas_length": "64", "checkpoint": "demo", "server_version": "1.2.3"}
KEY = "one-key"


class Triton(MockTransport):
    """Has loaded the model, or not yet."""

    loaded = True

    async def info(self, model: str, timeout_s: float) -> ServerInfo:
        return replace(await super().info(model, timeout_s), parameters=dict(FACTS))

    async def ready(self, model: str, timeout_s: float) -> bool:
        return self.loaded


@contextmanager
def api(triton: Triton, keys: tuple[ApiKey, ...] = ()) -> Iterator[str]:
    """The address of a front end."""
    app = create_app(Settings(served_model_names=("dgemma",), api_keys=keys), Client(transport=triton))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
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


def test_health(rendered: dict[str, list[Object]]) -> None:
    with api(Triton(reply("a"))) as url:
        done = run(rendered["defaults"], "health", url)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["/v1/health/live", "/v1/health/ready"]


def test_health_fails_where_the_model_is_not_ready(rendered: dict[str, list[Object]]) -> None:
    triton = Triton(reply("a"))
    triton.loaded = False
    with api(triton) as url:
        done = run(rendered["defaults"], "health", url)
    assert done.returncode != 0
    assert "503" in done.stderr


def test_completion(rendered: dict[str, list[Object]]) -> None:
    triton = Triton(reply('{"name": ', '"Ada"}'))
    with api(triton) as url:
        done = run(rendered["defaults"], "completion", url)
    assert done.returncode == 0, done.stderr
    assert "Ada" in done.stdout
    assert triton.requests[-1].inputs["seed"] == (1,)


def test_completion_needs_the_key_where_one_is_asked_for(rendered: dict[str, list[Object]]) -> None:
    keys = (ApiKey(hashlib.sha256(KEY.encode()).digest(), "test"),)
    with api(Triton(reply("a")), keys) as url:
        taken = run(rendered["secure"], "completion", url, KEY)
        refused = run(rendered["secure"], "completion", url)
    assert taken.returncode == 0, taken.stderr
    assert refused.returncode != 0
    assert "401" in refused.stderr


def test_completion_fails_where_the_model_has_another_name(rendered: dict[str, list[Object]]) -> None:
    with api(Triton(reply("a"))) as url:
        done = run(rendered["nim-llm"], "completion", url)
    assert done.returncode != 0
    assert "model.name is 'nvidia/diffusiongemma-26b-a4b-it'; served are ['dgemma']" in done.stderr


def test_completion_fails_on_an_empty_answer(rendered: dict[str, list[Object]]) -> None:
    with api(Triton(reply(""))) as url:
        done = run(rendered["defaults"], "completion", url)
    assert done.returncode != 0
    assert "the answer is empty" in done.stderr
