"""Temperature, acceptance and stopping as properties; the oracle's own numbers are in tests/oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgemma_runtime.contract import Float32Array
from dgemma_runtime.sampler import StoppingRule, accept, mean_entropy, temperature

entropies = arrays(np.float32, st.integers(1, 64), elements=st.floats(0, 12, width=32))
bounds = st.floats(1e-6, 1e3)


@given(entropies, bounds)
def test_the_most_certain_position_is_accepted(values: Float32Array, bound: float) -> None:
    assert accept(values, bound)[values.argmin()]


@given(entropies, bounds)
def test_zero_entropy_is_accepted(values: Float32Array, bound: float) -> None:
    assert accept(values, bound)[values == 0].all()


@given(entropies, bounds, bounds)
def test_a_higher_bound_accepts_at_least_as_much(values: Float32Array, a: float, b: float) -> None:
    low, high = accept(values, min(a, b)), accept(values, max(a, b))
    assert (high | ~low).all()


@given(entropies, bounds)
def test_accepted_positions_are_more_certain_than_the_others(values: Float32Array, bound: float) -> None:
    accepted = accept(values, bound)
    if not accepted.all():
        assert values[accepted].max() <= values[~accepted].min()


@given(entropies, bounds)
def test_the_bound_is_kept(values: Float32Array, bound: float) -> None:
    taken = np.sort(values[accept(values, bound)]).astype(np.float64)
    assert taken[:-1].sum() <= bound * (1 + 1e-5) + 1e-5


def test_acceptance_by_hand() -> None:
    values = np.array([0.3, 0.0, 0.05, 0.04, 0.2], np.float32)
    assert accept(values, 0.1).tolist() == [False, True, True, True, True]  # 0.09 before the 0.2, 0.29 before the 0.3
    assert accept(values, 0.08).tolist() == [False, True, True, True, False]


def test_the_schedule_falls_from_t_max_towards_t_min() -> None:
    values = [temperature(left, 48, 0.4, 0.8) for left in range(48, 0, -1)]
    assert values[0] == np.float32(0.8)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0.4 + 0.4 / 48, rel=1e-6)
    assert temperature(3, 7, 1.5, 1.5) == 1.5


def run(rule: StoppingRule, canvases: list[int], entropy: float) -> list[bool]:
    mean = mean_entropy(np.full(4, entropy, np.float32))
    return [rule.update(np.full(4, value, np.int32), mean) for value in canvases]


def test_stopping_needs_as_many_equal_canvases_before_as_the_threshold() -> None:
    assert run(StoppingRule(0, 0.01), [1, 2, 3], 0.0) == [True, True, True]
    assert run(StoppingRule(1, 0.01), [1, 2, 2, 3, 3], 0.0) == [False, False, True, False, True]
    assert run(StoppingRule(2, 0.01), [1, 1, 2, 2, 2, 2], 0.0) == [False, False, False, False, True, True]


def test_stopping_needs_confidence_strictly_below_the_threshold() -> None:
    assert run(StoppingRule(1, 0.5), [1, 1], 0.5) == [False, False]
    assert run(StoppingRule(1, 0.5), [1, 1], 0.49) == [False, True]


@pytest.mark.parametrize("thresholds", [(None, 0.1), (1, None), (None, None)])
def test_no_threshold_means_fixed_steps(thresholds: tuple[int | None, float | None]) -> None:
    assert not any(run(StoppingRule(*thresholds), [1] * 10, 0.0))


def test_one_entropy_that_is_not_finite_shows_in_the_mean() -> None:
    for odd in (np.nan, np.inf):
        values = np.zeros(256, np.float32)
        values[17] = odd
        assert not np.isfinite(mean_entropy(values))
