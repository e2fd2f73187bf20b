"""Text between a prompt and a suffix: a canvas with the suffix pinned behind a hole, whose length the denoiser tells.

A pass with the suffix in a wrong place shows where the denoiser would rather have it: its argmax disagrees with what is
pinned there, and often has the suffix somewhere else, which is the length to try next. All lengths start from the same
noise; a handful of passes do. Knows no request, no engine and no other canvas.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
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

MOST_LENGTHS = 8  # that are looked at with one pass, before those beside the best; and with two
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


def search(
    suffix_ids: Int32Array, most_tokens: int
) -> Generator[tuple[int, int], tuple[Int32Array, Float32Array], int]:
    """Asks for (length of the hole, passes), is sent argmax ids and entropies [canvas_length] of the last of them, and
    returns the length to take.

    First a length is looked for at which the argmax agrees with the suffix, or disagrees least. Where it disagrees no
    more with a length beside it, two passes of each decide: disagreements, then the mean entropy of hole and suffix.
    """
    wrong: dict[int, int] = {}  # by length, positions of the suffix where the argmax disagrees
    surest: dict[int, tuple[int, float]] = {}  # after two passes
    length: int | None = _spread(most_tokens)[0]
    while length is not None and len(wrong) < MOST_LENGTHS:
        argmax_ids, _ = yield length, 1
        wrong[length] = len(suffix_ids) - _found(suffix_ids, argmax_ids, length)
        length = _next(suffix_ids, argmax_ids, most_tokens, wrong) if wrong[length] else None
    best = min(wrong, key=wrong.__getitem__)
    while True:
        beside = [length for length in (best - 1, best + 1) if 1 <= length <= most_tokens]
        for length in beside:
            if length not in wrong:
                argmax_ids, _ = yield length, 1
                wrong[length] = len(suffix_ids) - _found(suffix_ids, argmax_ids, length)
            if wrong[length] <= wrong[best] and length not in surest:
                surest[length] = _judged(suffix_ids, length, (yield length, 2))
        rivals = [length for length in beside if length in surest]
        if not rivals or len(surest) >= MOST_LENGTHS:
            return best
        if best not in surest:
            surest[best] = _judged(suffix_ids, best, (yield best, 2))
        before, best = best, min((best, *rivals), key=surest.__getitem__)
        if best == before:
            return best


def _judged(suffix_ids: Int32Array, length: int, seen: tuple[Int32Array, Float32Array]) -> tuple[int, float]:
    wrong = len(suffix_ids) - _found(suffix_ids, seen[0], length)
    return wrong, float(mean_entropy(seen[1][: length + len(suffix_ids)]))


def _next(suffix_ids: Int32Array, argmax_ids: Int32Array, most_tokens: int, tried: Collection[int]) -> int | None:
    """Where the argmax has the suffix, else the next one of those that are spread over all lengths."""
    untried = [length for length in range(1, most_tokens + 1) if length not in tried]
    likely = max(untried, key=lambda length: _found(suffix_ids, argmax_ids, length), default=None)
    if likely is not None and _found(suffix_ids, argmax_ids, likely) >= _POINTS * len(suffix_ids):
        return likely
    return next((length for length in _spread(most_tokens) if length not in tried), None)


def _spread(most_tokens: int) -> list[int]:
    return [max(1, round(share * most_tokens)) for share in _SPREAD]


def _found(suffix_ids: Int32Array, argmax_ids: Int32Array, length: int) -> int:
    """Tokens of the suffix that stand behind a hole of this length."""
    return int(np.count_nonzero(argmax_ids[length:][: len(suffix_ids)] == suffix_ids))


class HoleCanvas(Canvas):
    """Begins again with every length that the search wants to see. `step` counts from the last beginning.

    What stands behind the suffix is free, so that the text may go on there; nobody reads it.
    """

    def __init__(self, parameters: GenerationParameters, noise: CanvasNoise, hole: Hole) -> None:
        self._hole = hole
        self._search = search(hole.suffix_ids, hole.most_tokens)
        self._passes = 0  # of the present length that the search waits for; 0: it has ended
        length, self._passes = next(self._search)
        self._begin(parameters, noise, length)

    def _begin(self, parameters: GenerationParameters, noise: CanvasNoise, tokens: int) -> None:
        suffix_ids, length = self._hole.suffix_ids, len(noise.initial())
        self._hole.tokens = tokens
        pins = Pins(np.zeros(length, np.int32), np.zeros(length, np.bool_), tokens + len(suffix_ids))
        pins.token_ids[tokens : tokens + len(suffix_ids)] = suffix_ids
        pins.pinned[tokens : tokens + len(suffix_ids)] = True
        super().__init__(parameters, noise, pins=pins)

    def advance(self, argmax_ids: Int32Array, sampled_ids: Int32Array, entropies: Float32Array) -> bool:
        ended = super().advance(argmax_ids, sampled_ids, entropies)
        if self.step < self._passes and not ended:
            return False
        if self._passes == 0:
            return ended
        try:
            tokens, self._passes = self._search.send((argmax_ids, entropies))
        except StopIteration as stop:
            tokens, self._passes = stop.value, 0
        if tokens == self._hole.tokens and not (ended and self._passes):
            return ended  # it goes on from here
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
