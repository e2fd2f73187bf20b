"""Memory and metrics of a server over time. Knows names of metrics and processes, no request."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from dgemma_runtime.server import RunningServer

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PAGES, PREEMPTIONS = "vllm:kv_cache_usage_perc", "dgemma_preemptions_total"
ACCEPTED, FINISHED = "dgemma_requests_accepted_total", "dgemma_requests_finished_total"
_EVERY_S = 0.5


@dataclass(frozen=True)
class Sample:
    """One moment."""

    seconds: float  # since the load began
    resident_bytes: int  # of Triton and the model's process
    running: float
    waiting: float
    pages: float  # share of the pages that are referenced by requests


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    total = 0
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def read_metrics(url: str) -> dict[str, float]:
    """Each family's value, summed over its labels; raises OSError where the server does not answer."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return parse_metrics(answer.read().decode())


def parse_metrics(text: str) -> dict[str, float]:
    """Of Prometheus' text format."""
    values: defaultdict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            values[series.partition("{")[0]] += float(value)
    return dict(values)


def sample(server: RunningServer, started: float) -> Sample:
    """Now; raises KeyError where the server does not show a metric."""
    metrics: Mapping[str, float] = read_metrics(server.metrics_url)
    return Sample(
        seconds=time.monotonic() - started,
        resident_bytes=resident_bytes(server.pid),
        running=metrics[RUNNING],
        waiting=metrics[WAITING],
        pages=metrics[PAGES],
    )


async def watch(server: RunningServer, samples: list[Sample]) -> None:
    """Add a sample twice a second until cancelled; stops where the server does not answer any more."""
    started = time.monotonic()
    while True:
        try:
            samples.append(await asyncio.to_thread(sample, server, started))
        except (OSError, psutil.NoSuchProcess):
            return
        await asyncio.sleep(_EVERY_S)
