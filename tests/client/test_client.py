"""The client's contract on the transport that ships for tests: events, results, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from dgemma_client import (
    Cancelled,
    ChatOptions,
    Client,
    ConnectError,
    DeadlineExceeded,
    Delta,
    Done,
    InvalidRequest,
    MockTransport,
    Overloaded,
    Prefill,
    Preview,
    ServerError,
    Tokens,
)
from dgemma_client.mock import Item, delta, final, prefill, preview, reply
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio


async def test_three_lines_to_the_first_result() -> None:
    transport = MockTransport(reply("Hello ", "world"))
    async with Client(transport=transport) as client:
        result = await client.generate("hi", max_tokens=64, seed=1)
    assert transport.cancelled == [], "a request that is done is read to its end"
    assert str(result) == result.text == "Hello world"
    assert result.finish_reason == "stop"
    assert result.statistics.canvases == 2


async def test_events_in_order_with_their_positions() -> None:
    def handler(request: InferRequest) -> Iterator[Item]:
        yield from (preview("x", 0, 1), preview("He", 0, 2), delta("Hello ", [5, 6]))
        yield from (preview("w", 1, 1), delta("world", [7]))
        yield final("length", input_tokens=4, output_tokens=3, steps=5, canvases=2)

    async with Client(transport=MockTransport(handler)) as client:
        events = [event async for event in client.stream("hi", previews=True)]
    assert events[:5] == [
        Preview("x", 0, 1),
        Preview("He", 0, 2),
        Delta("Hello ", (5, 6)),
        Preview("w", 1, 1),
        Delta("world", (7,)),
    ]
    done = events[-1]
    assert isinstance(done, Done)
    assert done.finish_reason == "length"
    figures = done.statistics
    assert (figures.num_input_tokens, figures.num_output_tokens, figures.denoising_steps) == (4, 3, 5)
    assert figures.tokens_per_forward == pytest.approx(0.6)
    assert 0 <= figures.time_to_first_canvas_ms <= figures.total_ms


async def test_a_long_prompt_is_seen_being_read() -> None:
    def handler(request: InferRequest) -> Iterator[Item]:
        yield from (prefill(512, 1100), prefill(1024, 1100), preview("a?", 0, 1))
        yield from (delta("ab", [5]), prefill(1050, 1100), delta("c", [6]))  # it was preempted in between
        yield final(input_tokens=1100, output_tokens=2, prefix_tokens=256, preemptions=1)

    async with Client(transport=MockTransport(handler)) as client:
        events = [event async for event in client.stream("hi", previews=True)]
        result = await client.generate("hi")
    assert events[:2] == [Prefill(512, 1100), Prefill(1024, 1100)]
    assert events[4] == Prefill(1050, 1100)
    assert isinstance(events[-1], Done), "num_input_tokens alone is not the end"
    assert (result.text, result.token_ids) == ("abc", (5, 6))
    figures = result.statistics
    assert (figures.num_input_tokens, figures.prefix_tokens, figures.preemptions) == (1100, 256, 1)


@pytest.mark.parametrize("stop_reason", ["\n\n", 106, None])
async def test_what_ended_an_answer_is_told(stop_reason: str | int | None) -> None:
    transport = MockTransport(lambda request: [delta("a", [5]), final(stop_reason=stop_reason)])
    async with Client(transport=transport) as client:
        result = await client.generate("hi")
        events = [event async for event in client.stream("hi")]
    done = events[-1]
    assert isinstance(done, Done)
    assert (result.stop_reason, done.stop_reason) == (stop_reason, stop_reason)


@pytest.mark.parametrize("odd", [True, 1.5, ["x"]])
async def test_an_odd_stop_reason_is_the_server_s_error(odd: object) -> None:
    odd_end = final(stop_reason=odd)  # type: ignore[arg-type]
    async with Client(transport=MockTransport(lambda request: [odd_end])) as client:
        with pytest.raises(ServerError, match="statistics has stop_reason"):
            await client.generate("hi")


async def test_tokenize_is_a_request_for_no_tokens() -> None:
    ended = final("length", input_tokens=3, output_tokens=0, steps=0, canvases=0)
    transport = MockTransport(lambda request: [{**delta("<bos>hi", [2, 7, 8]), **ended}])
    async with Client(transport=transport) as client:
        assert await client.tokenize("hi") == Tokens((2, 7, 8), "<bos>hi")
        await client.tokenize(input_ids=[2, 7, 8], skip_special_tokens=False)
        chat: ChatOptions = {"add_generation_prompt": False}
        await client.tokenize(messages=[{"role": "user", "content": "hi"}], chat=chat, request_id="count-1")
    for request in transport.requests:
        assert request.inputs["max_tokens"] == (0,)
        assert request.inputs["exclude_input_in_output"] == (False,)
    first, second, third = (request.inputs for request in transport.requests)
    assert (first["text_input"], first["skip_special_tokens"]) == (("hi",), (True,))
    assert (second["input_ids"], second["skip_special_tokens"]) == ((2, 7, 8), (False,))
    assert not json.loads(str(third["messages"][0]))["add_generation_prompt"]
    assert transport.requests[2].request_id == "count-1"


async def test_a_deadline_of_the_server_is_an_answer_with_what_there_is() -> None:
    transport = MockTransport(lambda request: [delta("so far", [5]), final("deadline")])
    async with Client(transport=transport) as client:
        result = await client.generate("hi", deadline_ms=50, priority=-2, cache_salt="tenant")
    assert (result.text, result.finish_reason) == ("so far", "deadline")
    inputs = transport.requests[0].inputs
    assert [inputs[name] for name in ("deadline_ms", "priority", "cache_salt")] == [(50,), (-2,), ("tenant",)]


async def test_a_server_that_counts_less_is_understood() -> None:
    figures = {"canvases": 1, "queue_ms": 0, "prefill_ms": 0, "engine_ms": 0}
    older = {**final(), "statistics": (json.dumps(figures),)}
    async with Client(transport=MockTransport(lambda request: [older])) as client:
        statistics = (await client.generate("hi")).statistics
    assert (statistics.prefix_tokens, statistics.preemptions) == (0, 0)


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("3 requests are waiting and the queue is full; try again in 2 s", 2.0),
        ("the queue is full; try again in about 0.5 s", 0.5),
        ("the queue is full; try again later", None),
        ("5 s ago the queue was full", None),
    ],
)
async def test_a_busy_server_s_hint_is_a_number(message: str, seconds: float | None) -> None:
    async with Client(transport=MockTransport(lambda request: [Overloaded(message)])) as client:
        with pytest.raises(Overloaded) as caught:
            await client.generate("hi")
    assert caught.value.retry_after_s == seconds
    assert str(caught.value) == message


async def test_retries_have_a_range() -> None:
    with pytest.raises(InvalidRequest, match="retries: -1 is below 0"):
        Client(retries=-1)
    with pytest.raises(InvalidRequest, match="retries: 1 are for the client's own transport"):
        Client(retries=1, transport=MockTransport(reply()))


async def test_text_and_end_may_come_together_and_text_may_be_empty() -> None:
    def together(request: InferRequest) -> Iterator[Item]:
        yield {**delta("all", [1]), **final()}

    def empty(request: InferRequest) -> Iterator[Item]:
        yield {**delta(""), **final(canvases=0)}

    async with Client(transport=MockTransport(together)) as client:
        assert (await client.generate("hi")).text == "all"
    async with Client(transport=MockTransport(empty)) as client:
        result = await client.generate("hi")
    assert (result.text, result.statistics.canvases) == ("", 0)
    assert result.statistics.time_to_first_canvas_ms == result.statistics.total_ms


async def test_previews_only_on_request() -> None:
    transport = MockTransport(reply("a"))
    async with Client(transport=transport) as client:
        assert not [event async for event in client.stream("hi") if isinstance(event, Preview)]
        assert [event async for event in client.stream("hi", previews=True) if isinstance(event, Preview)]
    assert [request.inputs["stream_previews"] for request in transport.requests] == [(False,), (True,)]
    assert transport.requests[0].request_id != transport.requests[1].request_id


async def test_an_error_carries_what_had_arrived() -> None:
    async with Client(transport=MockTransport(lambda request: [delta("Hel"), Overloaded("queue full")])) as client:
        with pytest.raises(Overloaded, match="queue full") as caught:
            await client.generate("hi", request_id="r-1")
    assert (caught.value.text, caught.value.request_id) == ("Hel", "r-1")


@pytest.mark.parametrize(
    ("responses", "error", "message"),
    [
        ([delta("a")], ServerError, "ended without a finish reason"),
        ([], ServerError, "ended without a finish reason"),
        ([final("cancelled")], Cancelled, "before the answer was complete"),
        ([final("bored")], ServerError, "finish_reason is 'bored'"),
        ([{"prefilled_tokens": (5,)}], ServerError, "a response with prefilled_tokens has no num_input_tokens"),
        ([prefill(5, 9)], ServerError, "ended without a finish reason"),
        ([{**final(), "statistics": ('{"canvases": 1, "prefix_tokens": "x"}',)}], ServerError, "statistics has"),
        ([{"preview_output": ("a",)}], ServerError, "a response with preview_output has no canvas_index"),
        (
            [{key: value for key, value in final().items() if key != "denoising_steps"}],
            ServerError,
            "no denoising_steps",
        ),
        ([{**final(), "statistics": ("{",)}], ServerError, "statistics is not JSON"),
        ([{**final(), "statistics": ("[]",)}], ServerError, "statistics is list"),
        ([{**final(), "statistics": ("{}",)}], ServerError, "statistics has canvases None"),
        ([final(), delta("late")], ServerError, "after the last one"),
    ],
)
async def test_what_a_server_must_not_send(responses: list[Item], error: type[Exception], message: str) -> None:
    async with Client(transport=MockTransport(lambda request: responses)) as client:
        with pytest.raises(error, match=message):
            async for _ in client.stream("hi"):
                pass


async def test_the_deadline_ends_a_request_that_hangs() -> None:
    transport = MockTransport(lambda request: [delta("a"), 60.0])
    async with Client(transport=transport, timeout_s=60) as client:
        with pytest.raises(DeadlineExceeded, match=r"no end after 0\.05 s") as caught:
            await client.generate("hi", timeout_s=0.05, request_id="slow")
    assert caught.value.text == "a"
    assert transport.cancelled == ["slow"]


async def test_the_deadline_is_for_the_whole_request() -> None:
    def drip(request: InferRequest) -> Iterator[Item]:
        while True:
            yield from (delta("a"), 0.03)

    async with Client(transport=MockTransport(drip), timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("hi")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
async def test_every_request_has_a_deadline(seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        Client(timeout_s=seconds, transport=MockTransport(reply()))
    async with Client(transport=MockTransport(reply("a"))) as client:
        with pytest.raises(InvalidRequest, match="timeout_s"):
            await client.generate("hi", timeout_s=seconds)


async def test_closing_the_generator_cancels() -> None:
    transport = MockTransport(lambda request: [delta("a"), delta("b"), final()])
    async with Client(transport=transport) as client, aclosing(client.stream("hi", request_id="left")) as events:
        async for _ in events:
            break
        await events.aclose()
        assert transport.cancelled == ["left"]


async def test_cancelling_the_task_cancels() -> None:
    transport = MockTransport(lambda request: [60.0])
    async with Client(transport=transport) as client:
        task = asyncio.create_task(client.generate("hi", request_id="left"))
        while not transport.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert transport.cancelled == ["left"]


async def test_closing_the_client_ends_its_requests() -> None:
    transport = MockTransport(lambda request: [60.0])
    client = Client(transport=transport)
    task = asyncio.create_task(client.generate("hi"))
    while not transport.requests:
        await asyncio.sleep(0)
    await client.close()
    with pytest.raises(Cancelled, match="client was closed"):
        await task
    with pytest.raises(ConnectError):
        await client.generate("hi")
    assert not await client.is_live()
    assert not await client.is_ready()


async def test_health_and_metadata() -> None:
    async with Client(model="m", transport=MockTransport(reply())) as client:
        assert await client.is_live()
        await client.wait_until_ready(1)
        info = await client.metadata()
    assert info.model == "m"
    assert "text_input" in info.inputs


async def test_the_mock_checks_requests_as_grpc_does() -> None:
    async with Client(transport=MockTransport(reply("a"))) as client:
        with pytest.raises(InvalidRequest, match="seed"):
            await client.generate("hi", seed=-1)
