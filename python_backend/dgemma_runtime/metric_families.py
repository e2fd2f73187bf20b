"""The table of all Prometheus families: name, kind, unit, labels, buckets, meaning. Knows not how they are filled.

`docs/observability.md` and `docker/grafana/dgemma.json` are held to it by tests. Names under `dgemma_` are this
project's own. `nv_trt_llm_*` are those of TensorRT-LLM's Triton backend and `vllm:*` vLLM's, for routers and
autoscalers that know only these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 131072.0, 262144.0)
_POWERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_STEPS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0, 48.0)


@dataclass(frozen=True)
class Family:
    """One family. A histogram is published as the counters `_bucket` (label `le`), `_sum` and `_count`."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    label: str = ""  # besides those of the model; "" for none
    values: tuple[str, ...] = ()  # of that label, present from the start
    bounds: tuple[float, ...] = ()  # upper ones of a histogram's buckets, without infinity

    @property
    def published(self) -> tuple[str, ...]:
        """The names under which Prometheus finds it."""
        if self.kind != "histogram":
            return (self.name,)
        return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")


REASONS = ("stop", "length", "cancelled", "deadline", "error")
ERROR_KINDS = ("InvalidRequest", "Overloaded", "EngineError", "InternalError")
PAGE_KINDS = ("full", "sliding")
WORK = ("encode", "denoise")
DRAFTERS = ("client", "lookup", "model")

