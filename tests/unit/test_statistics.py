"""The stopwatch behind the engine's share of a request's time."""

from __future__ import annotations

import time

import pytest

from dgemma_runtime.statistics import Stopwatch


def test_a_stopwatch_adds_up_and_may_be_read_while_it_runs() -> None:
    watch = Stopwatch()
    assert watch.read_ns() == 0
    with watch.running():
        time.sleep(0.002)
        during = watch.read_ns()
        assert during >= 2_000_000
        time.sleep(0.002)
    first = watch.read_ns()
    assert first >= during + 2_000_000
    time.sleep(0.002)
    assert watch.read_ns() == first
    with pytest.raises(ValueError, match="work"), watch.running():
        raise ValueError("work")
    after = watch.read_ns()
    assert after > first
    assert watch.read_ns() == after
