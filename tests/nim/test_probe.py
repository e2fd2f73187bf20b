"""The health check of the image: which address it asks, and what it makes of the answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dgemma_nim import probe
from dgemma_runtime.errors import ConfigurationError


class _Server(HTTPServer):
    status = 200
    paths: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[_Server]:
    made = _Server(("127.0.0.1", 0), _Handler)
    made.paths = []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize(("status", "expected"), [(200, True), (503, False)])
def test_ready_is_what_the_front_end_says(status: int, expected: bool, server: _Server) -> None:
    server.status = status
    assert probe.ready(server.server_port, False) is expected
    assert server.paths == ["/v1/health/ready"]


def test_nobody_and_another_protocol_are_not_ready(server: _Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert probe.ready(port, False) is False
    assert probe.ready(server.server_port, True) is False


def test_which_address(tmp_path: Path) -> None:
    for name in ("certificate", "key", "ca"):
        (tmp_path / name).touch()
    tls = {
        "NIM_SSL_MODE": "tls",
        "NIM_SSL_CERTS_PATH": f"{tmp_path}/certificate",
        "NIM_SSL_KEY_PATH": f"{tmp_path}/key",
        "NIM_SSL_CA_CERTS_PATH": f"{tmp_path}/ca",
    }
    assert probe.address({}) == (8000, False)
    assert probe.address({"NIM_SERVER_PORT": "9000"}) == (9000, False)
    assert probe.address({"NIM_PASSTHROUGH_ARGS": "--port 9001"}) == (9001, False)
    assert probe.address(tls) == (8000, True)
    assert probe.address(tls | {"NIM_HEALTH_PORT": "8080"}) == (8080, False)
    with pytest.raises(ConfigurationError, match="NIM_HEALTH_PORT"):
        probe.address(tls | {"NIM_SSL_MODE": "mtls"})
