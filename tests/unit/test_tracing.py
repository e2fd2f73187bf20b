"""Spans of requests: their tree, times, parents and attributes, and that they reach a collector."""

from __future__ import annotations

import gzip
import http.server
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from dgemma_runtime.deferred import Deferred
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.observer import Observer
from dgemma_runtime.observers import Observers
from dgemma_runtime.parameters import default_parameters, parse_parameters
from dgemma_runtime.requests import GenerationRequest, LiveRequest
from dgemma_runtime.service import Service
from dgemma_runtime.testing import EOS, Recorder, gated, scripted_engine, small_settings, tiny_codec
from dgemma_runtime.tracing import TraceObserver, called_with

ANSWERS = {"one": "short", "two": "an answer of several canvases"}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "vendor=x", "other": 1}
DEFAULTS = default_parameters({"eos_token_id": EOS})


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def observer(exporter: InMemorySpanExporter) -> Iterator[TraceObserver]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    watching = TraceObserver(provider, Deferred("test"))
    yield watching
    end(watching)


def end(observer: TraceObserver) -> None:
    """Every span is made and exported."""
    observer._deferred.close(10)
    observer.close()


def serve(observer: Observer, engine: Any = None, **settings: int) -> Service:
    service = Service(engine or scripted_engine(ANSWERS), tiny_codec(), small_settings(**settings), DEFAULTS, observer)
    service.start()
    return service


def ask(service: Service, prompt: str, request_id: str = "", **values: object) -> Recorder:
    recorder = Recorder()
    service.submit(GenerationRequest(prompt, parse_parameters(values, DEFAULTS), request_id), recorder)
    return recorder


