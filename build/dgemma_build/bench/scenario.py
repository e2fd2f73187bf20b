"""What is measured and what comes of it, as plain data. Knows no contender."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """The same for every contender: fixed steps, no end token, so all make the same number of tokens."""

    prompts: tuple[tuple[int, ...], ...]  # one per concurrent request, of one length
    canvases: int
    steps: int  # per canvas
    canvas_length: int

    @property
    def concurrency(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Output tokens of all requests."""
        return self.concurrency * self.canvases * self.canvas_length

    def message(self) -> dict[str, Any]:
        """For a worker."""
        return {
            "prompts": self.prompts,
            "canvases": self.canvases,
            "steps": self.steps,
            "canvas_length": self.canvas_length,
        }


@dataclass(frozen=True)
class Level:
    """So many requests at once, and how much of it is timed."""

    concurrency: int
    canvases: int  # per request
    steps: int  # per canvas
    rounds: int
    compiled: bool = True  # also by transformers' torch.compile path


@dataclass(frozen=True)
class Scenario:
    """A model under several levels of load."""

    name: str
    checkpoint: Path
    engine: Path
    prompt_tokens: int
    levels: tuple[Level, ...]

    def workload(self, level: Level, vocab_size: int, canvas_length: int) -> Workload:
        """Random prompts, the same in every run."""
        rng = np.random.default_rng(level.concurrency)
        prompts = rng.integers(20, vocab_size, (level.concurrency, self.prompt_tokens))
        rows = tuple(tuple(int(token) for token in row) for row in prompts)
        return Workload(rows, level.canvases, level.steps, canvas_length)


@dataclass(frozen=True)
class Run:
    """One contender, one workload, once."""

    seconds: float  # from the first request to the end of the last
    first_canvas_s: float  # mean over the requests, all of which arrive at the start
    outside_engine: float | None = None  # share of the time not spent in engine calls; None: it has no engine


@dataclass(frozen=True)
class Cell:
    """One contender under one workload: medians over the rounds."""

    scenario: str
    concurrency: int
    contender: str
    schedule: str  # how several requests were run
    tokens_per_second: float
    step_ms: float  # wall time per denoising step of all requests, prefill and commits included
    first_canvas_ms: float
    peak_memory_mb: float
    outside_engine: float | None  # share of the wall time
    rounds_s: tuple[float, ...]

    @staticmethod
    def of(
        scenario: str, contender: str, schedule: str, workload: Workload, runs: list[Run], peak_memory_bytes: int
    ) -> Cell:
        seconds = median(run.seconds for run in runs)
        outside = [run.outside_engine for run in runs if run.outside_engine is not None]
        return Cell(
            scenario=scenario,
            concurrency=workload.concurrency,
            contender=contender,
            schedule=schedule,
            tokens_per_second=workload.tokens / seconds,
            step_ms=1000 * seconds / (workload.canvases * workload.steps),
            first_canvas_ms=1000 * median(run.first_canvas_s for run in runs),
            peak_memory_mb=peak_memory_bytes / 1e6,
            outside_engine=median(outside) if outside else None,
            rounds_s=tuple(run.seconds for run in runs),
        )


def speedup(cell: Cell, baseline: Cell) -> tuple[float, float, float]:
    """How many times faster `cell` is than `baseline`: median, least and largest over the interleaved rounds."""
    ratios = [theirs / ours for ours, theirs in zip(cell.rounds_s, baseline.rounds_s, strict=True)]
    return median(ratios), min(ratios), max(ratios)
