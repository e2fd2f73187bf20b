"""Counts what the service does, in memory, in about a microsecond per event. Knows no Triton and publishes nothing.

`metrics_publisher.py` reads it once a second: telling Triton of a number takes a message to another process,
which the engine thread must never wait for.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from dgemma_runtime.contract import EngineLimits
from dgemma_runtime.drafting.proposal import DraftOutcome
from dgemma_runtime.events import Finished
from dgemma_runtime.metric_families import ERROR_KINDS, FAMILIES
from dgemma_runtime.observer import Observer
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.statistics import ServiceStatistics

Series: TypeAlias = tuple[str, str]  # name as published, value of the family's label or of `le`; "" for none
_NS = 1e-9
_MS = 1e-3


class _Histogram:
    """Counts per bucket; the last bucket is without bound."""

    def __init__(self, name: str, bounds: tuple[float, ...]) -> None:
        self._name, self._bounds = name, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1  # a value on a bound belongs below it
        self._sum += value

    def series(self) -> Iterator[tuple[Series, float]]:
        """As cumulative counters, the largest first: so a scrape between two increments still sees them in order."""
        total = sum(self._counts)
        yield (f"{self._name}_count", ""), total
        yield (f"{self._name}_sum", ""), self._sum
        yield (f"{self._name}_bucket", "+Inf"), total
        for bound, count in zip(reversed(self._bounds), reversed(self._counts), strict=False):
            total -= count
            yield (f"{self._name}_bucket", str(bound)), total


class Metrics(Observer):
    """The observer that counts. `counters` may be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Series, float] = {
            (family.name, value): 0.0
            for family in FAMILIES
            if family.kind == "counter" and family.name not in _FROM_STATISTICS
            for value in family.values or ("",)
        }
        self._histograms = {
            family.name: _Histogram(family.name, family.bounds) for family in FAMILIES if family.kind == "histogram"
        }
        self._engine_until = 0  # engine time up to this moment is counted

    def counters(self, statistics: ServiceStatistics) -> dict[Series, float]:
        """All that only grows, since the start."""
        with self._lock:
            found = dict(self._counts)
            for histogram in self._histograms.values():
                found.update(histogram.series())
        found.update({(name, ""): float(read(statistics)) for name, read in _FROM_STATISTICS.items()})
        return found

    # ------------------------------------------------------------ events

    def refused(self, request_id: str, kind: str) -> None:
        with self._lock:
            series = ("dgemma_errors_total", kind if kind in ERROR_KINDS else "InternalError")
            self._counts[series] += 1

    def tokenized(self, request_id: str, tokens: int) -> None:
        with self._lock:
            self._counts["dgemma_requests_tokenized_total", ""] += 1

    def submitted(self, request: LiveRequest) -> None:
        with self._lock:
            self._counts["dgemma_requests_accepted_total", ""] += 1
            self._counts["dgemma_prompt_tokens_total", ""] += len(request.prompt_ids)

    def prefilled(self, request: LiveRequest, tokens: int, started: int, ended: int) -> None:
        with self._lock:
            self._counts["dgemma_prefill_tokens_total", ""] += tokens
            self._worked("encode", started, ended)

    def stepped(self, canvases: int, commits: int, started: int, ended: int) -> None:
        with self._lock:
            if canvases:
                self._counts["dgemma_denoising_passes_total", ""] += 1
                self._counts["dgemma_denoising_steps_total", ""] += canvases
                self._histograms["dgemma_batch_size"].observe(canvases)
            self._worked("denoise" if canvases else "encode", started, ended)

    def committed(self, request: LiveRequest, steps: int, tokens: int, started: int, ended: int) -> None:
        line, histograms = request.timeline, self._histograms
        with self._lock:
            self._counts["dgemma_canvases_total", ""] += 1
            self._counts["dgemma_output_tokens_total", ""] += tokens
            histograms["dgemma_canvas_steps"].observe(steps)
            histograms["dgemma_tokens_per_forward"].observe(tokens / steps)
            if line.last_commit:
                histograms["dgemma_time_between_canvases_seconds"].observe((ended - line.last_commit) * _NS)
            else:
                histograms["dgemma_time_to_first_canvas_seconds"].observe((ended - line.submitted) * _NS)

    def drafted(self, request: LiveRequest, outcome: DraftOutcome, steps_saved: float) -> None:
        drafter = outcome.source
        with self._lock:
            self._counts["dgemma_draft_canvases_total", drafter] += 1
            self._counts["dgemma_draft_tokens_total", drafter] += outcome.drafted
            self._counts["dgemma_draft_accepted_tokens_total", drafter] += outcome.accepted
            self._counts["dgemma_draft_steps_saved_total", drafter] += max(steps_saved, 0)
            self._counts["dgemma_draft_steps_lost_total", drafter] += max(-steps_saved, 0)

    def drafter_failed(self, drafter: str) -> None:
        with self._lock:
            self._counts["dgemma_drafter_failures_total", drafter] += 1

    def finished(self, request: LiveRequest, event: Finished) -> None:
        statistics, histograms = event.statistics, self._histograms
        with self._lock:
            self._counts["dgemma_requests_finished_total", event.reason] += 1
            if event.reason == "error":
                self._counts["dgemma_errors_total", "EngineError"] += 1
            histograms["dgemma_queue_seconds"].observe(statistics.queue_ms * _MS)
            if request.timeline.prefilled:
                histograms["dgemma_prefill_seconds"].observe(statistics.prefill_ms * _MS)
            histograms["dgemma_request_seconds"].observe(statistics.total_ms * _MS)
            histograms["dgemma_request_prompt_tokens"].observe(statistics.num_input_tokens)
            histograms["dgemma_request_output_tokens"].observe(statistics.num_output_tokens)

    def _worked(self, kind: str, started: int, ended: int) -> None:
        """Rows of one call report the same moments; the time between them counts once."""
        self._counts["dgemma_engine_seconds_total", kind] += max(ended - max(started, self._engine_until), 0) * _NS
        self._engine_until = max(self._engine_until, ended)


