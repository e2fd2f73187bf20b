"""/v1/completions: text after a prompt as it is, without a chat template. Knows no tensor."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from dgemma_client import Delta, Done, Event, Prefill, Preview
from dgemma_client.errors import ClientError
from dgemma_openai import sse
from dgemma_openai.answers import End, check_stream_only, parameters, unless_left, usage
from dgemma_openai.backend import Ask
from dgemma_openai.diffusing import diffusing
from dgemma_openai.errors import from_client, invalid
from dgemma_openai.gateway import Gateway, OpenGatewayDep, new_id
from dgemma_openai.schemas.base import ErrorBody
from dgemma_openai.schemas.completions import Completion, CompletionChoice, CompletionRequest
from dgemma_openai.strict_json import JsonRoute

router = APIRouter(tags=["generation"], route_class=JsonRoute)
NAMES = {"text_input": "prompt", "input_ids": "prompt", "stop_words": "stop"}  # Triton's inputs -> this API's


@dataclass(frozen=True)
class Job:
    """What all of a request's answers share."""

    id: str
    created: int
    model: str
    fingerprint: str
    prompts: int
    asks: Sequence[Ask]
    echoes: Sequence[str]  # of each answer, what goes in front of it
    body: CompletionRequest
    as_chat: bool = False  # each choice also has its text where a chat has it

    def head(self) -> dict[str, Any]:
        fields = {"id": self.id, "object": "text_completion", "created": self.created}
        return {**fields, "model": self.model, "system_fingerprint": self.fingerprint}


@router.post("/v1/completions", response_model=Completion, responses={400: {"model": ErrorBody}})
async def completions(body: CompletionRequest, request: Request, gateway: OpenGatewayDep) -> Response | Completion:
    job = await make_job(body, gateway)
    if body.stream:
        return await sse.event_stream(stream(job, gateway), gateway.settings.keep_alive_s)
    return await unless_left(request, whole(job, gateway))


async def make_job(body: CompletionRequest, gateway: Gateway, *, as_chat: bool = False) -> Job:
    """Raises ApiError."""
    gateway.check_model(body.model)
    check_stream_only(body)
    prompts = _prompts(body)
    n = body.n or 1
    gateway.check_choices(len(prompts) * n)
    facts = await gateway.facts()
    id_ = new_id("cmpl")
    more = {
        name: value
        for name in ("skip_special_tokens", "suffix", "template")
        if (value := getattr(body, name)) not in (None, "")
    }
    asks = [
        replace(
            prompt,
            request_id=f"{id_}-{number * n + index}",
            parameters=parameters(body, body.max_tokens, seed, **more),
            previews=bool(body.diffusing),
        )
        for number, prompt in enumerate(prompts)
        for index, seed in enumerate(body.seeds(n))
    ]
    echoes = await _echoes(gateway, prompts) if body.echo else [""] * len(prompts)
    echoes = [echo for echo in echoes for _ in range(n)]
    return Job(id_, int(time.time()), body.model, facts.fingerprint, len(prompts), asks, echoes, body, as_chat)


def _prompts(body: CompletionRequest) -> list[Ask]:
    """Asks with prompts alone."""
    given = body.prompt
    if isinstance(given, str):
        return [Ask("", {}, text=given)]
    if not given:
        raise invalid("prompt", "is empty; send at least one prompt")
    texts = [item for item in given if isinstance(item, str)]
    if texts:
        return [Ask("", {}, text=text) for text in texts]
    ids = [item for item in given if isinstance(item, int)]
    if ids:
        return [Ask("", {}, input_ids=ids)]
    return [Ask("", {}, input_ids=item) for item in given if isinstance(item, list)]


async def _echoes(gateway: Gateway, prompts: Sequence[Ask]) -> list[str]:
    try:
        return [ask.text if ask.text is not None else (await gateway.backend.tokenize(ask)).text for ask in prompts]
    except ClientError as error:
        raise from_client(error, NAMES) from None


async def whole(job: Job, gateway: Gateway) -> Completion:
    """All answers, when they are done; raises ApiError."""
    texts = list(job.echoes)
    dones: dict[int, Done] = {}
    try:
        async with aclosing(gateway.backend.events(job.asks)) as events:
            async for index, event in events:
                if isinstance(event, Delta):
                    texts[index] += event.text
                elif isinstance(event, Done):
                    dones[index] = event
    except ClientError as error:
        raise from_client(error, NAMES) from None
    ends = [End.of(dones[index]) for index in range(len(job.asks))]
    choices = [
        CompletionChoice(index=index, text=text, finish_reason=end.finish_reason, stop_reason=end.stop_reason)
        for index, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    counts = usage([dones[index] for index in range(len(job.asks))], job.prompts)
    return Completion(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=choices,
        usage=counts,
        system_fingerprint=job.fingerprint,
    )


async def stream(job: Job, gateway: Gateway) -> AsyncGenerator[bytes]:
    """As they come; raises ApiError before the first one."""
    dones: dict[int, Done] = {}
    begun = False
    try:
        async with aclosing(gateway.backend.events(job.asks)) as events:
            async for index, event in events:
                if not begun:
                    begun = True
                    for number, echo in enumerate(job.echoes):
                        if echo:
                            yield sse.data({**job.head(), "choices": [_choice(job, number, echo)]})
                if isinstance(event, Done):
                    dones[index] = event
                if (chunk := _chunk(job, index, event)) is not None:
                    yield sse.data(chunk)
    except ClientError as error:
        refusal = from_client(error, NAMES)
        if not begun:
            raise refusal from None
        gateway.metrics.failures.labels(refusal.code or refusal.type).inc()
        yield sse.data(refusal.body())
        return
    if job.body.stream_options is not None and job.body.stream_options.include_usage:
        counts = usage([dones[index] for index in range(len(job.asks))], job.prompts)
        yield sse.data({**job.head(), "choices": [], "usage": counts.model_dump()})
    yield sse.DONE


def _chunk(job: Job, index: int, event: Event) -> dict[str, Any] | None:
    match event:
        case Delta(text=text):
            return {**job.head(), "choices": [_choice(job, index, text)]} if text else None
        case Done():
            return {**job.head(), "choices": [_choice(job, index, "", End.of(event))]}
        case Preview() | Prefill():
            return {**job.head(), "choices": [_choice(job, index, "")], "diffusing": diffusing(index, event)}


def _choice(job: Job, index: int, text: str, end: End | None = None) -> dict[str, Any]:
    finish_reason, stop_reason = (end.finish_reason, end.stop_reason) if end else (None, None)
    return {
        **({"delta": {"content": text}} if job.as_chat else {}),
        "index": index,
        "text": text,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "logprobs": None,
    }
