"""A small load generator: so many requests, so many at a time, figures at the end. Knows the client, no terminal."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dgemma_client.client import Client
from dgemma_client.errors import ClientError, InvalidRequest
from dgemma_client.events import Result
from dgemma_client.requests import Parameters


@dataclass(frozen=True)
class Load:
    """What is sent: `requests` over `prompts` in turn, at most `concurrency` at a time, request i with seed + i."""

    prompts: tuple[str, ...]
    requests: int
    concurrency: int
    warmup: int = 1
    seed: int = 0
    chat: bool = True  # prompts are user messages; else raw text
    uncached: bool = False  # each request has a cache_salt of its own


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values_ms: Sequence[float]) -> Percentiles:
        """Linear interpolation between the sorted values; zeros for none."""
        if len(values_ms) < 2:
            values_ms = list(values_ms or [0.0]) * 2
        cuts = statistics.quantiles(values_ms, n=100, method="inclusive")
        return Percentiles(*(round(cuts[share - 1], 3) for share in (50, 90, 99)))


@dataclass(frozen=True)
class Report:
    """Figures of one run; `seconds` from the first request to the end of the last."""

    requests: int
    concurrency: int
    errors: dict[str, int]  # class of error -> requests that ended so
    finish_reasons: dict[str, int]  # of the others
    seconds: float
    input_tokens: int
    prefix_tokens: int  # of the input tokens, found in the prefix cache
    output_tokens: int
    canvases: int
    denoising_steps: int
    tokens_per_second: float
    tokens_per_forward: float
    steps_per_canvas: float
    first_canvas_ms: Percentiles
    latency_ms: Percentiles

    def json_line(self, **about: object) -> str:
        """One line of JSON; `about` comes first."""
        return json.dumps({**about, **asdict(self)})

    def rows(self) -> list[tuple[str, str]]:
        """Label and figure, for a table."""

        def milliseconds(values: Percentiles) -> str:
            return f"{values.p50:.1f} / {values.p90:.1f} / {values.p99:.1f}"

        def counts(values: dict[str, int]) -> str:
            return ", ".join(f"{count} {name}" for name, count in values.items()) or "none"

        return [
            ("requests, concurrent", f"{self.requests}, {self.concurrency}"),
            ("errors", counts(self.errors)),
            ("ended by", counts(self.finish_reasons)),
            ("seconds", f"{self.seconds:.2f}"),
            ("input tokens, of them found in the prefix cache", f"{self.input_tokens}, {self.prefix_tokens}"),
            ("output tokens", str(self.output_tokens)),
            ("tokens per second", f"{self.tokens_per_second:.1f}"),
            ("tokens per forward", f"{self.tokens_per_forward:.2f}"),
            ("steps per canvas", f"{self.steps_per_canvas:.2f}"),
            ("time to first canvas, ms (p50 / p90 / p99)", milliseconds(self.first_canvas_ms)),
            ("latency, ms (p50 / p90 / p99)", milliseconds(self.latency_ms)),
        ]


def fixed_steps(steps: int) -> Parameters:
    """Parameters that make every canvas take exactly `steps`: stability_threshold -1 turns adaptive stopping off."""
    return {"max_denoising_steps": steps, "stability_threshold": -1}


async def run_load(client: Client, load: Load, parameters: Parameters) -> Report:
    """Send the load; failed requests are counted, not raised, but for those of the warm-up."""
    _check(load)
    if load.uncached and "cache_salt" in parameters:
        raise InvalidRequest("cache_salt: an uncached load chooses it for each request; leave one of the two out")
    for index in range(load.warmup):
        await _one(client, load, index, parameters)
    done: list[Result] = []
    errors: Counter[str] = Counter()
    indices = itertools.count()

    async def worker() -> None:
        while (index := next(indices)) < load.requests:
            try:
                done.append(await _one(client, load, index, parameters))
            except ClientError as error:
                errors[type(error).__name__] += 1

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(load.concurrency, load.requests)):
            group.create_task(worker())
    return _report(load, done, dict(errors), time.monotonic() - started)


def _check(load: Load) -> None:
    for name, value, low in (
        ("requests", load.requests, 1),
        ("concurrency", load.concurrency, 1),
        ("warmup", load.warmup, 0),
        ("prompts", len(load.prompts), 1),
    ):
        if value < low:
            raise InvalidRequest(f"{name}: {value} is too few; give at least {low}")


async def _one(client: Client, load: Load, index: int, parameters: Parameters) -> Result:
    prompt = load.prompts[index % len(load.prompts)]
    chosen: Parameters = {"seed": load.seed + index, **parameters}
    if load.uncached:
        chosen["cache_salt"] = uuid.uuid4().hex
    if load.chat:
        return await client.generate(messages=[{"role": "user", "content": prompt}], **chosen)
    return await client.generate(prompt, **chosen)


def _report(load: Load, results: list[Result], errors: dict[str, int], seconds: float) -> Report:
    done = [result.statistics for result in results]
    tokens = sum(one.num_output_tokens for one in done)
    steps = sum(one.denoising_steps for one in done)
    canvases = sum(one.canvases for one in done)
    return Report(
        requests=load.requests,
        concurrency=load.concurrency,
        errors=errors,
        finish_reasons=dict(Counter(result.finish_reason for result in results)),
        seconds=round(seconds, 4),
        input_tokens=sum(one.num_input_tokens for one in done),
        prefix_tokens=sum(one.prefix_tokens for one in done),
        output_tokens=tokens,
        canvases=canvases,
        denoising_steps=steps,
        tokens_per_second=round(tokens / seconds, 2),
        tokens_per_forward=round(tokens / steps, 3) if steps else 0.0,
        steps_per_canvas=round(steps / canvases, 3) if canvases else 0.0,
        first_canvas_ms=Percentiles.of([one.time_to_first_canvas_ms for one in done]),
        latency_ms=Percentiles.of([one.total_ms for one in done]),
    )
