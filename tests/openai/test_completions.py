"""/v1/completions: prompts of all forms, echo, counts, streams, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.openai.conftest import GO_ON, events, front, in_turns, metric, until

from dgemma_client.errors import InvalidRequest, ServerError
from dgemma_client.mock import delta, final, prefill, preview, reply
from dgemma_client.requests import InferRequest
from dgemma_openai.schemas.completions import Completion, CompletionChunk

pytestmark = pytest.mark.asyncio
PATH = "/v1/completions"


def named(request: InferRequest) -> Iterator[Any]:
    """Answers with its own prompt between brackets; to a request for tokens, with the prompt itself."""
    asked = request.inputs
    prompt = asked["text_input"][0] if "text_input" in asked else "ids " + " ".join(map(str, asked["input_ids"]))
    if asked.get("max_tokens") == (0,):
        yield delta(str(prompt), (1, 2, 3))
    else:
        yield delta(f"[{prompt}]")
    yield final(input_tokens=len(str(prompt)), output_tokens=2, steps=3, prefix_tokens=1)


async def test_an_answer_has_everything_that_openai_s_has() -> None:
    async with front(named) as api:
        answer = (await api.complete(max_tokens=5, stop=["a", "b"], skip_special_tokens=False)).json()
        asked = api.asked()
    Completion.model_validate(answer)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "[Once]", "finish_reason": "stop", "stop_reason": None, "logprobs": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        "denoising_steps": 3,
    }
    assert (asked["max_tokens"], asked["stop_words"], asked["skip_special_tokens"]) == (5, ("a", "b"), False)


@pytest.mark.parametrize(
    ("prompt", "texts", "prompt_tokens"),
    [
        ("ab", ["[ab]"], 2),
        (["a", "bcd"], ["[a]", "[bcd]"], 4),
        ([7, 8], ["[ids 7 8]"], 7),
        ([[7], [8, 9]], ["[ids 7]", "[ids 8 9]"], 12),
    ],
)
async def test_a_prompt_may_be_text_or_ids_or_several(prompt: Any, texts: list[str], prompt_tokens: int) -> None:
    async with front(named) as api:
        answer = (await api.complete(prompt=prompt)).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["prompt_tokens"] == prompt_tokens


async def test_each_prompt_has_n_answers_in_order_and_counts_once() -> None:
    async with front(named) as api:
        answer = (await api.complete(prompt=["a", "bcd"], n=3, seed=10)).json()
        seeds = [api.asked(index)["seed"] for index in range(6)]
    assert [choice["text"] for choice in answer["choices"]] == ["[a]"] * 3 + ["[bcd]"] * 3
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 12
    assert sorted(seeds) == [10, 10, 11, 11, 12, 12], "a prompt's answer does not depend on the prompts beside it"


@pytest.mark.parametrize("prompt", ["Once", [7, 8], [[7, 8]]])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_goes_in_front(prompt: Any, stream: bool) -> None:
    async with front(named) as api:
        answer = await api.complete(prompt=prompt, echo=True, n=2, stream=stream)
    text = prompt if isinstance(prompt, str) else "ids 7 8"
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(answer)[:-1]]
        found = ["".join(chunk["text"] for chunk in chunks if chunk["index"] == index) for index in (0, 1)]
    else:
        found = [choice["text"] for choice in answer.json()["choices"]]
    assert found == [f"{text}[{text}]"] * 2


async def test_a_stream_has_text_end_counts_and_done() -> None:
    async with front(in_turns([delta("a"), delta(""), delta("b"), final("deadline", output_tokens=2)])) as api:
        *chunks, done = events(await api.complete(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    for chunk in chunks:
        CompletionChunk.model_validate(chunk)
    ends = [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]]
    assert ends == [("a", None), ("b", None), ("", "length")]
    assert chunks[-2]["choices"][0]["stop_reason"] == "deadline"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 2)


async def test_previews_are_a_field_of_their_own() -> None:
    turns: list[Any] = [prefill(1, 9), preview("Twi", 0, 2), delta("Twice"), final()]
    async with front(in_turns(turns)) as api:
        chunks = events(await api.complete(stream=True, diffusing=True))[:-1]
    for chunk in chunks:
        CompletionChunk.model_validate(chunk)
    assert [chunk["diffusing"] for chunk in chunks if "diffusing" in chunk] == [
        {"index": 0, "prefilled_tokens": 1, "prompt_tokens": 9},
        {"index": 0, "canvas_index": 0, "step": 2, "text": "Twi"},
    ]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Twice"


async def test_a_failure_after_the_first_event_is_an_event_and_no_done_follows() -> None:
    async with front(in_turns([delta("a"), ServerError("the engine failed")])) as api:
        answer = await api.complete(stream=True)
        page = (await api.get("/metrics")).text
    assert answer.status_code == 200
    assert events(answer)[-1]["error"]["code"] == "engine_error"
    assert metric(page, "dgemma_openai_stream_failures_total", code="engine_error") == 1


@pytest.mark.parametrize("changes", [{}, {"stream": True}, {"echo": True, "prompt": [1]}])
async def test_a_refusal_of_the_server_names_the_prompt(changes: dict[str, Any]) -> None:
    def refuse(request: InferRequest) -> Iterator[Any]:
        yield InvalidRequest(f"{'input_ids' if 'input_ids' in request.inputs else 'text_input'}: is too long")

    async with front(refuse) as api:
        assert await api.refusal(PATH, GO_ON | changes) == (400, "prompt", None, "prompt: is too long")


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt[0]", None),
        ({"prompt": ["a", 1]}, "prompt[1]", None),
        ({"prompt": [-1]}, "prompt[0]", None),
        ({"prompt": {"a": 1}}, "prompt", None),
        ({"prompt": None}, "prompt", None),
        ({"prompt": ["a"] * 4, "n": 5}, "n", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"suffix": 1}, "suffix", None),
        ({"template": []}, "template", None),
        ({"template": ["a", 0]}, "template[1]", None),
        ({"template": ["", 1]}, "template[0]", None),
        ({"template": [True]}, "template[0]", None),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"logprobs": 1}, "logprobs", "unsupported_parameter"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        ({"use_beam_search": True}, "use_beam_search", "unsupported_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"stream_options": {}}, "stream_options", None),
        ({"diffusing": True}, "diffusing", None),
    ],
    ids=str,
)
async def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], param: str, code: str | None) -> None:
    async with front(reply("x")) as api:
        found = await api.refusal(PATH, GO_ON | changes)
        assert api.triton.requests == []
    assert found[:3] == (400, param, code)


@pytest.mark.parametrize(
    "changes",
    [{"suffix": ""}, {"suffix": None}, {"best_of": 1}, {"logprobs": None}, {"prompt_logprobs": 0}, {"echo": False}],
    ids=str,
)
async def test_a_value_that_asks_for_nothing_is_taken(changes: dict[str, Any]) -> None:
    async with front() as api:
        assert (await api.complete(**changes)).status_code == 200


def forever(request: InferRequest) -> Iterator[Any]:
    yield delta("begun ")
    yield 60.0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_generations(stream: bool) -> None:
    async with front(forever) as api:
        async with api.call(PATH, GO_ON | {"stream": stream, "prompt": ["a", "b"]}) as call:
            await until(lambda: len(api.triton.requests) == 2)
            call.leave()
            await call.end()
        assert len(api.triton.cancelled) == 2
        page = (await api.get("/metrics")).text
    assert metric(page, "dgemma_openai_requests_total", endpoint=PATH, status="499") == 1


async def test_the_other_answers_end_where_one_fails() -> None:
    turns: list[list[Any]] = [[delta("a"), 60.0], [0.05, ServerError("broken")]]
    async with front(in_turns(*turns)) as api:
        assert (await api.complete(n=2)).status_code == 500
        await until(lambda: len(api.triton.cancelled) == 1)
