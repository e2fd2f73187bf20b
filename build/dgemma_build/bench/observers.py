"""What watching costs the engine thread: time per hook of metrics, log and spans, as one JSON line.

    python -m dgemma_build.bench.observers

Knows the hooks, no engine and no Triton. The log is written to a temporary file, spans are kept in memory and dropped.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from opentelemetry.sdk.trace import TracerProvider

from dgemma_runtime.codec import Codec
from dgemma_runtime.deferred import Deferred
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.events import Finished
from dgemma_runtime.logs import LogObserver, RuntimeLog
from dgemma_runtime.metrics import Metrics
from dgemma_runtime.observer import Observer
from dgemma_runtime.observers import Observers
from dgemma_runtime.parameters import default_parameters
from dgemma_runtime.requests import LiveRequest, Timeline
from dgemma_runtime.testing import tiny_codec
from dgemma_runtime.tracing import TraceObserver

_ROUNDS, _REQUESTS, _CANVASES = 7, 200, 20
_PAUSE_S = 0.003  # between requests: what is written and exported after one has time of its own


def main() -> None:
    """Print the best of several rounds, in microseconds per call."""
    figures = {}
    with tempfile.TemporaryFile("w") as file:
        log, deferred = RuntimeLog("INFO", "json", file), Deferred("after-work")
        lines, spans = LogObserver(deferred), TraceObserver(TracerProvider(), deferred)
        watching: dict[str, list[Observer]] = {
            "metrics": [Metrics()],
            "metrics and log": [Metrics(), lines],
            "metrics, log and spans": [Metrics(), lines, spans],
        }
        for name, observers in watching.items():
            rounds = [_round(Observers(observers)) for _ in range(_ROUNDS)]
            figures[name] = {hook: round(min(item[hook] for item in rounds), 2) for hook in rounds[0]}
        deferred.close(10)
        spans.close()
        log.close()
    print(json.dumps({"unit": "us per call", **figures}))


def _round(observer: Observer) -> dict[str, float]:
    """Mean time per hook over the lives of some requests."""
    spent: dict[str, list[int]] = {}

    def timed(hook: Callable[..., None], *arguments: Any) -> None:
        started = time.perf_counter_ns()
        hook(*arguments)
        spent.setdefault(hook.__name__, []).append(time.perf_counter_ns() - started)

    codec = tiny_codec()
    for number in range(_REQUESTS):
        request = _request(number, codec)
        now = time.monotonic_ns()
        timed(observer.submitted, request)
        timed(observer.admitted, request)
        timed(observer.prefilled, request, 100, now, now + 1)
        for _ in range(_CANVASES):
            timed(observer.stepped, 8, 1, now, now + 1)
            timed(observer.committed, request, 8, 64, now, now + 1)
            timed(observer.encoded, request, now, now + 1)
        event = Finished("stop", "", np.empty(0, np.int32), request.statistics(now + 1, 0))
        timed(observer.finished, request, event)
        time.sleep(_PAUSE_S)
    return {name: sum(times) / len(times) / 1e3 for name, times in spent.items()}


def _request(number: int, codec: Codec) -> LiveRequest:
    return LiveRequest(
        request_id=f"request-{number}",
        prompt_ids=np.zeros(100, np.int32),
        parameters=default_parameters({}),
        seed=0,
        max_tokens=1,
        output=OutputText(codec, 1, (), ()),
        sink=lambda event: None,
        is_cancelled=lambda: False,
        timeline=Timeline(time.monotonic_ns(), 0),
    )


if __name__ == "__main__":
    main()
