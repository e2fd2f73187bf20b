"""The state machine of one canvas, from noise to its argmax. Knows no cache, no text and no other canvas."""

from __future__ import annotations

import numpy as np

from dgemma_runtime.contract import DenoiseRow, Float32Array, Int32Array, SequencePages
from dgemma_runtime.errors import EngineError
from dgemma_runtime.noise import CanvasNoise
from dgemma_runtime.parameters import GenerationParameters
from dgemma_runtime.sampler import StoppingRule, accept, mean_entropy, temperature


class Canvas:
    """Call `row`, run the engine, call `advance`; until that returns True. Then `argmax_ids` is the result."""

    def __init__(self, parameters: GenerationParameters, noise: CanvasNoise) -> None:
        self._parameters = parameters
        self._noise = noise
        self._stopping = StoppingRule(parameters.stability_threshold, parameters.confidence_threshold)
        self.step = 0  # steps taken
        self.ids = noise.initial()  # [canvas_length], what the next step denoises
        self.argmax_ids = self.ids  # [canvas_length], of the last step

    @property
    def temperature(self) -> float:
        """Of the next step."""
        parameters = self._parameters
        steps_left = parameters.max_denoising_steps - self.step
        return temperature(steps_left, parameters.max_denoising_steps, parameters.t_min, parameters.t_max)

    def row(self, slot: int, position: int, pages: SequencePages) -> DenoiseRow:
        """What the engine needs for the next step."""
        return DenoiseRow(
            slot=slot,
            canvas_ids=self.ids,
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
        mean = mean_entropy(entropies)
        if not np.isfinite(mean):
            raise EngineError(f"the engine returned an entropy that is not finite in step {self.step + 1} of a canvas")
        self.argmax_ids = argmax_ids.copy()  # engines may return views of buffers they use again
        stopped = self._stopping.update(self.argmax_ids, mean)
        step, self.step = self.step, self.step + 1
        if stopped or self.step == self._parameters.max_denoising_steps:
            return True
        chosen = argmax_ids if self._parameters.greedy else sampled_ids
        accepted = accept(entropies, self._parameters.entropy_bound)
        self.ids = np.where(accepted, chosen, self._noise.renoise(step))
        return False
