"""`dgemma-nim` with everything real: exporter, Triton and front end, from a checkpoint to an answer and a clean end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Serving:
    """A started container's first process, outside of a container."""

    def __init__(self, model: Path, cache: Path, log: Path) -> None:
        self.port, grpc, http_port, metrics = free_ports(4)
        self.log = log
        words = ["--host", "127.0.0.1", "--triton-grpc-port", str(grpc), "--triton-http-port", str(http_port)]
        words += ["--triton-metrics-port", str(metrics), "--profile", "onnxruntime-fp32-cpu-4096", "--drain-s", "10"]
        environment = {
            **os.environ,
            "NIM_MODEL_PATH": str(model),
            "NIM_CACHE_PATH": str(cache),
            "NIM_SERVER_PORT": str(self.port),
            "NIM_SERVED_MODEL_NAME": "demo,second",
            "NIM_JSONL_LOGGING": "1",
            "HF_TOKEN": "hf_never-shown",
        }
        command = [sys.executable, "-m", "dgemma_nim.cli", *words]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stderr=file, start_new_session=True)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON; status 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except OSError:
            return 0, None
        finally:
            connection.close()

    def wait_for(self, path: str) -> list[int]:
        """Every status until 200, each once."""
        end, seen = time.monotonic() + 200, [self.ask("GET", path)[0]]
        while seen[-1] != 200:
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)
            if (status := self.ask("GET", path)[0]) != seen[-1]:
                seen.append(status)
        return seen

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def serving(demo: Path, cache: Path, tmp_path: Path) -> Iterator[Serving]:
    made = Serving(demo, cache, tmp_path / "log")
    yield made
    if made.process.poll() is None:
        made.process.send_signal(signal.SIGTERM)
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(30)


def test_from_a_checkpoint_to_an_answer_and_a_clean_end(serving: Serving, cache: Path) -> None:
    serving.wait_for("/v1/health/live")
    assert 503 in serving.wait_for("/v1/health/ready"), "it lives while the engine is being built, and is not ready"
    status, models = serving.ask("GET", "/v1/models")
    assert status == 200
    assert models["data"][0]["id"] == "demo"
    assert models["data"][0]["max_model_len"] == 4096
    message = {"role": "user", "content": "Convert to JSON:\nname: Ada\ncity: Lima"}
    status, answer = serving.ask("POST", "/v1/chat/completions", {"model": "demo", "messages": [message], "seed": 1})
    assert status == 200
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"name": "Ada", "city": "Lima"}
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(60) == 0
    assert serving.records()[-1]["message"] == "stopped"
    assert "hf_never-shown" not in serving.log.read_text()
    assert len(list(cache.glob("engines/demo-*/onnxruntime-fp32-cpu-4096/config.json"))) == 1
