"""Text before a suffix: the search for the hole's length, the canvas that runs it, what comes out, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.contract import DenoiseRow, Float32Array, Int32Array, SequencePages
from dgemma_runtime.drafting.hole import MOST_PASSES, Hole, HoleCanvas, HoleText, LengthSearch
from dgemma_runtime.errors import EngineError, InvalidRequest
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import default_parameters, parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.testing import EOS, Recorder, gated, scripted_engine, small_settings, submit, tiny_codec

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()
LENGTH = 32
SUFFIX: Int32Array = np.array([700, 701, 702], np.int32)
DEFAULTS = default_parameters({"eos_token_id": EOS})
SURE: Float32Array = np.zeros(LENGTH, np.float32)


def text_with_suffix_at(place: int) -> Int32Array:
    ids: Int32Array = np.arange(10, 10 + LENGTH, dtype=np.int32)
    ids[place : place + len(SUFFIX)] = SUFFIX
    return ids


def agree(search: LengthSearch, entropy: float) -> None:
    """A pass in which the denoiser takes the suffix where it is pinned."""
    search.judge(text_with_suffix_at(search.length), SURE + np.float32(entropy))


# ---------------------------------------------------------------- the search


def test_it_goes_where_the_denoiser_has_the_suffix_and_looks_beside_it() -> None:
    search, tried = LengthSearch(SUFFIX, 20), []
    while not search.done:
        tried.append(search.length)
        search.judge(text_with_suffix_at(7), SURE)
    assert tried == [10, 7, 6, 8]
    assert search.length == 7


@pytest.mark.parametrize("most", [1, 2, 3, 5, 29])
def test_a_denoiser_that_never_agrees_ends_it_too(most: int) -> None:
    search, passes, tried = LengthSearch(SUFFIX, most), 0, set()
    while not search.done:
        assert 1 <= search.length <= most
        assert search.length not in tried
        tried.add(search.length)
        search.judge(np.zeros(LENGTH, np.int32), SURE)
        passes += 1
    assert passes == len(tried) <= MOST_PASSES
    assert search.length in tried


def test_of_lengths_that_fit_alike_the_surest_is_taken() -> None:
    search = LengthSearch(SUFFIX, 20)
    while not search.done:
        agree(search, abs(search.length - 12))
    assert search.length == 12


def test_few_disagreements_count_more_than_certainty() -> None:
    search = LengthSearch(SUFFIX, 2)
    assert search.length == 1
    search.judge(np.zeros(LENGTH, np.int32), SURE)
    assert search.length == 2
    agree(search, 1)
    assert (search.done, search.length) == (True, 2)


# ---------------------------------------------------------------- the canvas


class Denoiser:
    """Would have the suffix behind `place` tokens; certain from the second step of a canvas on."""

    def __init__(self, place: int) -> None:
        self.rows: list[DenoiseRow] = []
        self.place = place

    def run(self, canvas: HoleCanvas, most: int = 50) -> Int32Array:
        pages = SequencePages(np.zeros(1, np.int32), np.zeros(1, np.int32))
        for _ in range(most):
            self.rows.append(canvas.row(0, 9, pages))
            ids = text_with_suffix_at(self.place)
            if canvas.advance(ids, ids, SURE):
                return canvas.argmax_ids
        raise AssertionError("the canvas never ended")


def hole(most: int = 20) -> Hole:
    return Hole(SUFFIX, most)


def canvas_of(hole: Hole, seed: int = 3) -> HoleCanvas:
    return HoleCanvas(DEFAULTS, CanvasNoise(seed, 0, LENGTH, 1000), hole)


def test_the_canvas_ends_with_the_suffix_where_the_denoiser_has_it() -> None:
    ours, denoiser = hole(), Denoiser(7)
    ended = denoiser.run(canvas := canvas_of(ours))
    assert np.array_equal(ended, text_with_suffix_at(7))
    assert ours.tokens == 7
    assert canvas.step == 2  # without those of the search


def test_every_try_is_a_first_step_from_the_same_noise_with_the_suffix_pinned() -> None:
    denoiser = Denoiser(7)
    denoiser.run(canvas_of(hole()))
    noise = CanvasNoise(3, 0, LENGTH, 1000).initial()
    *tries, last = denoiser.rows
    for row, tokens in zip(tries, [10, 7, 6, 8, 7], strict=True):
        assert row.first_step
        expected = noise.copy()
        expected[tokens : tokens + 3] = SUFFIX
        assert row.canvas_ids.tolist() == expected.tolist()
    assert not last.first_step


def test_a_search_that_ends_with_the_best_length_goes_on_from_there() -> None:
    ours, denoiser = hole(most=1), Denoiser(1)
    denoiser.run(canvas_of(ours))
    assert [row.first_step for row in denoiser.rows] == [True, False]


def test_numbers_that_are_none_end_it_in_the_search_too() -> None:
    canvas = canvas_of(hole())
    with pytest.raises(EngineError, match="not finite in step 1"):
        canvas.advance(text_with_suffix_at(7), text_with_suffix_at(7), SURE * np.nan)


@pytest.mark.parametrize(
    ("suffix", "max_tokens", "pinned", "most"), [(3, 10, 3, 10), (3, 100, 3, 29), (16, 100, 16, 16), (90, 4, 16, 4)]
)
def test_hole_and_suffix_share_a_canvas(suffix: int, max_tokens: int, pinned: int, most: int) -> None:
    ours = Hole.of(np.arange(suffix, dtype=np.int32), max_tokens, LENGTH)
    assert (ours.suffix_ids.tolist(), ours.most_tokens) == (list(range(pinned)), most)


# ---------------------------------------------------------------- its text


@pytest.mark.parametrize(
    ("canvas", "stop", "text", "tokens", "stop_reason"),
    [
        ("abcd", (), "abc", 3, None),
        ("abcd", ("b",), "a", 2, "b"),
        ("abcd", ("cd",), "abc", 3, None),
        ("a<eos>cd", (), "a", 2, EOS),
    ],
)
def test_the_text_is_what_the_hole_holds(
    canvas: str, stop: tuple[str, ...], text: str, tokens: int, stop_reason: str | int | None
) -> None:
    output = HoleText(CODEC, Hole(SUFFIX, 20, 3), (EOS,), stop, skip_special_tokens=True)
    ids = CODEC.encode_part(canvas, "text")
    assert output.preview(ids) == text
    emitted = output.commit(ids)
    assert (emitted.text, emitted.reason, len(emitted.token_ids)) == (text, "stop", tokens)
    assert emitted.stop_reason == stop_reason


# ---------------------------------------------------------------- requests


def fill(service: Service, suffix: str, *, sink: Recorder | None = None, **values: Any) -> Recorder:
    recorder = sink or Recorder()
    parameters = parse_parameters(values, service.defaults)
    service.submit(GenerationRequest("go", parameters, suffix=suffix), recorder)
    return recorder


@pytest.mark.parametrize("values", [{}, {"stream": True, "stream_previews": True}, {"drafter": "off"}])
def test_a_request_with_a_suffix(start: Start, values: dict[str, Any]) -> None:
    service = start(scripted_engine({"go": "abcdXYZ.and so on"}, canvas_length=16))
    recorder = fill(service, "XYZ.", **values)
    finished = recorder.finished()
    assert (finished.text, finished.reason, finished.stop_reason) == ("abcd", "stop", None)
    statistics = finished.statistics
    assert (statistics.hole_tokens, statistics.suffix_tokens, statistics.num_output_tokens) == (4, 4, 4)
    assert statistics.canvases == 1
    assert recorder.commits[0].steps < statistics.denoising_steps <= recorder.commits[0].steps + MOST_PASSES


def test_beside_others_and_with_a_seed_it_is_the_same(start: Start) -> None:
    service = start(scripted_engine({"go": "abcdXYZ.and", "on": "the quick brown fox stops"}, canvas_length=16))
    alone = fill(service, "XYZ.", seed=5).finished()
    others = [submit(service, "on", seed=seed) for seed in range(3)]
    beside = fill(service, "XYZ.", seed=5).finished()
    assert beside.token_ids.tolist() == alone.token_ids.tolist()
    assert beside.statistics.denoising_steps == alone.statistics.denoising_steps
    assert {other.finished().text for other in others} == {"the quick brown fox stops"}


def test_it_may_be_cancelled_in_the_search(start: Start) -> None:
    engine = gated({"go": "abcdXYZ.and"}, canvas_length=16)
    service = start(engine, small_settings(max_batch_size=1))
    recorder = Recorder()
    request = GenerationRequest("go", service.defaults, "mine", suffix="XYZ.")
    service.submit(request, recorder)
    assert engine.entered.acquire(timeout=20)
    service.cancel("mine")
    engine.permits.release()
    assert recorder.finished().reason == "cancelled"


def test_what_a_suffix_excludes_is_refused(start: Start) -> None:
    service = start(scripted_engine({"go": "x"}))
    with pytest.raises(InvalidRequest, match=r"^suffix: is empty; leave it out"):
        fill(service, "")
    with pytest.raises(InvalidRequest, match=r"^suffix: cannot be together with drafter 'lookup'"):
        fill(service, "a", drafter="lookup")
    with pytest.raises(InvalidRequest, match=r"^suffix: is of no use where max_tokens 0"):
        fill(service, "a", max_tokens=0)
    with pytest.raises(InvalidRequest, match=r"^suffix: is not valid Unicode"):
        fill(service, "\ud800")
