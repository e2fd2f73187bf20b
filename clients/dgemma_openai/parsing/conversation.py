"""Messages as Gemma's chat template reads them, put together one by one. Knows no API's form of them.

Roles are system, user, assistant and tool; content is text. An assistant's `tool_calls` have arguments as objects, a
tool's result names its function; the template finds results behind the message with their calls and nowhere else.
Neighbouring system messages at the start become one, since the template has one system turn. Text that the assistant
wrote before calls is a message of its own: the released template joins neighbouring ones to one turn, but writes a
message's text behind the results of its calls, and ends the turn there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.fields import a_string

Message = dict[str, Any]  # a dict at the JSON edge


@dataclass(frozen=True)
class PastCall:
    """A call that the assistant made earlier."""

    id: str
    name: str
    arguments: dict[str, Any]


class Conversation:
    """Add messages in order, then take `messages`."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._open: dict[str, str] = {}  # calls of the last assistant message, id -> function

    def system(self, text: str) -> None:
        """Instructions, of a developer as well."""
        self._open = {}
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0] = {"role": "system", "content": f"{self.messages[0]['content']}\n\n{text}"}
        else:
            self.messages.append({"role": "system", "content": text})

    def user(self, text: str) -> None:
        """What a person said."""
        self._open = {}
        self.messages.append({"role": "user", "content": text})

    def assistant(self, text: str, reasoning: str = "", calls: Sequence[PastCall] = ()) -> None:
        """A turn of the model, or a part of it: thinking and text come before calls."""
        if text.strip() and calls:
            self.messages.append({"role": "assistant", "content": text})
            text = ""
        message: Message = {"role": "assistant", "content": text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        self._open = {call.id: call.name for call in calls}
        self.messages.append(message)

    def result(self, path: str, call_id: str, text: str) -> None:
        """What a call came to; `path` is the field with the call's id."""
        name = self._open.get(call_id)
        if name is None:
            found = f"it made {', '.join(map(repr, self._open))}" if self._open else "none comes right before"
            raise Unsupported(path, f"no call {call_id!r} in the assistant message before this result; {found}")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": text})


def arguments_of(path: str, value: object) -> dict[str, Any]:
    """A call's arguments: JSON text of an object, or an object already; none for nothing."""
    if isinstance(value, dict):
        return value
    text = a_string(path, value)
    try:
        arguments = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise Unsupported(path, f"is not JSON ({error}); send the arguments as the call had them, whole") from None
    if not isinstance(arguments, dict):
        raise Unsupported(path, "must be JSON text of an object")
    return arguments
