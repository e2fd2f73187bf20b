"""The watchdog: calls that overrun, threads that are gone, and nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from dgemma_runtime.contract import Engine
from dgemma_runtime.errors import EngineError
from dgemma_runtime.service import Service
from dgemma_runtime.testing import gated, scripted_engine, start_service, submit
from dgemma_runtime.watchdog import END_WITHIN_S, Watchdog, WatchedEngine

Watch = Callable[..., tuple[Service, list[int], list[float]]]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """A service under a watchdog: the service, the seconds until the process would end, the moments of its beats."""
    with ExitStack() as stack:

        def build(engine: Engine, step_timeout_s: float) -> tuple[Service, list[int], list[float]]:
            watched = WatchedEngine(engine)
            service = start_service(watched)
            ends: list[int] = []
            beats: list[float] = []
            dog = Watchdog(service, watched, step_timeout_s, lambda: beats.append(time.monotonic()), ends.append)
            dog.start()
            stack.callback(service.stop)
            stack.callback(dog.stop)
            stack.callback(dog.expect_end)
            return service, ends, beats

        yield build


@contextmanager
def released(engine: object) -> Iterator[None]:
    """Lets a gated engine's thread go on at the end."""
    try:
        yield
    finally:
        engine.permits.release(1000)  # type: ignore[attr-defined]


def test_a_call_that_overruns_ends_every_request_and_the_process(watch: Watch) -> None:
    engine = gated({"a": "x" * 50, "b": "y" * 50})
    with released(engine):
        service, ends, _ = watch(engine, 0.3)
        engine.permits.release()  # the first call of a kind may take ten times as long
        running, waiting = submit(service, "a"), submit(service, "b")
        started = time.monotonic()
        for recorder in (running, waiting):
            finished = recorder.finished(5)
            assert finished.reason == "error"
            assert "the engine failed: a call of the engine (denoise, " in str(finished.error)
            assert "raise step_timeout_s (0.3)" in str(finished.error)
            assert recorder.kinds.count("Finished") == 1
        assert time.monotonic() - started < 2
        assert not service.healthy
        with pytest.raises(EngineError, match="has not returned"):
            submit(service, "a")
        time.sleep(0.3)
        assert ends == [END_WITHIN_S]


def test_the_first_call_of_a_kind_may_be_slow(watch: Watch) -> None:
    engine = gated({"a": "x" * 20})
    with released(engine):
        service, ends, _ = watch(engine, 0.2)
        recorder = submit(service, "a")
        assert engine.entered.acquire(timeout=5)
        time.sleep(0.8)
        engine.permits.release(1000)
        assert recorder.finished().text == "x" * 20
        assert (service.failure, ends) == (None, [])


def test_many_calls_shorter_than_the_limit_are_no_overrun(watch: Watch) -> None:
    service, ends, beats = watch(scripted_engine({"a": "x" * 200}, delay_s=0.02), 0.5)
    assert submit(service, "a").finished().text == "x" * 200
    assert (service.failure, ends) == (None, [])
    assert len(beats) >= 3


def test_an_engine_that_raises_ends_the_process(watch: Watch) -> None:
    service, ends, _ = watch(scripted_engine({"a": "x"}, fail_on={"denoise": 1}), 10)
    assert "scripted failure" in str(submit(service, "a").finished().error)
    time.sleep(0.6)
    assert ends == [END_WITHIN_S]


def test_a_thread_that_is_gone_is_a_failure(watch: Watch) -> None:
    service, ends, _ = watch(scripted_engine({"a": "x"}), 10)
    assert service.healthy
    thread, service._thread = (
        service._thread,
        threading.Thread(),
    )  # one that does not run stands for one that has vanished
    time.sleep(0.6)
    assert service.failure == "the engine failed: its thread has ended by itself"
    assert ends == [END_WITHIN_S]
    service._thread = thread


def test_a_stop_on_purpose_is_none(watch: Watch) -> None:
    engine = WatchedEngine(scripted_engine({"a": "x"}))
    service = start_service(engine)
    ends: list[int] = []
    dog = Watchdog(service, engine, 10, lambda: None, ends.append)
    dog.start()
    dog.expect_end()
    service.stop()
    time.sleep(0.6)
    dog.stop()
    assert (service.failure, ends) == (None, [])


def test_what_an_engine_does_is_passed_on() -> None:
    inner = scripted_engine({"a": "text"})
    engine = WatchedEngine(inner)
    service = start_service(engine)
    assert submit(service, "a").finished().text == "text"
    service.stop()
    assert engine.running_call() is None
    assert {call.kind for call in inner.calls} == {"encode", "denoise", "release", "close"}
    assert (engine.manifest, engine.limits) == (inner.manifest, inner.limits)
