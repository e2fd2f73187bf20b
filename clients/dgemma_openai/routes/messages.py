"""/v1/messages and /v1/messages/count_tokens, Anthropic's API. Knows no tensor and no marker of the model's format."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import from_json

from dgemma_client import Done, Prefill, Preview
from dgemma_client.errors import ClientError
from dgemma_client.requests import ChatOptions, Parameters
from dgemma_openai import sse
from dgemma_openai.answers import check_stream_only, parameters, unless_left
from dgemma_openai.backend import Ask
from dgemma_openai.diffusing import diffusing
from dgemma_openai.errors import ApiError, from_client, from_unsupported, invalid
from dgemma_openai.gateway import Gateway, OpenGatewayDep
from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from dgemma_openai.parsing.history_messages import messages_history
from dgemma_openai.parsing.tools import messages_tools
from dgemma_openai.schemas.messages import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    CountTokensRequest,
    MessageObject,
    MessagesPrompt,
    MessagesRequest,
    MessagesUsage,
    StopReason,
    ThinkingAdaptive,
    ThinkingOn,
    TokenCount,
)
from dgemma_openai.strict_json import JsonRoute
from dgemma_openai.turns import AnswerEvent, Ended, Question, answers, opened

router = APIRouter(tags=["generation"], route_class=JsonRoute)
# Triton's inputs -> this API's
_NAMES = {"text_input": "messages", "input_ids": "messages", "stop_words": "stop_sequences"}
_TOOL = {"name", "description", "input_schema"}
_STREAM = {
    "schema": {
        "type": "string",
        "description": "With `stream`: server-sent events with the names and members of Anthropic's, each with its "
        "`type`. With `diffusing` there are more of the events ping, whose `diffusing` is a Diffusing.",
    }
}

Told = tuple[str, dict[str, Any]]  # an event's name, and what it says beside that


@dataclass(frozen=True)
class _Job:
    id: str
    body: MessagesRequest
    question: Question
    parameters: Parameters

    @property
    def thinking(self) -> bool:
        """Whether it is sent."""
        thinking = self.body.thinking
        return not (isinstance(thinking, ThinkingOn | ThinkingAdaptive) and thinking.display == "omitted")

    def events(self, gateway: Gateway) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        return answers(gateway, self.question, self.id, [self.parameters], _NAMES)


@router.post("/v1/messages", response_model=MessageObject, responses={200: {"content": {"text/event-stream": _STREAM}}})
async def messages(body: MessagesRequest, request: Request, gateway: OpenGatewayDep) -> Response | MessageObject:
    gateway.check_model(body.model)
    check_stream_only(body)
    stops = {"stop_words": body.stop_sequences} if body.stop_sequences else {}
    job = _Job(
        id=f"msg_{uuid.uuid4().hex}",
        body=body,
        question=_question(body, previews=bool(body.diffusing)),
        parameters=parameters(body, body.max_tokens, body.seeds(1)[0], **stops),
    )
    if body.stream:
        return await sse.event_stream(_stream(job, gateway), gateway.settings.keep_alive_s)
    return await unless_left(request, _whole(job, gateway))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, gateway: OpenGatewayDep) -> TokenCount:
    gateway.check_model(body.model)
    _, count = await _counted(gateway, _question(body), f"count_{uuid.uuid4().hex}")
    return TokenCount(input_tokens=count)


# ---------------------------------------------------------------- what is asked


def _question(body: MessagesPrompt, *, previews: bool = False) -> Question:
    turns = [turn.model_dump(exclude_none=True) for turn in body.messages]
    system = body.system if isinstance(body.system, str | None) else [block.model_dump() for block in body.system]
    tools = [tool.model_dump(exclude_none=True, include=_TOOL) for tool in body.tools or ()]
    choice = body.tool_choice and body.tool_choice.model_dump(exclude_none=True)
    try:
        history = messages_history(turns, system)
        plan = messages_tools(tools, choice)
    except Unsupported as error:
        raise from_unsupported(error) from None
    open_end = body.messages[-1].role == "assistant"
    if open_end and plan.prefix:
        raise invalid("tool_choice", "demands a call, which needs a turn of its own; end with a message of the user")
    chat: ChatOptions | None = {"continue_final_message": True} if open_end else None
    prompt = Ask("", {}, messages=history, tools=plan.declared or None, chat=chat, previews=previews)
    thinks = isinstance(body.thinking, ThinkingOn | ThinkingAdaptive)
    return Question(replace(prompt, enable_thinking=thinks), plan)


async def _counted(gateway: Gateway, question: Question, request_id: str) -> tuple[Question, int]:
    """The same with the whole prompt as tokens, and their number."""
    try:
        question = await opened(gateway, question, request_id)
        ids = (await gateway.backend.tokenize(replace(question.prompt, request_id=f"{request_id}-ids"))).ids
    except ClientError as error:
        raise from_client(error, _NAMES) from None
    return replace(question, prompt=Ask("", {}, input_ids=ids, previews=question.prompt.previews)), len(ids)


# ---------------------------------------------------------------- what is answered


@dataclass
class _Content:
    """The blocks of an answer as they grow, and the events that tell of it."""

    thinking: bool  # whether it is told
    blocks: list[AnswerBlock] = field(default_factory=list)
    _open: AnswerBlock | None = None  # the last one, while it may grow
    _arguments: str = ""  # of the call that is open

    def read(self, event: Event | Ended) -> list[Told]:
        """There is at least one block in an answer."""
        return list(self._read(event))

    def _read(self, event: Event | Ended) -> Iterator[Told]:
        match event:
            case ReasoningDelta(text):
                if self.thinking:
                    yield from self._begin(AnswerThinking())
                    assert isinstance(self._open, AnswerThinking)
                    self._open.thinking += text
                    yield self._delta("thinking_delta", thinking=text)
            case ContentDelta(text):
                yield from self._begin(AnswerText())
                assert isinstance(self._open, AnswerText)
                self._open.text += text
                yield self._delta("text_delta", text=text)
            case ToolCallStart(_, id_, name):
                yield from self._begin(AnswerToolUse(id="toolu_" + id_.removeprefix("call_"), name=name))
            case ToolCallArguments(_, json_text):
                self._arguments += json_text
                yield self._delta("input_json_delta", partial_json=json_text)
            case ToolCallEnd():
                yield from self._end()
            case Ended():
                if not self.blocks:
                    yield from self._begin(AnswerText())
                yield from self._end()

    def _begin(self, block: AnswerBlock) -> Iterator[Told]:
        """A call is always a new block, text goes on in one that is open."""
        if type(self._open) is type(block):
            return
        yield from self._end()
        self.blocks.append(block)
        self._open = block
        yield "content_block_start", {"index": len(self.blocks) - 1, "content_block": block.model_dump()}

    def _end(self) -> Iterator[Told]:
        block, self._open = self._open, None
        if block is None:
            return
        if isinstance(block, AnswerThinking):
            block.signature = hashlib.sha256(block.thinking.encode()).hexdigest()
            yield self._delta("signature_delta", signature=block.signature)
        if isinstance(block, AnswerToolUse):
            block.input = from_json(self._arguments or "{}", allow_partial=True)
            self._arguments = ""
        yield "content_block_stop", {"index": len(self.blocks) - 1}

    def _delta(self, kind: str, **fields: str) -> Told:
        return "content_block_delta", {"index": len(self.blocks) - 1, "delta": {"type": kind, **fields}}


async def _whole(job: _Job, gateway: Gateway) -> MessageObject:
    content, end = _Content(job.thinking), None
    async with aclosing(job.events(gateway)) as events:
        async for _, event in events:
            if isinstance(event, Ended):
                end = event
            if not isinstance(event, Preview | Prefill):
                content.read(event)
    assert end is not None
    reason, sequence = _stop(end)
    return MessageObject(
        id=job.id,
        model=job.body.model,
        content=content.blocks,
        stop_reason=reason,
        stop_sequence=sequence,
        usage=_usage(end.done),
    )


async def _stream(job: _Job, gateway: Gateway) -> AsyncGenerator[bytes]:
    content = _Content(job.thinking)
    begun = False
    try:
        question, input_tokens = await _counted(gateway, job.question, job.id)
        job = replace(job, question=question)
        async with aclosing(job.events(gateway)) as events:
            async for _, event in events:
                if not begun:
                    begun = True
                    yield _told("message_start", message=_started(job, input_tokens).model_dump())
                    yield _told("ping")
                if isinstance(event, Preview | Prefill):
                    yield _told("ping", diffusing=diffusing(0, event))
                    continue
                for name, fields in content.read(event):
                    yield _told(name, **fields)
                if isinstance(event, Ended):
                    reason, sequence = _stop(event)
                    delta = {"stop_reason": reason, "stop_sequence": sequence}
                    yield _told("message_delta", delta=delta, usage=_usage(event.done).model_dump())
                    yield _told("message_stop")
    except ApiError as error:
        if not begun:
            raise
        gateway.metrics.failures.labels(error.code or error.type).inc()
        yield sse.named("error", error.anthropic_body())


def _told(event: str, **fields: Any) -> bytes:
    return sse.named(event, {"type": event, **fields})


def _started(job: _Job, input_tokens: int) -> MessageObject:
    counts = MessagesUsage(input_tokens=input_tokens, output_tokens=0)
    return MessageObject(
        id=job.id, model=job.body.model, content=[], stop_reason=None, stop_sequence=None, usage=counts
    )


def _stop(end: Ended) -> tuple[StopReason, str | None]:
    match end.finish_reason:
        case "length":
            return "max_tokens", None
        case "tool_calls":
            return "tool_use", None
        case "stop" if isinstance(end.stop_reason, str):
            return "stop_sequence", end.stop_reason
    return "end_turn", None


def _usage(done: Done) -> MessagesUsage:
    figures = done.statistics
    return MessagesUsage(
        input_tokens=figures.num_input_tokens - figures.prefix_tokens,
        cache_read_input_tokens=figures.prefix_tokens,
        output_tokens=figures.num_output_tokens,
        denoising_steps=figures.denoising_steps,
    )
