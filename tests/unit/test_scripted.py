"""The scripted engine notices what a real one would be corrupted by."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma_runtime.contract import CommitRow, DenoiseRow, EncodeRow, EngineLimits, SequencePages
from dgemma_runtime.engines.scripted import EngineCall, ScriptedEngine, answer_script, scripted_manifest
from dgemma_runtime.errors import EngineError

CANVAS, PAGE, WINDOW = 4, 3, 5
PROMPT = np.array([10, 11, 12, 13, 14, 15, 16], np.int32)
ANSWER = np.array([20, 21, 22, 23, 24, 25], np.int32)
PAGES = SequencePages(np.array([4, 2, 7, 1, 3], np.int32), np.array([0, 3, 5, 6, 7], np.int32))


def make(fail_on: dict[str, int] | None = None, steps: int = 2) -> ScriptedEngine:
    manifest = scripted_manifest(100, CANVAS, WINDOW)
    script = answer_script([(PROMPT, ANSWER)], CANVAS, steps, padding_id=9)
    return ScriptedEngine(manifest, EngineLimits(2, 8, PAGE, 8, 8), script, fail_on)


def row(position: int = 7, pages: SequencePages = PAGES, first_step: bool = True, slot: int = 0) -> DenoiseRow:
    zeros = np.zeros(CANVAS, np.int32)
    return DenoiseRow(slot, zeros, np.zeros(CANVAS, np.float32), 0.5, position, pages, first_step)


def prefilled() -> ScriptedEngine:
    engine = make()
    engine.encode([EncodeRow(PROMPT[:5], 0, PAGES)])
    engine.encode([EncodeRow(PROMPT[5:], 5, PAGES)])
    return engine


def without_sliding(*indices: int) -> SequencePages:
    sliding = PAGES.sliding.copy()
    sliding[list(indices)] = -1
    return SequencePages(PAGES.full, sliding)


def test_the_answer_follows_canvas_by_canvas() -> None:
    engine = prefilled()
    for first in (True, False):
        result = engine.denoise([row(first_step=first)])
        assert result.argmax_ids.tolist() == [[20, 21, 22, 23]]
    assert result.entropies.tolist() == [[0.0] * CANVAS]
    engine.release(0)
    engine.encode([EncodeRow(result.argmax_ids[0], 7, PAGES)])
    assert engine.denoise([row(position=11)]).argmax_ids.tolist() == [[24, 25, 9, 9]]
    assert engine.calls[-1] == EngineCall("denoise", (0,), (11,), (CANVAS,))


def test_more_of_the_canvas_shows_with_every_step() -> None:
    engine = make(steps=4)
    engine.encode([EncodeRow(PROMPT, 0, PAGES)])
    shown = [int((engine.denoise([row(first_step=step == 0)]).argmax_ids != 0).sum()) for step in range(4)]
    assert shown == [1, 2, 4, 4]


def test_pages_that_left_the_window_are_not_needed() -> None:
    assert prefilled().denoise([row(pages=without_sliding(0))]).argmax_ids.shape == (1, CANVAS)


def test_a_page_within_the_window_is_needed() -> None:
    with pytest.raises(AssertionError, match="within the window was given back"):
        prefilled().denoise([row(pages=without_sliding(0, 1))])


def test_a_position_that_was_never_written_is_noticed() -> None:
    with pytest.raises(AssertionError, match="never written"):
        prefilled().denoise([row(position=8)])


def test_a_page_of_somebody_else_is_noticed() -> None:
    engine = prefilled()
    swapped = SequencePages(PAGES.full[::-1].copy(), PAGES.sliding)
    with pytest.raises(AssertionError, match="never written, or written over"):
        engine.denoise([row(pages=swapped)])
    with pytest.raises(AssertionError, match="sliding layers' pages differ"):
        prefilled().denoise([row(pages=SequencePages(PAGES.full, PAGES.sliding[::-1].copy()))])


def test_writing_to_a_page_that_was_given_back_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"within the window was given back|to a page that was given back"):
        make().encode([EncodeRow(PROMPT, 0, without_sliding(0))])


def test_sequences_may_share_pages_but_nobody_writes_to_them() -> None:
    engine = prefilled()
    engine.denoise([row(), row(slot=1)])
    with pytest.raises(AssertionError, match="a page that is written to belongs to two sequences"):
        engine.encode([EncodeRow(PROMPT[5:], 5, PAGES), EncodeRow(PROMPT[5:], 5, PAGES)])


def test_a_commit_continues_its_slot() -> None:
    engine = prefilled()
    canvas = np.full(CANVAS, 7, np.int32)
    with pytest.raises(KeyError):
        engine.denoise([], [CommitRow(0, canvas, len(PROMPT), PAGES)])
    engine.denoise([row()])
    assert engine.denoise([], [CommitRow(0, canvas, len(PROMPT), PAGES)]).argmax_ids.shape == (0, CANVAS)
    with pytest.raises(AssertionError):
        engine.denoise([row(first_step=False)])
    with pytest.raises(AssertionError, match="another sequence took the slot"):
        engine.denoise([row()])


def test_a_context_written_over_during_a_canvas_is_noticed() -> None:
    engine = prefilled()
    engine.denoise([row()])
    engine.encode([EncodeRow(PROMPT[:1] + 1, 0, PAGES)])
    with pytest.raises(AssertionError, match="the context changed during a canvas"):
        engine.denoise([row(first_step=False)])


def test_a_slot_must_be_released_before_another_sequence_takes_it() -> None:
    engine = prefilled()
    first = engine.denoise([row()])
    assert np.array_equal(engine.denoise([row()]).argmax_ids, first.argmax_ids)  # its own canvas may begin again
    with pytest.raises(AssertionError, match="another sequence took the slot"):
        engine.denoise([row(position=6)])


def test_it_fails_on_request() -> None:
    engine = make(fail_on={"encode": 2})
    engine.encode([EncodeRow(PROMPT[:5], 0, PAGES)])
    with pytest.raises(EngineError, match="scripted failure of encode call 2"):
        engine.encode([EncodeRow(PROMPT[5:], 5, PAGES)])
