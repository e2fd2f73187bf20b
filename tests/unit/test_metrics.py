"""Counting what a service does, and telling a metrics endpoint of it; the endpoint is a stand-in that adds up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_runtime.contract import EngineLimits
from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.metric_families import FAMILIES
from dgemma_runtime.metrics import Metrics, Series, _Histogram, gauges
from dgemma_runtime.metrics_publisher import MetricsPublisher
from dgemma_runtime.parameters import default_parameters
from dgemma_runtime.service import Service
from dgemma_runtime.statistics import ServiceStatistics
from dgemma_runtime.testing import EOS, scripted_engine, small_settings, submit, tiny_codec

ANSWERS = {"one": "a short one", "two": "another answer, of several canvases"}
LIMITS = EngineLimits(4, 16, 5, 100, 50)


def watched_service(metrics: Metrics, **options: Any) -> Service:
    engine = scripted_engine(ANSWERS, **options)
    service = Service(engine, tiny_codec(), small_settings(), default_parameters({"eos_token_id": EOS}), metrics)
    service.start()
    return service


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def service(metrics: Metrics) -> Iterator[Service]:
    running = watched_service(metrics)
    yield running
    running.stop()


def counters(metrics: Metrics, service: Service) -> dict[Series, float]:
    return metrics.counters(service.statistics())


# ---------------------------------------------------------------- counting


@given(
    st.lists(st.integers(-20, 700), max_size=40),
    st.lists(st.integers(0, 600), min_size=1, max_size=8, unique=True).map(sorted),
)
def test_buckets_count_what_is_at_most_their_bound(values: list[int], integers: list[int]) -> None:
    bounds = tuple(map(float, integers))
    histogram = _Histogram("h", bounds)
    for value in values:
        histogram.observe(value)
    series = dict(histogram.series())
    for bound in bounds:
        assert series["h_bucket", str(bound)] == sum(value <= bound for value in values)
    assert series["h_bucket", "+Inf"] == series["h_count", ""] == len(values)
    assert series["h_sum", ""] == sum(values)


def test_buckets_come_with_the_largest_first() -> None:
    histogram = _Histogram("h", (1.0, 2.0))
    assert [label for (_, label), _ in histogram.series()] == ["", "", "+Inf", "2.0", "1.0"]


def test_counts_are_those_of_the_responses(metrics: Metrics, service: Service) -> None:
    statistics = [submit(service, prompt).finished().statistics for prompt in ("one", "two", "two")]
    found = counters(metrics, service)
    canvases = sum(item.canvases for item in statistics)
    assert canvases > 3
    expected = {
        "dgemma_requests_accepted_total": 3,
        "dgemma_prompt_tokens_total": sum(item.num_input_tokens for item in statistics),
        "dgemma_request_prompt_tokens_sum": sum(item.num_input_tokens for item in statistics),
        "dgemma_output_tokens_total": sum(item.num_output_tokens for item in statistics),
        "dgemma_request_output_tokens_sum": sum(item.num_output_tokens for item in statistics),
        "dgemma_denoising_steps_total": sum(item.denoising_steps for item in statistics),
        "dgemma_canvas_steps_sum": sum(item.denoising_steps for item in statistics),
        "dgemma_batch_size_sum": sum(item.denoising_steps for item in statistics),
        "dgemma_batch_size_count": found["dgemma_denoising_passes_total", ""],
        "dgemma_canvases_total": canvases,
        "dgemma_canvas_steps_count": canvases,
        "dgemma_tokens_per_forward_count": canvases,
        "dgemma_time_to_first_canvas_seconds_count": 3,
        "dgemma_time_between_canvases_seconds_count": canvases - 3,
    }
    assert {name: found[name, ""] for name in expected} == expected
    assert found["dgemma_requests_finished_total", "stop"] == 3


def test_prompts_that_are_only_tokenized_count_as_nothing_else(metrics: Metrics, service: Service) -> None:
    before = counters(metrics, service)
    for _ in range(3):
        submit(service, "one", max_tokens=0).finished()
    with pytest.raises(InvalidRequest):
        submit(service, "", max_tokens=0)
    after = counters(metrics, service)
    changed = {series: count - before[series] for series, count in after.items() if count != before[series]}
    changed.pop(("dgemma_host_seconds_total", ""), None)
    assert changed == {("dgemma_requests_tokenized_total", ""): 3, ("dgemma_errors_total", "InvalidRequest"): 1}


def test_times_are_those_of_the_responses(metrics: Metrics, service: Service) -> None:
    first = submit(service, "two").finished().statistics
    found = counters(metrics, service)
    assert found["dgemma_queue_seconds_sum", ""] == pytest.approx(first.queue_ms / 1e3)
    assert found["dgemma_prefill_seconds_sum", ""] == pytest.approx(first.prefill_ms / 1e3)
    assert found["dgemma_request_seconds_sum", ""] == pytest.approx(first.total_ms / 1e3)
    assert first.time_to_first_canvas_ms is not None
    measured = found["dgemma_time_to_first_canvas_seconds_sum", ""]
    assert measured == pytest.approx(first.time_to_first_canvas_ms / 1e3, abs=0.05)
    engine = sum(found["dgemma_engine_seconds_total", kind] for kind in ("encode", "denoise"))
    assert 0 < engine <= measured + found["dgemma_time_between_canvases_seconds_sum", ""] + 0.05


def test_refusals_and_failures_by_kind(metrics: Metrics) -> None:
    service = watched_service(metrics, fail_on={"denoise": 1})
    with pytest.raises(InvalidRequest):
        submit(service, "")
    assert submit(service, "one").finished().reason == "error"
    metrics.refused("", "ValueError")
    found = counters(metrics, service)
    errors = {kind: count for (name, kind), count in found.items() if name == "dgemma_errors_total"}
    assert errors == {"InvalidRequest": 1, "Overloaded": 0, "EngineError": 1, "InternalError": 1}
    assert found["dgemma_requests_finished_total", "error"] == 1
    service.stop()


def test_rows_of_one_call_count_its_time_once(metrics: Metrics, service: Service) -> None:
    for _ in range(3):
        metrics.prefilled(None, 8, 1_000_000_000, 3_000_000_000)  # type: ignore[arg-type]
    metrics.stepped(2, 1, 3_000_000_000, 4_000_000_000)
    metrics.stepped(0, 1, 4_000_000_000, 4_500_000_000)
    found = counters(metrics, service)
    assert found["dgemma_engine_seconds_total", "encode"] == pytest.approx(2.5)
    assert found["dgemma_engine_seconds_total", "denoise"] == pytest.approx(1.0)
    assert found["dgemma_prefill_tokens_total", ""] == 24
    assert found["dgemma_denoising_passes_total", ""] == 1


def test_the_table_is_complete_and_its_names_are_prometheus_ones(metrics: Metrics, service: Service) -> None:
    known = {name for family in FAMILIES for name in family.published}
    assert len(known) == sum(len(family.published) for family in FAMILIES)
    now = gauges(service.statistics(), LIMITS, 256, True)
    found = {*counters(metrics, service), *now}
    assert {name for name, _ in found} == known
    for family in FAMILIES:
        if family.kind != "histogram":
            assert {label for name, label in found if name == family.name} == set(family.values or ("",)), family.name
        if family.name.startswith("dgemma_"):
            assert (family.kind == "counter") == family.name.endswith("_total"), family.name
        assert bool(family.values) == bool(family.label)
        assert list(family.bounds) == sorted(set(family.bounds))


def test_gauges_say_what_is_going_on() -> None:
    statistics = ServiceStatistics(
        **dict.fromkeys(ServiceStatistics.__dataclass_fields__, 0)
        | {"requests_waiting": 3, "requests_running": 2, "full_pages_used": 25, "sliding_pages_idle": 7}
    )
    found = gauges(statistics, LIMITS, 256, False)
    assert found["vllm:kv_cache_usage_perc", ""] == found["nv_trt_llm_kv_cache_block_metrics", "fraction"] == 0.25
    assert found["nv_trt_llm_kv_cache_block_metrics", "free"] == 75
    assert found["nv_trt_llm_request_metrics", "active"] == 5
    assert found["vllm:num_requests_waiting", ""] == found["nv_trt_llm_request_metrics", "waiting"] == 3
    assert (found["dgemma_pages_cached", "sliding"], found["dgemma_healthy", ""]) == (7, 0)


# ---------------------------------------------------------------- publishing


class Endpoint:
    """Stands in for Triton's `MetricFamily` and keeps what it was told, by name and labels."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self) -> None:
        self.families: dict[str, str] = {}
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.calls = 0
        self.failures = 0  # of the calls to come

    def __call__(self, name: str, description: str, kind: str) -> Any:
        assert description
        self.families[name] = kind
        return _FakeFamily(self, name)

    def value(self, name: str, **labels: str) -> float:
        own = {"model_name": "m"} if name.startswith("vllm:") else {"model": "m", "version": "7"}
        return self.values[name, frozenset((own | labels).items())]


