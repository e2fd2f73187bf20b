"""Runs the contenders of a scenario in turns, so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from dgemma_build.bench.contenders import COMPILED, Contender, InProcess, Server, Transformers
from dgemma_build.bench.scenario import Cell, Level, Run, Scenario, Workload

Progress = Callable[[str], None]


def measure(scenario: Scenario, threads: int, compiled: bool, progress: Progress) -> list[Cell]:
    """All cells of a scenario; compiled: also transformers' torch.compile path, which takes a minute to compile."""
    text = json.loads((scenario.checkpoint / "config.json").read_text())
    vocab_size, canvas_length = text["text_config"]["vocab_size"], text["canvas_length"]
    cells: list[Cell] = []
    with ExitStack() as stack:
        progress(f"{scenario.name}: starting the contenders")
        contenders: list[Contender] = [
            Transformers(stack, scenario.checkpoint, threads, compiled=False),
            *([Transformers(stack, scenario.checkpoint, threads, compiled=True)] if compiled else []),
            InProcess(stack, scenario.engine, threads),
            Server(stack, scenario.engine, threads),
        ]
        for level in scenario.levels:
            workload = scenario.workload(level, vocab_size, canvas_length)
            chosen = [one for one in contenders if level.compiled or one.name != COMPILED]
            cells += _measure_level(scenario.name, level, workload, chosen, progress)
    return cells


def _measure_level(
    name: str, level: Level, workload: Workload, contenders: Sequence[Contender], progress: Progress
) -> list[Cell]:
    schedules = {}
    for contender in contenders:
        progress(f"{name}, {level.concurrency} at once: warming up {contender.name}")
        schedules[contender.name] = _better_schedule(contender, workload)
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for number in range(level.rounds):
        order = contenders if number % 2 == 0 else list(reversed(contenders))
        for contender in order:
            progress(f"{name}, {level.concurrency} at once: round {number + 1}/{level.rounds}, {contender.name}")
            runs[contender.name].append(contender.run(workload, schedules[contender.name]))
    return [
        Cell.of(
            name,
            contender.name,
            schedules[contender.name],
            workload,
            runs[contender.name],
            contender.peak_memory_bytes(),
        )
        for contender in contenders
    ]


def _better_schedule(contender: Contender, workload: Workload) -> str:
    """Warm the contender up with the whole workload, which compiles what it compiles, and find its faster schedule."""
    schedules = contender.schedules if workload.concurrency > 1 else contender.schedules[:1]
    for schedule in schedules:
        contender.run(workload, schedule)
    if len(schedules) == 1:
        return schedules[0]
    return min(schedules, key=lambda schedule: contender.run(workload, schedule).seconds)
