"""The load generator: what it sends, how much at a time, and its figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from dgemma_client import Client, InvalidRequest, MockTransport, Overloaded
from dgemma_client.bench import Load, Percentiles, Report, fixed_steps, run_load
from dgemma_client.mock import Item, delta, final
from dgemma_client.requests import InferRequest
from dgemma_client.transport import Outputs


def handler(request: InferRequest) -> Iterator[Item]:
    yield from (delta("a", [1, 2]), 0.01, delta("b", [3]))
    yield final("length", input_tokens=4, output_tokens=3, steps=6, canvases=2)


def measure(load: Load, transport: MockTransport, **parameters: Any) -> Report:
    async def run() -> Report:
        async with Client(transport=transport) as client:
            return await run_load(client, load, {**parameters})  # type: ignore[typeddict-item]

    return asyncio.run(run())


def test_figures_add_up() -> None:
    transport = MockTransport(handler)
    report = measure(Load(("p", "q"), requests=5, concurrency=2, warmup=2, seed=7), transport, max_tokens=9)
    assert len(transport.requests) == 7
    assert (report.output_tokens, report.input_tokens, report.canvases, report.denoising_steps) == (15, 20, 10, 30)
    assert report.steps_per_canvas == 3
    assert report.tokens_per_forward == 0.5
    assert report.tokens_per_second == pytest.approx(15 / report.seconds, rel=0.1)
    assert (report.errors, report.finish_reasons) == ({}, {"length": 5})
    measured = transport.requests[2:]
    assert sorted(request.inputs["seed"] for request in measured) == [(seed,) for seed in range(7, 12)]
    assert {request.inputs["max_tokens"] for request in measured} == {(9,)}
    assert {json.loads(str(request.inputs["messages"][0]))["messages"][0]["content"] for request in measured} == {
        "p",
        "q",
    }


def test_raw_prompts_and_fixed_steps() -> None:
    transport = MockTransport(handler)
    measure(Load(("p",), requests=1, concurrency=1, warmup=0, chat=False), transport, **fixed_steps(16))
    (request,) = transport.requests
    assert request.inputs["text_input"] == ("p",)
    assert request.inputs["max_denoising_steps"] == (16,)
    assert request.inputs["stability_threshold"] == (-1,)


def test_an_uncached_load_shares_nothing() -> None:
    transport = MockTransport(lambda request: [final("deadline", input_tokens=9, prefix_tokens=8)])
    load = Load(("p",), requests=3, concurrency=3, warmup=1, uncached=True)
    report = measure(load, transport)
    assert len({request.inputs["cache_salt"] for request in transport.requests}) == 4
    assert (report.input_tokens, report.prefix_tokens, report.finish_reasons) == (27, 24, {"deadline": 3})
    assert ("ended by", "3 deadline") in report.rows()
    with pytest.raises(InvalidRequest, match="cache_salt: an uncached load chooses it"):
        measure(load, transport, cache_salt="mine")


class Counting(MockTransport):
    """Knows how many requests were under way at a time."""

    def __init__(self) -> None:
        super().__init__(handler)
        self.now = self.most = 0

    async def stream(
        self, request: InferRequest, timeout_s: float, connect_timeout_s: float
    ) -> AsyncGenerator[Outputs]:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01)
        async for outputs in super().stream(request, timeout_s, connect_timeout_s):
            yield outputs
        self.now -= 1


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (50, 6)])
def test_concurrency_is_held(concurrency: int, most: int) -> None:
    transport = Counting()
    measure(Load(("p",), requests=6, concurrency=concurrency, warmup=0), transport)
    assert transport.most == most


def test_failed_requests_are_counted() -> None:
    def every_second(request: InferRequest) -> Iterator[Item]:
        if request.inputs["seed"] in ((1,), (3,)):
            yield Overloaded("queue full")
        yield from handler(request)

    report = measure(Load(("p",), requests=4, concurrency=2, warmup=0), MockTransport(every_second))
    assert report.errors == {"Overloaded": 2}
    assert report.output_tokens == 6
    assert ("errors", "2 Overloaded") in report.rows()


def test_a_failing_warm_up_ends_the_run() -> None:
    with pytest.raises(Overloaded):
        measure(Load(("p",), requests=1, concurrency=1), MockTransport(lambda request: [Overloaded("no")]))


def test_a_run_in_which_all_fail_still_has_a_report() -> None:
    load = Load(("p",), requests=2, concurrency=1, warmup=0)
    report = measure(load, MockTransport(lambda request: [Overloaded("no")]))
    assert (report.tokens_per_second, report.latency_ms) == (0, Percentiles(0, 0, 0))


def test_the_last_line_is_json() -> None:
    report = measure(Load(("p",), requests=1, concurrency=1, warmup=0), MockTransport(handler))
    line = report.json_line(model="m")
    assert "\n" not in line
    read = json.loads(line)
    assert read["model"] == "m"
    assert read["latency_ms"]["p50"] == report.latency_ms.p50


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"concurrency": 0}, {"warmup": -1}, {"prompts": ()}])
def test_a_load_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    load = Load(**{"prompts": ("p",), "requests": 1, "concurrency": 1, **wrong})
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        measure(load, MockTransport(handler))


def test_percentiles() -> None:
    assert Percentiles.of([float(value) for value in range(101)]) == Percentiles(50, 90, 99)
    assert Percentiles.of([5.0]) == Percentiles(5, 5, 5)
