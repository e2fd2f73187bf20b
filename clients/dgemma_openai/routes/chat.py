"""/v1/chat/completions. Knows no tensor and no marker of the model's format."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from dgemma_client import Prefill, Preview
from dgemma_client.requests import ChatOptions, Parameters
from dgemma_openai import sse
from dgemma_openai.answers import check_stream_only, length, parameters, unless_left, usage
from dgemma_openai.backend import Ask
from dgemma_openai.diffusing import diffusing
from dgemma_openai.errors import ApiError, from_unsupported, invalid
from dgemma_openai.gateway import Gateway, OpenGatewayDep, new_id
from dgemma_openai.parsing.errors import Unsupported
from dgemma_openai.parsing.events import (
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    collect,
)
from dgemma_openai.parsing.history import chat_history
from dgemma_openai.parsing.tools import chat_tools
from dgemma_openai.schemas.base import ErrorBody, Usage
from dgemma_openai.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    NamedTool,
    Tool,
    ToolCallFunction,
    ToolCallItem,
)
from dgemma_openai.strict_json import JsonRoute
from dgemma_openai.turns import AnswerEvent, Ended, Question, answers

router = APIRouter(tags=["generation"], route_class=JsonRoute)
_NAMES = {  # Triton's inputs -> this API's
    "text_input": "messages",
    "stop_words": "stop",
    "draft_text": "prediction",
}
_THINKING = frozenset({"low", "medium", "high"})


@dataclass(frozen=True)
class _Job:
    """What all of a request's answers share."""

    id: str
    created: int
    model: str
    fingerprint: str
    question: Question
    parameters: list[Parameters]  # of each answer
    names: dict[str, str]
    usage: bool  # whether a stream tells counts
    reasoning: bool  # whether thinking is sent

    def events(self, gateway: Gateway) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        return answers(gateway, self.question, self.id, self.parameters, self.names)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return sse.data({**head, "system_fingerprint": self.fingerprint, "choices": choices, **more})


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={400: {"model": ErrorBody}})
async def chat_completions(body: ChatRequest, request: Request, gateway: OpenGatewayDep) -> Response | ChatCompletion:
    job = await _job(body, gateway)
    if body.stream:
        return await sse.event_stream(_stream(job, gateway), gateway.settings.keep_alive_s)
    return await unless_left(request, _whole(job, gateway))


async def _job(body: ChatRequest, gateway: Gateway) -> _Job:
    gateway.check_model(body.model)
    check_stream_only(body)
    count = body.n or 1
    gateway.check_choices(count)
    most, name = length(body)
    question = _question(body)
    predicted = _predicted(body, question)
    facts = await gateway.facts()
    return _Job(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=body.model,
        fingerprint=facts.fingerprint,
        question=question,
        parameters=[parameters(body, most, seed, **predicted) for seed in body.seeds(count)],
        names={**_NAMES, "max_tokens": name},
        usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        reasoning=body.include_reasoning is not False,
    )


def _predicted(body: ChatRequest, question: Question) -> dict[str, Any]:
    """As a draft, which is of the output from its first token; so the output must begin with the answer's text."""
    if body.prediction is None:
        return {}
    content = body.prediction.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    if not text:
        return {}
    if question.prompt.enable_thinking:
        raise invalid("prediction", "is of the answer, but thinking comes first; leave it out or turn thinking off")
    if question.plan.prefix:
        raise invalid("prediction", "is of a text, but tool_choice demands a call; leave it out or send auto or none")
    return {"draft_text": text}


# ---------------------------------------------------------------- what is asked


def _question(body: ChatRequest) -> Question:
    effort = body.reasoning_effort
    prompt = chat_prompt(
        body.messages,
        body.chat_template_kwargs,
        body.add_generation_prompt,
        body.continue_final_message,
        thinking=None if effort is None else effort in _THINKING,
        previews=bool(body.diffusing),
    )
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    try:
        plan = chat_tools(declared(body.tools), choice, body.parallel_tool_calls)
    except Unsupported as error:
        raise from_unsupported(error) from None
    if plan.prefix and (body.continue_final_message or body.add_generation_prompt is False):
        raise invalid("tool_choice", "demands a call, which needs a turn of its own; leave continue_final_message out")
    return Question(replace(prompt, tools=plan.declared or None), plan, raw=bool(body.ignore_eos))


