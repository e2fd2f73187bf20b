"""Rows about many users and long contexts, through a real server: pace, prefix cache, page exhaustion, load, memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import psutil

from dgemma_build.accept.speed import faster
from dgemma_build.accept.table import Result, Row, Setting
from dgemma_build.bench import concurrency
from dgemma_build.bench.concurrency import Point
from dgemma_build.bench.worker import peak_memory_bytes
from dgemma_build.stress.load import chat, conversation
from dgemma_build.stress.report import by_manner
from dgemma_build.stress.run import Load, stress, variants
from dgemma_build.stress.watch import read_metrics
from dgemma_client import Client, Delta, Preview
from dgemma_client import Result as Answer
from dgemma_client.requests import Message, Parameters
from dgemma_runtime.contract import Manifest
from dgemma_runtime.memory_plan import plan_host_memory
from dgemma_runtime.server import RunningServer, running_server
from dgemma_runtime.settings import RuntimeSettings

THREADS, PAGE_SIZE = 2, 64
CHUNK = RuntimeSettings.prefill_chunk
_HOUR_S = 3600.0
_PREFILLED = "dgemma_prefill_tokens_total"
_PUBLISHED_S = 2.5  # after this long the metrics show what has been


def random_prompt(setting: Setting, tokens: int, seed: int) -> list[int]:
    """Token ids that were never asked before, for the demo checkpoint."""
    vocabulary = Manifest.load(setting.engine("demo"), verify_hashes=False).model.vocab_size
    return [int(token) for token in np.random.default_rng(seed).integers(20, vocabulary, tokens)]


# ---------------------------------------------------------------- the whole context


def _whole_context(setting: Setting) -> Result:
    """One request that fills the context; peak memory beside the plan that the server made at its start."""
    engine = setting.engine("demo")
    settings: dict[str, Any] = {"threads": THREADS, "max_batch_size": 1, "page_size": PAGE_SIZE, "prefix_cache": False}
    manifest = Manifest.load(engine)
    context, output = manifest.max_model_len, 2 * manifest.model.canvas_length
    plan = plan_host_memory(engine, manifest, RuntimeSettings(**settings))
    prompt = random_prompt(setting, context - output, seed=0)
    with running_server(engine, **settings) as server:
        answer = asyncio.run(_fill(server.grpc_url, prompt, output))
        processes = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
        peak = sum(map(peak_memory_bytes, processes))
    statistics = answer.statistics
    tokens = statistics.num_input_tokens + statistics.num_output_tokens
    off = peak / plan.total_bytes - 1
    figure = (
        f"{tokens:,} tokens in {statistics.total_ms / 1000:.0f} s; peak {peak / 2**20:.0f} MiB, "
        f"plan {plan.total_bytes / 2**20:.0f} MiB ({off:+.1%})"
    )
    details = {"plan": dict(plan.uses), "peak_bytes": peak, **asdict(statistics)}
    return Result(figure, tokens == context and abs(off) <= 0.10, details)


async def _fill(url: str, prompt: list[int], output: int) -> Answer:
    parameters: Parameters = {"max_tokens": output, "end_id": -1, "seed": 0}
    async with Client(url, timeout_s=_HOUR_S) as client:
        return await client.generate(input_ids=prompt, **parameters)


# ---------------------------------------------------------------- pace beside a long prompt


@dataclass
class _Pace:
    """Times between the denoising steps of running requests."""

    times: list[tuple[float, float]] = field(default_factory=list)  # when a gap ended, how long it was; seconds

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Median and 95th percentile of the gaps within a span, in ms."""
        chosen = [1000 * gap for when, gap in self.times if start <= when - gap and when <= end]
        p50, p95 = np.percentile(chosen, (50, 95))
        return float(p50), float(p95)


def _pace_beside_prefill(setting: Setting) -> Result:
    """Four requests keep denoising; a prompt of 64k tokens comes; its own time is taken with and without them."""
    prompts = [random_prompt(setting, 65536, seed) for seed in (1, 2)]
    with running_server(setting.engine("demo"), threads=THREADS, max_model_len=65536 + 64, max_batch_size=5) as server:
        alone_s, pace, began, ended, started = asyncio.run(_beside(server.grpc_url, prompts))
    undisturbed, beside = pace.between(started, began), pace.between(began, ended)
    times, slower = beside[0] / undisturbed[0], (ended - began) / alone_s
    figure = (
        f"median {beside[0]:.1f} ms beside {undisturbed[0]:.1f} ms ({times:.2f}x), p95 {beside[1]:.1f} beside "
        f"{undisturbed[1]:.1f} ms; prefill {ended - began:.0f} s beside {alone_s:.0f} s alone ({slower:.1f}x)"
    )
    return Result(figure, times <= 2.0, {"undisturbed_ms": undisturbed, "beside_ms": beside, "alone_s": alone_s})


