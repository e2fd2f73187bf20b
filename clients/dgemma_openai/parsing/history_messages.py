"""Anthropic's messages to messages for Gemma's chat template. Knows no other API."""

from __future__ import annotations

from collections.abc import Iterator

from dgemma_openai.parsing.conversation import Conversation, Message, PastCall
from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.fields import (
    PART_JOINT,
    Object,
    a_list,
    a_name,
    a_string,
    an_object,
    one_of,
    only,
    text_of,
    text_part,
    unsupported_part,
)

_MESSAGE = frozenset({"role", "content"})
_CALL = frozenset({"type", "id", "name", "input", "cache_control", "caller"})
_RESULT = frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"})


def messages_history(messages: object, system: object = None) -> list[Message]:
    """From a request's `messages` and `system`. Raises Unsupported."""
    conversation = Conversation()
    if instructions := text_of("system", system, "text"):
        conversation.system(instructions)
    given = a_list("messages", messages)
    if not given:
        raise Unsupported("messages", "is empty; send at least one message")
    for index, value in enumerate(given):
        path = f"messages[{index}]"
        message = an_object(path, value)
        only(path, message, _MESSAGE)
        at, content = f"{path}.content", message.get("content")
        match one_of(f"{path}.role", message.get("role"), "user", "assistant", "system"):
            case "user":
                _user(conversation, at, content)
            case "assistant":
                _assistant(conversation, at, content)
            case _:
                conversation.system(
                    PART_JOINT.join(text_part(place, block, "text") for place, block in _blocks(at, content))
                )
    return conversation.messages


def _blocks(path: str, content: object) -> Iterator[tuple[str, Object]]:
    if content is None:
        raise Unsupported(path, "is missing")
    if isinstance(content, str):
        yield path, {"type": "text", "text": content}
        return
    for index, block in enumerate(a_list(path, content)):
        yield f"{path}[{index}]", an_object(f"{path}[{index}]", block)


def _user(conversation: Conversation, path: str, content: object) -> None:
    """Results come first, whatever their place: the template wants them right behind their calls."""
    texts = []
    results = 0
    for at, block in _blocks(path, content):
        if block.get("type") == "tool_result":
            _result(conversation, at, block)
            results += 1
        else:
            texts.append(text_part(at, block, "text"))
    if texts or not results:
        conversation.user(PART_JOINT.join(texts))


def _result(conversation: Conversation, path: str, block: Object) -> None:
    """A result that reports an error says so in its text: the template has no other place for it."""
    only(path, block, _RESULT)
    text = text_of(f"{path}.content", block.get("content"), "text")
    call_id = a_name(f"{path}.tool_use_id", block.get("tool_use_id"))
    conversation.result(f"{path}.tool_use_id", call_id, f"Error: {text}" if block.get("is_error") else text)


def _assistant(conversation: Conversation, path: str, content: object) -> None:
    texts, thoughts, calls = [], [], []
    for at, block in _blocks(path, content):
        match block.get("type"):
            case "text":
                texts.append(text_part(at, block, "text"))
            case "thinking":
                thoughts.append(a_string(f"{at}.thinking", block.get("thinking")))
            case "tool_use":
                calls.append(_call(at, block))
            case other:
                raise unsupported_part(at, other)
    conversation.assistant(PART_JOINT.join(texts), "\n\n".join(thoughts), calls)


def _call(path: str, block: Object) -> PastCall:
    only(path, block, _CALL)
    arguments = an_object(f"{path}.input", block.get("input"))
    return PastCall(a_name(f"{path}.id", block.get("id")), a_name(f"{path}.name", block.get("name")), dict(arguments))