def declared(tools: Iterable[Tool] | None) -> list[dict[str, Any]] | None:
    """As the client wrote them."""
    if tools is None:
        return None
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def chat_prompt(
    messages: Iterable[ChatMessage],
    template_kwargs: dict[str, Any] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    *,
    thinking: bool | None = None,
    previews: bool = False,
) -> Ask:
    """The prompt alone; raises ApiError."""
    variables = dict(template_kwargs or {})
    in_template = variables.pop("enable_thinking", None)
    if in_template is not None and not isinstance(in_template, bool):
        raise invalid("chat_template_kwargs.enable_thinking", f"must be true or false, got {in_template!r}")
    if thinking is not None and in_template is not None and thinking != in_template:
        raise invalid("reasoning_effort", "contradicts chat_template_kwargs.enable_thinking; give one of the two")
    options: dict[str, Any] = {"chat_template_kwargs": variables} if variables else {}
    for name, value in (
        ("add_generation_prompt", add_generation_prompt),
        ("continue_final_message", continue_final_message),
    ):
        if value is not None:
            options[name] = value
    try:
        history = chat_history([_as_sent(message) for message in messages])
    except Unsupported as error:
        raise from_unsupported(error) from None
    chat: ChatOptions = options  # type: ignore[assignment]  # the names are those above
    return Ask(
        "",
        {},
        messages=history,
        enable_thinking=bool(thinking or in_template),
        chat=chat or None,
        previews=previews,
    )


def _as_sent(message: ChatMessage) -> dict[str, Any]:
    """Without what says nothing."""
    empty = {"refusal", "annotations", "audio", "function_call"}
    return message.model_dump(exclude_none=True, exclude=empty)


# ---------------------------------------------------------------- what is answered


@dataclass
class _Answers:
    """What came of each answer."""

    events: list[list[Any]]
    ends: dict[int, Ended] = field(default_factory=dict)

    def usage(self) -> Usage:
        return usage([self.ends[index].done for index in range(len(self.events))], prompts=1)


async def _whole(job: _Job, gateway: Gateway) -> ChatCompletion:
    found = _Answers([[] for _ in job.parameters])
    async with aclosing(job.events(gateway)) as events:
        async for index, event in events:
            if isinstance(event, Ended):
                found.ends[index] = event
            else:
                found.events[index].append(event)
    choices = [_choice(job, index, found) for index in range(len(found.events))]
    return ChatCompletion(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=choices,
        usage=found.usage(),
        system_fingerprint=job.fingerprint,
    )


def _choice(job: _Job, index: int, found: _Answers) -> ChatChoice:
    turn, end = collect(found.events[index]), found.ends[index]
    calls = [
        ToolCallItem(id=call.id, function=ToolCallFunction(name=call.name, arguments=call.arguments))
        for call in turn.calls
    ]
    message = AnswerMessage(
        content=turn.content or (None if calls else ""),
        reasoning_content=(turn.reasoning or None) if job.reasoning else None,
        tool_calls=calls or None,
    )
    return ChatChoice(index=index, message=message, finish_reason=end.finish_reason, stop_reason=end.stop_reason)


async def _stream(job: _Job, gateway: Gateway) -> AsyncGenerator[bytes]:
    found = _Answers([[] for _ in job.parameters])
    begun = False
    try:
        async with aclosing(job.events(gateway)) as events:
            async for index, event in events:
                if not begun:
                    begun = True
                    for number in range(len(found.events)):
                        yield job.chunk([_delta(number, {"role": "assistant", "content": ""})])
                if isinstance(event, Ended):
                    found.ends[index] = event
                if (chunk := _chunk(job, index, event)) is not None:
                    yield chunk
    except ApiError as error:
        if not begun:
            raise
        gateway.metrics.failures.labels(error.code or error.type).inc()
        yield sse.data(error.body())
        return
    if job.usage:
        yield job.chunk([], usage=found.usage().model_dump())
    yield sse.DONE


def _chunk(job: _Job, index: int, event: AnswerEvent) -> bytes | None:
    match event:
        case ContentDelta(text):
            return job.chunk([_delta(index, {"content": text})])
        case ReasoningDelta(text):
            return job.chunk([_delta(index, {"reasoning_content": text})]) if job.reasoning else None
        case ToolCallStart(number, id_, name):
            call = {"index": number, "id": id_, "type": "function", "function": {"name": name, "arguments": ""}}
            return job.chunk([_delta(index, {"tool_calls": [call]})])
        case ToolCallArguments(number, json_text):
            return job.chunk([_delta(index, {"tool_calls": [{"index": number, "function": {"arguments": json_text}}]})])
        case Ended():
            return job.chunk([_delta(index, {}, event)])
        case Preview() | Prefill():
            return job.chunk([_delta(index, {})], diffusing=diffusing(index, event))
        case ToolCallEnd():
            return None


def _delta(index: int, delta: dict[str, Any], end: Ended | None = None) -> dict[str, Any]:
    finish_reason, stop_reason = (end.finish_reason, end.stop_reason) if end else (None, None)
    return {
        "index": index,
        "delta": delta,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "logprobs": None,
    }
