"""The application as a whole: ids of requests, what the log holds, failures, the published document."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_spec_validator import validate
from tests.openai.conftest import MODEL, SAY, front, in_turns, metric

from dgemma_client.errors import ServerError
from dgemma_client.mock import delta, final, reply
from dgemma_openai import logs
from dgemma_openai.app import create_app
from dgemma_openai.settings import ApiKey, Settings

pytestmark = pytest.mark.asyncio
SECRET = "the moon is made of basalt"
REPLY = "an answer nobody else may read"


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the front end logs, as its command would; the format is the parameter."""
    names = ("dgemma_openai", "uvicorn", "uvicorn.error")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    logs.configure("DEBUG", getattr(request, "param", "text"))
    stream = io.StringIO()
    handler = logging.getLogger("dgemma_openai").handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    yield stream
    for name, (handlers, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(logging.NOTSET)


# ---------------------------------------------------------------- ids


async def test_each_answer_has_an_id_of_its_own() -> None:
    async with front() as api:
        found = [(await api.get(path)).headers["x-request-id"] for path in ("/health", "/nothing", "/v1/models")]
        found.append((await api.chat(stream=True)).headers["x-request-id"])
    assert all(re.fullmatch(r"[0-9a-f]{32}", text) for text in found)
    assert len(set(found)) == 4


@pytest.mark.parametrize("given", ["abc", "A.b:c_d-1", "x" * 128])
async def test_an_id_that_is_given_is_kept(given: str) -> None:
    async with front() as api:
        assert (await api.get("/health", x_request_id=given)).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "<b>", "a,b"])
async def test_an_id_that_does_not_belong_into_a_log_is_replaced(given: str) -> None:
    async with front() as api:
        assert re.fullmatch(r"[0-9a-f]{32}", (await api.get("/health", x_request_id=given)).headers["x-request-id"])


# ---------------------------------------------------------------- logs


async def everything(**settings: Any) -> None:
    """Requests of all kinds that hold the secrets."""
    turns: list[list[Any]] = [[delta(REPLY), final()] for _ in range(5)]
    turns.append([delta(REPLY), ServerError("broken")])
    said = {"messages": [{"role": "user", "content": SECRET}]}
    async with front(in_turns(*turns), **settings) as api:
        await api.chat(**said)
        await api.chat(**said, stream=True)
        await api.complete(prompt=SECRET)
        await api.complete(prompt=SECRET, stream=True, echo=True)
        await api.post("/tokenize", {"prompt": SECRET})
        await api.chat(**said, stream=True)
        await api.post("/v1/chat/completions", b'{"messages": "' + SECRET.encode())
        await api.chat(messages=SECRET)
        await api.chat(**said, foo=SECRET)
        await api.get(f"/nothing?q={SECRET}")


async def test_no_prompt_and_no_answer_is_logged(log: io.StringIO) -> None:
    await everything()
    text = log.getvalue()
    assert text.count("POST /v1/chat/completions -> 200") == 3
    for secret in (SECRET, REPLY, "basalt", "nobody"):
        assert secret not in text


@pytest.mark.parametrize("log", ["json"], indirect=True)
async def test_prompts_and_answers_are_logged_where_asked_for(log: io.StringIO) -> None:
    async with front(reply(f'{REPLY}\n"', "!"), log_prompts=True) as api:
        await api.post(
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": SECRET}]},
            x_request_id="mine",
        )
        await api.complete(prompt=[5, 6], stream=True)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    prompt, answer, end, ids, *_ = lines
    assert prompt["prompt"] == [{"role": "user", "content": SECRET}]
    assert answer["answer"] == f'{REPLY}\n"!'
    assert prompt["answer_id"] == answer["answer_id"]
    assert prompt["answer_id"].startswith("chatcmpl-")
    assert {line["request_id"] for line in (prompt, answer, end)} == {"mine"}
    assert prompt["level"] == "INFO"
    assert ids["prompt"] == [5, 6]


async def test_a_line_of_the_log_is_one_line_whatever_a_prompt_holds(log: io.StringIO) -> None:
    async with front(reply("a\nb"), log_prompts=True) as api:
        await api.complete(prompt="x\n2026-01-01 00:00:00 ERROR made up")
    assert all(re.match(r"\d{4}-\d\d-\d\d .* INFO dgemma_openai\.", line) for line in log.getvalue().splitlines())


