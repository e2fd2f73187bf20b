"""Arguments to JSON text: the values are right, the text is certain at every moment, schemas decide what is open."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_openai.parsing.arguments import ArgumentReader
from dgemma_openai.parsing.markers import MARKERS
from dgemma_openai.parsing.schema import Schema, bare_value

texts = st.text(max_size=20).filter(lambda text: not any(marker in text for marker in MARKERS))
keys = st.text(alphabet="abcXYZ_-019 \u00e9", min_size=1, max_size=8).map(str.strip).filter(bool)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(keys, values, max_size=4)


def gemma(value: object) -> str:
    """As Gemma's chat template writes it."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    return str(value)


def read(text: str, schema: object = None) -> Any:
    reader = ArgumentReader(Schema.of(schema))
    found = reader.feed(text)
    assert reader.state == "complete", reader.state
    return json.loads(found)


@given(objects)
@settings(max_examples=300)
def test_gemmas_syntax_means_what_was_written(value: dict[str, Any]) -> None:
    assert read(gemma(value)) == value


@given(objects, st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=300)
def test_json_means_what_was_written(value: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if not any(marker in text for marker in MARKERS):
        assert read(text) == value


@given(objects, st.booleans())
@settings(max_examples=200)
def test_what_is_told_early_never_changes(value: dict[str, Any], as_json: bool) -> None:
    text = json.dumps(value) if as_json else gemma(value)
    whole = ArgumentReader(Schema()).feed(text)
    reader = ArgumentReader(Schema())
    found = ""
    for piece in re.findall(r'<\|"\|>|.', text, re.DOTALL):
        found += reader.feed(piece)
        assert whole.startswith(found)
    assert found == whole


@pytest.mark.parametrize(
    ("text", "told", "rest"),
    [
        ("{a:1,b", '{"a": 1', ",b"),
        ("{a:tru", '{"a": ', "tru"),
        ('{"a": "x\\', '{"a": "x', "\\"),
        ('{a:[<|"|>x', '{"a": ["x', ""),
    ],
)
def test_what_is_not_certain_waits(text: str, told: str, rest: str) -> None:
    reader = ArgumentReader(Schema())

    assert reader.feed(text) == told
    assert reader.state == "open"
    assert reader.rest == rest


@pytest.mark.parametrize("text", ["{a}", "{a:}", "{:1}", "{,}", "{a:1]", "{a:[1}", "{a:1{", '{a:"x"y}', '{"\\x":1}'])
def test_what_is_no_object_is_malformed(text: str) -> None:
    reader = ArgumentReader(Schema())
    reader.feed(text)

    assert reader.state == "malformed"


def test_escapes_in_a_key_spell_no_marker() -> None:
    found = ArgumentReader(Schema()).feed('{"\\u003c|turn>": 1}')

    assert json.loads(found) == {"<|turn>": 1}
    assert "<|turn>" not in found


def test_depth_has_a_limit() -> None:
    reader = ArgumentReader(Schema())
    reader.feed("{a:" + "[" * 100_000)

    assert reader.state == "malformed"


SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "number": {"type": "integer"},
        "either": {"type": ["string", "number"]},
        "optional": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "nullable": {"type": "STRING", "nullable": True},
        "choice": {"enum": ["1", "2", None]},
        "fixed": {"const": "true"},
        "list": {"type": "array", "items": {"type": "string"}},
        "place": {"$ref": "#/$defs/Place"},
        "lost": {"$ref": "#/$defs/Nowhere"},
        "loop": {"$ref": "#/properties/loop"},
    },
    "additionalProperties": {"type": "string"},
    "$defs": {"Place": {"allOf": [{"properties": {"zip": {"type": "string"}}}]}},
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{text:12}", {"text": "12"}),
        ("{text:null}", {"text": "null"}),
        ("{text:Not quoted at 12:30}", {"text": "Not quoted at 12:30"}),
        ("{number:12}", {"number": 12}),
        ("{number:null}", {"number": None}),
        ("{either:12}", {"either": 12}),
        ("{either:true}", {"either": "true"}),
        ("{optional:None}", {"optional": None}),
        ("{nullable:null}", {"nullable": None}),
        ("{choice:1}", {"choice": "1"}),
        ("{choice:null}", {"choice": None}),
        ("{fixed:true}", {"fixed": "true"}),
        ("{list:[1,true]}", {"list": ["1", "true"]}),
        ("{place:{zip:02134,n:1}}", {"place": {"zip": "02134", "n": 1}}),
        ("{lost:1}", {"lost": 1}),
        ("{loop:1}", {"loop": 1}),
        ("{other:1}", {"other": "1"}),
        ('{number:<|"|>12<|"|>}', {"number": "12"}),
    ],
)
def test_a_schema_decides_what_bare_words_are(text: str, value: dict[str, Any]) -> None:
    assert read(text, SCHEMA) == value


@pytest.mark.parametrize("schema", [None, {}, [], {"properties": 3}, {"properties": {"a": True}}, {"anyOf": {}}])
def test_an_odd_schema_says_nothing(schema: object) -> None:
    assert read("{a:1}", schema) == {"a": 1}


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("TRUE", "true"),
        ("nil", "null"),
        ("-0.5e+3", "-0.5e+3"),
        ("+5", "5"),
        (".5", "0.5"),
        ("5.", "5.0"),
        ("007", '"007"'),
        ("+1e999", '"+1e999"'),
        ("inf", '"inf"'),
        ("1_000", '"1_000"'),
        ("\u0663", '"\u0663"'),
        ("a\\b", '"a\\\\b"'),
    ],
)
def test_bare_words_without_a_schema(word: str, text: str) -> None:
    assert bare_value(word, frozenset()) == text
