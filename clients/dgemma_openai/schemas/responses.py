"""Bodies of /v1/responses. Knows no route."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from dgemma_openai.schemas.base import Body, Labels, NoList, Nothing, Off, Sampling, Zero, refused
from dgemma_openai.schemas.unions import by, only, tag

Status = Literal["in_progress", "completed", "incomplete"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# ---------------------------------------------------------------- input


class InputTextPart(Body):
    type: Literal["input_text", "text"]
    text: str


class ReplayedTextPart(Body):
    type: Literal["output_text", "input_text", "text"]
    text: str
    annotations: NoList = None
    logprobs: NoList = None


class SummaryTextPart(Body):
    type: Literal["summary_text"]
    text: str


class ReasoningTextPart(Body):
    type: Literal["reasoning_text", "text"]
    text: str


InputParts = list[Annotated[InputTextPart, only("input_text", "text")]]
ReplayedParts = list[Annotated[ReplayedTextPart, only("output_text", "input_text", "text")]]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: str | InputParts
    id: str | None = None
    status: Status | None = None


class ReplayedMessage(Body):
    """An earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: str | ReplayedParts
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ReplayedReasoning(Body):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryTextPart] | None = None
    content: list[ReasoningTextPart] | None = None
    encrypted_content: Nothing = None
    status: Status | None = None


class ReplayedCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str  # JSON
    id: str | None = None
    status: Status | None = None
    caller: Nothing = None
    namespace: Nothing = None


class CallOutput(Body):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | ReplayedParts
    id: str | None = None
    status: Status | None = None


def _kind(item: dict[str, Any]) -> Any:
    kind = item.get("type", "message")
    return "assistant" if kind == "message" and item.get("role") == "assistant" else kind


InputItem = Annotated[
    Annotated[InputMessage, tag("message")]
    | Annotated[ReplayedMessage, tag("assistant")]
    | Annotated[ReplayedReasoning, tag("reasoning")]
    | Annotated[ReplayedCall, tag("function_call")]
    | Annotated[CallOutput, tag("function_call_output")],
    by(_kind, "message", "reasoning", "function_call", "function_call_output"),
]

# ---------------------------------------------------------------- what else is asked


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema
    strict: Off = None


class ChosenFunction(Body):
    type: Literal["function"]
    name: str


class ReasoningOptions(Body):
    effort: Annotated[
        Effort | None, Field(description="Thinking is on or off: anything but none and minimal turns it on.")
    ] = None
    summary: Annotated[
        Literal["auto", "detailed"] | None,
        *refused("'auto' or 'detailed': the thinking itself, as a summary instead of as content"),
    ] = None
    generate_summary: Nothing = None
    context: Annotated[Literal["auto"] | None, *refused("'auto'")] = None
    mode: Annotated[Literal["standard"] | None, *refused("'standard'")] = None


class PlainText(Body):
    type: Literal["text"]


class TextOptions(Body):
    format: Annotated[PlainText | None, only("text", remark="; structured output is not there yet")] = None
    verbosity: Annotated[Literal["medium"] | None, *refused("'medium'")] = None


class ResponseStreamOptions(Body):
    include_obfuscation: Off = None


class ResponsesRequest(Sampling, Labels):
    """OpenAI's, with this server's extensions. Nothing is kept between requests: send what was said before."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    tools: list[Annotated[FunctionTool, only("function")]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: the answer ends after one call.")] = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    client_metadata: Annotated[dict[str, Any] | None, Field(description="Without effect on the answer.")] = None

    # not supported
    store: Off = None
    background: Off = None
    include: NoList = None
    previous_response_id: Nothing = None
    conversation: Nothing = None
    prompt: Nothing = None
    truncation: Annotated[Literal["disabled"] | None, *refused("'disabled'")] = None
    max_tool_calls: Nothing = None
    top_logprobs: Zero = None
    context_management: NoList = None
    moderation: Nothing = None
    prompt_cache_options: Nothing = None
    prompt_cache_retention: Annotated[Literal["in_memory"] | None, *refused("'in_memory'")] = None


# ---------------------------------------------------------------- output


class SummaryText(BaseModel):
    type: Literal["summary_text"] = "summary_text"
    text: str = ""


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningItem(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    status: Status = "in_progress"


class MessageItem(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []
    status: Status = "in_progress"


class FunctionCallItem(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = ""  # JSON; where not complete, its beginning
    status: Status = "in_progress"


OutputItem = ReasoningItem | MessageItem | FunctionCallItem


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0  # all prompts are cached, at no cost


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    denoising_steps: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(BaseModel):
    code: Literal["server_error"] = "server_error"
    message: str


class DeclaredTool(BaseModel):
    type: Literal["function"] = "function"
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: Literal[False] = False


class UsedChoice(BaseModel):
    type: Literal["function"] = "function"
    name: str


class UsedReasoning(BaseModel):
    effort: Effort | None
    summary: Literal["auto", "detailed"] | None


class UsedText(BaseModel):
    format: dict[Literal["type"], Literal["text"]] = {"type": "text"}
    verbosity: Literal["medium"] = "medium"


class ResponseObject(BaseModel):
    """The answer, with what was asked."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    tools: list[DeclaredTool]
    tool_choice: Literal["none", "auto", "required"] | UsedChoice
    parallel_tool_calls: bool
    max_output_tokens: int | None
    temperature: float | None
    reasoning: UsedReasoning
    text: UsedText = UsedText()
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    top_p: Literal[1] = 1
    top_logprobs: Literal[0] = 0
    truncation: Literal["disabled"] = "disabled"
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    background: Literal[False] = False
    previous_response_id: None = None
    max_tool_calls: None = None