async def _beside(url: str, prompts: Sequence[list[int]]) -> tuple[float, _Pace, float, float, float]:
    pace = _Pace()
    async with Client(url, timeout_s=_HOUR_S) as client:
        alone_s = await _timed(lambda: client.generate(input_ids=prompts[0], max_tokens=1, seed=0))
        started = time.monotonic()
        runners = [asyncio.create_task(_keep_denoising(client, pace, seed)) for seed in range(4)]
        await asyncio.sleep(10)
        began = time.monotonic()
        await client.generate(input_ids=prompts[1], max_tokens=1, seed=0)
        ended = time.monotonic()
        for runner in runners:
            runner.cancel()
        await asyncio.wait(runners)
    return alone_s, pace, began, ended, started


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    started = time.monotonic()
    await work()
    return time.monotonic() - started


async def _keep_denoising(client: Client, pace: _Pace, seed: int) -> None:
    """One request after the other, with all steps of each canvas: previews come with every step, then the text."""
    parameters: Parameters = {"stability_threshold": -1, "end_id": -1, "max_tokens": 16 * 64, "seed": seed}
    while True:
        last: float | None = None
        async with aclosing(client.stream("Convert to JSON:\nname: Ada", previews=True, **parameters)) as events:
            async for event in events:
                if isinstance(event, Preview | Delta):
                    now = time.monotonic()
                    if last is not None:
                        pace.times.append((now, now - last))
                    last = now


# ---------------------------------------------------------------- second turns


@dataclass(frozen=True)
class _Turns:
    """The second turns of one chat: seeded, the same with nothing cached, and another one without a seed."""

    first: Answer
    seeded: Answer
    uncached: Answer
    unseeded: Answer
    prefilled: tuple[float, float]  # tokens, for the seeded one and the one without a seed

    @property
    def old_tokens(self) -> tuple[float, float]:
        """Of the first turn's prompt, that were prefilled once more: seeded, without a seed."""
        known = self.first.statistics.num_input_tokens
        new = [answer.statistics.num_input_tokens - known for answer in (self.seeded, self.unseeded)]
        return self.prefilled[0] - new[0], self.prefilled[1] - new[1]

    @property
    def share(self) -> float:
        """Of the first turn's time to its first canvas, that the second took."""
        return self.seeded.statistics.time_to_first_canvas_ms / self.first.statistics.time_to_first_canvas_ms

    def record(self) -> dict[str, Any]:
        answers = {"first": self.first, "seeded": self.seeded, "uncached": self.uncached, "unseeded": self.unseeded}
        return {
            "prefilled_tokens": self.prefilled,
            "of_them_old": self.old_tokens,
            **{name: asdict(answer.statistics) for name, answer in answers.items()},
        }


def _second_turn(setting: Setting) -> Result:
    """Prefixes end with a page; those of seeded requests with a chunk, so that their tokens cannot differ."""
    with running_server(
        setting.engine("demo"), threads=THREADS, max_model_len=16384, max_batch_size=2, page_size=PAGE_SIZE
    ) as server:
        chats = [asyncio.run(_two_turns(server, number)) for number in range(1 if setting.quick else 5)]
    shortest = min(turns.first.statistics.num_input_tokens for turns in chats)
    seeded, unseeded = (max(turns.old_tokens[which] for turns in chats) for which in (0, 1))
    share = median(turns.share for turns in chats)
    same = sum(turns.seeded.token_ids == turns.uncached.token_ids for turns in chats)
    figure = (
        f"of {shortest:,} known tokens at most {unseeded:.0f} prefilled again, seeded {seeded:.0f}; first canvas in "
        f"{share:.2f} of the first turn's time; {same} of {len(chats)} identical"
    )
    once = unseeded < PAGE_SIZE and seeded < CHUNK
    good = shortest >= 8192 and once and share <= 1 / 3 and same == len(chats)
    return Result(figure, good, {"chats": [turns.record() for turns in chats]})


async def _two_turns(server: RunningServer, number: int) -> _Turns:
    told = conversation(number, 130)
    asked = chat(told[:-3], told[-3].prompt)
    async with Client(server.grpc_url, timeout_s=_HOUR_S) as client:
        first = await client.generate(messages=asked, seed=1, max_tokens=192)
        said: Message = {"role": "assistant", "content": first.text}
        one, other = ([*asked, said, {"role": "user", "content": example.prompt}] for example in told[-2:])
        counts = [await _prefilled(server)]
        seeded = await client.generate(messages=one, seed=2, max_tokens=192)
        counts.append(await _prefilled(server))
        unseeded = await client.generate(messages=other, max_tokens=192)
        counts.append(await _prefilled(server))
        uncached = await client.generate(messages=one, seed=2, max_tokens=192, cache_salt=f"uncached {number}")
    return _Turns(first, seeded, uncached, unseeded, (counts[1] - counts[0], counts[2] - counts[1]))


async def _prefilled(server: RunningServer) -> float:
    await asyncio.sleep(_PUBLISHED_S)
    return (await asyncio.to_thread(read_metrics, server.metrics_url))[_PREFILLED]