class _FakeFamily:
    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self._endpoint, self._name = endpoint, name

    def Metric(self, labels: dict[str, str]) -> _FakeMetric:  # noqa: N802 - Triton's name
        key = (self._name, frozenset(labels.items()))
        self._endpoint.values.setdefault(key, 0.0)
        return _FakeMetric(self._endpoint, key)


class _FakeMetric:
    def __init__(self, endpoint: Endpoint, key: Any) -> None:
        self._endpoint, self._key = endpoint, key

    def increment(self, value: float) -> None:
        assert value > 0
        self._change("counter", lambda before: before + value)

    def set(self, value: float) -> None:
        self._change("gauge", lambda before: value)

    def _change(self, kind: str, change: Callable[[float], float]) -> None:
        endpoint = self._endpoint
        endpoint.calls += 1
        assert endpoint.families[self._key[0]] == kind
        if endpoint.failures:
            endpoint.failures -= 1
            raise RuntimeError("Triton is away")
        endpoint.values[self._key] = change(endpoint.values[self._key])


def publisher(endpoint: Endpoint, metrics: Metrics, service: Service) -> MetricsPublisher:
    return MetricsPublisher(endpoint, metrics, service, LIMITS, "m", "7")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_everything_is_there_before_the_first_request(metrics: Metrics, service: Service) -> None:
    endpoint = Endpoint()
    publishing = publisher(endpoint, metrics, service)
    publishing.start()
    assert set(endpoint.families) == {name for family in FAMILIES for name in family.published}
    assert endpoint.value("dgemma_requests_finished_total", reason="deadline") == 0
    assert endpoint.value("dgemma_queue_seconds_bucket", le="+Inf") == 0
    assert endpoint.value("dgemma_max_model_len_tokens") == 256
    assert endpoint.value("dgemma_healthy") == 1
    publishing.stop()


