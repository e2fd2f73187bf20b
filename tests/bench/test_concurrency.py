"""Many requests at once: what a point is made of, what a run leaves, and what a recorder keeps of a service."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dgemma_build.bench import concurrency
from dgemma_build.bench.replay_worker import Recorder
from dgemma_build.bench.report import Environment
from dgemma_build.bench.scenario import Workload
from dgemma_runtime.parameters import parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.testing import Recorder as Sink
from dgemma_runtime.testing import scripted_engine, start_service

WORKLOAD = Workload(prompts=((1, 2), (3, 4)), canvases=2, steps=5, canvas_length=10)
ENVIRONMENT = Environment("a machine, 2 cores", "abc", "2026-11-21 12:00", 0.1, 2, {"torch": "2"})


def point(concurrent: int, alone_s: float = 1.8) -> concurrency.Point:
    workload = Workload(WORKLOAD.prompts[:concurrent], 2, 5, 10)
    arrivals = ((0.5, 2.0), (1.5, 2.0))[:concurrent]
    rounds = [concurrency.Round(seconds, arrivals, alone_s, 1.5) for seconds in (2.0, 1.0, 4.0)]
    return concurrency.point_of("demo", workload, rounds)


def test_a_point_holds_medians_and_percentiles() -> None:
    made = point(2)

    assert made.tokens_per_second == pytest.approx(2 * 2 * 10 / 2.0)
    assert made.first_canvas_p50_ms == pytest.approx(1000.0)
    assert made.first_canvas_p95_ms == pytest.approx(1500.0)
    assert made.canvas_ms == pytest.approx(1000.0)
    assert made.engine_alone_tokens_per_second == pytest.approx(40 / 1.8)
    assert made.of_engine_alone == pytest.approx(0.9)
    assert made.batch_size == 1.5


def test_report_of_a_run(tmp_path: Path) -> None:
    points = [point(1), point(2)]

    console = Console(record=True, width=200, file=io.StringIO())
    console.print(concurrency.table(points, ENVIRONMENT))
    concurrency.write(points, ENVIRONMENT, tmp_path)

    row = next(line for line in console.export_text().splitlines() if "│       2 │" in line)
    assert [column.strip() for column in row.split("│")[2:5]] == ["2", "20", "2.00"]
    document = json.loads((tmp_path / concurrency.RESULT).read_text())
    assert [one["concurrency"] for one in document["points"]] == [1, 2]
    assert "<svg" in (tmp_path / concurrency.PLOT).read_text()


def test_a_recorder_keeps_the_calls_of_a_service_in_order() -> None:
    inner = scripted_engine({"hi": "some answer that takes two canvases"})
    recorder = Recorder(inner)
    service = start_service(recorder)
    sink = Sink()
    try:
        service.submit(GenerationRequest("hi", parse_parameters({"seed": 1}, service.defaults)), sink)
        finished = sink.finished()
    finally:
        service.stop()

    assert finished.error is None
    assert sum(recorder.batches) == finished.statistics.denoising_steps
    assert len(recorder.calls) > len(recorder.batches), "prefill and release are calls too"
    assert np.mean(recorder.batches) == 1
