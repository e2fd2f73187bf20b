"""Anthropic's official client before real servers, as its users call it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from anthropic import Anthropic
from tests.openai.live.conftest import LONG, MAX_MODEL_LEN, until

if TYPE_CHECKING:
    from tests.openai.live.conftest import Service

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = [
    {"name": "get_weather", "input_schema": {"type": "object", "properties": {"days": {"type": "integer"}}}}
]
THINK: Any = {"type": "enabled", "budget_tokens": 1024}


def client_of(service: Service) -> Anthropic:
    return Anthropic(base_url=service.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(service: Service) -> Iterator[Anthropic]:
    with client_of(service) as client:
        yield client


def test_an_answer_with_its_counts(client: Anthropic, service: Service) -> None:
    answer = client.messages.create(model=service.model, max_tokens=100, messages=HELLO)
    counted = client.messages.count_tokens(model=service.model, messages=HELLO)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Hello there!"}]
    assert answer.stop_reason == "end_turn"
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens > 0
    assert usage.output_tokens > 0


def test_a_stream_tells_the_prompts_length_first(client: Anthropic, service: Service) -> None:
    said: Any = [{"role": "user", "content": "long"}]
    counted = client.messages.count_tokens(model=service.model, messages=said)
    with client.messages.stream(model=service.model, max_tokens=500, messages=said) as stream:
        first = next(iter(stream))
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert first.type == "message_start"
    assert first.message.usage.input_tokens == counted.input_tokens
    assert len(texts) > 1  # one for each canvas
    assert "".join(texts) == LONG
    whole = client.messages.create(model=service.model, max_tokens=500, messages=said)
    assert (message.stop_reason, message.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == counted.input_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_thinking_a_call_and_its_result(client: Anthropic, service: Service, stream: bool) -> None:
    said: Any = [{"role": "user", "content": "weather"}]
    asked: Any = {"model": service.model, "max_tokens": 200, "messages": said, "tools": WEATHER, "thinking": THINK}
    if stream:
        with client.messages.stream(**asked) as events:
            answer: Any = events.get_final_message()
    else:
        answer = client.messages.create(**asked)
    thought, call = answer.content
    assert (thought.thinking, answer.stop_reason) == ("The user is polite.", "tool_use")
    assert (call.name, call.input) == ("get_weather", {"city": "Paris", "days": 2})
    said += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "21"}]},
    ]
    final = client.messages.create(model=service.model, max_tokens=200, messages=said, tools=WEATHER)
    assert [block.to_dict() for block in final.content] == [{"type": "text", "text": "It is 21 degrees in Paris."}]


def test_a_stop_sequence_and_a_limit(client: Anthropic, service: Service) -> None:
    cut = client.messages.create(model=service.model, max_tokens=2, messages=HELLO)
    stopped = client.messages.create(model=service.model, max_tokens=100, messages=HELLO, stop_sequences=["there"])
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "there")
    assert [block.to_dict() for block in stopped.content] == [{"type": "text", "text": "Hello "}]


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_too_long(client: Anthropic, service: Service, stream: bool) -> None:
    said: Any = [{"role": "user", "content": "x" * 2 * MAX_MODEL_LEN}]
    expected = f"^Error code: 400 .*messages: this model's maximum context length is {MAX_MODEL_LEN} tokens"
    with pytest.raises(anthropic.BadRequestError, match=expected):
        client.messages.create(model=service.model, max_tokens=5, messages=said, stream=stream)


def test_leaving_a_stream_ends_the_generation(client: Anthropic, service: Service) -> None:
    said: Any = [{"role": "user", "content": "repeat"}]
    with client.messages.stream(model=service.model, max_tokens=1500, messages=said) as stream:
        assert next(iter(stream.text_stream))
    until(lambda: service.running() == 0)


def test_the_demo_model(demo: Service) -> None:
    said: Any = [{"role": "user", "content": "Say hello."}]
    asked: Any = {"model": demo.model, "max_tokens": 64, "messages": said, "extra_body": {"seed": 5}}
    with client_of(demo) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
