"""What a stream tells of unfinished canvases."""

from __future__ import annotations

import pytest

from dgemma_client import Prefill, Preview
from dgemma_openai.diffusing import diffusing


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            '<|channel>thought\nhm<channel|>Hi<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><turn|>',
            "thought\nhmHicall:f{a:x}",
        ),
        ("one<|image|>, and <pad> is what fills a batch", "one, and <pad> is what fills a batch"),
        ("<b>bold</b> <img src=x> a<b|c>d <em>", "<b>bold</b> <img src=x> a<b|c>d <em>"),
    ],
)
def test_a_preview_loses_the_models_markers_and_nothing_else(text: str, shown: str) -> None:
    told = diffusing(2, Preview(text, canvas_index=1, step=3))

    assert told == {"index": 2, "canvas_index": 1, "step": 3, "text": shown}


def test_a_prompt_that_is_read_is_told_in_tokens() -> None:
    assert diffusing(0, Prefill(64, 200)) == {"index": 0, "prefilled_tokens": 64, "prompt_tokens": 200}
