"""The whole of a stress run: a server, references, the load, and what must hold after it. Draws no table."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_build.stress.clients import Outcome, Site
from dgemma_build.stress.load import UNDISTURBED, WEIGHTS, Question, questions
from dgemma_build.stress.watch import ACCEPTED, FINISHED, PREEMPTIONS, Sample, read_metrics, sample, watch
from dgemma_client import Client, ClientError
from dgemma_runtime.server import RunningServer, running_server

MAX_MODEL_LEN, PAGE_SIZE, TURNS = 2048, 64, 16
MEMORY_BAR = 0.05  # how much higher the last third's peak of memory may be than the middle third's
_SETTLE_S = 10.0  # for the server to notice that the last clients have gone


@dataclass(frozen=True)
class Variant:
    """How the server is set up."""

    name: str
    settings: Mapping[str, Any]  # of `running_server`
    preempts: bool = False  # whether there must be preemptions


@dataclass(frozen=True)
class Load:
    """How much is sent."""

    clients: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    what: str
    figure: str
    passed: bool


@dataclass(frozen=True)
class Stressed:
    """What came of one variant."""

    variant: str
    load: Load
    outcomes: tuple[Outcome, ...]
    samples: tuple[Sample, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def variants(clients: int) -> tuple[Variant, Variant]:
    """Room for eight whole contexts, and for little more than one; queues that overflow."""
    batch = max(4, clients // 8)
    settings = {"threads": 2, "max_batch_size": batch, "max_model_len": MAX_MODEL_LEN, "page_size": PAGE_SIZE}
    settings["queue_size"] = clients - batch - max(2, clients // 16)
    whole = MAX_MODEL_LEN // PAGE_SIZE
    return (
        Variant("enough pages", {**settings, "full_pages": whole * batch}),
        Variant("few pages", {**settings, "full_pages": whole + 4}, preempts=True),
    )


def stress(engine: Path, variant: Variant, load: Load) -> Stressed:
    """Start a server, send the load, look at what is left, stop the server."""
    with running_server(engine, **variant.settings) as server:
        return asyncio.run(_stress(server, variant, load))


async def _stress(server: RunningServer, variant: Variant, load: Load) -> Stressed:
    asked = questions(TURNS)
    references = await answers(server.grpc_url, asked, "before")
    await _warm_up(server.grpc_url, asked, variant.settings["max_batch_size"])
    outcomes, samples = await _under_load(server, load, asked, references)
    try:
        checks = [*request_checks(outcomes), *await _checks_of_server(server, variant, asked, references, samples)]
    except (ClientError, OSError) as error:
        said = f"{type(error).__name__}: {error}\n{server.log_tail(5)}"
        checks = [*request_checks(outcomes), Check("the server still serves", said, False)]
    return Stressed(variant.name, load, tuple(outcomes), tuple(samples), tuple(checks))


async def _checks_of_server(
    server: RunningServer,
    variant: Variant,
    asked: Sequence[Question],
    references: Mapping[str, tuple[int, ...]],
    samples: Sequence[Sample],
) -> list[Check]:
    """What must hold after the load; raises ClientError or OSError where nobody answers."""
    last = await _settled(server)
    again = await answers(server.grpc_url, asked, "after")
    metrics = await _counted(server)
    changed = sum(again[name] != reference for name, reference in references.items())
    checks = [
        Check(
            "running and waiting at the end", f"{last.running:g} and {last.waiting:g}", not last.running + last.waiting
        ),
        Check("pages referenced at the end", f"{last.pages:.1%}", last.pages == 0),
        Check(
            "requests accepted, and ended, by the server's count",
            f"{metrics[ACCEPTED]:g}, {metrics[FINISHED]:g}",
            metrics[ACCEPTED] == metrics[FINISHED],
        ),
        memory_check(samples),
        Check("server ready, its process alive", "", bool(server.model_ready()) and server.model_process_alive()),
        Check("answers after the load equal those before", f"{changed} of {len(again)} differ", not changed),
    ]
    if variant.preempts:
        preemptions = metrics[PREEMPTIONS]
        checks.append(Check("preemptions", f"{preemptions:g}", preemptions > 0))
    return checks


async def answers(url: str, asked: Sequence[Question], salt: str) -> dict[str, tuple[int, ...]]:
    """Every question's answer, one at a time and with nothing cached."""
    found = {}
    async with Client(url) as client:
        for number, question in enumerate(asked):
            result = await client.generate(
                messages=question.messages,
                seed=question.seed,
                max_tokens=question.max_tokens,
                cache_salt=f"{salt} {number}",
            )
            found[question.name] = result.token_ids
    return found


