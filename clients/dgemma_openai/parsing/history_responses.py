"""Input items of responses to messages for Gemma's chat template. Knows no other API.

An assistant's reasoning, message and calls are items of their own here; those that follow each other are one message.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dgemma_openai.parsing.conversation import Conversation, Message, PastCall, arguments_of
from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.fields import PART_JOINT, Object, a_list, a_name, a_string, an_object, one_of, only, text_of

_MESSAGE = frozenset({"type", "role", "content", "id", "status", "phase"})
_CALL = frozenset({"type", "id", "call_id", "name", "arguments", "status"})
_RESULT = frozenset({"type", "id", "call_id", "output", "status"})
_REASONING = frozenset({"type", "id", "summary", "content", "status"})


def responses_history(items: object, instructions: object = None) -> list[Message]:
    """From a request's `input` and `instructions`. Raises Unsupported."""
    conversation = Conversation()
    if text := a_string("instructions", instructions):
        conversation.system(text)
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    given = a_list("input", items)
    if not given:
        raise Unsupported("input", "is empty; send text or at least one item")
    turn = _Turn()
    for index, value in enumerate(given):
        turn = _add(conversation, turn, f"input[{index}]", an_object(f"input[{index}]", value))
    turn.end(conversation)
    return conversation.messages


@dataclass
class _Turn:
    """The assistant's items since the last one of somebody else."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[PastCall] = field(default_factory=list)

    def end(self, conversation: Conversation) -> None:
        if self.texts or self.thoughts or self.calls:
            conversation.assistant(PART_JOINT.join(self.texts), "\n\n".join(self.thoughts), self.calls)


def _add(conversation: Conversation, turn: _Turn, path: str, item: Object) -> _Turn:
    """The assistant's turn as it stands behind the item."""
    kinds = ("message", "function_call", "function_call_output", "reasoning")
    match one_of(f"{path}.type", item.get("type", "message"), *kinds):
        case "reasoning":
            turn.thoughts.append(_thought(path, item))
        case "function_call":
            turn.calls.append(_call(path, item))
        case "message" if item.get("role") == "assistant":
            only(path, item, _MESSAGE)
            turn.texts.append(text_of(f"{path}.content", item.get("content"), "output_text", "input_text", "text"))
        case "message":
            turn.end(conversation)
            _message(conversation, path, item)
            return _Turn()
        case _:
            turn.end(conversation)
            _result(conversation, path, item)
            return _Turn()
    return turn


def _message(conversation: Conversation, path: str, item: Object) -> None:
    role = one_of(f"{path}.role", item.get("role"), "user", "system", "developer", "assistant")
    only(path, item, _MESSAGE)
    if item.get("content") is None:
        raise Unsupported(f"{path}.content", "is missing")
    text = text_of(f"{path}.content", item["content"], "input_text", "text")
    if role == "user":
        conversation.user(text)
    else:
        conversation.system(text)


def _call(path: str, item: Object) -> PastCall:
    only(path, item, _CALL)
    arguments = arguments_of(f"{path}.arguments", item.get("arguments"))
    return PastCall(a_name(f"{path}.call_id", item.get("call_id")), a_name(f"{path}.name", item.get("name")), arguments)


def _result(conversation: Conversation, path: str, item: Object) -> None:
    only(path, item, _RESULT)
    text = text_of(f"{path}.output", item.get("output"), "input_text", "output_text", "text")
    conversation.result(f"{path}.call_id", a_name(f"{path}.call_id", item.get("call_id")), text)


def _thought(path: str, item: Object) -> str:
    """The thinking itself where it is given, else its summary."""
    only(path, item, _REASONING)
    content = text_of(f"{path}.content", item.get("content"), "reasoning_text", "text")
    return content or text_of(f"{path}.summary", item.get("summary"), "summary_text")
