"""Messages to a prompt, through the checkpoint's own chat template. Knows no tokens and no transport."""

from __future__ import annotations

import json
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
    ) -> str:
        """The prompt's text. Raises InvalidRequest("messages", ...) for messages that the template refuses."""
        _check_messages(messages)
        try:
            return self._template.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                **self._special_tokens,
            )
        except Exception as error:  # noqa: BLE001 - a template is a program; it may raise anything on odd messages
            message = f"the chat template refused them ({type(error).__name__}: {error}); check roles and contents"
            raise InvalidRequest("messages", message) from None


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
