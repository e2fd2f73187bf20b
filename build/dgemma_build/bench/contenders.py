"""The four contenders behind one interface: transformers eager and compiled, our engine in process, our server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import psutil

from dgemma_build.bench.scenario import Run, Workload
from dgemma_build.bench.worker import Worker, peak_memory_bytes
from dgemma_client import Client, Result
from dgemma_runtime.server import running_server

COMPILED = "transformers, compiled"
# Prompts come again in every round, and are not to be found in a cache.
SETTINGS: dict[str, Any] = {"max_batch_size": 8, "max_model_len": 8192, "prefix_cache": False}


class Contender(Protocol):
    """Something that generates; a process (or several) of its own."""

    name: str
    schedules: tuple[str, ...]  # how it can run several requests; the better one is taken

    def run(self, workload: Workload, schedule: str) -> Run:
        """The workload once."""
        ...

    def peak_memory_bytes(self) -> int:
        """Of all its processes since they started."""
        ...


class Transformers:
    """`generate`, eager or through its own torch.compile path."""

    schedules: tuple[str, ...] = ("one by one", "batch")

    def __init__(self, stack: ExitStack, checkpoint: Path, threads: int, compiled: bool) -> None:
        self.name = COMPILED if compiled else "transformers"
        self._compiled = compiled
        module = "dgemma_build.bench.torch_worker"
        self._worker = stack.enter_context(Worker(module, threads, checkpoint=str(checkpoint)))

    def run(self, workload: Workload, schedule: str) -> Run:
        answer = self._worker.ask(**workload.message(), batch=schedule == "batch", compiled=self._compiled)
        return Run(answer["seconds"], answer["first_canvas_s"])

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self._worker.pid)


class InProcess:
    """Our service without Triton."""

    name = "engine in process"
    schedules: tuple[str, ...] = ("continuous",)

    def __init__(self, stack: ExitStack, engine: Path, threads: int) -> None:
        self._worker = stack.enter_context(
            Worker("dgemma_build.bench.engine_worker", threads, engine=str(engine), settings=SETTINGS)
        )

    def run(self, workload: Workload, schedule: str) -> Run:
        answer = self._worker.ask(**workload.message())
        return Run(answer["seconds"], answer["first_canvas_s"], answer["outside_engine"])

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self._worker.pid)


class Server:
    """Our server over gRPC; the client runs in this process, its time is part of the figures."""

    name = "server over gRPC"
    schedules: tuple[str, ...] = ("continuous",)

    def __init__(self, stack: ExitStack, engine: Path, threads: int) -> None:
        self._server = stack.enter_context(running_server(engine, threads=threads, **SETTINGS))
        self._runner = stack.enter_context(asyncio.Runner())
        self._client = Client(self._server.grpc_url, timeout_s=600)
        stack.callback(lambda: self._runner.run(self._client.close()))

    def run(self, workload: Workload, schedule: str) -> Run:
        return self._runner.run(self._run(workload))

    async def _run(self, workload: Workload) -> Run:
        parameters: Any = {
            "max_tokens": workload.canvases * workload.canvas_length,
            "max_denoising_steps": workload.steps,
            "stability_threshold": -1,  # fixed steps
            "end_id": -1,  # no end token
            "seed": 0,
        }
        started = time.perf_counter()

        async def answer(prompt: Sequence[int]) -> tuple[Result, float]:
            result = await self._client.generate(input_ids=prompt, **parameters)
            return result, time.perf_counter() - started

        answers = await asyncio.gather(*(answer(prompt) for prompt in workload.prompts))
        seconds = time.perf_counter() - started
        results = [result for result, _ in answers]
        made = sum(len(result.token_ids) for result in results)
        if made != workload.tokens:
            raise RuntimeError(f"the server made {made} tokens instead of {workload.tokens}")
        first = [result.statistics.time_to_first_canvas_ms / 1000 for result in results]
        # Requests of one moment do not all end in one: each is asked for its own share, by the client's clock.
        outside = [1 - result.statistics.engine_ms / 1000 / wall for result, wall in answers]
        return Run(seconds, mean(first), mean(outside))

    def peak_memory_bytes(self) -> int:
        processes = [self._server.pid, *(child.pid for child in psutil.Process(self._server.pid).children(True))]
        return sum(peak_memory_bytes(pid) for pid in processes)
