"""The client library and a real Triton server: a full queue, shared prefixes, progress of a prompt, many streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma_client import Client, DeadlineExceeded, Done, Overloaded, Prefill, Preview, Result
from dgemma_runtime.server import RunningServer, running_server

pytestmark = pytest.mark.asyncio
LONG_ANSWER = "one canvas here, and another one; then the end"
PAGE = 16  # tokens; each character of a prompt is one


@pytest.fixture(scope="module")
def narrow(engine: Path) -> Iterator[RunningServer]:
    """Room for one request and one that waits; prompts take many chunks, and prefixes many pages."""
    chunk = 2 * PAGE
    with running_server(
        engine, max_batch_size=1, queue_size=1, page_size=PAGE, prefill_chunk=chunk, prefill_budget=chunk
    ) as server:
        yield server


async def test_a_full_queue_is_an_error_with_a_hint(narrow: RunningServer) -> None:
    async with Client(narrow.grpc_url) as client:
        asked = (client.generate("forever", deadline_ms=500) for _ in range(4))
        ends = await asyncio.gather(*asked, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, Overloaded)]
    answered = [end.finish_reason for end in ends if isinstance(end, Result)]
    assert (len(refused), answered) == (2, ["deadline"] * 2)
    for error in refused:
        assert str(error).startswith("the queue is full")
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s < 60


async def test_a_client_with_retries_waits_for_room(narrow: RunningServer) -> None:
    async with Client(narrow.grpc_url, retries=4) as client:
        answered = await asyncio.gather(*(client.generate("forever", deadline_ms=500) for _ in range(4)))
    assert [result.finish_reason for result in answered] == ["deadline"] * 4


async def test_a_prefix_is_shared_by_those_with_the_same_salt(narrow: RunningServer) -> None:
    prompt = "a question of many pages; " * 10
    async with Client(narrow.grpc_url) as client:
        found = [
            (await client.generate(prompt, seed=1, cache_salt=salt)).statistics.prefix_tokens
            for salt in ("tenant a", "tenant a", "tenant b", "tenant b", "tenant a")
        ]
    assert found[0] == found[2] == 0
    assert min(found[1], found[3], found[4]) >= len(prompt) // 2


async def test_a_long_prompt_is_seen_being_read(narrow: RunningServer) -> None:
    prompt = "not seen before; " * 20
    async with Client(narrow.grpc_url) as client:
        events = [event async for event in client.stream(prompt, previews=True, max_tokens=4)]
        quiet = [event async for event in client.stream(prompt, max_tokens=4)]
    reading = [event for event in events if isinstance(event, Prefill)]
    read = [event.cached_tokens for event in reading]
    assert len(read) >= 5
    assert read == sorted(set(read)), "it only grows"
    assert {event.num_input_tokens for event in reading} == {len(prompt) + 1}
    assert read[-1] < len(prompt) + 1
    last = events[-1]
    assert isinstance(last, Done)
    assert last.statistics.num_input_tokens == len(prompt) + 1
    assert not any(isinstance(event, Prefill | Preview) for event in quiet)


async def test_what_the_model_s_configuration_says(narrow: RunningServer) -> None:
    async with Client(narrow.grpc_url) as client:
        facts = (await client.metadata()).parameters
    assert (facts["max_model_len"], facts["max_batch_size"], facts["page_size"]) == ("4096", "1", "16")


async def test_64_streams_of_one_client(server: RunningServer) -> None:
    """Whole answers, deadlines of both kinds and cancelled tasks at once; afterwards the server still answers."""
    async with Client(server.grpc_url) as client:
        whole = [client.generate(("long", "short")[number % 2], seed=number) for number in range(16)]
        ended = [client.generate("forever", deadline_ms=400, priority=number % 3) for number in range(16)]
        late = [client.generate("forever", timeout_s=0.5) for _ in range(16)]
        cancelled = [asyncio.create_task(client.generate("forever")) for _ in range(16)]
        others = asyncio.gather(*ended, *late, return_exceptions=True)
        await asyncio.sleep(0.5)
        for task in cancelled:
            task.cancel()
        assert [result.text for result in await asyncio.gather(*whole)] == [LONG_ANSWER, "a reply"] * 8
        ends = [end if isinstance(end, BaseException) else end.finish_reason for end in await others]
        assert ends[:16] == ["deadline"] * 16
        assert {type(end) for end in ends[16:]} == {DeadlineExceeded}
        assert {type(end) for end in await asyncio.gather(*cancelled, return_exceptions=True)} == {
            asyncio.CancelledError
        }
        assert (await client.generate("long")).text == LONG_ANSWER
