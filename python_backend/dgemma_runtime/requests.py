"""A request, as submitted and while it lives. Knows no engine and no thread; the scheduler and service change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import Int32Array
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.events import Sink
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.pages import PageTable
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.statistics import RequestStatistics


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for. The prompt is text, or token ids [n] of any integer type."""

    prompt: str | Int32Array
    parameters: GenerationParameters
    request_id: str = ""  # "": the service makes one
    is_chat: bool = False  # the prompt was rendered from `messages`

    @property
    def prompt_field(self) -> str:
        """The input that errors about the prompt name."""
        if self.is_chat:
            return "messages"
        return "text_input" if isinstance(self.prompt, str) else "input_ids"


@dataclass
class Timeline:
    """Moments of one request, in nanoseconds of a monotonic clock; 0 where it has not come yet."""

    submitted: int
    engine_at_submission: int  # the service's engine time then
    admitted: int = 0
    prefilled: int = 0
    first_commit: int = 0


@dataclass(eq=False)
class LiveRequest:
    """An accepted request: waiting, then prefill, then canvas after canvas until its output ends."""

    request_id: str
    prompt_ids: Int32Array  # [num_input_tokens]
    parameters: GenerationParameters
    seed: int
    max_tokens: int
    output: OutputText
    sink: Sink
    is_cancelled: Callable[[], bool]
    timeline: Timeline
    uncached: Int32Array = field(init=False)  # [n], known tokens that are not in the cache yet
    cached_tokens: int = 0
    slot: int = -1  # -1 while waiting
    pages: PageTable | None = None
    canvas: Canvas | None = None  # None until all known tokens are cached
    canvas_index: int = 0  # canvases emitted before the current one
    denoising_steps: int = 0
    cancel_requested: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        self.uncached = self.prompt_ids

    def start_canvas(self, canvas_length: int, vocab_size: int) -> Canvas:
        """Fresh noise for the next canvas."""
        noise = CanvasNoise(self.seed, self.canvas_index, canvas_length, vocab_size)
        self.canvas = Canvas(self.parameters, noise)
        return self.canvas

    def end_canvas(self, argmax_ids: Int32Array) -> None:
        """The canvas is emitted and the output goes on: its tokens [canvas_length] are to be encoded."""
        self.uncached = argmax_ids
        self.canvas = None
        self.canvas_index += 1

    def encoded(self, tokens: int) -> None:
        """The first `tokens` of the uncached tokens are in the cache now."""
        assert self.pages is not None
        self.cached_tokens += tokens
        self.uncached = self.uncached[tokens:]
        self.pages.trim(self.cached_tokens)

    def statistics(self, now: int, engine_ns: int) -> RequestStatistics:
        """At the end, `now`; `engine_ns` is the service's engine time."""
        line = self.timeline
        tokens = len(self.output.token_ids)
        admitted = line.admitted or now
        return RequestStatistics(
            num_input_tokens=len(self.prompt_ids),
            num_output_tokens=tokens,
            denoising_steps=self.denoising_steps,
            canvases=self.canvas_index,
            tokens_per_forward=tokens / self.denoising_steps if self.denoising_steps else 0.0,
            queue_ms=_ms(admitted - line.submitted),
            prefill_ms=_ms((line.prefilled or now) - admitted),
            time_to_first_canvas_ms=_ms(line.first_commit - line.submitted) if line.first_commit else None,
            total_ms=_ms(now - line.submitted),
            engine_ms=_ms(engine_ns - line.engine_at_submission),
        )


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6


def as_token_ids(prompt: Int32Array) -> Int32Array:
    """A private contiguous int32 copy."""
    return np.array(prompt, dtype=np.int32).reshape(-1)
