"""What stands before the routes: keys, rates, sizes, times, other sites' pages."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.openai.conftest import SAY, front

from dgemma_openai import security
from dgemma_openai.security import find_key
from dgemma_openai.settings import ApiKey

pytestmark = pytest.mark.asyncio
KEYS = tuple(ApiKey(hashlib.sha256(key.encode()).digest(), name) for key, name in (("sk-a", "ann"), ("sk-b", "bob")))
CLOSED = ["/v1/models", "/v1/metadata", "/v1/manifest", "/v1/version", "/v1/license", "/openapi.json", "/nothing"]
OPEN = ["/health", "/v1/health/live", "/v1/health/ready", "/metrics", "/v1/metrics"]


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Basic sk-a"}, "missing_api_key"),
        ({"x-api-key": ""}, "missing_api_key"),
        ({"authorization": "Bearer sk-c"}, "invalid_api_key"),
        ({"authorization": "Bearer sk-aa"}, "invalid_api_key"),
        ({"x-api-key": "\u00fc".encode("latin-1")}, "invalid_api_key"),
    ],
)
async def test_who_has_no_key_is_told_so(headers: dict[str, Any], code: str) -> None:
    async with front(api_keys=KEYS) as api:
        answer = await api.http.post("/v1/chat/completions", json=SAY, headers=headers)
        assert api.triton.requests == []
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer sk-a"}, {"authorization": "bearer  sk-b "}, {"x-api-key": "sk-a"}],
)
async def test_each_form_of_a_key_is_taken(headers: dict[str, str]) -> None:
    async with front(api_keys=KEYS) as api:
        assert (await api.http.post("/v1/chat/completions", json=SAY, headers=headers)).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
async def test_without_a_key_nothing_but_health_and_figures_is_shown(path: str) -> None:
    async with front(api_keys=KEYS) as api:
        assert (await api.get(path)).status_code == 401


@pytest.mark.parametrize("path", OPEN)
async def test_probes_and_scrapers_need_no_key(path: str) -> None:
    async with front(api_keys=KEYS) as api:
        assert (await api.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path", ["//health", "/health/", "/metrics/../v1/models", "/playground/../v1/models", "/HEALTH"]
)
async def test_no_other_way_of_writing_a_path_opens_one(path: str) -> None:
    async with front(api_keys=KEYS) as api:
        answer = await api.http.send(_raw(path))
    assert answer.status_code in (401, 404)
    assert b"max_model_len" not in answer.content


def _raw(path: str) -> httpx.Request:
    request = httpx.Request("GET", "http://front/")
    request.url = request.url.copy_with(raw_path=path.encode())
    return request


async def test_anthropics_paths_are_refused_in_anthropics_shape() -> None:
    async with front(api_keys=KEYS) as api:
        answer = await api.post("/v1/messages", {})
    assert answer.status_code == 401
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"


async def test_a_key_is_compared_with_all_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(security, "hmac", Watched)
    found = find_key("sk-a", KEYS)
    assert found is not None
    assert found.name == "ann"
    digest = hashlib.sha256(b"sk-a").digest()
    assert compared == [(digest, key.sha256) for key in KEYS], "the first that fits does not end it"


# ---------------------------------------------------------------- rates


async def test_the_rate_is_of_a_key() -> None:
    async with front(api_keys=KEYS, requests_per_minute=2) as api:
        statuses = [(await api.get("/v1/models", authorization="Bearer sk-a")).status_code for _ in range(3)]
        other = await api.get("/v1/models", authorization="Bearer sk-b")
        refused = await api.get("/v1/models", authorization="Bearer sk-a")
    assert statuses == [200, 200, 429]
    assert other.status_code == 200
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


async def test_without_keys_the_rate_is_of_an_address() -> None:
    async with front(requests_per_minute=1) as api:
        assert (await api.get("/v1/models")).status_code == 200
        assert (await api.get("/v1/models")).status_code == 429
        assert (await api.get("/v1/models", x_forwarded_for="9.9.9.9")).status_code == 429
        other = httpx.ASGITransport(api.app, client=("10.0.0.2", 1))
        async with httpx.AsyncClient(transport=other, base_url="http://front") as http:
            assert (await http.get("/v1/models")).status_code == 200


async def test_guesses_of_keys_count_for_their_address() -> None:
    async with front(api_keys=KEYS, requests_per_minute=2) as api:
        statuses = [(await api.get("/v1/models", authorization=f"Bearer {n}")).status_code for n in range(3)]
        right = await api.get("/v1/models", authorization="Bearer sk-a")
    assert statuses == [401, 401, 429]
    assert right.status_code == 200


async def test_health_has_no_rate() -> None:
    async with front(requests_per_minute=1) as api:
        assert {(await api.get("/v1/health/ready")).status_code for _ in range(5)} == {200}


# ---------------------------------------------------------------- bodies


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async with front(max_body_bytes=100) as api:
        answer = await api.http.post("/v1/chat/completions", content=b"x", headers={"content-length": "101"})
    assert answer.status_code == 413
    assert answer.json()["error"] == {
        "message": "the body has more than 100 bytes; send less",
        "type": "request_too_large",
        "param": None,
        "code": "body_too_large",
    }
    assert answer.headers["connection"] == "close"


async def test_a_body_of_unknown_length_is_read_no_further_than_the_limit() -> None:
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b"x" * 10

    async with front(max_body_bytes=100) as api:
        answer = await api.http.post("/v1/chat/completions", content=parts())
    assert answer.status_code == 413
    assert sent < 20


async def test_a_body_may_be_as_large_as_the_limit() -> None:
    body = json.dumps(SAY).encode()
    async with front(max_body_bytes=len(body)) as api:
        assert (await api.post("/v1/chat/completions", body)).status_code == 200
        assert (await api.post("/v1/chat/completions", body + b" ")).status_code == 413


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async with front(body_timeout_s=0.05) as api:
        answer = await api.http.post("/v1/chat/completions", content=parts())
    assert answer.status_code == 408
    assert answer.json()["error"]["message"] == "the body was not here within 0.05 s"
    assert answer.json()["error"]["code"] == "body_timeout"


# ---------------------------------------------------------------- pages of other sites


async def test_no_page_may_ask_unless_its_origin_is_named() -> None:
    async with front() as api:
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        preflight = await api.http.options("/v1/chat/completions", headers=asked)
        answer = await api.get("/v1/models", origin="https://page.example")
    for found in (preflight, answer):
        assert not [name for name in found.headers if name.startswith("access-control")]
    assert preflight.status_code == 405


async def test_a_page_of_a_named_origin_may_ask() -> None:
    async with front(cors_origins=("https://page.example",), api_keys=KEYS) as api:
        asked = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        preflight = await api.http.options("/v1/chat/completions", headers=asked)
        other = await api.http.options("/v1/chat/completions", headers=asked | {"origin": "https://bad.example"})
        refused = await api.get("/v1/models", origin="https://page.example")
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example", "or the page cannot read why"


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "MADEUP"])
async def test_other_methods_are_refused(method: str) -> None:
    async with front() as api:
        answer = await api.http.request(method, "/v1/models")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
