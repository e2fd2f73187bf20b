"""The scheduler without engine or threads: a tiny driver plays the rest of the service."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_runtime.contract import EngineLimits
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.errors import InvalidRequest, Overloaded
from dgemma_runtime.parameters import default_parameters
from dgemma_runtime.requests import LiveRequest, Timeline
from dgemma_runtime.scheduler import Plan, Scheduler
from dgemma_runtime.testing import tiny_codec

CANVAS, WINDOW, PAGE, CHUNK, BUDGET = 8, 13, 4, 10, 20
MODEL = scripted_manifest(100, CANVAS, WINDOW).model
CODEC, PARAMETERS = tiny_codec(), default_parameters({})


def make(slots: int = 3, full: int = 60, sliding: int = 30, queue: int = 100) -> Scheduler:
    return Scheduler(MODEL, EngineLimits(slots, CHUNK, PAGE, full, sliding), CHUNK, BUDGET, queue)


def request(prompt: int, max_tokens: int = CANVAS, name: str = "r") -> LiveRequest:
    return LiveRequest(
        request_id=name,
        prompt_ids=np.zeros(prompt, np.int32),
        parameters=PARAMETERS,
        seed=0,
        max_tokens=max_tokens,
        output=OutputText(CODEC, max_tokens),
        sink=lambda event: None,
        is_cancelled=lambda: False,
        timeline=Timeline(1, 0),
    )


def run(scheduler: Scheduler, plan: Plan) -> None:
    """What the service does with a plan: encode, then one step; canvases here end after a single step."""
    for chunk in plan.encode:
        chunk.request.encoded(chunk.tokens)
    for live in plan.denoise:
        assert len(live.uncached) == 0
        emitted = live.output.commit(np.full(CANVAS, 50, np.int32))
        live.end_canvas(np.full(CANVAS, 50, np.int32))
        if emitted.reason:
            scheduler.remove(live)


def chunks(plan: Plan) -> list[tuple[str, int]]:
    return [(chunk.request.request_id, chunk.tokens) for chunk in plan.encode]


def names(requests: tuple[LiveRequest, ...]) -> list[str]:
    return [live.request_id for live in requests]


def test_a_short_prompt_is_encoded_and_denoised_in_one_tick() -> None:
    scheduler = make()
    scheduler.add(request(5, name="a"))
    plan = scheduler.plan()
    assert (names(plan.admitted), chunks(plan), names(plan.denoise)) == (["a"], [("a", 5)], ["a"])


def test_a_long_prompt_is_cut_into_chunks() -> None:
    scheduler = make()
    scheduler.add(request(25, name="a"))
    seen = []
    for _ in range(3):
        plan = scheduler.plan()
        seen.append((chunks(plan), names(plan.denoise)))
        run(scheduler, plan)
    assert seen == [([("a", 10)], []), ([("a", 10)], []), ([("a", 5)], ["a"])]


def test_a_commit_and_the_next_canvas_share_a_tick() -> None:
    scheduler = make()
    scheduler.add(request(5, max_tokens=3 * CANVAS, name="a"))
    run(scheduler, scheduler.plan())
    plan = scheduler.plan()
    assert (chunks(plan), names(plan.denoise)) == ([("a", CANVAS)], ["a"])


def test_a_finished_sequence_is_not_committed() -> None:
    scheduler = make()
    scheduler.add(request(5, max_tokens=CANVAS + 1))
    run(scheduler, scheduler.plan())
    run(scheduler, scheduler.plan())
    plan = scheduler.plan()
    assert plan == Plan((), (), ())
    assert scheduler.live() == []
    assert scheduler.full_pages.used == scheduler.sliding_pages.used == 0


def test_prefill_never_keeps_a_running_canvas_from_its_step() -> None:
    scheduler = make()
    scheduler.add(request(5, max_tokens=10 * CANVAS, name="running"))
    run(scheduler, scheduler.plan())
    scheduler.add(request(100, name="long"))
    for _ in range(9):
        plan = scheduler.plan()
        assert "running" in names(plan.denoise)
        assert sum(tokens for name, tokens in chunks(plan) if name == "long") <= BUDGET
        run(scheduler, plan)


def test_prompts_take_turns() -> None:
    scheduler = make()
    for name in ("a", "b", "c"):
        scheduler.add(request(25, name=name))
    seen = []
    for _ in range(5):
        plan = scheduler.plan()
        seen.append(chunks(plan))
        run(scheduler, plan)
    assert seen == [
        [("a", 10), ("b", 10)],
        [("c", 10), ("a", 10)],
        [("b", 10), ("c", 10)],
        [("a", 5), ("b", 5), ("c", 5)],
        [],
    ]


def test_a_short_prompt_is_not_stuck_behind_a_long_one() -> None:
    scheduler = make()
    scheduler.add(request(100, name="long"))
    run(scheduler, scheduler.plan())
    scheduler.add(request(5, name="short"))
    assert names(scheduler.plan().denoise) == ["short"]


@given(st.integers(1, 45), st.lists(st.integers(1, 45), max_size=2))
def test_chunks_do_not_depend_on_the_company(prompt: int, others: list[int]) -> None:
    scheduler = make(full=200, sliding=60)
    for other in others:
        scheduler.add(request(other, name="other"))
    scheduler.add(request(prompt, name="a"))
    cut = []
    for _ in range(30):
        plan = scheduler.plan()
        cut += [tokens for name, tokens in chunks(plan) if name == "a"]
        run(scheduler, plan)
    assert cut == [CHUNK] * (prompt // CHUNK) + ([prompt % CHUNK] if prompt % CHUNK else [])


def test_admission_is_by_slots() -> None:
    scheduler = make(slots=2)
    for name in ("a", "b", "c"):
        scheduler.add(request(5, max_tokens=2 * CANVAS, name=name))
    plan = scheduler.plan()
    assert (names(plan.admitted), scheduler.waiting, scheduler.running) == (["a", "b"], 1, 2)
    assert {live.slot for live in plan.admitted} == {0, 1}
    run(scheduler, plan)
    scheduler.remove(plan.admitted[0])
    assert names(scheduler.plan().admitted) == ["c"]


def test_admission_is_by_pages_and_in_order() -> None:
    scheduler = make(full=10)  # 40 tokens
    scheduler.add(request(28, max_tokens=CANVAS, name="a"))  # 7 pages: its only canvas needs none
    scheduler.add(request(10, max_tokens=CANVAS + 1, name="b"))  # 18 tokens: 5 pages
    scheduler.add(request(2, max_tokens=CANVAS, name="c"))  # 1 page, but after b
    first = scheduler.plan()
    assert names(first.admitted) == ["a"]
    run(scheduler, first)
    assert names(scheduler.plan().admitted) == []
    scheduler.remove(first.admitted[0])
    assert names(scheduler.plan().admitted) == ["b", "c"]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make(full=10)
    scheduler.add(request(32, max_tokens=2 * CANVAS))  # 40 tokens are cached at most
    with pytest.raises(InvalidRequest) as caught:
        scheduler.add(request(33, max_tokens=CANVAS + 1))
    assert caught.value.field == "max_tokens"
    message = str(caught.value)
    assert "33 prompt tokens and 9 output tokens need 11 pages of 4 tokens" in message
    assert "the cache has 10" in message
    with pytest.raises(InvalidRequest, match=r"\(and 7 for the sliding layers\)"):
        make(sliding=6).add(request(40))


def test_the_queue_is_bounded() -> None:
    scheduler = make(slots=1, queue=2)
    scheduler.add(request(5, max_tokens=100))
    scheduler.plan()
    scheduler.add(request(5))
    scheduler.add(request(5))
    with pytest.raises(Overloaded, match="2 requests are waiting and the queue is full; try again later"):
        scheduler.add(request(5))
    assert scheduler.waiting == 2


def test_a_request_can_be_removed_in_any_state() -> None:
    scheduler = make(slots=2)
    waiting, prefilling, running = request(5), request(100, 8), request(5, 80)
    scheduler.add(running)
    run(scheduler, scheduler.plan())
    scheduler.add(prefilling)
    scheduler.add(waiting)
    run(scheduler, scheduler.plan())
    assert (scheduler.waiting, scheduler.running) == (1, 2)
    for live in (waiting, prefilling, running):
        scheduler.remove(live)
    assert scheduler.live() == []
    assert scheduler.plan() == Plan((), (), ())
    assert scheduler.full_pages.unreserved == 60


@settings(max_examples=80)
@given(st.data())
def test_every_request_ends_and_nothing_leaks(data: st.DataObject) -> None:
    """Any mix of joins and cancellations; the page tables assert their reservations on every tick."""
    scheduler = make(slots=data.draw(st.integers(1, 4)), full=30, sliding=20)
    submitted: list[LiveRequest] = []
    for _ in range(data.draw(st.integers(1, 25))):
        for _ in range(data.draw(st.integers(0, 2))):
            new = request(data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60)))
            try:
                scheduler.add(new)
            except InvalidRequest:
                continue
            submitted.append(new)
        if scheduler.live() and data.draw(st.integers(0, 4)) == 0:
            scheduler.remove(data.draw(st.sampled_from(scheduler.live())))
        plan = scheduler.plan()
        slots = [live.slot for live in scheduler.live() if live.pages]
        assert len(set(slots)) == len(slots)
        run(scheduler, plan)
    ticks = 0
    while scheduler.live():
        plan = scheduler.plan()
        assert plan.encode or plan.denoise, "something live always moves"
        run(scheduler, plan)
        ticks += 1
        assert ticks < 2000
    assert scheduler.full_pages.used == scheduler.sliding_pages.used == 0
    assert scheduler.full_pages.unreserved == 30
    assert scheduler.sliding_pages.unreserved == 20


def test_first_come_first_admitted_under_load() -> None:
    scheduler = make(slots=2, full=30, sliding=20)
    rng = np.random.default_rng(0)
    submitted = [request(int(rng.integers(1, 50)), int(rng.integers(1, 40)), str(i)) for i in range(30)]
    for live in submitted:
        scheduler.add(live)
    admitted: list[str] = []
    while scheduler.live():
        plan = scheduler.plan()
        admitted += names(plan.admitted)
        run(scheduler, plan)
    assert admitted == [str(i) for i in range(30)]
