"""What a benchmark run leaves: a table for the terminal, one JSON line, a plot. Knows no contender."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from dgemma_build.bench.figure import GREEN, GREY, svg_figure
from dgemma_build.bench.scenario import Cell, speedup

SERVER, ENGINE = "server over gRPC", "engine in process"
BASELINES = ("transformers", "transformers, compiled")


@dataclass(frozen=True)
class Environment:
    """Where and when figures were taken."""

    device: str
    commit: str
    date: str  # UTC
    load: float  # of the machine in the minute before: figures of a busy machine are worth little
    threads: int
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{self.device} (load {self.load:.1f} before), commit {self.commit}, {self.date}"

    @staticmethod
    def here(threads: int) -> Environment:
        return Environment(
            device=f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
            commit=_commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            load=os.getloadavg()[0],
            threads=threads,
            versions={name: version(name) for name in ("torch", "transformers", "onnxruntime", "nvidia-pytriton")},
        )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Short hash of the checkout, with `+` where files differ from it; says so where there is none."""
    folder = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--match="],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip() if run.returncode == 0 else "not a git checkout"


@dataclass(frozen=True)
class Ratio:
    """How many times faster one of ours is than a baseline; least and largest over the interleaved rounds."""

    scenario: str
    concurrency: int
    contender: str
    baseline: str
    times: float
    least: float
    largest: float


def ratios(cells: Sequence[Cell]) -> list[Ratio]:
    """Ours against every baseline of the same scenario and concurrency."""
    found = []
    for cell in cells:
        for other in cells:
            same = (cell.scenario, cell.concurrency) == (other.scenario, other.concurrency)
            if same and cell.contender in (SERVER, ENGINE) and other.contender in BASELINES:
                place = (cell.scenario, cell.concurrency, cell.contender, other.contender)
                found.append(Ratio(*place, *speedup(cell, other)))
    return found


def table(cells: Sequence[Cell], environment: Environment) -> Table:
    """One row per cell."""
    title = f"{environment}, {environment.threads} threads each"
    result = Table(title=title, title_justify="left")
    for heading in ("model", "at once", "contender"):
        result.add_column(heading)
    numbers = ("tokens/s", "ms/step", "first canvas ms", "peak MB", "outside engine", "x eager", "x compiled")
    for heading in numbers:
        result.add_column(heading, justify="right")
    times = {(r.scenario, r.concurrency, r.contender, r.baseline): r.times for r in ratios(cells)}
    previous = cells[0] if cells else None
    for cell in cells:
        if previous and (cell.scenario, cell.concurrency) != (previous.scenario, previous.concurrency):
            result.add_section()
        previous = cell
        schedule = f" ({cell.schedule})" if cell.concurrency > 1 and cell.contender in BASELINES else ""
        found = [times.get((cell.scenario, cell.concurrency, cell.contender, name)) for name in BASELINES]
        result.add_row(
            cell.scenario,
            str(cell.concurrency),
            cell.contender + schedule,
            f"{cell.tokens_per_second:,.0f}",
            f"{cell.step_ms:,.1f}",
            f"{cell.first_canvas_ms:,.0f}",
            f"{cell.peak_memory_mb:,.0f}",
            "" if cell.outside_engine is None else f"{cell.outside_engine:.1%}",
            *("" if ratio is None else f"{ratio:.1f}" for ratio in found),
        )
    return result


def json_line(cells: Sequence[Cell], environment: Environment) -> str:
    """Everything, on one line."""
    content: dict[str, Any] = {
        "benchmark": "generate",
        **asdict(environment),
        "cells": [asdict(cell) for cell in cells],
        "ratios": [asdict(ratio) for ratio in ratios(cells)],
    }
    return json.dumps(_rounded(content))


def points_line(benchmark: str, points: Sequence[Any], environment: Environment) -> str:
    """Everything of a benchmark whose figures are a list of points (dataclasses), on one line."""
    content = {"benchmark": benchmark, **asdict(environment), "points": [asdict(point) for point in points]}
    return json.dumps(_rounded(content))


def _rounded(value: Any) -> Any:
    """Every number in it to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def plot(cells: Sequence[Cell], environment: Environment, path: Path) -> None:
    """Tokens per second as bars, a panel per model and concurrency."""
    places = list(dict.fromkeys((cell.scenario, cell.concurrency) for cell in cells))
    with svg_figure(path, f"Fixed steps; {environment}", (3.1 * len(places), 3.2), columns=len(places)) as axes:
        for axis, place in zip(axes[0], places, strict=True):
            chosen = [cell for cell in cells if (cell.scenario, cell.concurrency) == place]
            colours = [GREY if cell.contender in BASELINES else GREEN for cell in chosen]
            names = [
                cell.contender.replace(", ", ",\n").replace(" over", "\nover").replace(" in", "\nin") for cell in chosen
            ]
            bars = axis.bar(names, [cell.tokens_per_second for cell in chosen], color=colours)
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
            axis.set_title(f"{place[0]}, {place[1]} at once", fontsize=9)
            axis.tick_params(axis="x", labelsize=6)
            axis.tick_params(axis="y", labelsize=7)
        axes[0][0].set_ylabel("tokens/s", fontsize=8)
