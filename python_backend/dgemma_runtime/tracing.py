"""OpenTelemetry spans per request: queue, prefill, canvases, commits. Knows no Triton.

A request's moments are kept as numbers while it lives; after its end another thread makes spans of them, and the SDK's
own thread exports these. `OTEL_*` variables configure exporter, sampler, limits and resource as everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from dgemma_runtime.deferred import Deferred
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.events import Finished
from dgemma_runtime.observer import Observer
from dgemma_runtime.requests import LiveRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

TRACE_PARAMETERS = ("traceparent", "tracestate")  # of W3C Trace Context; Triton forwards the headers under these names
_SCOPE = "dgemma_runtime"
_CLOSE_S = 1.0  # an exporter whose collector is away takes longer to give up, and Triton leaves a model few seconds
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_caller: ContextVar[Mapping[str, str]] = ContextVar("caller", default={})  # noqa: B039 - nobody writes to it

Attributes: TypeAlias = Mapping[str, str | int | float | list[str]]


@contextlib.contextmanager
def called_with(request_parameters: str) -> Iterator[None]:
    """What is submitted inside continues the trace that Triton's `parameters` of the request (JSON, or "") name."""
    values = json.loads(request_parameters) if TRACE_PARAMETERS[0] in request_parameters else {}
    given = {name: str(values[name]) for name in TRACE_PARAMETERS if name in values}
    token = _caller.set(given)
    try:
        yield
    finally:
        _caller.reset(token)


@dataclass
class _Part:
    """One child span; moments in nanoseconds of the monotonic clock."""

    name: str
    started: int
    ended: int
    attributes: dict[str, int]


@dataclass
class _Trace:
    """What is known of a live request."""

    caller: Mapping[str, str]
    waiting_since: int  # 0 while it runs
    parts: list[_Part] = field(default_factory=list)
    preemptions: list[int] = field(default_factory=list)  # moments


class TraceObserver(Observer):
    """Collects moments; `deferred` makes the spans.

    A request that was ended from outside of the engine's thread may still be reported on; that is left out.
    """

    def __init__(self, provider: TracerProvider, deferred: Deferred) -> None:
        self._provider, self._deferred = provider, deferred
        self._live: dict[LiveRequest, _Trace] = {}

    @staticmethod
    def open(deferred: Deferred) -> TraceObserver:
        """With the exporter that the environment names; raises ConfigurationError."""
        return TraceObserver(_provider(), deferred)

    def close(self) -> None:
        """Export the spans that were made, as far as the collector takes them at once."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_CLOSE_S)

    # ------------------------------------------------------------ events

    def submitted(self, request: LiveRequest) -> None:
        self._live[request] = _Trace(_caller.get(), request.timeline.submitted)

    def admitted(self, request: LiveRequest) -> None:
        if trace := self._live.get(request):
            trace.parts.append(_Part("queue", trace.waiting_since, time.monotonic_ns(), {}))
            trace.waiting_since = 0

    def prefilled(self, request: LiveRequest, tokens: int, started: int, ended: int) -> None:
        parts = self._parts(request)
        if parts and parts[-1].name == "prefill":
            parts[-1].ended = ended
            parts[-1].attributes["dgemma.tokens"] += tokens
            parts[-1].attributes["dgemma.chunks"] += 1
        else:
            parts.append(_Part("prefill", started, ended, {"dgemma.tokens": tokens, "dgemma.chunks": 1}))

    def committed(self, request: LiveRequest, steps: int, tokens: int, started: int, ended: int) -> None:
        figures = {"dgemma.canvas": request.canvas_index, "dgemma.steps": steps, "dgemma.tokens": tokens}
        self._parts(request).append(_Part(f"canvas {request.canvas_index}", started, ended, figures))

    def encoded(self, request: LiveRequest, started: int, ended: int) -> None:
        self._parts(request).append(_Part("commit", started, ended, {}))

    def preempted(self, request: LiveRequest) -> None:
        if trace := self._live.get(request):
            trace.waiting_since = time.monotonic_ns()
            trace.preemptions.append(trace.waiting_since)

    def finished(self, request: LiveRequest, event: Finished) -> None:
        now = time.monotonic_ns()
        trace = self._live.pop(request)
        if trace.waiting_since:
            trace.parts.append(_Part("queue", trace.waiting_since, now, {}))
        elif request.canvas is not None and event.reason not in ("stop", "length"):
            figures = {"dgemma.canvas": request.canvas_index, "dgemma.steps": request.canvas.step}
            trace.parts.append(_Part(f"canvas {request.canvas_index}", request.timeline.canvas_started, now, figures))
        self._deferred.call(lambda: self._export(request, trace, event, now))

    def _parts(self, request: LiveRequest) -> list[_Part]:
        trace = self._live.get(request)
        return [] if trace is None else trace.parts

    # ------------------------------------------------------------ spans

    def _export(self, request: LiveRequest, trace: _Trace, event: Finished, ended: int) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        tracer = self._provider.get_tracer(_SCOPE)
        epoch = time.time_ns() - time.monotonic_ns()
        root = tracer.start_span(
            "generate",
            TraceContextTextMapPropagator().extract(trace.caller),
            SpanKind.SERVER,
            _attributes(request, event),
            start_time=request.timeline.submitted + epoch,
        )
        for moment in trace.preemptions:
            root.add_event("preempted", timestamp=moment + epoch)
        parent = set_span_in_context(root)
        for part in trace.parts:
            span = tracer.start_span(part.name, parent, attributes=part.attributes, start_time=part.started + epoch)
            span.end(part.ended + epoch)
        if event.reason == "error":
            root.set_status(Status(StatusCode.ERROR, event.error))
        root.end(ended + epoch)


def _attributes(request: LiveRequest, event: Finished) -> Attributes:
    """Names from OpenTelemetry's conventions for generative AI where there is one."""
    figures = event.statistics
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.finish_reasons": [event.reason],
        "gen_ai.usage.input_tokens": figures.num_input_tokens,
        "gen_ai.usage.output_tokens": figures.num_output_tokens,
        "dgemma.canvases": figures.canvases,
        "dgemma.denoising_steps": figures.denoising_steps,
        "dgemma.prefix_tokens": figures.prefix_tokens,
        "dgemma.engine_ms": figures.engine_ms,
    }


def _provider() -> TracerProvider:
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter()
    except ImportError as error:
        raise ConfigurationError(
            f"traces is true, but OpenTelemetry cannot be imported ({error}); install this package with the "
            "extra `otel`, or leave the setting out"
        ) from None
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "dgemma"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter() -> SpanExporter:
    name = next((name for name in _PROTOCOLS if os.environ.get(name)), _PROTOCOLS[-1])
    protocol = os.environ.get(name) or "http/protobuf"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGRPC

        return OverGRPC()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHTTP

        return OverHTTP()
    raise ConfigurationError(f"{name} must be grpc or http/protobuf, got {protocol!r}")
