"""Counter-based randomness of one canvas. Knows nothing but a seed and where the canvas stands.

Philox4x64-10 (numpy.random.Philox) with key words (seed, 0) and the starting counter (0, step, canvas_index, stream),
lowest word first. numpy raises the counter before each group of four outputs, so the groups used are those of the
counters (1, ...), (2, ...) and so on. Position i of a canvas takes raw output i. Whatever else is in a batch, a
request's noise is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Philox

from dgemma_runtime.contract import Float32Array, Int32Array

INITIAL, UNIFORMS, RENOISE = 0, 1, 2  # streams


class CanvasNoise:
    """All random numbers of one canvas; steps count 0, 1, 2, ..."""

    def __init__(self, seed: int, canvas_index: int, canvas_length: int, vocab_size: int) -> None:
        self._canvas_length = canvas_length
        self._vocab_size = np.uint64(vocab_size)
        # Rewriting one generator's state costs 1.3 us a draw, a new generator 7.
        self._philox = Philox(key=0)
        self._state: Any = self._philox.state
        self._state["state"]["key"][:] = (seed, 0)
        self._counter = self._state["state"]["counter"]
        self._counter[:] = (0, 0, canvas_index, 0)

    def initial(self) -> Int32Array:
        """[canvas_length], uniform over the vocabulary: the canvas before its first step."""
        return self._tokens(INITIAL, 0)

    def uniforms(self, step: int) -> Float32Array:
        """[canvas_length], multiples of 2**-24 in [0, 1): the highest 24 bits of each output."""
        return (self._raw(UNIFORMS, step) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

    def renoise(self, step: int) -> Int32Array:
        """[canvas_length], uniform over the vocabulary: what positions become that `step` did not accept."""
        return self._tokens(RENOISE, step)

    def _tokens(self, stream: int, step: int) -> Int32Array:
        """floor(u * vocab_size) with u the highest 32 bits of each output as a fraction, in integers."""
        high = self._raw(stream, step) >> np.uint64(32)
        return ((high * self._vocab_size) >> np.uint64(32)).astype(np.int32)

    def _raw(self, stream: int, step: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        self._counter[1] = step
        self._counter[3] = stream
        self._philox.state = self._state
        raw: np.ndarray[Any, np.dtype[np.uint64]] = self._philox.random_raw(self._canvas_length)
        return raw
