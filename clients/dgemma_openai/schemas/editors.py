"""Bodies of what editors ask for: /v1/fim/completions and /v1/edit/completions. Knows no route."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from dgemma_openai.schemas.base import (
    Body,
    ChatLength,
    Diffusing,
    Generation,
    Nothing,
    Off,
    Seed,
    StreamOptions,
    Usage,
    refused,
)
from dgemma_openai.schemas.chat import Content
from dgemma_openai.schemas.completions import CompletionChoice, Suffix


class FimRequest(Generation):
    """What stands before the cursor, and what stands behind it."""

    prompt: str
    suffix: Suffix | None = None
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    stream_options: StreamOptions | None = None
    random_seed: Annotated[Seed | None, Field(description="Mistral's name of seed.")] = None


class Text(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class FimChoice(CompletionChoice):
    """The text twice: where Inception's API has it, and where Mistral's has it."""

    message: Text


class FimCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[FimChoice]
    usage: Usage
    system_fingerprint: str


class TextDelta(BaseModel):
    content: str


class FimChunkChoice(CompletionChoice):
    delta: TextDelta


class FimChunk(BaseModel):
    """One event of a stream; the text twice, as in FimChoice."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[FimChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
    diffusing: Diffusing | None = None


class EditMessage(Body):
    role: Literal["user"]
    content: Content


class EditRequest(Generation, ChatLength):
    """One message with the code around the cursor between Inception's tags."""

    messages: Annotated[
        list[EditMessage],
        Field(
            min_length=1,
            max_length=1,
            description="Its text has the code to rewrite between <|code_to_edit|> and <|/code_to_edit|>.",
        ),
    ]
    n: Annotated[Annotated[int, Field(ge=1, le=1)] | None, *refused("1")] = None
    stop: Annotated[Annotated[list[str], Field(max_length=0)] | None, *refused("[]")] = None
    stream: Off = None
    stream_options: Nothing = None
    diffusing: Off = None
    ignore_eos: Off = None


class EditChoice(BaseModel):
    index: int
    message: Text
    finish_reason: Literal["stop", "length"]


class EditCompletion(BaseModel):
    id: str
    object: Literal["edit.completion"] = "edit.completion"
    created: int
    model: str
    choices: list[EditChoice]
    usage: Usage
    system_fingerprint: str