def test_published_is_what_was_counted_since_the_start(metrics: Metrics, service: Service) -> None:
    submit(service, "one").finished()  # as the warm-up: before
    before = counters(metrics, service)
    endpoint = Endpoint()
    publishing = publisher(endpoint, metrics, service)
    publishing.start()
    submit(service, "two").finished()
    wait_for(lambda: endpoint.value("dgemma_requests_finished_total", reason="stop") == 1)
    submit(service, "two").finished()
    publishing.stop()
    after = counters(metrics, service)
    for (name, label), value in after.items():
        family = next(family for family in FAMILIES if name in family.published)
        key = "le" if name.endswith("_bucket") else family.label
        labels = {key: label} if key else {}
        assert endpoint.value(name, **labels) == pytest.approx(value - before[name, label]), name


def test_only_the_time_is_sent_while_nothing_changes(metrics: Metrics, service: Service) -> None:
    endpoint = Endpoint()
    publishing = publisher(endpoint, metrics, service)
    publishing.start()
    calls, before = endpoint.calls, dict(endpoint.values)
    time.sleep(1.3)
    publishing.stop()
    changed = {name for (name, labels), value in endpoint.values.items() if value != before[name, labels]}
    assert changed == {"dgemma_updated_timestamp_seconds"}
    assert 1 < endpoint.calls - calls <= 7
    assert abs(endpoint.value("dgemma_updated_timestamp_seconds") - time.time()) < 5


def test_what_could_not_be_sent_is_sent_the_next_time(
    metrics: Metrics, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = Endpoint()
    publishing = publisher(endpoint, metrics, service)
    publishing.start()
    endpoint.failures = 2
    submit(service, "two").finished()
    wait_for(lambda: endpoint.failures == 0 and endpoint.value("dgemma_canvases_total") > 0)
    publishing.stop()
    assert endpoint.value("dgemma_canvases_total") == counters(metrics, service)["dgemma_canvases_total", ""]
    assert "could not be published" in caplog.text


def test_a_stopped_publisher_has_no_thread(metrics: Metrics, service: Service) -> None:
    publishing = publisher(Endpoint(), metrics, service)
    publishing.start()
    publishing.stop()
    assert not any(thread.name == "metrics" for thread in threading.enumerate())
    assert (publishing._series, publishing._families) == ({}, {})
