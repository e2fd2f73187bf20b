"""openai-python, synchronous and asynchronous, as its users call it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionToolParam
from tests.openai.live.conftest import LONG, MAX_MODEL_LEN, NAME, until

from dgemma_build.front_end import running_front_end

if TYPE_CHECKING:
    from tests.openai.live.conftest import Service

    from dgemma_build.front_end import FrontEnd

    StartFrontEnd = Callable[..., AbstractContextManager[FrontEnd]]

HELLO: Any = [{"role": "user", "content": "hello"}]
REPEAT: Any = [{"role": "user", "content": "repeat"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME: ChatCompletionToolParam = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=service.v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest_asyncio.fixture
async def async_client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=service.v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


# ---------------------------------------------------------------- answers


def test_an_answer_with_its_counts(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HELLO)
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == NAME
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 4


def test_a_stream_sends_a_chunk_per_canvas_and_then_the_counts(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "long"}]
    stream = client.chat.completions.create(
        model=NAME, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(texts) == LONG
    assert len(texts) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 16  # more than a canvas


def test_previews_do_not_disturb_the_client(client: OpenAI) -> None:
    stream = client.chat.completions.create(model=NAME, messages=HELLO, stream=True, extra_body={"diffusing": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there!"
    previews = [
        chunk.model_extra["diffusing"] for chunk in chunks if chunk.model_extra and "diffusing" in chunk.model_extra
    ]
    assert previews
    assert {"index", "canvas_index", "step", "text"} <= previews[0].keys()


def test_several_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HELLO, n=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Hello there!"}
    chunks = list(client.chat.completions.create(model=NAME, messages=HELLO, n=2, stream=True))
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello there!", "Hello there!"]


def test_a_seed_repeats_an_answer_and_another_one_does_not(demo: Service) -> None:
    messages: Any = [{"role": "user", "content": "Solve this 4x4 sudoku:\n____\n____\n____\n____"}]
    hasty = {"max_denoising_steps": 1}  # so that the noise still shows
    with OpenAI(base_url=demo.v1, api_key="none", max_retries=0) as client:

        def texts(seed: int, n: int = 1) -> list[str | None]:
            answer = client.chat.completions.create(
                model=demo.model, messages=messages, seed=seed, n=n, max_tokens=48, extra_body=hasty
            )
            return [choice.message.content for choice in answer.choices]

        both = texts(7, n=2)
        assert texts(7) == both[:1]
        assert texts(8) == both[1:]
        assert both[0] != both[1]


def test_the_demo_model_answers(demo: Service) -> None:
    messages: Any = [{"role": "user", "content": "Convert to JSON:\nname: Ada\ncity: Lima"}]
    with OpenAI(base_url=demo.v1, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=demo.model, messages=messages, seed=1)
    assert json.loads(answer.choices[0].message.content or "") == {"name": "Ada", "city": "Lima"}


def test_stop_and_lengths_cut(client: OpenAI) -> None:
    stopped = client.chat.completions.create(model=NAME, messages=HELLO, stop=["there", "never"])
    assert stopped.choices[0].message.content == "Hello "
    assert stopped.choices[0].finish_reason == "stop"
    for limit in ({"max_completion_tokens": 20}, {"max_tokens": 20}):
        cut = client.chat.completions.create(model=NAME, messages=REPEAT, **limit)  # type: ignore[call-overload]
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens == 20


def test_thinking_is_apart(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HELLO, reasoning_effort="high")
    message = answer.choices[0].message
    assert message.content == "Hello, thoughtfully."
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "The user is polite."


def test_text_completions(client: OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="anything", max_tokens=50)
    assert answer.choices[0].text == "What?"
    assert answer.usage is not None
    several = client.completions.create(model=NAME, prompt=["a", "b"], n=2, echo=True)
    assert [choice.text for choice in several.choices] == ["aWhat?", "aWhat?", "bWhat?", "bWhat?"]
    stream = client.completions.create(model=NAME, prompt="anything", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "What?"


def test_models(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [NAME]
    assert models[0].model_extra is not None
    assert models[0].model_extra["max_model_len"] == MAX_MODEL_LEN
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_raw_responses_have_a_request_id(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=HELLO, extra_headers={"X-Request-Id": "my-id-1"}
    )
    assert raw.request_id == "my-id-1"


# ---------------------------------------------------------------- tools


def test_a_call_and_its_result(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "weather"}]
    called = client.chat.completions.create(model=NAME, messages=messages, tools=[WEATHER])
    assert called.choices[0].finish_reason == "tool_calls"
    message = called.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris", "days": 2})
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]  # as the library's objects
    answer = client.chat.completions.create(model=NAME, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It is 21 degrees in Paris."


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_the_streaming_helper_puts_calls_together(client: OpenAI, choice: Any) -> None:
    messages: Any = [{"role": "user", "content": "weather"}]
    with client.chat.completions.stream(model=NAME, messages=messages, tools=[WEATHER], tool_choice=choice) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "Paris", "days": 2}
    assert final.choices[0].finish_reason == "tool_calls"


def test_parallel_calls(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "both"}]
    for allowed, names in ((True, ["get_weather", "get_time"]), (False, ["get_weather"])):
        with client.chat.completions.stream(
            model=NAME, messages=messages, tools=[WEATHER, TIME], parallel_tool_calls=allowed
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.content == "Let me look."
        assert [call.function.name for call in message.tool_calls or []] == names


def test_no_tool_is_called_where_none_is_needed_or_allowed(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].message.content == "No tool is needed for that."
    answer = client.chat.completions.create(model=NAME, messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == "Hello there!"


# ---------------------------------------------------------------- errors


def test_what_is_not_supported_is_refused_by_name(client: OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    refused: list[tuple[str, dict[str, Any]]] = [
        ("top_p", {"top_p": 0.5}),
        ("logprobs", {"logprobs": True}),
        ("presence_penalty", {"presence_penalty": 1.0}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("response_format", {"response_format": schema}),
        ("guided_json", {"extra_body": {"guided_json": {}}}),
    ]
    for name, arguments in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=HELLO, **arguments)
        assert caught.value.param is not None
        assert caught.value.param.startswith(name)
        assert caught.value.type == "invalid_request_error"
        assert name in caught.value.message


def test_a_stream_that_cannot_begin_is_a_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model=NAME, messages=HELLO, stream=True, top_p=0.5)


def test_a_prompt_beyond_the_context(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "word " * MAX_MODEL_LEN}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=messages, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert f"maximum context length is {MAX_MODEL_LEN} tokens" in caught.value.message


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_keys_and_rates(front_end: StartFrontEnd, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8 tester\n")  # of `password`
    options = ("--api-key-hashes", str(keys), "--requests-per-minute", "1")
    with front_end(*options) as front:
        wrong = OpenAI(base_url=f"{front.url}/v1", api_key="wrong", max_retries=0)
        right = wrong.with_options(api_key="password")
        with wrong, right:
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
            assert right.models.list().data
            with pytest.raises(openai.RateLimitError) as caught:
                right.models.list()
            assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60


def test_a_server_that_is_gone_is_worth_a_retry() -> None:
    with (
        running_front_end("127.0.0.1:9") as front,
        OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model="diffusion_gemma", messages=HELLO)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"]


# ---------------------------------------------------------------- leaving


def test_a_timeout_ends_the_generation(client: OpenAI, service: Service) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model=NAME, messages=REPEAT)
    until(lambda: service.live_requests() == 0)
    until(lambda: service.running() == 0)


def test_closing_a_stream_ends_the_generation(client: OpenAI, service: Service) -> None:
    stream = client.chat.completions.create(model=NAME, messages=REPEAT, stream=True)
    next(iter(stream))
    assert service.live_requests() == 1
    stream.close()
    until(lambda: service.live_requests() == 0)
    until(lambda: service.running() == 0)


# ---------------------------------------------------------------- asynchronous


@pytest.mark.asyncio
async def test_many_at_once(async_client: AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(async_client.chat.completions.create(model=NAME, messages=HELLO) for _ in range(8))
    )
    assert {answer.choices[0].message.content for answer in answers} == {"Hello there!"}


@pytest.mark.asyncio
async def test_asynchronous_streams(async_client: AsyncOpenAI) -> None:
    async with async_client.chat.completions.stream(model=NAME, messages=HELLO) as stream:
        texts = [event.delta async for event in stream if event.type == "content.delta"]
    assert "".join(texts) == "Hello there!"


@pytest.mark.asyncio
async def test_a_cancelled_task_ends_the_generation(async_client: AsyncOpenAI, service: Service) -> None:
    task = asyncio.create_task(async_client.chat.completions.create(model=NAME, messages=REPEAT))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: service.live_requests() == 0)
    await asyncio.to_thread(until, lambda: service.running() == 0)
