"""Text before a suffix: the search for the hole's length, the canvas that runs it, what comes out, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.contract import DenoiseRow, Float32Array, Int32Array, SequencePages
from dgemma_runtime.drafting.hole import MOST_LENGTHS, Hole, HoleCanvas, HoleText, search
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


Seen = tuple[Int32Array, Float32Array]  # argmax ids, entropies


def found(most: int, denoise: Callable[[int, int], Seen]) -> tuple[int, list[tuple[int, int]]]:
    """The length that is taken, and (length, passes) of all that was asked for."""
    asked: list[tuple[int, int]] = []
    looking = search(SUFFIX, most)
    try:
        asked.append(next(looking))
        while True:
            asked.append(looking.send(denoise(*asked[-1])))
    except StopIteration as stop:
        return stop.value, asked


# ---------------------------------------------------------------- the search


def test_it_goes_where_the_denoiser_has_the_suffix_and_looks_beside_it() -> None:
    length, asked = found(20, lambda length, passes: (text_with_suffix_at(7), SURE))
    assert asked == [(10, 1), (7, 1), (6, 1), (8, 1)]
    assert length == 7


@pytest.mark.parametrize("most", [1, 2, 3, 5, 29])
@pytest.mark.parametrize("agrees", [False, True])
def test_a_denoiser_that_takes_all_or_nothing_ends_it_too(most: int, agrees: bool) -> None:
    def denoise(length: int, passes: int) -> Seen:
        return text_with_suffix_at(length) if agrees else np.zeros(LENGTH, np.int32), SURE

    length, asked = found(most, denoise)
    assert all(1 <= length <= most for length, _ in asked)
    assert len(set(asked)) == len(asked)
    assert sum(passes for _, passes in asked) <= 4 * MOST_LENGTHS
    assert length in {length for length, _ in asked}


def test_no_denoiser_is_asked_more_than_a_few_dozen_times() -> None:
    random = np.random.default_rng(4)
    for _ in range(500):
        favour, slope = random.random(), random.normal()

        def denoise(length: int, passes: int, favour: float = favour, slope: float = slope) -> Seen:
            ids = random.integers(699, 704, LENGTH).astype(np.int32)
            if random.random() < favour:
                ids[length : length + len(SUFFIX)] = SUFFIX
            return ids, SURE + np.float32(abs(slope * length))

        most = int(random.integers(1, LENGTH - len(SUFFIX) + 1))
        length, asked = found(most, denoise)
        assert 1 <= length <= most
        assert sum(passes for _, passes in asked) <= 4 * MOST_LENGTHS


def test_of_lengths_that_fit_alike_the_surest_after_two_passes_is_taken() -> None:
    def denoise(length: int, passes: int) -> Seen:
        entropy = abs(length - 12) if passes == 2 else length
        return text_with_suffix_at(length), SURE + np.float32(entropy)

    length, asked = found(20, denoise)
    assert length == 12
    assert asked[:4] == [(10, 1), (9, 1), (9, 2), (11, 1)]


def test_what_disagrees_more_gets_no_second_pass() -> None:
    def denoise(length: int, passes: int) -> Seen:
        return text_with_suffix_at(length) if length > 7 else np.zeros(LENGTH, np.int32), SURE + np.float32(length)

    length, asked = found(16, denoise)
    assert length == 8
    assert (7, 2) not in asked


def test_few_disagreements_count_more_than_certainty() -> None:
    def denoise(length: int, passes: int) -> Seen:
        return text_with_suffix_at(2), SURE if length == 1 else SURE + 1

    assert found(2, denoise)[0] == 2


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


def test_a_second_pass_goes_on_from_the_first() -> None:
    """The denoiser takes the suffix wherever it is, so two passes decide; the noise is sure of 3."""
    ours, rows = hole(most=4), []
    canvas = canvas_of(ours)
    pages = SequencePages(np.zeros(1, np.int32), np.zeros(1, np.int32))
    for _ in range(40):
        rows.append((ours.tokens, canvas.row(0, 9, pages).first_step))
        ids = text_with_suffix_at(ours.tokens)
        if canvas.advance(ids, ids, SURE + np.float32(0 if ours.tokens == 3 else 1)):
            break
    assert ours.tokens == 3
    assert rows[:6] == [(2, True), (1, True), (1, False), (3, True), (3, False), (2, True)]


@pytest.mark.parametrize("most", [1, 4])
def test_one_step_a_canvas_is_enough(most: int) -> None:
    ours = hole(most=most)
    canvas = HoleCanvas(replace(DEFAULTS, max_denoising_steps=1), CanvasNoise(3, 0, LENGTH, 1000), ours)
    denoiser = Denoiser(1)
    assert np.array_equal(denoiser.run(canvas), text_with_suffix_at(1))
    assert ours.tokens == 1
    assert all(row.first_step for row in denoiser.rows)


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
    assert recorder.commits[0].steps < statistics.denoising_steps <= recorder.commits[0].steps + 4 * MOST_LENGTHS


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
