"""Text between a prompt and a suffix: a canvas with the suffix pinned behind a hole, whose length the denoiser tells.

A pass with the suffix in a wrong place shows where the denoiser would rather have it: its argmax disagrees with what is
pinned there, and often has the suffix somewhere else, which is the length to try next. One pass per length, from the
same noise; a handful do. Knows no request, no engine and no other canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dgemma_runtime.canvas import Canvas
from dgemma_runtime.codec import Codec
from dgemma_runtime.contract import Float32Array, Int32Array
from dgemma_runtime.detokenizer import Emitted, OutputText
from dgemma_runtime.drafting.proposal import Pins
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.sampler import mean_entropy

MOST_PASSES = 12  # of a search
_SPREAD = (1 / 2, 1, 1 / 4, 3 / 4, 1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of the longest hole, where nothing points elsewhere
_POINTS = 0.5  # share of the suffix that the argmax must have elsewhere, to be followed there


@dataclass(eq=False)
class Hole:
    """What a request has between prompt and suffix. The canvas decides on `tokens`, the output reads it."""

    suffix_ids: Int32Array  # [n], what is pinned of the suffix
    most_tokens: int  # of the hole; with the suffix not more than a canvas has
    tokens: int = 0  # of the hole as it is now

    @staticmethod
    def of(suffix_ids: Int32Array, max_tokens: int, canvas_length: int) -> Hole:
        """Of a longer suffix, as many tokens are pinned as half a canvas has; the hole is no longer than the rest."""
        pinned = suffix_ids[: canvas_length // 2]
        return Hole(pinned, min(max_tokens, canvas_length - len(pinned)))


class LengthSearch:
    """Decides which lengths of a hole to try, and which is the best. `length` is the one to try; once `done`, the best.

    The best one has the fewest positions of the suffix where the argmax disagrees; among those, the lowest mean entropy
    of hole and suffix.
    """

    def __init__(self, suffix_ids: Int32Array, most_tokens: int) -> None:
        self._suffix_ids, self._most = suffix_ids, most_tokens
        self._tried: dict[int, tuple[int, float]] = {}
        self._spread = [max(1, round(share * most_tokens)) for share in _SPREAD]
        self.length = self._spread[0]
        self.done = False

    def judge(self, argmax_ids: Int32Array, entropies: Float32Array) -> None:
        """Of a pass, each [canvas_length], with the suffix pinned behind a hole of `length`."""
        end = self.length + len(self._suffix_ids)
        wrong = len(self._suffix_ids) - self._found(argmax_ids, self.length)
        self._tried[self.length] = wrong, float(mean_entropy(entropies[:end]))
        following = self._next(argmax_ids) if len(self._tried) < MOST_PASSES else None
        self.done = following is None
        self.length = self._best if following is None else following

    @property
    def _best(self) -> int:
        return min(self._tried, key=self._tried.__getitem__)  # the one tried first, of equal ones

    def _next(self, argmax_ids: Int32Array) -> int | None:
        best = self._best
        if self._tried[best][0]:
            untried = [length for length in range(1, self._most + 1) if length not in self._tried]
            likely = max(untried, key=lambda length: self._found(argmax_ids, length), default=None)
            if likely is not None and self._found(argmax_ids, likely) >= _POINTS * len(self._suffix_ids):
                return likely
            for length in self._spread:
                if length not in self._tried:
                    return length
        beside = (best - 1, best + 1)
        return next((n for n in beside if 1 <= n <= self._most and n not in self._tried), None)

    def _found(self, argmax_ids: Int32Array, length: int) -> int:
        """Tokens of the suffix that stand behind a hole of this length."""
        return int(np.count_nonzero(argmax_ids[length:][: len(self._suffix_ids)] == self._suffix_ids))


class HoleCanvas(Canvas):
    """Begins again with every length that the search wants to see. `step` counts from the last beginning.

    What stands behind the suffix is free, so that the text may go on there; nobody reads it.
    """

    def __init__(self, parameters: GenerationParameters, noise: CanvasNoise, hole: Hole) -> None:
        self._hole = hole
        self._search: LengthSearch | None = LengthSearch(hole.suffix_ids, hole.most_tokens)
        self._begin(parameters, noise, self._search.length)

    def _begin(self, parameters: GenerationParameters, noise: CanvasNoise, tokens: int) -> None:
        suffix_ids, length = self._hole.suffix_ids, len(noise.initial())
        self._hole.tokens = tokens
        pins = Pins(np.zeros(length, np.int32), np.zeros(length, np.bool_))
        pins.token_ids[tokens : tokens + len(suffix_ids)] = suffix_ids
        pins.pinned[tokens : tokens + len(suffix_ids)] = True
        super().__init__(parameters, noise, pins=pins)

    def advance(self, argmax_ids: Int32Array, sampled_ids: Int32Array, entropies: Float32Array) -> bool:
        ended = super().advance(argmax_ids, sampled_ids, entropies)
        if self._search is None:
            return ended
        self._search.judge(argmax_ids, entropies)
        tokens = self._search.length
        if self._search.done:
            self._search = None
            if tokens == self._hole.tokens:  # this pass was the canvas's first step
                return ended
        shown = self.argmax_ids
        self._begin(self._parameters, self._noise, tokens)
        self.argmax_ids = shown
        return False


class HoleText(OutputText):
    """What the hole holds, for the reason "stop"; an end token or a stop string in it ends it before."""

    def __init__(
        self, codec: Codec, hole: Hole, end_ids: tuple[int, ...], stop: tuple[str, ...], skip_special_tokens: bool
    ) -> None:
        super().__init__(codec, hole.most_tokens, end_ids, stop, skip_special_tokens, full="stop")
        self._hole = hole

    def commit(self, canvas_ids: Int32Array) -> Emitted:
        self._remaining = self._hole.tokens
        return super().commit(canvas_ids)

    def preview(self, canvas_ids: Int32Array) -> str:
        self._remaining = self._hole.tokens
        return super().preview(canvas_ids)
