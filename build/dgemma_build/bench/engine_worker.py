"""Our service without Triton as a contender; run as a process of its own (see worker.py)."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.bench.worker import Message, peak_memory_bytes, serve
from dgemma_runtime.service import GenerationRequest, Service


def _handle(service: Service, message: Message) -> Message:
    parameters = replace(
        service.defaults,
        max_tokens=message["canvases"] * message["canvas_length"],
        max_denoising_steps=message["steps"],
        stability_threshold=None,
        end_ids=(),
        seed=0,
    )
    requests = [GenerationRequest(np.array(prompt, np.int32), parameters) for prompt in message["prompts"]]
    before = service.statistics().engine_ms
    outcomes = run_requests(service, requests)
    engine_s = (service.statistics().engine_ms - before) / 1000
    started = min(outcome.submitted_s for outcome in outcomes)
    seconds = max(outcome.finished_s for outcome in outcomes) - started
    expected = message["canvases"] * message["canvas_length"]
    for outcome in outcomes:
        if len(outcome.result().token_ids) != expected:
            raise RuntimeError(f"{len(outcome.result().token_ids)} tokens instead of {expected}")
    first = [outcome.commits[0][0] - started for outcome in outcomes]
    return {
        "seconds": seconds,
        "first_canvas_s": sum(first) / len(first),
        "outside_engine": 1 - engine_s / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _start(message: Message) -> Any:
    stack = ExitStack()
    atexit.register(stack.close)
    service = stack.enter_context(
        running_service(Path(message["engine"]), threads=message["threads"], **message["settings"])
    )
    return lambda request: _handle(service, request)


if __name__ == "__main__":
    serve(_start)
