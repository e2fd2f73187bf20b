"""The live canvas: what has settled, what changes, and which text it hands out."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dgemma_client import Delta, Done, Event, Prefill, Preview, Statistics
from dgemma_client.live import SETTLED_AFTER, CanvasHistory, LiveCanvas, Span, canvas_text, printable

DONE = Done("stop", Statistics(1, 2, 3, 1, 1.0, 2.0, 0.0, 0.1, 0.5))


def test_everything_is_new_at_first_and_ages_where_it_stays() -> None:
    history = CanvasHistory()
    assert history.update("12_4") == [Span("12_4", 0)]
    assert history.update("1234") == [Span("12", 1), Span("3", 0), Span("4", 1)]
    assert history.update("1234") == [Span("12", 2), Span("3", 1), Span("4", 2)]


def test_text_that_moves_stays_settled() -> None:
    history = CanvasHistory()
    history.update("alpha beta")
    assert history.update("new alpha beta") == [Span("new ", 0), Span("alpha beta", 1)]


def test_a_change_starts_again_at_zero() -> None:
    history = CanvasHistory()
    for _ in range(4):
        history.update("7")
    assert history.update("8") == [Span("8", 0)]


@given(st.lists(st.text("ab1 \n", max_size=30), min_size=1, max_size=5))
def test_the_spans_are_the_text(texts: list[str]) -> None:
    history = CanvasHistory()
    for step, text in enumerate(texts):
        spans = history.update(text)
        assert "".join(span.text for span in spans) == text
        assert all(0 <= span.age <= step for span in spans)


def test_ages_look_different() -> None:
    text = canvas_text([Span("a", 0), Span("b", 1), Span("c", SETTLED_AFTER), Span("d", SETTLED_AFTER + 5)])
    styles = [str(span.style) for span in text.spans]
    assert len(set(styles[:3])) == 3
    assert styles[2] == styles[3]


def test_control_characters_do_not_reach_the_terminal() -> None:
    shown = printable("a\x1b[2Jb\r\x9b\x7f\n\tc")
    assert shown == "a␛[2Jb␍\ufffd␡\n\tc"
    assert "\x1b" not in canvas_text([Span("\x1b[2J", 0)]).plain


def play(events: list[Event], width: int = 60) -> tuple[str, str]:
    """The terminal's bytes and the text handed out."""
    screen, written = io.StringIO(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=24, color_system="standard")
    with LiveCanvas(console, written.write) as view:
        for event in events:
            view.show(event)
            time.sleep(0.03)  # longer than one frame
    return screen.getvalue(), written.getvalue()


def test_the_text_is_handed_out_once_and_whole() -> None:
    events: list[Event] = [
        Preview("xx", 0, 1),
        Delta("one\ntwo ", (1, 2, 3)),
        Preview("three?", 1, 1),
        Delta("three", (4,)),
        DONE,
    ]
    screen, written = play(events)
    assert written == "one\ntwo three"
    assert "canvas 2, step 1" in screen
    assert "three?" in screen
    assert "3 tokens" in screen


def test_a_long_prompt_has_a_bar_until_its_canvas() -> None:
    screen, written = play(
        [Prefill(12_288, 65_536), Prefill(65_536, 65_536), Preview("ab", 0, 1), Delta("ab", (1,)), DONE]
    )
    assert "reading the prompt 12,288 / 65,536" in screen
    assert "reading the prompt 65,536 / 65,536" in screen
    assert "canvas 1, step 1" in screen.partition("65,536 / 65,536")[2]
    assert "━" in screen
    assert written == "ab"


def test_what_is_written_stays_while_a_preempted_request_is_read_again() -> None:
    screen, written = play([Delta("some words", (1, 2)), Prefill(100, 200), Preview("more", 1, 1), DONE])
    shown = screen.partition("reading the prompt 100 / 200")[0]
    assert shown.rpartition("some words")[2].count("\n") <= 2, "it stands above the bar"
    assert written == "some words"


def test_text_is_handed_out_when_the_stream_fails() -> None:
    written = io.StringIO()
    console = Console(file=io.StringIO(), force_terminal=True)

    def fail() -> None:
        with LiveCanvas(console, written.write) as view:
            view.show(Delta("half", (1,)))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert written.getvalue() == "half"


def test_a_canvas_taller_than_the_terminal_is_cut() -> None:
    screen, _ = play([Preview("line\n" * 100, 0, 1)])
    assert 0 < screen.count("line") < 60
