"""OpenAI's responses: what is asked, the answer and its events, refusals; with the official client and without."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from tests.openai.conftest import MODEL, Front, front, metric, say, typed_events, until, without

from dgemma_client.errors import ServerError
from dgemma_client.mock import delta, final
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio
PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": MODEL, "input": "hi"}
CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nhm hm<channel|>"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}


@asynccontextmanager
async def official(service: Front) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(service.app))
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://front/v1", http_client=http, max_retries=0
    ) as client:
        yield client


async def streamed(service: Front, **changes: Any) -> list[dict[str, Any]]:
    answer = await service.post(PATH, ASK | {"stream": True} | changes)
    return read(answer)


def read(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events; they are counted."""
    found = typed_events(answer)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return without(items, "id", "call_id")


# ---------------------------------------------------------------- what is asked


async def test_a_question_reaches_the_server() -> None:
    async with front(say("Hello")) as service:
        asked = {
            "instructions": "Be kind.",
            "max_output_tokens": 40,
            "temperature": 0.5,
            "seed": -1,
            "tools": [TOOL],
            "reasoning": {"effort": "low"},
            "max_denoising_steps": 9,
            "store": False,
            "include": [],
            "top_p": 1.0,
        }
        assert (await service.post(PATH, ASK | asked)).status_code == 200
        sent = service.asked()
    told = json.loads(sent["messages"])
    assert told["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert told["tools"] == [{"type": "function", "function": {key: TOOL[key] for key in TOOL if key != "type"}}]
    assert told["enable_thinking"] is True
    assert sent["max_tokens"] == 40
    assert sent["temperature"] == 0.5
    assert sent["seed"] == 2**64 - 1
    assert sent["max_denoising_steps"] == 9
    assert sent["skip_special_tokens"] is False


async def test_items_of_earlier_turns() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "42.", "annotations": []}]},
        {"role": "user", "content": "thanks"},
    ]
    async with front(say("Hello")) as service:
        assert (await service.post(PATH, ASK | {"input": items})).status_code == 200
        messages = json.loads(service.asked()["messages"])["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert messages[2]["reasoning_content"] == "hm"
    assert messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert messages[3]["content"] == "42"
    assert messages[4]["content"] == "42."


async def test_a_demanded_call_opens_the_turn() -> None:
    async with front(say('a:<|"|>x<|"|>}<tool_call|>')) as service:
        choice = {"type": "function", "name": "f"}
        answer = (await service.post(PATH, ASK | {"tools": [TOOL], "tool_choice": choice})).json()
        assert service.asked()["text_input"] == "<bos>text<|tool_call>call:f{"
    assert [item["type"] for item in answer["output"]] == ["function_call"]
    assert json.loads(answer["output"][0]["arguments"]) == {"a": "x"}
    assert answer["tool_choice"] == choice


async def test_no_thinking_unless_asked() -> None:
    async with front(say("Hello")) as service:
        for reasoning in (None, {}, {"effort": None}, {"effort": "none"}, {"effort": "minimal"}):
            assert (await service.post(PATH, ASK | {"reasoning": reasoning})).status_code == 200
            assert not json.loads(service.asked()["messages"]).get("enable_thinking", False)


# ---------------------------------------------------------------- whole answers


async def test_an_answer_has_its_items_and_counts() -> None:
    async with front(say(THOUGHT + "Hello the", "re" + CALL)) as service:
        answer = (await service.post(PATH, ASK | {"tools": [TOOL], "metadata": {"a": "b"}, "user": "u"})).json()
        counted = service.asked()
    assert without_ids(answer["output"]) == [
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm hm"}],
            "status": "completed",
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello there", "annotations": [], "logprobs": []}],
            "status": "completed",
        },
        {"type": "function_call", "name": "f", "arguments": '{"a": "x"}', "status": "completed"},
    ]
    assert [item["id"].split("_")[0] for item in answer["output"]] == ["rs", "msg", "fc"]
    assert answer["usage"] == {
        "input_tokens": 30,
        "output_tokens": 25,
        "total_tokens": 55,
        "denoising_steps": 7,
        "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    assert counted["text_input"] == "hm hm"
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    assert answer["incomplete_details"] is None
    assert (answer["metadata"], answer["user"], answer["store"]) == ({"a": "b"}, "u", False)


@pytest.mark.parametrize("end", ["length", "deadline"])
async def test_a_cut_answer_is_incomplete(end: str) -> None:
    async with front(say("Hello", finish_reason=end)) as service:
        answer = (await service.post(PATH, ASK)).json()
        told = await streamed(service)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["completed_at"] is None
    assert told[-1]["type"] == "response.incomplete"
    assert without_ids(told[-1]["response"]["output"]) == without_ids(answer["output"])


async def test_a_cut_call_says_so() -> None:
    async with front(say('<|tool_call>call:f{a:<|"|>x', finish_reason="length")) as service:
        answer = (await service.post(PATH, ASK | {"tools": [TOOL]})).json()
    assert without_ids(answer["output"]) == [
        {"type": "function_call", "name": "f", "arguments": '{"a": "x', "status": "incomplete"}
    ]


async def test_an_empty_answer_has_an_item() -> None:
    async with front(say("")) as service:
        answer = (await service.post(PATH, ASK)).json()
        told = await streamed(service)
    assert [item["content"][0]["text"] for item in answer["output"]] == [""]
    assert not [event for event in told if event["type"].endswith("delta")]
    assert told[-1]["response"]["output"][0]["status"] == "completed"


# ---------------------------------------------------------------- streams


async def test_the_events_of_an_answer_in_order() -> None:
    async with front(say(THOUGHT + "Hello the", "re" + CALL)) as service:
        told = await streamed(service, tools=[TOOL])
    part = ["response.content_part.added", "response.content_part.done"]
    assert [event["type"] for event in told] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", part[0], "response.reasoning_text.delta"),
        *("response.reasoning_text.done", part[1], "response.output_item.done"),
        *("response.output_item.added", part[0], "response.output_text.delta", "response.output_text.delta"),
        *("response.output_text.done", part[1], "response.output_item.done"),
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
        "response.completed",
    ]
    assert [event["output_index"] for event in told[2:-1]] == [0] * 6 + [1] * 7 + [2] * 4
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert told[-1]["response"]["output"] == done
    assert (told[0]["response"]["status"], told[0]["response"]["output"]) == ("in_progress", [])
    added = [event["item"] for event in told if event["type"] == "response.output_item.added"]
    assert [(item["id"], item["status"]) for item in added] == [(item["id"], "in_progress") for item in done]
    for event in told[2:-1]:
        if "item_id" in event:
            assert event["item_id"] == done[event["output_index"]]["id"]


