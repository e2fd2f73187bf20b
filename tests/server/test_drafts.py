"""What a client knows of the output, over a real Triton server: each input once, each refusal once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dgemma_runtime.testing import tiny_codec

if TYPE_CHECKING:
    from tests.server.conftest import Caller

LONG_ANSWER = "one canvas here, and another one; then the end"


def ids(text: str) -> list[int]:
    found: list[int] = tiny_codec().encode_part(text, "text").tolist()
    return found


def part(start: int, end: int) -> str:
    """Of the long answer, by tokens."""
    return tiny_codec().decode(np.array(ids(LONG_ANSWER)[start:end], np.int32))


@pytest.mark.parametrize("draft", [{"draft_text": LONG_ANSWER}, {"draft_ids": ids(LONG_ANSWER)}], ids=["text", "ids"])
def test_a_draft_is_counted_and_changes_no_text(caller: Caller, draft: dict[str, Any]) -> None:
    answer = caller.infer(text_input="long", **draft)
    assert (answer.error, answer.text, answer.last["finish_reason"]) == (None, LONG_ANSWER, "stop")
    (counted,) = json.loads(answer.last["statistics"])["drafts"]
    assert counted["drafter"] == "client"
    assert counted["drafted_tokens"] == counted["accepted_tokens"] > 0


def test_a_template_is_filled(caller: Caller) -> None:
    template = json.dumps(["<<", 8, ">> and ", 13, "."])
    answer = caller.infer(text_input="long", template=template)
    assert answer.text == f"<<{part(2, 10)}>> and {part(17, 30)}."
    assert answer.last["finish_reason"] == "stop"
    status, text = caller.post("generate", {"text_input": "long", "template": template})
    assert (status, json.loads(text)["text_output"]) == (200, answer.text)


def test_a_hole_before_a_suffix_gets_its_length(caller: Caller) -> None:
    answer = caller.infer(text_input="long", suffix="here,")
    statistics = json.loads(answer.last["statistics"])
    assert statistics["hole_tokens"] == len(answer.output_ids) > 0
    assert statistics["suffix_tokens"] == len(ids("here,"))
    assert (answer.text, answer.last["finish_reason"]) == (part(0, len(answer.output_ids)), "stop")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"draft_text": "a", "draft_ids": [7]}, "draft_ids: cannot be together with draft_text"),
        ({"draft_text": ""}, "draft_text: is empty"),
        ({"draft_text": "abc", "max_tokens": 2}, "draft_text: has 3 tokens, the output may have 2"),
        ({"draft_ids": [9999]}, "draft_ids: token ids must be from 0 to"),
        ({"draft_text": "a", "drafter": "off"}, "draft_text: excludes drafter 'off'"),
        ({"template": "[1", "suffix": "a"}, "suffix: cannot be together with template"),
        ({"template": "[1"}, "template: is not valid JSON"),
        ({"template": '["a", 0]'}, "template: item 2 is a hole of 0 tokens"),
        ({"template": "[99999]"}, "template: has 99999 tokens, literals and holes, the output may have"),
        ({"template": '["a"]'}, "template: has no hole"),
        ({"template": '["a<turn|>", 1]'}, "template: item 1 contains the special token '<turn|>'"),
        ({"template": "[3]", "stop_words": ["x"]}, "stop: cannot be together with template"),
        ({"suffix": ""}, "suffix: is empty"),
        ({"suffix": "a", "drafter": "lookup"}, "suffix: cannot be together with drafter 'lookup'"),
        ({"suffix": "a", "max_tokens": 0}, "suffix: is of no use where max_tokens 0 asks for no output"),
    ],
)
def test_what_cannot_be_is_refused_by_name(caller: Caller, given: dict[str, Any], message: str) -> None:
    answer = caller.infer(text_input="long", **given)
    assert answer.error is not None
    assert message in answer.error
