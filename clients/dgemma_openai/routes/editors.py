"""/v1/fim/completions and /v1/edit/completions, which editors ask for. Knows no tensor and no marker of the model's.

Requests are in the forms of Inception's API, and so is the first one's answer, which has Mistral's form as well. The
second is a chat: the code to be rewritten is the draft of the answer. What it answers is the new code alone, without a
fence; a client that looks for the code in a fence, as Continue's provider for Mercury does, cannot read it.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from dgemma_client.errors import ClientError
from dgemma_openai import sse
from dgemma_openai.answers import length, parameters, unless_left, usage
from dgemma_openai.backend import Ask
from dgemma_openai.errors import ApiError, from_client, invalid
from dgemma_openai.gateway import Gateway, OpenGatewayDep, new_id
from dgemma_openai.parsing.events import collect
from dgemma_openai.routes.completions import NAMES, Job, make_job, stream, whole
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
_CONTENT = "messages[0].content"
_EDIT_NAMES = {"text_input": "messages", "draft_text": _CONTENT}  # Triton's inputs -> this API's
_OPEN, _CLOSE, _CURSOR, _FENCE = "<|code_to_edit|>", "<|/code_to_edit|>", "<|cursor|>", "```"
_TASK = (
    "Rewrite the code between <|code_to_edit|> and <|/code_to_edit|> as its author is about to, judging by the edit "
    "history and the code around it. Answer with the whole new text of that code and nothing else."
)


@router.post("/v1/fim/completions", response_model=FimCompletion, responses={400: {"model": ErrorBody}})
async def fim_completions(body: FimRequest, request: Request, gateway: OpenGatewayDep) -> Response | FimCompletion:
    asked = _as_completion(body)
    if body.suffix and not body.prompt:  # the cursor is where the file begins
        gateway.check_model(body.model)
        asked = asked.model_copy(update={"prompt": await _start(gateway)})
    job = await make_job(asked, gateway, as_chat=True)
    if body.stream:
        return await sse.event_stream(stream(job, gateway), gateway.settings.keep_alive_s)
    return await unless_left(request, _fim(job, gateway))


async def _start(gateway: Gateway) -> list[int]:
    """The tokens that every prompt begins with."""
    try:
        return list((await gateway.backend.tokenize(Ask(new_id("cmpl"), {}, text="\n"))).ids[:-1])
    except ClientError as error:
        raise from_client(error, NAMES) from None


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
    code, closed, _ = text.partition(_OPEN)[2].partition(_CLOSE)
    if not closed:
        raise invalid(_CONTENT, f"must have the code between {_OPEN} and {_CLOSE}")
    code = code.removeprefix("\n").removesuffix("\n").replace(_CURSOR, "")
    return await unless_left(request, _edit(body, text, code, gateway))


async def _edit(body: EditRequest, text: str, code: str, gateway: Gateway) -> EditCompletion:
    most, name = length(body)
    facts = await gateway.facts()
    id_ = new_id("edit")
    messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": text}]
    question = Question(Ask("", {}, messages=messages), trimmed=False)  # code may begin with an indentation
    draft: dict[str, Any] = {"draft_text": code} if code and body.drafter in (None, "auto") else {}
    asked = parameters(body, most, *body.seeds(1), **draft)
    found: list[Any] = []
    try:
        async with aclosing(answers(gateway, question, id_, [asked], {**_EDIT_NAMES, "max_tokens": name})) as events:
            async for _, event in events:
                found.append(event)
    except ApiError as error:
        if error.param != _CONTENT:
            raise
        said = error.message.removeprefix(f"{_CONTENT}: ")
        raise replace(error, message=f"{_CONTENT}: the code to edit {said}") from None
    end = found.pop()
    assert isinstance(end, Ended)
    reason: Literal["stop", "length"] = "length" if end.finish_reason == "length" else "stop"
    message = Text(content=_new_code(collect(found).content, code, cut=reason == "length"))
    return EditCompletion(
        id=id_,
        created=int(time.time()),
        model=body.model,
        choices=[EditChoice(index=0, message=message, finish_reason=reason)],
        usage=usage([end.done], prompts=1),
        system_fingerprint=facts.fingerprint,
    )


def _new_code(answer: str, code: str, *, cut: bool) -> str:
    """The answer without what is not code: a fence around it, and what the prompt marks code with.

    Of an answer that was cut, the end of fence or tags may be missing.
    """
    if not code.lstrip().startswith(_FENCE):
        answer = _unfenced(answer, cut)
    text = answer.strip()
    if text.startswith(_OPEN) and (text.endswith(_CLOSE) or cut):
        answer = text.removeprefix(_OPEN).removesuffix(_CLOSE).removeprefix("\n").removesuffix("\n")
    return answer.replace(_CURSOR, "")


def _unfenced(answer: str, cut: bool) -> str:
    """What stands in the fence that is around the whole answer; the answer itself where a fence may be code."""
    first, _, rest = answer.strip().partition("\n")
    if not first.startswith(_FENCE) or "`" in first.removeprefix(_FENCE):
        return answer
    *inner, last = rest.split("\n")
    if last.strip() != _FENCE:
        if not cut:
            return answer
        inner.append(last)
    return answer if any(line.lstrip().startswith(_FENCE) for line in inner) else "\n".join(inner)
