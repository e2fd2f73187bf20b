"""/v1/fim/completions and /v1/edit/completions, which editors ask for. Knows no tensor and no marker of the model's.

Both are in the forms of Inception's API; the first answers in Mistral's as well. The second is a chat: the code to be
rewritten is the draft of the answer.
"""

from __future__ import annotations

import re
import time
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from dgemma_openai import sse
from dgemma_openai.answers import parameters, unless_left, usage
from dgemma_openai.backend import Ask
from dgemma_openai.errors import invalid
from dgemma_openai.gateway import Gateway, OpenGatewayDep, new_id
from dgemma_openai.parsing.events import collect
from dgemma_openai.routes.completions import Job, make_job, stream, whole
from dgemma_openai.schemas.base import ErrorBody
from dgemma_openai.schemas.completions import CompletionRequest
from dgemma_openai.schemas.editors import (
    EditChoice,
    EditCompletion,
    EditRequest,
    FimChoice,
    FimCompletion,
    FimRequest,
    Text,
)
from dgemma_openai.strict_json import JsonRoute
from dgemma_openai.turns import Ended, Question, answers

router = APIRouter(tags=["generation"], route_class=JsonRoute)
_EDIT_NAMES = {"text_input": "messages", "draft_text": "messages"}  # Triton's inputs -> this API's
_REGION = re.compile(r"<\|code_to_edit\|>\n?(.*?)\n?<\|/code_to_edit\|>", re.DOTALL)
_CURSOR = "<|cursor|>"
_FENCED = re.compile(r"\s*```[^\n`]*\n(.*?)\n?```\s*", re.DOTALL)
_TASK = (
    "Rewrite the code between <|code_to_edit|> and <|/code_to_edit|> as its author is about to, judging by the edit "
    "history and the code around it. Answer with the whole new text of that code and nothing else."
)


@router.post("/v1/fim/completions", response_model=FimCompletion, responses={400: {"model": ErrorBody}})
async def fim_completions(body: FimRequest, request: Request, gateway: OpenGatewayDep) -> Response | FimCompletion:
    job = await make_job(_as_completion(body), gateway, as_chat=True)
    if body.stream:
        return await sse.event_stream(stream(job, gateway), gateway.settings.keep_alive_s)
    return await unless_left(request, _fim(job, gateway))


def _as_completion(body: FimRequest) -> CompletionRequest:
    given = body.model_dump(exclude_unset=True, exclude={"random_seed"})
    if body.random_seed is not None:
        if body.seed not in (None, body.random_seed):
            raise invalid("random_seed", f"is {body.random_seed}, but seed is {body.seed}; give one of them")
        given["seed"] = body.random_seed
    return CompletionRequest.model_validate(given)


async def _fim(job: Job, gateway: Gateway) -> FimCompletion:
    found = await whole(job, gateway)
    choices = [FimChoice(**choice.model_dump(), message=Text(content=choice.text)) for choice in found.choices]
    return FimCompletion(**found.model_dump(exclude={"choices", "usage"}), choices=choices, usage=found.usage)


@router.post("/v1/edit/completions", response_model=EditCompletion, responses={400: {"model": ErrorBody}})
async def edit_completions(body: EditRequest, request: Request, gateway: OpenGatewayDep) -> EditCompletion:
    gateway.check_model(body.model)
    content = body.messages[0].content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    region = _REGION.search(text)
    if region is None:
        raise invalid("messages[0].content", "must have the code between <|code_to_edit|> and <|/code_to_edit|>")
    return await unless_left(request, _edit(body, text, region[1].replace(_CURSOR, ""), gateway))


async def _edit(body: EditRequest, text: str, code: str, gateway: Gateway) -> EditCompletion:
    facts = await gateway.facts()
    id_ = new_id("edit")
    messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": text}]
    draft: dict[str, Any] = {"draft_text": code} if code else {}
    asked = parameters(body, body.max_tokens, *body.seeds(1), **draft)
    found: list[Any] = []
    async with aclosing(
        answers(gateway, Question(Ask("", {}, messages=messages)), id_, [asked], _EDIT_NAMES)
    ) as events:
        async for _, event in events:
            found.append(event)
    end = found.pop()
    assert isinstance(end, Ended)
    answer = collect(found).content
    fenced = _FENCED.fullmatch(answer)
    message = Text(content=fenced[1] if fenced else answer)
    reason: Literal["stop", "length"] = "length" if end.finish_reason == "length" else "stop"
    return EditCompletion(
        id=id_,
        created=int(time.time()),
        model=body.model,
        choices=[EditChoice(index=0, message=message, finish_reason=reason)],
        usage=usage([end.done], prompts=1),
        system_fingerprint=facts.fingerprint,
    )
