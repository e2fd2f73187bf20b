"""Bodies of /v1/chat/completions. Knows no route."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from dgemma_openai.schemas.base import (
    Body,
    ChatLength,
    Diffusing,
    Generation,
    NoList,
    NoMap,
    Off,
    StreamOptions,
    Usage,
    Zero,
    refused,
)


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str  # JSON


class MessageToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: Annotated[str | None, Field(description="vLLM's name of reasoning_content.")] = None
    tool_calls: list[MessageToolCall] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: NoList = None
    audio: NoMap = None
    function_call: NoMap = None

    # what clients (LiteLLM, OpenRouter's) add to an answer that they send back; without effect
    id: str | None = None
    provider_specific_fields: dict[str, Any] | None = None
    reasoning_details: list[Any] | None = None
    thinking_blocks: list[Any] | None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema
    strict: Off = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    type: Annotated[Literal["text"], *refused("'text'; structured output is not there yet")]


class Prediction(Body):
    type: Literal["content"]
    content: Content


class ChatRequest(Generation, ChatLength):
    """OpenAI's, with vLLM's and our own extensions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: the answer ends after one call.")] = None
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high"] | None,
        Field(description="Thinking is on or off: anything but none and minimal turns it on."),
    ] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(description="For the template: enable_thinking.")] = (
        None
    )
    add_generation_prompt: bool | None = None
    continue_final_message: Annotated[bool | None, Field(description="Go on with the last message.")] = None
    include_reasoning: bool | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: TextFormat | None = None
    prediction: Annotated[
        Prediction | None,
        Field(
            description="A text that the answer repeats for the most part: a file to edit, say. "
            "Not with thinking or a tool_choice that demands a call, which the answer would begin with."
        ),
    ] = None
    store: Off = None
    logprobs: Off = None
    top_logprobs: Zero = None
    functions: NoList = None
    verbosity: Literal["medium"] | None = None


class ToolCallFunction(BaseModel):
    name: str
    arguments: str


class ToolCallItem(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallItem] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None = None
    logprobs: None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: Literal["default"] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
    diffusing: Diffusing | None = None
