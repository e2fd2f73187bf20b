"""Tools and the choice among them, as three APIs write them, to what prompt and parser need. Knows no messages.

There is no grammar that could force a call. What a request demands is honoured by opening the model's turn: "required"
opens it with a call, a named function with a call of that function (so does "required" where there is only one). The
model writes the rest, which may still be malformed. With "none" the tools are not declared to the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.fields import Object, a_list, a_string, an_object, one_of, only
from dgemma_openai.parsing.markers import CALL

_NAME = re.compile(r"[\w./-]{1,128}")


@dataclass(frozen=True)
class ToolPlan:
    """What the tools of a request come to."""

    declared: tuple[dict[str, Any], ...] = ()  # for the chat template, in the form of chat completions
    schemas: Mapping[str, object] | None = field(default=None)  # for OutputParser(tools=...)
    prefix: str = ""  # goes behind the generation prompt, and primes the parser
    parallel: bool = True  # for OutputParser(parallel=...)


def chat_tools(tools: object, choice: object, parallel: object) -> ToolPlan:
    """Of chat completions: `tools`, `tool_choice`, `parallel_tool_calls`. Raises Unsupported."""
    if isinstance(choice, Mapping):
        _function_type("tool_choice", choice)
        function = an_object("tool_choice.function", choice.get("function"))
        return _plan(tools, _chat_tool, _named("tool_choice.function.name", function), parallel)
    return _plan(tools, _chat_tool, _mode("tool_choice", choice), parallel)


def responses_tools(tools: object, choice: object, parallel: object) -> ToolPlan:
    """Of responses: the same fields, flat. Raises Unsupported."""
    if isinstance(choice, Mapping):
        _function_type("tool_choice", choice)
        return _plan(tools, _responses_tool, _named("tool_choice.name", choice), parallel)
    return _plan(tools, _responses_tool, _mode("tool_choice", choice), parallel)


def messages_tools(tools: object, choice: object) -> ToolPlan:
    """Of Anthropic's messages: `tools`, `tool_choice`. Raises Unsupported."""
    given = {"type": "auto"} if choice is None else an_object("tool_choice", choice)
    kind = one_of("tool_choice.type", given.get("type"), "auto", "none", "any", "tool")
    parallel = not given.get("disable_parallel_tool_use", False)
    if kind == "tool":
        return _plan(tools, _messages_tool, _named("tool_choice.name", given), parallel)
    wanted = _Choice("tool_choice.type", "required" if kind == "any" else kind)
    return _plan(tools, _messages_tool, wanted, parallel)


# ---------------------------------------------------------------- the choice


@dataclass(frozen=True)
class _Choice:
    path: str
    mode: str  # auto, none, required or named
    name: str = ""


def _mode(path: str, value: object) -> _Choice:
    return _Choice(path, one_of(path, "auto" if value is None else value, "auto", "none", "required"))


def _named(path: str, value: Object) -> _Choice:
    return _Choice(path, "named", a_string(path, value.get("name")))


def _plan(tools: object, read: Callable[[str, Object], dict[str, Any]], choice: _Choice, parallel: object) -> ToolPlan:
    if parallel is not None and not isinstance(parallel, bool):
        raise Unsupported("parallel_tool_calls", f"must be true or false, got {parallel!r}")
    declared: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(a_list("tools", tools)):
        function = read(f"tools[{index}]", an_object(f"tools[{index}]", tool))
        if declared.setdefault(function["name"], function) is not function:
            raise Unsupported(f"tools[{index}]", f"there is another function {function['name']!r}; give each its name")
    if choice.mode in ("required", "named") and not declared:
        raise Unsupported(choice.path, "demands a call, but there are no tools; send tools or leave it out")
    if choice.mode == "named" and choice.name not in declared:
        raise Unsupported(choice.path, f"{choice.name!r} is none of the tools ({', '.join(declared)})")
    if choice.mode == "none" or not declared:
        return ToolPlan()
    name = next(iter(declared)) if choice.mode == "required" and len(declared) == 1 else choice.name
    prefix = f"{CALL}call:{name}{{" if name else f"{CALL}call:" if choice.mode == "required" else ""
    return ToolPlan(
        tuple({"type": "function", "function": function} for function in declared.values()),
        {key: function.get("parameters") for key, function in declared.items()},
        prefix,
        parallel is not False and choice.mode != "named",
    )


# ---------------------------------------------------------------- one tool


def _chat_tool(path: str, tool: Object) -> dict[str, Any]:
    _function_type(path, tool)
    only(path, tool, frozenset({"type", "function"}))
    path = f"{path}.function"
    function = an_object(path, tool.get("function"))
    only(path, function, frozenset({"name", "description", "parameters"}))
    return _function(path, function, "parameters")


def _responses_tool(path: str, tool: Object) -> dict[str, Any]:
    _function_type(path, tool)
    only(path, tool, frozenset({"type", "name", "description", "parameters"}))
    return _function(path, tool, "parameters")


def _messages_tool(path: str, tool: Object) -> dict[str, Any]:
    one_of(f"{path}.type", tool.get("type") or "custom", "custom")
    only(path, tool, frozenset({"type", "name", "description", "input_schema", "cache_control"}))
    return _function(path, tool, "input_schema")


def _function_type(path: str, value: Object) -> None:
    one_of(f"{path}.type", value.get("type"), "function")


def _function(path: str, value: Object, parameters: str) -> dict[str, Any]:
    name = a_string(f"{path}.name", value.get("name"))
    if not _NAME.fullmatch(name):
        message = f"{name!r} cannot be a function's name; use up to 128 letters, digits and _ . / -"
        raise Unsupported(f"{path}.name", message)
    function: dict[str, Any] = {"name": name}
    function["description"] = a_string(f"{path}.description", value.get("description"))
    if value.get(parameters) is not None:
        function["parameters"] = dict(an_object(f"{path}.{parameters}", value[parameters]))
    return function
