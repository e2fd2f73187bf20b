"""Turns to events: whatever the cut, nothing leaks, nothing is lost, nothing waits longer than it must."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_openai.parsing.calls import STREAM_AFTER
from dgemma_openai.parsing.events import (
    Call,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Turn,
    collect,
)
from dgemma_openai.parsing.markers import MARKERS, Splitter
from dgemma_openai.parsing.output import OutputParser, call_id, opened_by, parse

TOOLS = {"f": {}, "g": {"properties": {"name": {"type": "string"}}}}
CALL = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
FRAGMENTS = (
    *sorted(MARKERS),
    *("<|tool_call>call:f{", "}<tool_call|>", "<|tool_call>call:nope{", "<|channel>thought\n", "<|channel>final\n"),
    *("<", "|", ">", '"', "<|chan", "nel>", "<|tu", "rn>", "<turn", '<|"', "|>"),
    *(" ", "\n", "a", "b:1", ",", "{", "}", "[", "]", "call:", "f", "thought\n", "\\", "\\u00e9", "x" * 600),
)
turns = st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)


def parser(*, primed: str = "", parallel: bool = True) -> OutputParser:
    numbers = itertools.count()
    return OutputParser(tools=TOOLS, primed=primed, parallel=parallel, new_id=lambda: f"call_{next(numbers)}")


def turn(pieces: list[str], *, cut: bool = False, parallel: bool = True) -> tuple[Turn, bool, int]:
    reader = parser(parallel=parallel)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return collect([*events, *reader.finish(cut=cut)]), reader.done, reader.calls


# ---------------------------------------------------------------- whatever comes


@given(turns, st.lists(st.integers(0, 400), max_size=6), st.booleans(), st.booleans())
@settings(max_examples=400)
def test_where_the_text_is_cut_makes_no_difference(text: str, cuts: list[int], cut: bool, parallel: bool) -> None:
    places = [0, *sorted(min(place, len(text)) for place in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]

    whole = turn([text], cut=cut, parallel=parallel)

    assert turn(pieces, cut=cut, parallel=parallel) == whole
    assert turn(list(text), cut=cut, parallel=parallel) == whole


@given(turns, st.booleans())
@settings(max_examples=400)
def test_no_marker_comes_out_and_whole_calls_are_objects(text: str, cut: bool) -> None:
    found, _, complete = turn([text], cut=cut)

    for shown in (found.reasoning, found.content, *(call.arguments for call in found.calls)):
        assert not any(marker in shown for marker in MARKERS)
    assert all(isinstance(json.loads(call.arguments), dict) for call in found.calls if call.complete)
    assert complete == sum(call.complete for call in found.calls)


@given(st.text(alphabet='<|>cturnhael_" \na', max_size=60))
@settings(max_examples=400)
def test_text_without_markers_is_the_answer_as_it_is(text: str) -> None:
    text = re.sub("|".join(map(re.escape, MARKERS)), "", text)
    if not any(marker in text for marker in MARKERS):
        assert parse(text, tools=TOOLS) == Turn("", text, ())


@given(turns)
@settings(max_examples=200)
def test_events_of_a_call_are_in_order_and_begin_json(text: str) -> None:
    reader = parser()
    events = [event for char in text for event in reader.feed(char)] + reader.finish(cut=True)
    of_calls = [event for event in events if not isinstance(event, ReasoningDelta | ContentDelta)]

    for index, group in itertools.groupby(of_calls, key=lambda event: event.index):
        first, *middle, last = group
        assert isinstance(first, ToolCallStart)
        assert first.id == f"call_{index}"
        assert all(isinstance(event, ToolCallArguments) for event in middle)
        assert isinstance(last, ToolCallEnd)


# ---------------------------------------------------------------- when it comes


def fed(reader: OutputParser, *pieces: str) -> list[list[Event]]:
    return [reader.feed(piece) for piece in pieces]


def test_a_smaller_sign_waits_for_one_character() -> None:
    assert fed(parser(), "a <", "b", " < c", "<|", "|") == [
        [ContentDelta("a")],
        [ContentDelta(" <b")],
        [ContentDelta(" < c")],
        [],
        [ContentDelta("<||")],
    ]


def test_text_that_looked_like_a_marker_is_sent_in_the_end() -> None:
    reader = parser()

    assert reader.feed("so <|channe") == [ContentDelta("so")]
    assert reader.finish(cut=False) == [ContentDelta(" <|channe")]


def test_thinking_and_text_are_sent_as_they_come() -> None:
    assert fed(parser(), "<|channel>thou", "ght\nHm", ", so\n", "<channel|>\n", "4", "2") == [
        [],
        [ReasoningDelta("Hm")],
        [ReasoningDelta(", so")],
        [],
        [ContentDelta("4")],
        [ContentDelta("2")],
    ]


def test_one_piece_gives_one_event_of_a_kind() -> None:
    text = f"<|channel>thought\nA<|channel>thought\nB<channel|>x <|think|>y{CALL}"

    assert parser().feed(text) == [
        ReasoningDelta("A\n\nB"),
        ContentDelta("x y"),
        ToolCallStart(0, "call_0", "f"),
        ToolCallArguments(0, '{"a": "x"}'),
        ToolCallEnd(0, True),
    ]


def test_a_call_is_told_of_when_its_arguments_are_whole() -> None:
    told = fed(parser(), '<|tool_call>call:f{a:<|"|>', 'x<|"|>', "}", "<tool_call|>")

    assert [len(events) for events in told] == [0, 0, 3, 0]


def test_long_arguments_are_sent_as_they_come() -> None:
    reader = parser()
    body = "0123456789" * STREAM_AFTER

    assert reader.feed('<|tool_call>call:f{a:<|"|>') == []
    assert reader.feed(body[:100]) == []
    assert reader.feed(body[100:]) == [ToolCallStart(0, "call_0", "f"), ToolCallArguments(0, f'{{"a": "{body}')]
    assert reader.feed('"<') == [ToolCallArguments(0, '\\"')]
    assert reader.feed('|"|>}') == [ToolCallArguments(0, '"}'), ToolCallEnd(0, True)]
    assert reader.calls == 1


def test_a_long_call_that_turns_out_malformed_ends_there() -> None:
    body = "x" * STREAM_AFTER
    text = f'<|tool_call>call:f{{a:<|"|>{body}<|"|>oops<tool_call|> and on'

    assert parse(text, tools=TOOLS).content == "oops and on"
    assert [(call.arguments, call.complete) for call in parse(text, tools=TOOLS).calls] == [(f'{{"a": "{body}"', False)]


def test_a_header_without_an_end_is_content_before_the_turn_is_over() -> None:
    assert parser().feed("<|tool_call>" + "word " * 100) == [ContentDelta("word " * 99 + "word")]


# ---------------------------------------------------------------- when it is over


@pytest.mark.parametrize("end", ["<turn|>", "<|tool_response>", "<|turn>"])
def test_nothing_is_read_behind_the_turns_end(end: str) -> None:
    reader = parser()

    assert reader.feed(f"a {end}b") == [ContentDelta("a")]
    assert reader.done
    assert reader.feed("c") == []
    assert reader.finish(cut=False) == [ContentDelta(" ")]


def test_one_call_is_enough_where_calls_are_not_parallel() -> None:
    reader = parser(parallel=False)

    told = [(len(reader.feed(piece)), reader.done) for piece in ("<|tool_call>call:f{", "}")]

    assert told == [(0, False), (3, True)]
    assert reader.feed(CALL) == reader.finish(cut=False) == []


@pytest.mark.parametrize(
    ("cut", "calls", "content"),
    [(True, (Call("call_0", "f", '{"a": "x', False),), ""), (False, (), 'call:f{a:"x')],
)
def test_an_open_call_is_told_of_only_when_the_limit_cut_it(cut: bool, calls: tuple[Call, ...], content: str) -> None:
    found, _, complete = turn(['<|tool_call>call:f{a:<|"|>x'], cut=cut)

    assert found == Turn("", content, calls)
    assert complete == 0


# ---------------------------------------------------------------- how it begins


def test_a_prompt_that_opens_a_call_primes_the_parser() -> None:
    reader = parser(primed="<|tool_call>call:g{")

    assert collect([*reader.feed("name:7}<tool_call|>"), *reader.finish(cut=False)]) == Turn(
        "", "", (Call("call_0", "g", '{"name": "7"}', True),)
    )


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|turn>user\n<|channel>x<turn|>\n<|turn>model\n", ""),
        ("<|turn>model\n<|channel>thought\n<channel|>", ""),
        ("<|turn>model\n<|tool_call>call:f{}<tool_call|><|tool_response>r<tool_response|><|channel>thought\n", "open"),
        ("<|turn>model\n<|channel>thought\n", "open"),
        ("raw text", ""),
    ],
)
def test_a_prompt_says_whether_it_opens_a_thought(prompt: str, opened: str) -> None:
    assert opened_by(prompt) == ("<|channel>thought\n" if opened else "")


def test_a_primed_thought_is_thinking_and_is_not_repeated() -> None:
    assert parse("Hm.<channel|>4", primed="<|channel>thought\n") == Turn("Hm.", "4", ())


def test_ids_are_drawn() -> None:
    ids = {call.id for call in parse(CALL * 3, tools=TOOLS).calls} | {call_id()}

    assert len(ids) == 4
    assert all(re.fullmatch("call_[0-9a-f]{24}", name) for name in ids)


# ---------------------------------------------------------------- the splitter by itself


@given(turns, st.integers(1, 7))
@settings(max_examples=200)
def test_pieces_are_markers_and_text_between_them(text: str, size: int) -> None:
    splitter = Splitter()
    pieces = [piece for start in range(0, len(text), size) for piece in splitter.feed(text[start : start + size])]
    pieces.append(splitter.finish())

    assert "".join(pieces) == text
    assert all(piece in MARKERS or not any(marker in piece for marker in MARKERS) for piece in pieces)
