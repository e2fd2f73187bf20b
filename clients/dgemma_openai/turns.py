"""Turns of a chat, which all three APIs come down to: a prompt, and answers taken apart as they come. Knows no API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from dgemma_client import Delta, Done, Event, Prefill, Preview
from dgemma_client.errors import ClientError
from dgemma_client.requests import Parameters
from dgemma_openai.answers import End
from dgemma_openai.backend import Ask
from dgemma_openai.errors import from_client
from dgemma_openai.gateway import Gateway
from dgemma_openai.parsing.events import ContentDelta
from dgemma_openai.parsing.events import Event as OutputEvent
from dgemma_openai.parsing.output import OutputParser, opened_by
from dgemma_openai.parsing.tools import ToolPlan


@dataclass(frozen=True)
class Question:
    """What is asked, and how answers are to be read."""

    prompt: Ask  # messages and what the template is given
    plan: ToolPlan = field(default_factory=ToolPlan)
    trimmed: bool = True  # whether white space around an answer behind a thought or a call is dropped
    raw: bool = False  # whether answers are plain text to their last token, whatever ends a turn in between
    primed: str | None = None  # how the prompt opens the answer; None: not known yet, see `opened`

    @property
    def may_open(self) -> bool:
        """Whether the prompt may end inside a call or, as behind a tool's result, a thought."""
        messages, chat = self.prompt.messages or (), self.prompt.chat or {}
        thinks_on = self.prompt.enable_thinking and bool(messages) and messages[-1].get("role") == "tool"
        return bool(self.plan.prefix or thinks_on or chat.get("continue_final_message"))


@dataclass(frozen=True)
class Ended:
    """The last event of an answer."""

    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None
    done: Done


AnswerEvent = OutputEvent | Preview | Prefill | Ended


async def answers(
    gateway: Gateway,
    question: Question,
    request_id: str,
    parameters: Sequence[Parameters],
    names: Mapping[str, str],
) -> AsyncGenerator[tuple[int, AnswerEvent]]:
    """(index of the answer, event) as they come; an answer for each of `parameters`, ended by `Ended`.

    `names` are the API's own names of Triton's inputs, for errors. Raises ApiError. Closing it ends the generations.
    """
    try:
        question = await opened(gateway, question, request_id)
        asks = [
            replace(
                question.prompt,
                request_id=f"{request_id}-{index}",
                parameters={**given, "skip_special_tokens": question.raw},
            )
            for index, given in enumerate(parameters)
        ]
        readers = [_Reader(question) for _ in asks]
        async with aclosing(gateway.backend.events(asks)) as events:
            async for index, event in events:
                for found in readers[index].read(event):
                    yield index, found
    except ClientError as error:
        raise from_client(error, names) from None


async def opened(gateway: Gateway, question: Question, request_id: str) -> Question:
    """With `primed`, and a text as prompt where a call is demanded, which it begins. Raises ClientError."""
    if question.primed is not None:
        return question
    if not question.may_open:
        return replace(question, primed="")
    tokens = await gateway.backend.tokenize(replace(question.prompt, request_id=f"{request_id}-prompt"))
    prompt, prefix = question.prompt, question.plan.prefix
    if prefix:
        prompt = Ask(request_id, {}, text=tokens.text + prefix, previews=prompt.previews)
    return replace(question, prompt=prompt, primed=opened_by(tokens.text) + prefix)


class _Reader:
    """One answer's events to what is told of it."""

    def __init__(self, question: Question) -> None:
        plan = question.plan
        self._raw = question.raw
        primed, trimmed = question.primed or "", question.trimmed
        self._parser = OutputParser(tools=plan.schemas, primed=primed, parallel=plan.parallel, trimmed=trimmed)

    def read(self, event: Event) -> Iterator[AnswerEvent]:
        match event:
            case Delta(text=text) if self._raw:
                if text:
                    yield ContentDelta(text)
            case Delta(text=text):
                yield from self._parser.feed(text)
            case Done():
                end = End.of(event)
                yield from self._parser.finish(cut=end.finish_reason == "length")
                called = self._parser.calls > 0 and end.finish_reason == "stop"
                yield Ended("tool_calls" if called else end.finish_reason, end.stop_reason, event)
            case _:
                yield event
