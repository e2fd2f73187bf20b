"""The benchmark's arithmetic and plumbing: cells, ratios, table, JSON line, plot, workers, memory."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dgemma_build.bench import report
from dgemma_build.bench.measure import _better_schedule
from dgemma_build.bench.scenario import Cell, Level, Run, Scenario, Workload, speedup
from dgemma_build.bench.worker import Worker, WorkerFailed, peak_memory_bytes

WORKLOAD = Workload(prompts=((1, 2), (3, 4)), canvases=3, steps=5, canvas_length=10)
ENVIRONMENT = report.Environment("a machine, 2 cores", "abc", "2026-11-21 12:00", 0.1, 2, {"torch": "2"})


def cell(contender: str, seconds: list[float], outside: float | None = None) -> Cell:
    runs = [Run(value, value / 2, outside) for value in seconds]
    return Cell.of("demo", contender, "batch", WORKLOAD, runs, 50_000_000)


def test_a_cell_holds_medians() -> None:
    made = cell(report.SERVER, [2.0, 1.0, 4.0], outside=0.25)

    assert made.tokens_per_second == pytest.approx(2 * 3 * 10 / 2.0)
    assert made.step_ms == pytest.approx(1000 * 2.0 / 15)
    assert made.first_canvas_ms == pytest.approx(1000.0)
    assert made.peak_memory_mb == 50
    assert made.outside_engine == 0.25


def test_a_speedup_compares_round_with_round() -> None:
    ours, theirs = cell(report.SERVER, [1.0, 2.0, 1.0]), cell(report.BASELINES[0], [8.0, 18.0, 6.0])

    assert speedup(ours, theirs) == (8.0, 6.0, 9.0)


def test_report_of_a_run(tmp_path: Path) -> None:
    cells = [cell(name, [4.0]) for name in report.BASELINES]
    cells += [cell(report.ENGINE, [1.0], 0.75), cell(report.SERVER, [2.0], 0.25)]

    line = report.json_line(cells, ENVIRONMENT)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report.table(cells, ENVIRONMENT))
    text = console.export_text()
    report.plot(cells, ENVIRONMENT, tmp_path / "plot.svg")

    assert "\n" not in line
    document = json.loads(line)
    assert [(r["contender"], r["baseline"], r["times"]) for r in document["ratios"]] == [
        (report.ENGINE, report.BASELINES[0], 4.0),
        (report.ENGINE, report.BASELINES[1], 4.0),
        (report.SERVER, report.BASELINES[0], 2.0),
        (report.SERVER, report.BASELINES[1], 2.0),
    ]
    server = next(row for row in text.splitlines() if report.SERVER in row)
    assert "25.0%" in server
    assert [column.strip() for column in server.split("│")[-3:-1]] == ["2.0", "2.0"]
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_workloads_are_the_same_in_every_run(tmp_path: Path) -> None:
    scenario = Scenario("demo", tmp_path, tmp_path, prompt_tokens=7, levels=())
    level = Level(concurrency=3, canvases=2, steps=4, rounds=1)

    first, second = (scenario.workload(level, vocab_size=100, canvas_length=8) for _ in range(2))

    assert first == second
    assert [len(prompt) for prompt in first.prompts] == [7, 7, 7]
    assert len(set(first.prompts)) == 3
    assert first.tokens == 3 * 2 * 8


def test_the_faster_schedule_is_taken_after_a_warm_up() -> None:
    class Fake:
        name = "fake"
        schedules: tuple[str, ...] = ("one by one", "batch")

        def __init__(self) -> None:
            self.seen: list[str] = []

        def run(self, workload: Workload, schedule: str) -> Run:
            warm = self.seen.count(schedule) >= 1
            self.seen.append(schedule)
            return Run({"one by one": 2.0, "batch": 1.0 if warm else 100.0}[schedule], 0.0)

        def peak_memory_bytes(self) -> int:
            return 0

    assert _better_schedule(Fake(), WORKLOAD) == "batch"


# ---------------------------------------------------------------- workers

_ECHO = """
from dgemma_build.bench.worker import serve

def start(message):
    if message["threads"] != 2:
        raise ValueError("two threads, please")
    print("this goes to standard error")
    def handle(request):
        if request.get("end"):
            raise SystemExit(3)
        return {"twice": 2 * request["number"]}
    return handle

serve(start)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    def make() -> str:
        (tmp_path / "echo_worker.py").write_text(_ECHO)
        monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
        return "echo_worker"

    return make


def test_a_worker_answers_in_a_process_of_its_own(module: Callable[[], str]) -> None:
    with Worker(module(), threads=2) as worker:
        assert worker.ask(number=21) == {"twice": 42}
        assert worker.ask(number=4) == {"twice": 8}
        assert 1e6 < peak_memory_bytes(worker.pid) < 1e9
        with pytest.raises(WorkerFailed, match="KeyError"):
            worker.ask(count=1)
        assert worker.ask(number=1) == {"twice": 2}


def test_a_worker_that_cannot_start_or_ends_says_so(module: Callable[[], str]) -> None:
    name = module()
    with pytest.raises(WorkerFailed, match="two threads, please"):
        Worker(name, threads=1)
    with Worker(name, threads=2) as worker, pytest.raises(WorkerFailed, match="exit code 3"):
        worker.ask(end=True)
