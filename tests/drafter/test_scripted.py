"""The scripted engine drafts what it is told, and notices what a real one would draft wrong."""

from __future__ import annotations

import numpy as np
import pytest

from dgemma_runtime.contract import (
    DenoiseRow,
    DraftRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    SequencePages,
)
from dgemma_runtime.engines.scripted import EngineCall, ScriptedEngine, answer_script, scripted_manifest
from dgemma_runtime.errors import EngineError

PROMPT = np.array([10, 11, 12], np.int32)
PAGES = SequencePages(*(np.arange(4, dtype=np.int32) for _ in range(2)))


def drafts(context: Int32Array) -> tuple[Int32Array, Float32Array]:
    return context[-1] + np.arange(4, dtype=np.int32), np.full(4, 0.5, np.float32)


def make(fail_on: dict[str, int] | None = None, drafting: bool = True) -> ScriptedEngine:
    script = answer_script([(PROMPT, np.array([20, 21], np.int32))], 4)
    limits = EngineLimits(2, 8, 4, 4, 4)
    engine = ScriptedEngine(scripted_manifest(100, 4), limits, script, fail_on, drafts=drafts if drafting else None)
    engine.encode([EncodeRow(PROMPT, 0, PAGES)])
    return engine


def test_it_drafts_from_the_context() -> None:
    engine = make()
    result = engine.draft([DraftRow(1, 3, PAGES, 12)])
    assert result.token_ids.tolist() == [[12, 13, 14, 15]]
    assert result.confidences.tolist() == [[0.5] * 4]
    assert engine.calls[-1] == EngineCall("draft", (1,), (3,), (4,))
    assert engine.drafter is not None
    assert engine.drafter.canvas_length == 4


def test_a_wrong_last_token_is_noticed() -> None:
    with pytest.raises(AssertionError, match="last_id is not"):
        make().draft([DraftRow(0, 3, PAGES, 11)])


def test_a_draft_for_a_canvas_at_work_is_noticed() -> None:
    engine, zeros = make(), np.zeros(4, np.int32)
    engine.denoise([DenoiseRow(0, zeros, zeros.astype(np.float32), 0.5, 3, PAGES, True)])
    with pytest.raises(AssertionError, match="slot 0 has a canvas already"):
        engine.draft([DraftRow(0, 3, PAGES, 12)])


def test_it_fails_when_told_to_and_has_no_drafter_unless_told_to() -> None:
    with pytest.raises(EngineError, match="scripted failure of draft call 1"):
        make({"draft": 1}).draft([DraftRow(0, 3, PAGES, 12)])
    assert make(drafting=False).drafter is None
