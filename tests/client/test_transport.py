"""The gRPC transport against a real gRPC server that behaves as Triton does: statuses, deadlines, cancel, failures."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing

import grpc
import pytest

from dgemma_client import (
    Cancelled,
    Client,
    ClientError,
    ConnectError,
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    Overloaded,
    Preview,
    ServerError,
)
from dgemma_client.fake_triton import FakeTriton, Item, ModelError, Refusal
from dgemma_client.mock import delta, final, prefill, preview
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio


def answer(request: InferRequest) -> Iterator[Item]:
    yield from (preview("H?llo"), delta("Hello ", [1, 2]), delta("wörld", [3]), final("stop", output_tokens=3))


def hang(request: InferRequest) -> Iterator[Item]:
    yield from (delta("a"), 60.0)


async def test_a_whole_answer() -> None:
    async with FakeTriton(answer) as server, Client(server.url, model="demo") as client:
        result = await client.generate("héllo", max_tokens=7, temperature=0.5, seed=2**63, stop_words=["x", "y"])
        events = [event async for event in client.stream(input_ids=[4, 5], previews=True)]
    assert (result.text, result.token_ids, result.finish_reason) == ("Hello wörld", (1, 2, 3), "stop")
    assert [type(event) for event in events[:3]] == [Preview, Delta, Delta]
    first, second = server.requests
    assert first.model == "demo"
    assert first.inputs["text_input"] == ("héllo",)
    assert first.inputs["seed"] == (2**63,)
    assert first.inputs["temperature"] == (0.5,)
    assert first.inputs["stop_words"] == ("x", "y")
    assert first.inputs["stream"] == (True,)
    assert second.inputs["input_ids"] == (4, 5)
    assert not server.left


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (ModelError(grpc.StatusCode.INVALID_ARGUMENT, "top_k: is not supported, got 5"), InvalidRequest),
        (ModelError(grpc.StatusCode.UNAVAILABLE, "the queue is full"), Overloaded),
        (ModelError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many"), Overloaded),
        (ModelError(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)"), InvalidRequest),
        (ModelError(grpc.StatusCode.INTERNAL, "the engine failed"), ServerError),
        (ModelError(grpc.StatusCode.UNKNOWN, "the engine failed"), ServerError),
        (ModelError(grpc.StatusCode.CANCELLED, "shutting down"), Cancelled),
        (Refusal("top_k: is not supported, got 5"), InvalidRequest),
        (Refusal("the queue is full: 4 requests are waiting (queue_size); try again in about 2 s"), Overloaded),
        (Refusal("the server is shutting down; try again on another one, or when it is back"), Overloaded),
        (Refusal("the engine failed: RuntimeError: expected another shape"), ServerError),
        (Refusal("Request for unknown model: 'x' is not found"), InvalidRequest),
        (Refusal("Request for unknown model: 'x' has no available versions"), Overloaded),  # it is loaded again
        (Refusal("[request id: 1] expected 1 inputs but got 0 inputs for model 'm'"), InvalidRequest),
        (Refusal("unexpected inference input 'zzz' for model 'm'"), InvalidRequest),
        (Refusal("Server is stopping, scheduler for model has stopped accepting new requests"), Overloaded),
        (Refusal("something broke"), ServerError),
    ],
)
async def test_errors_have_their_types_and_messages(failure: Item, error: type[ClientError]) -> None:
    message = failure.message if isinstance(failure, Refusal | ModelError) else ""
    async with FakeTriton(lambda request: [failure]) as server, Client(server.url) as client:
        with pytest.raises(ClientError) as caught:
            await client.generate("hi")
    assert type(caught.value) is error
    assert str(caught.value) == message
    if message.startswith("top_k"):
        assert isinstance(caught.value, InvalidRequest)
        assert caught.value.field == "top_k"


async def test_a_failure_in_the_middle_keeps_the_text_and_the_client_goes_on() -> None:
    def handler(request: InferRequest) -> Iterator[Item]:
        yield delta("half ")
        if request.inputs["text_input"] == ("bad",):
            yield ModelError(grpc.StatusCode.INTERNAL, "the engine failed")
        yield final()

    async with FakeTriton(handler) as server, Client(server.url) as client:
        with pytest.raises(ServerError, match="the engine failed") as caught:
            await client.generate("bad")
        assert caught.value.text == "half "
        assert caught.value.request_id == server.requests[0].request_id
        assert (await client.generate("good")).text == "half "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<I", 3) + b"a\xc3(", "text_output is not valid UTF-8"),
        (struct.pack("<I", 300) + b"abc", "text_output is malformed"),
    ],
)
async def test_bytes_that_are_no_text(content: bytes, message: str) -> None:
    async with FakeTriton(lambda request: [delta("ok"), content]) as server, Client(server.url) as client:
        with pytest.raises(ServerError, match=message) as caught:
            await client.generate("hi")
    assert caught.value.text == "ok"


async def test_a_stream_that_just_ends() -> None:
    async with FakeTriton(lambda request: [delta("a")]) as server, Client(server.url) as client:
        with pytest.raises(ServerError, match="without a finish reason"):
            await client.generate("hi")


async def test_the_deadline_reaches_the_server() -> None:
    async with FakeTriton(hang) as server, Client(server.url) as client:
        with pytest.raises(DeadlineExceeded, match=r"no end after 0\.2 s") as caught:
            await client.generate("hi", timeout_s=0.2)
        await server.until_left()
    assert caught.value.text == "a"


async def test_closing_the_generator_reaches_the_server() -> None:
    async with FakeTriton(hang) as server, Client(server.url) as client:
        events = client.stream("hi", request_id="closed")
        async for _ in events:
            break
        await events.aclose()
        await server.until_left()
        assert server.left == ["closed"]


async def test_leaving_the_loop_reaches_the_server() -> None:
    async with FakeTriton(hang) as server, Client(server.url) as client:
        async for _ in client.stream("hi"):
            break
        await server.until_left()


async def test_cancelling_the_task_reaches_the_server() -> None:
    async with FakeTriton(hang) as server, Client(server.url) as client:
        task = asyncio.create_task(client.generate("hi"))
        while not server.requests:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.until_left()


async def test_closing_the_client_ends_its_requests_as_cancelled() -> None:
    async with FakeTriton(hang) as server:
        client = Client(server.url)
        task = asyncio.create_task(client.generate("hi"))
        while not server.requests:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(Cancelled, match="client was closed"):
            await task


async def test_nobody_listens(unused_tcp_port: int) -> None:
    async with Client(f"127.0.0.1:{unused_tcp_port}", connect_timeout_s=5) as client:
        started = time.monotonic()
        with pytest.raises(ConnectError, match=f"no Triton gRPC server at 127.0.0.1:{unused_tcp_port}"):
            await client.generate("hi")
        assert time.monotonic() - started < 3, "a refused connection does not wait for the timeout"
        with pytest.raises(ConnectError):
            await client.metadata()
        assert not await client.is_live()
        assert not await client.is_ready()


async def test_somebody_listens_who_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with Client(f"127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=0.2) as client:
            with pytest.raises(ConnectError, match=r"no answer in 0\.2 s"):
                await client.generate("hi", timeout_s=30)


SERVER_SCRIPT = """
import asyncio
from dgemma_client.fake_triton import FakeTriton
from dgemma_client.mock import delta

