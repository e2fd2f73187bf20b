"""The outbox: order, turns, and what may be dropped for whom."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from dgemma_runtime.events import Commit, Event, Prefill, Preview
from dgemma_runtime.outbox import Lane, Outbox

IDS = np.zeros(4, np.int32)


def preview(step: int, canvas: int = 0) -> Preview:
    return Preview("", canvas, step, IDS)


def commit(canvas: int) -> Commit:
    return Commit("", IDS, canvas, 3)


def drain(outbox: Outbox[Lane]) -> list[tuple[Lane, Event | Exception]]:
    outbox.close()
    taken = []
    while (item := outbox.take()) is not None:
        taken.append(item)
    return taken


def test_a_reader_that_keeps_up_gets_everything_in_order() -> None:
    outbox: Outbox[Lane] = Outbox()
    lane = Lane()
    events: list[Event | Exception] = [Prefill(1, 2), preview(1), preview(2), commit(0), preview(1, 1), ValueError()]
    for event in events:
        outbox.put(lane, event)
        assert outbox.take() == (lane, event)


def test_previews_that_nobody_takes_give_way_and_commits_do_not() -> None:
    outbox: Outbox[Lane] = Outbox()
    lane = Lane()
    for canvas in range(20):
        for step in range(1, 101):
            outbox.put(lane, preview(step, canvas))
        outbox.put(lane, commit(canvas))
    taken = [event for _, event in drain(outbox)]
    assert [event.canvas_index for event in taken if isinstance(event, Commit)] == list(range(20))
    previews = [event for event in taken if isinstance(event, Preview)]
    assert len(previews) < 40
    assert previews[-1].step == 100  # the latest one stays
    order = [(event.canvas_index, isinstance(event, Commit)) for event in taken if isinstance(event, Preview | Commit)]
    assert order == sorted(order)


def test_requests_take_turns() -> None:
    outbox: Outbox[Lane] = Outbox()
    chatty, quiet = Lane(), Lane()
    for index in range(50):
        outbox.put(chatty, commit(index))
    outbox.put(quiet, commit(0))
    taken = [lane for lane, _ in drain(outbox)]
    assert taken == [chatty, quiet, *[chatty] * 49]


def test_very_many_previews_of_one_request_come_at_a_limited_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma_runtime.outbox._FREE_PREVIEWS", 10)
    moments = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: next(moments) / 1000)  # a preview every millisecond
    outbox: Outbox[Lane] = Outbox()
    lane, other = Lane(), Lane()
    taken = 0
    for step in range(1000):
        outbox.put(lane, preview(step))
        if lane.waiting:
            outbox.take()
            taken += 1
    assert 18 <= taken <= 21  # ten, and then ten a second
    outbox.put(lane, commit(0))
    assert outbox.take() == (lane, commit(0))
    for step in range(10):  # others are not limited
        outbox.put(other, preview(step))
    assert len(other.waiting) == 10


def test_threads_lose_nothing() -> None:
    outbox: Outbox[Lane] = Outbox()
    lanes = [Lane() for _ in range(8)]

    def put(lane: Lane) -> None:
        for index in range(200):
            outbox.put(lane, commit(index))

    threads = [threading.Thread(target=put, args=(lane,)) for lane in lanes]
    taken: list[tuple[Lane, Event | Exception]] = []

    def take() -> None:
        while (item := outbox.take()) is not None:
            taken.append(item)

    taker = threading.Thread(target=take)
    for thread in (*threads, taker):
        thread.start()
    for thread in threads:
        thread.join(20)
    outbox.close()
    taker.join(20)
    assert Counter(id(lane) for lane, _ in taken) == {id(lane): 200 for lane in lanes}
    for lane in lanes:
        indices = [event.canvas_index for other, event in taken if other is lane and isinstance(event, Commit)]
        assert indices == list(range(200))
