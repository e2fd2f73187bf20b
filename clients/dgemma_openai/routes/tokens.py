"""/tokenize and /detokenize, as vLLM has them: by the server's own tokenizer and chat template. Knows no generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from dgemma_client import Tokens
from dgemma_client.errors import ClientError
from dgemma_openai.backend import Ask
from dgemma_openai.errors import from_client, invalid
from dgemma_openai.gateway import Gateway, OpenGatewayDep, new_id
from dgemma_openai.routes.chat import chat_prompt, declared
from dgemma_openai.schemas.base import Body, Off
from dgemma_openai.schemas.chat import ChatMessage, Tool
from dgemma_openai.schemas.completions import TokenId
from dgemma_openai.strict_json import JsonRoute

router = APIRouter(tags=["tokens"], route_class=JsonRoute)
_NAMES = {"text_input": "prompt"}  # Triton's inputs -> this API's


class TokenizeRequest(Body):
    """Exactly one of prompt and messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage] | None, Field(min_length=1)] = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: Annotated[
        Literal[True] | None, Field(description="Only true: the start token is put in front.")
    ] = None
    return_token_strs: Off = None


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(min_length=1)]


class Detokenized(BaseModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, gateway: OpenGatewayDep) -> Tokenized:
    facts = await gateway.facts()
    tokens = await _ask(gateway, body.model, _prompt(body), _NAMES)
    return Tokenized(tokens=list(tokens.ids), count=len(tokens.ids), max_model_len=facts.max_model_len)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, gateway: OpenGatewayDep) -> Detokenized:
    tokens = await _ask(gateway, body.model, Ask("", {}, input_ids=body.tokens), {"input_ids": "tokens"})
    return Detokenized(prompt=tokens.text)


def _prompt(body: TokenizeRequest) -> Ask:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give exactly one of prompt and messages")
    if body.messages is None:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise invalid(name, "is for messages; leave it out beside prompt")
        return Ask("", {}, text=body.prompt)
    prompt = chat_prompt(
        body.messages, body.chat_template_kwargs, body.add_generation_prompt, body.continue_final_message
    )
    return replace(prompt, tools=declared(body.tools))


async def _ask(gateway: Gateway, model: str | None, prompt: Ask, names: Mapping[str, str]) -> Tokens:
    if model is not None:
        gateway.check_model(model)
    try:
        return await gateway.backend.tokenize(replace(prompt, request_id=new_id("tok")))
    except ClientError as error:
        raise from_client(error, names) from None
