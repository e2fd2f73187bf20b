"""What a client knows of the answer: suffix, template, prediction, drafters; and what editors ask for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tests.openai.conftest import MODEL, events, front, in_turns, say

from dgemma_client.errors import InvalidRequest, Overloaded
from dgemma_client.mock import delta, final, preview
from dgemma_client.requests import InferRequest
from dgemma_openai.schemas.editors import EditCompletion, FimChunk, FimCompletion

pytestmark = pytest.mark.asyncio
FIM, EDIT = "/v1/fim/completions", "/v1/edit/completions"
MIDDLE = {"model": MODEL, "prompt": "def f():\n    ", "suffix": "\n    return x"}
CODE = "def greet(name):\n    print(1)"
TAGGED = f"<|current_file_content|>\n<|code_to_edit|>\n{CODE}<|cursor|>\n<|/code_to_edit|>\n<|/current_file_content|>"
REWRITE: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": TAGGED}]}
KEPT = [
    {"drafter": "client", "canvases": 1, "drafted_tokens": 9, "accepted_tokens": 7, "steps_saved": 2.5},
    {"drafter": "lookup", "canvases": 1, "drafted_tokens": 90, "accepted_tokens": 70, "steps_saved": 2.5},
]
NO_PREDICTION = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}


# ---------------------------------------------------------------- completions


async def test_a_suffix_or_a_template_goes_to_the_server() -> None:
    async with front() as api:
        assert (await api.complete(suffix="}\n", prompt=["a", "b"])).status_code == 200
        assert [api.asked(index)["suffix"] for index in (0, 1)] == ["}\n", "}\n"]
        assert (await api.complete(template=["a: ", 3, "\n"])).status_code == 200
        assert json.loads(api.asked()["template"]) == ["a: ", 3, "\n"]
        assert (await api.complete(suffix="", template=None)).status_code == 200
        assert not {"suffix", "template"} & api.asked().keys()


@pytest.mark.parametrize("name", ["suffix", "template", "stop"])
async def test_the_server_s_refusals_keep_their_names(name: str) -> None:
    def refuse(request: InferRequest) -> Iterator[Any]:
        yield InvalidRequest(f"{name}: cannot be together")

    async with front(refuse) as api:
        found = await api.refusal("/v1/completions", {"model": MODEL, "prompt": "a", "template": [3]})
    assert found == (400, name, None, f"{name}: cannot be together")


@pytest.mark.parametrize(
    ("path", "body"), [("completions", {"prompt": "a"}), ("chat/completions", {"messages": REWRITE["messages"]})]
)
async def test_drafters_are_chosen_as_on_the_server(path: str, body: dict[str, Any]) -> None:
    asked = {"drafter": "lookup", "draft_confidence": 0.25, "draft_verification": "halves"}
    async with front() as api:
        assert (await api.post(f"/v1/{path}", {"model": MODEL, **body, **asked})).status_code == 200
        assert {name: api.asked()[name] for name in asked} == asked
        for name, value in (("drafter", "oracle"), ("draft_confidence", 2), ("draft_verification", "thirds")):
            refused = await api.refusal(f"/v1/{path}", {"model": MODEL, **body, name: value})
            assert refused[:2] == (400, name)


# ---------------------------------------------------------------- predicted outputs


@pytest.mark.parametrize("content", ["x = 1\n", [{"type": "text", "text": "x = "}, {"type": "text", "text": "1\n"}]])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prediction_is_a_draft_and_is_counted(content: Any, stream: bool) -> None:
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    async with front(say("x = 2\n", drafts=KEPT)) as api:
        answer = await api.chat(prediction={"type": "content", "content": content}, n=2, **more)
        assert [api.asked(index)["draft_text"] for index in (0, 1)] == ["x = 1\n", "x = 1\n"]
    counts = events(answer)[-2]["usage"] if stream else answer.json()["usage"]
    assert counts["completion_tokens_details"] == {"accepted_prediction_tokens": 14, "rejected_prediction_tokens": 4}


async def test_no_prediction_is_no_draft() -> None:
    async with front(say("x")) as api:
        for prediction in (None, {"type": "content", "content": ""}, {"type": "content", "content": []}):
            answer = await api.chat(prediction=prediction)
            assert answer.json()["usage"]["completion_tokens_details"] == NO_PREDICTION
            assert "draft_text" not in api.asked()


async def test_a_prediction_that_cannot_be_is_refused_by_its_name() -> None:
    def refuse(request: InferRequest) -> Iterator[Any]:
        yield InvalidRequest("draft_text: has 9 tokens, the output may have 5")

    async with front(refuse) as api:
        body = {"model": MODEL, "messages": REWRITE["messages"], "prediction": {"type": "content", "content": "x"}}
        message = "prediction: has 9 tokens, the output may have 5"
        assert await api.refusal("/v1/chat/completions", body) == (400, "prediction", None, message)
        body["prediction"] = {"type": "diff", "content": "x"}
        assert (await api.refusal("/v1/chat/completions", body))[:2] == (400, "prediction.type")


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"reasoning_effort": "low"}, "turn thinking off"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "turn thinking off"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "send auto or none"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "send auto or none"),
    ],
    ids=str,
)
async def test_a_prediction_needs_an_output_that_begins_with_it(beside: dict[str, Any], said: str) -> None:
    body = {"model": MODEL, "messages": REWRITE["messages"], **beside}
    async with front(say("x")) as api:
        found = await api.refusal("/v1/chat/completions", body | {"prediction": {"type": "content", "content": "x"}})
        assert api.triton.requests == []
        nothing = body | {"prediction": {"type": "content", "content": ""}}
        assert (await api.post("/v1/chat/completions", nothing)).status_code == 200
    assert found[:2] == (400, "prediction")
    assert said in found[3]


async def test_a_prediction_goes_with_tools_that_may_be_called() -> None:
    async with front(say("x")) as api:
        more = {"tools": [WEATHER], "tool_choice": "auto", "reasoning_effort": "none"}
        assert (await api.chat(prediction={"type": "content", "content": "x"}, **more)).status_code == 200
        assert api.asked()["draft_text"] == "x"


# ---------------------------------------------------------------- fill in the middle


async def test_what_fits_between_prompt_and_suffix_in_both_forms() -> None:
    async with front(say("x =", " 1", drafts=KEPT)) as api:
        answer = (await api.post(FIM, MIDDLE | {"max_tokens": 9, "random_seed": 3, "stop": ["\n\n"]})).json()
        asked = api.asked()
    FimCompletion.model_validate(answer)
    (choice,) = answer["choices"]
    assert (answer["object"], choice["text"], choice["finish_reason"]) == ("text_completion", "x = 1", "stop")
    assert choice["message"] == {"role": "assistant", "content": "x = 1"}
    assert answer["usage"]["completion_tokens"] == 25
    sent = {"text_input": MIDDLE["prompt"], "suffix": MIDDLE["suffix"], "max_tokens": 9, "seed": 3}
    assert {name: asked[name] for name in sent} == sent
    assert asked["stop_words"] == "\n\n"


async def test_a_stream_has_both_forms_too() -> None:
    turns: list[Any] = [preview("x"), delta("x ="), delta(" 1"), final()]
    async with front(in_turns(turns)) as api:
        answer = await api.post(FIM, MIDDLE | {"stream": True, "diffusing": True})
        *chunks, done = events(answer)
    assert done == "[DONE]"
    for chunk in chunks:
        FimChunk.model_validate(chunk)
        assert chunk["choices"][0]["delta"]["content"] == chunk["choices"][0]["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "x = 1"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert [chunk["diffusing"]["text"] for chunk in chunks if "diffusing" in chunk] == ["x"]


async def test_without_a_suffix_the_text_goes_on() -> None:
    async with front() as api:
        assert (await api.post(FIM, {"model": MODEL, "prompt": "a"})).json()["choices"][0]["text"] == "Hello world"
        assert "suffix" not in api.asked()


async def test_a_suffix_alone_is_what_a_file_ends_with() -> None:
    turns = in_turns([delta("", [2, 5]), final()], [delta("x = 1"), final()])
    async with front(turns) as api:
        answer = await api.post(FIM, MIDDLE | {"prompt": ""})
        assert (api.asked()["input_ids"], api.asked()["suffix"]) == (2, MIDDLE["suffix"])
    assert answer.json()["choices"][0]["text"] == "x = 1"


async def test_a_server_that_cannot_say_how_prompts_begin_is_an_error() -> None:
    def fail(request: InferRequest) -> Iterator[Any]:
        yield Overloaded("the queue is full")

    async with front(fail) as api:
        assert (await api.refusal(FIM, MIDDLE | {"prompt": ""}))[::2] == (503, "overloaded")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "", "model": "other"}, "model"),
        ({"random_seed": 1, "seed": 2}, "random_seed"),
        ({"messages": []}, "messages"),
        ({"stream_options": {}}, "stream_options"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"model": "other"}, "model"),
    ],
    ids=str,
)
async def test_what_fim_cannot_be_asked_is_refused(changes: dict[str, Any], param: str) -> None:
    async with front() as api:
        status, found, _, _ = await api.refusal(FIM, MIDDLE | changes)
        assert api.triton.requests == []
    assert (status, found) == (404 if param == "model" else 400, param)


# ---------------------------------------------------------------- edits


BODY = "def x():\n    pass"


@pytest.mark.parametrize(
    "reply",
    [
        BODY,
        f"```python\n{BODY}\n```\n",
        f"<|code_to_edit|>\n{BODY}\n<|/code_to_edit|>",
        f"```\n<|code_to_edit|>\n{BODY}<|cursor|>\n<|/code_to_edit|>\n```",
        "<|cursor|>def x():\n    pa<|cursor|>ss",
    ],
)
async def test_the_code_to_edit_is_the_draft_of_the_answer(reply: str) -> None:
    async with front(say(reply, drafts=KEPT)) as api:
        answer = (await api.post(EDIT, REWRITE | {"max_tokens": 99, "seed": 4})).json()
        asked = api.asked()
    EditCompletion.model_validate(answer)
    assert answer["object"] == "edit.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "def x():\n    pass"}, "finish_reason": "stop"}
    ]
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 7
    assert (asked["draft_text"], asked["max_tokens"], asked["seed"]) == (CODE, 99, 4)
    task, given = json.loads(asked["messages"])["messages"]
    assert (task["role"], given) == ("system", {"role": "user", "content": TAGGED})


async def test_code_that_is_to_be_written_from_nothing_is_no_draft() -> None:
    content = [{"type": "text", "text": "<|code_to_edit|>"}, {"type": "text", "text": "<|cursor|><|/code_to_edit|>"}]
    async with front(say("x", "y")) as api:
        answer = await api.post(EDIT, {"model": MODEL, "messages": [{"role": "user", "content": content}]})
        assert answer.json()["choices"][0]["message"]["content"] == "xy"
        assert "draft_text" not in api.asked()


FENCES = "```python\nx\n```"
TWO = f"{FENCES}\nand\n{FENCES}"
INNER = "``` md\nsee:\n```sh\nls\n```\n```"


@pytest.mark.parametrize("reply", [TWO, INNER, f"see:\n{FENCES}", "```x``` is code\n```", "```python\nx", "    x\n"])
async def test_a_fence_that_may_be_code_stays(reply: str) -> None:
    async with front(say(reply)) as api:
        assert (await api.post(EDIT, REWRITE)).json()["choices"][0]["message"]["content"] == reply


async def test_a_fence_stays_where_the_code_begins_with_one() -> None:
    messages = [{"role": "user", "content": f"<|code_to_edit|>\n{FENCES}\n<|/code_to_edit|>"}]
    for reason in ("stop", "length"):
        async with front(say(FENCES, finish_reason=reason)) as api:
            answer = await api.post(EDIT, REWRITE | {"messages": messages})
        assert answer.json()["choices"][0]["message"]["content"] == FENCES


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("x", "x"),
        ("```python\n    x =", "    x ="),
        ("```python\nx\n```", "x"),
        ("```python\n<|code_to_edit|>\nx =", "x ="),
        ("<|code_to_edit|>\n    x =", "    x ="),
        (TWO + "\ny", TWO + "\ny"),
    ],
)
async def test_an_edit_that_is_cut_says_so_and_is_code(reply: str, code: str) -> None:
    async with front(say(reply, finish_reason="length")) as api:
        choice = (await api.post(EDIT, REWRITE)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", code)


async def test_an_indentation_behind_a_thought_is_code() -> None:
    async with front(say("<|channel>thought\n<channel|>    return 1\n")) as api:
        assert (await api.post(EDIT, REWRITE)).json()["choices"][0]["message"]["content"] == "    return 1\n"


async def test_only_the_first_region_counts_and_loses_one_line_end_on_each_side() -> None:
    content = "<|/code_to_edit|><|code_to_edit|>\n\n  x\n\n<|/code_to_edit|>\n<|code_to_edit|>y<|/code_to_edit|>"
    async with front(say("x")) as api:
        await api.post(EDIT, REWRITE | {"messages": [{"role": "user", "content": content}]})
        assert api.asked()["draft_text"] == "\n  x\n"


async def test_tags_without_an_end_are_told_at_once() -> None:
    content = "<|code_to_edit|>" * (8 * 2**20 // 16 - 64)
    async with front(max_body_bytes=8 * 2**20) as api:
        began = time.process_time()
        found = await api.refusal(EDIT, REWRITE | {"messages": [{"role": "user", "content": content}]})
        assert time.process_time() - began < 1
    assert found[:2] == (400, "messages[0].content")


@pytest.mark.parametrize("drafter", ["off", "lookup", "model"])
async def test_another_drafter_leaves_the_code_out(drafter: str) -> None:
    async with front(say("x")) as api:
        assert (await api.post(EDIT, REWRITE | {"drafter": drafter})).status_code == 200
        assert api.asked()["drafter"] == drafter
        assert "draft_text" not in api.asked()
        assert (await api.post(EDIT, REWRITE | {"drafter": "auto"})).status_code == 200
        assert api.asked()["draft_text"] == CODE


NOTHING: dict[str, Sequence[Any]] = {
    "stop": [None, []],
    "n": [None, 1],
    "logit_bias": [{}],
    "stream_options": [None],
    "ignore_eos": [False],
    **dict.fromkeys(("min_p", "min_tokens", "presence_penalty", "frequency_penalty"), (None, 0)),
    "repetition_penalty": [1],
}


async def test_what_asks_for_nothing_is_taken() -> None:
    async with front(say("x")) as api:
        for name, values in NOTHING.items():
            for value in values:
                answer = await api.post(EDIT, REWRITE | {name: value})
                assert answer.status_code == 200, answer.text


async def test_both_names_of_the_length() -> None:
    def refuse(request: InferRequest) -> Iterator[Any]:
        yield InvalidRequest("max_tokens: is more than the context leaves")

    async with front(say("x")) as api:
        assert (await api.post(EDIT, REWRITE | {"max_completion_tokens": 7})).status_code == 200
        assert api.asked()["max_tokens"] == 7
        assert (await api.refusal(EDIT, REWRITE | {"max_completion_tokens": 7, "max_tokens": 8}))[1] == "max_tokens"
    async with front(refuse) as api:
        assert (await api.refusal(EDIT, REWRITE | {"max_completion_tokens": 7}))[1] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": REWRITE["messages"] * 2}, "messages"),
        ({"messages": [{"role": "system", "content": TAGGED}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "just words"}]}, "messages[0].content"),
        ({"stream": True}, "stream"),
        ({"stop": "x"}, "stop"),
        ({"stop": ["x"]}, "stop"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"stream_options": {}}, "stream_options"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"prediction": None}, "prediction"),
        ({"model": "other"}, "model"),
    ],
    ids=str,
)
async def test_what_an_edit_cannot_be_asked_is_refused(changes: dict[str, Any], param: str) -> None:
    async with front() as api:
        status, found, _, _ = await api.refusal(EDIT, REWRITE | changes)
        assert api.triton.requests == []
    assert (status, found) == (404 if param == "model" else 400, param)


async def test_a_draft_too_long_for_the_answer_is_the_code_to_edit() -> None:
    def refuse(request: InferRequest) -> Iterator[Any]:
        yield InvalidRequest("draft_text: has 9 tokens, the output may have 5")

    async with front(refuse) as api:
        found = await api.refusal(EDIT, REWRITE)
    message = "messages[0].content: the code to edit has 9 tokens, the output may have 5"
    assert found == (400, "messages[0].content", None, message)