async def test_a_summary_is_the_thinking() -> None:
    async with front(say(THOUGHT + "Hello")) as service:
        told = await streamed(service, reasoning={"effort": "high", "summary": "auto"})
    assert [event["type"] for event in told[2:8]] == [
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
    ]
    item = told[-1]["response"]["output"][0]
    assert (item["summary"], item["content"]) == ([{"type": "summary_text", "text": "hm hm"}], [])


async def test_a_stream_and_a_whole_answer_are_the_same() -> None:
    texts = [THOUGHT[:9], THOUGHT[9:] + "One." + CALL[:20], CALL[20:] + "Two." + THOUGHT, "Three." + CALL]
    async with front(say(*texts)) as service:
        whole = (await service.post(PATH, ASK | {"tools": [TOOL]})).json()
        told = await streamed(service, tools=[TOOL])
    assert without_ids(told[-1]["response"]["output"]) == without_ids(whole["output"])
    assert told[-1]["response"]["usage"] == whole["usage"]
    shown = "".join(str(event.get("delta", "")) for event in told)
    assert "<" not in shown
    assert "channel" not in shown


async def test_previews_are_events_of_their_own() -> None:
    async with front(say("Hello")) as service:
        told = await streamed(service, diffusing=True)
    shown = [event["diffusing"] for event in told if event["type"] == "response.diffusing"]
    assert shown == [
        {"index": 0, "prefilled_tokens": 8, "prompt_tokens": 30},
        {"index": 0, "canvas_index": 0, "step": 1, "text": "Hel"},
    ]
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