# ---------------------------------------------------------------- page exhaustion


def _exhaustion(setting: Setting) -> Result:
    """Eight requests that nearly fill a context each, most of it with output, in pages for little more than one."""
    context = 2048
    pages = context // PAGE_SIZE + 4
    with running_server(
        setting.engine("demo"),
        threads=THREADS,
        max_model_len=context,
        max_batch_size=8,
        page_size=PAGE_SIZE,
        full_pages=pages,
    ) as server:
        alone, together = asyncio.run(_alone_and_together(server.grpc_url))
    same = sum(one.token_ids == other.token_ids for one, other in zip(alone, together, strict=True))
    preemptions = sum(answer.statistics.preemptions for answer in together)
    tokens = sum(one.statistics.num_input_tokens + one.statistics.num_output_tokens for one in together)
    figure = f"{same} of {len(alone)} identical, {preemptions} preemptions; {tokens:,} tokens in {pages * PAGE_SIZE:,}"
    details = {"preemptions": [answer.statistics.preemptions for answer in together]}
    return Result(figure, same == len(alone) and preemptions > 0, details)


async def _alone_and_together(url: str) -> tuple[list[Answer], list[Answer]]:
    told = conversation(3, 24)
    chats = [chat(told[number : number + 5], told[number + 5].prompt) for number in range(8)]

    async with Client(url, timeout_s=_HOUR_S) as client:

        async def answer(number: int, salt: str) -> Answer:
            parameters: Parameters = {"seed": number, "max_tokens": 1280, "end_id": -1, "cache_salt": salt}
            return await client.generate(messages=chats[number], **parameters)

        alone = [await answer(number, f"alone {number}") for number in range(len(chats))]
        together = await asyncio.gather(*(answer(number, f"together {number}") for number in range(len(chats))))
    return alone, together


# ---------------------------------------------------------------- load


def _load(setting: Setting) -> Result:
    load = Load(clients=64, seconds=120.0, seed=0)
    runs = [stress(setting.engine("demo"), variant, load) for variant in variants(load.clients)]
    short = [f"{run.variant}: {check.what}: {check.figure}" for run in runs for check in run.checks if not check.passed]
    requests = " and ".join(f"{len(run.outcomes):,} requests ({run.variant})" for run in runs)
    details = {
        run.variant: {"requests": by_manner(run), "checks": [asdict(check) for check in run.checks]} for run in runs
    }
    return Result(f"{requests}; {'; '.join(short) or 'everything holds'}", not short, details)


# ---------------------------------------------------------------- throughput


@cache
def _points(setting: Setting) -> list[Point]:
    """The benchmark of many requests at once; takes minutes."""
    return concurrency.run(quick=False, say=lambda text: setting.console.print(f"[dim]{text}", highlight=False))


def _found(setting: Setting, scenario: str, count: int) -> Point:
    return next(point for point in _points(setting) if (point.scenario, point.concurrency) == (scenario, count))


def _of_engine_alone(setting: Setting) -> Result:
    found = [_found(setting, scenario, 8) for scenario in ("demo", "mid-size")]
    figure = ", ".join(f"{point.of_engine_alone:.1%} ({point.scenario})" for point in found)
    passed = all(point.of_engine_alone >= 0.9 for point in found)
    return Result(figure, passed, {"points": [asdict(point) for point in _points(setting)]})


def _beside_one(setting: Setting) -> Result:
    one, eight = (_found(setting, "demo", count).tokens_per_second for count in (1, 8))
    return Result(f"{eight / one:.2f}x ({eight:,.0f} and {one:,.0f} tokens/s)", eight >= 2 * one)


ROWS: tuple[Row, ...] = (
    Row(
        "second turn of a chat with an 8k prefix, over gRPC",
        f"only new tokens prefilled, but for less than a page ({PAGE_SIZE}; seeded: a chunk, {CHUNK}); first canvas in "
        "at most 1/3 of the time; same tokens",
        _second_turn,
    ),
    Row(
        "8 long requests in pages for little more than one context",
        "same tokens as alone; preempted at least once",
        _exhaustion,
    ),
    Row("8 requests at once: of what the engine alone does on the same batches", "90%", _of_engine_alone, quick=False),
    Row("8 requests at once beside one, demo", "at least 2x the tokens/s", _beside_one, quick=False),
    faster("mid-size", 8, "transformers", 1.5),
    Row("running canvases while 64k tokens are prefilled", "median step at most 2x", _pace_beside_prefill, quick=False),
    Row(
        "64 clients of every kind for 2 minutes, with enough pages and with few",
        "one end each, none hung, same tokens, pages free, memory flat",
        _load,
        quick=False,
    ),
    Row(
        "a request of the whole context, 262,144 tokens, over gRPC",
        "completes; peak memory within 10% of the plan",
        _whole_context,
        quick=False,
    ),
)
