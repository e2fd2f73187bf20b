"""Messages of three APIs to messages for the chat template: the same conversation, and refusals by path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.history import chat_history
from dgemma_openai.parsing.history_messages import messages_history
from dgemma_openai.parsing.history_responses import responses_history
from dgemma_openai.parsing.output import parse
from dgemma_runtime.chat import ChatTemplate

DEMO = Path(__file__).resolve().parents[3] / "build/checkpoints/demo"
ARGUMENTS = {"city": "Paris", "days": [1, 2]}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?\nIn Paris."},
    {"role": "assistant", "content": "Let me look."},
    {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "Sunny"},
    {"role": "user", "content": "Thanks"},
]


def test_chat_completions() -> None:
    text = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "text", "text": "In Paris."}]},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": text, "index": 0}],
            "refusal": None,
            "audio": None,
            "function_call": None,
            "annotations": [],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Sunny"}]},
        {"role": "user", "content": "Thanks", "name": "Ada"},
    ]
    assert chat_history(messages) == HISTORY


def test_anthropics_messages() -> None:
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "Sunny"}]}
    text = {"type": "text", "text": "Let me look.", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "text", "text": "In Paris."}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, text, use]},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}, result]},
    ]
    assert messages_history(messages, [{"type": "text", "text": "Be brief."}]) == HISTORY
    assert messages_history(messages, "Be brief.") == HISTORY


def test_responses() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?\nIn Paris."}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "m",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "id": "f", "name": "weather", "arguments": json.dumps(ARGUMENTS)},
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny"},
        {"role": "user", "content": "Thanks"},
    ]
    assert responses_history(items, "Be brief.") == HISTORY


def test_text_alone() -> None:
    assert responses_history("Hi") == [{"role": "user", "content": "Hi"}]
    assert messages_history([{"role": "user", "content": "Hi"}]) == [{"role": "user", "content": "Hi"}]


def test_anthropics_messages_may_instruct_later() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    ]

    assert messages_history(messages)[1:] == [{"role": "system", "content": "Be brief."}]


def test_system_messages_at_the_start_become_one() -> None:
    messages = [{"role": role, "content": role} for role in ("system", "developer", "user", "system")]

    assert chat_history(messages) == [
        {"role": "system", "content": "system\n\ndeveloper"},
        {"role": "user", "content": "user"},
        {"role": "system", "content": "system"},
    ]


def test_several_results_find_their_functions() -> None:
    calls = [{"id": str(n), "type": "function", "function": {"name": f"f{n}", "arguments": ""}} for n in range(3)]
    results = [{"role": "tool", "tool_call_id": str(n), "content": "x"} for n in (2, 0, 1)]
    found = chat_history([{"role": "assistant", "content": None, "tool_calls": calls}, *results])

    assert found[0]["content"] == ""
    assert [message["name"] for message in found[1:]] == ["f2", "f0", "f1"]
    assert all(call["function"]["arguments"] == {} for call in found[0]["tool_calls"])


def test_a_failed_result_says_so() -> None:
    use = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c", "is_error": True, "content": "no such city"}
    messages = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]

    assert messages_history(messages)[1]["content"] == "Error: no such city"


def test_calls_in_a_row_of_items_are_one_message_and_summaries_stand_in() -> None:
    items = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Short."}]},
        *({"type": "function_call", "call_id": name, "name": name, "arguments": "{}"} for name in "ab"),
    ]
    (message,) = responses_history(items)

    assert message["reasoning_content"] == "Short."
    assert [call["id"] for call in message["tool_calls"]] == ["a", "b"]


def test_the_demos_template_renders_it_and_the_parser_reads_that() -> None:
    prompt = ChatTemplate.load(DEMO).render(HISTORY)
    turn = prompt.split("<|turn>model\n")[2].split("<turn|>")[0]
    (call,) = parse(turn, tools={"weather": {}}).calls

    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    assert "<|tool_response>Sunny<tool_response|>" in prompt


# ---------------------------------------------------------------- refusals


def message(role: str, content: object = "x", **fields: Any) -> list[Mapping[str, Any]]:
    return [{"role": role, "content": content, **fields}]


def call(**fields: Any) -> list[Mapping[str, Any]]:
    return message("assistant", tool_calls=[{"id": "c", "type": "function", **fields}])


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (None, "messages", "is empty"),
        ("Hi", "messages", "must be a list, got a string"),
        ([7], "messages[0]", "must be an object, got a number"),
        (message("function"), "messages[0].role", "'function' is not supported"),
        ([{"content": "x"}], "messages[0].role", "None is not supported"),
        (message("user", None), "messages[0].content", "is missing"),
        (message("user", 7), "messages[0].content", "must be a list, got a number"),
        (message("user", ["x"]), "messages[0].content[0]", "must be an object"),
        (message("user", [{"type": "text", "text": 7}]), "messages[0].content[0].text", "must be a string"),
        (
            message("user", [{"type": "text", "text": "x"}, {"type": "image_url"}]),
            "messages[0].content[1].type",
            "'image_url' is not supported; this server takes text only",
        ),
        (message("user", [{"type": "input_audio"}]), "messages[0].content[0].type", "'input_audio' is not supported"),
        (message("user", colour="red"), "messages[0].colour", "is not supported; leave it out"),
        (message("assistant", audio={"id": "a"}), "messages[0].audio", "is not supported"),
        (message("assistant", function_call={"name": "f"}), "messages[0].function_call", "is not supported"),
        (message("assistant", reasoning_content=[]), "messages[0].reasoning_content", "must be a string, got a list"),
        (call(), "messages[0].tool_calls[0].function", "must be an object, got null"),
        (call(function={"arguments": "{}"}), "messages[0].tool_calls[0].function.name", "is missing"),
        (
            call(function={"name": "f", "arguments": '{"a'}),
            "messages[0].tool_calls[0].function.arguments",
            "is not JSON (Unterminated string",
        ),
        (
            call(function={"name": "f", "arguments": "[]"}),
            "messages[0].tool_calls[0].function.arguments",
            "must be JSON text of an object",
        ),
        (call(id=None, function={"name": "f"}), "messages[0].tool_calls[0].id", "is missing"),
        (call(type="custom"), "messages[0].tool_calls[0].type", "'custom' is not supported"),
        (message("tool"), "messages[0].tool_call_id", "is missing"),
        (message("tool", tool_call_id="c"), "messages[0].tool_call_id", "none comes right before"),
        (
            [*call(function={"name": "f"}), *message("tool", tool_call_id="d")],
            "messages[1].tool_call_id",
            "no call 'd' in the assistant message before this result; it made 'c'",
        ),
        (
            [*call(function={"name": "f"}), *message("user"), *message("tool", tool_call_id="c")],
            "messages[2].tool_call_id",
            "none comes right before",
        ),
    ],
)
def test_chat_completions_refuse_by_path(messages: object, param: str, words: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        chat_history(messages)

    assert refusal.value.param == param
    assert words in refusal.value.message


@pytest.mark.parametrize(
    ("messages", "system", "param"),
    [
        ([], None, "messages"),
        (message("tool"), None, "messages[0].role"),
        (message("user", None), None, "messages[0].content"),
        (message("user", name="Ada"), None, "messages[0].name"),
        (message("user"), [{"type": "image"}], "system[0].type"),
        (message("user", [{"type": "image", "source": {}}]), None, "messages[0].content[0].type"),
        (message("assistant", [{"type": "redacted_thinking"}]), None, "messages[0].content[0].type"),
        (message("assistant", [{"type": "tool_use", "id": "c", "name": "f"}]), None, "messages[0].content[0].input"),
        (message("assistant", [{"type": "tool_use", "input": {}}]), None, "messages[0].content[0].id"),
        (message("user", [{"type": "tool_result"}]), None, "messages[0].content[0].tool_use_id"),
        (
            message("user", [{"type": "tool_result", "content": [{"type": "document"}]}]),
            None,
            "messages[0].content[0].content[0].type",
        ),
    ],
)
def test_messages_refuse_by_path(messages: object, system: object, param: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        messages_history(messages, system)

    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("items", "instructions", "param"),
    [
        ([], None, "input"),
        (None, None, "input"),
        ("Hi", 7, "instructions"),
        ([{"type": "item_reference", "id": "x"}], None, "input[0].type"),
        (message("tool"), None, "input[0].role"),
        (message("user", None), None, "input[0].content"),
        (message("user", [{"type": "input_image"}]), None, "input[0].content[0].type"),
        (message("assistant", [{"type": "refusal"}]), None, "input[0].content[0].type"),
        ([{"type": "reasoning", "encrypted_content": "x"}], None, "input[0].encrypted_content"),
        ([{"type": "function_call", "name": "f"}], None, "input[0].call_id"),
        ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "x"}], None, "input[0].arguments"),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], None, "input[0].call_id"),
        ([{"type": "function_call_output", "output": [{"type": "input_file"}]}], None, "input[0].output[0].type"),
    ],
)
def test_responses_refuse_by_path(items: object, instructions: object, param: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        responses_history(items, instructions)

    assert refusal.value.param == param
