"""The engine thread when something goes wrong, at its start and at its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dgemma_runtime.contract import CommitRow, DenoiseResult, DenoiseRow
from dgemma_runtime.engines.scripted import ScriptedEngine
from dgemma_runtime.errors import EngineError, Overloaded
from dgemma_runtime.events import Commit, Event, Finished, Preview
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.testing import (
    Recorder,
    gated,
    scripted_engine,
    small_settings,
    start_service,
    submit,
    tiny_codec,
)

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()


# ---------------------------------------------------------------- transports that fail


@pytest.mark.parametrize("kind", [Preview, Commit, Finished])
def test_a_sink_that_raises_ends_its_own_request_only(
    start: Start, kind: type[Event], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Recorder):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, kind):
                raise ConnectionError("gone")

    service = start(scripted_engine({"go": "x" * 20, "other": "y" * 100}))
    with caplog.at_level(logging.ERROR):
        broken = submit(service, "go", sink=Broken(), stream=True, stream_previews=True)
        other = submit(service, "other")
        assert other.finished().text == "y" * 100
        assert broken.finished().reason == ("stop" if kind is Finished else "cancelled")
    assert broken.kinds.count("Finished") == 1
    assert "its sink failed" in caplog.text
    assert service.healthy


def test_a_cancellation_check_that_raises_cancels(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    service = start(scripted_engine({"go": "text"}))
    recorder = Recorder()
    service.submit(GenerationRequest("go", service.defaults), recorder, lambda: bool(1 // 0))
    assert recorder.finished().reason == "cancelled"
    assert "is_cancelled failed" in caplog.text
    assert submit(service, "go").finished().text == "text"


# ---------------------------------------------------------------- engines that fail


@pytest.mark.parametrize(
    ("kind", "call"), [("encode", 1), ("commit", 2), ("denoise", 1), ("denoise", 3), ("release", 1)]
)
def test_an_engine_error_ends_every_request(start: Start, kind: str, call: int) -> None:
    settings = small_settings(max_batch_size=2)
    answers = {name: name * 40 for name in "abcd"}
    service = Service(
        scripted_engine(answers, fail_on={kind: call}, settings=settings, steps=3),
        CODEC,
        settings,
        start(scripted_engine({})).defaults,
    )
    recorders = [Recorder() for _ in answers]
    service.start()
    with service._changed:  # all four are there before the first tick
        for name, recorder in zip(answers, recorders, strict=True):
            service.submit(GenerationRequest(name, service.defaults), recorder)
    for recorder in recorders:
        finished = recorder.finished()
        if kind == "release" and recorder is recorders[0]:  # whose end it was that failed
            assert finished.reason == "stop"
        else:
            assert finished.reason == "error"
            assert finished.error == f"the engine failed: scripted failure of {kind} call {call}"
        assert recorder.kinds.count("Finished") == 1
    assert not service.healthy
    assert service.failure == f"the engine failed: scripted failure of {kind} call {call}"
    with pytest.raises(EngineError, match="the engine failed: scripted failure"):
        submit(service, "a")
    service.stop()


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), AssertionError(), MemoryError("no")])
def test_any_exception_in_the_engine_thread_ends_every_request(start: Start, error: BaseException) -> None:
    class Raising(ScriptedEngine):
        def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
            raise error

    engine = scripted_engine({"go": "text"})
    engine.__class__ = Raising
    service = start(engine)
    finished = submit(service, "go").finished()
    assert finished.reason == "error"
    assert finished.error == f"the engine failed: {type(error).__name__}: {error}"
    assert "Traceback" not in finished.error
    service.stop()
    assert engine.calls[-1].kind == "close"


def test_a_result_of_the_wrong_shape_is_an_engine_failure(start: Start) -> None:
    class Short(ScriptedEngine):
        def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
            result = super().denoise(rows, commits)
            return DenoiseResult(result.argmax_ids[:, :-1], result.sampled_ids, result.entropies)

    engine = scripted_engine({"go": "text"})
    engine.__class__ = Short
    assert submit(start(engine), "go").finished().reason == "error"


def test_numbers_that_are_not_finite_end_their_own_request_only(start: Start) -> None:
    class Odd(ScriptedEngine):
        def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
            result = super().denoise(rows, commits)
            for index, row in enumerate(rows):
                if row.position == len(CODEC.encode("odd")):
                    result.entropies[index, 3] = np.nan
            return result

    engine = scripted_engine({"odd": "text", "go": "y" * 30})
    engine.__class__ = Odd
    service = start(engine)
    odd, other = submit(service, "odd"), submit(service, "go", max_tokens=30)
    assert odd.finished().reason == "error"
    assert "not finite" in str(odd.finished().error)
    assert other.finished().text == "y" * 30
    assert service.healthy


# ---------------------------------------------------------------- start, stop, idle


def test_stop_lets_requests_end_within_the_grace(start: Start) -> None:
    engine = scripted_engine({"go": "x" * 50}, delay_s=0.001)
    service = start(engine)
    recorders = [submit(service, "go") for _ in range(6)]
    stopper = threading.Thread(target=service.stop, args=(20.0,))
    stopper.start()
    assert [recorder.finished().reason for recorder in recorders] == ["stop"] * 6
    stopper.join(20)
    assert engine.calls[-1].kind == "close"
    assert not service.healthy
    with pytest.raises(Overloaded, match="the server is shutting down"):
        submit(service, "go")


def test_stop_without_grace_ends_running_and_waiting_requests(start: Start) -> None:
    engine = scripted_engine({"go": "x" * 200}, steps=40, delay_s=0.001)
    service = start(engine)
    recorders = [submit(service, "go") for _ in range(6)]
    recorders[0].wait_for(Commit)
    service.stop()
    for recorder in recorders:
        finished = recorder.finished()
        assert (finished.reason, finished.error) == ("error", "the server is shutting down")
        assert recorder.kinds.count("Finished") == 1
    assert engine.calls[-1].kind == "close"
    assert sum(call.kind == "close" for call in engine.calls) == 1


def test_an_engine_call_that_never_returns_does_not_keep_anybody_waiting(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma_runtime.service._STUCK_S", 0.05)
    engine = gated({"go": "x" * 50})
    service = start(engine)
    recorder = submit(service, "go")
    assert engine.entered.acquire(timeout=20)
    service.stop()
    assert "did not return within" in str(recorder.finished(1).error)
    engine.permits.release(100)  # and when it returns after all, nothing more is sent
    assert service._thread is not None
    service._thread.join(20)
    assert recorder.kinds == ["Finished"]


def test_before_the_start_nothing_is_accepted() -> None:
    engine = scripted_engine({"go": "text"})
    started = start_service(scripted_engine({}))
    service = Service(engine, CODEC, small_settings(), started.defaults)
    started.stop()
    assert not service.healthy
    with pytest.raises(EngineError, match="not started"):
        submit(service, "go")
    service.stop()
    assert [call.kind for call in engine.calls] == ["close"]


def test_an_idle_service_does_not_spin(start: Start) -> None:
    service = start(scripted_engine({"go": "text"}))
    submit(service, "go").finished()
    before = service.statistics().ticks
    cpu = time.process_time()
    time.sleep(0.2)
    assert service.statistics().ticks == before
    assert time.process_time() - cpu < 0.1
    assert submit(service, "go").finished().text == "text"


def test_many_threads_may_submit(start: Start) -> None:
    service = start(scripted_engine({"go": "some text"}))
    recorders = [Recorder() for _ in range(40)]
    threads = [threading.Thread(target=submit, args=(service, "go"), kwargs={"sink": r}) for r in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {recorder.finished().text for recorder in recorders} == {"some text"}


def test_request_ids(start: Start) -> None:
    service = start(scripted_engine({"go": "text"}))
    request = GenerationRequest("go", service.defaults, request_id="mine")
    assert service.submit(request, Recorder()) == "mine"
    drawn = {service.submit(GenerationRequest("go", service.defaults), Recorder()) for _ in range(3)}
    assert len(drawn) == 3
    service.stop(20.0)


def test_finished_is_always_last_and_single(start: Start) -> None:
    """Joins, ends and cancellations in any mixture."""
    service = start(scripted_engine({"a": "x" * 30, "b" * 60: "y" * 90}, delay_s=0.0002))
    rng = np.random.default_rng(0)
    recorders = []
    for index in range(60):
        recorder, limit = Recorder(), int(rng.integers(1, 40))
        polls = iter(range(10**6))
        cancelled = (lambda polls=polls, limit=limit: next(polls) > limit) if index % 3 == 0 else (lambda: False)
        prompt = "a" if index % 2 else "b" * 60
        service.submit(GenerationRequest(prompt, service.defaults), recorder, cancelled)
        recorders.append(recorder)
    for index, recorder in enumerate(recorders):
        finished = recorder.finished()
        assert finished.reason in (("stop", "cancelled") if index % 3 == 0 else ("stop",))
        indices = [commit.canvas_index for commit in recorder.commits]
        assert all(b == a + 1 for a, b in pairwise(indices))
    service.stop(20.0)
    assert all(recorder.kinds.count("Finished") == 1 for recorder in recorders)
    assert all(isinstance(recorder.events[-1], Finished) for recorder in recorders)


def test_a_very_long_generation(start: Start) -> None:
    text = "0123456789abcdef" * 1200
    service = start(scripted_engine({"go": text}, canvas_length=64, max_model_len=20_000))
    recorder = submit(service, "go")
    assert recorder.finished(60).text == text
    assert len(recorder.commits) == 301
    assert len(recorder.finished().token_ids) == 19_201
