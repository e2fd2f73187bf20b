"""How often a server is started again, and after which pauses. Servers that fail are in tests/server/test_faults.py."""

from __future__ import annotations

import pytest

from dgemma_runtime.errors import ConfigurationError
from dgemma_runtime.supervisor import RestartCount, RestartPolicy


def test_failures_one_after_another_are_too_many_at_last() -> None:
    count = RestartCount(RestartPolicy(restarts=3, window_s=100))
    found = []
    for moment in range(0, 40, 10):
        count.ready(float(moment))
        found.append(count.failed(moment + 5.0))
    assert found == [1, 2, 3, None]


def test_service_for_a_window_clears_the_count() -> None:
    count = RestartCount(RestartPolicy(restarts=1, window_s=100))
    for moment in (0.0, 200.0, 400.0):
        count.ready(moment)
        assert count.failed(moment + 101) == 1
    count.ready(600.0)
    assert count.failed(650.0) is None


def test_time_spent_on_starting_clears_nothing() -> None:
    count = RestartCount(RestartPolicy(restarts=2, window_s=100))
    count.ready(0.0)
    assert [count.failed(moment) for moment in (10.0, 1000.0, 2000.0)] == [1, 2, None]


def test_none_are_allowed() -> None:
    assert RestartCount(RestartPolicy(restarts=0)).failed(0.0) is None


def test_pauses_grow_up_to_a_limit() -> None:
    assert [RestartPolicy().pause_s(attempt) for attempt in range(1, 9)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_wrong_policies_are_named() -> None:
    with pytest.raises(ConfigurationError, match="restarts must be at least 0, got -1"):
        RestartPolicy(restarts=-1)
    with pytest.raises(ConfigurationError, match="restart_window must be above 0 seconds, got nan"):
        RestartPolicy(window_s=float("nan"))
