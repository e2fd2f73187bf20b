"""What a generation tells its caller: progress, previews, text, the end. Knows no tensor and no transport."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "deadline"]  # the last: the request's deadline_ms has passed
StopReason = str | int | None  # the stop string or the end token's id that ended the answer, if one did


@dataclass(frozen=True)
class DraftStatistics:
    """What came of one drafter's drafts in one request."""

    drafter: str  # lookup, model; client: the request's own draft
    canvases: int  # that started from its drafts
    drafted_tokens: int
    accepted_tokens: int  # of the drafted ones, as they are in the answer
    steps_saved: float  # denoising steps, against canvases without a draft; below 0 where more were taken


@dataclass(frozen=True)
class Statistics:
    """Figures of one request: counted by the server, the first two times seen by this client, the others by the server.

    `engine_ms`, of `total_ms`, is spent in engine calls, whichever requests they served. `prefix_tokens` of the input
    were found in the prefix cache. What follows is 0 or nothing from a server that does not tell.
    """

    num_input_tokens: int
    num_output_tokens: int
    denoising_steps: int
    canvases: int
    time_to_first_canvas_ms: float
    total_ms: float
    queue_ms: float
    prefill_ms: float
    engine_ms: float
    prefix_tokens: int = 0
    preemptions: int = 0  # times that the request had to make room for another one and started a canvas again
    drafts: tuple[DraftStatistics, ...] = ()  # of drafters that drafted something
    hole_tokens: int | None = None  # with a suffix: the length of the hole before it, as the server chose it
    suffix_tokens: int | None = None  # with a suffix: how many of its tokens counted, from its beginning

    @property
    def tokens_per_forward(self) -> float:
        """Output tokens per denoising step."""
        return self.num_output_tokens / self.denoising_steps if self.denoising_steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of this client's total time."""
        return 1000 * self.num_output_tokens / self.total_ms if self.total_ms else 0.0


@dataclass(frozen=True)
class Prefill:
    """How far a long prompt has been read; may come again in the middle of an answer, after a preemption."""

    cached_tokens: int  # of num_input_tokens
    num_input_tokens: int


@dataclass(frozen=True)
class Preview:
    """The canvas as it stands after a denoising step; everything in it may still change."""

    text: str  # what would follow the text so far, were this canvas final
    canvas_index: int  # 0 for the first canvas of the answer
    step: int  # denoising steps of this canvas so far


@dataclass(frozen=True)
class Delta:
    """What is final since the last one."""

    text: str  # may be empty where it could still become a stop string or is half a character
    token_ids: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Done:
    """Always the last event of a generation that did not fail."""

    finish_reason: FinishReason
    statistics: Statistics
    stop_reason: StopReason = None


Event = Prefill | Preview | Delta | Done


@dataclass(frozen=True)
class Result:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason
    statistics: Statistics
    stop_reason: StopReason = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Tokens:
    """A prompt as the server reads it."""

    ids: tuple[int, ...] = field(repr=False)
    text: str  # of `messages`, what the chat template made of them


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself and of the model."""

    server: str
    server_version: str
    model: str
    inputs: tuple[str, ...]  # tensor names
    outputs: tuple[str, ...]
    parameters: dict[str, str]  # of the model's configuration
