"""/v1/responses, without state. Knows no tensor and no marker of the model's format."""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from dgemma_client import Prefill, Preview
from dgemma_client.errors import ClientError
from dgemma_client.requests import Parameters
from dgemma_openai import sse
from dgemma_openai.answers import check_stream_only, parameters, unless_left, usage
from dgemma_openai.backend import Ask
from dgemma_openai.diffusing import diffusing
from dgemma_openai.errors import ApiError, from_unsupported
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
from dgemma_openai.parsing.history_responses import responses_history
from dgemma_openai.parsing.tools import responses_tools
from dgemma_openai.schemas.base import ErrorBody
from dgemma_openai.schemas.responses import (
    ChosenFunction,
    DeclaredTool,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningOptions,
    ReasoningText,
    ResponseFailure,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    SummaryText,
    UsedChoice,
    UsedReasoning,
)
from dgemma_openai.strict_json import JsonRoute
from dgemma_openai.turns import AnswerEvent, Ended, Question, answers

_log = logging.getLogger(__name__)
router = APIRouter(tags=["generation"], route_class=JsonRoute)
# Triton's inputs -> this API's
_NAMES = {"messages": "input", "text_input": "input", "input_ids": "input", "max_tokens": "max_output_tokens"}
_STREAM = {
    "schema": {
        "type": "string",
        "description": "With `stream`: server-sent events with the names and members of OpenAI's, each with its `type` "
        "and `sequence_number`. With `diffusing` also response.diffusing, whose `diffusing` is a Diffusing.",
    }
}

Told = tuple[str, dict[str, Any]]  # an event's name, and what it says beside that


@dataclass(frozen=True)
class _Job:
    id: str
    created: int
    body: ResponsesRequest
    question: Question
    parameters: Parameters

    @property
    def summary(self) -> bool:
        return self.body.reasoning is not None and self.body.reasoning.summary is not None

    def events(self, gateway: Gateway) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        return answers(gateway, self.question, self.id, [self.parameters], _NAMES)


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    responses={200: {"content": {"text/event-stream": _STREAM}}, 400: {"model": ErrorBody}},
)
async def responses(body: ResponsesRequest, request: Request, gateway: OpenGatewayDep) -> Response | ResponseObject:
    job = _job(body, gateway)
    if body.stream:
        return await sse.event_stream(_stream(job, gateway), gateway.settings.keep_alive_s)
    return await unless_left(request, _whole(job, gateway))


# ---------------------------------------------------------------- what is asked


def _job(body: ResponsesRequest, gateway: Gateway) -> _Job:
    gateway.check_model(body.model)
    check_stream_only(body)
    return _Job(
        id=f"resp_{uuid.uuid4().hex}",
        created=int(time.time()),
        body=body,
        question=_question(body),
        parameters=parameters(body, body.max_output_tokens, body.seeds(1)[0]),
    )


def _question(body: ResponsesRequest) -> Question:
    items = body.input if isinstance(body.input, str) else [item.model_dump(exclude_none=True) for item in body.input]
    tools = [tool.model_dump(exclude_none=True, exclude={"strict"}) for tool in body.tools or ()]
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, ChosenFunction) else body.tool_choice
    effort = None if body.reasoning is None else body.reasoning.effort
    try:
        messages = responses_history(items, body.instructions)
        plan = responses_tools(tools, choice, body.parallel_tool_calls)
    except Unsupported as error:
        raise from_unsupported(error) from None
    prompt = Ask("", {}, messages=messages, tools=plan.declared or None, previews=bool(body.diffusing))
    return Question(replace(prompt, enable_thinking=effort not in (None, "none", "minimal")), plan)


# ---------------------------------------------------------------- what is answered


@dataclass(frozen=True)
class _Texts:
    """How events name an item's only text and the part that holds it."""

    text: str
    part: str
    index: str
    more: dict[str, Any]


