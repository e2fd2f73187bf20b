"""Noise: the documented layout, independence, ranges."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import Philox

from dgemma_runtime.noise import CanvasNoise

GOLDEN_INITIAL = [78, 26, 308, 739]
GOLDEN_UNIFORMS = [3232011, 2092750, 7654995, 15123076]
GOLDEN_RENOISE = [222, 867, 581, 410]


def raw(seed: int, step: int, canvas_index: int, stream: int, length: int) -> list[int]:
    key, counter = np.array([seed, 0], np.uint64), np.array([0, step, canvas_index, stream], np.uint64)
    generator = Philox(key=key, counter=counter)
    return [int(value) for value in generator.random_raw(length)]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("vocab_size", [1, 2, 1024, 262_144])
def test_layout_is_the_documented_one(seed: int, vocab_size: int) -> None:
    noise = CanvasNoise(seed, canvas_index=7, canvas_length=30, vocab_size=vocab_size)
    tokens = [(value >> 32) * vocab_size >> 32 for value in raw(seed, 0, 7, 0, 30)]
    assert noise.initial().tolist() == tokens
    for step in (0, 1, 47, 1023):
        assert noise.uniforms(step).tolist() == [(value >> 40) / 2**24 for value in raw(seed, step, 7, 1, 30)]
        tokens = [(value >> 32) * vocab_size >> 32 for value in raw(seed, step, 7, 2, 30)]
        assert noise.renoise(step).tolist() == tokens


def test_golden_values_do_not_change_between_versions() -> None:
    noise = CanvasNoise(1234, canvas_index=2, canvas_length=4, vocab_size=1000)
    assert noise.initial().tolist() == GOLDEN_INITIAL
    assert (noise.uniforms(3) * 2**24).astype(int).tolist() == GOLDEN_UNIFORMS
    assert noise.renoise(3).tolist() == GOLDEN_RENOISE


def test_draws_do_not_depend_on_their_order() -> None:
    first = CanvasNoise(5, 0, 64, 1024)
    second = CanvasNoise(5, 0, 64, 1024)
    expected = [first.initial(), first.uniforms(0), first.renoise(0), first.uniforms(1)]
    drawn = [second.uniforms(1), second.renoise(0), second.uniforms(0), second.initial()][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(expected, drawn, strict=True))


def test_seed_canvas_step_and_stream_all_matter() -> None:
    draws = [
        CanvasNoise(seed, canvas_index, 64, 2**20).renoise(step).tobytes()
        for seed in (0, 1)
        for canvas_index in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(draws)) == 8
    noise = CanvasNoise(0, 0, 64, 2**20)
    assert not np.array_equal(noise.initial(), noise.renoise(0))


def test_ranges_and_types() -> None:
    noise = CanvasNoise(3, 0, 4096, 1000)
    uniforms, tokens = noise.uniforms(0), noise.initial()
    assert uniforms.dtype == np.float32
    assert tokens.dtype == np.int32
    assert 0 <= uniforms.min() < 0.01
    assert 0.99 < uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.02
    assert 0 <= tokens.min() < 10
    assert 990 <= tokens.max() < 1000
