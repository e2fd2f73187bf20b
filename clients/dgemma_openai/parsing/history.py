"""Messages of chat completions to messages for Gemma's chat template. Knows no other API."""

from __future__ import annotations

from dgemma_openai.parsing.conversation import Conversation, Message, PastCall, arguments_of
from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.fields import Object, a_list, a_name, a_string, an_object, one_of, only, text_of

# What answers of this and other servers carry when clients send them back, and what says nothing to the model.
_REPLAYED = frozenset(
    {"annotations", "cache_control", "id", "provider_specific_fields", "reasoning_details", "thinking_blocks"}
)
_FIELDS = {
    "system": frozenset({"role", "content", "name", "cache_control"}),
    "user": frozenset({"role", "content", "name", "cache_control"}),
    "assistant": frozenset({"role", "content", "name", "tool_calls", "reasoning_content", "reasoning"}) | _REPLAYED,
    "tool": frozenset({"role", "content", "name", "tool_call_id", "id", "cache_control"}),
}


def chat_history(messages: object) -> list[Message]:
    """From a request's `messages`. Raises Unsupported."""
    conversation = Conversation()
    for index, value in enumerate(a_list("messages", messages)):
        _add(conversation, f"messages[{index}]", an_object(f"messages[{index}]", value))
    if not conversation.messages:
        raise Unsupported("messages", "is empty; send at least one message")
    return conversation.messages


def _add(conversation: Conversation, path: str, message: Object) -> None:
    role = one_of(f"{path}.role", message.get("role"), "system", "developer", "user", "assistant", "tool")
    role = "system" if role == "developer" else role
    only(path, message, _FIELDS[role])
    text = text_of(f"{path}.content", message.get("content"), "text")
    if message.get("content") is None and role != "assistant":
        raise Unsupported(f"{path}.content", "is missing")
    match role:
        case "system":
            conversation.system(text)
        case "user":
            conversation.user(text)
        case "assistant":
            reasoning = a_string(f"{path}.reasoning_content", message.get("reasoning_content"))
            reasoning = reasoning or a_string(f"{path}.reasoning", message.get("reasoning"))
            conversation.assistant(text, reasoning, _calls(f"{path}.tool_calls", message.get("tool_calls")))
        case "tool":
            id_path = f"{path}.tool_call_id"
            conversation.result(id_path, a_name(id_path, message.get("tool_call_id")), text)


def _calls(path: str, value: object) -> list[PastCall]:
    calls = []
    for index, entry in enumerate(a_list(path, value)):
        at = f"{path}[{index}]"
        call = an_object(at, entry)
        one_of(f"{at}.type", call.get("type", "function"), "function")
        function = an_object(f"{at}.function", call.get("function"))
        name = a_name(f"{at}.function.name", function.get("name"))
        arguments = arguments_of(f"{at}.function.arguments", function.get("arguments"))
        calls.append(PastCall(a_name(f"{at}.id", call.get("id")), name, arguments))
    return calls
