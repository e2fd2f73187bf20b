"""Anthropic's messages: what is asked, the answer and its events, refusals; with the official client and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.openai.conftest import MODEL, Front, front, say, typed_events, until, without

from dgemma_client.errors import InvalidRequest, Overloaded, ServerError
from dgemma_client.mock import delta, final
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio
PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "hi"}]
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": HI}
CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nhm hm<channel|>"
TOOL: dict[str, Any] = {
    "name": "f",
    "description": "d",
    "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
}
CACHED = {"type": "ephemeral"}


async def streamed(service: Front, **changes: Any) -> list[dict[str, Any]]:
    return typed_events(await service.post(PATH, ASK | {"stream": True} | changes))


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return without(items, "id", "signature")


def put_together(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a stream, as a client makes them of its events."""
    blocks: list[dict[str, Any]] = []
    for event in told:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        if event["type"] != "content_block_delta":
            continue
        change = event["delta"]
        match change["type"]:
            case "text_delta":
                blocks[-1]["text"] += change["text"]
            case "thinking_delta":
                blocks[-1]["thinking"] += change["thinking"]
            case "signature_delta":
                blocks[-1]["signature"] = change["signature"]
            case "input_json_delta":
                blocks[-1]["input"] = blocks[-1]["input"] or ""
                blocks[-1]["input"] += change["partial_json"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"] or "{}")
    return blocks


# ---------------------------------------------------------------- what is asked


async def test_a_question_reaches_the_server() -> None:
    async with front(say("Hello")) as service:
        asked = {
            "system": [{"type": "text", "text": "Be kind.", "cache_control": CACHED}],
            "tools": [TOOL],
            "stop_sequences": ["END"],
            "temperature": 0.5,
            "top_p": 1,
            "seed": 7,
            "entropy_bound": 0.2,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "u"},
        }
        assert (await service.post(PATH, ASK | asked)).status_code == 200
        sent = service.asked()
    told = json.loads(sent["messages"])
    assert told["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert [tool["function"]["name"] for tool in told["tools"]] == ["f"]
    assert told["enable_thinking"] is True
    assert (sent["max_tokens"], sent["stop_words"], sent["seed"]) == (50, "END", 7)
    assert (sent["temperature"], sent["entropy_bound"]) == (0.5, 0.2)
    assert sent["skip_special_tokens"] is False


@pytest.mark.parametrize(
    ("thinking", "on"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled"}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
    ],
)
async def test_thinking_is_on_or_off(thinking: Any, on: bool) -> None:
    async with front(say("Hello")) as service:
        assert (await service.post(PATH, ASK | {"thinking": thinking})).status_code == 200
        assert json.loads(service.asked()["messages"]).get("enable_thinking", False) is on


async def test_blocks_of_earlier_turns() -> None:
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "of another server"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}, "caller": {"type": "direct"}},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "Go on.", "cache_control": CACHED | {"ttl": "1h"}},
            ],
        },
        {"role": "system", "content": "Be brief."},
    ]
    async with front(say("Hello")) as service:
        assert (await service.post(PATH, ASK | {"messages": messages})).status_code == 200
        told = json.loads(service.asked()["messages"])["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool", "user", "system"]
    assert told[1]["reasoning_content"] == "hm"
    assert [call["function"]["arguments"] for call in told[1]["tool_calls"]] == [{"a": 1}, {}]
    assert [message["content"] for message in told[2:]] == ["Error: no", "42", "Go on.", "Be brief."]


async def test_an_open_answer_goes_on() -> None:
    messages = [*HI, {"role": "assistant", "content": "He"}]
    async with front(say("llo")) as service:
        answer = await service.post(PATH, ASK | {"messages": messages})
        assert json.loads(service.asked()["messages"])["continue_final_message"] is True
    assert answer.json()["content"] == [{"type": "text", "text": "llo"}]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_demanded_call_opens_the_turn(stream: bool) -> None:
    async with front(say('a:<|"|>x<|"|>}<tool_call|>')) as service:
        changes = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}, "stream": stream}
        answer = await service.post(PATH, ASK | changes)
        opened = [request.inputs.get("text_input") for request in service.triton.requests]
        assert ("<bos>text<|tool_call>call:f{",) in opened
    blocks = put_together(typed_events(answer)) if stream else answer.json()["content"]
    assert without_ids(blocks) == [{"type": "tool_use", "name": "f", "input": {"a": "x"}}]


