"""The engine thread with scripted engines: events, identity, cancellation, failure, shutdown, overload."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.engines.scripted import ChaoticEngine, ScriptedEngine, scripted_manifest
from dgemma_runtime.errors import EngineError, InvalidRequest, Overloaded
from dgemma_runtime.events import Commit, Event
from dgemma_runtime.parameters import parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import plan_limits
from dgemma_runtime.testing import (
    EOS,
    Recorder,
    gated,
    scripted_engine,
    small_settings,
    submit,
    tiny_codec,
)

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()


# ---------------------------------------------------------------- success


def test_a_text_over_several_canvases(start: Start) -> None:
    text = "the quick brown fox stops here"
    service = start(scripted_engine({"go": text}, steps=3))
    recorder = submit(service, "go")
    finished = recorder.finished()
    tokens = CODEC.encode(text)[1:].tolist()
    assert (finished.reason, finished.text, finished.error) == ("stop", text, None)
    assert finished.token_ids.tolist() == [*tokens, EOS]
    assert recorder.kinds == ["Commit"] * 4 + ["Finished"]
    assert [commit.canvas_index for commit in recorder.commits] == [0, 1, 2, 3]
    assert [commit.steps for commit in recorder.commits] == [3] * 4
    assert "".join(commit.text for commit in recorder.commits) == text
    assert np.concatenate([commit.token_ids for commit in recorder.commits]).tolist() == finished.token_ids.tolist()


@pytest.mark.parametrize(
    ("values", "reason", "stop_reason"),
    [({}, "stop", EOS), ({"stop": ["quick"]}, "stop", "quick"), ({"max_tokens": 5}, "length", None)],
)
def test_what_ended_a_request_is_told(
    start: Start, values: dict[str, Any], reason: str, stop_reason: str | int | None
) -> None:
    finished = submit(start(scripted_engine({"go": "the quick brown fox"})), "go", **values).finished()
    assert (finished.reason, finished.stop_reason) == (reason, stop_reason)


def test_special_tokens_are_in_text_and_previews_on_request(start: Start) -> None:
    answer = np.array([*CODEC.encode("<|turn>a b<turn|>c")[1:], EOS], np.int32)
    service = start(scripted_engine({"go": answer}, steps=2, canvas_length=16))
    recorder = submit(service, "go", stream=True, stream_previews=True, skip_special_tokens=False)
    assert recorder.finished().text == "<|turn>a b<turn|>c"
    assert "<|turn>" in recorder.previews[-1].text
    assert submit(service, "go").finished().text == "a bc"


def test_no_tokens_asked_for_is_answered_at_once_whatever_is_queued(start: Start) -> None:
    engine = gated({"go": "x"})
    service = start(engine, small_settings(max_batch_size=1, queue_size=1))
    waiting = [submit(service, "go")]
    assert engine.entered.acquire(timeout=20)
    waiting.append(submit(service, "go"))
    with pytest.raises(Overloaded):
        submit(service, "go")
    for prompt in ("hello", CODEC.encode("hello"), "a" * 5000):  # the last is longer than the context
        recorder = submit(service, prompt, max_tokens=0)
        assert recorder.kinds == ["Finished"]
        finished = recorder.finished()
        tokens = len(prompt) + isinstance(prompt, str)
        assert (finished.reason, finished.text, finished.token_ids.tolist()) == ("length", "", [])
        figures = finished.statistics
        assert (figures.num_input_tokens, figures.num_output_tokens, figures.denoising_steps) == (tokens, 0, 0)
        assert (figures.queue_ms, figures.engine_ms, finished.stop_reason) == (0, 0, None)
        assert figures.total_ms > 0
    for prompt, message in (("", "text_input: is empty"), (np.array([5, 364]), "input_ids: token ids must be from 0")):
        with pytest.raises(InvalidRequest, match=message):
            submit(service, prompt, max_tokens=0)
    engine.permits.release(100)
    assert [recorder.finished().reason for recorder in waiting] == ["stop", "stop"]
    service.stop()
    with pytest.raises(Overloaded, match="the server is shutting down"):
        submit(service, "go", max_tokens=0)


def test_a_failed_service_does_not_count_tokens_either(start: Start) -> None:
    service = start(scripted_engine({"go": "x"}, fail_on={"denoise": 1}))
    assert submit(service, "go").finished().reason == "error"
    with pytest.raises(EngineError, match="the engine failed"):
        submit(service, "go", max_tokens=0)


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
    encoded = sum(sum(call.tokens) for call in engine.calls if call.kind in ("encode", "commit"))
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
    assert with_previews.kinds == (["Preview"] * 3 + ["Commit"]) * 2 + ["Finished"]
    assert [(p.canvas_index, p.step) for p in with_previews.previews] == [(c, s) for c in (0, 1) for s in (1, 2, 3)]
    assert with_previews.previews[2].text == "twelve c"
    assert with_previews.previews[5].text == "hars"
    assert with_previews.previews[0].token_ids.shape == (8,)
    without = submit(service, "go", stream=True)
    without.finished()
    assert "Preview" not in without.kinds


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


def test_a_slot_is_kept_from_canvas_to_canvas_and_released_at_the_end(start: Start) -> None:
    engine = scripted_engine({"go": "twelve chars"})
    service = start(engine)
    submit(service, "go").finished()
    service.stop(20.0)
    kinds = [call.kind for call in engine.calls]
    assert kinds == ["encode", "denoise", "denoise", "commit", "denoise", "denoise", "release", "close"]


def test_commits_ride_along(start: Start) -> None:
    settings = small_settings(max_batch_size=2)
    engine = scripted_engine({"go": "x" * 20, "slow": "y" * 30}, settings=settings)
    service = start(engine, settings)
    with service._changed:  # both are there before the first tick
        recorders = [submit(service, "go"), submit(service, "slow")]
    for recorder in recorders:
        recorder.finished()
    assert service.statistics().ticks == 3 * 2 + 2 + 2 + 1, (
        "canvases, commits beside them, the longer one's last canvas"
    )


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
        (np.zeros(300, np.int32), {}, "^input_ids: .*context length is 256 tokens, the prompt has 300.*max_model_len"),
        (
            "go",
            {"max_tokens": 254},
            r"^max_tokens: .*length is 256 .*\(257 together\).*at most 253 \(available tokens: 253;.*max_model_len",
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
    with pytest.raises(Overloaded, match=r"2 requests are waiting \(queue_size\); try again in about 1 s"):
        submit(service, "go")
    for recorder in recorders:
        assert recorder.finished().reason == "stop"
    assert submit(service, "go").finished().reason == "stop"


# ---------------------------------------------------------------- cancellation


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
