"""Settings, and what memory they leave an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dgemma_runtime.contract import FULL, SLIDING, LayerSpec
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.memory_formulas import TokenBytes, token_bytes
from dgemma_runtime.settings import RuntimeSettings, in_units, plan_limits

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


def test_bytes_of_a_token_by_hand() -> None:
    assert token_bytes(DEMO.model, "fp32") == TokenBytes(full=3 * 2 * 64 * 4, sliding=9 * 2 * 64 * 4)
    assert token_bytes(DEMO.model, "bf16") == TokenBytes(3 * 2 * 64 * 2, 9 * 2 * 64 * 2)
    # Keys of full layers stay in bf16.
    assert token_bytes(DEMO.model, "fp8") == TokenBytes(3 * (2 + 1) * 64, 9 * 2 * 64)
    with pytest.raises(ConfigurationError, match="kv_dtype is 'fp3'"):
        token_bytes(DEMO.model, "fp3")


def test_by_default_every_slot_can_hold_a_whole_context_and_prefixes_stay() -> None:
    limits = plan_limits(DEMO, RuntimeSettings())
    assert limits.full_pages == (8 + 1) * 262_144 // 64  # 262,144 tokens beyond
    assert (limits.max_batch_size, limits.max_encode_tokens, limits.page_size) == (8, 512, 64)
    # Window 31 and chunk 512 may begin anywhere in a page: 543 tokens over at most 10 pages of 64. A kept window of 31
    # tokens before a page takes one.
    assert limits.sliding_pages == 8 * 10 + 8 * 1


def test_short_contexts_leave_room_for_as_many_again() -> None:
    limits = plan_limits(DEMO, RuntimeSettings(max_model_len=4096))
    assert limits.full_pages == 2 * 8 * 64


def test_without_a_prefix_cache_pages_are_for_what_runs() -> None:
    limits = plan_limits(DEMO, RuntimeSettings(prefix_cache=False))
    assert (limits.full_pages, limits.sliding_pages) == (8 * 4096, 80)


@pytest.mark.parametrize("window", [1, 2, 64, 65, 66, 1024])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_a_kept_window_covers_what_the_next_token_sees(window: int, size: int) -> None:
    """Of a prefix that ends with a page: the pages that hold its last window - 1 tokens."""
    model = replace(DEMO, model=replace(DEMO.model, sliding_window=window))
    with_windows, without = (
        plan_limits(model, RuntimeSettings(page_size=size, prefix_cache=kept)).sliding_pages for kept in (True, False)
    )
    end = 4096 * size
    seen = {position // size for position in range(end - (window - 1), end)}
    assert with_windows - without == 8 * len(seen)


def test_memory_limits_the_pages_but_never_the_context() -> None:
    token = token_bytes(DEMO.model, "fp32")
    full, sliding = 64 * token.full, 64 * token.sliding
    roomy = plan_limits(DEMO, RuntimeSettings(kv_memory_bytes=5000 * full + 88 * sliding))
    assert (roomy.full_pages, roomy.sliding_pages) == (5000, 88)
    # Kept windows go last: one stays.
    tight = plan_limits(DEMO, RuntimeSettings(kv_memory_bytes=4096 * full + 81 * sliding))
    assert (tight.full_pages, tight.sliding_pages) == (4096, 81)
    short = 4095 * full + 81 * sliding
    with pytest.raises(ConfigurationError) as caught:
        plan_limits(DEMO, RuntimeSettings(kv_memory_bytes=short))
    message = str(caught.value)
    for words in (
        f"kv_memory_bytes is {short} (",
        "max_model_len (262144 tokens)",
        "4096 full and 81 sliding pages",
        f"takes {short + full} (",
        "raise kv",
    ):
        assert words in message
    smaller = RuntimeSettings(kv_memory_bytes=short, max_model_len=262_080)
    assert plan_limits(DEMO, smaller).full_pages == 4095


def test_page_counts_can_be_given() -> None:
    limits = plan_limits(DEMO, RuntimeSettings(full_pages=4096, sliding_pages=10))
    assert (limits.full_pages, limits.sliding_pages) == (4096, 10)
    changes: list[dict[str, Any]] = [{"full_pages": 4095}, {"sliding_pages": 9}]
    for change in changes:
        ((name, count),) = change.items()
        with pytest.raises(ConfigurationError, match=rf"{name} is {count}, .*needs {count + 1} pages.*raise {name}"):
            plan_limits(DEMO, RuntimeSettings(**change))
    with pytest.raises(ConfigurationError, match="kv_memory_bytes is 4294967296"):
        plan_limits(DEMO, RuntimeSettings(full_pages=100_000, kv_memory_bytes=2**32))


def test_a_short_context_needs_little() -> None:
    limits = plan_limits(DEMO, RuntimeSettings(max_model_len=100, max_batch_size=2))
    assert (limits.full_pages, limits.sliding_pages, limits.max_encode_tokens) == (2 * 4, 2 * (2 + 1), 100)


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
    assert plan_limits(only_sliding, RuntimeSettings()).full_pages == 9 * 4096
    only_full = replace(DEMO, model=replace(DEMO.model, layers=LAYERS[9:]))
    assert plan_limits(only_full, RuntimeSettings(kv_memory_bytes=2**30)).full_pages > 4096


def test_bytes_for_a_person() -> None:
    assert [in_units(size) for size in (0, 1_500_000, 2**30, 5 * 2**40)] == [
        "0.0 MiB",
        "1.4 MiB",
        "1.00 GiB",
        "5,120.00 GiB",
    ]
