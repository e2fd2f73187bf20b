"""The ONNX Runtime engine: commits beside steps, and contexts kept from call to call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dgemma_runtime.contract import SLIDING, EncodeRow, Float32Array, Int32Array, SequencePages
from dgemma_runtime.engines import ort_pages, ort_rows
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine
from dgemma_runtime.engines.ort_rows import encode_tokens

if TYPE_CHECKING:
    from tests.engines.ort.conftest import Make, Play


@pytest.mark.parametrize(("name", "page_size"), [("demo", 64), ("odd_a", 16), ("odd_a", 7), ("odd_b", 16)])
def test_commits_beside_steps_are_separate_calls(play: Play, make: Make, name: str, page_size: int) -> None:
    engines = [make(name, page_size) for _ in range(2)]
    casts = [play.stories(engine) for engine in engines]
    play.together(engines[0], casts[0])
    play.apart(engines[1], casts[1])
    play.assert_same(*casts)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens read from pages, of each head of each full layer's keys and values of the demo checkpoint."""
    read: list[int] = []
    gather = ort_pages._gather

    def counted(pool: Float32Array, pages: Int32Array, target: Float32Array) -> None:
        if target.shape[1]:
            read.append(target.shape[1])
        gather(pool, pages, target)

    monkeypatch.setattr(ort_pages, "_gather", counted)
    return read


TENSORS = 6  # keys and values of three full layers


def test_a_context_is_laid_out_once(play: Play, make: Make, reads: list[int]) -> None:
    """Nothing is read between chunks and between canvases, but where a row grew: at 128, 256, 512, 1024 tokens."""
    engine = make("demo", 64)
    story = play.Story(0, 1100, (2, 2, 2, 2), engine)
    story.prefill()
    assert reads == TENSORS * [128] + TENSORS * [256] + TENSORS * [512] + TENSORS * [1024]
    reads.clear()
    while not story.over:
        if story.ended:
            engine.denoise([], [story.commit()])
            story.committed()
        else:
            story.stepped(engine.denoise([story.row()]), 0)
    assert reads == TENSORS * [1100]


def test_a_restarted_canvas_finds_its_context(play: Play, make: Make, reads: list[int]) -> None:
    engine = make("demo", 64)
    story = play.Story(0, 150, (9,), engine)
    story.prefill()
    engine.denoise([story.row()])
    reads.clear()
    engine.release(0)
    engine.denoise([story.row()])
    assert reads == []


def test_prompts_in_turns_find_their_contexts(play: Play, make: Make, reads: list[int]) -> None:
    """One shares its first pages with another, which goes on."""
    engine = make("demo", 16)
    first, second = play.Story(0, 320, (1,), engine), play.Story(1, 320, (1,), engine)
    shared = np.concatenate([first.pages.full[:8], second.pages.full[8:]])
    second.pages = SequencePages(shared, np.concatenate([first.pages.sliding[:8], second.pages.sliding[8:]]))
    prompt = first.ids(0, 320)
    for start in range(0, 128, 64):
        engine.encode([EncodeRow(prompt[start : start + 64], start, first.pages)])
    for start in range(128, 256, 64):
        engine.encode([EncodeRow(prompt[start : start + 64], start, story.pages) for story in (first, second)])
    assert reads == 2 * TENSORS * [128], "rows of 256 slots, one for each"


def test_pages_that_another_sequence_has_written_are_read_again(play: Play, make: Make) -> None:
    """A new sequence gets an old one's pages, at the same positions, while the old one's rows are still there."""
    engine, other = make(), make()
    old, new, fresh = (
        play.Story(0, 110, (2, 2), engine),
        play.Story(1, 110, (2, 2), engine),
        play.Story(1, 110, (2, 2), other),
    )
    new.pages = old.pages
    play.together(engine, [old])
    play.together(engine, [new])
    play.together(other, [fresh])
    play.assert_same([new], [fresh])


def test_canvases_that_do_not_take_part_keep_their_state(play: Play, make: Make) -> None:
    """Calls for some of the slots only, as after a request was dropped."""
    engine, other = make("odd_b"), make("odd_b")
    cast, alone = play.stories(engine), play.stories(other)
    for story in cast:
        story.prefill()
    while any(not story.over for story in cast):
        for story in reversed([each for each in cast if not each.over]):
            if story.ended:
                engine.denoise([], [story.commit()])
                story.committed()
            else:
                story.stepped(engine.denoise([story.row()]), 0)
    play.apart(other, alone)
    play.assert_same(cast, alone)


def test_what_lies_behind_a_context_is_never_seen(play: Play, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are longer than their contexts, and keep what others left: here loud noise, before every call."""
    engine, other = make("odd_a"), make("odd_a")
    cast, alone = play.stories(engine), play.stories(other)
    run, shouted = OnnxRuntimeEngine._call, []

    def noisy(self: OnnxRuntimeEngine, rows: ort_rows.Rows, count: int, length: int, canvases: int) -> None:
        if self is engine:
            for row in range(count):
                for layer, pair in zip(self.spec.layers, rows.caches, strict=True):
                    held = int(rows.per_row["sliding_length" if layer.kind == SLIDING else "position"][row])
                    for cache in pair:
                        behind = cache[row, :, held:]
                        behind[:] = 100 * np.sin(np.arange(behind.size)).reshape(behind.shape)
                        shouted.append(behind.size)
        run(self, rows, count, length, canvases)

    monkeypatch.setattr(OnnxRuntimeEngine, "_call", noisy)
    play.together(engine, cast)
    play.apart(other, alone)
    play.assert_same(cast, alone)
    assert sum(shouted) > 10**6


# ---------------------------------------------------------------- sizes


def test_a_long_prompt_is_encoded_in_smaller_pieces(play: Play, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [encode_tokens(tokens) for tokens in (1, 4096, 65_536, 131_072, 262_144)] == [262_144, 8192, 512, 256, 128]
    monkeypatch.setattr(ort_rows, "_MOST_SCORES", 64 * 128)
    small, whole = make("demo", 64, chunk=512), make("demo", 64, chunk=512)
    casts = [play.Story(0, 512, (2,), small)], [play.Story(0, 512, (2,), whole)]
    play.together(small, casts[0])
    assert {key[1] for encoder in small._encoders for key in encoder.bindings} == {64}
    monkeypatch.undo()
    play.together(whole, casts[1])
    assert {key[1] for encoder in whole._encoders for key in encoder.bindings} == {512}
    play.assert_same(*casts)


def test_rows_laid_out_are_no_more_than_slots(play: Play, make: Make) -> None:
    """Prompts that came and went without a canvas do not pile up."""
    engine = make()
    cast = [play.Story(number, 40, (9, 9), engine) for number in range(4)]
    for story in cast[:3] * 2 + cast[3:]:
        story.prefill()
    assert len(engine._encoders) == 4
    for story in cast[:3]:
        engine.denoise([story.row()])
    for story in cast[3:] * 3:
        story.prefill()
    assert sum(workspace.occupied for workspace in engine._workspaces) == 3
    assert len(engine._encoders) == 1
