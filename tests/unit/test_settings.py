"""Settings, and what memory they leave an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.settings import PageBytes, RuntimeSettings, page_bytes, plan_limits

MANIFEST = scripted_manifest(1024, canvas_length=64, sliding_window=32, max_model_len=262_144)
# The demo checkpoint's shape: three full layers of one key-value head of 64.
LAYERS = (*[LayerSpec(SLIDING, 2, 32)] * 9, *[LayerSpec(FULL, 1, 64)] * 3)
DEMO = replace(MANIFEST, model=replace(MANIFEST.model, layers=LAYERS))


@pytest.mark.parametrize("name", ["max_model_len", "max_batch_size", "prefill_chunk", "page_size", "queue_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_odd_settings_are_refused(name: str, value: int) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ConfigurationError, match=rf"{name} must be an integer of at least 1, got"):
        RuntimeSettings(**settings)


def test_settings_of_gpus() -> None:
    assert RuntimeSettings(gpu=0).cuda_graphs is True
    with pytest.raises(ConfigurationError, match="gpu must be an integer of at least 0, got -1"):
        RuntimeSettings(gpu=-1)
    with pytest.raises(ConfigurationError, match="cuda_graphs must be true or false, got 1"):
        RuntimeSettings(cuda_graphs=1)  # type: ignore[arg-type]


def test_what_must_be_given_may_not_be_none() -> None:
    with pytest.raises(ConfigurationError, match="max_batch_size must be"):
        RuntimeSettings(max_batch_size=None)  # type: ignore[arg-type]


def test_the_budget_holds_a_chunk() -> None:
    with pytest.raises(ConfigurationError, match=r"prefill_budget \(100\) must be at least prefill_chunk \(512\)"):
        RuntimeSettings(prefill_budget=100)


def test_the_context_is_the_engine_s_own_unless_lowered() -> None:
    assert RuntimeSettings().context_length(MANIFEST) == 262_144
    assert RuntimeSettings(max_model_len=1000).context_length(MANIFEST) == 1000
    with pytest.raises(ConfigurationError, match="max_model_len is 262145, the engine was built for 262144 tokens"):
        RuntimeSettings(max_model_len=262_145).context_length(MANIFEST)


def test_page_bytes_by_hand() -> None:
    assert page_bytes(DEMO, 64) == PageBytes(full=3 * 2 * 64 * 4 * 64, sliding=9 * 2 * 64 * 4 * 64)
    assert page_bytes(replace(DEMO, kv_dtype="bf16"), 1) == PageBytes(3 * 2 * 64 * 2, 9 * 2 * 64 * 2)
    # Keys of full layers stay in bf16.
    assert page_bytes(replace(DEMO, kv_dtype="fp8"), 1) == PageBytes(3 * (2 + 1) * 64, 9 * 2 * 64)
    with pytest.raises(ConfigurationError, match="kv_dtype is 'fp3'"):
        page_bytes(replace(DEMO, kv_dtype="fp3"), 64)


def test_by_default_every_slot_can_hold_a_whole_context() -> None:
    limits = plan_limits(DEMO, RuntimeSettings())
    assert limits.full_pages == 8 * 262_144 // 64
    assert (limits.max_batch_size, limits.max_encode_tokens, limits.page_size) == (8, 512, 64)
    # Window 31 and chunk 512 may begin anywhere in a page: 543 tokens over at most 10 pages of 64.
    assert limits.sliding_pages == 8 * 10


def test_memory_limits_the_pages_but_never_the_context() -> None:
    size = page_bytes(DEMO, 64)
    budget = 5000 * size.full + 80 * size.sliding
    assert plan_limits(DEMO, RuntimeSettings(kv_memory_bytes=budget)).full_pages == 5000
    with pytest.raises(ConfigurationError) as caught:
        plan_limits(DEMO, RuntimeSettings(kv_memory_bytes=4095 * size.full + 80 * size.sliding))
    message = str(caught.value)
    assert all(text in message for text in ("262144 tokens", "4096 full", "kv_memory_bytes", "lower max_model_len"))
    smaller = RuntimeSettings(kv_memory_bytes=4095 * size.full + 80 * size.sliding, max_model_len=262_080)
    assert plan_limits(DEMO, smaller).full_pages == 4095


def test_page_counts_can_be_given() -> None:
    limits = plan_limits(DEMO, RuntimeSettings(full_pages=4096, sliding_pages=10))
    assert (limits.full_pages, limits.sliding_pages) == (4096, 10)
    changes: list[dict[str, Any]] = [{"full_pages": 4095}, {"sliding_pages": 9}, {"full_pages": 100_000}]
    for change in changes:
        with pytest.raises(ConfigurationError, match="raise kv_memory_bytes or the page counts"):
            plan_limits(DEMO, RuntimeSettings(**change))


def test_a_short_context_needs_little() -> None:
    limits = plan_limits(DEMO, RuntimeSettings(max_model_len=100, max_batch_size=2))
    assert (limits.full_pages, limits.sliding_pages, limits.max_encode_tokens) == (4, 4, 100)


def test_commits_fit_into_an_encode_call() -> None:
    assert plan_limits(DEMO, RuntimeSettings(prefill_chunk=16)).max_encode_tokens == 64


def test_a_chunk_is_the_engine_s_at_most() -> None:
    limited = replace(DEMO, max_encode_tokens=96)
    assert plan_limits(limited, RuntimeSettings()).max_encode_tokens == 96
    assert plan_limits(limited, RuntimeSettings(prefill_chunk=80)).max_encode_tokens == 80


def test_the_batch_is_the_engine_s_at_most() -> None:
    with pytest.raises(ConfigurationError, match="max_batch_size is 8, the engine was built for 4"):
        plan_limits(replace(DEMO, max_batch_size=4), RuntimeSettings())


def test_a_model_without_one_of_the_groups() -> None:
    only_sliding = replace(DEMO, model=replace(DEMO.model, layers=LAYERS[:9]))
    assert plan_limits(only_sliding, RuntimeSettings()).full_pages == 8 * 4096
    only_full = replace(DEMO, model=replace(DEMO.model, layers=LAYERS[9:]))
    assert plan_limits(only_full, RuntimeSettings()).full_pages == 8 * 4096
