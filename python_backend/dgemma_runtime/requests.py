"""A request, as submitted and while it lives. Knows no engine and no thread; the scheduler and service change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.contract import Int32Array, SequencePages
from dgemma_runtime.detokenizer import OutputText
from dgemma_runtime.drafting.hole import HoleCanvas
from dgemma_runtime.drafting.request_drafts import RequestDrafts
from dgemma_runtime.events import Sink
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.pages import PageTable
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.prefix import PageKeys
from dgemma_runtime.statistics import RequestStatistics


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for. The prompt is text, or token ids [n] of any integer type."""

    prompt: str | Int32Array
    parameters: GenerationParameters
    request_id: str = ""  # "": the service makes one
    source: str = ""  # the input that the prompt came as; "": as its type says
    draft: str | Int32Array | None = None  # of the output, by the client: text, or token ids [n]
    template: tuple[str | int, ...] = ()  # of the output: literal text, and holes of so many tokens; (): none
    suffix: str | None = None  # what comes behind the output

    @property
    def prompt_field(self) -> str:
        """The input that errors about the prompt name."""
        if self.source:
            return self.source
        return "text_input" if isinstance(self.prompt, str) else "input_ids"

    @property
    def draft_field(self) -> str:
        """The input that errors about the draft name."""
        return "draft_text" if isinstance(self.draft, str) else "draft_ids"


@dataclass
class Timeline:
    """Moments of one request, in nanoseconds of a monotonic clock; 0 where it has not come yet."""

    submitted: int
    engine_at_submission: int  # the service's engine time then
    admitted: int = 0  # for the first time
    prefilled: int = 0
    first_commit: int = 0
    last_commit: int = 0
    canvas_started: int = 0  # the present one, or the last


@dataclass(eq=False)
class LiveRequest:
    """An accepted request: waiting, then prefill, then canvas after canvas until its output ends.

    Where its pages are taken away it waits again, keeps its tokens, and starts its canvas again from the same noise.
    """

    request_id: str
    prompt_ids: Int32Array  # [num_input_tokens]
    parameters: GenerationParameters
    seed: int
    max_tokens: int
    output: OutputText
    sink: Sink
    is_cancelled: Callable[[], bool]
    timeline: Timeline
    keys: PageKeys | None = None  # None where it neither looks for cached prefixes nor leaves any
    drafts: RequestDrafts = field(default_factory=RequestDrafts)
    arrival: int = 0  # order of submission, set by the scheduler
    tokens: Int32Array = field(init=False)  # [n], all that are known: the prompt and the canvases emitted
    cached_tokens: int = 0
    exact_tokens: int = 0  # cached in the very pieces in which they would be without company and without a cache
    prefix_tokens: int | None = None  # of the prompt, found in the cache; None before the first admission
    slot: int = -1  # -1 while waiting
    pages: PageTable | None = None
    canvas: Canvas | None = None  # None until all known tokens are cached
    canvas_index: int = 0  # canvases emitted before the current one
    laid_out: bool = False  # the engine has this sequence's last or present canvas in its slot
    denoising_steps: int = 0
    preemptions: int = 0
    cancel_requested: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        self.tokens = self.prompt_ids
        if self.keys is not None:
            self.keys.extend(self.tokens)

    @property
    def uncached(self) -> Int32Array:
        """[n], known tokens that are not in the cache yet."""
        return self.tokens[self.cached_tokens :]

    @property
    def page_view(self) -> SequencePages:
        """Of a request that is admitted."""
        assert self.pages is not None
        return self.pages.view

    @property
    def is_exact(self) -> bool:
        """Asked for with a seed: it uses of the cache only what has the bits that it would compute itself."""
        return self.parameters.seed is not None

    @property
    def deadline(self) -> int | None:
        """In nanoseconds of the monotonic clock."""
        limit = self.parameters.deadline_ms
        return None if limit is None else self.timeline.submitted + limit * 1_000_000

    def start_canvas(self, canvas_length: int, vocab_size: int) -> Canvas:
        """The next canvas, from fresh noise and what was drafted and pinned of it."""
        noise = CanvasNoise(self.seed, self.canvas_index, canvas_length, vocab_size)
        if self.drafts.hole is not None:
            self.canvas = HoleCanvas(self.parameters, noise, self.drafts.hole)
        else:
            pins = self.drafts.pins(self.canvas_index, canvas_length)
            self.canvas = Canvas(self.parameters, noise, self.drafts.proposal, pins)
        return self.canvas

    def end_canvas(self, argmax_ids: Int32Array) -> None:
        """The canvas is emitted and the output goes on: its tokens [canvas_length] are to be encoded."""
        self.tokens = np.concatenate([self.tokens, argmax_ids])
        if self.keys is not None:
            self.keys.extend(self.tokens)
        self.canvas = None
        self.canvas_index += 1

    def encoded(self, tokens: int, exact: bool = False) -> None:
        """The first `tokens` of the uncached ones are in the cache now; `exact`: as one of the prompt's own chunks."""
        assert self.pages is not None
        if exact and self.exact_tokens == self.cached_tokens:
            self.exact_tokens += tokens
        self.cached_tokens += tokens
        if self.keys is not None:
            self.pages.publish(self.keys.keys, self.cached_tokens, self.exact_tokens)
        self.pages.trim(self.cached_tokens)

    def restart_canvas(self) -> None:
        """The canvas under way is given up; its next step is its first."""
        self.canvas = None
        self.laid_out = False

    def preempted(self) -> None:
        """Pages and slot are gone."""
        self.restart_canvas()
        self.pages, self.slot = None, -1
        self.cached_tokens = self.exact_tokens = 0
        self.preemptions += 1

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
            prefix_tokens=self.prefix_tokens or 0,
            preemptions=self.preemptions,
            queue_ms=_ms(admitted - line.submitted),
            prefill_ms=_ms((line.prefilled or now) - admitted),
            time_to_first_canvas_ms=_ms(line.first_commit - line.submitted) if line.first_commit else None,
            total_ms=_ms(now - line.submitted),
            engine_ms=_ms(engine_ns - line.engine_at_submission),
            drafts=tuple(self.drafts.statistics.values()),
            hole_tokens=None if self.drafts.hole is None else self.drafts.hole.tokens,
            suffix_tokens=None if self.drafts.hole is None else len(self.drafts.hole.suffix_ids),
        )


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6


def as_token_ids(prompt: Int32Array) -> Int32Array:
    """A private contiguous int32 copy."""
    return np.array(prompt, dtype=np.int32).reshape(-1)
