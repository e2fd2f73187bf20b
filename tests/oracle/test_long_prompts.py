"""Prompts of 8,192 tokens: chunk by chunk in our engine, at once in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.accept.context import long_case
from dgemma_build.accept.generations import near_ties, request_of, trace_case
from dgemma_build.bench.inprocess import run_requests, running_service
from dgemma_build.engine_probe import OnnxRuntimeProbe
from dgemma_build.gate import check_generation
from dgemma_build.oracle import GenerationTrace, Model

TOKENS = 8192
CHUNK = 512  # the runtime's default


@pytest.fixture(scope="module")
def trace(oracle: Callable[[str], Model]) -> GenerationTrace:
    """Two canvases of the oracle; its prefill takes most of the time."""
    model = oracle("demo")
    return trace_case(model, long_case(model, TOKENS, seed=0))


def test_generations_are_token_exact(
    trace: GenerationTrace, oracle: Callable[[str], Model], engine_directory: Callable[[str], Path]
) -> None:
    model = oracle("demo")
    assert near_ties(trace) == (), "choose another seed"
    case = long_case(model, TOKENS, seed=0)
    with running_service(engine_directory("demo"), threads=1, max_model_len=TOKENS + 256) as service:
        request = request_of(case, service.defaults, model.config.canvas_length)
        alone = run_requests(service, [request])[0].result()
        beside = run_requests(service, [request, request])

    assert len(trace.canvases) == 2
    np.testing.assert_array_equal(alone.token_ids, trace.output_ids)
    for outcome in beside:
        np.testing.assert_array_equal(outcome.result().token_ids, trace.output_ids)


def test_keys_values_and_steps_agree(trace: GenerationTrace, engine_directory: Callable[[str], Path]) -> None:
    """All 8,192 keys and values of full layers among them; the second canvas stands behind one committed in place."""
    probe = OnnxRuntimeProbe(engine_directory("demo"), max_tokens=TOKENS + 256, threads=1)

    report = check_generation(trace, probe, encode_chunk=CHUNK)

    assert report.passed, "\n".join(report.failures)
    assert report.canvases == 2
