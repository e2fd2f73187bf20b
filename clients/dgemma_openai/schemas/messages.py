"""Bodies of /v1/messages and /v1/messages/count_tokens. Knows no route."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from dgemma_openai.schemas.base import Body, NoList, Nothing, Off, Sampling, refused
from dgemma_openai.schemas.unions import by_role, by_type, only, tag

# ---------------------------------------------------------------- messages


class CacheControl(Body):
    """All prompts are cached as far as there is room: without effect."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: str | None = None


class DirectCaller(Body):
    type: Literal["direct"]


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: NoList = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str | None, Field(description="Not checked.")] = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: Nothing = None


TextBlocks = list[Annotated[TextBlock, only("text")]]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | TextBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Nothing = None


UserBlock = Annotated[
    Annotated[TextBlock, tag("text")] | Annotated[ToolResultBlock, tag("tool_result")],
    by_type("text", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, tag("text")]
    | Annotated[ThinkingBlock, tag("thinking")]
    | Annotated[ToolUseBlock, tag("tool_use")],
    by_type("text", "thinking", "tool_use"),
]


class UserTurn(Body):
    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantTurn(Body):
    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemTurn(Body):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: str | TextBlocks


Turn = Annotated[
    Annotated[UserTurn, tag("user")]
    | Annotated[AssistantTurn, tag("assistant")]
    | Annotated[SystemTurn, tag("system")],
    by_role("user", "assistant", "system"),
]


# ---------------------------------------------------------------- what else is asked


class MessagesTool(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    input_schema: dict[str, Any]  # JSON schema
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: Annotated[
        bool | None, Field(description="Long arguments are always sent as they come: without effect.")
    ] = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, *refused("['direct']")] = None
    strict: Off = None
    defer_loading: Off = None
    input_examples: NoList = None


OneCall = Annotated[bool | None, Field(description="true: the answer ends after one call.")]


class ToolChoiceAuto(Body):
    type: Literal["auto"]
    disable_parallel_tool_use: OneCall = None


class ToolChoiceAny(Body):
    type: Literal["any"]
    disable_parallel_tool_use: OneCall = None


class ToolChoiceTool(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: OneCall = None


class ToolChoiceNone(Body):
    type: Literal["none"]


ToolChoice = Annotated[
    Annotated[ToolChoiceAuto, tag("auto")]
    | Annotated[ToolChoiceAny, tag("any")]
    | Annotated[ToolChoiceTool, tag("tool")]
    | Annotated[ToolChoiceNone, tag("none")],
    by_type("auto", "any", "tool", "none"),
]
Display = Annotated[
    Literal["summarized", "omitted"] | None,
    Field(description="omitted: thinking is not sent. summarized and null: it is sent as it is."),
]


class ThinkingOn(Body):
    type: Literal["enabled"]
    budget_tokens: Annotated[
        int | None, Field(ge=1, description="No limit of its own: max_tokens bounds thinking and answer together.")
    ] = None
    display: Display = None


class ThinkingAdaptive(Body):
    """The model decides, as it does with `enabled`."""

    type: Literal["adaptive"]
    display: Display = None


class ThinkingOff(Body):
    type: Literal["disabled"]


Thinking = Annotated[
    Annotated[ThinkingOn, tag("enabled")]
    | Annotated[ThinkingAdaptive, tag("adaptive")]
    | Annotated[ThinkingOff, tag("disabled")],
    by_type("enabled", "adaptive", "disabled"),
]


class OutputConfig(Body):
    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None,
        Field(description="Thinking is on or off, which is what `thinking` says: without effect."),
    ] = None
    format: Annotated[None, *refused("null; structured output is not there yet")] = None
    task_budget: Nothing = None


class KeepAllThinking(Body):
    type: Literal["clear_thinking_20251015"]
    keep: Annotated[Literal["all"], *refused("'all'")]


class ContextManagement(Body):
    """Nothing is cleared here: what the messages hold is what the chat template is given."""

    edits: list[Annotated[KeepAllThinking, only("clear_thinking_20251015")]] | None = None


class MessagesMetadata(Body):
    user_id: str | None = None


class MessagesPrompt(Body):
    """What makes a prompt."""

    model: Annotated[str, Field(description="One of the names at /v1/models.")]
    messages: Annotated[
        list[Turn],
        Field(min_length=1, description="Where the last one is the assistant's, the answer goes on with its text."),
    ]
    system: str | TextBlocks | None = None
    tools: list[Annotated[MessagesTool, only("custom")]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None

    # not supported
    mcp_servers: NoList = None
    speed: Annotated[Literal["standard"] | None, *refused("'standard'")] = None


class MessagesRequest(MessagesPrompt, Sampling):
    """Anthropic's, with this server's extensions."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[str] | None, Field(description="Up to 64 texts that end the answer.")] = None
    metadata: Annotated[MessagesMetadata | None, Field(description="Without effect on the answer.")] = None
    service_tier: Literal["auto", "standard_only"] | None = None

    # not supported
    container: Nothing = None
    inference_geo: Nothing = None


class CountTokensRequest(MessagesPrompt):
    """The same fields without those of an answer."""


# ---------------------------------------------------------------- output


class AnswerText(BaseModel):
    type: Literal["text"] = "text"
    text: str = ""


class AnswerThinking(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""  # a digest, since clients leave thinking without one out of what they send back


class AnswerToolUse(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = {}  # where max_tokens cut it, as far as it goes


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


class MessagesUsage(BaseModel):
    """The prompt has as many tokens as the three that are named after input together."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int
    denoising_steps: int | None = None  # known at the end


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageObject(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(BaseModel):
    input_tokens: int
