"""The scheduler without engine or threads: a tiny driver plays the rest of the service."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_runtime.contract import EngineLimits, Int32Array
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.engines.scripted import scripted_manifest
from dgemma_runtime.errors import InvalidRequest, Overloaded
from dgemma_runtime.parameters import default_parameters, parse_parameters
from dgemma_runtime.requests import LiveRequest, Timeline
from dgemma_runtime.scheduler import Plan, Scheduler
from dgemma_runtime.settings import RuntimeSettings
from dgemma_runtime.testing import tiny_codec

CANVAS, WINDOW, PAGE, CHUNK, BUDGET = 8, 13, 4, 10, 20
MODEL = scripted_manifest(100, CANVAS, WINDOW).model
CODEC, PARAMETERS = tiny_codec(), default_parameters({})


NOTHING = Plan((), (), (), (), ())


def make(slots: int = 3, full: int = 60, sliding: int = 60, queue: int = 100, cache: bool = False) -> Scheduler:
    runtime = RuntimeSettings(prefill_chunk=CHUNK, prefill_budget=BUDGET, queue_size=queue, prefix_cache=cache)
    return Scheduler(MODEL, EngineLimits(slots, CHUNK, PAGE, full, sliding), runtime)


def request(
    prompt: int | Int32Array,
    max_tokens: int = CANVAS,
    name: str = "r",
    scheduler: Scheduler | None = None,
    **given: Any,
) -> LiveRequest:
    """Of so many tokens, or these; the scheduler makes its keys."""
    return LiveRequest(
        request_id=name,
        prompt_ids=np.zeros(prompt, np.int32) if isinstance(prompt, int) else prompt,
        parameters=parse_parameters(given, PARAMETERS),
        seed=0,
        max_tokens=max_tokens,
        output=OutputText(CODEC, max_tokens),
        sink=lambda event: None,
        is_cancelled=lambda: False,
        timeline=Timeline(1, 0),
        keys=scheduler.make_keys("") if scheduler else None,
    )


def run(scheduler: Scheduler, plan: Plan, token: int = 50) -> None:
    """What the service does with a plan: encode, then one step; canvases here end after a single step."""
    for chunk in plan.encode:
        chunk.request.encoded(chunk.tokens, scheduler.is_own_chunk(chunk.request, chunk.tokens))
    for live in plan.commit:
        live.encoded(len(live.uncached))
    for live in plan.denoise:
        assert len(live.uncached) == 0
        live.laid_out = True
        emitted = live.output.commit(np.full(CANVAS, token, np.int32))
        live.end_canvas(np.full(CANVAS, token, np.int32))
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


def test_a_commit_rides_along_and_the_next_canvas_follows() -> None:
    scheduler = make()
    scheduler.add(request(5, max_tokens=3 * CANVAS, name="a"))
    run(scheduler, scheduler.plan())
    scheduler.add(request(5, name="b"))
    plan = scheduler.plan()
    assert (names(plan.commit), names(plan.denoise)) == (["a"], ["b"])
    run(scheduler, plan)
    plan = scheduler.plan()
    assert (names(plan.commit), names(plan.denoise)) == ([], ["a"])


def test_a_finished_sequence_is_not_committed() -> None:
    scheduler = make()
    scheduler.add(request(5, max_tokens=CANVAS + 1))
    for _ in range(3):  # a canvas, its commit, the last canvas
        run(scheduler, scheduler.plan())
    assert scheduler.plan() == NOTHING
    assert scheduler.live() == []
    assert scheduler.full_pages.used == scheduler.sliding_pages.used == 0


def test_prefill_never_keeps_a_running_canvas_from_its_step() -> None:
    scheduler = make()
    scheduler.add(request(5, max_tokens=10 * CANVAS, name="running"))
    run(scheduler, scheduler.plan())
    scheduler.add(request(100, name="long"))
    for _ in range(9):
        plan = scheduler.plan()
        assert "running" in names(plan.denoise + plan.commit)
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
    with pytest.raises(Overloaded, match=r"the queue is full: 2 requests are waiting \(queue_size\)"):
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
    assert scheduler.plan() == NOTHING
    assert scheduler.full_pages.used == 0
    assert scheduler.sliding_pages.unreserved == 60


def admitted_until_done(scheduler: Scheduler) -> list[str]:
    """Names in the order of (also repeated) admission."""
    found: list[str] = []
    for _ in range(2000):
        if not scheduler.live():
            return found
        plan = scheduler.plan()
        assert plan.encode or plan.denoise or plan.commit, "something live always moves"
        found += names(plan.admitted)
        run(scheduler, plan)
    raise AssertionError("it does not end")


# ---------------------------------------------------------------- pages that run out


def test_the_youngest_gives_way_and_comes_back() -> None:
    scheduler = make(full=7)  # 28 tokens
    scheduler.add(request(9, max_tokens=3 * CANVAS, name="old"))  # 3 pages, 7 in the end
    scheduler.add(request(9, max_tokens=3 * CANVAS, name="young"))
    assert names(scheduler.plan().admitted) == ["old"], "with one more canvas it needs 5 pages of 4"
    scheduler = make(full=10)
    old, young = (request(9, max_tokens=3 * CANVAS, name=name) for name in ("old", "young"))
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler, scheduler.plan())
    run(scheduler, scheduler.plan())  # both commit: 5 pages each
    run(scheduler, scheduler.plan())
    plan = scheduler.plan()
    assert [(gone.request.request_id, gone.slot) for gone in plan.preempted] == [("young", 1)]
    assert names(plan.commit) == ["old"]
    assert (scheduler.waiting, scheduler.running, scheduler.preemptions, young.preemptions) == (1, 1, 1, 1)
    assert young.cached_tokens == 0
    assert len(young.tokens) == 9 + 2 * CANVAS
    run(scheduler, plan)
    run(scheduler, scheduler.plan())
    plan = scheduler.plan()  # the old one is done
    assert names(plan.admitted) == ["young"]
    cut = chunks(plan)
    for _ in range(3):
        run(scheduler, plan)
        plan = scheduler.plan()
        cut += chunks(plan)
    assert cut == [("young", 9), ("young", CANVAS), ("young", CANVAS)], "as the prompt and the canvases were before"


def test_a_request_may_give_way_to_an_older_one_s_company() -> None:
    scheduler = make(full=9, slots=2)
    scheduler.add(request(4, max_tokens=9 * CANVAS - 40, name="grows"))
    scheduler.add(request(20, max_tokens=CANVAS + 1, name="wants one more"))
    assert sorted(set(admitted_until_done(scheduler))) == ["grows", "wants one more"]
    assert scheduler.full_pages.used == 0


def test_priorities_decide_who_is_admitted_and_who_gives_way() -> None:
    scheduler = make(slots=1)
    for name, priority in (("later", 5), ("normal", 0), ("urgent", -5), ("second normal", 0)):
        scheduler.add(request(5, name=name, priority=priority))
    assert admitted_until_done(scheduler) == ["urgent", "normal", "second normal", "later"]


def test_an_important_request_takes_the_place_of_another() -> None:
    scheduler = make(slots=2)
    for name in ("a", "b"):
        scheduler.add(request(5, max_tokens=80, name=name))
    run(scheduler, scheduler.plan())
    scheduler.add(request(5, name="same"))
    scheduler.add(request(5, name="urgent", priority=-1))
    run(scheduler, scheduler.plan())  # both commit, which is not interrupted
    plan = scheduler.plan()
    assert [gone.request.request_id for gone in plan.preempted] == ["b"]
    assert names(plan.admitted) == ["urgent"]
    run(scheduler, plan)
    assert names(scheduler.plan().admitted) == ["b"], "it came before the one that waited all the time"


def test_less_may_run_after_memory_was_short() -> None:
    scheduler = make(slots=3)
    for name in ("a", "b", "c"):
        scheduler.add(request(5, max_tokens=CANVAS, name=name))
    plan = scheduler.plan()
    gone = scheduler.preempt_last()
    assert (gone.request.request_id, gone.slot) == ("c", None), "it had no canvas yet"
    assert names(scheduler.plan().admitted) == []
    scheduler.remove(plan.admitted[0])
    assert names(scheduler.plan().admitted) == ["c"]


def test_slots_are_lent_within_the_room_that_pages_leave() -> None:
    """Of 16 pages 5 are taken; a second context of 5 tokens and a canvas of 8 counts as 4, within one tick."""
    scheduler = make(slots=4, full=16)
    scheduler.add(request(17))
    for _ in range(2):
        scheduler.plan()
        lent = [slot for slot in [scheduler.lend_slot(5) for _ in range(3)] if slot is not None]
        assert len(set(lent)) == 2
        for slot in lent:
            scheduler.give_back(slot)


def test_nothing_is_lent_after_it_found_no_memory_until_a_request_ends() -> None:
    scheduler = make(slots=3)
    for name in ("a", "b"):
        scheduler.add(request(5, name=name))
    plan = scheduler.plan()
    assert not scheduler.stop_lending()
    slot = scheduler.lend_slot(5)
    assert slot is not None
    scheduler.give_back(slot)
    assert scheduler.stop_lending()
    scheduler.plan()
    assert scheduler.lend_slot(5) is None
    scheduler.remove(plan.admitted[0])
    assert scheduler.lend_slot(5) == plan.admitted[0].slot


# ---------------------------------------------------------------- pace


def test_a_long_prompt_takes_its_share_of_the_time() -> None:
    scheduler = make(full=200)
    scheduler.add(request(5, max_tokens=100 * CANVAS, name="running"))
    run(scheduler, scheduler.plan())
    scheduler.add(request(150, name="long"))
    pattern, prefill, denoise = "", 0, 0
    for _ in range(60):
        plan = scheduler.plan()
        assert names(plan.denoise + plan.commit).count("running") == 1
        pattern += "P" if plan.encode else "."
        spent = 400 if plan.encode else 0
        prefill, denoise = prefill + spent, denoise + 100
        scheduler.spent(plan, spent, 100)
        run(scheduler, plan)
    assert pattern.startswith("P.......P.......P"), "of four times a step's length: a third of the time in all"
    assert prefill / (prefill + denoise) == pytest.approx(1 / 3, abs=0.03)


def test_prompts_that_a_chunk_completes_do_not_wait() -> None:
    scheduler = make(full=200)
    for name, tokens in (("running", 5), ("long", 100)):
        scheduler.add(request(tokens, max_tokens=80, name=name))
    plan = scheduler.plan()
    scheduler.spent(plan, 10**9, 1)
    run(scheduler, plan)
    scheduler.add(request(CHUNK, name="short"))
    plan = scheduler.plan()
    assert chunks(plan) == [("short", CHUNK)]
    run(scheduler, plan)
    assert chunks(scheduler.plan()) == []


def test_nothing_is_owed_to_nobody() -> None:
    scheduler = make(full=200)
    scheduler.add(request(100, name="long"))
    plan = scheduler.plan()
    scheduler.spent(plan, 10**9, 0)
    run(scheduler, plan)
    scheduler.add(request(5, max_tokens=80, name="short"))
    run(scheduler, scheduler.plan())
    assert ("long", CHUNK) in chunks(scheduler.plan())


# ---------------------------------------------------------------- prefixes


def tokens(count: int, start: int = 0) -> Int32Array:
    return np.arange(start, start + count, dtype=np.int32)


def serve(scheduler: Scheduler, live: LiveRequest) -> LiveRequest:
    scheduler.add(live)
    while scheduler.live():
        plan = scheduler.plan()
        run(scheduler, plan)
    scheduler.full_pages.check()
    scheduler.sliding_pages.check()
    return live


def test_a_repeated_prompt_is_found_but_for_its_last_page() -> None:
    scheduler = make(cache=True)
    serve(scheduler, request(tokens(30), scheduler=scheduler))
    again = serve(scheduler, request(tokens(30), scheduler=scheduler))
    assert again.prefix_tokens == 28
    assert serve(scheduler, request(tokens(31, start=1), scheduler=scheduler)).prefix_tokens == 0
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (91, 28)


@pytest.mark.parametrize("length", [24, 25, 27])
def test_a_prompt_may_be_found_whole_or_but_for_one_token(length: int) -> None:
    scheduler = make(cache=True)
    serve(scheduler, request(tokens(length), scheduler=scheduler))
    again = request(tokens(length), scheduler=scheduler)
    scheduler.add(again)
    plan = scheduler.plan()
    assert again.prefix_tokens == 24
    assert chunks(plan) == ([("r", length - 24)] if length > 24 else [])
    assert plan.denoise == (again,)


def test_the_next_turn_finds_prompt_and_answer() -> None:
    scheduler = make(cache=True)
    first = serve(scheduler, request(tokens(30), max_tokens=3 * CANVAS, scheduler=scheduler))
    answered = np.concatenate([first.tokens, tokens(9)])
    assert len(first.tokens) == 30 + 3 * CANVAS
    second = serve(scheduler, request(answered, scheduler=scheduler))
    assert second.prefix_tokens == 44, "46 were cached: the last canvas is never encoded"


def test_a_turn_that_goes_on_from_the_prompt_finds_its_window() -> None:
    scheduler = make(cache=True)
    serve(scheduler, request(tokens(30), max_tokens=20 * CANVAS, scheduler=scheduler))
    other = np.concatenate([tokens(30), tokens(40, start=500)])
    assert serve(scheduler, request(other, scheduler=scheduler)).prefix_tokens == 28


def test_a_window_that_is_gone_is_kept_the_second_time() -> None:
    """Two prompts that part where no request ended: the window there is known to matter only then."""
    scheduler = make(cache=True, sliding=14)  # two windows of three pages beside the eight that run
    common = tokens(60)

    def ask(start: int) -> int | None:
        prompt = np.concatenate([common, tokens(100, start=start)])
        return serve(scheduler, request(prompt, scheduler=scheduler)).prefix_tokens

    assert ask(1000) == 0
    assert ask(2000) == 0, "the full pages are there, the window behind them is not"
    assert ask(3000) == 60


def test_a_shared_page_counts_for_everyone_who_lays_it_out() -> None:
    scheduler = make(cache=True, full=24)
    serve(scheduler, request(tokens(48), scheduler=scheduler))
    for name in ("b", "c"):
        scheduler.add(request(tokens(48), max_tokens=2 * CANVAS, name=name, scheduler=scheduler))
    assert names(scheduler.plan().admitted) == ["b"], "12 pages that are shared, and room for two more"
    assert (scheduler.full_pages.used, scheduler.full_pages.holds) == (12, 12)


def test_salts_keep_prefixes_apart() -> None:
    scheduler = make(cache=True)
    live = request(tokens(30))
    live.keys = scheduler.make_keys("tenant")
    live.keys.extend(live.tokens)  # type: ignore[union-attr]
    serve(scheduler, live)
    assert serve(scheduler, request(tokens(30), scheduler=scheduler)).prefix_tokens == 0


def test_without_a_cache_nothing_is_kept() -> None:
    scheduler = make()
    assert scheduler.make_keys("") is None
    serve(scheduler, request(tokens(30), scheduler=scheduler))
    assert scheduler.full_pages.idle == scheduler.sliding_pages.idle == 0


def test_with_a_seed_only_what_it_would_compute_itself_is_found() -> None:
    scheduler = make(cache=True)  # exact prefixes end at multiples of 20: whole chunks of 10, whole pages of 4
    serve(scheduler, request(tokens(47), scheduler=scheduler))
    assert serve(scheduler, request(tokens(47), scheduler=scheduler, seed=1)).prefix_tokens == 40
    assert serve(scheduler, request(tokens(47), scheduler=scheduler)).prefix_tokens == 44
    odd = np.concatenate([tokens(23), tokens(40, start=900)])
    scheduler = make(cache=True)
    serve(scheduler, request(tokens(23), scheduler=scheduler))  # the last chunk has 3 tokens
    assert serve(scheduler, request(odd, scheduler=scheduler)).prefix_tokens == 20
    assert serve(scheduler, request(odd, scheduler=scheduler, seed=1)).prefix_tokens == 60, "it went on from the grid"
    scheduler = make(cache=True)
    serve(scheduler, request(tokens(27), scheduler=scheduler))
    off = np.concatenate([tokens(27), tokens(40, start=900)])
    assert serve(scheduler, request(off, scheduler=scheduler)).prefix_tokens == 24
    assert serve(scheduler, request(off, scheduler=scheduler, seed=1)).prefix_tokens == 20, "off the grid from 24 on"
    assert serve(scheduler, request(off, scheduler=scheduler, seed=1)).prefix_tokens == 60, "now they are exact"


def exact_pages(scheduler: Scheduler, live: LiveRequest) -> list[int]:
    """Which of a served request's complete pages are."""
    assert live.keys
    return [i for i, key in enumerate(live.keys.keys) if scheduler.full_pages.find(key, exact=True) is not None]


