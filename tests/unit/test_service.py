"""The engine thread with scripted engines: events, identity, cancellation, failure, shutdown, overload."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dgemma_runtime.contract import DenoiseResult, DenoiseRow, Engine
from dgemma_runtime.engines.scripted import ChaoticEngine, ScriptedEngine, scripted_manifest
from dgemma_runtime.errors import EngineError, InvalidRequest, Overloaded
from dgemma_runtime.events import Commit, Event, Finished, Preview
from dgemma_runtime.parameters import parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import RuntimeSettings, plan_limits
from dgemma_runtime.testing import (
    EOS,
    Recorder,
    scripted_engine,
    small_settings,
    start_service,
    tiny_codec,
)

CODEC = tiny_codec()
Start = Callable[..., Service]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start_service`, stopped at the end of the test; every test ends with all pages back."""
    services: list[Service] = []

    def build(engine: Engine, settings: RuntimeSettings | None = None) -> Service:
        services.append(start_service(engine, settings))
        return services[-1]

    yield build
    for service in services:
        service.stop()
        if service.failure is None:
            statistics = service.statistics()
            assert (statistics.full_pages_used, statistics.sliding_pages_used) == (0, 0)
            assert (statistics.requests_running, statistics.requests_waiting) == (0, 0)


def submit(service: Service, prompt: str, *, sink: Recorder | None = None, **values: object) -> Recorder:
    recorder = sink or Recorder()
    service.submit(GenerationRequest(prompt, parse_parameters(values, service.defaults)), recorder)
    return recorder


def kinds(recorder: Recorder) -> list[str]:
    return [type(event).__name__ for event in recorder.events]


# ---------------------------------------------------------------- success


def test_a_text_over_several_canvases(start: Start) -> None:
    text = "the quick brown fox stops here"
    service = start(scripted_engine({"go": text}, steps=3))
    recorder = submit(service, "go")
    finished = recorder.finished()
    tokens = CODEC.encode(text)[1:].tolist()
    assert (finished.reason, finished.text, finished.error) == ("stop", text, None)
    assert finished.token_ids.tolist() == [*tokens, EOS]
    assert kinds(recorder) == ["Commit"] * 4 + ["Finished"]
    assert [commit.canvas_index for commit in recorder.commits] == [0, 1, 2, 3]
    assert [commit.steps for commit in recorder.commits] == [3] * 4
    assert "".join(commit.text for commit in recorder.commits) == text
    assert np.concatenate([commit.token_ids for commit in recorder.commits]).tolist() == finished.token_ids.tolist()


def test_statistics_of_a_request(start: Start) -> None:
    service = start(scripted_engine({"go": "twelve chars"}, steps=4, delay_s=0.002))
    statistics = submit(service, "go").finished().statistics
    assert (statistics.num_input_tokens, statistics.num_output_tokens) == (3, 13)
    assert (statistics.canvases, statistics.denoising_steps) == (2, 8)
    assert statistics.tokens_per_forward == 13 / 8
    first = statistics.time_to_first_canvas_ms
    assert first is not None
    assert 0 < statistics.queue_ms + statistics.prefill_ms < first < statistics.total_ms
    assert 8 * 2 <= statistics.engine_ms <= statistics.total_ms


