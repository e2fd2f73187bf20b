"""Metrics, log and spans of a real Triton server, also after its model was loaded again or has crashed."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tritonclient.grpc as triton
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from dgemma_runtime.metric_families import FAMILIES
from dgemma_runtime.server import RunningServer, running_server

if TYPE_CHECKING:
    from tests.server.conftest import Caller

Numbers = dict[str, float]  # by name and own label, as `name{reason=stop}`
UPDATED = "dgemma_updated_timestamp_seconds"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
_OF_THE_MODEL = ("model", "version", "model_name")


class Collector:
    """Takes OTLP over HTTP on loopback and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                for group in request.resource_spans:
                    collector.spans += [span for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def watched(
    make_engine: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[RunningServer]:
    engine = make_engine(tmp_path_factory.mktemp("watched") / "scripted")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        environment.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_server(engine, log_format="json", log_level="DEBUG", traces=True) as server:
            yield server


@pytest.fixture
def ask(watched: RunningServer, call: type[Caller]) -> Caller:
    return call(watched)


def scrape(server: RunningServer) -> Numbers:
    with urllib.request.urlopen(server.metrics_url, timeout=5) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        own = [f"{key}={value}" for key, value in re.findall(r'(\w+)="([^"]*)"', labels) if key not in _OF_THE_MODEL]
        found[f"{name}{{{','.join(own)}}}" if own else name] = float(value)
    return found


def eventually(server: RunningServer, condition: Callable[[Numbers], bool]) -> Numbers:
    """The numbers once they are so; they are a second old at most."""
    end = time.monotonic() + 10
    while not condition(numbers := scrape(server)):
        assert time.monotonic() < end, {
            name: value for name, value in numbers.items() if value and "bucket" not in name
        }
        time.sleep(0.05)
    return numbers


def test_every_family_is_there(watched: RunningServer) -> None:
    with urllib.request.urlopen(watched.metrics_url, timeout=5) as answer:
        text = answer.read().decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for family in FAMILIES:
        for name in family.published:
            assert types[name] == ("gauge" if family.kind == "gauge" else "counter"), name
    numbers = scrape(watched)
    assert numbers["dgemma_max_model_len_tokens"] == 4096
    assert numbers["dgemma_healthy"] == 1
    assert numbers["nv_trt_llm_request_metrics{request_type=max}"] == 8


def test_numbers_follow_requests(watched: RunningServer, ask: Caller) -> None:
    before = scrape(watched)
    answers = [ask.infer(text_input="long") for _ in range(3)]
    assert ask.infer(text_input="long", max_tokens=-5).error is not None
    done = "dgemma_requests_finished_total{reason=stop}"
    after = eventually(watched, lambda numbers: numbers[done] == before[done] + 3)
    after = eventually(watched, lambda numbers: numbers["dgemma_errors_total{kind=InvalidRequest}"] == 1)
    statistics = [json.loads(answer.last["statistics"]) for answer in answers]
    expected = {
        "dgemma_output_tokens_total": sum(item["num_output_tokens"] for item in statistics),
        "dgemma_prompt_tokens_total": sum(item["num_input_tokens"] for item in statistics),
        "dgemma_denoising_steps_total": sum(item["denoising_steps"] for item in statistics),
        "dgemma_canvases_total": 9,
        "dgemma_time_to_first_canvas_seconds_count": 3,
        "dgemma_time_to_first_canvas_seconds_bucket{le=+Inf}": 3,
        "dgemma_time_between_canvases_seconds_count": 6,
        "dgemma_canvas_steps_bucket{le=3.0}": 0,
        "dgemma_canvas_steps_bucket{le=4.0}": 9,
    }
    assert {name: after[name] - before[name] for name in expected} == expected
    spent = after["dgemma_engine_seconds_total{kind=denoise}"] - before["dgemma_engine_seconds_total{kind=denoise}"]
    assert 0.1 < spent < sum(item["total_ms"] for item in statistics) / 1e3  # 36 steps of at least 4 ms


def test_gauges_follow_what_runs(watched: RunningServer, ask: Caller) -> None:
    with ask.stream(text_input="forever", stream=True) as stream:
        stream.next()
        busy = eventually(watched, lambda numbers: numbers["vllm:num_requests_running"] == 1)
        assert busy["dgemma_requests{state=running}"] == busy["nv_trt_llm_request_metrics{request_type=scheduled}"] == 1
        busy = eventually(watched, lambda numbers: numbers["dgemma_pages_used{kind=full}"] > 0)
        assert (
            busy["vllm:kv_cache_usage_perc"]
            == busy["nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}"]
            > 0
        )
        stream.cancel()
    idle = eventually(watched, lambda numbers: numbers["dgemma_requests_finished_total{reason=cancelled}"] == 1)
    idle = eventually(watched, lambda numbers: numbers["vllm:num_requests_running"] == 0)
    assert (idle["dgemma_pages_used{kind=full}"], idle["dgemma_pages_used{kind=sliding}"]) == (0, 0)


def test_the_log_has_each_request_under_its_id(watched: RunningServer, ask: Caller) -> None:
    ask.infer(text_input="short", request_id="over-grpc")
    status, _ = ask.post("generate", {"text_input": "short", "id": "over-http"})
    assert status == 200
    ask.infer(text_input="short", temperature=-1.0, request_id="refused-1")

    def lines() -> list[dict[str, Any]]:
        text = watched.log_file.read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    end = time.monotonic() + 10
    while not any(line.get("request_id") == "refused-1" for line in lines()):
        assert time.monotonic() < end
        time.sleep(0.05)
    reasons = {line["request_id"]: line["reason"] for line in lines() if "reason" in line}
    assert (reasons["over-grpc"], reasons["over-http"]) == ("stop", "stop")
    assert next(line["error"] for line in lines() if line.get("request_id") == "refused-1") == "InvalidRequest"


def test_spans_continue_the_caller_s_trace(watched: RunningServer, ask: Caller, collector: Collector) -> None:
    ask.infer(text_input="long", request_id="header", headers={"traceparent": TRACEPARENT, "tracestate": "a=b"})
    status, _ = ask.post("generate", {"text_input": "long", "id": "parameter", "traceparent": TRACEPARENT})
    assert status == 200

    def roots() -> dict[str, Any]:
        found = {}
        for span in list(collector.spans):
            values = {item.key: item.value for item in span.attributes}
            if span.name == "generate":
                found[values["gen_ai.response.id"].string_value] = span
        return found

    end = time.monotonic() + 10
    while not {"header", "parameter"} <= set(roots()):
        assert time.monotonic() < end, sorted(roots())
        time.sleep(0.05)
    for name in ("header", "parameter"):
        root = roots()[name]
        assert root.trace_id.hex() == TRACE_ID
        children = [span for span in collector.spans if span.parent_span_id == root.span_id]
        assert {"queue", "prefill", "canvas 0", "canvas 1", "canvas 2"} <= {span.name for span in children}


# ---------------------------------------------------------------- the model is loaded again


def _reload(server: RunningServer) -> None:
    arguments = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    key = next(item.partition("dgemma-key=")[2] for item in arguments if "grpc-restricted-protocol" in item)
    headers = {"triton-grpc-protocol-dgemma-key": key}
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.unload_model("diffusion_gemma", headers=headers)
        end = time.monotonic() + 20
        while client.get_model_repository_index(headers=headers).models[0].state != "UNAVAILABLE":
            assert time.monotonic() < end
            time.sleep(0.05)
        client.load_model("diffusion_gemma", headers=headers)


def test_metrics_work_after_the_model_was_loaded_again(engine: Path, call: type[Caller]) -> None:
    """As after a failure of the engine. A crash ends the whole server, and its metrics."""
    with running_server(engine) as server:
        ask = call(server)
        for _ in range(3):
            ask.infer(text_input="long")
            # A model that ends takes its numbers along.
            eventually(server, lambda numbers: numbers["dgemma_canvases_total"] == 3)
            _reload(server)
            eventually(server, lambda numbers: abs(numbers[UPDATED] - time.time()) < 0.5)
        numbers = eventually(server, lambda numbers: numbers["dgemma_healthy"] == 1)
        assert numbers["vllm:num_requests_running"] == 0
