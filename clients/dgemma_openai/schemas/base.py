"""What all request bodies share: strict types, unknown names refused, values that ask for nothing. Knows no route."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from dgemma_client.requests import Parameters

MAX_SEED = 2**64


def _fail_fast(schema: Any) -> None:
    """Lists are read no further than their first error: a million of them would take minutes to tell."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """JSON in, exactly as documented."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


def refused(allowed: str) -> tuple[WrapValidator, Any]:
    """For what this server cannot do: the type allows the values that ask for nothing, others are refused by name."""

    def explained(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("not_supported", f"is not supported; leave it out or send {allowed}") from None

    return WrapValidator(explained), Field(description=f"Not supported; only {allowed}.")


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError
    return value


Off = Annotated[Annotated[Literal[False], BeforeValidator(_boolean)] | None, *refused("false")]  # 0 equals False
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, *refused("0")]
One = Annotated[Annotated[float, Field(ge=1, le=1)] | None, *refused("1")]
NoTop = Annotated[Annotated[int, Field(ge=-1, le=0)] | None, *refused("0 or -1; for greedy decoding, temperature 0")]
NoMap = Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, *refused("{}")]
NoList = Annotated[Annotated[list[Any], Field(max_length=0)] | None, *refused("[]")]
Nothing = Annotated[None, *refused("null")]

Seed = Annotated[int, Field(ge=-(2**63), lt=MAX_SEED, description="The same seed gives the same text.")]
Stop = Annotated[str | list[str], Field(description="Up to 64 texts that end the answer; they are not part of it.")]


class Sampling(Body):
    """Parameters that every endpoint has which generates. What is left out is the checkpoint's own default."""

    model: Annotated[str, Field(description="One of the names at /v1/models.")]
    stream: bool | None = None
    seed: Seed | None = None
    temperature: Annotated[
        float | None, Field(ge=0, le=100, description="A flat temperature of all denoising steps; 0 is greedy.")
    ] = None

    # diffusion
    max_denoising_steps: Annotated[int | None, Field(ge=1, le=1024)] = None
    entropy_bound: Annotated[float | None, Field(ge=1e-9, le=1e6, description="Nats accepted in a step.")] = None
    t_min: Annotated[float | None, Field(ge=1e-6, le=100)] = None
    t_max: Annotated[float | None, Field(ge=1e-6, le=100)] = None
    stability_threshold: Annotated[
        int | None, Field(ge=-1, le=1024, description="Steps that a canvas must stay the same; -1: all steps.")
    ] = None
    confidence_threshold: Annotated[float | None, Field(ge=1e-9, le=1e3, description="Nats.")] = None
    diffusing: Annotated[
        bool | None, Field(description="With stream: send previews of unfinished canvases as a field `diffusing`.")
    ] = None

    # drafting
    drafter: Annotated[
        Literal["auto", "off", "lookup", "model"] | None, Field(description="Who proposes canvases to the denoiser.")
    ] = None
    draft_confidence: Annotated[
        float | None, Field(ge=0, le=1, description="Tokens of a draft that are less certain start as noise.")
    ] = None
    draft_verification: Annotated[
        Literal["direct", "halves"] | None,
        Field(description="halves: a draft is checked twice at once, each time without every second token."),
    ] = None

    # scheduling
    priority: Annotated[int | None, Field(ge=-1000, le=1000, description="Lower is served first.")] = None
    deadline_ms: Annotated[int | None, Field(ge=1, lt=2**31, description="Ends the answer with what it has.")] = None
    cache_salt: Annotated[str | None, Field(max_length=256, description="Who shares cached prefixes.")] = None

    # not supported
    top_p: One = None
    top_k: NoTop = None

    def sampling(self) -> Parameters:
        """What is given, under Triton's names; without lengths."""
        names = (
            *("max_denoising_steps", "entropy_bound", "t_min", "t_max", "stability_threshold", "confidence_threshold"),
            *("temperature", "priority", "deadline_ms", "cache_salt"),
            *("drafter", "draft_confidence", "draft_verification"),
        )
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        parameters: Parameters = given  # type: ignore[assignment]  # names and types are those above
        return parameters

    def seeds(self, count: int) -> list[int | None]:
        """Of `count` answers; negative ones are taken as 64-bit numbers without a sign."""
        if self.seed is None:
            return [None] * count
        return [(self.seed + index) % MAX_SEED for index in range(count)]


class Labels(Body):
    """OpenAI's fields without effect on the answer."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None


class Generation(Sampling, Labels):
    """What chat and text completions share."""

    n: Annotated[int | None, Field(ge=1, description="Answers; with a seed, the seeds count up from it.")] = None
    stop: Stop | None = None

    # not supported
    min_p: Zero = None
    min_tokens: Zero = None
    repetition_penalty: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: NoMap = None
    ignore_eos: Annotated[bool | None, Field(description="Go on until max_tokens.")] = None

    def sampling(self) -> Parameters:
        given = super().sampling()
        if self.stop:
            given["stop_words"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.ignore_eos:
            given["end_id"] = -1
        return given


class ChatLength(Body):
    """The length of a chat's answer, under both of OpenAI's names."""

    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31, description="The older name of the above.")] = None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Off = None
    continuous_usage_stats: Off = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Of a prediction's tokens that the model was shown: those that are in the answer, and the others."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    denoising_steps: int


class Diffusing(BaseModel):
    """A canvas as it stands: everything in it may still change. Or how far the prompt has been read."""

    index: int  # of the choice
    canvas_index: int | None = None
    step: int | None = None
    text: str | None = None
    prefilled_tokens: int | None = None
    prompt_tokens: int | None = None


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every endpoint answers instead where it refuses."""

    error: Error
