"""Prompts that are only tokenized, special tokens in texts, how messages are rendered, and what ended an answer."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_client import Client, Result, Tokens
from dgemma_runtime.testing import EOS, tiny_codec

if TYPE_CHECKING:
    from tests.server.conftest import Answer, Caller

    from dgemma_runtime.server import RunningServer

CODEC = tiny_codec()
MARKED = "one <|turn>two<turn|> three"
PLAIN = "one two three"
ECHO = {"max_tokens": 0, "exclude_input_in_output": False}


def ids(text: str) -> list[int]:
    return [int(token) for token in CODEC.encode(text)]


def chat(content: str, **keys: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": content}], **keys})


def statistics(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.last["statistics"])
    return found


# ---------------------------------------------------------------- no tokens asked for


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ({"text_input": "a <|turn>b €"}, "a <|turn>b €"),
        ({"messages": chat("a <|turn>b €")}, "a <|turn>b €"),
        ({"input_ids": ids("a <|turn>b €")}, "a b €"),
        ({"input_ids": ids("a <|turn>b €"), "skip_special_tokens": False}, "<bos>a <|turn>b €"),
    ],
    ids=["text", "chat", "ids", "ids with special tokens"],
)
def test_a_prompt_is_tokenized(caller: Caller, prompt: dict[str, Any], text: str, stream: bool) -> None:
    answer = caller.infer(**prompt, **ECHO, stream=stream)
    assert (answer.error, len(answer.responses), answer.last_flags) == (None, 1, 1)
    assert (answer.text, answer.output_ids) == (text, ids("a <|turn>b €"))
    last = answer.last
    assert last["finish_reason"] == "length"
    assert (last["num_input_tokens"], last["num_output_tokens"]) == ([len(answer.output_ids)], [0])
    counted = caller.infer(**prompt, max_tokens=0, stream=stream)
    assert (counted.text, counted.output_ids, len(counted.responses)) == ("", [], 1)
    assert counted.last["num_input_tokens"] == last["num_input_tokens"]
    figures = statistics(answer)
    assert (figures["denoising_steps"], figures["queue_ms"], figures["stop_reason"]) == (0, 0, None)


def test_over_http(caller: Caller) -> None:
    status, text = caller.post("generate", {"text_input": "a b", **ECHO})
    body = json.loads(text)
    assert (status, body["text_output"], body["output_ids"]) == (200, "a b", ids("a b"))
    (event,) = caller.events({"text_input": "a b", "max_tokens": 0, "stream": True})
    assert (event["text_output"], event["num_input_tokens"], event["finish_reason"]) == ("", 4, "length")
    status, text = caller.post("generate", {"input_ids": ids("a <turn|>b"), "skip_special_tokens": False, **ECHO})
    assert (status, json.loads(text)["text_output"]) == (200, "<bos>a <turn|>b")


@pytest.mark.parametrize("name", ["text_input", "input_ids", "messages"])
def test_a_prompt_longer_than_the_context_is_only_counted(caller: Caller, name: str) -> None:
    text = "abc " * 5000
    prompt = {"text_input": text, "input_ids": ids(text), "messages": chat(text)}[name]
    answer = caller.infer(**{name: prompt}, **ECHO)
    assert (answer.error, answer.text, len(answer.output_ids)) == (None, text, 20_001)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text_input": ""}, "text_input: is empty"),
        ({"input_ids": []}, "input_ids: is empty"),
        ({"input_ids": [5, 364]}, "input_ids: token ids must be from 0 to 363, got 364"),
        ({"input_ids": [-1]}, "input_ids: token ids must be from 0 to 363, got -1"),
        ({"messages": chat("\ud800")}, "messages: is not valid Unicode"),
        ({"text_input": "a", "skip_special_tokens": np.array([1], np.int32)}, "skip_special_tokens.*INT32.*BOOL"),
        ({"text_input": "a", "sampling_parameters": '{"skip_special_tokens": 0}'}, "skip_special_tokens: must be true"),
    ],
)
@pytest.mark.parametrize("echo", [False, True])
def test_bad_prompts_are_refused_all_the_same(caller: Caller, prompt: Any, message: str, echo: bool) -> None:
    answer = caller.infer(**prompt, max_tokens=0, exclude_input_in_output=not echo)
    assert not answer.responses
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer.error)


def test_nobody_waits_behind_running_requests(caller: Caller) -> None:
    busy = [threading.Thread(target=_forever, args=(caller,)) for _ in range(12)]  # more than run at once
    for thread in busy:
        thread.start()
    with caller.stream(text_input="forever", deadline_ms=1500, stream=True) as last:
        for _ in range(20):
            assert caller.infer(text_input="abc", max_tokens=0).last["num_input_tokens"] == [4]
        assert last.finish().last["finish_reason"] == "deadline", "it was still under way"
    for thread in busy:
        thread.join()


def _forever(caller: Caller) -> None:
    assert caller.infer(text_input="forever", deadline_ms=1500).last["finish_reason"] == "deadline"


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize("stream", [False, True])
def test_markers_stay_in_the_text_on_request(caller: Caller, stream: bool) -> None:
    for options in (
        {"skip_special_tokens": False},
        {"sampling_parameters": '{"skip_special_tokens": false}'},
        {"parameters": {"skip_special_tokens": False}},
    ):
        answer = caller.infer(text_input="marked", stream=stream, **options)
        assert (answer.text, answer.last["finish_reason"]) == (MARKED, "stop")
        assert answer.output_ids[-1] == EOS
    assert caller.infer(text_input="marked", stream=stream).text == PLAIN


def test_markers_in_previews_and_over_http(caller: Caller) -> None:
    kept = caller.infer(text_input="marked", stream=True, stream_previews=True, skip_special_tokens=False)
    assert any("<|turn>two" in response.get("preview_output", "") for response in kept.responses)
    status, text = caller.post("generate", {"text_input": "marked", "skip_special_tokens": False})
    assert (status, json.loads(text)["text_output"]) == (200, MARKED)
    events = caller.events({"text_input": "marked", "skip_special_tokens": False, "stream": True})
    assert "".join(event["text_output"] for event in events) == MARKED


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_ids_in_front_of_the_output(caller: Caller, stream: bool) -> None:
    request = {"input_ids": ids("short"), "exclude_input_in_output": False, "stream": stream}
    answer = caller.infer(**request)
    assert (answer.text, answer.output_ids) == ("shorta reply", [*ids("short"), *ids("a reply")[1:], EOS])
    assert caller.infer(**request, skip_special_tokens=False).text == "<bos>shorta reply"


def test_a_prompt_is_echoed_where_the_deadline_came_before_the_first_canvas(caller: Caller) -> None:
    answer = caller.infer(text_input="long", stream=True, exclude_input_in_output=False, deadline_ms=1)
    assert answer.last["finish_reason"] == "deadline"
    assert answer.text.startswith("long")


# ---------------------------------------------------------------- what ended it


@pytest.mark.parametrize("stream", [False, True])
def test_what_ended_an_answer(caller: Caller, stream: bool) -> None:
    for options, reason in (
        ({}, EOS),
        ({"stop_words": ["two"]}, "two"),
        ({"stop_words": ["<turn|>"]}, "<turn|>"),
        ({"end_id": ids("w")[1]}, ids("w")[1]),
        ({"max_tokens": 3}, None),
    ):
        answer = caller.infer(text_input="marked", stream=stream, **options)
        assert answer.last["finish_reason"] == ("length" if reason is None else "stop")
        assert statistics(answer)["stop_reason"] == reason


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "hi"),
        ({"add_generation_prompt": False}, "hi (no answer wanted)"),
        ({"continue_final_message": True}, "hi"),
        ({"chat_template_kwargs": {"ending": " bye"}}, "hi bye"),
        ({"chat_template_kwargs": {"ending": " bye", "enable_thinking": True}}, "hi bye"),
        ({"chat_template_kwargs": {"ending": " bye"}, "continue_final_message": True}, "hi"),
    ],
)
def test_how_messages_are_rendered(caller: Caller, keys: dict[str, Any], text: str) -> None:
    assert caller.infer(messages=chat("hi", **keys), **ECHO).text == text
    status, body = caller.post("generate", {"messages": chat("hi", **keys), **ECHO})
    assert (status, json.loads(body)["text_output"]) == (200, text)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
        ({"add_generation_prompt": 1}, '"add_generation_prompt" must be true or false, got 1'),
        ({"chat_template_kwargs": {"messages": []}}, '"messages" in chat_template_kwargs has a place of its own'),
        ({"chat_template_kwargs": {"bos_token": ""}}, '"bos_token" in chat_template_kwargs is the tokenizer'),
        ({"style": 1}, "unknown key 'style'"),
    ],
)
def test_what_cannot_be_rendered_is_refused(caller: Caller, keys: dict[str, Any], message: str) -> None:
    answer = caller.infer(messages=chat("hi", **keys))
    assert answer.error is not None
    assert answer.error.startswith("messages: ")
    assert message in answer.error


# ---------------------------------------------------------------- the client


@pytest.mark.asyncio
async def test_the_client_s_ways(server: RunningServer) -> None:
    async with Client(server.grpc_url) as client:
        assert await client.tokenize("a b") == Tokens(tuple(ids("a b")), "a b")
        assert (await client.tokenize(input_ids=ids("a<turn|>"), skip_special_tokens=False)).text == "<bos>a<turn|>"
        rendered = await client.tokenize(
            messages=[{"role": "user", "content": "hi"}], chat={"chat_template_kwargs": {"ending": "!"}}
        )
        assert rendered == Tokens(tuple(ids("hi!")), "hi!")
        kept = await client.generate("marked", skip_special_tokens=False)
        stopped = await client.generate("marked", stop_words="two")
    assert isinstance(kept, Result)
    assert (kept.text, kept.stop_reason) == (MARKED, EOS)
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("one ", "stop", "two")
