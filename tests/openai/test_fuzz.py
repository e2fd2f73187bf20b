"""Requests made up from the published document, against the application behind a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from tests.openai.conftest import MODEL, Triton

from dgemma_build.accept.api_requests import check
from dgemma_client import Client
from dgemma_client.mock import delta, final, prefill, preview
from dgemma_client.requests import InferRequest
from dgemma_openai.app import create_app
from dgemma_openai.protocol import LimitedProtocol
from dgemma_openai.settings import Settings

EXAMPLES = 40  # of each operation
TEXT = '<|channel>thought\nhm<channel|>Well. <|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'


def handler(request: InferRequest) -> Iterator[object]:
    yield prefill(1, 2)
    if request.inputs.get("stream_previews") == (True,):
        yield preview("Wel")
    yield delta(TEXT, (1, 2))
    yield final(input_tokens=2, output_tokens=2)


@pytest.fixture
def url() -> Iterator[str]:
    app = create_app(Settings(), Client(transport=Triton(handler)))  # type: ignore[arg-type]  # a handler's items
    config = uvicorn.Config(app, http=LimitedProtocol, log_config=None, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def test_no_request_breaks_the_api_and_every_answer_is_as_documented(url: str) -> None:
    report = check(url, EXAMPLES, MODEL, max_tokens=8)
    assert report.problems == []
    assert report.operations >= 15
    assert report.statuses[200] > 50
    assert report.statuses[400] > 50
    assert not [status for status in report.statuses if status >= 500]
