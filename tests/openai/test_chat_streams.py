"""/v1/chat/completions as a stream: events, failures, clients that leave, draining."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.openai.conftest import SAY, events, front, in_turns, metric, parse_events, until

from dgemma_client.errors import ServerError
from dgemma_client.mock import delta, final, prefill, preview, reply
from dgemma_client.requests import InferRequest
from dgemma_openai.schemas.chat import ChatChunk

pytestmark = pytest.mark.asyncio
PATH = "/v1/chat/completions"


async def test_a_stream_has_role_text_end_counts_and_done() -> None:
    async with front(in_turns([delta("Hel"), delta(""), delta("lo"), final(input_tokens=3, output_tokens=5)])) as api:
        answer = await api.chat(stream=True, stream_options={"include_usage": True})
    *chunks, done = events(answer)
    assert done == "[DONE]"
    for chunk in chunks:
        ChatChunk.model_validate(chunk)
        assert chunk["object"] == "chat.completion.chunk"
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8
    assert answer.headers["cache-control"] == "no-cache"


async def test_counts_are_not_streamed_unless_asked_for() -> None:
    async with front() as api:
        assert "usage" not in (await api.chat(stream=True)).text


async def test_previews_and_reading_are_shown_beside_empty_deltas() -> None:
    asked: list[Any] = [prefill(100, 300), preview("He<|turn>l", 0, 1), delta("Hello"), final()]
    async with front(in_turns(asked)) as api:
        answer = await api.chat(stream=True, diffusing=True)
        assert api.asked()["stream_previews"] is True
    shown = [chunk for chunk in events(answer)[:-1] if "diffusing" in chunk]
    for chunk in shown:
        ChatChunk.model_validate(chunk)
    assert [chunk["diffusing"] for chunk in shown] == [
        {"index": 0, "prefilled_tokens": 100, "prompt_tokens": 300},
        {"index": 0, "canvas_index": 0, "step": 1, "text": "Hel"},
    ]
    assert [chunk["choices"][0]["delta"] for chunk in shown] == [{}, {}]


async def test_previews_are_not_asked_for_unless_wanted() -> None:
    async with front() as api:
        await api.chat(stream=True)
        assert api.asked()["stream_previews"] is False


async def test_a_failure_after_the_first_event_is_an_event_and_no_done_follows() -> None:
    async with front(in_turns([delta("Hel"), ServerError("the engine failed")])) as api:
        answer = await api.chat(stream=True)
        page = (await api.get("/metrics")).text
    assert answer.status_code == 200
    assert events(answer)[-1] == {
        "error": {"message": "the engine failed", "type": "server_error", "param": None, "code": "engine_error"}
    }
    assert metric(page, "dgemma_openai_stream_failures_total", code="engine_error") == 1


async def test_a_failure_of_one_answer_ends_the_others() -> None:
    turns: list[list[Any]] = [[delta("a"), 30.0, final()], [0.05, ServerError("broken")], [delta("c"), 30.0, final()]]
    for stream in (False, True):
        async with front(in_turns(*turns)) as api:
            answer = await api.chat(n=3, stream=stream)
            await until(lambda: len(api.triton.cancelled) == 2)
        assert "broken" in answer.text
        assert answer.status_code == (200 if stream else 500)


async def test_answers_of_one_request_come_beside_each_other() -> None:
    turns: list[list[Any]] = [[delta("slow"), 0.3, final()], [delta("fast"), final()]]
    async with front(in_turns(*turns)) as api:
        chunks = events(await api.chat(n=2, stream=True))[:-1]
    first_end = next(chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"])
    assert first_end == 1
    roles = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["delta"].get("role")]
    assert sorted(roles) == [0, 1]


def forever(request: InferRequest) -> Iterator[Any]:
    yield delta("begun ")
    yield 60.0
    yield final()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_ends_its_generations(stream: bool, n: int) -> None:
    async with front(forever) as api:
        async with api.call(PATH, SAY | {"stream": stream, "n": n}) as call:
            if stream:
                await call.until(b"begun")
            await until(lambda: len(api.triton.requests) == n)
            call.leave()
            await call.end()
        assert len(api.triton.cancelled) == n
        assert api.app.state.gateway.working == 0
        page = (await api.get("/metrics")).text
    assert metric(page, "dgemma_openai_requests_total", endpoint=PATH, status="499") == 1
    assert metric(page, "dgemma_openai_live_requests") == 0


async def test_a_client_that_left_before_its_stream_began_leaves_nothing_behind() -> None:
    def slow(request: InferRequest) -> Iterator[Any]:
        yield 0.3
        yield delta("a")
        yield 60.0

    async with front(slow) as api:
        async with api.call(PATH, SAY | {"stream": True}) as call:
            call.leave()
            await call.end()
        assert len(api.triton.cancelled) == 1


async def test_a_long_silence_has_signs_of_life() -> None:
    async with front(in_turns([delta("a"), 0.2, delta("b"), final()]), keep_alive_s=0.05) as api:
        answer = await api.chat(stream=True)
    assert 1 <= answer.text.count(": keep-alive\n\n") <= 10
    assert [chunk["choices"][0]["delta"].get("content") for chunk in events(answer)[:-1]] == ["", "a", "b", None]


async def test_while_it_drains_running_streams_end_and_new_work_is_refused() -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        yield delta("one ")
        yield 0.3
        yield from reply("two")(request)

    async with front(handler) as api, api.call(PATH, SAY | {"stream": True}) as call:
        await call.until(b"one")
        api.app.state.gateway.draining = True
        ready = await api.get("/v1/health/ready")
        refused = await api.chat()
        await call.end()
    assert ready.status_code == 503
    assert ready.json()["message"] == "Service is shutting down."
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert parse_events(call.content)[-1] == "[DONE]"


async def test_a_server_that_takes_too_long_is_a_timeout() -> None:
    async with front(forever, timeout_s=0.05) as api:
        status, _, code, message = await api.refusal(PATH, SAY)
    assert (status, code) == (504, "timeout")
    assert "no end after 0.05 s" in message


async def test_many_requests_at_once_do_not_mix() -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        text = json.loads(str(request.inputs["messages"][0]))["messages"][0]["content"]
        for letter in text:
            yield delta(letter)
            yield 0.001
        yield final()

    async with front(handler) as api:
        asked = [api.chat(messages=[{"role": "user", "content": f"text {n}"}]) for n in range(20)]
        answers = await asyncio.gather(*asked)
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [f"text {n}" for n in range(20)]
