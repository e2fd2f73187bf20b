"""The harness around transformers: shared randomness, options, margins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dgemma_build.oracle import Model, _acceptance_margin, generate, shared_randomness, trace_generation
from dgemma_runtime.noise import CanvasNoise

Oracle = Callable[[str], Model]


def prompt_of(model: Model, seed: int, length: int = 9) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, model.config.text_config.vocab_size, length).tolist()
    return ids


def test_the_first_canvas_and_what_renoises_it_are_the_documented_noise(oracle: Oracle) -> None:
    model = oracle("odd_a")
    run = trace_generation(model, prompt_of(model, 0), 7, CanvasNoise, max_new_tokens=24, eos_token_id=None)

    for canvas in run.canvases:
        noise = CanvasNoise(7, canvas.canvas_index, 12, 211)
        np.testing.assert_array_equal(canvas.steps[0].canvas_ids, noise.initial())
        for step, following in zip(canvas.steps, canvas.steps[1:], strict=False):
            np.testing.assert_array_equal(step.uniforms, noise.uniforms(step.step))
            renoised = np.where(step.accepted, step.sampled_ids, noise.renoise(step.step))
            np.testing.assert_array_equal(following.canvas_ids, renoised)
            np.testing.assert_array_equal(following.soft, step.next_soft)


def test_the_trace_is_what_generate_returns(oracle: Oracle) -> None:
    model = oracle("odd_b")
    prompt = prompt_of(model, 1)
    run = trace_generation(model, prompt, 3, CanvasNoise, max_new_tokens=45, eos_token_id=None)

    assert len(run.canvases) == 3
    np.testing.assert_array_equal(run.output_ids, np.concatenate([canvas.output_ids for canvas in run.canvases]))
    np.testing.assert_array_equal(
        run.output_ids, generate(model, [prompt], [3], CanvasNoise, max_new_tokens=45, eos_token_id=None)[0]
    )
    assert [canvas.position for canvas in run.canvases] == [9, 24, 39]


def test_a_row_of_a_batch_gets_its_own_seed(oracle: Oracle) -> None:
    model = oracle("odd_a")
    prompts, seeds = [prompt_of(model, seed) for seed in (0, 3, 5)], [0, 3, 5]
    options = {"max_new_tokens": 12, "eos_token_id": None, "stability_threshold": None, "max_denoising_steps": 8}
    runs = [trace_generation(model, p, s, CanvasNoise, **options) for p, s in zip(prompts, seeds, strict=True)]
    assert [run.near_ties(1e-4) for run in runs] == [[], [], []], "choose other seeds"

    together = generate(model, prompts, seeds, CanvasNoise, **options)

    np.testing.assert_array_equal(together, np.stack([run.output_ids for run in runs]))


def test_fixed_steps_are_fixed_and_leave_the_defaults_alone(oracle: Oracle) -> None:
    model = oracle("odd_a")
    fixed = {"max_new_tokens": 12, "eos_token_id": None, "max_denoising_steps": 30, "stability_threshold": None}
    run = trace_generation(model, prompt_of(model, 0), 1, CanvasNoise, **fixed)
    assert [len(canvas.steps) for canvas in run.canvases] == [30]
    assert all(step.margins.confidence == np.inf for step in run.canvases[0].steps)

    adaptive = trace_generation(
        model, prompt_of(model, 0), 1, CanvasNoise, max_new_tokens=12, eos_token_id=None, max_denoising_steps=30
    )
    assert len(adaptive.canvases[0].steps) < 30
    assert adaptive.canvases[0].steps[-1].finished


def test_randomness_is_given_back(oracle: Oracle) -> None:
    model = oracle("odd_a")
    before = torch.multinomial
    with shared_randomness(model, [0], CanvasNoise):
        assert torch.multinomial is not before
    assert torch.multinomial is before
    assert "_prepare_denoiser_inputs" not in vars(model)


def test_a_draw_that_generate_does_not_make_is_refused(oracle: Oracle) -> None:
    with shared_randomness(oracle("odd_a"), [0], CanvasNoise), pytest.raises(ValueError, match="unexpected draw"):
        torch.multinomial(torch.ones(3, 211) / 211, 1)


@pytest.mark.parametrize(
    ("entropies", "bound", "margin"),
    [
        ([0.5, 0.1, 0.3], 0.25, 0.15),  # before: 0, 0.1, 0.4; 0.25 - 0.1 = 0.15 to the bound, 0.4 - 0.25 = 0.15
        ([0.1, 0.1, 0.1], 10.0, 9.8),  # all accepted: only the bound can turn it
        ([0.2, 0.2001, 0.9], 0.1, 0.0001),  # the first out could be the first in
    ],
)
def test_acceptance_margin(entropies: list[float], bound: float, margin: float) -> None:
    assert _acceptance_margin(np.array(entropies, np.float32), bound) == pytest.approx(margin, rel=1e-3)
