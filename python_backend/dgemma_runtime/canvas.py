"""The state machine of one canvas, from noise or a draft to its argmax. Knows no cache, no text and no other canvas.

A draft takes the place of noise where it is confident enough. The temperature schedule starts at the noise level that
this leaves, and the draft counts as the argmax of the step before the first one: where the denoiser agrees with it, and
is as sure as the stopping rule asks, one pass is all a canvas takes. Any other first pass is an ordinary step. What is
committed is always the denoiser's argmax.
"""

from __future__ import annotations

import numpy as np

from dgemma_runtime.contract import DenoiseRow, Float32Array, Int32Array, SequencePages
from dgemma_runtime.drafting.proposal import NOTHING, BoolArray, DraftOutcome, Pins, Proposal
from dgemma_runtime.errors import EngineError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.sampler import StoppingRule, accept, mean_entropy, temperature


class Canvas:
    """Call `row`, run the engine, call `advance`; until that returns True. Then `argmax_ids` is the result.

    Where `halves` is True, the first step takes two rows, `row` and `second_row`. `row` has noise instead of the draft
    at even positions, and its results count there; `second_row` at odd ones. So no token of the draft confirms itself.
    """

    def __init__(
        self,
        parameters: GenerationParameters,
        noise: CanvasNoise,
        proposal: Proposal | None = None,
        pins: Pins | None = None,
    ) -> None:
        self._parameters = parameters
        self._noise = noise
        self._proposal, self._pins = proposal, pins
        self._stopping = StoppingRule(parameters.stability_threshold, parameters.confidence_threshold)
        self._free = None if pins is None else ~pins.pinned  # [canvas_length]; None: all of it
        self._read = slice(None if pins is None else pins.read)  # what stability and confidence are about
        self.step = 0  # steps taken
        initial = noise.initial()
        self._shown = np.zeros(len(initial), np.bool_)  # positions where the denoiser sees the draft
        self.ids = initial  # [canvas_length], what the next step denoises
        if proposal is not None:
            asked = parameters.draft_confidence
            self._shown = proposal.confidences >= np.float32(proposal.enough if asked is None else asked)
            self._shown &= proposal.token_ids >= 0
            self.ids = np.where(self._shown, proposal.token_ids, self.ids)
        if pins is not None:
            self._shown &= ~pins.pinned
            self.ids = np.where(pins.pinned, pins.token_ids, self.ids)
        self.halves = parameters.draft_verification == "halves" and bool(self._shown.any())
        self._second_ids = self.ids
        if self.halves:
            even = np.arange(len(initial)) % 2 == 0
            self._second_ids = np.where(self._shown & ~even, initial, self.ids)
            self.ids = np.where(self._shown & even, initial, self.ids)
        self.argmax_ids = self.ids  # [canvas_length], of the last step
        drafted = int(self._shown.sum()) // (2 if self.halves else 1)
        self._level = self._noise_level(self._num_free - drafted)

    @property
    def temperature(self) -> float:
        """Of the next step."""
        parameters = self._parameters
        steps_left = parameters.max_denoising_steps - self._level
        return temperature(steps_left, parameters.max_denoising_steps, parameters.t_min, parameters.t_max)

    def row(self, slot: int, position: int, pages: SequencePages) -> DenoiseRow:
        """What the engine needs for the next step."""
        return self._row(self.ids, slot, position, pages)

    def second_row(self, slot: int, position: int, pages: SequencePages) -> DenoiseRow:
        """Of the first step, beside `row`; in another slot, or in the same one in an earlier call."""
        assert self.halves
        assert self.step == 0
        return self._row(self._second_ids, slot, position, pages)

    def _row(self, ids: Int32Array, slot: int, position: int, pages: SequencePages) -> DenoiseRow:
        return DenoiseRow(
            slot=slot,
            canvas_ids=ids,
            uniforms=self._noise.uniforms(self.step),
            temperature=self.temperature,
            position=position,
            pages=pages,
            first_step=self.step == 0,
        )

    def advance(self, argmax_ids: Int32Array, sampled_ids: Int32Array, entropies: Float32Array) -> bool:
        """Take one step's results, each [canvas_length]; whether the canvas is done.

        Raises EngineError when an entropy is not finite: the numbers behind it cannot be trusted.
        """
        if not np.isfinite(mean_entropy(entropies)):
            raise EngineError(f"the engine returned an entropy that is not finite in step {self.step + 1} of a canvas")
        free, pins = self._free, self._pins
        self.argmax_ids = argmax_ids.copy()  # engines may return views of buffers they use again
        if pins is not None:
            self.argmax_ids[pins.pinned] = pins.token_ids[pins.pinned]
        judged = entropies if free is None else entropies[self._read][free[self._read]]
        if self.step == 0 and self._proposal is not None:
            self._credit(self._proposal)
        stopped = self._stopping.update(self.argmax_ids[self._read], mean_entropy(judged)) if len(judged) else True
        step, self.step = self.step, self.step + 1
        if stopped or self.step == self._parameters.max_denoising_steps:
            return True
        chosen = argmax_ids if self._parameters.greedy else sampled_ids
        accepted = self._accepted(entropies)
        self.ids = np.where(accepted, chosen, self._noise.renoise(step))
        if pins is not None:
            self.ids[pins.pinned] = pins.token_ids[pins.pinned]
        drafted = step == 0 and bool(self._shown.any())
        self._level = self._noise_level(int((~accepted).sum())) if drafted else self._next_level()
        return False

    def outcome(self, emitted: int) -> DraftOutcome | None:
        """Of a canvas that is done and of which the first `emitted` tokens are output; None where none was drafted."""
        if self._proposal is None:
            return None
        shown = self._shown[:emitted]
        agreed = shown & (self._proposal.token_ids[:emitted] == self.argmax_ids[:emitted])
        return DraftOutcome(self._proposal.source, int(shown.sum()), int(agreed.sum()), self.step)

    def _accepted(self, entropies: Float32Array) -> BoolArray:
        bound = self._parameters.entropy_bound
        if self._free is None:
            return accept(entropies, bound)
        accepted = ~self._free
        if self._free.any():
            accepted[self._free] = accept(entropies[self._free], bound)
        return accepted

    def _credit(self, proposal: Proposal) -> None:
        """Tell the stopping rule of the draft as the argmax before the first step.

        What stands behind the first end token is no output, so there the draft need not have been right; and an end
        token right behind the draft's own end is what the draft said.
        """
        previous = proposal.token_ids.copy()
        if self._pins is not None:
            previous[self._pins.pinned] = self._pins.token_ids[self._pins.pinned]
        elif (is_end := np.isin(self.argmax_ids, self._parameters.end_ids)).any():
            end = int(is_end.argmax())
            behind = end if end and (previous[end:] == NOTHING).all() else end + 1
            previous[behind:] = self.argmax_ids[behind:]
        self._stopping.seen(previous[self._read])

    @property
    def _num_free(self) -> int:
        return len(self.ids) if self._free is None else int(self._free.sum())

    def _noise_level(self, random_positions: int) -> int:
        """The schedule's step at which so many of the free positions are random; its last one where none is."""
        steps, free = self._parameters.max_denoising_steps, self._num_free
        return min(steps * (free - random_positions) // free, steps - 1) if free else 0

    def _next_level(self) -> int:
        return min(self._level + 1, self._parameters.max_denoising_steps - 1)