async def test_what_agents_send_is_taken() -> None:
    """A coding agent's request: cache marks, effort, thinking to keep, a beta of the API in header and query."""
    tool = TOOL | {"eager_input_streaming": True, "cache_control": CACHED}
    body = {
        "model": MODEL,
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "tools": [tool],
        "system": [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Use tools.", "cache_control": CACHED | {"ttl": "1h", "scope": "global"}},
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": CACHED}]}],
        "metadata": {"user_id": "user_1_session_2"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    headers = {"anthropic_version": "2023-06-01", "anthropic_beta": "interleaved-thinking-2025-05-14"}
    async with front(say(THOUGHT + CALL)) as service:
        told = typed_events(await service.post(f"{PATH}?beta=true", body, **headers))
        counted = {name: body[name] for name in body if name not in ("max_tokens", "stream", "temperature", "metadata")}
        count = await service.post(f"{COUNT}?beta=true", counted, **headers)
    assert [block["type"] for block in put_together(told)] == ["thinking", "tool_use"]
    assert count.json() == {"input_tokens": 3}


async def test_counting_has_the_beginning_of_a_demanded_call() -> None:
    async with front(say()) as service:
        choice = {"type": "any"}
        answer = await service.post(
            COUNT, {"model": MODEL, "messages": HI, "tools": [TOOL], "tool_choice": choice, "system": "Be kind."}
        )
        assert service.asked()["text_input"] == "<bos>text<|tool_call>call:f{"
    assert answer.json() == {"input_tokens": 3}


# ---------------------------------------------------------------- whole answers


async def test_an_answer_has_its_blocks_and_counts() -> None:
    async with front(say(THOUGHT + "Hello the", "re" + CALL)) as service:
        answer = (await service.post(PATH, ASK | {"tools": [TOOL]})).json()
    assert without_ids(answer["content"]) == [
        {"type": "thinking", "thinking": "hm hm"},
        {"type": "text", "text": "Hello there"},
        {"type": "tool_use", "name": "f", "input": {"a": "x"}},
    ]
    assert answer["content"][0]["signature"]
    assert answer["content"][2]["id"].startswith("toolu_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
    assert answer["usage"] == {
        "input_tokens": 20,
        "cache_read_input_tokens": 10,
        "cache_creation_input_tokens": 0,
        "output_tokens": 25,
        "denoising_steps": 7,
    }


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"stop_reason": 106}, "end_turn", None),
        ({"stop_reason": "END"}, "stop_sequence", "END"),
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"finish_reason": "deadline"}, "max_tokens", None),
    ],
)
async def test_why_an_answer_ended(end: dict[str, Any], reason: str, sequence: str | None) -> None:
    async with front(say("Hello", **end)) as service:
        answer = (await service.post(PATH, ASK | {"stop_sequences": ["END"]})).json()
        told = await streamed(service, stop_sequences=["END"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert told[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


async def test_a_cut_call_is_told_as_far_as_it_goes() -> None:
    async with front(say('<|tool_call>call:f{b:1,a:<|"|>x', finish_reason="length")) as service:
        answer = (await service.post(PATH, ASK | {"tools": [TOOL]})).json()
    assert (answer["stop_reason"], answer["content"][0]["input"]) == ("max_tokens", {"b": 1})


async def test_an_empty_answer_has_a_block() -> None:
    async with front(say("")) as service:
        answer = (await service.post(PATH, ASK)).json()
        told = await streamed(service)
    assert answer["content"] == put_together(told) == [{"type": "text", "text": ""}]


@pytest.mark.parametrize("stream", [True, False])
async def test_thinking_that_is_not_wanted_is_not_sent(stream: bool) -> None:
    async with front(say(THOUGHT + "Hello")) as service:
        thinking = {"type": "adaptive", "display": "omitted"}
        answer = await service.post(PATH, ASK | {"thinking": thinking, "stream": stream})
    blocks = put_together(typed_events(answer)) if stream else answer.json()["content"]
    assert blocks == [{"type": "text", "text": "Hello"}]
    assert "hm" not in answer.text


# ---------------------------------------------------------------- streams


async def test_the_events_of_an_answer_in_order() -> None:
    async with front(say(THOUGHT + "Hello the", "re" + CALL)) as service:
        told = await streamed(service, tools=[TOOL])
        whole = (await service.post(PATH, ASK | {"tools": [TOOL]})).json()
    kinds = [event["type"].removeprefix("content_block_") for event in told]
    assert kinds == [
        *("message_start", "ping"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        *("message_delta", "message_stop"),
    ]
    assert [event["index"] for event in told[2:-2]] == [0] * 4 + [1] * 4 + [2] * 3
    assert without_ids(put_together(told)) == without_ids(whole["content"])
    assert put_together(told)[0]["signature"] == whole["content"][0]["signature"]
    begun = told[0]["message"]
    assert (begun["content"], begun["stop_reason"]) == ([], None)
    assert (begun["usage"]["input_tokens"], begun["usage"]["output_tokens"]) == (3, 0)
    assert told[-2]["usage"] == whole["usage"]


async def test_a_stream_asks_with_the_tokens_it_counted() -> None:
    async with front(say("Hello")) as service:
        await streamed(service, seed=5)
        counted, asked = service.asked(0), service.asked(1)
    assert (counted["max_tokens"], json.loads(counted["messages"])["messages"]) == (0, HI)
    assert (asked["input_ids"], asked["seed"], asked["max_tokens"]) == ((2, 5, 6), 5, 50)


async def test_calls_and_thoughts_in_turns_are_blocks_of_their_own() -> None:
    texts = [THOUGHT[:9], THOUGHT[9:] + "One." + CALL[:20], CALL[20:] + CALL + "Two." + THOUGHT, "Three."]
    async with front(say(*texts)) as service:
        told = await streamed(service, tools=[TOOL])
        whole = (await service.post(PATH, ASK | {"tools": [TOOL]})).json()
    assert without_ids(put_together(told)) == without_ids(whole["content"])
    kinds = [block["type"] for block in whole["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use", "text", "thinking", "text"]
    shown = "".join(block.get("text", "") for block in whole["content"])
    assert "<" not in shown
    assert "hm" not in shown


async def test_previews_come_with_pings() -> None:
    async with front(say("Hello")) as service:
        told = await streamed(service, diffusing=True)
    shown = [event["diffusing"] for event in told if event["type"] == "ping" and "diffusing" in event]
    assert shown == [
        {"index": 0, "prefilled_tokens": 8, "prompt_tokens": 30},
        {"index": 0, "canvas_index": 0, "step": 1, "text": "Hel"},
    ]
    assert put_together(told) == [{"type": "text", "text": "Hello"}]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ServerError("out of luck"), 500, "api_error"),
        (Overloaded("too many"), 503, "overloaded_error"),
        (InvalidRequest("input_ids: too long"), 400, "invalid_request_error"),
    ],
)
async def test_a_failure_before_the_first_event_is_a_status(error: Exception, status: int, kind: str) -> None:
    def failing(request: InferRequest) -> Iterator[Any]:
        if request.inputs["max_tokens"] == (0,):
            yield delta("a", [2])
            yield final()
            return
        yield error

    async with front(failing) as service:
        answer = await service.post(PATH, ASK | {"stream": True})
    assert answer.status_code == status
    message = answer.json()["error"].pop("message")
    assert answer.json() == {"type": "error", "error": {"type": kind, "message": message}}
    assert not message.startswith("input_ids")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_generation(stream: bool) -> None:
    def slow(request: InferRequest) -> Iterator[Any]:
        yield delta("Hello", [2])
        if request.inputs["max_tokens"] == (0,):
            yield final()
            return
        yield 60.0

    async with front(slow) as service, service.call(PATH, ASK | {"stream": stream}) as call:
        if stream:
            await call.until(b"Hello")
        else:
            await until(lambda: bool(service.triton.requests))
        call.leave()
        await until(lambda: bool(service.triton.cancelled))