FAMILIES: tuple[Family, ...] = (
    # requests
    Family("dgemma_requests", "gauge", "requests", "Live requests", "state", ("waiting", "running")),
    Family("dgemma_requests_accepted_total", "counter", "requests", "Requests that entered the queue"),
    Family("dgemma_requests_finished_total", "counter", "requests", "Requests that ended", "reason", REASONS),
    Family(
        "dgemma_requests_tokenized_total",
        "counter",
        "requests",
        "Requests with `max_tokens` 0: answered at once with their prompt's tokens, counted nowhere else",
    ),
    Family(
        "dgemma_errors_total",
        "counter",
        "errors",
        "Requests refused, by the error's class; EngineError also counts accepted ones that ended with an error",
        "kind",
        ERROR_KINDS,
    ),
    Family("dgemma_preemptions_total", "counter", "preemptions", "Running requests that lost their pages for a while"),
    # latency
    Family("dgemma_queue_seconds", "histogram", "seconds", "From submission to the first admission", bounds=_SECONDS),
    Family("dgemma_prefill_seconds", "histogram", "seconds", "From admission to the prompt's end", bounds=_SECONDS),
    Family(
        "dgemma_time_to_first_canvas_seconds",
        "histogram",
        "seconds",
        "From submission to the first canvas committed",
        bounds=_SECONDS,
    ),
    Family(
        "dgemma_time_between_canvases_seconds",
        "histogram",
        "seconds",
        "From one commit of a request to its next",
        bounds=_SECONDS,
    ),
    Family("dgemma_request_seconds", "histogram", "seconds", "From submission to the end", bounds=_SECONDS),
    # canvases
    Family("dgemma_canvases_total", "counter", "canvases", "Canvases committed"),
    Family("dgemma_denoising_steps_total", "counter", "steps", "Denoising steps, counted per canvas"),
    Family("dgemma_denoising_passes_total", "counter", "passes", "Denoising passes of the engine over a batch"),
    Family("dgemma_canvas_steps", "histogram", "steps", "Denoising steps per committed canvas", bounds=_STEPS),
    Family(
        "dgemma_tokens_per_forward",
        "histogram",
        "tokens",
        "Output tokens of a committed canvas per denoising step of it",
        bounds=_POWERS,
    ),
    Family("dgemma_batch_size", "histogram", "canvases", "Canvases in one denoising pass", bounds=_POWERS),
    # drafts
    Family("dgemma_draft_canvases_total", "counter", "canvases", "Canvases from drafts", "drafter", DRAFTERS),
    Family("dgemma_draft_tokens_total", "counter", "tokens", "Tokens drafted and emitted", "drafter", DRAFTERS),
    Family(
        "dgemma_draft_accepted_tokens_total",
        "counter",
        "tokens",
        "Tokens of dgemma_draft_tokens_total that were committed as drafted",
        "drafter",
        DRAFTERS,
    ),
    Family(
        "dgemma_draft_steps_saved_total",
        "counter",
        "steps",
        "Denoising steps by which drafted canvases fell short of the mean of those without a draft",
        "drafter",
        DRAFTERS,
    ),
    Family(
        "dgemma_draft_steps_lost_total",
        "counter",
        "steps",
        "Denoising steps by which drafted canvases exceeded that mean",
        "drafter",
        DRAFTERS,
    ),
    Family(
        "dgemma_drafter_failures_total",
        "counter",
        "failures",
        "Drafters that failed and are switched off",
        "drafter",
        DRAFTERS,
    ),
    # tokens
    Family("dgemma_prompt_tokens_total", "counter", "tokens", "Prompt tokens of accepted requests"),
    Family("dgemma_prefill_tokens_total", "counter", "tokens", "Known tokens encoded outside of commits"),
    Family("dgemma_output_tokens_total", "counter", "tokens", "Tokens emitted"),
    Family("dgemma_request_prompt_tokens", "histogram", "tokens", "Prompt tokens per ended request", bounds=_TOKENS),
    Family("dgemma_request_output_tokens", "histogram", "tokens", "Output tokens per ended request", bounds=_TOKENS),
    # memory
    Family("dgemma_max_model_len_tokens", "gauge", "tokens", "Longest prompt and output together"),
    Family("dgemma_page_size_tokens", "gauge", "tokens", "Tokens per page"),
    Family("dgemma_pages", "gauge", "pages", "Pages that there are", "kind", PAGE_KINDS),
    Family("dgemma_pages_used", "gauge", "pages", "Pages held by running requests", "kind", PAGE_KINDS),
    Family("dgemma_pages_cached", "gauge", "pages", "Pages kept for the prefix cache alone", "kind", PAGE_KINDS),
    Family("dgemma_prefix_cache_queried_tokens_total", "counter", "tokens", "Prompt tokens looked up in the cache"),
    Family("dgemma_prefix_cache_hit_tokens_total", "counter", "tokens", "Prompt tokens found in the cache"),
    Family("dgemma_prefix_cache_evicted_pages_total", "counter", "pages", "Cached pages that made room"),
    # engine
    Family("dgemma_healthy", "gauge", "1 or 0", "1 while the engine thread lives and takes requests"),
    Family(
        "dgemma_updated_timestamp_seconds",
        "gauge",
        "seconds since 1970",
        "When the gauges were sent; stands still while the model's process is gone",
    ),
    Family("dgemma_engine_seconds_total", "counter", "seconds", "Time inside engine calls, by kind", "kind", WORK),
    Family("dgemma_host_seconds_total", "counter", "seconds", "The engine thread's time at work outside engine calls"),
    # names that others know
    Family(
        "nv_trt_llm_request_metrics",
        "gauge",
        "requests",
        "Requests by state; max is how many can run at once",
        "request_type",
        ("waiting", "scheduled", "active", "max"),
    ),
    Family(
        "nv_trt_llm_kv_cache_block_metrics",
        "gauge",
        "pages; fraction: 0 to 1",
        "Pages of the full-attention layers; tokens_per is the page size, fraction is used of max",
        "kv_cache_block_type",
        ("fraction", "tokens_per", "max", "used", "free"),
    ),
    Family("vllm:num_requests_waiting", "gauge", "requests", "Requests that wait"),
    Family("vllm:num_requests_running", "gauge", "requests", "Requests that run"),
    Family("vllm:kv_cache_usage_perc", "gauge", "0 to 1", "Full-attention pages held by running requests"),
)


def help_text(family: Family) -> str:
    """Prometheus' HELP line."""
    return f"{family.meaning} ({family.unit})"
