"""Several generations at once: their events, the first failure, the end of all."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from tests.openai.conftest import Triton, in_turns

from dgemma_client import Client, Delta, Done
from dgemma_client.errors import ServerError
from dgemma_client.mock import delta, final, reply
from dgemma_openai.backend import Ask, Backend

pytestmark = pytest.mark.asyncio


def backend(*turns: list[Any]) -> tuple[Backend, Triton]:
    triton = Triton(in_turns(*turns) if turns else reply("a"))
    return Backend(Client(transport=triton), 30.0), triton


def asks(count: int) -> list[Ask]:
    return [Ask(f"id-{index}", {}, text="x") for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 16])
async def test_each_answer_ends_with_done(count: int) -> None:
    service, triton = backend()
    async with aclosing(service.events(asks(count))) as events:
        found = [item async for item in events]
    for index in range(count):
        kinds = [type(event) for number, event in found if number == index]
        assert kinds == [Delta, Done]
    assert triton.cancelled == []


async def test_the_first_failure_is_raised_and_ends_the_others() -> None:
    service, triton = backend([delta("a"), 60.0], [0.02, ServerError("broken")], [60.0])
    async with aclosing(service.events(asks(3))) as events:
        with pytest.raises(ServerError, match="broken"):
            _ = [event async for event in events]
    assert sorted(triton.cancelled) == ["id-0", "id-2"]


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_it_ends_all(count: int) -> None:
    service, triton = backend(*[[delta("a"), 60.0, final()] for _ in range(count)])
    async with aclosing(service.events(asks(count))) as events:
        await anext(events)
        await asyncio.sleep(0.01)
    assert len(triton.cancelled) == count


async def test_a_reader_that_is_slow_holds_no_more_than_a_few_events() -> None:
    sent = 0

    def endless(request: Any) -> Any:
        nonlocal sent
        while sent < 10_000:
            sent += 1
            yield delta("a")
        yield final()

    triton = Triton(endless)
    service = Backend(Client(transport=triton), 30.0)
    async with aclosing(service.events(asks(2))) as events:
        await anext(events)
        await asyncio.sleep(0.1)
        assert sent < 200
    assert len(triton.cancelled) == 2


async def test_readiness_is_the_server_s() -> None:
    service, triton = backend()
    assert await service.ready()
    triton.loaded = False
    assert not await service.ready()
