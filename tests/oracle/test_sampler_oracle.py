"""The sampler's mathematics against the classes it follows, in transformers' generation_diffusion_gemma.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.diffusion_gemma import generation_diffusion_gemma

from dgemma_runtime.parameters import REFERENCE_DEFAULTS, default_parameters
from dgemma_runtime.sampler import StoppingRule, accept, mean_entropy, temperature

ORACLE: Any = generation_diffusion_gemma
VOCABULARY = 50


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors; a pool of threads only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _entropies(logits: torch.Tensor) -> Any:
    """[rows] float32 in nats, of logits [1, rows, vocabulary], computed as the oracle does."""
    distribution: Any = torch.distributions.Categorical(logits=logits)
    return distribution.entropy()[0].numpy()


@pytest.mark.parametrize("max_denoising_steps", [1, 2, 3, 7, 48, 64, 128, 1000])
@pytest.mark.parametrize(("t_min", "t_max"), [(0.4, 0.8), (0.0001, 1.0), (0.1, 0.3), (1.0, 2.7), (1 / 3, 2 / 3)])
def test_the_temperature_is_bit_for_bit_the_oracle_s(max_denoising_steps: int, t_min: float, t_max: float) -> None:
    processor = ORACLE.LinearTemperatureScheduleLogitsProcessor(t_min, t_max, max_denoising_steps)
    scores = torch.tensor([1.0, 3.7, -29.9, 12.345], dtype=torch.float32)
    for steps_left in range(1, max_denoising_steps + 1):
        expected = processor(torch.empty(0), scores, torch.tensor(steps_left, dtype=torch.int32))
        value = np.float32(temperature(steps_left, max_denoising_steps, t_min, t_max))
        assert (scores.numpy() / value).tolist() == expected.tolist()


def _logits(rng: np.random.Generator, rows: int, sharpness: float) -> torch.Tensor:
    return torch.from_numpy((rng.standard_normal((1, rows, VOCABULARY)) * sharpness).astype(np.float32))


@pytest.mark.parametrize("length", [1, 5, 64, 256])
@pytest.mark.parametrize("bound", [1e-6, 0.01, 0.1, 1.0, 20.0, 1e4])
def test_acceptance_is_the_oracle_s(length: int, bound: float) -> None:
    rng = np.random.default_rng(length)
    sampler = ORACLE.EntropyBoundSampler(ORACLE.EntropyBoundSamplerConfig(bound), length, VOCABULARY, 48)
    ids = torch.zeros((1, length), dtype=torch.int64)
    for sharpness in (0.1, 1, 3, 10, 10, 30, 30, 100, 100, 1000):
        logits = _logits(rng, length, sharpness)
        sampler.accept_canvas(ids, ids + 1, logits, 1)
        assert accept(_entropies(logits), bound).tolist() == sampler.accepted_token_mask[0].tolist()


def test_equal_entropies_are_accepted_in_order_of_position() -> None:
    logits = torch.zeros((1, 8, VOCABULARY))
    sampler = ORACLE.EntropyBoundSampler(
        ORACLE.EntropyBoundSamplerConfig(2.5 * float(np.log(VOCABULARY))), 8, VOCABULARY, 48
    )
    ids = torch.zeros((1, 8), dtype=torch.int64)
    sampler.accept_canvas(ids, ids + 1, logits, 1)
    entropies = _entropies(logits)
    accepted = accept(entropies, sampler.entropy_bound)
    assert accepted.tolist() == [True] * 3 + [False] * 5
    assert accepted.sum() == sampler.accepted_token_mask.sum()


@pytest.mark.parametrize("stability_threshold", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("confidence_threshold", [1e-5, 0.005, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_stopping_is_the_oracle_s(stability_threshold: int, confidence_threshold: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    oracle = ORACLE.StableAndConfidentStoppingCriteria(stability_threshold, confidence_threshold)
    rule = StoppingRule(stability_threshold, confidence_threshold)
    canvas = rng.integers(0, VOCABULARY, 16, dtype=np.int32)
    decisions = []
    for _ in range(60):
        if rng.random() < 0.35:
            canvas = canvas.copy()
            canvas[rng.integers(16)] = rng.integers(VOCABULARY)
        logits = _logits(rng, 16, sharpness=float(rng.choice([2, 12, 60, 1000])))
        entropies = _entropies(logits)
        expected = oracle(torch.from_numpy(canvas)[None].long(), logits)
        decisions.append(rule.update(canvas, mean_entropy(entropies)))
        assert decisions[-1] == bool(expected)
    assert not all(decisions)


def test_a_canvas_starts_with_a_fresh_history() -> None:
    oracle = ORACLE.StableAndConfidentStoppingCriteria(1, 0.1)
    canvas = np.zeros(4, np.int32)
    sharp = torch.full((1, 4, VOCABULARY), -1000.0)
    sharp[..., 0] = 1000.0
    for _ in range(2):
        oracle.reset()
        rule = StoppingRule(1, 0.1)
        for expected in (False, True):
            assert bool(oracle(torch.from_numpy(canvas)[None].long(), sharp)) == expected
            assert rule.update(canvas, mean_entropy(np.zeros(4, np.float32))) == expected


def test_the_fallback_defaults_are_the_oracle_s() -> None:
    expected = ORACLE.DiffusionGemmaGenerationConfig._get_default_generation_params()
    expected["entropy_bound"] = expected.pop("sampler_config").entropy_bound
    del expected["max_new_tokens"]  # a server must not inherit it
    assert dict(REFERENCE_DEFAULTS) == expected


def test_a_saved_generation_config_gives_its_values(tmp_path: Path) -> None:
    config = ORACLE.DiffusionGemmaGenerationConfig(
        max_denoising_steps=12,
        sampler_config=ORACLE.EntropyBoundSamplerConfig(0.25),
        t_min=0.3,
        t_max=0.9,
        stability_threshold=2,
        confidence_threshold=0.01,
        eos_token_id=[1, 106, 50],
    )
    config.save_pretrained(tmp_path)
    parameters = default_parameters(json.loads((tmp_path / "generation_config.json").read_text()))
    assert parameters.end_ids == (1, 106, 50)
    assert parameters.max_tokens is None
    values = (parameters.max_denoising_steps, parameters.entropy_bound, parameters.t_min, parameters.t_max)
    assert values == (12, 0.25, 0.3, 0.9)
    assert (parameters.stability_threshold, parameters.confidence_threshold) == (2, 0.01)