_FROM_STATISTICS: Mapping[str, Callable[[ServiceStatistics], float]] = {
    "dgemma_preemptions_total": lambda statistics: statistics.preemptions,
    "dgemma_prefix_cache_queried_tokens_total": lambda statistics: statistics.prefix_queries,
    "dgemma_prefix_cache_hit_tokens_total": lambda statistics: statistics.prefix_hits,
    "dgemma_prefix_cache_evicted_pages_total": lambda statistics: statistics.evictions,
    "dgemma_host_seconds_total": lambda statistics: statistics.host_ms * _MS,
}


def gauges(
    statistics: ServiceStatistics, limits: EngineLimits, max_model_len: int, healthy: bool
) -> dict[Series, float]:
    """What the service is doing now."""
    waiting, running = statistics.requests_waiting, statistics.requests_running
    used, full = statistics.full_pages_used, limits.full_pages
    nv_requests, nv_pages = "nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics"
    return {
        ("dgemma_requests", "waiting"): waiting,
        ("dgemma_requests", "running"): running,
        ("dgemma_max_model_len_tokens", ""): max_model_len,
        ("dgemma_page_size_tokens", ""): limits.page_size,
        ("dgemma_pages", "full"): full,
        ("dgemma_pages", "sliding"): limits.sliding_pages,
        ("dgemma_pages_used", "full"): used,
        ("dgemma_pages_used", "sliding"): statistics.sliding_pages_used,
        ("dgemma_pages_cached", "full"): statistics.full_pages_idle,
        ("dgemma_pages_cached", "sliding"): statistics.sliding_pages_idle,
        ("dgemma_healthy", ""): float(healthy),
        ("dgemma_updated_timestamp_seconds", ""): time.time(),
        (nv_requests, "waiting"): waiting,
        (nv_requests, "scheduled"): running,
        (nv_requests, "active"): waiting + running,
        (nv_requests, "max"): limits.max_batch_size,
        (nv_pages, "fraction"): used / full,
        (nv_pages, "tokens_per"): limits.page_size,
        (nv_pages, "max"): full,
        (nv_pages, "used"): used,
        (nv_pages, "free"): full - used,
        ("vllm:num_requests_waiting", ""): waiting,
        ("vllm:num_requests_running", ""): running,
        ("vllm:kv_cache_usage_perc", ""): used / full,
    }
