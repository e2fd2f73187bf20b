"""openai-python's responses before real servers, as its users call them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import OpenAI
from tests.openai.live.conftest import LONG, MAX_MODEL_LEN, until

if TYPE_CHECKING:
    from tests.openai.live.conftest import Service

WEATHER: Any = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}]


def client_of(service: Service) -> OpenAI:
    return OpenAI(base_url=service.v1, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with client_of(service) as client:
        yield client


def test_an_answer_with_its_counts(client: OpenAI, service: Service) -> None:
    answer = client.responses.create(model=service.model, input="hello", reasoning={"effort": "low"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.output_text, answer.status) == ("Hello, thoughtfully.", "completed")
    assert answer.usage is not None
    thinking = answer.usage.output_tokens_details.reasoning_tokens
    assert 0 < thinking < answer.usage.output_tokens
    plain = client.responses.create(model=service.model, input="hello")
    assert plain.usage is not None
    assert plain.usage.output_tokens_details.reasoning_tokens == 0


def test_a_stream(client: OpenAI, service: Service) -> None:
    with client.responses.stream(model=service.model, input="long") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        answer = stream.get_final_response()
    assert len(texts) > 1  # one for each canvas
    assert "".join(texts) == answer.output_text == LONG


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_and_its_result(client: OpenAI, service: Service, stream: bool) -> None:
    asked: Any = {"model": service.model, "input": "weather", "tools": WEATHER, "reasoning": {"effort": "high"}}
    if stream:
        with client.responses.stream(**asked) as events:
            answer: Any = events.get_final_response()
    else:
        answer = client.responses.create(**asked)
    call = answer.output[-1]
    assert [item.type for item in answer.output] == ["reasoning", "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris", "days": 2})
    said: Any = [{"role": "user", "content": "weather"}, *answer.output]
    said.append({"type": "function_call_output", "call_id": call.call_id, "output": "21"})
    final = client.responses.create(model=service.model, input=said, tools=WEATHER)
    assert final.output_text == "It is 21 degrees in Paris."


def test_a_limit(client: OpenAI, service: Service) -> None:
    cut = client.responses.create(model=service.model, input="hello", max_output_tokens=2)
    assert cut.incomplete_details is not None
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_prompt_that_is_too_long(client: OpenAI, service: Service) -> None:
    expected = f"input: this model's maximum context length is {MAX_MODEL_LEN} tokens"
    with pytest.raises(openai.BadRequestError, match=expected) as caught:
        client.responses.create(model=service.model, input="x" * 2 * MAX_MODEL_LEN)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


def test_leaving_a_stream_ends_the_generation(client: OpenAI, service: Service) -> None:
    with client.responses.stream(model=service.model, input="repeat") as stream:
        next(event for event in stream if event.type == "response.output_text.delta")
    until(lambda: service.running() == 0)


def test_the_demo_model(demo: Service) -> None:
    asked: Any = {"model": demo.model, "input": "Say hello.", "max_output_tokens": 64, "extra_body": {"seed": 5}}
    with client_of(demo) as client:
        whole = client.responses.create(**asked)
        *_, last = client.responses.create(**asked, stream=True)
    assert last.response.output_text == whole.output_text