async def main():
    async with FakeTriton(lambda request: [delta("a"), 60.0]) as server:
        print(server.port, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_server_is_killed_in_the_middle_and_comes_back() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER_SCRIPT, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    async with Client(f"127.0.0.1:{port}") as client:
        events = client.stream("hi")
        assert await anext(events) == Delta("a", ())
        process.kill()
        with pytest.raises(ConnectError, match="broke") as caught:
            await anext(events)
        await process.wait()
        assert caught.value.text == "a"
        with pytest.raises(ConnectError):
            await client.generate("hi")
        async with FakeTriton(answer, port=port):
            await client.wait_until_ready(5)
            assert (await client.generate("hi")).text == "Hello wörld"


async def test_not_ready_in_time(unused_tcp_port: int) -> None:
    async with Client(f"127.0.0.1:{unused_tcp_port}", model="demo") as client:
        with pytest.raises(DeadlineExceeded, match=r"demo is not ready after 0\.2 s"):
            await client.wait_until_ready(0.2, poll_s=0.05)


async def test_many_at_once_and_a_long_prompt() -> None:
    def echo(request: InferRequest) -> Iterator[Item]:
        yield 0.01
        yield {**delta(str(request.inputs["text_input"][0])), **final()}

    texts = [str(index) for index in range(50)] + ["é" * 3_000_000]
    async with FakeTriton(echo) as server, Client(server.url) as client:
        results = await asyncio.gather(*(client.generate(text) for text in texts))
    assert [result.text for result in results] == texts


async def test_a_closed_client_says_so() -> None:
    async with FakeTriton(lambda request: [final()]) as server, Client(server.url) as client:
        await client.close()
        with pytest.raises(Cancelled, match="client was closed before"):
            await client.generate("hi")


BUSY = Refusal("the queue is full; try again in 1 s")


async def test_what_was_refused_is_sent_again_and_what_has_begun_never() -> None:
    asked: list[str] = []

    def busy_once(request: InferRequest) -> Iterator[Item]:
        asked.append(str(request.inputs["text_input"][0])[:5])
        if asked[-1] == "begun":
            yield delta("half ")
        if asked.count(asked[-1]) < 2:
            yield BUSY
        yield from (delta("all"), final())

    async with FakeTriton(busy_once) as server, Client(server.url, retries=2) as client:
        assert (await client.generate("short")).text == "all"
        assert (await client.generate("long" + "é" * 3_000_000)).text == "all", "a long prompt is kept for it"
        with pytest.raises(Overloaded) as caught:
            await client.generate("begun")
    assert caught.value.text == "half "
    assert asked == ["short", "short", "longé", "longé", "begun"]


@pytest.mark.parametrize(("retries", "sent"), [(0, 1), (1, 2)])
async def test_retries_are_counted_and_end_with_the_error(retries: int, sent: int) -> None:
    async with FakeTriton(lambda request: [BUSY]) as server, Client(server.url, retries=retries) as client:
        with pytest.raises(Overloaded, match="the queue is full") as caught:
            await client.generate("hi")
        assert len(server.requests) == sent
    assert caught.value.retry_after_s == 1


async def test_a_bad_request_is_not_sent_again() -> None:
    refusal = Refusal("top_k: is not supported, got 5")
    async with FakeTriton(lambda request: [refusal]) as server, Client(server.url, retries=4) as client:
        with pytest.raises(InvalidRequest):
            await client.generate("hi")
        assert len(server.requests) == 1


async def test_no_retry_where_the_request_s_time_ends_before_it() -> None:
    async with FakeTriton(lambda request: [BUSY]) as server, Client(server.url, retries=4) as client:
        started = time.monotonic()
        with pytest.raises(Overloaded):
            await client.generate("hi", timeout_s=0.5)
        assert len(server.requests) == 1
    assert time.monotonic() - started < 0.5


async def test_an_error_s_stream_is_read_to_its_end() -> None:
    """Triton keeps a request for ever whose stream is cancelled between its error and its end."""
    refusal = Refusal("top_k: is not supported, got 5")
    async with FakeTriton(lambda request: [refusal, 0.1]) as server, Client(server.url) as client:
        with pytest.raises(InvalidRequest):
            await client.generate("hi")
        await asyncio.sleep(0.2)
        assert server.left == []


async def test_an_error_whose_stream_does_not_end_is_not_waited_for_long() -> None:
    refusal = Refusal("top_k: is not supported, got 5")
    async with FakeTriton(lambda request: [refusal, 60.0]) as server, Client(server.url) as client:
        with pytest.raises(InvalidRequest):
            await client.generate("hi")
        await server.until_left()


async def test_64_streams_of_one_client_leave_nothing_behind() -> None:
    def handler(request: InferRequest) -> Iterator[Item]:
        yield from (prefill(1, 2), preview("?"), delta("a", [1]))
        if request.inputs["text_input"] == ("hang",):
            yield 60.0
        yield from (0.01, delta("b", [2]), final())

    async def leave(client: Client) -> None:
        async with aclosing(client.stream("hang", previews=True)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    return

    async with FakeTriton(handler) as server, Client(server.url) as client:

        async def mixed_load() -> None:
            before = len(server.left)
            cancelled = [asyncio.create_task(client.generate("hang")) for _ in range(16)]
            late = [client.generate("hang", timeout_s=0.5) for _ in range(16)]
            others = asyncio.gather(*late, *(leave(client) for _ in range(16)), return_exceptions=True)
            results = await asyncio.gather(*(client.generate("hi") for _ in range(16)))
            assert [result.text for result in results] == ["ab"] * 16
            for task in cancelled:
                task.cancel()
            assert [type(end) for end in await others] == [DeadlineExceeded] * 16 + [type(None)] * 16
            ends = await asyncio.gather(*cancelled, return_exceptions=True)
            assert {type(end) for end in ends} == {asyncio.CancelledError}
            async with asyncio.timeout(5):
                while len(server.left) < before + 48:
                    await asyncio.sleep(0.01)

        await client.generate("hi")
        tasks = len(asyncio.all_tasks())
        await mixed_load()
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await mixed_load()
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) == files
        assert len(server.peers) == 1, "one connection carries them all"


async def test_readers_who_stop_reading_hold_up_nobody() -> None:
    def handler(request: InferRequest) -> Iterator[Item]:
        size = 100_000 if request.inputs["text_input"] == ("big",) else 1_000
        yield from (delta("x" * size) for _ in range(100))
        yield final()

    async with FakeTriton(handler) as server, Client(server.url) as client:
        stopped = [client.stream("big") for _ in range(16)]
        for events in stopped:
            await anext(events)
        async with asyncio.timeout(20):
            results = await asyncio.gather(*(client.generate("small") for _ in range(48)))
        assert {len(result.text) for result in results} == {100_000}
        rest = [event async for event in stopped[0]]
        assert sum(len(event.text) for event in rest if isinstance(event, Delta)) == 99 * 100_000
        for events in stopped:
            await events.aclose()


async def test_metadata() -> None:
    async with FakeTriton(answer) as server, Client(server.url, model="demo") as client:
        assert await client.is_live()
        assert await client.is_ready()
        info = await client.metadata()
    assert (info.server, info.model) == ("fake", "demo")
    assert "preview_output" in info.outputs
    assert info.parameters == {"max_model_len": "4096"}