def test_the_service_counts_its_work(start: Start) -> None:
    service = start(scripted_engine({"go": "twelve chars"}, steps=4))
    submit(service, "go").finished()
    statistics = service.statistics()
    assert statistics.canvas_steps == 8
    assert statistics.encoded_tokens == 3 + 8
    assert statistics.engine_ms > 0
    assert statistics.host_ms > 0


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9, 16])
def test_max_tokens_is_exact(start: Start, max_tokens: int) -> None:
    letters = "abcdefgABCDEFGabcdefgABC"  # a token each
    engine = scripted_engine({"go": letters})
    finished = submit(start(engine), "go", max_tokens=max_tokens).finished()
    assert (finished.reason, finished.text) == ("length", letters[:max_tokens])
    assert len(finished.token_ids) == max_tokens
    encoded = sum(sum(call.tokens) for call in engine.calls if call.kind == "encode")
    assert encoded == 3 + 8 * ((max_tokens - 1) // 8), "the last canvas is not encoded"


@pytest.mark.parametrize("length", [0, 7, 8, 15])
def test_the_end_token_anywhere_in_a_canvas(start: Start, length: int) -> None:
    finished = submit(start(scripted_engine({"go": "x" * length})), "go").finished()
    assert (finished.reason, finished.text) == ("stop", "x" * length)
    assert finished.token_ids.tolist()[-1] == EOS
    assert len(finished.token_ids) == length + 1


def test_a_stop_string_across_canvases(start: Start) -> None:
    recorder = submit(start(scripted_engine({"go": "abcdefghijkl"})), "go", stop="ghij")
    finished = recorder.finished()
    assert (finished.reason, finished.text) == ("stop", "abcdef")
    assert [commit.text for commit in recorder.commits] == ["abcdef", ""]


def test_token_ids_as_prompt(start: Start) -> None:
    service = start(scripted_engine({"go": "text"}))
    recorder = Recorder()
    prompt = CODEC.encode("go").astype(np.int64)
    service.submit(GenerationRequest(prompt, service.defaults, request_id="mine"), recorder)  # type: ignore[arg-type]
    assert recorder.finished().text == "text"


def test_a_long_prompt_and_a_long_answer(start: Start) -> None:
    text = "word " * 400
    prompt = "p" * 700
    engine = scripted_engine({prompt: text}, max_model_len=4096)
    finished = submit(start(engine), prompt).finished()
    assert finished.text == text
    chunk_sizes = [call.tokens[0] for call in engine.calls if call.kind == "encode" and call.tokens[0] != 8]
    assert chunk_sizes == [16] * 43 + [13]


def test_the_whole_context_can_be_used(start: Start) -> None:
    service = start(scripted_engine({"go": "y" * 100}, max_model_len=50))
    finished = submit(service, "go").finished()
    assert (finished.reason, len(finished.token_ids)) == ("length", 47)


def test_previews_only_for_who_asked(start: Start) -> None:
    service = start(scripted_engine({"go": "twelve chars"}, steps=4))
    with_previews = submit(service, "go", stream=True, stream_previews=True)
    with_previews.finished()
    assert kinds(with_previews) == (["Preview"] * 3 + ["Commit"]) * 2 + ["Finished"]
    assert [(p.canvas_index, p.step) for p in with_previews.previews] == [(c, s) for c in (0, 1) for s in (1, 2, 3)]
    assert with_previews.previews[2].text == "twelve c"
    assert with_previews.previews[5].text == "hars"
    assert with_previews.previews[0].token_ids.shape == (8,)
    without = submit(service, "go", stream=True)
    without.finished()
    assert "Preview" not in kinds(without)


def test_a_commit_is_sent_before_the_next_canvas_is_denoised(start: Start) -> None:
    engine = scripted_engine({"go": "twelve chars"})
    steps_at_commit = []

    class Watcher(Recorder):
        def __call__(self, event: Event) -> None:
            if isinstance(event, Commit):
                steps_at_commit.append(sum(call.kind == "denoise" for call in engine.calls))
            super().__call__(event)

    submit(start(engine), "go", sink=Watcher()).finished()
    assert steps_at_commit == [2, 4]


def test_every_canvas_s_slot_is_released(start: Start) -> None:
    engine = scripted_engine({"go": "twelve chars"})
    submit(start(engine), "go").finished()
    assert [call.kind for call in engine.calls if call.kind != "encode"] == ["denoise", "denoise", "release"] * 2


# ---------------------------------------------------------------- identity


def chaotic(delay_s: float = 0.0) -> ChaoticEngine:
    manifest = scripted_manifest(364, 8, 13, 512)
    return ChaoticEngine(manifest, plan_limits(manifest, small_settings()), delay_s)


def generate(service: Service, prompt: str, seed: int | None = 1, max_tokens: int = 60) -> Recorder:
    steps: dict[str, Any] = {"max_denoising_steps": 6, "end_id": -1, "max_tokens": max_tokens}
    return submit(service, prompt, seed=seed, **steps)


def test_a_request_alone_and_in_a_busy_batch_gives_the_same_tokens(start: Start) -> None:
    prompts = [f"{'long ' * (7 * i)}prompt {i}" for i in range(6)]
    quiet = start(chaotic())
    alone = [generate(quiet, prompt, seed).finished().token_ids.tolist() for seed, prompt in enumerate(prompts)]
    busy = start(chaotic(delay_s=0.0005))
    recorders = []
    for seed, prompt in enumerate(prompts):
        recorders.append(generate(busy, prompt, seed))
        generate(busy, "company", max_tokens=5 + 9 * seed)
        time.sleep(0.004)
    assert [recorder.finished().token_ids.tolist() for recorder in recorders] == alone
    assert busy.statistics().canvas_steps > busy.statistics().ticks, "some steps were shared"


def test_the_same_seed_gives_the_same_tokens_without_a_seed_they_differ(start: Start) -> None:
    first, second = start(chaotic()), start(chaotic())
    tokens = [generate(service, "go", 7).finished().token_ids.tolist() for service in (first, first, second)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert generate(first, "go", 8).finished().token_ids.tolist() != tokens[0]
    drawn = [generate(first, "go", None).finished().token_ids.tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ("", {}, "^text_input: is empty"),
        (np.array([], np.int32), {}, "^input_ids: is empty"),
        (np.array([5, 364], np.int32), {}, "^input_ids: token ids must be from 0 to 363, got 364"),
        (np.array([-1], np.int32), {}, "^input_ids: token ids must be from 0 to 363, got -1"),
        (np.array([0.5]), {}, "^input_ids: must be integers, got float64"),
        ("a\udfff", {}, "^text_input: is not valid Unicode"),
        (
            "x" * 255,
            {},
            "^text_input: .*maximum context length is 256 tokens, the prompt has 256; shorten it by at least 1",
        ),
        (np.zeros(300, np.int32), {}, "^input_ids: .*maximum context length is 256 tokens, the prompt has 300"),
        (
            "go",
            {"max_tokens": 254},
            r"^max_tokens: .*maximum context length is 256 tokens.*\(257 together\).*at most 253",
        ),
        ("go", {"end_id": 364}, "^end_id: must be from 0 to 363, got 364"),
    ],
)
def test_what_cannot_be_served_is_refused_and_serving_goes_on(
    start: Start, prompt: object, values: dict[str, object], message: str
) -> None:
    service = start(scripted_engine({"go": "text"}))
    recorder = Recorder()
    with pytest.raises(InvalidRequest, match=message):
        service.submit(
            GenerationRequest(prompt, parse_parameters(values, service.defaults)),  # type: ignore[arg-type]
            recorder,
        )
    assert submit(service, "go", max_tokens=253).finished().text == "text"
    assert recorder.events == []


def test_overload(start: Start) -> None:
    settings = small_settings(max_batch_size=1, queue_size=2)
    engine = scripted_engine({"go": "x" * 60}, steps=8, delay_s=0.001, settings=settings)
    service = start(engine, settings)
    recorders = [submit(service, "go")]
    recorders[0].wait_for(Commit)
    recorders += [submit(service, "go") for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests are waiting and the queue is full"):
        submit(service, "go")
    for recorder in recorders:
        assert recorder.finished().reason == "stop"
    assert submit(service, "go").finished().reason == "stop"


# ---------------------------------------------------------------- cancellation


class Gate(ScriptedEngine):
    """Waits for `permits` before each denoising call, so that a test can act between two."""

    permits: threading.Semaphore
    entered: threading.Semaphore

    def denoise(self, rows: list[DenoiseRow]) -> DenoiseResult:  # type: ignore[override]
        self.entered.release()
        assert self.permits.acquire(timeout=20)
        return super().denoise(rows)


def gated(answers: dict[str, str], **options: int) -> Gate:
    engine = scripted_engine(answers, **options)  # type: ignore[arg-type]
    engine.__class__ = Gate
    assert isinstance(engine, Gate)
    engine.permits, engine.entered = threading.Semaphore(0), threading.Semaphore(0)
    return engine


def denoise_calls(engine: ScriptedEngine) -> int:
    return sum(call.kind == "denoise" for call in engine.calls)


def test_cancellation_takes_effect_at_the_next_step(start: Start) -> None:
    engine = gated({"go": "x" * 200}, steps=20)
    service = start(engine)
    recorder, cancelled = Recorder(), threading.Event()
    service.submit(GenerationRequest("go", service.defaults), recorder, cancelled.is_set)
    for _ in range(3):
        assert engine.entered.acquire(timeout=20)
        engine.permits.release()
    assert engine.entered.acquire(timeout=20)
    cancelled.set()
    engine.permits.release()
    finished = recorder.finished()
    assert (finished.reason, finished.text, finished.error) == ("cancelled", "", None)
    assert denoise_calls(engine) == 4
    assert finished.statistics.denoising_steps == 4
    assert engine.calls[-1].kind == "release"
    assert service.healthy


def test_a_cancelled_request_keeps_what_was_sent(start: Start) -> None:
    engine = gated({"go": "abcdefghijklmnopqrst"})
    service = start(engine)
    recorder = Recorder()
    request_id = service.submit(GenerationRequest("go", service.defaults), recorder)
    for _ in range(2):
        engine.permits.release()
    recorder.wait_for(Commit)
    assert service.cancel(request_id)
    engine.permits.release(10)
    finished = recorder.finished()
    assert (finished.reason, finished.text) == ("cancelled", "abcdefgh")
    assert len(finished.token_ids) == 8
    assert not service.cancel(request_id)


def test_a_waiting_request_is_cancelled_without_ever_running(start: Start) -> None:
    settings = small_settings(max_batch_size=1)
    engine = gated({"go": "x" * 50, "wait": "never"}, settings=settings)  # type: ignore[arg-type]
    service = start(engine, settings)
    running = submit(service, "go")
    assert engine.entered.acquire(timeout=20)
    waiting = Recorder()
    service.submit(GenerationRequest("wait", service.defaults), waiting, lambda: True)
    engine.permits.release()
    finished = waiting.finished()
    assert (finished.reason, finished.statistics.denoising_steps) == ("cancelled", 0)
    assert finished.statistics.queue_ms == finished.statistics.total_ms
    assert finished.statistics.time_to_first_canvas_ms is None
    engine.permits.release(1000)
    assert running.finished().reason == "stop"


def test_the_others_go_on_when_one_is_cancelled(start: Start) -> None:
    service = start(scripted_engine({"go": "x" * 100, "other": "y" * 100}, steps=5))
    first, other = Recorder(), Recorder()
    polls = iter(range(1000))
    service.submit(GenerationRequest("go", service.defaults), first, lambda: next(polls) > 12)
    service.submit(GenerationRequest("other", service.defaults), other)
    assert first.finished().reason == "cancelled"
    assert other.finished().text == "y" * 100


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
    assert kinds(broken).count("Finished") == 1
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
    ("kind", "call"), [("encode", 1), ("encode", 2), ("denoise", 1), ("denoise", 3), ("release", 1)]
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
        assert finished.reason == "error"
        assert finished.error == f"the engine failed: scripted failure of {kind} call {call}"
        assert kinds(recorder).count("Finished") == 1
    assert not service.healthy
    assert service.failure == f"the engine failed: scripted failure of {kind} call {call}"
    with pytest.raises(EngineError, match="the engine failed: scripted failure"):
        submit(service, "a")
    service.stop()


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), AssertionError(), MemoryError("no")])
def test_any_exception_in_the_engine_thread_ends_every_request(start: Start, error: BaseException) -> None:
    class Raising(ScriptedEngine):
        def denoise(self, rows: list[DenoiseRow]) -> DenoiseResult:  # type: ignore[override]
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
        def denoise(self, rows: list[DenoiseRow]) -> DenoiseResult:  # type: ignore[override]
            result = super().denoise(rows)
            return DenoiseResult(result.argmax_ids[:, :-1], result.sampled_ids, result.entropies)

    engine = scripted_engine({"go": "text"})
    engine.__class__ = Short
    assert submit(start(engine), "go").finished().reason == "error"


def test_numbers_that_are_not_finite_end_their_own_request_only(start: Start) -> None:
    class Odd(ScriptedEngine):
        def denoise(self, rows: list[DenoiseRow]) -> DenoiseResult:  # type: ignore[override]
            result = super().denoise(rows)
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
        assert kinds(recorder).count("Finished") == 1
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
    assert kinds(recorder) == ["Finished"]


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
    assert all(kinds(recorder).count("Finished") == 1 for recorder in recorders)
    assert all(isinstance(recorder.events[-1], Finished) for recorder in recorders)


def test_a_very_long_generation(start: Start) -> None:
    text = "0123456789abcdef" * 1200
    service = start(scripted_engine({"go": text}, canvas_length=64, max_model_len=20_000))
    recorder = submit(service, "go")
    assert recorder.finished(60).text == text
    assert len(recorder.commits) == 301
    assert len(recorder.finished().token_ids) == 19_201