async def _warm_up(url: str, asked: Sequence[Question], batch: int) -> None:
    """The longest questions in every slot at once, nothing shared: what memory there is to take is taken."""
    longest = sorted(asked, key=lambda question: len(question.messages))[-2:]
    for turn in range(2):
        salted = [(question, f"warm-up {turn} {slot}") for slot in range(batch // 2 + 1) for question in longest]
        await asyncio.gather(*(answers(url, [question], salt) for question, salt in salted))


async def _under_load(
    server: RunningServer, load: Load, asked: list[Question], references: Mapping[str, tuple[int, ...]]
) -> tuple[list[Outcome], list[Sample]]:
    outcomes: list[Outcome] = []
    samples: list[Sample] = []
    site = Site(server.grpc_url, MAX_MODEL_LEN, references)
    watcher = asyncio.create_task(watch(server, samples))
    until = asyncio.get_running_loop().time() + load.seconds
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(load.clients):
                rng = random.Random(f"{load.seed} {number}")
                group.create_task(site.live(rng, asked, until, outcomes))
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])
        await site.close()
    return outcomes, samples


async def _settled(server: RunningServer) -> Sample:
    """The first moment at which nothing is under way, or the last that was waited for."""
    end = time.monotonic() + _SETTLE_S
    while True:
        found = await asyncio.to_thread(sample, server, end - _SETTLE_S)
        if not (found.running or found.waiting or found.pages) or time.monotonic() > end:
            return found
        await asyncio.sleep(0.1)


async def _counted(server: RunningServer) -> dict[str, float]:
    """The metrics, once they count as many ends as requests, or as they are at last; they are published in turns."""
    end = time.monotonic() + _SETTLE_S
    while True:
        metrics = await asyncio.to_thread(read_metrics, server.metrics_url)
        if metrics[ACCEPTED] == metrics[FINISHED] or time.monotonic() > end:
            return metrics
        await asyncio.sleep(0.2)


def request_checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """That every request ended once and as it may, that none was left out, and that answers were compared."""
    problems = [outcome.problem for outcome in outcomes if outcome.problem is not None]
    shown = f"{len(problems)} of {len(outcomes)} did not" + (f", the first: {problems[0]}" if problems else "")
    missing = [manner for manner in WEIGHTS if not any(outcome.manner == manner for outcome in outcomes)]
    compared = sum(outcome.compared for outcome in outcomes if outcome.manner in UNDISTURBED)
    refused = sum(outcome.end == "overloaded" for outcome in outcomes)
    return [
        Check("every request ended once, as it may, with the right tokens", shown, not problems),
        Check("requests of every kind", ", ".join(missing) or "all", not missing),
        Check("whole answers equal to the undisturbed ones", str(compared), compared > 0),
        Check("requests refused because the queue was full", str(refused), refused > 0),
    ]


def memory_check(samples: Sequence[Sample]) -> Check:
    """The first third warms up; after it the peak may hardly move."""
    third = len(samples) // 3
    assert third, "too short a run to say anything of memory"
    middle, last = (
        max(one.resident_bytes for one in part) for part in (samples[third : 2 * third], samples[2 * third :])
    )
    growth = last / middle - 1
    figure = f"{middle / 1e6:.0f} MB in the middle third, {last / 1e6:.0f} MB in the last ({growth:+.1%})"
    return Check(f"peak memory grows by at most {MEMORY_BAR:.0%}", figure, growth <= MEMORY_BAR)
