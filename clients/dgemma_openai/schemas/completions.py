"""Bodies of /v1/completions. Knows no route."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dgemma_openai.schemas.base import Diffusing, Generation, Nothing, Off, One, StreamOptions, Usage, Zero

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Suffix = Annotated[str, Field(description="What comes behind the answer; the answer is as long as fits between.")]


class CompletionRequest(Generation):
    """Text or token ids to go on with, without a chat template."""

    prompt: Annotated[
        str | list[str] | list[TokenId] | list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(description="One or several; each gets n answers, in order."),
    ]
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    stream_options: StreamOptions | None = None
    echo: Annotated[bool | None, Field(description="Put the prompt in front of the answer.")] = None
    skip_special_tokens: bool | None = None
    suffix: Suffix | None = None
    template: Annotated[
        list[Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=1, lt=2**31)]] | None,
        Field(min_length=1, description="The answer: fixed texts, and holes as numbers of tokens to be filled."),
    ] = None
    best_of: One = None
    logprobs: Nothing = None
    prompt_logprobs: Zero = None
    use_beam_search: Off = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | None = None
    logprobs: None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class CompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str
    diffusing: Diffusing | None = None