async def test_a_failure_before_the_first_event_is_a_status() -> None:
    def failing(_: InferRequest) -> Iterator[Any]:
        yield ServerError("out of luck")

    async with front(failing) as service:
        answer = await service.post(PATH, ASK | {"stream": True})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "out of luck")


async def test_a_failure_in_the_middle_is_an_error_and_a_failed_response() -> None:
    def failing(_: InferRequest) -> Iterator[Any]:
        yield delta("Hel")
        yield ServerError("out of luck")

    async with front(failing) as service:
        told = await streamed(service)
        counted = metric((await service.get("/metrics")).text, "dgemma_openai_stream_failures_total")
        async with official(service) as client:
            with pytest.raises(openai.APIError, match="out of luck"):
                async with client.responses.stream(model=MODEL, input="hi") as stream:
                    await stream.until_done()
    assert [event["type"] for event in told[-2:]] == ["error", "response.failed"]
    assert told[-2]["message"] == told[-2]["error"]["message"] == "out of luck"
    failed = told[-1]["response"]
    assert (failed["status"], failed["error"]) == ("failed", {"code": "server_error", "message": "out of luck"})
    assert (failed["usage"], failed["output"][0]["status"]) == (None, "incomplete")
    assert counted == 1


async def test_an_answer_whose_thinking_cannot_be_counted_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def handler(request: InferRequest) -> Iterator[Any]:
        if request.inputs.get("max_tokens") == (0,):
            yield ServerError("it stops")
            return
        yield delta(THOUGHT + "Hello")
        yield final(input_tokens=3, output_tokens=9)

    async with front(handler) as service:
        answer = await service.post(PATH, ASK)
    assert answer.json()["output"][-1]["content"][0]["text"] == "Hello"
    assert answer.json()["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}
    assert "was not counted (it stops)" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_generation(stream: bool) -> None:
    def slow(_: InferRequest) -> Iterator[Any]:
        yield delta("Hello")
        yield 60.0

    async with front(slow) as service, service.call(PATH, ASK | {"stream": stream}) as call:
        if stream:
            await call.until(b"Hello")
        else:
            await until(lambda: bool(service.triton.requests))
        call.leave()
        await until(lambda: bool(service.triton.cancelled))


# ---------------------------------------------------------------- the official client


async def test_the_official_client_answers_a_call() -> None:
    async with front(say(THOUGHT + "Wait." + CALL)) as service, official(service) as client:
        tools: Any = [TOOL | {"strict": False}]
        first = await client.responses.create(model=MODEL, input="hi", tools=tools, store=False)
        assert first.output_text == "Wait."
        call: Any = first.output[-1]
        assert json.loads(call.arguments) == {"a": "x"}
        said: Any = [{"role": "user", "content": "hi"}, *first.output]
        said.append({"type": "function_call_output", "call_id": call.call_id, "output": "42"})
        await client.responses.create(model=MODEL, input=said, tools=tools)
        messages = json.loads(service.asked(-2)["messages"])["messages"]
    assert messages[-1] == {"role": "tool", "tool_call_id": call.call_id, "name": "f", "content": "42"}
    assert messages[-2]["reasoning_content"] == "hm hm"


async def test_the_official_client_streams() -> None:
    async with front(say(THOUGHT + "Hello the", "re" + CALL)) as service, official(service) as client:
        tools: Any = [TOOL]
        texts, kinds = [], set()
        async with client.responses.stream(
            model=MODEL, input="hi", tools=tools, extra_body={"diffusing": True}
        ) as stream:
            async for event in stream:
                kinds.add(event.type)
                if event.type == "response.output_text.delta":
                    texts.append(event.delta)
            final_response = await stream.get_final_response()
        plain = [event async for event in await client.responses.create(model=MODEL, input="hi", stream=True)]
    assert "".join(texts) == final_response.output_text == "Hello there"
    assert "response.diffusing" in kinds
    assert [item.type for item in final_response.output] == ["reasoning", "message", "function_call"]
    assert final_response.usage is not None
    assert final_response.usage.output_tokens_details.reasoning_tokens == 2
    assert plain[-1].type == "response.completed"


async def test_the_official_client_names_the_field() -> None:
    async with front() as service, official(service) as client:
        with pytest.raises(openai.BadRequestError, match="previous_response_id: is not supported") as caught:
            await client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
