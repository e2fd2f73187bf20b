"""An engine behind the gate's probe: one sequence, encoded and denoised through the engine itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from dgemma_build.gate import ProbeStep
from dgemma_runtime.contract import (
    SLIDING,
    CommitRow,
    DenoiseRow,
    EncodeRow,
    Engine,
    EngineLimits,
    Float32Array,
    Int32Array,
    SequencePages,
)
from dgemma_runtime.engines.onnxruntime import OnnxRuntimeEngine

_PAGE = 16  # tokens; small, so that contexts cross many pages


class Inspected(Engine, Protocol):
    """An engine that shows what it keeps to itself."""

    def soft_embedding(self, slot: int) -> Float32Array: ...

    def set_soft_embedding(self, slot: int, values: Float32Array) -> None: ...

    def keys_values(
        self, layer: int, pages: SequencePages, start: int, stop: int
    ) -> tuple[Float32Array, Float32Array]: ...


class Probe:
    """An `EngineProbe` over an engine. `neighbours` other canvases run in the same calls, which must change nothing.

    What is encoded behind a canvas, whole, goes to the engine as that canvas's commit.
    """

    def __init__(self, engine: Inspected, neighbours: int = 0) -> None:
        self._neighbours = neighbours
        self.engine = engine
        self.spec = engine.manifest.model
        # Pages are shuffled, so that an engine that takes them for consecutive fails.
        rng, pages = np.random.default_rng(0), engine.limits.full_pages
        self._pages = SequencePages(*(rng.permutation(pages).astype(np.int32) for _ in range(2)))
        self._position = 0
        self._others: list[DenoiseRow] | None = None  # beside the canvas that is being denoised

    def start(self) -> None:
        self._position = 0
        self._others = None
        for slot in range(1 + self._neighbours):
            self.engine.release(slot)

    def encode(self, token_ids: Int32Array) -> None:
        if self._others is not None and len(token_ids) == self.spec.canvas_length:
            commit = CommitRow(self._neighbours, token_ids, self._position, self._pages)
            self.engine.denoise(self._others, [commit])
            self._position += len(token_ids)
            self._others = None
            return
        longest = self.engine.limits.max_encode_tokens
        for start in range(0, len(token_ids), longest):
            chunk = token_ids[start : start + longest]
            self.engine.encode([EncodeRow(chunk, self._position, self._pages)])
            self._position += len(chunk)

    def denoise(
        self, canvas_ids: Int32Array, soft: Float32Array | None, uniforms: Float32Array, temperature: float
    ) -> ProbeStep:
        first_step = soft is None
        if soft is not None:
            self.engine.set_soft_embedding(self._neighbours, soft)
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
        self._others = [replace(other, first_step=False) for other in others]
        return ProbeStep(
            argmax_ids=result.argmax_ids[-1],
            sampled_ids=result.sampled_ids[-1],
            entropies=result.entropies[-1],
            next_soft=self.engine.soft_embedding(row.slot),
        )

    def keys_values(self, layer: int) -> tuple[Float32Array, Float32Array]:
        window = self.spec.sliding_window - 1
        sliding = self.spec.layers[layer].kind == SLIDING
        start = max(0, self._position - window) if sliding else 0
        return self.engine.keys_values(layer, self._pages, start, self._position)


def probe_limits(max_tokens: int, neighbours: int, max_encode_tokens: int) -> EngineLimits:
    """For contexts of up to `max_tokens`."""
    pages = -(-max_tokens // _PAGE)
    return EngineLimits(1 + neighbours, max_encode_tokens, _PAGE, pages, pages)


class OnnxRuntimeProbe(Probe):
    """Over an `onnxruntime` engine directory."""

    def __init__(self, directory: Path, max_tokens: int = 4096, neighbours: int = 0, threads: int = 2) -> None:
        limits = probe_limits(max_tokens, neighbours, max_tokens)
        super().__init__(OnnxRuntimeEngine(directory, limits, threads), neighbours)
