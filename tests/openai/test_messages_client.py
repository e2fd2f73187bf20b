"""Anthropic's messages with the official client: calls, streams, counts, failures."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx2
import pytest
from tests.openai.conftest import MODEL, Front, front, metric, say, typed_events
from tests.openai.test_messages import ASK, CALL, HI, PATH, THOUGHT, TOOL

from dgemma_client.errors import ServerError
from dgemma_client.mock import delta, final
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def official(service: Front) -> AsyncIterator[anthropic.AsyncAnthropic]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app))
    client = anthropic.AsyncAnthropic(api_key="none", base_url="http://front", http_client=http, max_retries=0)
    async with client:
        yield client


async def test_a_failure_in_the_middle_is_an_event() -> None:
    def failing(request: InferRequest) -> Iterator[Any]:
        yield delta("Hel", [2])
        if request.inputs["max_tokens"] == (0,):
            yield final()
            return
        yield ServerError("out of luck")

    async with front(failing) as service:
        told = typed_events(await service.post(PATH, ASK | {"stream": True}))
        counted = metric((await service.get("/metrics")).text, "dgemma_openai_stream_failures_total")
        async with official(service) as client:
            with pytest.raises(anthropic.APIStatusError, match="out of luck"):
                async with client.messages.stream(model=MODEL, max_tokens=5, messages=HI) as stream:
                    await stream.until_done()
    assert told[-1] == {"type": "error", "error": {"type": "api_error", "message": "out of luck"}}
    assert counted == 1


async def test_the_official_client_answers_a_call() -> None:
    async with front(say(THOUGHT + "Wait." + CALL)) as service, official(service) as client:
        tools: Any = [TOOL]
        first = await client.messages.create(
            model=MODEL, max_tokens=50, messages=HI, tools=tools, thinking={"type": "enabled", "budget_tokens": 1024}
        )
        assert first.stop_reason == "tool_use"
        call: Any = first.content[-1]
        assert (call.name, call.input) == ("f", {"a": "x"})
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
        said: Any = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        await client.messages.create(model=MODEL, max_tokens=50, messages=said, tools=tools)
        messages = json.loads(service.asked()["messages"])["messages"]
    assert messages[-1] == {"role": "tool", "tool_call_id": call.id, "name": "f", "content": "42"}
    assert messages[-2]["reasoning_content"] == "hm hm"


async def test_the_official_client_streams() -> None:
    async with front(say(THOUGHT + "Hello the", "re" + CALL)) as service, official(service) as client:
        tools: Any = [TOOL]
        async with client.messages.stream(
            model=MODEL, max_tokens=50, messages=HI, tools=tools, extra_body={"diffusing": True}
        ) as stream:
            texts = [text async for text in stream.text_stream]
            message = await stream.get_final_message()
    assert "".join(texts) == "Hello there"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    call: Any = message.content[-1]
    assert call.input == {"a": "x"}
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (20, 10, 25)


async def test_the_official_client_counts() -> None:
    async with front(say()) as service, official(service) as client:
        count = await client.messages.count_tokens(model=MODEL, messages=HI, system="Be kind.")
    assert count.input_tokens == 3


async def test_the_official_client_with_betas() -> None:
    async with front(say("Hello")) as service, official(service) as client:
        message = await client.beta.messages.create(
            model=MODEL,
            max_tokens=50,
            messages=HI,
            betas=["context-management-2025-06-27"],
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        )
        with pytest.raises(anthropic.BadRequestError, match=r"context_management\.edits\[0\]: is of a type"):
            await client.beta.messages.create(
                model=MODEL,
                max_tokens=50,
                messages=HI,
                betas=["context-management-2025-06-27"],
                context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
            )
    assert message.content[0].type == "text"