_MESSAGE = _Texts("response.output_text", "response.content_part", "content_index", {"logprobs": []})
_THINKING = _Texts("response.reasoning_text", "response.content_part", "content_index", {})
_SUMMARY = _Texts("response.reasoning_summary_text", "response.reasoning_summary_part", "summary_index", {})


class _Output:
    """The items of an answer as they grow, and the events that tell of it."""

    def __init__(self, summary: bool) -> None:
        self.items: list[OutputItem] = []
        self.reasoning = ""
        self._summary = summary
        self._open: OutputItem | None = None  # the last one, while it may grow

    def read(self, event: Event | Ended) -> list[Told]:
        """There is at least one item in an answer."""
        return list(self._read(event))

    def _read(self, event: Event | Ended) -> Iterator[Told]:
        match event:
            case ReasoningDelta(text):
                self.reasoning += text
                yield from self._text(ReasoningItem, text)
            case ContentDelta(text):
                yield from self._text(MessageItem, text)
            case ToolCallStart(_, id_, name):
                yield from self._begin(FunctionCallItem(id=_id("fc"), call_id=id_, name=name))
            case ToolCallArguments(_, json_text):
                assert isinstance(self._open, FunctionCallItem)
                self._open.arguments += json_text
                yield self._told("response.function_call_arguments.delta", delta=json_text)
            case ToolCallEnd(_, complete):
                yield from self._end("completed" if complete else "incomplete")
            case Ended():
                if not self.items:
                    yield from self._text(MessageItem, "")
                yield from self._end(_status(event))

    def _text(self, kind: type[ReasoningItem] | type[MessageItem], text: str) -> Iterator[Told]:
        if not isinstance(self._open, kind):
            item = kind(id=_id("msg" if kind is MessageItem else "rs"))
            yield from self._begin(item)
            _add_part(item, self._summary)
            names, part = _part(item)
            yield self._told(f"{names.part}.added", {names.index: 0}, part=part.model_dump())
        assert isinstance(self._open, ReasoningItem | MessageItem)
        names, part = _part(self._open)
        part.text += text
        if text:
            yield self._told(f"{names.text}.delta", {names.index: 0, **names.more}, delta=text)

    def _begin(self, item: OutputItem) -> Iterator[Told]:
        yield from self._end("completed")
        self.items.append(item)
        self._open = item
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": item.model_dump()}

    def _end(self, status: Literal["completed", "incomplete"]) -> Iterator[Told]:
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        if isinstance(item, FunctionCallItem):
            done = "response.function_call_arguments.done"
            yield self._told(done, arguments=item.arguments, name=item.name)
        else:
            names, part = _part(item)
            yield self._told(f"{names.text}.done", {names.index: 0, **names.more}, text=part.text)
            yield self._told(f"{names.part}.done", {names.index: 0}, part=part.model_dump())
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item.model_dump()}

    def _told(self, event: str, more: dict[str, Any] | None = None, **fields: Any) -> Told:
        index = len(self.items) - 1
        return event, {"item_id": self.items[index].id, "output_index": index, **(more or {}), **fields}


def _add_part(item: ReasoningItem | MessageItem, summary: bool) -> None:
    if isinstance(item, MessageItem):
        item.content = [OutputText()]
    elif summary:
        item.summary = [SummaryText()]
    else:
        item.content = [ReasoningText()]


def _part(item: ReasoningItem | MessageItem) -> tuple[_Texts, SummaryText | ReasoningText | OutputText]:
    if isinstance(item, MessageItem):
        return _MESSAGE, item.content[0]
    return (_SUMMARY, item.summary[0]) if item.summary else (_THINKING, item.content[0])


async def _whole(job: _Job, gateway: Gateway) -> ResponseObject:
    output, end = _Output(job.summary), None
    async with aclosing(job.events(gateway)) as events:
        async for _, event in events:
            if isinstance(event, Ended):
                end = event
            if not isinstance(event, Preview | Prefill):
                output.read(event)
    assert end is not None
    return await _finished(job, gateway, output, end)


