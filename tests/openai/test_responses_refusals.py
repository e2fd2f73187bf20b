"""What OpenAI's responses refuse, and the names they do it by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.openai.conftest import MODEL, front

from dgemma_client.errors import InvalidRequest
from dgemma_client.requests import InferRequest

pytestmark = pytest.mark.asyncio
PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": MODEL, "input": "hi"}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"n": 2}, "n"),
        ({"stop": "x"}, "stop"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "bot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "phase": "commentary"}]}, "input[0].phase"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"tools": [{"type": "web_search", "filters": {}}]}, "tools[0]"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0]"),
        ({"tools": [TOOL | {"strict": True}]}, "tools[0].strict"),
        ({"tools": [TOOL, TOOL]}, "tools[1]"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"diffusing": True}, "diffusing"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    async with front() as service:
        status, found, _, message = await service.refusal(PATH, ASK | changes)
        assert not service.triton.requests
    assert (status, found) == (400, param)
    assert message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("field", "param"),
    [("messages", "input"), ("max_tokens", "max_output_tokens"), ("entropy_bound", "entropy_bound")],
)
async def test_the_servers_refusals_have_this_apis_names(field: str, param: str) -> None:
    def refusing(_: InferRequest) -> Iterator[Any]:
        yield InvalidRequest(f"{field}: is too much")

    async with front(refusing) as service:
        refused = await service.refusal(PATH, ASK | {"stream": True})
    assert refused == (400, param, None, f"{param}: is too much")


async def test_another_model_is_not_here() -> None:
    async with front() as service:
        assert (await service.refusal(PATH, ASK | {"model": "gpt"}))[:3] == (404, "model", "model_not_found")
