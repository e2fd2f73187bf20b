"""The mathematics of a denoising step outside of the graph: temperature, acceptance, stopping. Knows no request.

Follows transformers' generation_diffusion_gemma.py; single precision wherever it uses single precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dgemma_runtime.contract import Float32Array, Int32Array


def temperature(steps_left: int, max_denoising_steps: int, t_min: float, t_max: float) -> float:
    """The linear schedule: t_max with all steps left, falling towards t_min. `steps_left` counts down to 1.

    In single precision, as LinearTemperatureScheduleLogitsProcessor gets its step as an int32 tensor.
    """
    share = np.float32(steps_left) / np.float32(max_denoising_steps)
    return float(np.float32(t_min) + np.float32(t_max - t_min) * share)


def accept(entropies: Float32Array, entropy_bound: float) -> npt.NDArray[np.bool_]:
    """Which positions [canvas_length] take their sample: entropies in nats, bound in nats.

    The most certain positions, as long as the sum of the entropies before each stays within the bound
    (EntropyBoundSampler.accept_canvas, after https://arxiv.org/abs/2505.24857); at least one position always.
    """
    order = entropies.argsort(kind="stable")
    ascending = entropies[order]
    # torch adds in double and stores single.
    total = ascending.cumsum(dtype=np.float64).astype(np.float32)
    accepted = np.empty(len(entropies), dtype=np.bool_)
    accepted[order] = total - ascending <= np.float32(entropy_bound)
    return accepted


def mean_entropy(entropies: Float32Array) -> Any:
    """The canvas's mean entropy in nats as np.float32; not finite where any position's is not."""
    return np.float32(np.add.reduce(entropies, dtype=np.float64) / len(entropies))


class StoppingRule:
    """Stable and confident (StableAndConfidentStoppingCriteria), for one canvas.

    Stable: the argmax canvas equals those of the `stability_threshold` steps before. Confident: the mean entropy is
    below `confidence_threshold`. Either None: never stops, the canvas takes all its steps.
    """

    def __init__(self, stability_threshold: int | None, confidence_threshold: float | None) -> None:
        self._steps_needed = stability_threshold
        self._threshold = None if confidence_threshold is None else np.float32(confidence_threshold)
        self._previous: Int32Array | None = None
        self._unchanged = 0  # steps in a row before this one whose argmax canvas equals this one's

    def seen(self, argmax_ids: Int32Array) -> None:
        """Count this as the argmax canvas [canvas_length] of the step before the first; -1 equals no token."""
        self._previous = argmax_ids

    def update(self, argmax_ids: Int32Array, mean: Any) -> bool:
        """Takes one step's argmax canvas [canvas_length] and mean entropy; whether the canvas is done."""
        if self._steps_needed is None or self._threshold is None:
            return False
        same = self._previous is not None and np.array_equal(self._previous, argmax_ids)
        self._unchanged = self._unchanged + 1 if same else 0
        self._previous = argmax_ids
        return self._unchanged >= self._steps_needed and bool(mean < self._threshold)
