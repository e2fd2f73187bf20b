"""What a request's sink receives. Knows no transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dgemma_runtime.contract import Int32Array
from dgemma_runtime.statistics import RequestStatistics

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "error"]
StopReason: TypeAlias = str | int | None  # the stop string, the end token's id; None where neither ended the output


@dataclass(frozen=True)
class Prefill:
    """How far the prompt is encoded; only for requests with `stream_previews` whose prompt takes several chunks."""

    cached_tokens: int  # of the prompt
    num_input_tokens: int


@dataclass(frozen=True)
class Preview:
    """The canvas as it stands after a step; only for requests with `stream_previews`, never the last step's."""

    text: str  # what would follow the text of all commits so far, were this canvas committed as it is
    canvas_index: int
    step: int  # 1 after the canvas's first denoising step
    token_ids: Int32Array  # [canvas_length], the argmax canvas, uncut


@dataclass(frozen=True)
class Commit:
    """A canvas is done. The texts and ids of all commits, joined, are those of `Finished`."""

    text: str  # new text; may be empty where all of it could still become a stop string or half a character
    token_ids: Int32Array  # [n <= canvas_length], cut at the end token, stop string or max_tokens
    canvas_index: int
    steps: int  # denoising steps this canvas took


@dataclass(frozen=True)
class Finished:
    """The last event of every accepted request, exactly once.

    `token_ids` ends with the token that ended the output: the end token, or the one that completed a stop string;
    `text` has neither the end token nor the stop string. `error` is a message fit for a client.
    """

    reason: FinishReason
    text: str
    token_ids: Int32Array  # [num_output_tokens]
    statistics: RequestStatistics
    error: str | None = None
    stop_reason: StopReason = None  # which stop string or end token it was, with the reason "stop"


Event: TypeAlias = Prefill | Preview | Commit | Finished
Sink: TypeAlias = Callable[[Event], None]
