"""The gate is sharp: an oracle with one deliberate error is told from the engine, whichever the error.

The generated checkpoints are there for this. The demo checkpoint is trained to be sure of its answers, so that small
errors, and those of the decoder alone, may stay below the bars there; what changes the encoder's structure does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dgemma_build.engine_probe import OnnxRuntimeProbe
from dgemma_build.gate import check_generation
from dgemma_build.model_errors import MODEL_ERRORS, revealing_run
from dgemma_build.oracle import Model
from dgemma_build.oracle_probe import OracleProbe
from dgemma_runtime.noise import CanvasNoise

STRUCTURAL = tuple(
    error
    for error in MODEL_ERRORS
    if error.startswith(("window one", "encoder and decoder", "input_layernorm", "post_", "pre_", "self_attn"))
)


@pytest.mark.parametrize("name", ["demo", "odd_a", "odd_b"])
def test_every_error_is_caught(
    name: str, oracle: Callable[[str], Model], engine_directory: Callable[[str], Path]
) -> None:
    model = oracle(name)
    probe = OnnxRuntimeProbe(engine_directory(name), threads=1)
    assert check_generation(revealing_run(model, CanvasNoise), probe).passed
    missed = []

    for error in STRUCTURAL if name == "demo" else MODEL_ERRORS:
        with MODEL_ERRORS[error](model):
            wrong = revealing_run(model, CanvasNoise)
        if check_generation(wrong, probe, stop_at_first=True).passed:
            missed.append(error)

    assert missed == []
    assert check_generation(revealing_run(model, CanvasNoise), probe).passed, "an error was left behind in the model"


def test_the_oracle_passes_its_own_gate(oracle: Callable[[str], Model]) -> None:
    model = oracle("odd_a")
    run = revealing_run(model, CanvasNoise)

    for carry_soft in (False, True):
        report = check_generation(run, OracleProbe(model, carry_soft), encode_chunk=5)
        assert report.passed, "\n".join(report.failures)
        assert report.entropy < 5e-5


def test_the_gate_notices_a_wrong_token_and_a_stale_soft_embedding(oracle: Callable[[str], Model]) -> None:
    class Forgetful(OracleProbe):
        def denoise(self, canvas_ids, soft, uniforms, temperature):  # type: ignore[no-untyped-def]
            return super().denoise(canvas_ids, None, uniforms, temperature)

    class OffByOne(OracleProbe):
        def encode(self, token_ids):  # type: ignore[no-untyped-def]
            super().encode(np.append(token_ids[:-1], (token_ids[-1] + 1) % 200).astype(np.int32))

    model = oracle("odd_a")
    run = revealing_run(model, CanvasNoise)

    assert not check_generation(run, Forgetful(model)).passed
    failures = check_generation(run, OffByOne(model)).failures
    assert failures[0].startswith("canvas 0: K of layer 0")
