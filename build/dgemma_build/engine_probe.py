"""An engine directory behind the gate's probe: one sequence, encoded and denoised through the engine itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dgemma_build.gate import ProbeStep
from dgemma_runtime.contract import (
    SLIDING,
    DenoiseRow,
    EncodeRow,
    EngineLimits,
    Float32Array,
    Int32Array,
    SequencePages,
)
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine

_PAGE = 16  # tokens; small, so that contexts cross many pages


class OnnxRuntimeProbe:
    """An `EngineProbe` over an `onnxruntime` engine directory, for contexts of up to `max_tokens`.

    `neighbours` other canvases run in the same calls, which must change nothing.
    """

    def __init__(self, directory: Path, max_tokens: int = 4096, neighbours: int = 0, threads: int = 2) -> None:
        pages = -(-max_tokens // _PAGE)
        self._neighbours = neighbours
        limits = EngineLimits(
            max_batch_size=1 + neighbours,
            max_encode_tokens=max_tokens,
            page_size=_PAGE,
            full_pages=pages,
            sliding_pages=pages,
        )
        self.engine = OnnxRuntimeEngine(directory, limits, threads)
        # Pages are shuffled, so that an engine that takes them for consecutive fails.
        rng = np.random.default_rng(0)
        self._pages = SequencePages(*(rng.permutation(pages).astype(np.int32) for _ in range(2)))
        self._position = 0

    def start(self) -> None:
        self._position = 0
        for slot in range(1 + self._neighbours):
            self.engine.release(slot)

    def encode(self, token_ids: Int32Array) -> None:
        self.engine.encode([EncodeRow(token_ids, self._position, self._pages)])
        self._position += len(token_ids)

    def denoise(
        self, canvas_ids: Int32Array, soft: Float32Array | None, uniforms: Float32Array, temperature: float
    ) -> ProbeStep:
        first_step = soft is None
        if soft is not None:
            self.engine.soft_embedding(self._neighbours)[:] = soft
        row = DenoiseRow(
            slot=self._neighbours,
            canvas_ids=canvas_ids,
            uniforms=uniforms,
            temperature=temperature,
            position=self._position,
            pages=self._pages,
            first_step=first_step,
        )
        others = [
            replace(row, slot=slot, canvas_ids=canvas_ids[::-1], temperature=2.0, position=self._position // (slot + 2))
            for slot in range(self._neighbours)
        ]
        result = self.engine.denoise([*others, row])
        return ProbeStep(
            argmax_ids=result.argmax_ids[-1],
            sampled_ids=result.sampled_ids[-1],
            entropies=result.entropies[-1],
            next_soft=self.engine.soft_embedding(row.slot).copy(),
        )

    def keys_values(self, layer: int) -> tuple[Float32Array, Float32Array]:
        window = self.engine.spec.sliding_window - 1
        sliding = self.engine.spec.layers[layer].kind == SLIDING
        start = max(0, self._position - window) if sliding else 0
        return self.engine.keys_values(layer, self._pages, start, self._position)
