"""Calls that run later: in order, all of them, whatever one of them does."""

from __future__ import annotations

import logging
import threading

import pytest

from dgemma_runtime.deferred import Deferred


def test_calls_run_in_order_and_nobody_waits() -> None:
    done: list[int] = []
    go_on = threading.Event()
    deferred = Deferred("test")
    deferred.call(lambda: done.append(0 if go_on.wait(20) else -1))
    for number in range(1, 50):
        deferred.call(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == []
    go_on.set()
    deferred.close(20)
    assert done == list(range(50))


def test_one_that_fails_is_logged_and_the_others_run(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    deferred = Deferred("test")
    with caplog.at_level(logging.ERROR):
        deferred.call(lambda: done.remove("nothing"))
        deferred.call(lambda: done.append("second"))
        deferred.close(20)
    assert done == ["second"]
    assert "a deferred call failed" in caplog.text


def test_the_end_does_not_wait_for_ever() -> None:
    done: list[bool] = []
    go_on = threading.Event()
    deferred = Deferred("test")
    deferred.call(lambda: done.append(go_on.wait(20)))
    deferred.close(0.05)
    assert done == []
    go_on.set()
    deferred.close(20)
    assert done == [True]