async def test_what_had_come_before_a_failure_is_logged_too(log: io.StringIO) -> None:
    async with front(in_turns([delta("half"), ServerError("broken")]), log_prompts=True) as api:
        await api.chat()
    assert "answer chatcmpl-" in log.getvalue()
    assert '"half"' in log.getvalue()


@pytest.mark.parametrize("log", ["json"], indirect=True)
async def test_each_request_has_one_line(log: io.StringIO) -> None:
    async with front() as api:
        await api.post("/v1/chat/completions", SAY, x_request_id="one")
        await api.get("/made/up", x_request_id="two")
        await api.get("/health", x_request_id="three")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    found = [(line["request_id"], line["endpoint"], line["status"], line["level"]) for line in lines]
    assert found == [
        ("one", "/v1/chat/completions", 200, "INFO"),
        ("two", "other", 404, "INFO"),
        ("three", "/health", 200, "DEBUG"),
    ]
    assert all(line["ms"] >= 0 and line["time"] for line in lines)


# ---------------------------------------------------------------- failures


async def test_a_failure_of_ours_is_a_500_without_its_reason(log: io.StringIO) -> None:
    async with front() as api:

        def broken() -> None:
            raise RuntimeError("a secret inside")

        api.app.state.gateway.backend.info = broken
        answer = await api.get("/v1/models")
        page = (await api.get("/metrics")).text
    assert answer.status_code == 500
    request_id = answer.headers["x-request-id"]
    assert answer.json()["error"] == {
        "message": f"internal error; the log has it under {request_id}",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert "a secret inside" in log.getvalue()
    assert f"request {request_id} failed" in log.getvalue()
    assert metric(page, "dgemma_openai_requests_total", endpoint="/v1/models", status="500") == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nothing", 404, "not_found"), ("GET", "/v1/chat/completions", 405, None), ("POST", "/health", 405, None)],
)
async def test_what_is_not_there_is_refused_in_the_same_shape(method: str, path: str, status: int, code: Any) -> None:
    async with front() as api:
        answer = await api.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"].startswith(f"{method} {path}: ")


# ---------------------------------------------------------------- the document


def document(**settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = create_app(Settings(**settings)).openapi()
    return found


async def test_the_published_document_is_valid() -> None:
    async with front() as api:
        published = (await api.get("/openapi.json")).json()
    validate(published)
    assert published == document()


async def test_each_route_documents_its_refusals() -> None:
    errors = {"ErrorBody", "AnthropicErrorBody"}
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            assert "422" not in responses
            if path in ("/health", "/v1/health/live", "/v1/health/ready", "/metrics", "/v1/metrics"):
                continue
            wanted = {"401", "404", "429", "500", "503"} | ({"400", "408", "413", "504"} if method == "post" else set())
            assert wanted <= set(responses), path
            for status in wanted:
                model = responses[status]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                assert model in errors
                assert (model == "AnthropicErrorBody") == path.startswith("/v1/messages")


async def test_streams_are_documented() -> None:
    found = document()
    chunks = {"chat/completions": "ChatChunk", "completions": "CompletionChunk", "fim/completions": "FimChunk"}
    for path, chunk in ((f"/v1/{name}", chunk) for name, chunk in chunks.items()):
        content = found["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
        event = content["text/event-stream"]["schema"]
        assert chunk in event["description"]
        assert f"/{chunk}" in json.dumps(event["properties"]["data"])
        assert chunk in found["components"]["schemas"]


async def test_nothing_that_is_documented_is_missing() -> None:
    found = document()
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(found)))
    assert used <= set(found["components"]["schemas"])
    assert "HTTPValidationError" not in found["components"]["schemas"]


async def test_keys_are_documented_where_they_are_needed() -> None:
    assert "securitySchemes" not in document()["components"]
    found = document(api_keys=(ApiKey(bytes(32), "a"),))
    validate(found)
    assert found["paths"]["/v1/chat/completions"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    assert "security" not in found["paths"]["/v1/health/ready"]["get"]
