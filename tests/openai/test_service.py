"""Health, versions, licence, and the page of metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.openai.conftest import front, metric

pytestmark = pytest.mark.asyncio
SERVERS = b"# TYPE dgemma_queue_requests gauge\ndgemma_queue_requests 3\n"


async def test_live_and_ready() -> None:
    async with front() as api:
        live, ready, short = [await api.get(path) for path in ("/v1/health/live", "/v1/health/ready", "/health")]
    assert live.json() == short.json() == {"object": "health.response", "message": "Service is live.", "status": "live"}
    assert ready.json() == {"object": "health.response", "message": "Service is ready.", "status": "ready"}


async def test_not_ready_while_the_model_is_not() -> None:
    async with front() as api:
        api.triton.loaded = False
        ready = await api.get("/v1/health/ready")
        live = await api.get("/v1/health/live")
    assert ready.status_code == 503
    assert ready.json()["status"] == "not ready"
    assert live.status_code == 200


async def test_versions_and_licence() -> None:
    async with front() as api:
        version = (await api.get("/v1/version")).json()
        licence = (await api.get("/v1/license")).json()
        metadata = (await api.get("/v1/metadata")).json()
        manifest = (await api.get("/v1/manifest")).json()
    assert version["api"] == "1"
    assert licence["content"] == (Path(__file__).parents[2] / "LICENSE").read_text()
    assert licence["sha"] == hashlib.sha256(licence["content"].encode()).hexdigest()
    assert metadata["modelInfo"] == [{"shortName": "diffusion_gemma", "modelUrl": "demo"}]
    assert metadata["version"] == "1.2.3"
    assert manifest["max_model_len"] == "4096"


def served(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer))


async def test_the_page_of_metrics_has_the_server_s_too() -> None:
    async with front(triton_metrics="http://triton/metrics") as api:
        api.app.state.gateway.metrics._http = served(lambda _: httpx.Response(200, content=SERVERS))
        await api.chat()
        answer = await api.get("/v1/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metric(answer.text, "dgemma_queue_requests") == 3
    assert metric(answer.text, "dgemma_openai_server_metrics_up") == 1
    path = "/v1/chat/completions"
    assert metric(answer.text, "dgemma_openai_requests_total", endpoint=path, status="200") == 1
    assert metric(answer.text, "dgemma_openai_request_seconds_count", endpoint=path) == 1


def absent(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody")


@pytest.mark.parametrize("answer", [absent, lambda _: httpx.Response(500)])
async def test_the_page_says_so_where_the_server_s_are_not_there(
    answer: Callable[[httpx.Request], httpx.Response],
) -> None:
    async with front(triton_metrics="http://triton/metrics") as api:
        api.app.state.gateway.metrics._http = served(answer)
        page = await api.get("/metrics")
    assert page.status_code == 200
    assert metric(page.text, "dgemma_openai_server_metrics_up") == 0
    assert "dgemma_queue" not in page.text


async def test_made_up_paths_and_methods_do_not_make_the_page_grow() -> None:
    async with front() as api:
        for number in range(30):
            await api.get(f"/made/up/{number}")
            await api.get(f"/v1/models/{number}")
            await api.http.request(f"METHOD{number}", "/v1/models")
            await api.post("/v1/chat/completions", {"model": f"m{number}"})
        page = (await api.get("/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith("dgemma_openai_requests_total")]
    assert len(lines) < 8, lines
    assert metric(page, "dgemma_openai_requests_total", endpoint="other", status="404") == 30
    assert metric(page, "dgemma_openai_requests_total", endpoint="/v1/models/{name:path}", status="404") == 30
