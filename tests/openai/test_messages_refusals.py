"""What Anthropic's messages refuse, and the names they do it by."""

from __future__ import annotations

from typing import Any

import pytest
from tests.openai.conftest import MODEL, front

pytestmark = pytest.mark.asyncio
PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "hi"}]
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": HI}
TOOL: dict[str, Any] = {
    "name": "f",
    "description": "d",
    "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"n": 2}, "n"),
        ({"betas": ["x"]}, "betas"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_k": 40}, "top_k"),
        ({"top_p": 0.9}, "top_p"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "clear_at": "never"}]}, "messages[0].clear_at"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL | {"strict": True}]}, "tools[0].strict"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config.format"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits[0]"),
        ({"diffusing": True}, "diffusing"),
        (
            {
                "messages": [*HI, {"role": "assistant", "content": "x"}],
                "tools": [TOOL],
                "tool_choice": {"type": "any"},
            },
            "tool_choice",
        ),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    async with front() as service:
        answer = await service.post(PATH, ASK | changes)
        assert not service.triton.requests
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["message"].startswith(f"{param}: ")


async def test_a_limit_is_demanded() -> None:
    async with front() as service:
        answer = await service.post(PATH, {"model": MODEL, "messages": HI})
    assert answer.json()["error"]["message"] == "max_tokens: is missing"


@pytest.mark.parametrize("field", ["max_tokens", "stream", "temperature", "metadata", "seed"])
async def test_counting_takes_no_fields_of_an_answer(field: str) -> None:
    async with front() as service:
        answer = await service.post(COUNT, {"model": MODEL, "messages": HI, field: None})
    assert answer.json()["error"]["message"] == f"{field}: is not a known parameter; leave it out"


@pytest.mark.parametrize("path", [PATH, COUNT])
async def test_another_model_is_not_here(path: str) -> None:
    async with front() as service:
        body = {"model": "claude", "messages": HI} | ({"max_tokens": 5} if path == PATH else {})
        answer = await service.post(path, body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
