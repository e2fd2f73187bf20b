"""What many requests at once cost: python -m dgemma_build.bench.concurrency [--quick] [--output DIRECTORY].

Our server over gRPC at 1 to 16 requests at once, all sent in one moment, fixed steps; in turns with it, the engine
alone on the same batches (replay_worker.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dgemma_build.bench.__main__ import DEMO, MID, ROOT, THREADS, prepare
from dgemma_build.bench.figure import GREEN, GREY, svg_figure
from dgemma_build.bench.report import Environment, points_line
from dgemma_build.bench.scenario import Level, Scenario, Workload
from dgemma_build.bench.worker import Worker
from dgemma_build.signals import exit_on_sigterm
from dgemma_client import Client, Delta
from dgemma_client.requests import Parameters
from dgemma_runtime.server import running_server

RESULT, PLOT = "concurrency.json", "concurrency.svg"
# Prompts come again in every round, and are not to be found in a cache.
SETTINGS: dict[str, Any] = {"max_batch_size": 16, "max_model_len": 8192, "prefix_cache": False}
LEVELS = {
    "demo": tuple(Level(count, canvases=4, steps=16, rounds=7) for count in (1, 2, 4, 8, 16)),
    "mid-size": tuple(Level(count, canvases=1, steps=4, rounds=3) for count in (1, 2, 4, 8, 16)),
}
QUICK_LEVELS = {"demo": tuple(Level(count, canvases=2, steps=8, rounds=3) for count in (1, 8))}


@dataclass(frozen=True)
class Point:
    """So many requests at once; medians over the rounds but for the percentiles, which are over all requests."""

    scenario: str
    concurrency: int
    tokens_per_second: float  # of all requests
    first_canvas_p50_ms: float
    first_canvas_p95_ms: float
    canvas_ms: float  # from one canvas of a request to its next; to the first where there is only one
    batch_size: float  # canvases per denoising pass
    engine_alone_tokens_per_second: float
    of_engine_alone: float  # of its tokens per second


@dataclass(frozen=True)
class Round:
    """The server once and the engine alone once."""

    seconds: float  # from the first request to the end of the last
    arrivals_s: tuple[tuple[float, ...], ...]  # of each request's canvases
    alone_s: float
    batch_size: float


def measure(scenario: Scenario, levels: Sequence[Level], say: Callable[[str], None]) -> list[Point]:
    """All points of one model."""
    text = json.loads((scenario.checkpoint / "config.json").read_text())
    vocab_size, canvas_length = text["text_config"]["vocab_size"], text["canvas_length"]
    points = []
    with ExitStack() as stack:
        say(f"{scenario.name}: starting")
        server = stack.enter_context(running_server(scenario.engine, threads=THREADS, **SETTINGS))
        module = "dgemma_build.bench.replay_worker"
        alone = stack.enter_context(Worker(module, THREADS, engine=str(scenario.engine), settings=SETTINGS))
        for level in levels:
            say(f"{scenario.name}: {level.concurrency} at once")
            workload = scenario.workload(level, vocab_size, canvas_length)
            asyncio.run(_serve(server.grpc_url, workload))  # warms up
            rounds = [_round(server.grpc_url, alone, workload) for _ in range(level.rounds)]
            points.append(point_of(scenario.name, workload, rounds))
    return points


def _round(url: str, alone: Worker, workload: Workload) -> Round:
    answer = alone.ask(**workload.message())
    seconds, arrivals = asyncio.run(_serve(url, workload))
    return Round(seconds, arrivals, answer["seconds"], answer["batch_size"])


async def _serve(url: str, workload: Workload) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """Seconds for all of it, and when each request's canvases came."""
    parameters: Parameters = {
        "max_tokens": workload.canvases * workload.canvas_length,
        "max_denoising_steps": workload.steps,
        "stability_threshold": -1,  # fixed steps
        "end_id": -1,  # no end token
        "seed": 0,
    }
    async with Client(url, timeout_s=600) as client:
        if not await client.is_live():  # also makes the connection, whose time is not to count
            raise RuntimeError(f"no server at {url}")
        started = time.perf_counter()

        async def arrivals(prompt: Sequence[int]) -> tuple[float, ...]:
            found = []
            async with aclosing(client.stream(input_ids=prompt, **parameters)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        found.append(time.perf_counter() - started)
            if len(found) != workload.canvases:
                raise RuntimeError(f"{len(found)} canvases instead of {workload.canvases}")
            return tuple(found)

        answers = await asyncio.gather(*(arrivals(prompt) for prompt in workload.prompts))
        return time.perf_counter() - started, tuple(answers)


def point_of(name: str, workload: Workload, rounds: Sequence[Round]) -> Point:
    """Of all rounds of one workload."""
    first = [1000 * times[0] for one in rounds for times in one.arrivals_s]
    between = [
        1000 * (after - before) for one in rounds for times in one.arrivals_s for before, after in pairwise(times)
    ]
    p50, p95 = np.percentile(first, (50, 95))
    return Point(
        scenario=name,
        concurrency=workload.concurrency,
        tokens_per_second=workload.tokens / median(one.seconds for one in rounds),
        first_canvas_p50_ms=float(p50),
        first_canvas_p95_ms=float(p95),
        canvas_ms=median(between or first),
        batch_size=median(one.batch_size for one in rounds),
        engine_alone_tokens_per_second=workload.tokens / median(one.alone_s for one in rounds),
        of_engine_alone=median(one.alone_s / one.seconds for one in rounds),
    )


# ---------------------------------------------------------------- report


def run(quick: bool, say: Callable[[str], None]) -> list[Point]:
    """Build what is missing and measure; of the demo model alone when quick."""
    points = []
    for scenario in (DEMO, MID):
        levels = (QUICK_LEVELS if quick else LEVELS).get(scenario.name, ())
        if levels:
            prepare(scenario)
            points += measure(scenario, levels, say)
    return points


def table(points: Sequence[Point], environment: Environment) -> Table:
    """One row per point."""
    result = Table(title=f"{environment}, {environment.threads} threads each", title_justify="left")
    result.add_column("model")
    for heading in (
        "at once",
        "tokens/s",
        "x one",
        "first canvas p50 ms",
        "p95 ms",
        "ms/canvas",
        "batch",
        "of engine alone",
    ):
        result.add_column(heading, justify="right")
    one = {point.scenario: point.tokens_per_second for point in points if point.concurrency == 1}
    for point in points:
        result.add_row(
            point.scenario,
            str(point.concurrency),
            f"{point.tokens_per_second:,.0f}",
            f"{point.tokens_per_second / one[point.scenario]:.2f}",
            f"{point.first_canvas_p50_ms:,.0f}",
            f"{point.first_canvas_p95_ms:,.0f}",
            f"{point.canvas_ms:,.0f}",
            f"{point.batch_size:.1f}",
            f"{point.of_engine_alone:.1%}",
        )
    return result


def plot(points: Sequence[Point], environment: Environment, path: Path) -> None:
    """Throughput and time to the first canvas over the number of requests, a row per model."""
    names = list(dict.fromkeys(point.scenario for point in points))
    title = f"Requests at once, fixed steps; {environment}"
    with svg_figure(path, title, (9, 2.6 * len(names)), rows=len(names), columns=3) as axes:
        for row, name in zip(axes, names, strict=True):
            chosen = [point for point in points if point.scenario == name]
            counts = [point.concurrency for point in chosen]
            alone = [point.engine_alone_tokens_per_second for point in chosen]
            row[0].plot(counts, alone, "o--", color=GREY, markersize=4, label="engine alone")
            row[0].plot(
                counts, [point.tokens_per_second for point in chosen], "o-", color=GREEN, markersize=4, label="server"
            )
            row[1].plot(
                counts, [point.first_canvas_p95_ms for point in chosen], "o--", color=GREY, markersize=4, label="p95"
            )
            row[1].plot(
                counts, [point.first_canvas_p50_ms for point in chosen], "o-", color=GREEN, markersize=4, label="p50"
            )
            row[2].plot(counts, [point.batch_size for point in chosen], "o-", color=GREEN, markersize=4)
            for axis, title in zip(row, ("tokens/s", "time to first canvas, ms", "canvases per pass"), strict=True):
                axis.set_title(f"{name}: {title}", fontsize=8)
                axis.set_xscale("log", base=2)
                axis.set_xticks(counts, [str(count) for count in counts])
                axis.set_ylim(bottom=0)
                axis.tick_params(labelsize=7)
            for axis in row[:2]:
                axis.legend(fontsize=7, frameon=False)


def write(points: Sequence[Point], environment: Environment, directory: Path) -> None:
    """The JSON line and the plot as files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULT).write_text(points_line("concurrency", points, environment) + "\n")
    plot(points, environment, directory / PLOT)


def main() -> None:
    """Table on stderr, the JSON line on stdout and, but for a quick run, both it and the plot as files."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_build.bench.concurrency", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the demo model at 1 and 8; writes nothing without --output"
    )
    parser.add_argument("--output", type=Path, help=f"directory for {RESULT} and {PLOT}; the repository's benchmarks/")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=140)
    environment = Environment.here(THREADS)
    with console.status("starting") as status:
        points = run(arguments.quick, status.update)
    console.print(table(points, environment))
    print(points_line("concurrency", points, environment))
    if output := arguments.output or (None if arguments.quick else ROOT / "benchmarks"):
        write(points, environment, output)


if __name__ == "__main__":
    exit_on_sigterm()
    main()
