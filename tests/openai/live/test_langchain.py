"""langchain-openai's chat model, as agents use it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from tests.openai.live.conftest import LONG, NAME

if TYPE_CHECKING:
    from tests.openai.live.conftest import Service


class get_weather(BaseModel):  # noqa: N801 - the function's name
    """Weather of a city."""

    city: str
    days: int = 1


@pytest.fixture(scope="module")
def model(service: Service) -> ChatOpenAI:
    return ChatOpenAI(
        model=NAME, base_url=service.v1, api_key=SecretStr("none"), max_retries=0, timeout=60, max_completion_tokens=200
    )


def test_invoke(model: ChatOpenAI) -> None:
    answer = model.invoke([SystemMessage("Be kind."), HumanMessage("hello")])
    assert answer.content == "Hello there!"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 1
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == NAME


def test_sampling_parameters(model: ChatOpenAI) -> None:
    assert model.bind(stop=["there"], seed=3, temperature=0.5).invoke("hello").content == "Hello "


def test_stream(model: ChatOpenAI) -> None:
    chunks = list(model.stream("long", stream_usage=True))
    texts = [chunk.content for chunk in chunks if chunk.content]
    assert "".join(str(text) for text in texts) == LONG
    assert len(texts) > 1
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 16


@pytest.mark.asyncio
async def test_asynchronous_calls(model: ChatOpenAI) -> None:
    assert (await model.ainvoke("hello")).content == "Hello there!"
    assert "".join([str(chunk.content) async for chunk in model.astream("hello")]) == "Hello there!"
    answers = await model.abatch(["hello"] * 4)
    assert [answer.content for answer in answers] == ["Hello there!"] * 4


def test_a_tool_from_call_to_answer(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("weather")]
    called = bound.invoke(messages)
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris", "days": 2})
    messages += [called, ToolMessage("21", tool_call_id=call["id"])]
    assert bound.invoke(messages).content == "It is 21 degrees in Paris."


def test_a_streamed_tool_call(model: ChatOpenAI) -> None:
    whole: Any = None
    for chunk in model.bind_tools([get_weather], tool_choice="get_weather").stream("weather"):
        whole = chunk if whole is None else whole + chunk
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Paris", "days": 2}]
    assert json.loads(whole.tool_call_chunks[0]["args"]) == {"city": "Paris", "days": 2}


def test_structured_output_by_a_tool(model: ChatOpenAI) -> None:
    answer = model.with_structured_output(get_weather, method="function_calling").invoke("weather")
    assert answer == get_weather(city="Paris", days=2)


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output_by_a_grammar_is_refused_by_name(model: ChatOpenAI, method: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format"):
        model.with_structured_output(get_weather, method=method).invoke("weather")
