"""What is counted and timed, per request and for the whole service. Knows no transport."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dgemma_runtime.drafting.proposal import DraftOutcome


class Stopwatch:
    """Adds up the time of one kind of work. One thread runs it, any may read, also while it is running."""

    def __init__(self) -> None:
        self._state = (0, 0)  # nanoseconds of what has ended; when the present run began, 0 for none

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around one piece of the work."""
        total, started = self._state[0], time.perf_counter_ns()
        self._state = (total, started)
        try:
            yield
        finally:
            self._state = (total + time.perf_counter_ns() - started, 0)

    def read_ns(self) -> int:
        """Nanoseconds, all together."""
        total, started = self._state
        return total + (time.perf_counter_ns() - started if started else 0)


@dataclass
class Mean:
    """Of all that was added; 0 before the first."""

    value: float = 0.0
    count: int = 0

    def add(self, number: float) -> None:
        self.count += 1
        self.value += (number - self.value) / self.count


@dataclass(frozen=True)
class DraftStatistics:
    """Of one drafter in one request."""

    drafter: str
    canvases: int = 0  # that started from its drafts
    drafted_tokens: int = 0  # that the denoiser was shown, of those emitted
    accepted_tokens: int = 0  # of these, as they were committed
    steps_saved: float = 0.0  # against the mean of all canvases without a draft so far; below 0 where more were taken

    def with_canvas(self, outcome: DraftOutcome, steps_saved: float) -> DraftStatistics:
        """And one canvas more."""
        return DraftStatistics(
            self.drafter,
            self.canvases + 1,
            self.drafted_tokens + outcome.drafted,
            self.accepted_tokens + outcome.accepted,
            self.steps_saved + steps_saved,
        )


@dataclass(frozen=True)
class RequestStatistics:
    """Of one request, at its end."""

    num_input_tokens: int
    num_output_tokens: int
    denoising_steps: int
    canvases: int  # whose text was emitted
    tokens_per_forward: float  # output tokens per denoising step; 0 where no step ran
    prefix_tokens: int  # of the input tokens, found in the prefix cache
    preemptions: int  # how often it lost its pages and started again from its last canvas
    queue_ms: float  # submitted -> admitted (-> end, where it never was)
    prefill_ms: float  # admitted -> the whole prompt is in the cache
    time_to_first_canvas_ms: float | None  # submitted -> first commit; None where there was none
    total_ms: float  # submitted -> end
    engine_ms: float  # of total_ms, spent inside engine calls, whichever rows they served
    drafts: tuple[DraftStatistics, ...] = ()  # by drafter, of those that drafted something
    hole_tokens: int | None = None  # with a suffix: the hole's length, as it was chosen
    suffix_tokens: int | None = None  # with a suffix: how many of its tokens the canvas had, from its beginning


def unqueued(num_input_tokens: int, nanoseconds: int) -> RequestStatistics:
    """Of a request that was answered at once, with no output and without the engine."""
    return RequestStatistics(
        num_input_tokens=num_input_tokens,
        num_output_tokens=0,
        denoising_steps=0,
        canvases=0,
        tokens_per_forward=0.0,
        prefix_tokens=0,
        preemptions=0,
        queue_ms=0.0,
        prefill_ms=0.0,
        time_to_first_canvas_ms=None,
        total_ms=nanoseconds / 1e6,
        engine_ms=0.0,
    )


@dataclass(frozen=True)
class ServiceStatistics:
    """Since the service started. `host_ms` is the engine thread's time at work outside of engine calls."""

    ticks: int
    canvas_steps: int  # denoising steps, counted per canvas
    encoded_tokens: int
    engine_ms: float
    host_ms: float
    requests_waiting: int
    requests_running: int
    full_pages_used: int  # held by running requests
    sliding_pages_used: int
    full_pages_idle: int  # held by nobody, kept for the prefix cache
    sliding_pages_idle: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # prompt tokens found there
    evictions: int  # cached pages that made room, of both kinds
    preemptions: int
