"""Slots lent for second rows, and drafts, where memory is short: seeds keep their texts, and everybody gets on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.contract import CommitRow, DenoiseResult, DenoiseRow, DraftResult, DraftRow
from dgemma_runtime.engines.scripted import ChaoticEngine, scripted_drafter_manifest, scripted_manifest
from dgemma_runtime.errors import EngineMemoryError
from dgemma_runtime.parameters import parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import plan_limits
from dgemma_runtime.testing import Recorder, small_settings, tiny_tokenizer

if TYPE_CHECKING:
    from tests.unit.conftest import Start

LENGTH = 8
MANIFEST = scripted_manifest(tiny_tokenizer().get_vocab_size(), LENGTH, sliding_window=13, max_model_len=512)
PROMPTS = ("one two one two one two ", "aaaa", "say it again, say it again, say")


def engine(**settings: Any) -> ChaoticEngine:
    return ChaoticEngine(MANIFEST, plan_limits(MANIFEST, small_settings(**settings)))


def ask(service: Service, prompts: Sequence[str] = PROMPTS, **values: Any) -> list[Recorder]:
    """Drafted all along and never right, a seed each; all are there before the first tick."""
    common = {"max_denoising_steps": 4, "end_id": -1, "max_tokens": 32, "draft_verification": "halves"}
    recorders = []
    with service._changed:
        for seed, prompt in enumerate(prompts):
            parameters = parse_parameters({**common, "seed": seed, **values}, service.defaults)
            recorders.append(recorder := Recorder())
            draft = np.arange(32, dtype=np.int32)
            service.submit(GenerationRequest(prompt, parameters, draft=draft), recorder)
    return recorders


def texts(recorders: Sequence[Recorder]) -> list[list[int]]:
    return [recorder.finished().token_ids.tolist() for recorder in recorders]


def rows(used: ChaoticEngine) -> list[int]:
    """Of each denoise call."""
    return [len(call.slots) for call in used.calls if call.kind == "denoise"]


# ---------------------------------------------------------------- second rows


class Narrow(ChaoticEngine):
    """Has memory for so many rows a call, and says so when these have run, as one that runs several calls in turn."""

    def __init__(self, most_rows: int, **settings: Any) -> None:
        super().__init__(MANIFEST, plan_limits(MANIFEST, small_settings(**settings)))
        self._most_rows = most_rows

    def denoise(self, rows: Sequence[DenoiseRow], commits: Sequence[CommitRow] = ()) -> DenoiseResult:
        if len(rows) <= self._most_rows:
            return super().denoise(rows, commits)
        super().denoise(rows[: self._most_rows])
        self._starved = True
        raise EngineMemoryError(f"no memory for {len(rows)} rows")


@pytest.mark.parametrize("at_once", [1, 3])
def test_lent_slots_that_find_no_memory_are_done_without(
    start: Start, at_once: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No request waits or fails for them."""
    expected = texts(ask(start(engine(max_batch_size=6)), PROMPTS[:at_once]))
    service = start(Narrow(at_once, max_batch_size=6))
    assert texts(ask(service, PROMPTS[:at_once])) == expected
    assert service.statistics().preemptions == 0
    assert "no memory for" in caplog.text


def test_a_slot_is_not_lent_where_its_context_has_no_room_again(start: Start) -> None:
    """Of 16 pages the prompt takes 10, and the prompt and a canvas would take 11 more."""
    prompt = ("x" * 46,)
    roomy, tight = engine(), engine(full_pages=16, max_model_len=80)
    assert texts(ask(start(tight), prompt)) == texts(ask(start(roomy), prompt))
    assert max(rows(roomy)) == 2
    assert max(rows(tight)) == 1


def test_a_call_before_that_finds_no_memory(start: Start) -> None:
    """Of two canvases that start, one has no slot for its second row."""
    used = engine(max_batch_size=3)
    used._most_canvases = 0
    service = start(used)
    for recorder in ask(service, "ab"):
        assert recorder.finished().error == "no memory for more than 0 canvases"
    assert service.healthy
    calls = [(call.kind, len(call.slots)) for call in used.calls if call.kind in ("denoise", "release")]
    assert calls[:3] == [("denoise", 1), ("release", 1), ("release", 1)], "the lent slot was in no call"
    assert calls[3][0] == "denoise"


# ---------------------------------------------------------------- networks


class Drafted(ChaoticEngine):
    """Its drafter's calls find no memory while there are `too_many` canvases or more to draft, or at work."""

    def __init__(self, too_many: int) -> None:
        super().__init__(MANIFEST, plan_limits(MANIFEST, small_settings()))
        self.drafter = scripted_drafter_manifest(MANIFEST)
        self._drafts = lambda context: (np.resize(context[-5:], LENGTH), np.full(LENGTH, 0.99, np.float32))
        self._too_many = too_many

    def draft(self, rows: Sequence[DraftRow]) -> DraftResult:
        if len(self._slots.keys() | {row.slot for row in rows}) >= self._too_many:
            self._starved = True
            raise EngineMemoryError("no memory for a draft")
        return super().draft(rows)


def ask_network(service: Service, **values: Any) -> list[Recorder]:
    common = {"max_denoising_steps": 4, "end_id": -1, "max_tokens": 32, "drafter": "model"}
    recorders = []
    with service._changed:
        for prompt in PROMPTS:
            recorders.append(recorder := Recorder())
            service.submit(GenerationRequest(prompt, parse_parameters(common | values, service.defaults)), recorder)
    return recorders


def test_a_seed_waits_for_a_network_that_finds_no_memory(start: Start) -> None:
    expected = texts(ask_network(start(Drafted(too_many=9)), seed=5))
    service = start(Drafted(too_many=2))
    assert texts(ask_network(service, seed=5)) == expected
    assert service.statistics().preemptions > 0


def test_what_has_a_seed_and_never_finds_memory_fails_alone(start: Start) -> None:
    service = start(Drafted(too_many=1))
    for recorder in ask_network(service, seed=5):
        assert (recorder.finished().reason, recorder.finished().error) == ("error", "no memory for a draft")
    assert service.healthy
    assert [recorder.finished().error for recorder in ask_network(service, seed=5, drafter="off")] == [None] * 3


def test_without_a_seed_nobody_waits_for_a_network(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    service = start(Drafted(too_many=1))
    for recorder in ask_network(service):
        assert len(recorder.finished().token_ids) == 32
    assert service.statistics().preemptions == 0
    assert "canvases: no memory for a draft" in caplog.text