async def _stream(job: _Job, gateway: Gateway) -> AsyncGenerator[bytes]:
    output = _Output(job.summary)
    numbers = itertools.count()
    begun = False

    def told(name: str, fields: dict[str, Any]) -> bytes:
        return sse.named(name, {"type": name, "sequence_number": next(numbers), **fields})

    try:
        async with aclosing(job.events(gateway)) as events:
            async for _, event in events:
                if not begun:
                    begun = True
                    for name in ("response.created", "response.in_progress"):
                        yield told(name, {"response": _response(job, "in_progress", []).model_dump()})
                if isinstance(event, Preview | Prefill):
                    yield told("response.diffusing", {"diffusing": diffusing(0, event)})
                    continue
                for each in output.read(event):
                    yield told(*each)
                if isinstance(event, Ended):
                    answer = await _finished(job, gateway, output, event)
                    yield told(f"response.{answer.status}", {"response": answer.model_dump()})
    except ApiError as error:
        if not begun:
            raise
        gateway.metrics.failures.labels(error.code or error.type).inc()
        # Raw readers of the API know its members, official clients raise where there is an `error`.
        said = error.body()["error"]
        yield told("error", {"code": error.code, "message": error.message, "param": error.param, "error": said})
        for item in output.items:
            item.status = "completed" if item.status == "completed" else "incomplete"
        failure = ResponseFailure(message=error.message)
        yield told("response.failed", {"response": _response(job, "failed", output.items, error=failure).model_dump()})


def _status(end: Ended) -> Literal["completed", "incomplete"]:
    return "incomplete" if end.finish_reason == "length" else "completed"


async def _finished(job: _Job, gateway: Gateway, output: _Output, end: Ended) -> ResponseObject:
    counts = usage([end.done], prompts=1)
    reasoning_tokens = await _count(gateway, job.id, output.reasoning)
    told = ResponseUsage(
        input_tokens=counts.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=counts.prompt_tokens_details.cached_tokens),
        output_tokens=counts.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=min(reasoning_tokens, counts.completion_tokens)),
        total_tokens=counts.total_tokens,
        denoising_steps=counts.denoising_steps,
    )
    return _response(job, _status(end), output.items, counts=told)


async def _count(gateway: Gateway, request_id: str, text: str) -> int:
    """Tokens of thinking, without its markers; 0 where the server cannot count any more, since the answer is there."""
    if not text:
        return 0
    try:
        tokens = await gateway.backend.tokenize(Ask(f"{request_id}-reasoning", {}, text=text))
    except ClientError as error:
        _log.warning("request %s: its thinking was not counted (%s)", request_id, error)
        return 0
    return len(tokens.ids) - 1  # the start token


def _response(
    job: _Job,
    status: Literal["in_progress", "completed", "incomplete", "failed"],
    output: list[OutputItem],
    *,
    counts: ResponseUsage | None = None,
    error: ResponseFailure | None = None,
) -> ResponseObject:
    body, reasoning = job.body, job.body.reasoning or ReasoningOptions()
    tools = [
        DeclaredTool(name=tool.name, description=tool.description, parameters=tool.parameters)
        for tool in body.tools or ()
    ]
    choice = body.tool_choice
    return ResponseObject(
        id=job.id,
        created_at=job.created,
        completed_at=int(time.time()) if status == "completed" else None,
        status=status,
        error=error,
        incomplete_details=IncompleteDetails() if status == "incomplete" else None,
        model=body.model,
        output=output,
        usage=counts,
        instructions=body.instructions,
        tools=tools,
        tool_choice=UsedChoice(name=choice.name) if isinstance(choice, ChosenFunction) else choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        reasoning=UsedReasoning(effort=reasoning.effort, summary=reasoning.summary),
        metadata=body.metadata or {},
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
    )


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