def test_nothing_is_exact_behind_what_is_not() -> None:
    scheduler = make(cache=True)
    serve(scheduler, request(tokens(27), scheduler=scheduler))  # whole chunks up to 20: five pages
    off = np.concatenate([tokens(27), tokens(120, start=900)])
    assert exact_pages(scheduler, serve(scheduler, request(off, scheduler=scheduler))) == [0, 1, 2, 3, 4]
    on = np.concatenate([off[:61], tokens(60, start=2000)])
    later = serve(scheduler, request(on, scheduler=scheduler))
    assert later.prefix_tokens == 60, "on the grid, and not exact"
    assert exact_pages(scheduler, later) == [0, 1, 2, 3, 4]


def test_a_seeded_request_s_window_is_kept_where_another_looks_for_it() -> None:
    scheduler = make(cache=True, sliding=14)
    for found in (0, 40):
        assert serve(scheduler, request(tokens(47), 90, scheduler=scheduler, seed=1)).prefix_tokens == found
        serve(scheduler, request(tokens(40, start=500 + found), scheduler=scheduler))  # takes what is not kept


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_request_ends_and_nothing_leaks(data: st.DataObject) -> None:
    """Any mix of joins, shared prefixes, priorities, preemptions, cancellations and ends, against a model of the pages:
    every page knows whose tokens it holds, so what a prefix finds must be what its tokens were.
    """
    cache = data.draw(st.booleans())
    slots, sliding = data.draw(st.integers(1, 4)), data.draw(st.integers(8, 40))
    scheduler = make(slots=slots, full=data.draw(st.integers(26, 60)), sliding=sliding, cache=cache)
    written = Written()
    texts = [tokens(60), np.concatenate([tokens(25), tokens(60, start=100)]), tokens(60, start=300)]
    for step in range(data.draw(st.integers(1, 30))):
        for _ in range(data.draw(st.integers(0, 2))):
            text = data.draw(st.sampled_from(texts))[: data.draw(st.integers(1, 60))]
            given: dict[str, Any] = {"priority": data.draw(st.integers(-1, 1))} | (
                {"seed": 1} if data.draw(st.booleans()) else {}
            )
            new = request(text, data.draw(st.integers(1, 40)), scheduler=scheduler, **given)
            scheduler.add(new)
        if scheduler.live() and data.draw(st.integers(0, 4)) == 0:
            scheduler.remove(data.draw(st.sampled_from(scheduler.live())))
        if scheduler.running > 1 and data.draw(st.integers(0, 9)) == 0:
            scheduler.preempt_last()
        plan = scheduler.plan()
        written.check(scheduler, plan)
        scheduler.spent(plan, data.draw(st.integers(0, 500)), 100)
        run(scheduler, plan, token=step % 3)
    while scheduler.live():
        plan = scheduler.plan()
        assert plan.encode or plan.denoise or plan.commit, "something live always moves"
        written.check(scheduler, plan)
        run(scheduler, plan)
    for pool in (scheduler.full_pages, scheduler.sliding_pages):
        assert pool.used == 0
        assert cache or not pool.idle
    assert scheduler.sliding_pages.unreserved == sliding


