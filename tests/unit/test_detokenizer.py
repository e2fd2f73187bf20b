"""Text out of canvases: whole characters, end tokens, stop strings, exact lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.detokenizer import Emitted, OutputText
from dgemma_runtime.testing import BOS, EOS, PAD, TURN_END, UNK, tiny_codec, tiny_tokenizer

CODEC = tiny_codec()
VOCABULARY = tiny_tokenizer().get_vocab_size()


def ids(*parts: str | int) -> Int32Array:
    """Token ids of texts and single ids."""
    found: list[int] = []
    for part in parts:
        found += [part] if isinstance(part, int) else CODEC.encode(part).tolist()[1:]
    return np.array(found, np.int32)


def commit_all(output: OutputText, tokens: Int32Array, length: int) -> list[Emitted]:
    """Commit canvas by canvas until the output ends; the last canvas is padded."""
    emitted = []
    for start in range(0, len(tokens), length):
        part = tokens[start : start + length]
        emitted.append(output.commit(np.concatenate([part, np.full(length - len(part), PAD, np.int32)])))
        if emitted[-1].reason:
            break
    return emitted


def test_plain_text_comes_canvas_by_canvas() -> None:
    tokens = ids("hello other world")
    output = OutputText(CODEC, max_tokens=len(tokens))
    emitted = commit_all(output, tokens, 4)
    assert output.text == "hello other world"
    assert [len(part.token_ids) for part in emitted[:-1]] == [4] * (len(emitted) - 1)
    assert [part.reason for part in emitted] == [None] * (len(emitted) - 1) + ["length"]
    assert emitted[0].text == "hell"
    assert output.token_ids.tolist() == tokens.tolist()


def test_special_tokens_have_no_text() -> None:
    output = OutputText(CODEC, 100)
    assert output.commit(ids("a", BOS, TURN_END, "b", PAD)).text == "ab"


@pytest.mark.parametrize("position", range(4))
def test_the_end_token_cuts_inside_the_canvas(position: int) -> None:
    canvas = np.array([*ids("wxyz")], np.int32)
    canvas[position] = EOS
    output = OutputText(CODEC, 100, end_ids=(EOS, TURN_END))
    emitted = output.commit(canvas)
    assert emitted.reason == "stop"
    assert emitted.text == "wxyz"[:position]
    assert emitted.token_ids.tolist() == canvas[: position + 1].tolist()


def test_any_of_several_end_tokens_ends_the_output() -> None:
    emitted = OutputText(CODEC, 100, end_ids=(EOS, TURN_END)).commit(ids("ab", TURN_END, EOS))
    assert (emitted.text, len(emitted.token_ids)) == ("ab", 3)


def test_an_ordinary_end_token_is_not_in_the_text() -> None:
    (letter,) = ids("x").tolist()
    assert OutputText(CODEC, 100, end_ids=(letter,)).commit(ids("abxc")).text == "ab"


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 5, 8, 9])
def test_max_tokens_is_exact(max_tokens: int) -> None:
    output = OutputText(CODEC, max_tokens)
    emitted = commit_all(output, ids("abcdefghijkl"), 4)
    assert output.text == "abcdefghijkl"[:max_tokens]
    assert len(output.token_ids) == max_tokens
    assert emitted[-1].reason == "length"
    assert len(emitted) == -(-max_tokens // 4)


def test_an_end_token_as_the_last_allowed_one_is_a_stop() -> None:
    output = OutputText(CODEC, 3, end_ids=(EOS,))
    assert output.commit(ids("ab", EOS, "c")).reason == "stop"
    output = OutputText(CODEC, 2, end_ids=(EOS,))
    assert output.commit(ids("ab", EOS, "c")).reason == "length"


@pytest.mark.parametrize("text", ["你好", "a€b", "👍🏽!", "naïve ü", "𝄞", "x\n\ny"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 64])
def test_no_half_character_is_ever_sent(text: str, length: int) -> None:
    tokens = ids(text)
    output = OutputText(CODEC, len(tokens))
    emitted = commit_all(output, tokens, length)
    assert output.text == text
    so_far = ""
    for part in emitted:
        so_far += part.text
        assert "\N{REPLACEMENT CHARACTER}" not in part.text
        assert text.startswith(so_far)


def test_bytes_that_are_no_character_become_the_replacement_character() -> None:
    euro = ids("€").tolist()
    assert OutputText(CODEC, 100).commit(ids("a", euro[0], euro[1], "b")).text == "a\N{REPLACEMENT CHARACTER}b"
    valid_then_not = ids("€", euro[0], "b")
    assert OutputText(CODEC, 100).commit(valid_then_not).text == "€\N{REPLACEMENT CHARACTER}b"


def test_a_character_cut_short_by_the_end_is_left_out() -> None:
    output = OutputText(CODEC, 3)
    emitted = output.commit(ids("a€"))
    assert (emitted.text, emitted.reason, len(emitted.token_ids)) == ("a", "length", 3)


def test_a_stop_string_cuts_text_and_tokens() -> None:
    output = OutputText(CODEC, 100, stop=("STOP",))
    emitted = output.commit(ids("one STOP two"))
    assert (emitted.text, emitted.reason) == ("one ", "stop")
    assert emitted.token_ids.tolist() == ids("one STOP").tolist()


def test_a_stop_string_inside_a_token_takes_the_whole_token() -> None:
    assert len(ids("the")) == 1
    emitted = OutputText(CODEC, 100, stop=("h",)).commit(ids("a the"))
    assert emitted.text == "a t"
    assert emitted.token_ids.tolist() == ids("a the").tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_a_stop_string_across_canvases_is_never_sent(length: int) -> None:
    output = OutputText(CODEC, 100, stop=("wxyz",))
    emitted = commit_all(output, ids("ab wx wxy wxyz c"), length)
    assert output.text == "ab wx wxy "
    assert emitted[-1].reason == "stop"
    assert output.token_ids.tolist() == ids("ab wx wxy wxyz").tolist()


def test_text_that_could_be_a_stop_string_is_held_back_and_then_sent() -> None:
    output = OutputText(CODEC, 100, stop=("xyz",))
    assert output.commit(ids("abxy")).text == "ab"
    assert output.commit(ids("abxy")).text == "xyab"
    assert output.commit(ids("abzz")).text == "xyabzz"


def test_held_text_is_sent_at_the_end() -> None:
    output = OutputText(CODEC, 4, stop=("xyz",))
    assert output.commit(ids("abxy")).text == "abxy"
    output = OutputText(CODEC, 100, end_ids=(EOS,), stop=("xyz",))
    assert output.commit(ids("abxy")).text == "ab"
    assert output.commit(ids(EOS, "zzz")).text == "xy"


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert OutputText(CODEC, 100, stop=("cd", "bcde")).commit(ids("abcdef")).text == "ab"
    assert OutputText(CODEC, 100, stop=("d", "bcd")).commit(ids("abcdef")).text == "a"


def test_an_end_token_before_the_stop_string_counts_first() -> None:
    emitted = OutputText(CODEC, 100, end_ids=(EOS,), stop=("c",)).commit(ids("ab", EOS, "c"))
    assert (emitted.text, len(emitted.token_ids)) == ("ab", 3)


def test_a_stop_string_beyond_max_tokens_does_not_count() -> None:
    emitted = OutputText(CODEC, 3, stop=("d",)).commit(ids("abcd"))
    assert (emitted.text, emitted.reason) == ("abc", "length")


def test_a_special_token_can_be_a_stop_string() -> None:
    emitted = OutputText(CODEC, 100, stop=("<turn|>",)).commit(ids("ab", TURN_END, "c"))
    assert (emitted.text, emitted.reason, len(emitted.token_ids)) == ("ab", "stop", 3)


@pytest.mark.parametrize("skip", [True, False])
def test_padding_and_its_like_never_have_a_text(skip: bool) -> None:
    codec = Codec(tiny_tokenizer(), "<bos>", silent=("<pad>", "<unk>"))
    emitted = OutputText(codec, 100, skip_special_tokens=skip).commit(ids("a", PAD, UNK, TURN_END, "b"))
    assert emitted.text == ("ab" if skip else "a<turn|>b")
    assert len(emitted.token_ids) == 5


def test_special_tokens_have_their_text_where_they_are_not_skipped() -> None:
    output = OutputText(CODEC, 100, end_ids=(EOS,), skip_special_tokens=False)
    canvas = ids("a", BOS, TURN_END, "b", EOS, "c")
    assert output.preview(canvas) == "a<bos><turn|>b"
    emitted = output.commit(canvas)
    assert (emitted.text, emitted.reason) == ("a<bos><turn|>b", "stop"), "the end token that ended it is left out"


def test_with_their_text_they_can_be_part_of_a_stop_string() -> None:
    canvas = ids("ab", TURN_END, "cd", EOS)
    for skip, text, reason in ((False, "a", "stop"), (True, "abcd", None)):
        output = OutputText(CODEC, 100, stop=("b<turn|>c",), skip_special_tokens=skip)
        emitted = output.commit(canvas)
        assert (emitted.text, emitted.reason) == (text, reason)
    parts = OutputText(CODEC, 100, stop=("b<turn|>c",), skip_special_tokens=False)
    assert [parts.commit(ids(part)).text for part in ("ab", TURN_END, "x")] == ["a", "", "b<turn|>x"]


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_stops_as_a_token_whether_it_has_text_or_not(skip: bool) -> None:
    emitted = OutputText(CODEC, 100, stop=("<turn|>",), skip_special_tokens=skip).commit(ids("ab", TURN_END, "c"))
    assert (emitted.text, emitted.reason, len(emitted.token_ids)) == ("ab", "stop", 3)


@pytest.mark.parametrize(
    ("canvas", "options", "reason"),
    [
        (ids("ab", EOS, "c"), {"end_ids": (EOS, TURN_END)}, EOS),
        (ids("ab", TURN_END, EOS), {"end_ids": (EOS, TURN_END)}, TURN_END),
        (ids("ab", TURN_END), {"end_ids": (TURN_END,), "stop": ("<turn|>",)}, "<turn|>"),
        (ids("abcd", EOS), {"end_ids": (EOS,), "stop": ("d", "bc")}, "bc"),
        (ids("abcd"), {"stop": ("abcd", "cd")}, "abcd"),
        (ids("ab", EOS, "cd"), {"end_ids": (EOS,), "stop": ("cd",)}, EOS),
        (ids("abcd", EOS), {"max_tokens": 2, "end_ids": (EOS,), "stop": ("c",)}, None),
        (ids("abcd"), {"stop": ("x",)}, None),
    ],
)
def test_what_ended_the_output_is_told(canvas: Int32Array, options: dict[str, Any], reason: str | int | None) -> None:
    output = OutputText(CODEC, **{"max_tokens": 100, **options})
    assert output.commit(canvas).stop_reason == output.stop_reason == reason
    assert type(output.stop_reason) is type(reason)


def test_a_preview_changes_nothing() -> None:
    output = OutputText(CODEC, 100, end_ids=(EOS,), stop=("xyz",))
    euro = ids("€").tolist()
    assert output.commit(ids("abxy")).text == "ab"
    assert output.preview(ids("zqqq")) == ""
    assert output.preview(ids("q", EOS, "rs")) == "xyq"
    assert output.preview(ids("qq", euro[0])) == "xyqq", "half a character is not shown"
    assert output.commit(ids("qqqq")).text == "xyqqqq"


tokens_strategy = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)
byte_heavy = st.lists(
    st.one_of(st.integers(6, 261), st.sampled_from(ids("abthe 你€").tolist())), min_size=1, max_size=60
)


@given(
    tokens=st.one_of(tokens_strategy, byte_heavy),
    length=st.integers(1, 20),
    stop=st.lists(st.text("abthe 你", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 70),
    skip=st.booleans(),
)
def test_where_canvases_end_makes_no_difference(
    tokens: list[int], length: int, stop: list[str], max_tokens: int, skip: bool
) -> None:
    array = np.array(tokens, np.int32)
    whole = OutputText(CODEC, max_tokens, (EOS,), tuple(stop), skip)
    parts = OutputText(CODEC, max_tokens, (EOS,), tuple(stop), skip)
    padded = np.concatenate([array, np.full(-len(array) % length, EOS, np.int32), np.full(length, EOS, np.int32)])
    last = whole.commit(padded)
    emitted = commit_all(parts, padded, length)
    assert (emitted[-1].reason, emitted[-1].stop_reason) == (last.reason, last.stop_reason)
    assert parts.text == whole.text == "".join(part.text for part in emitted)
    assert parts.token_ids.tolist() == whole.token_ids.tolist()
    assert len(parts.token_ids) <= max_tokens
    assert not any(text in parts.text for text in stop)


@given(st.text(max_size=30), st.integers(1, 9))
def test_any_text_comes_back(text: str, length: int) -> None:
    tokens = ids(text)
    if len(tokens):
        output = OutputText(CODEC, len(tokens))
        commit_all(output, tokens, length)
        kept = text
        for special in ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"):
            kept = kept.replace(special, "")
        assert output.text == kept.replace("▁", " ")


texts_and_markers = st.lists(st.one_of(st.text("ab the你€👍 \n", max_size=6), st.sampled_from([BOS, PAD, TURN_END])))


@given(texts_and_markers, st.integers(1, 9), st.booleans())
def test_the_text_is_the_tokenizer_s_own(parts: list[str | int], length: int, skip: bool) -> None:
    tokens = ids(*parts)
    if len(tokens):
        output = OutputText(CODEC, len(tokens), end_ids=(EOS,), skip_special_tokens=skip)
        commit_all(output, tokens, length)
        decoded = tiny_tokenizer().decode(tokens.tolist(), skip_special_tokens=skip)
        assert output.text == decoded == CODEC.decode(tokens, skip)
