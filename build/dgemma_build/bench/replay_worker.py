"""What the engine alone takes for a workload: its calls are recorded under our service and made again, by themselves.

A process of its own (see worker.py). Answers with the seconds of the calls and with the canvases per denoising pass.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dgemma_build.bench.inprocess import open_measured, run_requests
from dgemma_build.bench.worker import Message, serve
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import (
    CommitRow,
    DenoiseResult,
    DenoiseRow,
    DraftResult,
    DraftRow,
    EncodeRow,
    Engine,
    Manifest,
)
from dgemma_runtime.parameters import GenerationParameters, default_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import RuntimeSettings, plan_limits


class Recorder:
    """An engine that passes every call on and keeps it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.manifest, self.limits, self.drafter = engine.manifest, engine.limits, engine.drafter
        self.calls: list[Callable[[], object]] = []
        self.batches: list[int] = []  # canvases of each denoising pass

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        self.calls.append(lambda: self._engine.encode(rows))
        self._engine.encode(rows)

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        self.calls.append(lambda: self._engine.denoise(rows, commits))
        if rows:
            self.batches.append(len(rows))
        return self._engine.denoise(rows, commits)

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        self.calls.append(lambda: self._engine.draft(rows))
        return self._engine.draft(rows)

    def release(self, slot: int) -> None:
        self.calls.append(lambda: self._engine.release(slot))
        self._engine.release(slot)

    def close(self) -> None:
        self._engine.close()


class _Replay:
    """A service over a recorder, and what it recorded of the latest workload."""

    def __init__(self, message: Message) -> None:
        directory, threads = Path(message["engine"]), message["threads"]
        settings = RuntimeSettings(threads=threads, **message["settings"])
        manifest = Manifest.load(directory)
        self._defaults = default_parameters(manifest.generation_defaults)
        self._recorder = Recorder(open_measured(directory, plan_limits(manifest, settings), threads))
        self._service = Service(self._recorder, Codec.load(directory), settings, self._defaults)
        self._service.start()
        self._recorded: Message = {}
        atexit.register(self._service.stop)

    def handle(self, message: Message) -> Message:
        """Record a workload when it is new, in the second of two runs; then make its calls again."""
        if message != self._recorded:
            self._recorded = message
            for _ in range(2):
                self._recorder.calls.clear()
                self._recorder.batches.clear()
                self._run(message)
        started = time.perf_counter()
        for call in self._recorder.calls:
            call()
        return {"seconds": time.perf_counter() - started, "batch_size": float(np.mean(self._recorder.batches))}

    def _run(self, message: Message) -> None:
        parameters = self._parameters(message)
        requests = [GenerationRequest(np.array(prompt, np.int32), parameters) for prompt in message["prompts"]]
        for outcome in run_requests(self._service, requests):
            outcome.result()

    def _parameters(self, message: Message) -> GenerationParameters:
        return replace(
            self._defaults,
            max_tokens=message["canvases"] * message["canvas_length"],
            max_denoising_steps=message["steps"],
            stability_threshold=None,
            end_ids=(),
            seed=0,
        )


def _start(message: Message) -> Callable[[Message], Message]:
    return _Replay(message).handle


if __name__ == "__main__":
    serve(_start)
