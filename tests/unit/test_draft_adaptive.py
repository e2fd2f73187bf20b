"""Backing off where drafts do not pay, and trying again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dgemma_runtime.drafting.adaptive import LONGEST_REST, DraftPolicy
from dgemma_runtime.drafting.proposal import DraftOutcome

LENGTH = 64


def outcome(steps: int, accepted: int = LENGTH, drafted: int = LENGTH, source: str = "lookup") -> DraftOutcome:
    return DraftOutcome(source, drafted, accepted, steps)


def drafted_canvases(policy: DraftPolicy, count: int, with_draft: int, without: int) -> list[int]:
    """Which of `count` canvases were drafted, when a drafted one takes `with_draft` steps and another one `without`."""
    chosen = []
    for index in range(count):
        if policy.decide("lookup"):
            chosen.append(index)
            policy.observe(with_draft, outcome(with_draft))
        else:
            policy.observe(without)
    return chosen


def test_the_first_canvas_may_be_drafted() -> None:
    assert DraftPolicy().decide("lookup")


def test_drafts_that_pay_are_always_asked_for() -> None:
    policy = DraftPolicy()
    policy.observe(5)
    assert drafted_canvases(policy, 50, with_draft=1, without=5) == list(range(50))


def test_drafts_that_never_pay_are_tried_less_and_less_often() -> None:
    policy = DraftPolicy()
    policy.observe(3)
    assert drafted_canvases(policy, 150, with_draft=4, without=3) == [0, 2, 5, 10, 19, 36, 69, 102, 135]
    assert LONGEST_REST == 102 - 69 - 1


def test_as_many_steps_as_without_do_not_pay() -> None:
    policy = DraftPolicy()
    policy.observe(3)
    policy.observe(3, outcome(3))
    assert not policy.decide("lookup")


def test_the_drafters_own_cost_counts() -> None:
    cheap, dear = DraftPolicy({"model": 0.5}), DraftPolicy({"model": 1.5})
    for policy in (cheap, dear):
        policy.observe(3)
        policy.observe(2, outcome(2, source="model"))
    assert cheap.decide("model")
    assert not dear.decide("model")


def test_one_that_pays_ends_the_waiting() -> None:
    policy = DraftPolicy()
    policy.observe(3)
    drafted_canvases(policy, 10, with_draft=4, without=3)
    while not policy.decide("lookup"):
        policy.observe(3)
    policy.observe(1, outcome(1))
    assert policy.decide("lookup")
    policy.observe(4, outcome(4))
    assert not policy.decide("lookup")
    assert policy.decide("lookup")


def test_without_a_canvas_to_compare_with_what_was_right_decides() -> None:
    for accepted, again in ((LENGTH // 2, True), (LENGTH // 2 - 1, False)):
        policy = DraftPolicy()
        policy.observe(9, outcome(9, accepted))
        assert policy.usual_steps is None
        assert policy.decide("lookup") is again


def test_a_draft_of_which_nothing_was_shown_is_a_canvas_without() -> None:
    policy = DraftPolicy()
    policy.observe(7, outcome(7, 0, drafted=0))
    assert policy.usual_steps == 7
    assert policy.decide("lookup")


def test_a_draft_that_costs_something_has_not_paid_where_nothing_was_shown() -> None:
    policy = DraftPolicy({"model": 0.5})
    for rest in (1, 2, 4):
        assert policy.decide("model")
        policy.observe(7, outcome(7, 0, drafted=0, source="model"))
        assert [policy.decide("model") for _ in range(rest)] == [False] * rest
    assert policy.usual_steps == 7


def test_sources_rest_apart() -> None:
    policy = DraftPolicy()
    policy.observe(2)
    policy.observe(5, outcome(5, source="model"))
    assert policy.decide("lookup")
    assert not policy.decide("model")


def test_the_average_follows_what_canvases_take_now() -> None:
    policy = DraftPolicy()
    for steps in (40, *[4] * 20):
        policy.observe(steps)
    assert policy.usual_steps is not None
    assert 4 < policy.usual_steps < 4.2


canvases = st.lists(st.tuples(st.integers(1, 48), st.integers(0, LENGTH), st.integers(1, 48)), max_size=100)


def replay(policy: DraftPolicy, story: list[tuple[int, int, int]]) -> list[bool]:
    chosen = []
    for with_draft, accepted, without in story:
        chosen.append(policy.decide("lookup"))
        policy.observe(*((with_draft, outcome(with_draft, accepted)) if chosen[-1] else (without,)))
    return chosen


@given(canvases)
def test_the_same_story_has_the_same_decisions(story: list[tuple[int, int, int]]) -> None:
    assert replay(DraftPolicy(), story) == replay(DraftPolicy(), story)


@given(canvases)
def test_no_source_rests_for_ever(story: list[tuple[int, int, int]]) -> None:
    policy = DraftPolicy()
    replay(policy, story)
    assert any(policy.decide("lookup") for _ in range(LONGEST_REST + 1))
