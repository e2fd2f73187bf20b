"""One canvas from noise to its result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import Float32Array, Int32Array, SequencePages
from dgemma_runtime.errors import EngineError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters, default_parameters

LENGTH, VOCABULARY = 6, 1000
PAGES = SequencePages(np.zeros(1, np.int32), np.zeros(1, np.int32))
ARGMAX: Int32Array = np.arange(LENGTH, dtype=np.int32)
SAMPLED: Int32Array = ARGMAX + 100
MIXED: Float32Array = np.array([0.0, 5.0, 0.01, 5.0, 5.0, 0.02], np.float32)
ACCEPTED = [0, 2, 5, 1]  # with the bound 0.1: those three, and the next after them
CERTAIN: Float32Array = np.zeros(LENGTH, np.float32)
DEFAULTS = default_parameters({"eos_token_id": 1})


def make(parameters: GenerationParameters = DEFAULTS) -> tuple[Canvas, CanvasNoise]:
    return Canvas(parameters, CanvasNoise(9, 0, LENGTH, VOCABULARY)), CanvasNoise(9, 0, LENGTH, VOCABULARY)


def test_the_first_row_is_noise() -> None:
    canvas, noise = make()
    row = canvas.row(slot=3, position=17, pages=PAGES)
    assert row.canvas_ids.tolist() == noise.initial().tolist()
    assert row.uniforms.tolist() == noise.uniforms(0).tolist()
    assert (row.slot, row.position, row.first_step, row.pages) == (3, 17, True, PAGES)
    assert row.temperature == np.float32(0.8)


def test_accepted_positions_take_their_sample_the_others_fresh_noise() -> None:
    canvas, noise = make()
    assert not canvas.advance(ARGMAX, SAMPLED, MIXED)
    expected = noise.renoise(0)
    expected[ACCEPTED] = SAMPLED[ACCEPTED]
    row = canvas.row(0, 0, PAGES)
    assert row.canvas_ids.tolist() == expected.tolist()
    assert row.canvas_ids.dtype == np.int32
    assert row.uniforms.tolist() == noise.uniforms(1).tolist()
    assert not row.first_step
    assert row.temperature < np.float32(0.8)
    assert canvas.argmax_ids.tolist() == ARGMAX.tolist()


def test_greedy_takes_the_argmax_and_keeps_the_schedule() -> None:
    canvas, noise = make(replace(DEFAULTS, greedy=True))
    assert canvas.temperature == np.float32(0.8)
    canvas.advance(ARGMAX, SAMPLED, MIXED)
    expected = noise.renoise(0)
    expected[ACCEPTED] = ARGMAX[ACCEPTED]
    assert canvas.ids.tolist() == expected.tolist()


def test_adaptive_stopping_after_two_equal_certain_steps() -> None:
    canvas, _ = make()
    assert [canvas.advance(ARGMAX, SAMPLED, CERTAIN) for _ in range(2)] == [False, True]
    assert canvas.step == 2


def test_steps_run_out() -> None:
    canvas, _ = make(replace(DEFAULTS, max_denoising_steps=3))
    assert [canvas.advance(ARGMAX + step, SAMPLED, MIXED) for step in range(3)] == [False, False, True]
    assert canvas.argmax_ids.tolist() == (ARGMAX + 2).tolist()


def test_fixed_steps_ignore_certainty() -> None:
    canvas, _ = make(replace(DEFAULTS, max_denoising_steps=5, stability_threshold=None))
    assert [canvas.advance(ARGMAX, SAMPLED, CERTAIN) for _ in range(5)] == [False] * 4 + [True]


def test_a_single_step_canvas() -> None:
    canvas, _ = make(replace(DEFAULTS, max_denoising_steps=1))
    assert canvas.advance(ARGMAX, SAMPLED, MIXED)


def test_results_may_be_views_that_the_engine_overwrites() -> None:
    canvas, _ = make()
    buffer = ARGMAX.copy()
    canvas.advance(buffer, SAMPLED, CERTAIN)
    buffer += 1
    assert canvas.argmax_ids.tolist() == ARGMAX.tolist()
    assert not canvas.advance(buffer, SAMPLED, CERTAIN), "the history must not change with the buffer"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_entropies_that_are_not_finite_are_an_error(value: float) -> None:
    canvas, _ = make()
    with pytest.raises(EngineError, match="not finite in step 1"):
        canvas.advance(ARGMAX, SAMPLED, np.array([value] + [0.0] * 5, np.float32))
