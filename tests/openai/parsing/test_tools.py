"""Tools and the choice among them, in the forms of three APIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.tools import ToolPlan, chat_tools, messages_tools, responses_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "strict": False}},
]
FLAT = [{"type": "function", **tool["function"]} for tool in CHAT]  # type: ignore[dict-item]
ANTHROPIC = [
    {"name": "weather", "description": "Of a city.", "input_schema": SCHEMA},
    {"name": "now", "type": "custom"},
]
DECLARED = (
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": ""}},
)
SCHEMAS = {"weather": SCHEMA, "now": None}
PREFIX = "<|tool_call>call:"


@pytest.mark.parametrize(
    "plan", [chat_tools(CHAT, None, None), responses_tools(FLAT, None, None), messages_tools(ANTHROPIC, None)]
)
def test_all_apis_declare_the_same(plan: ToolPlan) -> None:
    assert plan == ToolPlan(DECLARED, SCHEMAS)


@pytest.mark.parametrize("plan", [chat_tools(None, None, None), chat_tools([], "auto", True), messages_tools([], None)])
def test_no_tools_no_plan(plan: ToolPlan) -> None:
    assert plan == ToolPlan()


@pytest.mark.parametrize(
    "plan",
    [
        chat_tools(CHAT, "none", None),
        responses_tools(FLAT, "none", None),
        messages_tools(ANTHROPIC, {"type": "none"}),
        chat_tools(None, "none", False),
    ],
)
def test_none_declares_nothing(plan: ToolPlan) -> None:
    assert plan == ToolPlan()


@pytest.mark.parametrize(
    "plan",
    [
        chat_tools(CHAT, "required", None),
        responses_tools(FLAT, "required", None),
        messages_tools(ANTHROPIC, {"type": "any"}),
    ],
)
def test_required_opens_a_call(plan: ToolPlan) -> None:
    assert plan == ToolPlan(DECLARED, SCHEMAS, PREFIX)


@pytest.mark.parametrize(
    "plan",
    [
        chat_tools(CHAT, {"type": "function", "function": {"name": "now"}}, None),
        responses_tools(FLAT, {"type": "function", "name": "now"}, True),
        messages_tools(ANTHROPIC, {"type": "tool", "name": "now"}),
    ],
)
def test_a_named_function_opens_its_call_and_one_is_enough(plan: ToolPlan) -> None:
    assert plan == ToolPlan(DECLARED, SCHEMAS, PREFIX + "now{", parallel=False)


def test_required_with_one_tool_names_it() -> None:
    assert chat_tools(CHAT[:1], "required", None).prefix == PREFIX + "weather{"


def test_parallel_calls_can_be_off() -> None:
    assert not chat_tools(CHAT, None, False).parallel
    assert not messages_tools(ANTHROPIC, {"type": "auto", "disable_parallel_tool_use": True}).parallel


def function(**fields: Any) -> list[Mapping[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "param", "words"),
    [
        (None, "required", None, "tool_choice", "there are no tools"),
        (CHAT, "any", None, "tool_choice", "'any' is not supported; use auto or none or required"),
        (CHAT, 3, None, "tool_choice", "3 is not supported"),
        (CHAT, {"type": "function", "function": {"name": "x"}}, None, "tool_choice.function.name", "weather, now"),
        (CHAT, {"type": "function"}, None, "tool_choice.function", "must be an object, got null"),
        (CHAT, {"type": "allowed_tools"}, None, "tool_choice.type", "'allowed_tools' is not supported"),
        (CHAT, None, "no", "parallel_tool_calls", "true or false"),
        ("f", None, None, "tools", "must be a list, got a string"),
        (["f"], None, None, "tools[0]", "must be an object"),
        ([{"type": "custom"}], None, None, "tools[0].type", "'custom' is not supported; use function"),
        (function(strict=True), None, None, "tools[0].function.strict", "is not supported"),
        (function(name="a b"), None, None, "tools[0].function.name", "'a b' cannot be"),
        (function(name=None), None, None, "tools[0].function.name", "'' cannot be"),
        (function(name=7), None, None, "tools[0].function.name", "must be a string, got a number"),
        (function(parameters=[]), None, None, "tools[0].function.parameters", "must be an object, got a list"),
        (function() * 2, None, None, "tools[1]", "another function 'f'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    tools: object, choice: object, parallel: object, param: str, words: str
) -> None:
    with pytest.raises(Unsupported) as refusal:
        chat_tools(tools, choice, parallel)

    assert refusal.value.param == param
    assert words in refusal.value.message
    assert str(refusal.value) == f"{param}: {refusal.value.message}"


def test_other_apis_name_their_own_fields() -> None:
    with pytest.raises(Unsupported, match=r"tools\[0\]\.type: 'web_search' is not supported; use function"):
        responses_tools([{"type": "web_search"}], None, None)
    with pytest.raises(Unsupported, match=r"tool_choice\.name: 'x' is none of the tools"):
        responses_tools(FLAT, {"type": "function", "name": "x"}, None)
    with pytest.raises(Unsupported, match=r"tools\[0\]\.type: 'bash_20250124' is not supported"):
        messages_tools([{"type": "bash_20250124", "name": "bash"}], None)
    with pytest.raises(Unsupported, match=r"tools\[0\]\.input_schema: must be an object"):
        messages_tools([{"name": "f", "input_schema": "x"}], None)
    with pytest.raises(Unsupported, match=r"tool_choice\.type: 'required' is not supported"):
        messages_tools(ANTHROPIC, {"type": "required"})
    with pytest.raises(Unsupported, match=r"tool_choice: must be an object"):
        messages_tools(ANTHROPIC, "auto")
