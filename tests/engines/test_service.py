"""Requests through the real scheduler on the TensorRT engine: company, chunks and pages change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dgemma_runtime.contract import Manifest
from dgemma_runtime.settings import plan_limits
from dgemma_runtime.testing import small_settings, start_service, submit, tiny_tokenizer

if TYPE_CHECKING:
    from tests.engines.conftest import Harness

Make = Callable[..., "Harness"]
PROMPTS = ["a", "the stop " * 12, "st" * 40, "other words " * 5, "the", "op " * 30]


def answers(
    make: Make, manifest: Manifest, at_once: int, slots: int, spare_bytes: int | None = None
) -> tuple[list[list[int]], int]:
    """Token ids of the answers to PROMPTS, so many requests submitted together, so many canvases together.

    Also how many preemptions it took; `spare_bytes` is the memory that there is beyond what the engine opens with.
    """
    model = replace(manifest.model, vocab_size=tiny_tokenizer().get_vocab_size(), canvas_length=8, sliding_window=13)
    settings = small_settings(max_model_len=256, max_batch_size=slots)
    changed = replace(manifest, model=model, max_model_len=256)
    limits = plan_limits(changed, settings)
    sizes = (limits.max_batch_size, limits.max_encode_tokens, limits.page_size, limits.full_pages, limits.sliding_pages)
    harness = make(limits=sizes, manifest=changed)
    if spare_bytes is not None:
        harness.device.memory_bytes = harness.device.allocated_bytes + spare_bytes
    service = start_service(harness.engine, settings)
    found = []
    try:
        for start in range(0, len(PROMPTS), at_once):
            sinks = [
                submit(service, prompt, seed=len(prompt), max_tokens=40, max_denoising_steps=3, end_id=-1)
                for prompt in PROMPTS[start : start + at_once]
            ]
            found += [np.asarray(sink.finished().token_ids).tolist() for sink in sinks]
    finally:
        service.stop()
    assert service.failure is None
    assert harness.device.live == 0
    return found, service.statistics().preemptions


def test_company_changes_nothing(make: Make, manifest: Manifest) -> None:
    alone, _ = answers(make, manifest, at_once=1, slots=1)
    assert all(len(ids) == 40 for ids in alone)
    assert len({tuple(ids) for ids in alone}) == len(PROMPTS)
    assert answers(make, manifest, at_once=6, slots=4) == (alone, 0)
    assert answers(make, manifest, at_once=3, slots=2) == (alone, 0)


def test_too_little_memory_for_all_changes_nothing(make: Make, manifest: Manifest) -> None:
    """Requests wait for each other, and are answered as if there was enough."""
    alone, _ = answers(make, manifest, at_once=1, slots=1)
    found, preemptions = answers(make, manifest, at_once=6, slots=4, spare_bytes=30_000)
    assert found == alone
    assert 0 < preemptions < 30
