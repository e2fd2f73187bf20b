"""What the engine drafts is what the torch module makes of transformers' own keys and values; steps are as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.drafter.conftest import CANVAS, PAGE, Slots

from dgemma_build.checkpoint import Checkpoint
from dgemma_build.drafter.checkpoint import DrafterCheckpoint
from dgemma_build.drafter.features import ContextEncoder, stack
from dgemma_build.drafter.network import Drafter
from dgemma_runtime.contract import (
    CommitRow,
    DraftRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    SequencePages,
)
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.errors import EngineMemoryError
from dgemma_runtime.memory_formulas import drafter_host_memory

LENGTHS = (1, 5, 16, 17, 40)  # of contexts; sliding layers see 16 tokens


def limits(slots: int = len(LENGTHS)) -> EngineLimits:
    return EngineLimits(slots, 64, PAGE, 8 * len(LENGTHS), 8 * len(LENGTHS))


@pytest.fixture
def harness(denoiser_engine: Path, drafter_engine: Path) -> Iterator[Slots]:
    engine = OnnxRuntimeEngine(denoiser_engine, limits(), 1, drafter_engine)
    yield Slots(engine, LENGTHS)
    engine.close()


@pytest.fixture
def plain(denoiser_engine: Path) -> Iterator[Slots]:
    engine = OnnxRuntimeEngine(denoiser_engine, limits(), 1)
    yield Slots(engine, LENGTHS)
    engine.close()


def reference(denoiser: Path, drafter: Path, texts: list[Int32Array]) -> tuple[Int32Array, Float32Array, Float32Array]:
    """Ids, their probabilities, and how far the second best is behind in logits; each [B, C]."""
    opened = Checkpoint(denoiser)
    checkpoint = DrafterCheckpoint(drafter, opened.config, opened.sha256())
    model = Drafter(checkpoint.config, opened.config, torch.from_numpy(opened.float32("embed_tokens.weight")))
    model.load_state_dict({name: torch.from_numpy(checkpoint.float32(name)) for name in checkpoint.names()})
    encoder = ContextEncoder(denoiser, checkpoint.config.reads, torch.float32)
    lengths = [len(text) for text in texts]
    features = stack(encoder.encode([text.tolist() for text in texts]), lengths)
    with torch.no_grad():
        last = torch.tensor([int(text[-1]) for text in texts])
        logits = model(features, torch.tensor(lengths), last)
    best = logits.topk(2, -1).values
    top = logits.softmax(-1).max(-1)
    margins = (best[..., 0] - best[..., 1]).numpy()
    return top.indices.numpy().astype(np.int32), top.values.numpy(), margins


def test_drafts_are_those_of_the_torch_module(harness: Slots, denoiser: Path, drafter: Path) -> None:
    ids, confidences, margins = reference(denoiser, drafter, harness.texts)
    found = harness.engine.draft([harness.draft_row(slot) for slot in range(len(LENGTHS))])
    assert np.abs(found.confidences - confidences).max() < 1e-4
    clear = margins > 1e-3
    assert clear.mean() > 0.9
    assert np.array_equal(found.token_ids[clear], ids[clear])
    assert len(np.unique(ids)) > CANVAS  # the contexts are told apart


def test_a_row_alone_is_drafted_as_among_others(harness: Slots) -> None:
    together = harness.engine.draft([harness.draft_row(slot) for slot in range(len(LENGTHS))])
    for slot in range(len(LENGTHS)):
        alone = harness.engine.draft([harness.draft_row(slot)])
        assert np.array_equal(alone.token_ids[0], together.token_ids[slot])
        assert np.allclose(alone.confidences[0], together.confidences[slot], atol=1e-6)


def test_rows_come_back_in_the_order_in_which_they_were_asked_for(harness: Slots) -> None:
    rows = [harness.draft_row(slot) for slot in range(len(LENGTHS))]
    forward, backward = harness.engine.draft(rows), harness.engine.draft(rows[::-1])
    assert np.array_equal(forward.token_ids, backward.token_ids[::-1])


def test_a_draft_changes_nothing_of_the_steps_after_it(harness: Slots, plain: Slots) -> None:
    slots = range(len(LENGTHS))
    harness.engine.draft([harness.draft_row(slot) for slot in slots])
    for first in (True, False, False):
        drafted, expected = harness.step(*slots, first=first), plain.step(*slots, first=first)
        assert np.array_equal(drafted.argmax_ids, expected.argmax_ids)
        assert np.array_equal(drafted.entropies, expected.entropies)


def test_a_draft_beside_canvases_at_work_changes_nothing_of_theirs(harness: Slots, plain: Slots) -> None:
    for one in (harness, plain):
        one.step(0, 2, 4)
    harness.engine.draft([harness.draft_row(slot) for slot in (1, 3)])
    drafted, expected = harness.step(0, 2, 4, first=False), plain.step(0, 2, 4, first=False)
    assert np.array_equal(drafted.argmax_ids, expected.argmax_ids)
    assert np.array_equal(drafted.entropies, expected.entropies)
    assert np.array_equal(harness.step(1, 3).argmax_ids, plain.step(1, 3).argmax_ids)


def test_the_canvas_behind_a_commit_is_drafted_from_what_was_committed(
    harness: Slots, denoiser: Path, drafter: Path
) -> None:
    canvas = harness.step(2).argmax_ids[0]
    harness.engine.denoise([], [CommitRow(2, canvas, LENGTHS[2], harness.pages[2])])
    harness.texts[2] = np.concatenate([harness.texts[2], canvas])
    found = harness.engine.draft([harness.draft_row(2)])
    ids, confidences, margins = reference(denoiser, drafter, [harness.texts[2]])
    assert np.abs(found.confidences - confidences).max() < 1e-4
    assert np.array_equal(found.token_ids[margins > 1e-3], ids[margins > 1e-3])


def test_a_draft_that_finds_no_memory_leaves_its_slots_free(
    harness: Slots, plain: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("no memory for a test")

    assert isinstance(harness.engine, OnnxRuntimeEngine)
    with monkeypatch.context() as patch:
        patch.setattr(harness.engine._drafter, "_run", fail)
        with pytest.raises(EngineMemoryError, match="lower max_batch_size"):
            harness.engine.draft([harness.draft_row(0), harness.draft_row(1)])
    assert np.array_equal(harness.step(0, 1).argmax_ids, plain.step(0, 1).argmax_ids)


def test_the_engine_names_its_drafter(harness: Slots, plain: Slots) -> None:
    assert plain.engine.drafter is None
    assert harness.engine.drafter is not None
    assert harness.engine.drafter.reads == (1, 2, 3)


def test_a_draft_behind_a_long_context_takes_what_is_planned(denoiser_engine: Path, drafter_engine: Path) -> None:
    """Attention's scores and masks, by far the most here; the session keeps them."""
    context, page = 2**18, 2**10
    pages = np.arange(context // page, dtype=np.int32)
    long = EngineLimits(1, 64, page, len(pages), len(pages))
    engine = OnnxRuntimeEngine(denoiser_engine, long, 1, drafter_engine)
    assert engine._drafter is not None
    row = DraftRow(0, context - CANVAS, SequencePages(pages, pages), 5)  # nothing was ever encoded there
    engine._begin(row)
    before = resident_bytes()
    engine._drafter.draft([row], engine._where)
    taken = resident_bytes() - before
    planned = drafter_host_memory(engine._drafter.manifest, 0, engine.spec, long, context)
    engine.close()
    assert taken > 50e6
    assert 0.9 * taken < planned < 1.5 * taken


def resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])
