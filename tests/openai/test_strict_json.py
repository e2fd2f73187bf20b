"""Bodies that are not JSON, or mean more than one thing: each gets a 400 that says what it is."""

from __future__ import annotations

import json
import time

import pytest
from tests.openai.conftest import SAY, front

from dgemma_openai.errors import ApiError
from dgemma_openai.strict_json import MAX_DEPTH, loads

PATHS = {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"}
REFUSED = [
    (b"", "Expecting value at line 1, column 1"),
    (b"{", "Expecting property name enclosed in double quotes at line 1, column 2"),
    (b'{"a": 1} {', "Extra data at line 1, column 10"),
    (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "byte 7 is not UTF-8"),
    (b"[]", "it must be an object, got []"),
    (b'"a"', "it must be an object, got 'a'"),
    (b"null", "it must be an object, got None"),
    (b'{"a": NaN}', "NaN is not a number of JSON"),
    (b'{"a": -Infinity}', "-Infinity is not a number of JSON"),
    (b'{"a": 1e999}', "the number '1e999' is out of range"),
    (b'{"a": ' + b"9" * 5000 + b"}", "a whole number has thousands of digits"),
    (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
    (b'{"a": [{"b": 1, "b": 1}]}', "the key 'b' is there twice"),
    (b'{"a": "\\ud800"}', "a text has half of a character, '\\ud800'; send both surrogates"),
    (b'{"\\udfff": 1}', "a text has half of a character, '\\udfff'; send both surrogates"),
    (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "lists and objects are nested more than 64 deep"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "lists and objects are nested more than 64 deep"),
    (b'{"a":' * 100_000, "lists and objects are nested more than 64 deep"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_json_is_refused_by_name(content: bytes, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        loads(content)
    assert (raised.value.status, raised.value.code) == (400, "json_invalid")
    assert raised.value.message == f"the body is not valid JSON: {message}"


def test_an_object_has_no_more_keys_than_anybody_needs() -> None:
    with pytest.raises(ApiError, match="an object has more than 4096 keys"):
        loads(json.dumps({str(number): 1 for number in range(4097)}).encode())
    assert len(loads(json.dumps({str(number): 1 for number in range(4096)}).encode())) == 4096


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"model": "m", "messages": [{}] * 500_000}, "messages[0]"),
        ("/v1/completions", {"model": "m", "prompt": [-1] * 500_000}, "prompt[0]"),
        ("/v1/completions", {"model": "m", "prompt": "a", "stop": [1] * 500_000}, "stop[0]"),
        ("/detokenize", {"tokens": [-1] * 500_000}, "tokens[0]"),
    ],
)
async def test_a_million_errors_take_no_more_time_than_one(path: str, body: dict[str, object], param: str) -> None:
    async with front() as api:
        started = time.process_time()
        assert (await api.refusal(path, body))[:2] == (400, param)
        assert time.process_time() - started < 3, "of the processor; without a bound it is 5 to 15"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, 2.5, None, True, "\N{GRINNING FACE}", {"a": 1}], "b": {"a": -(2**63)}},
        {"a": [[]] * 1000},
    ],
)
def test_what_is_json_is_read(value: object) -> None:
    assert loads(json.dumps(value).encode()) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value


def test_as_deep_as_allowed() -> None:
    inside = MAX_DEPTH - 1
    assert loads(b'{"a": ' + b"[" * inside + b"]" * inside + b"}")


@pytest.mark.asyncio
async def test_every_route_with_a_body_reads_it_so() -> None:
    async with front() as api:
        posts = [path for path, operations in api.app.openapi()["paths"].items() if "post" in operations]
        assert set(posts) >= PATHS
        for path in posts:
            answer = await api.post(path, b'{"a": NaN}')
            assert answer.status_code == 400, path
            assert answer.json()["error"]["message"].endswith("NaN is not a number of JSON"), path


@pytest.mark.asyncio
@pytest.mark.parametrize("content", [content for content, _ in REFUSED])
@pytest.mark.parametrize("path", sorted(PATHS))
async def test_no_route_fails_of_it(path: str, content: bytes) -> None:
    async with front() as api:
        status, param, code, _ = await api.refusal(path, content)
    assert (status, param, code) == (400, None, "json_invalid")


@pytest.mark.asyncio
@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_a_page_of_another_site_cannot_send_a_body_as_a_form(media_type: str) -> None:
    async with front() as api:
        answer = await api.post("/v1/chat/completions", SAY, content_type=media_type)
        assert answer.status_code == 400
        assert "must come with the header Content-Type: application/json" in answer.json()["error"]["message"]
        assert api.triton.requests == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"]
)
async def test_json_is_known_by_its_media_type(media_type: str) -> None:
    async with front() as api:
        assert (await api.post("/v1/chat/completions", SAY, content_type=media_type)).status_code == 200
