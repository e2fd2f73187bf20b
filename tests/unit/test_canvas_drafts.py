"""Canvases that start from a draft, and canvases with pins: what the denoiser sees, when they end, what comes out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import Float32Array, Int32Array, SequencePages
from dgemma_runtime.drafting.proposal import NOTHING, DraftOutcome, Pins, Proposal, lay_out
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters, default_parameters

LENGTH, VOCABULARY = 6, 1000
PAGES = SequencePages(np.zeros(1, np.int32), np.zeros(1, np.int32))
END = 1
DEFAULTS = default_parameters({"eos_token_id": END})
TEXT: Int32Array = np.arange(50, 50 + LENGTH, dtype=np.int32)
SURE: Float32Array = np.zeros(LENGTH, np.float32)
UNSURE: Float32Array = np.array([0.0, 5.0, 0.0, 5.0, 5.0, 0.0], np.float32)  # 0, 2, 5 and one more are accepted


def noise(seed: int = 9) -> CanvasNoise:
    return CanvasNoise(seed, 0, LENGTH, VOCABULARY)


def draft(ids: Int32Array = TEXT, confidences: object = 1.0) -> Proposal:
    return Proposal(ids, np.broadcast_to(np.asarray(confidences, np.float32), (LENGTH,)).copy(), "client")


def make(proposal: Proposal | None = None, pins: Pins | None = None, **changes: object) -> Canvas:
    parameters: GenerationParameters = replace(DEFAULTS, **changes)  # type: ignore[arg-type]
    return Canvas(parameters, noise(), proposal, pins)


def seen(canvas: Canvas) -> list[int]:
    return [int(token) for token in canvas.row(0, 0, PAGES).canvas_ids]


# ---------------------------------------------------------------- drafts


def test_the_denoiser_sees_what_is_confident_and_noise_elsewhere() -> None:
    canvas = make(draft(confidences=[0.9, 0.5, 0.49, 0.0, 1.0, 0.7]), draft_confidence=0.5)
    expected = noise().initial()
    expected[[0, 1, 4, 5]] = TEXT[[0, 1, 4, 5]]
    assert seen(canvas) == expected.tolist()


@pytest.mark.parametrize("shown", range(LENGTH + 1))
def test_the_schedule_starts_at_the_noise_that_is_left(shown: int) -> None:
    canvas = make(draft(confidences=[1.0] * shown + [0.0] * (LENGTH - shown)), max_denoising_steps=12)
    step = min(2 * shown, 11)
    assert canvas.temperature == pytest.approx(0.4 + 0.4 * (12 - step) / 12)


def test_agreement_ends_a_canvas_after_one_pass() -> None:
    canvas = make(draft())
    assert canvas.advance(TEXT, TEXT, SURE)
    assert canvas.argmax_ids.tolist() == TEXT.tolist()
    assert canvas.outcome(LENGTH) == DraftOutcome("client", LENGTH, LENGTH, 1)


def test_agreement_counts_where_the_draft_was_not_shown() -> None:
    assert make(draft(confidences=[1.0] * 5 + [0.1])).advance(TEXT, TEXT, SURE)


def test_agreement_without_certainty_is_not_enough() -> None:
    assert not make(draft()).advance(TEXT, TEXT, UNSURE)


def test_one_token_less_takes_a_second_pass() -> None:
    partial = TEXT.copy()
    partial[3] = NOTHING
    canvas = make(draft(partial))
    assert not canvas.advance(TEXT, TEXT, SURE)
    assert canvas.advance(TEXT, TEXT, SURE)
    assert canvas.outcome(LENGTH) == DraftOutcome("client", LENGTH - 1, LENGTH - 1, 2)


def test_a_higher_stability_threshold_wants_more_than_the_draft() -> None:
    canvas = make(draft(), stability_threshold=2)
    assert not canvas.advance(TEXT, TEXT, SURE)
    assert canvas.advance(TEXT, TEXT, SURE)


def test_what_stands_behind_the_end_need_not_have_been_drafted() -> None:
    answer = TEXT.copy()
    answer[2:] = [END, 7, 7, 7]
    canvas = make(lay_out(answer[:3], np.ones(3, np.float32), LENGTH, "lookup"))
    assert canvas.advance(answer, answer, SURE)
    assert canvas.outcome(3) == DraftOutcome("lookup", 3, 3, 1)


def test_a_draft_that_ends_says_that_the_output_ends() -> None:
    answer = TEXT.copy()
    answer[2:] = [END, 7, 7, 7]
    assert make(lay_out(answer[:2], np.ones(2, np.float32), LENGTH, "client")).advance(answer, answer, SURE)
    assert not make(lay_out(answer[:1], np.ones(1, np.float32), LENGTH, "client")).advance(answer, answer, SURE)
    nothing = lay_out(np.empty(0, np.int32), np.empty(0, np.float32), LENGTH, "client")
    assert not make(nothing).advance(np.full(LENGTH, END, np.int32), answer, SURE)


def test_the_end_itself_must_have_been_drafted() -> None:
    answer = TEXT.copy()
    answer[2] = END
    assert not make(draft()).advance(answer, answer, SURE)


def test_another_argmax_is_what_counts_and_an_ordinary_step() -> None:
    other = TEXT + 100
    canvas = make(draft(), max_denoising_steps=12)
    assert not canvas.advance(other, other, UNSURE)
    expected = noise().renoise(0)
    kept = [0, 1, 2, 5]  # the certain ones, and one more
    expected[kept] = other[kept]
    assert seen(canvas) == expected.tolist()
    assert canvas.temperature == pytest.approx(0.4 + 0.4 * (12 - 12 * len(kept) // LENGTH) / 12)
    assert canvas.advance(other, other, SURE)
    assert canvas.argmax_ids.tolist() == other.tolist()
    assert canvas.outcome(LENGTH) == DraftOutcome("client", LENGTH, 0, 2)


def test_a_draft_leaves_all_denoising_steps() -> None:
    canvas = make(draft(), max_denoising_steps=5)
    ended = [canvas.advance(TEXT + step, TEXT, UNSURE) for step in range(5)]
    assert ended == [False] * 4 + [True]


def test_a_draft_of_nothing_is_no_draft() -> None:
    """Uniform noise, the whole schedule, no credit: the same steps as without the feature."""
    rng = np.random.default_rng(5)
    null = lay_out(np.empty(0, np.int32), np.empty(0, np.float32), LENGTH, "lookup")
    one, other = make(), make(null)
    for _ in range(20):
        a, b = one.row(0, 0, PAGES), other.row(0, 0, PAGES)
        assert a.canvas_ids.tolist() == b.canvas_ids.tolist()
        assert a.uniforms.tolist() == b.uniforms.tolist()
        assert (a.temperature, a.first_step) == (b.temperature, b.first_step)
        ids = rng.integers(0, VOCABULARY, LENGTH).astype(np.int32)
        entropies = rng.random(LENGTH).astype(np.float32)
        assert not one.advance(ids, ids, entropies)
        assert not other.advance(ids, ids, entropies)


# ---------------------------------------------------------------- halves


def test_no_token_of_a_half_is_seen_by_the_row_that_judges_it() -> None:
    canvas = make(draft(), draft_verification="halves", max_denoising_steps=12)
    initial, first = noise().initial(), canvas.row(0, 0, PAGES)
    second = canvas.second_row(1, 0, PAGES)
    assert first.canvas_ids[0::2].tolist() == initial[0::2].tolist()
    assert first.canvas_ids[1::2].tolist() == TEXT[1::2].tolist()
    assert second.canvas_ids[0::2].tolist() == TEXT[0::2].tolist()
    assert second.canvas_ids[1::2].tolist() == initial[1::2].tolist()
    assert (first.slot, second.slot, second.first_step) == (0, 1, True)
    assert first.temperature == second.temperature == pytest.approx(0.6)
    assert canvas.advance(TEXT, TEXT, SURE)


def test_halves_of_no_draft_are_one_row() -> None:
    assert not make(draft_verification="halves").halves
    assert not make(draft(confidences=0.1), draft_verification="halves").halves


# ---------------------------------------------------------------- pins


PINS = Pins(TEXT + 200, np.array([True, False, False, True, True, False]), LENGTH)
FREE, PINNED = [1, 2, 5], [0, 3, 4]


def test_pins_are_seen_in_every_step_and_never_change() -> None:
    canvas = make(pins=PINS)
    for step in range(4):
        row = canvas.row(0, 0, PAGES)
        assert row.canvas_ids[PINNED].tolist() == PINS.token_ids[PINNED].tolist()
        assert not canvas.advance(TEXT + step, TEXT, UNSURE)
        assert canvas.argmax_ids[PINNED].tolist() == PINS.token_ids[PINNED].tolist()
        assert canvas.argmax_ids[FREE].tolist() == (TEXT + step)[FREE].tolist()


def test_pins_take_nothing_of_the_entropy_bound() -> None:
    """Only the free positions compete for it, so that uncertain pins hold nothing up."""
    canvas = make(pins=PINS)
    entropies = np.array([9.0, 0.0, 5.0, 9.0, 9.0, 0.05], np.float32)
    assert not canvas.advance(TEXT, TEXT, entropies)
    expected = noise().renoise(0)
    expected[[1, 5, 2]] = TEXT[[1, 5, 2]]  # 0, then 0.05 behind 0, then the next one behind 0.05
    expected[PINNED] = PINS.token_ids[PINNED]
    assert seen(canvas) == expected.tolist()


def test_pins_take_no_part_in_stopping() -> None:
    canvas = make(pins=PINS)
    sure_where_free = np.where(PINS.pinned, 9.0, 0.0).astype(np.float32)
    assert not canvas.advance(TEXT, TEXT, sure_where_free)
    changed_where_pinned = np.where(PINS.pinned, TEXT + 1, TEXT).astype(np.int32)
    assert canvas.advance(changed_where_pinned, TEXT, sure_where_free)


def test_pins_leave_the_whole_schedule() -> None:
    """What is pinned says nothing of how certain the rest is."""
    assert make(pins=PINS).temperature == pytest.approx(0.8)
    assert make(draft(confidences=[1, 1, 0, 1, 1, 0]), PINS, max_denoising_steps=12).temperature == pytest.approx(
        0.4 + 0.4 * (12 - 4) / 12
    )


def test_what_nobody_reads_decides_nothing() -> None:
    canvas = make(pins=Pins(TEXT, PINS.pinned, read=4))
    behind = np.arange(LENGTH) >= 4
    entropies = np.where(behind, 9.0, 0.0).astype(np.float32)
    assert not canvas.advance(TEXT, TEXT, entropies)
    assert canvas.advance(np.where(behind, TEXT + 1, TEXT).astype(np.int32), TEXT, entropies)
    assert make(pins=Pins(TEXT, np.arange(LENGTH) < 4, read=4)).advance(TEXT, TEXT, entropies)


def test_a_canvas_that_is_all_pinned_takes_one_pass() -> None:
    canvas = make(pins=Pins(TEXT, np.ones(LENGTH, np.bool_), LENGTH))
    assert canvas.advance(TEXT + 1, TEXT, UNSURE)
    assert canvas.argmax_ids.tolist() == TEXT.tolist()


def test_a_pin_wins_over_a_draft() -> None:
    canvas = make(draft(), PINS)
    expected = np.where(PINS.pinned, PINS.token_ids, TEXT)
    assert seen(canvas) == expected.tolist()
    assert canvas.advance(TEXT, TEXT, SURE)
    assert canvas.argmax_ids.tolist() == expected.tolist()
    assert canvas.outcome(LENGTH) == DraftOutcome("client", 3, 3, 1)