def tree(observer: TraceObserver, exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The only root and its children by time, after the observer has ended."""
    end(observer)
    spans = exporter.get_finished_spans()
    (root,) = [span for span in spans if span.name == "generate"]
    children = [span for span in spans if span is not root]
    assert root.context is not None
    for span in children:
        assert span.parent is not None
        assert span.context is not None
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
    return root, sorted(children, key=lambda span: span.start_time or 0)


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def test_the_tree_of_one_request(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    before = time.time_ns()
    service = serve(observer)
    statistics = ask(service, "two", "r-1").finished().statistics
    service.stop()
    root, children = tree(observer, exporter)
    canvases = statistics.canvases
    assert canvases > 2
    names = [span.name for span in children]
    assert names[:3] == ["queue", "prefill", "canvas 0"]
    assert sorted(names[3:]) == sorted(["commit"] * (canvases - 1) + [f"canvas {n}" for n in range(1, canvases)])
    assert (root.kind, root.status.status_code, root.parent) == (SpanKind.SERVER, StatusCode.UNSET, None)
    assert root.attributes is not None
    assert root.attributes["gen_ai.response.id"] == "r-1"
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert root.attributes["gen_ai.usage.output_tokens"] == statistics.num_output_tokens
    figures = [dict(span.attributes or {}) for span in children if span.name.startswith("canvas")]
    assert [item["dgemma.canvas"] for item in figures] == list(range(canvases))
    assert sum(int(str(item["dgemma.steps"])) for item in figures) == statistics.denoising_steps
    assert sum(int(str(item["dgemma.tokens"])) for item in figures) == statistics.num_output_tokens
    started, ended = times(root)
    assert before - 10**8 < started < ended < time.time_ns() + 10**8
    assert ended - started == pytest.approx(statistics.total_ms * 1e6, abs=2e7)
    for span in children:
        first, last = times(span)
        assert started <= first <= last <= ended, span.name


def test_no_prompt_and_no_answer(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    service = serve(observer)
    ask(service, "two").finished()
    service.stop()
    end(observer)
    text = "".join(str(span.to_json()) for span in exporter.get_finished_spans())
    assert "several" not in text
    assert '"two"' not in text


def test_prefill_is_one_span_of_several_chunks(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    service = serve(observer)
    prompt = "x" * 70
    ask(service, prompt, max_tokens=1).finished()
    service.stop()
    _, children = tree(observer, exporter)
    (prefill,) = [dict(span.attributes or {}) for span in children if span.name == "prefill"]
    assert prefill == {"dgemma.tokens": 71, "dgemma.chunks": 5}  # of 16 tokens each


@pytest.mark.parametrize("given", ["header", "none", "broken"])
def test_the_caller_s_trace_goes_on(given: str, observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    parameters = {"header": PARENT, "none": {"other": 1}, "broken": {"traceparent": "no such thing"}}[given]
    service = serve(observer)
    with called_with(json.dumps(parameters)):
        ended = ask(service, "one")
    ended.finished()
    service.stop()
    root, _ = tree(observer, exporter)
    assert root.context is not None
    continued = format(root.context.trace_id, "032x") == TRACE_ID
    assert continued == (given == "header")
    assert (root.parent is not None) == (given == "header")
    assert root.context.trace_state.get("vendor") == ("x" if given == "header" else None)


def test_a_trace_is_the_caller_s_of_that_call_only(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    service = serve(observer)
    with called_with(json.dumps(PARENT)):
        ask(service, "one").finished()
    with called_with(""):
        ask(service, "one").finished()
    service.stop()
    end(observer)
    roots = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    assert [span.parent is not None for span in roots] == [True, False]


def test_a_request_that_never_ran(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    engine = gated(ANSWERS)
    service = serve(observer, engine, max_batch_size=1)
    running = ask(service, "one")
    assert engine.entered.acquire(timeout=20)
    waiting = ask(service, "two", "waits")
    service.cancel("waits")
    engine.permits.release(20)
    waiting.finished()
    running.finished()
    service.stop()
    end(observer)
    spans = exporter.get_finished_spans()
    (root,) = [span for span in spans if (span.attributes or {}).get("gen_ai.response.id") == "waits"]
    assert root.context is not None
    mine = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    assert [span.name for span in mine] == ["queue"]
    assert (root.attributes or {})["gen_ai.response.finish_reasons"] == ("cancelled",)


def test_a_failure_is_an_error_with_its_text(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    service = serve(observer, scripted_engine(ANSWERS, fail_on={"denoise": 2}))
    ended = ask(service, "two").finished()
    service.stop()
    root, children = tree(observer, exporter)
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, ended.error)
    assert children[-1].name == "canvas 0"  # the one under way


def test_a_preemption_is_an_event_and_a_second_wait(observer: TraceObserver, exporter: InMemorySpanExporter) -> None:
    settings = {"max_batch_size": 2, "full_pages": 60, "queue_size": 8}
    engine = scripted_engine(
        {"low": "w" * 90, "high": "h" * 90}, settings=small_settings(**settings), max_model_len=256
    )
    service = serve(observer, engine, **settings)
    with service._changed:  # both are there before the first tick
        low = [ask(service, "low", f"low-{n}", priority=1, max_tokens=200, end_id=-1) for n in range(2)]
    for recorder in low:
        assert recorder.finished(60).reason in ("length", "stop")
    preempted = service.statistics().preemptions
    service.stop()
    end(observer)
    roots = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    events = [event.name for span in roots for event in span.events]
    assert preempted > 0
    assert events == ["preempted"] * preempted
    queues = [span for span in exporter.get_finished_spans() if span.name == "queue"]
    assert len(queues) == len(roots) + preempted


def test_reports_on_a_request_that_has_ended_are_left_out(
    observer: TraceObserver, exporter: InMemorySpanExporter
) -> None:
    requests: list[LiveRequest] = []

    class Keeping(Observer):
        def submitted(self, request: LiveRequest) -> None:
            requests.append(request)

    service = serve(Observers([Keeping(), observer]))
    ask(service, "one").finished()
    service.stop()
    (request,) = requests
    observer.admitted(request)
    observer.prefilled(request, 1, 2, 3)
    observer.committed(request, 1, 1, 2, 3)
    observer.encoded(request, 2, 3)
    observer.preempted(request)
    end(observer)
    assert len([span for span in exporter.get_finished_spans() if span.name == "generate"]) == 1
    assert observer._live == {}


# ---------------------------------------------------------------- a collector on loopback


class Collector:
    """Takes OTLP over HTTP and over gRPC; keeps the spans' names and the resource."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.resource: dict[str, str] = {}
        self._changed = threading.Condition()

    def take(self, request: Any) -> None:
        with self._changed:
            for group in request.resource_spans:
                self.resource.update({item.key: item.value.string_value for item in group.resource.attributes})
                self.names += [span.name for scope in group.scope_spans for span in scope.spans]
            self._changed.notify_all()

    def wait(self, condition: Callable[[list[str]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.names), 20), self.names


@pytest.fixture
def http_collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield collector, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def grpc_collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            collector.take(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_spans_reach_a_collector(
    protocol: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, url = request.getfixturevalue("grpc_collector" if protocol == "grpc" else "http_collector")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    observer = TraceObserver.open(Deferred("test"))
    service = serve(observer)
    ask(service, "one").finished()
    service.stop()
    end(observer)
    collector.wait(lambda names: {"generate", "queue", "prefill", "canvas 0"} <= set(names))
    assert collector.resource["service.name"] == "dgemma"
    assert collector.resource["deployment.environment.name"] == "test"


def test_without_a_collector_the_end_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    observer = TraceObserver.open(Deferred("test"))
    service = serve(observer)
    ask(service, "one").finished()
    service.stop()
    started = time.monotonic()
    end(observer)
    assert time.monotonic() - started < 8


def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_TRACES_PROTOCOL must be grpc or http/protobuf"):
        TraceObserver.open(Deferred("test"))


@pytest.mark.parametrize("module", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"])
def test_a_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match="extra `otel`"):
        TraceObserver.open(Deferred("test"))
