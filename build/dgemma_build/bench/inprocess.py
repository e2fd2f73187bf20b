"""Our service in this process, without Triton: start it on an engine directory, run requests, keep what came when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgemma_build.emulation import EmulatedBackend, open_emulated
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Engine, EngineLimits, Manifest
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.events import Commit, Event, Finished, Sink
from dgemma_runtime.parameters import default_parameters
from dgemma_runtime.service import GenerationRequest, Service
from dgemma_runtime.settings import RuntimeSettings, plan_limits

_ANSWER_TIMEOUT_S = 600.0


@dataclass
class Outcome:
    """What one request received."""

    submitted_s: float  # of time.perf_counter
    commits: list[tuple[float, Commit]] = field(default_factory=list)  # when, what
    finished_s: float = 0.0
    finished: Finished | None = None

    def result(self) -> Finished:
        """The last event; raises RuntimeError where the request did not end well."""
        if self.finished is None or self.finished.error is not None:
            raise RuntimeError(f"the request failed: {self.finished and self.finished.error}")
        return self.finished


def open_measured(directory: Path, limits: EngineLimits, threads: int, draft_model: str | None = None) -> Engine:
    """An engine that runs on this machine: ONNX Runtime's, or TensorRT's graph emulated on it."""
    drafter = None if draft_model is None else Path(draft_model)
    if Manifest.load(directory, verify_hashes=False).target == EmulatedBackend.target:
        return open_emulated(directory, limits, threads, drafter)
    return OnnxRuntimeEngine(directory, limits, threads, drafter)


@contextmanager
def running_service(directory: Path, max_batch_size: int = 4, threads: int = 0, **more: Any) -> Iterator[Service]:
    """A started service on an engine directory; stopped on leaving. `more` are more of RuntimeSettings."""
    settings = RuntimeSettings(max_batch_size=max_batch_size, threads=threads, **more)
    manifest = Manifest.load(directory)
    engine = open_measured(directory, plan_limits(manifest, settings), threads, settings.draft_model)
    defaults = default_parameters(manifest.generation_defaults)
    service = Service(engine, Codec.load(directory), settings, defaults)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def run_requests(service: Service, requests: Sequence[GenerationRequest], stagger_s: float = 0.0) -> list[Outcome]:
    """Submit all requests, `stagger_s` apart, and wait for every one to end."""
    outcomes: list[Outcome] = []
    done = threading.Semaphore(0)
    for request in requests:
        outcomes.append(Outcome(time.perf_counter()))
        service.submit(request, _sink_of(outcomes[-1], done))
        if stagger_s:
            time.sleep(stagger_s)
    for _ in requests:
        if not done.acquire(timeout=_ANSWER_TIMEOUT_S):
            raise TimeoutError(f"no answer within {_ANSWER_TIMEOUT_S:g} s")
    return outcomes


def _sink_of(outcome: Outcome, done: threading.Semaphore) -> Sink:
    def sink(event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Commit):
            outcome.commits.append((now, event))
        elif isinstance(event, Finished):
            outcome.finished_s, outcome.finished = now, event
            done.release()

    return sink
