"""Errors of the client and of validation as statuses, types, fields and codes."""

from __future__ import annotations

from typing import Any

import pytest

from dgemma_client.errors import (
    Cancelled,
    ClientError,
    ConnectError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ServerError,
)
from dgemma_openai.errors import ApiError, dotted, from_client, from_unsupported, from_validation, invalid, shown
from dgemma_openai.parsing.errors import Unsupported

TOO_LONG = "text_input: 9 tokens and max_tokens 9 are more than the maximum context length of 10"


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (InvalidRequest("seed: must be at least 0"), 400, "invalid_request_error", "seed", None),
        (InvalidRequest("nothing is named"), 400, "invalid_request_error", None, None),
        (InvalidRequest(TOO_LONG), 400, "invalid_request_error", "prompt", "context_length_exceeded"),
        (Overloaded("the queue is full"), 503, "overloaded_error", None, "overloaded"),
        (ConnectError("nobody at 127.0.0.1:8001"), 503, "overloaded_error", None, "overloaded"),
        (Cancelled("ended"), 503, "overloaded_error", None, "overloaded"),
        (DeadlineExceeded("no end after 3 s"), 504, "timeout_error", None, "timeout"),
        (ServerError("the engine failed"), 500, "server_error", None, "engine_error"),
    ],
)
def test_an_error_of_the_server_becomes_a_status(
    error: ClientError, status: int, kind: str, param: str | None, code: str | None
) -> None:
    found = from_client(error, {"text_input": "prompt"})
    assert (found.status, found.type, found.param, found.code) == (status, kind, param, code)


def test_a_field_has_the_name_that_the_client_knows() -> None:
    assert from_client(InvalidRequest(TOO_LONG), {"text_input": "prompt"}).message.startswith("prompt: 9 tokens")


def test_an_address_inside_is_not_told() -> None:
    assert "8001" not in from_client(ConnectError("nobody at 127.0.0.1:8001"), {}).message


@pytest.mark.parametrize(
    ("message", "seconds"),
    [("full; try again in 2.3 s", "3"), ("full; try again in about 0.2 s", "1"), ("full", "1")],
)
def test_who_is_told_to_come_back_is_told_when(message: str, seconds: str) -> None:
    assert from_client(Overloaded(message), {}).headers == {"Retry-After": seconds}


def test_both_shapes_of_a_body() -> None:
    error = invalid("n", "is 0", "too_few")
    assert error.body() == {
        "error": {"message": "n: is 0", "type": "invalid_request_error", "param": "n", "code": "too_few"}
    }
    assert error.anthropic_body() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "n: is 0"},
    }
    assert ApiError(500, "x").anthropic_body()["error"]["type"] == "api_error"


def test_what_a_message_has_that_is_not_supported_is_named() -> None:
    error = from_unsupported(Unsupported("messages[0].content", "messages[0].content: an image"))
    assert (error.status, error.param) == (400, "messages[0].content")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (["messages", 0, "user", "content", "str"], "messages[0].content"),
        (["messages", 0, "user", "content", "list[TextPart]", 1, "text"], "messages[0].content[1].text"),
        (["tools", 2, "function", "name"], "tools[2].function.name"),
        (["prompt", "list[constrained-int]", 3], "prompt[3]"),
        (["stop", "list[str]", 0], "stop[0]"),
        ([], "body"),
    ],
)
def test_a_place_is_named_as_the_client_wrote_it(path: list[int | str], text: str) -> None:
    assert dotted(path) == text


def wrong(kind: str, *path: int | str, message: str = "Wrong", given: Any = 1) -> dict[str, Any]:
    return {"type": kind, "loc": ("body", *path), "msg": message, "input": given}


@pytest.mark.parametrize(
    ("error", "message", "param", "code"),
    [
        (wrong("missing", "model"), "model: is missing", "model", "missing_required_parameter"),
        (wrong("extra_forbidden", "foo"), "foo: is not a known parameter; leave it out", "foo", "unknown_parameter"),
        (wrong("extra_forbidden", "Foo"), "Foo: is not a known parameter; leave it out", "Foo", "unknown_parameter"),
        (
            wrong("extra_forbidden", "messages", 0, "user", "x"),
            "messages[0].x: is not a known parameter; leave it out",
            "messages[0].x",
            "unknown_parameter",
        ),
        (
            wrong("not_supported", "top_p", message="is not supported", given=0.5),
            "top_p: is not supported, got 0.5",
            "top_p",
            "unsupported_parameter",
        ),
        (wrong("int_type", "n", given="1"), "n: wrong, got '1'", "n", None),
    ],
)
def test_a_validation_error_names_field_and_value(
    error: dict[str, Any], message: str, param: str, code: str | None
) -> None:
    found = from_validation([error])
    assert (found.status, found.message, found.param, found.code) == (400, message, param, code)


def test_an_unknown_name_is_told_before_anything_else() -> None:
    found = from_validation([wrong("missing", "messages"), wrong("extra_forbidden", "foo")])
    assert found.param == "foo"


def test_names_and_values_of_any_length_make_short_messages() -> None:
    found = from_validation([wrong("extra_forbidden", "x" * 10_000)])
    assert len(found.message) < 200
    assert len(found.param or "") <= 80
    assert len(shown("x" * 10_000)) == 80
