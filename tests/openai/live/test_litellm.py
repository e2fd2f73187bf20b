"""litellm, which speaks to this server as to OpenAI's API and as to vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from tests.openai.live.conftest import LONG, MAX_MODEL_LEN, NAME

import litellm  # isort: skip  # behind the module that keeps it from asking the internet
from litellm.llms.custom_httpx.async_client_cleanup import close_litellm_async_clients  # isort: skip
from litellm.exceptions import BadRequestError, ContextWindowExceededError, NotFoundError  # isort: skip

if TYPE_CHECKING:
    from tests.openai.live.conftest import Service

pytestmark = [
    # litellm's own types, which pydantic warns of
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class '.*' is using the `ReadOnly`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*fields' attribute:DeprecationWarning:litellm"),
]
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """litellm uses the thread's event loop, and where there is none makes one that nobody closes."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.run_until_complete(close_litellm_async_clients())  # type: ignore[no-untyped-call]  # it has no types
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def options(request: pytest.FixtureRequest, service: Service) -> dict[str, Any]:
    return {"model": f"{request.param}/{NAME}", "api_base": service.v1, "api_key": "none", "num_retries": 0}


def test_completion(options: dict[str, Any]) -> None:
    answer = litellm.completion(messages=HELLO, max_tokens=100, seed=1, **options)
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 1


def test_streaming(options: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "long"}]
    stream = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **options)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == LONG
    assert chunks[-1].usage.completion_tokens > 16


def test_acompletion(options: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
    async def ask() -> str:
        answer = await litellm.acompletion(messages=HELLO, **options)
        assert answer.choices[0].message.content == "Hello there!"
        stream = await litellm.acompletion(messages=HELLO, stream=True, **options)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert loop.run_until_complete(ask()) == "Hello there!"


def test_tools(options: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather"}]
    called = litellm.completion(messages=messages, tools=[WEATHER], tool_choice="auto", **options)
    assert called.choices[0].finish_reason == "tool_calls"
    call = called.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
    messages += [called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    answer = litellm.completion(messages=messages, tools=[WEATHER], **options)
    assert answer.choices[0].message.content == "It is 21 degrees in Paris."


def test_thinking(options: dict[str, Any]) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = litellm.completion(messages=HELLO, extra_body=extra, **options)
    assert answer.choices[0].message.reasoning_content == "The user is polite."
    assert answer.choices[0].message.content == "Hello, thoughtfully."


def test_errors_are_litellm_s(options: dict[str, Any]) -> None:
    with pytest.raises(ContextWindowExceededError, match=f"maximum context length is {MAX_MODEL_LEN} tokens"):
        litellm.completion(messages=[{"role": "user", "content": "word " * MAX_MODEL_LEN}], **options)
    with pytest.raises(BadRequestError, match="top_p"):
        litellm.completion(messages=HELLO, top_p=0.5, **options)
    with pytest.raises(NotFoundError):
        litellm.completion(messages=HELLO, **(options | {"model": options["model"] + "-2"}))
