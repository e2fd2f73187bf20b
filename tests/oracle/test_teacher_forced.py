"""The primary gate: the engine follows the oracle's canvases step by step, contexts below and above the window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.engine_probe import OnnxRuntimeProbe
from dgemma_build.gate import check_generation
from dgemma_build.oracle import GenerationTrace, Model, trace_generation
from dgemma_runtime.noise import CanvasNoise

NAMES = ("demo", "odd_a", "odd_b")
CONTEXTS: dict[str, Callable[[int], int]] = {
    "one token": lambda window: 1,
    "below the window": lambda window: window // 2,
    "one before the window": lambda window: window - 1,
    "the window": lambda window: window,
    "one behind the window": lambda window: window + 1,
    "far above the window": lambda window: 3 * window + 2,
}


def trace(model: Model, context: int, seed: int, **options: object) -> GenerationTrace:
    """Two canvases behind a random prompt."""
    prompt = np.random.default_rng(seed).integers(0, model.config.text_config.vocab_size, context)
    length = 2 * model.config.canvas_length
    return trace_generation(
        model, prompt.tolist(), seed, CanvasNoise, max_new_tokens=length, eos_token_id=None, **options
    )


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_agrees(
    name: str, context: str, oracle: Callable[[str], Model], engine_directory: Callable[[str], Path]
) -> None:
    model = oracle(name)
    window = model.config.text_config.sliding_window
    run = trace(model, CONTEXTS[context](window), seed=len(context))
    probe = OnnxRuntimeProbe(engine_directory(name), max_tokens=8 * window, threads=1)

    report = check_generation(run, probe)

    assert report.passed, "\n".join(report.failures)
    assert report.steps == sum(len(canvas.steps) for canvas in run.canvases)
    assert report.canvases == 2


@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefill_and_neighbours_change_nothing(
    name: str, oracle: Callable[[str], Model], engine_directory: Callable[[str], Path]
) -> None:
    model = oracle(name)
    window = model.config.text_config.sliding_window
    run = trace(model, 2 * window + 5, seed=3, max_denoising_steps=5, stability_threshold=None)
    probe = OnnxRuntimeProbe(engine_directory(name), max_tokens=8 * window, neighbours=2, threads=1)

    report = check_generation(run, probe, encode_chunk=window // 2 + 1)

    assert report.passed, "\n".join(report.failures)
