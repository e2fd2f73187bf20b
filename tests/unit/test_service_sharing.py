"""The engine thread when requests share an engine that has too little for all: pages, prefixes, deadlines, memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.engines.scripted import ChaoticEngine, scripted_manifest
from dgemma_runtime.events import Finished, Prefill
from dgemma_runtime.observer import Observer
from dgemma_runtime.requests import LiveRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import RuntimeSettings, plan_limits
from dgemma_runtime.testing import Recorder, gated, scripted_engine, small_settings, submit, tiny_codec

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()
MANIFEST = scripted_manifest(364, 8, 13, 512)


def chaotic(settings: RuntimeSettings, delay_s: float = 0.0) -> ChaoticEngine:
    return ChaoticEngine(MANIFEST, plan_limits(MANIFEST, settings), delay_s)


def generate(service: Service, prompt: str | Int32Array, max_tokens: int = 60, **values: Any) -> Recorder:
    given = {"max_denoising_steps": 4, "end_id": -1, "max_tokens": max_tokens} | values
    return submit(service, prompt, **given)


def tokens(recorder: Recorder) -> list[int]:
    finished = recorder.finished()
    assert finished.error is None
    return [int(token) for token in finished.token_ids]


def pages_are_free(service: Service) -> None:
    statistics = service.statistics()
    assert (statistics.full_pages_used, statistics.sliding_pages_used) == (0, 0)


# ---------------------------------------------------------------- pages


def test_requests_that_lose_their_pages_give_the_same_tokens(start: Start) -> None:
    prompts = [f"{'word ' * (3 + 5 * i)}{i}" for i in range(6)]
    roomy = small_settings(prefix_cache=False)
    quiet = start(chaotic(roomy), roomy)
    alone = [tokens(generate(quiet, prompt, 200, seed=i)) for i, prompt in enumerate(prompts)]
    tight = small_settings(full_pages=104)  # of 5 tokens: one whole context of 512
    busy = start(chaotic(tight), tight)
    with busy._changed:  # all are there before the first tick
        recorders = [generate(busy, prompt, 200, seed=i) for i, prompt in enumerate(prompts)]
    assert [tokens(recorder) for recorder in recorders] == alone
    statistics = busy.statistics()
    assert statistics.preemptions > 0
    assert sum(recorder.finished().statistics.preemptions for recorder in recorders) == statistics.preemptions
    pages_are_free(busy)


def test_a_priority_goes_first(start: Start) -> None:
    settings = small_settings(max_batch_size=1)
    engine = gated({name: name * 6 for name in "abc"}, settings=settings)  # type: ignore[arg-type]
    service = start(engine, settings)
    order: list[str] = []

    class Order(Recorder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __call__(self, event: Any) -> None:
            if isinstance(event, Finished):
                order.append(self.name)
            super().__call__(event)

    first = submit(service, "a", sink=Order("a"))
    assert engine.entered.acquire(timeout=20)
    others = [submit(service, "b", sink=Order("b")), submit(service, "c", sink=Order("c"), priority=-1)]
    engine.permits.release(100)
    for recorder in (first, *others):
        assert recorder.finished().reason == "stop"
    assert order == ["c", "a", "b"], "it took the place of the one that ran"
    assert first.finished().statistics.preemptions == 1


# ---------------------------------------------------------------- prefixes


def test_a_second_turn_is_the_same_with_and_without_the_cache(start: Start) -> None:
    texts = []
    for cache in (True, False):
        settings = small_settings(prefix_cache=cache)
        service = start(chaotic(settings), settings)
        first = generate(service, "the " * 60, seed=3).finished()
        turn = np.concatenate([CODEC.encode("the " * 60), first.token_ids, CODEC.encode("and then")[1:]])
        second = generate(service, turn, seed=4).finished()
        texts.append([first.token_ids.tolist(), second.token_ids.tolist()])
        assert (second.statistics.prefix_tokens > 0) == cache
        assert (service.statistics().prefix_hits > 0) == cache
        pages_are_free(service)
    assert texts[0] == texts[1]


def test_a_prompt_that_is_cached_whole_needs_no_prefill(start: Start) -> None:
    engine = scripted_engine({"x" * 39: "answer"})  # with <bos> eight pages of five tokens
    service = start(engine)
    for expected in (0, 40):
        finished = submit(service, "x" * 39).finished()
        assert (finished.text, finished.statistics.prefix_tokens) == ("answer", expected)
    encoded = [call.tokens for call in engine.calls if call.kind == "encode"]
    assert encoded == [(16,), (16,), (8,)]


def test_a_salt_shares_with_its_own_only(start: Start) -> None:
    service = start(scripted_engine({"x" * 39: "answer"}))
    found = [
        submit(service, "x" * 39, cache_salt=salt).finished().statistics.prefix_tokens for salt in ("", "a", "b", "a")
    ]
    assert found == [0, 0, 0, 40]


# ---------------------------------------------------------------- time


def test_a_deadline_ends_a_running_request_with_what_it_has(start: Start) -> None:
    service = start(scripted_engine({"go": "x" * 200}, steps=4, delay_s=0.01))
    started = time.monotonic()
    finished = submit(service, "go", deadline_ms=300).finished()
    assert 0.3 <= time.monotonic() - started < 1
    assert (finished.reason, finished.error) == ("deadline", None)
    assert finished.text == "x" * len(finished.text)
    assert 0 < len(finished.text) < 200
    pages_are_free(service)


def test_a_deadline_ends_a_waiting_request(start: Start) -> None:
    settings = small_settings(max_batch_size=1)
    engine = gated({"go": "x" * 50, "wait": "never"}, settings=settings)  # type: ignore[arg-type]
    service = start(engine, settings)
    running = submit(service, "go")
    assert engine.entered.acquire(timeout=20)
    waiting = submit(service, "wait", deadline_ms=1)
    time.sleep(0.005)
    engine.permits.release(1000)
    finished = waiting.finished()
    assert (finished.reason, finished.text, finished.statistics.denoising_steps) == ("deadline", "", 0)
    assert running.finished().reason == "stop"


def test_progress_of_a_long_prompt_is_told_to_who_wants_previews(start: Start) -> None:
    service = start(scripted_engine({"p" * 39: "text", "short": "text"}))
    recorder = submit(service, "p" * 39, stream=True, stream_previews=True)
    recorder.finished()
    told = [event for event in recorder.events if isinstance(event, Prefill)]
    assert told == [Prefill(16, 40), Prefill(32, 40)]
    for prompt, previews in (("p" * 39, False), ("short", True)):
        recorder = submit(service, prompt, stream=True, stream_previews=previews)
        recorder.finished()
        assert "Prefill" not in recorder.kinds


# ---------------------------------------------------------------- memory


def test_too_little_memory_for_all_costs_time_only(start: Start) -> None:
    answers = {name: name * 30 for name in "abcdef"}
    service = start(scripted_engine(answers, most_canvases=2))
    with service._changed:  # all are there before the first tick
        recorders = {name: submit(service, name) for name in answers}
    for name, recorder in recorders.items():
        assert recorder.finished().text == answers[name]
    assert service.statistics().preemptions >= 2
    assert service.healthy
    pages_are_free(service)


def test_too_little_memory_for_one_ends_that_one(start: Start) -> None:
    service = start(scripted_engine({"a": "text", "b": "text"}, most_canvases=0))
    for name in "ab":
        finished = submit(service, name).finished()
        assert (finished.reason, finished.error) == ("error", "no memory for more than 0 canvases")
    assert service.healthy
    pages_are_free(service)


# ---------------------------------------------------------------- observers


def test_an_observer_hears_of_everything(start: Start) -> None:
    heard: list[str] = []

    class Listener(Observer):
        def refused(self, request_id: str, kind: str) -> None:
            heard.append(f"refused {kind}")

        def submitted(self, request: LiveRequest) -> None:
            heard.append("submitted")

        def admitted(self, request: LiveRequest) -> None:
            heard.append(f"admitted with {request.cached_tokens}")

        def prefilled(self, request: LiveRequest, tokens: int, started: int, ended: int) -> None:
            assert started < ended
            heard.append(f"prefilled {tokens}")

        def stepped(self, canvases: int, commits: int, started: int, ended: int) -> None:
            heard.append(f"stepped {canvases} {commits}")

        def committed(self, request: LiveRequest, steps: int, tokens: int, started: int, ended: int) -> None:
            assert started < ended
            heard.append(f"committed {tokens} after {steps}")

        def encoded(self, request: LiveRequest, started: int, ended: int) -> None:
            heard.append("encoded")

        def finished(self, request: LiveRequest, event: Finished) -> None:
            heard.append(event.reason)

    service = Service(
        scripted_engine({"go": "twelve chars"}),
        CODEC,
        small_settings(),
        start(scripted_engine({})).defaults,
        Listener(),
    )
    service.start()
    submit(service, "go").finished()
    service.stop(20.0)
    canvas = ["stepped 1 0", "stepped 1 0"]
    assert heard == [
        *("submitted", "admitted with 0", "prefilled 3", *canvas, "committed 8 after 2", "stepped 0 1", "encoded"),
        *(*canvas, "committed 5 after 2", "stop"),
    ]
    with pytest.raises(Exception, match="shutting down"):
        submit(service, "go")
    assert heard[-1] == "refused Overloaded"
