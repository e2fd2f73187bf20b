"""/v1/chat/completions: what reaches the server, what comes back, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.openai.conftest import SAY, events, front, in_turns

from dgemma_client.errors import ConnectError, InvalidRequest, Overloaded, ServerError
from dgemma_client.mock import delta, final
from dgemma_openai.schemas.chat import ChatCompletion

pytestmark = pytest.mark.asyncio
PATH = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<|tool_call>call:weather{city:<|"|>Lima<|"|>}<tool_call|>'


async def test_an_answer_has_everything_that_openai_s_has() -> None:
    async with front(in_turns([delta("Hel"), delta("lo"), final(input_tokens=3, output_tokens=5, steps=2)])) as api:
        answer = (await api.chat()).json()
    ChatCompletion.model_validate(answer)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "diffusion_gemma"
    assert answer["system_fingerprint"].startswith("fp_")
    message = {"role": "assistant", "content": "Hello", "reasoning_content": None, "tool_calls": None, "refusal": None}
    assert answer["choices"] == [
        {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": None, "logprobs": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        "denoising_steps": 2,
    }


async def test_parameters_reach_the_server_under_its_names() -> None:
    given = {
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "stop": "x",
        "priority": -1,
        "deadline_ms": 100,
        "cache_salt": "s",
        "max_denoising_steps": 4,
        "entropy_bound": 0.2,
        "t_min": 0.3,
        "t_max": 0.9,
        "stability_threshold": 2,
        "confidence_threshold": 0.01,
        "ignore_eos": True,
    }
    async with front() as api:
        assert (await api.chat(**given)).status_code == 200
        asked = dict(api.asked())
    chat = json.loads(asked.pop("messages"))
    assert chat == {"messages": [{"role": "user", "content": "hi"}]}
    told = {name: value for name, value in asked.items() if not name.startswith(("return_", "stream"))}
    assert told == {
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "stop_words": "x",
        "priority": -1,
        "deadline_ms": 100,
        "cache_salt": "s",
        "max_denoising_steps": 4,
        "entropy_bound": 0.2,
        "t_min": 0.3,
        "t_max": 0.9,
        "stability_threshold": 2,
        "confidence_threshold": 0.01,
        "end_id": -1,
        "skip_special_tokens": True,
    }


async def test_what_is_left_out_is_the_server_s_to_choose() -> None:
    async with front() as api:
        await api.chat()
        asked = set(api.asked())
    assert asked & {"max_tokens", "temperature", "seed", "stop_words", "end_id"} == set()


NEUTRAL: list[dict[str, Any]] = [
    {"top_p": 1},
    {"top_p": 1.0},
    {"top_k": 0},
    {"top_k": -1},
    {"min_p": 0},
    {"min_tokens": 0},
    {"repetition_penalty": 1.0},
    {"presence_penalty": 0},
    {"frequency_penalty": 0.0},
    {"logit_bias": {}},
    {"logprobs": False},
    {"top_logprobs": 0},
    {"store": False},
    {"functions": []},
    {"response_format": {"type": "text"}},
    {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y"},
    {"verbosity": "medium", "modalities": ["text"]},
    dict.fromkeys(("top_p", "top_k", "logit_bias", "stop", "n", "stream", "tools", "seed", "temperature")),
]
NOT_SUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 0.9}, "top_p"),
    ({"top_k": 1}, "top_k"),
    ({"top_k": "1"}, "top_k"),
    ({"min_p": 0.1}, "min_p"),
    ({"min_tokens": 1}, "min_tokens"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"store": True}, "store"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=str)
async def test_a_value_that_asks_for_nothing_is_taken_and_goes_no_further(changes: dict[str, Any]) -> None:
    async with front() as api:
        answer = await api.chat(**changes)
        assert answer.status_code == 200, answer.text
        assert not set(changes) & set(api.asked()) - {"stream"}


@pytest.mark.parametrize(("changes", "param"), NOT_SUPPORTED, ids=str)
async def test_a_value_that_asks_for_something_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    async with front() as api:
        status, found, code, message = await api.refusal(PATH, SAY | changes)
        assert api.triton.requests == []
    assert (status, found, code) == (400, param, "unsupported_parameter")
    assert message.startswith(f"{param}: is not supported; leave it out or send ")


REFUSED: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"foo": 1}, 400, "foo", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": "a", "foo": 1}]}, 400, "messages[0].foo", "unknown_parameter"),
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"model": None}, 400, "model", None),
    ({"messages": []}, 400, "messages", None),
    ({"messages": "hi"}, 400, "messages", None),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0]", None),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", None),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"n": 0}, 400, "n", None),
    ({"n": 17}, 400, "n", None),
    ({"n": 10**30}, 400, "n", None),
    ({"temperature": "1"}, 400, "temperature", None),
    ({"temperature": -0.1}, 400, "temperature", None),
    ({"seed": 2**64}, 400, "seed", None),
    ({"seed": 1.5}, 400, "seed", None),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_completion_tokens": 2**31}, 400, "max_completion_tokens", None),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", None),
    ({"stop": 5}, 400, "stop", None),
    ({"priority": 1001}, 400, "priority", None),
    ({"deadline_ms": 0}, 400, "deadline_ms", None),
    ({"cache_salt": "x" * 257}, 400, "cache_salt", None),
    ({"stream": "yes"}, 400, "stream", None),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ({"diffusing": True}, 400, "diffusing", None),
    ({"tool_choice": "required"}, 400, "tool_choice", None),
    (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]},
        400,
        "tool_choice.function.name",
        None,
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function.name", None),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort", None),
    (
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
        400,
        "reasoning_effort",
        None,
    ),
    (
        {"chat_template_kwargs": {"enable_thinking": "yes"}},
        400,
        "chat_template_kwargs.enable_thinking",
        None,
    ),
]


@pytest.mark.parametrize(("changes", "status", "param", "code"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_honoured_is_refused(
    changes: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    async with front() as api:
        found = await api.refusal(PATH, SAY | changes)
        assert api.triton.requests == []
    assert found[:3] == (status, param, code)


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (InvalidRequest("stop_words: at most 64, got 65"), 400, "stop", None),
        (InvalidRequest("text_input: 9 tokens, the maximum context length is 8"), 400, "messages", None),
        (Overloaded("the queue is full; try again in 4 s"), 503, None, "overloaded"),
        (ConnectError("nobody"), 503, None, "overloaded"),
        (ServerError("the engine failed"), 500, None, "engine_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_server_s_refusal_is_a_status(
    error: Any, status: int, param: str | None, code: str | None, stream: bool
) -> None:
    async with front(in_turns([error])) as api:
        answer = await api.chat(stream=stream)
    found = answer.json()["error"]
    expected = "context_length_exceeded" if "maximum context" in str(error) else code
    assert (answer.status_code, found["param"], found["code"]) == (status, param, expected)
    assert answer.headers.get("retry-after") == (
        {"the": "4", "nobody": "1"}.get(str(error).split()[0]) if status == 503 else None
    )


async def test_a_limit_has_the_name_under_which_it_was_given() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        async with front(in_turns([InvalidRequest("max_tokens: 9 is too many")])) as api:
            assert (await api.refusal(PATH, SAY | {name: 9}))[1] == name


async def test_several_answers_have_seeds_that_count_up_and_one_prompt_in_the_counts() -> None:
    turns = [[delta(f"answer {n}"), final(input_tokens=3, output_tokens=n, steps=1)] for n in (1, 2, 3)]
    async with front(in_turns(*turns)) as api:
        answer = (await api.chat(n=3, seed=2**64 - 1)).json()
        seeds = [api.asked(index)["seed"] for index in range(3)]
        names = [request.request_id for request in api.triton.requests]
    assert sorted(choice["message"]["content"] for choice in answer["choices"]) == ["answer 1", "answer 2", "answer 3"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert sorted(seeds) == [0, 1, 2**64 - 1]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 6
    assert sorted(names) == [f"{answer['id']}-{index}" for index in range(3)]


async def test_a_negative_seed_is_a_number_of_64_bits() -> None:
    async with front() as api:
        await api.chat(seed=-1)
        assert api.asked()["seed"] == 2**64 - 1


@pytest.mark.parametrize(
    ("end", "finish_reason", "stop_reason"),
    [
        (final("stop"), "stop", None),
        (final("stop", stop_reason="END"), "stop", "END"),
        (final("stop", stop_reason=106), "stop", None),
        (final("length"), "length", None),
        (final("deadline"), "length", "deadline"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_why_an_answer_ended(end: Any, finish_reason: str, stop_reason: Any, stream: bool) -> None:
    async with front(in_turns([delta("a"), end])) as api:
        answer = await api.chat(stream=stream)
    choice = events(answer)[-2]["choices"][0] if stream else answer.json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish_reason, stop_reason)


async def test_thinking_and_calls_are_taken_apart() -> None:
    text = f"<|channel>thought\nhm<channel|>Well. {CALL}"
    async with front(in_turns([delta(text), final()])) as api:
        choice = (await api.chat(tools=[TOOL])).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "hm"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Lima"}


async def test_thinking_is_not_sent_to_who_does_not_want_it() -> None:
    text = "<|channel>thought\nhm<channel|>Well."
    async with front(in_turns([delta(text), final()], [delta(text), final()])) as api:
        message = (await api.chat(include_reasoning=False)).json()["choices"][0]["message"]
        stream = await api.chat(include_reasoning=False, stream=True)
    assert (message["content"], message["reasoning_content"]) == ("Well.", None)
    assert "hm" not in stream.text


async def test_an_answer_can_be_sent_back_with_what_clients_add_to_it() -> None:
    added = {
        "id": "msg_1",
        "provider_specific_fields": {"refusal": None},
        "reasoning_details": [{}],
        "thinking_blocks": [],
    }
    past = {"role": "assistant", "content": "Hello", "reasoning": "hm", **added}
    async with front() as api:
        assert (await api.chat(messages=[*SAY["messages"], past, *SAY["messages"]])).status_code == 200
        sent = json.loads(api.asked()["messages"])
    sent = sent["messages"]
    assert sent[1] == {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}