class Written:
    """What is in every page: the tokens up to the end of each of its places, as (position, hash of all before)."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, int], dict[int, bytes]] = {}

    def check(self, scheduler: Scheduler, plan: Plan) -> None:
        """Play a plan's writes, then see that whatever is denoised finds its own context, and the counts add up."""
        scheduler.full_pages.check()
        scheduler.sliding_pages.check()
        running = [live for live in scheduler.live() if live.pages]
        assert len({live.slot for live in running}) == len(running)
        for live, count in [(chunk.request, chunk.tokens) for chunk in plan.encode] + [
            (live, len(live.uncached)) for live in plan.commit
        ]:
            self._read(live, live.cached_tokens)
            self._write(live, live.cached_tokens, live.cached_tokens + count)
        for live in plan.denoise:
            self._read(live, len(live.tokens))
        for name, pool in (("full", scheduler.full_pages), ("sliding", scheduler.sliding_pages)):
            held = [page for live in running for page in self._pages(live, name) if page >= 0]
            ahead = sum(len(live.pages._ahead) for live in running if live.pages) if name == "full" else 0
            assert pool.used == len(set(held)) + ahead

    def _write(self, live: LiveRequest, start: int, stop: int) -> None:
        for name in ("full", "sliding"):
            for position in range(start, stop):
                page = int(self._pages(live, name)[position // PAGE])
                assert page >= 0
                place = self.content.setdefault((name, page), {})
                if position % PAGE == 0:
                    place.clear()
                place[position] = live.tokens[: position + 1].tobytes()

    def _read(self, live: LiveRequest, length: int) -> None:
        for name, first in (("full", 0), ("sliding", max(0, length - (WINDOW - 1)))):
            for position in range(first, length):
                page = int(self._pages(live, name)[position // PAGE])
                assert self.content[name, page][position] == live.tokens[: position + 1].tobytes()

    @staticmethod
    def _pages(live: LiveRequest, name: str) -> Int32Array:
        assert live.pages is not None
        pages: Int32Array = getattr(live.pages.view, name)
        return pages


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
