"""Messages to a prompt, through the checkpoint's own chat template. Knows no tokens and no transport."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dgemma_runtime.codec import TOKENIZER_CONFIG_FILE, read_json_object, token_text
from dgemma_runtime.errors import CheckpointError, InvalidRequest

TEMPLATE_FILE = "chat_template.jinja"
_THOUGHT = ("reasoning_content", "thinking", "reasoning")
Message = Mapping[str, Any]  # a dict at the JSON edge: role, content and whatever else the template reads


class ChatTemplate:
    """A compiled template; thread-safe. Environment and helpers are those of transformers' `apply_chat_template`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from None
        self._special_tokens = dict(special_tokens)  # "bos_token" -> "<bos>", ...

    @staticmethod
    def load(directory: Path) -> ChatTemplate:
        """From chat_template.jinja or tokenizer_config.json of an engine or checkpoint directory."""
        config = read_json_object(directory / TOKENIZER_CONFIG_FILE)
        path = directory / TEMPLATE_FILE
        try:
            source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not readable ({error})") from None
        if not isinstance(source, str):
            raise CheckpointError(
                f"{directory}: neither {TEMPLATE_FILE} nor a chat_template in {TOKENIZER_CONFIG_FILE}"
            )
        tokens = {name: text for name in config if name.endswith("_token") and (text := token_text(config[name]))}
        return ChatTemplate(source, tokens)

    def render(
        self,
        messages: Sequence[Message],
        /,  # so that variables may have any other name
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text; `variables` are the template's own, as `enable_thinking`, which is false unless given.

        `continue_final_message` leaves the last message open, and wants no generation prompt behind it. Raises
        InvalidRequest("messages", ...) for messages that the template refuses, and for a variable with a special
        token's name.
        """
        _check_messages(messages)
        if taken := variables.keys() & self._special_tokens:
            message = f'"{min(taken)}" in chat_template_kwargs is the tokenizer\'s to say; leave it out'
            raise InvalidRequest("messages", message)
        chat, open_end = [_normalized(message) for message in messages], None
        if continue_final_message:
            open_end = _OpenEnd(chat)
        text = self._render(
            {
                "enable_thinking": False,
                **variables,
                "messages": chat,
                "tools": None if tools is None else list(tools),
                "add_generation_prompt": add_generation_prompt,
                **self._special_tokens,
            }
        )
        return text if open_end is None else open_end.cut(text)

    def _render(self, context: Mapping[str, Any]) -> str:
        try:
            return self._template.render(context)
        except Exception as error:  # noqa: BLE001 - a template is a program; it may raise anything on odd messages
            message = f"the chat template refused them ({type(error).__name__}: {error}); check roles and contents"
            raise InvalidRequest("messages", message) from None


class _OpenEnd:
    """Marks the end of the last message's text in `chat`, so that it is found in what a template makes of it."""

    def __init__(self, chat: list[dict[str, Any]]) -> None:
        self._mark = f"END{uuid.uuid4().hex} "  # the space tells whether the template strips the text
        content = chat[-1].get("content")
        if isinstance(content, list):
            parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
            texts = [part for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            self._text = texts[-1]["text"] if texts else None
            if texts:
                texts[-1]["text"] += self._mark
            content = parts
        elif isinstance(content, str):
            self._text, content = content, content + self._mark
        else:
            self._text = None
        if self._text is None:
            raise InvalidRequest("messages", "continue_final_message: the last message has no text to go on from")
        chat[-1] = {**chat[-1], "content": content}

    def cut(self, text: str) -> str:
        """The prompt `text` up to the end of the last message."""
        assert self._text is not None
        place = text.rfind(self._mark.rstrip())
        if place < 0 or self._text.strip() not in text[:place]:
            message = "continue_final_message: the chat template does not show the last message as it is; leave it out"
            raise InvalidRequest("messages", message)
        return text[:place] if text.startswith(self._mark, place) else text[:place].rstrip()


def _normalized(message: Message) -> dict[str, Any]:
    """As transformers hands messages to a template: no key without a value, one name for what was thought."""
    given = {name: value for name, value in message.items() if value is not None}
    thought = next((given[name] for name in _THOUGHT if name in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}


def _check_messages(messages: object) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InvalidRequest("messages", f"must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise InvalidRequest("messages", "is empty; send at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest("messages", f"entry {index} must be an object, got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise InvalidRequest("messages", f"entry {index} has no role; use system, user, assistant or tool")


# ---------------------------------------------------------------- the environment of transformers' templates


def _environment() -> ImmutableSandboxedEnvironment:
    extensions: list[type[Extension]] = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _GuardedNamespace
    environment.globals["dict"] = _make_dict  # not the class: its attributes lead out of the sandbox
    return environment


class _Generation(Extension):
    """The tag {% generation %}, which marks assistant text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _GuardedNamespace(Namespace):
    """No names with a leading underscore, as in transformers: they lead to the interpreter's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        self, positional = args[0], args[1:]
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} in a namespace; rename the attribute")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON, unlike Jinja's own filter without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
