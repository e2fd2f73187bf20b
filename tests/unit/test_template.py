"""Templates: what is refused, what is pinned, and that the output is exactly literals and holes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.drafting.proposal import lay_out
from dgemma_runtime.drafting.request_drafts import RequestDrafts
from dgemma_runtime.drafting.template import Template, TemplateText, lay_out_template, parse_template
from dgemma_runtime.engines.scripted import ChaoticEngine, scripted_manifest
from dgemma_runtime.errors import InvalidRequest
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import default_parameters, parse_parameters
from dgemma_runtime.requests import GenerationRequest
from dgemma_runtime.service import Service
from dgemma_runtime.settings import plan_limits
from dgemma_runtime.testing import (
    EOS,
    TURN_END,
    Recorder,
    scripted_engine,
    small_settings,
    tiny_codec,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from tests.unit.conftest import Start

CODEC = tiny_codec()


def ids(text: str) -> list[int]:
    found: list[int] = CODEC.encode_part(text, "text").tolist()
    return found


def fill(service: Service, template: Template, **values: Any) -> Recorder:
    recorder = Recorder()
    parameters = parse_parameters(values, service.defaults)
    service.submit(GenerationRequest("go", parameters, template=template), recorder)
    return recorder


# ---------------------------------------------------------------- from JSON


def test_texts_and_numbers_in_order() -> None:
    assert parse_template('["a: ", 4, "\\n", 2, 1]') == ("a: ", 4, "\n", 2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: ___", "is not valid JSON"),
        ("[1", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": 1}', "must be a JSON list of literal texts and of holes, .*got {'a': 1}"),
        ("3", "must be a JSON list .*got 3"),
        ('["a", 1.5]', ".*item 2 is 1.5"),
        ('["a", null, 1]', ".*item 2 is None"),
        ("[true]", ".*item 1 is True"),
        ('["a", 0]', "item 2 is a hole of 0 tokens; a hole has at least one"),
        ('[-3, "a"]', "item 1 is a hole of -3 tokens"),
        ('["", 3]', "item 1 is an empty text; leave it out"),
        ('["a", "b"]', "has no hole, so there is nothing to generate"),
        ("[]", "has no hole"),
    ],
)
def test_what_is_no_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^template: {message}"):
        parse_template(text)


# ---------------------------------------------------------------- laid out


def test_literals_are_pinned_each_as_it_is_by_itself() -> None:
    pins = lay_out_template(("t", 2, "he", "st", 1), CODEC, 100, skip_special_tokens=True)
    assert ids("the") != ids("t") + ids("he")
    assert pins.token_ids.tolist() == [*ids("t"), 0, 0, *ids("he"), *ids("st"), 0]
    assert pins.pinned.tolist() == [True, False, False, True, True, True, False]


def test_a_template_fits_or_is_refused_with_the_numbers() -> None:
    assert len(lay_out_template(("ab", 3), CODEC, 5, skip_special_tokens=True).pinned) == 5
    with pytest.raises(InvalidRequest, match=r"^template: has 6 tokens, .* the output may have 5"):
        lay_out_template(("ab", 4), CODEC, 5, skip_special_tokens=True)
    with pytest.raises(InvalidRequest, match=r"^template: has 1" + "0" * 30 + " tokens"):
        lay_out_template((10**30,), CODEC, 5, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("literal", "message"),
    [
        ("a<turn|>", "item 2 contains the special token '<turn|>', which has no text; with skip_special_tokens false"),
        ("a▁b", "item 2 is 'a▁b', which this model's tokens spell 'a b'"),
        ("\ud800", "is not valid Unicode"),
    ],
)
def test_a_literal_that_would_not_be_in_the_output_is_refused(literal: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message.replace("|", r"\|")):
        lay_out_template((1, literal), CODEC, 100, skip_special_tokens=True)


def test_a_special_token_may_be_a_literal_where_it_has_a_text() -> None:
    pins = lay_out_template(("<turn|>", 1), CODEC, 100, skip_special_tokens=False)
    assert pins.token_ids.tolist() == [TURN_END, 0]


# ---------------------------------------------------------------- its text


def text_of(template: Template, canvas: list[int], skip_special_tokens: bool = True) -> tuple[str, str | None, int]:
    pins = lay_out_template(template, CODEC, 100, skip_special_tokens)
    output = TemplateText(CODEC, pins, (EOS,), skip_special_tokens)
    emitted = output.commit(np.array(canvas, np.int32))
    return emitted.text, emitted.reason, len(emitted.token_ids)


def test_it_ends_where_it_is_full() -> None:
    assert text_of(("a=", 2), [*ids("a=xyz")]) == ("a=xy", "stop", 4)
    assert text_of((9, "a"), [*ids("xy")]) == ("xy", None, 2)


@pytest.mark.parametrize("skip", [True, False])
def test_no_token_in_a_hole_ends_it_and_ends_have_no_text(skip: bool) -> None:
    assert text_of(("a=", 3, ";"), [*ids("a=x"), EOS, EOS, *ids(";")], skip) == ("a=x;", "stop", 6)


def test_half_a_character_does_not_run_into_the_literal() -> None:
    lead, rest = (next(id_ for id_, byte in CODEC.bytes.items() if byte == bytes([value])) for value in (0xC3, 0xA9))
    literal = ids("é")
    assert literal == [lead, rest]
    assert text_of((1, "é", 1, "é"), [lead, *literal, rest, *literal])[0] == "\ufffdé\ufffdé"
    assert text_of((2, "é"), [*literal, *literal])[0] == "éé"


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("values", [{}, {"max_tokens": 21}, {"max_tokens": 200}])
def test_over_several_canvases(start: Start, values: dict[str, Any]) -> None:
    service = start(scripted_engine({"go": "0123456789ABCDEFGHIJKLMNOP"}))
    template = ("A-", 3, "---", 7, "!!", 3, "Z")
    recorder = fill(service, template, stream=True, stream_previews=True, **values)
    finished = recorder.finished()
    assert finished.text == "A-234---89ABCDE!!HIJZ"
    assert finished.token_ids.tolist() == ids(finished.text)
    assert (finished.reason, finished.stop_reason) == ("stop", None)
    assert (finished.statistics.num_output_tokens, finished.statistics.canvases) == (21, 3)
    assert all(preview.text.startswith("A-") for preview in recorder.previews if preview.canvas_index == 0)


def test_a_template_that_ends_with_a_canvas(start: Start) -> None:
    finished = fill(start(scripted_engine({"go": "abcdefghijkl"})), (2, "XXXXXX")).finished()
    assert (finished.text, finished.statistics.canvases) == ("abXXXXXX", 1)


def test_pinned_positions_never_differ_whatever_the_denoiser_says(start: Start) -> None:
    manifest = scripted_manifest(tiny_tokenizer().get_vocab_size(), 8, sliding_window=13, max_model_len=256)
    service = start(ChaoticEngine(manifest, plan_limits(manifest, small_settings())))
    template: Template = ("ab", 3, "the stop", 11, "er", 2)
    pins = lay_out_template(template, CODEC, 100, skip_special_tokens=True)
    for seed in range(5):
        found = fill(service, template, seed=seed).finished().token_ids
        assert len(found) == len(pins.pinned)
        assert np.array_equal(found[pins.pinned], pins.token_ids[pins.pinned])


def test_a_canvas_in_a_hole_is_one_of_a_template() -> None:
    """Nothing is pinned there, but an end token ends nothing, and nobody reads what is behind the template."""
    drafts = RequestDrafts(literals=lay_out_template(("ab", 12), CODEC, 100, True))
    assert drafts.pins(0, 8) is not None
    pins = drafts.pins(1, 8)
    assert pins is not None
    assert (pins.pinned.sum(), pins.read) == (0, 6)
    assert RequestDrafts().pins(0, 8) is None


def test_a_draft_in_a_hole_must_be_right_behind_an_end_token_too() -> None:
    drafts = RequestDrafts(literals=lay_out_template(("ab", 22), CODEC, 100, True))
    draft = np.array([40, EOS, 41, 41, 41, 41, 41, 41], np.int32)
    defaults = default_parameters({"eos_token_id": EOS})
    noise = CanvasNoise(1, 1, 8, tiny_tokenizer().get_vocab_size())
    proposal = lay_out(draft, np.ones(8, np.float32), 8, "model")
    sure, other = np.zeros(8, np.float32), np.where(np.arange(8) < 2, draft, 50).astype(np.int32)
    assert Canvas(defaults, noise, proposal, drafts.pins(1, 8)).advance(draft, draft, sure)
    assert not Canvas(defaults, noise, proposal, drafts.pins(1, 8)).advance(other, other, sure)


def test_what_a_template_excludes_is_refused(start: Start) -> None:
    service = start(scripted_engine({"go": "x"}))
    with pytest.raises(InvalidRequest, match=r"^template: has 9 tokens, .* the output may have 8"):
        fill(service, ("ab", 7), max_tokens=8)
    with pytest.raises(InvalidRequest, match=r"^template: has 300 tokens, .* the output may have 253"):
        fill(service, (300,))
    with pytest.raises(InvalidRequest, match=r"^stop: cannot be together with template"):
        fill(service, ("ab", 7), stop=["x"])
    with pytest.raises(InvalidRequest, match=r"^template: is of no use where max_tokens 0 asks for no output"):
        fill(service, ("ab", 7), max_tokens=0)


def test_a_template_survives_its_json() -> None:
    template = ("ä\n", 3, '"')
    assert parse_template(json.dumps(template)) == template
