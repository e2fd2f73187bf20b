"""The teacher-forced gate: an engine follows the oracle's own canvases step by step and must agree. Knows no torch.

What it compares is written in `Tolerance`; an engine takes part through the small `EngineProbe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dgemma_runtime.contract import Float32Array, Int32Array

if TYPE_CHECKING:  # the traces are plain numpy, but their module imports torch
    from dgemma_build.oracle import CanvasTrace, GenerationTrace, StepTrace


@dataclass(frozen=True)
class ProbeStep:
    """What an engine made of one denoising step."""

    argmax_ids: Int32Array  # [canvas_length]
    sampled_ids: Int32Array  # [canvas_length]
    entropies: Float32Array  # [canvas_length], nats
    next_soft: Float32Array  # [canvas_length, hidden]


class EngineProbe(Protocol):
    """One sequence in an engine, with a view on what engines keep to themselves."""

    def start(self) -> None:
        """Begin a new, empty sequence."""
        ...

    def encode(self, token_ids: Int32Array) -> None:
        """Encode [n] tokens behind what is there, as prefill and commit do."""
        ...

    def denoise(
        self, canvas_ids: Int32Array, soft: Float32Array | None, uniforms: Float32Array, temperature: float
    ) -> ProbeStep:
        """One step of the canvas behind the context.

        soft: [canvas_length, hidden] of the oracle's step before, None at the first step. An engine that keeps its
        soft embedding to itself uses its own; then deviations are carried from step to step.
        """
        ...

    def keys_values(self, layer: int) -> tuple[Float32Array, Float32Array]:
        """K and V of the layer, each [held, kv_heads, head_dim]: the last `held` tokens of the context."""
        ...


@dataclass(frozen=True)
class Tolerance:
    """The bars. Argmax ids must be equal; samples too, where u is further from an edge than `sample_margin`."""

    entropy: float = 1e-4  # nats, absolute
    cache: float = 1e-4  # relative, of each head's vector
    soft: float = 1e-4  # relative, of each position's vector
    sample_margin: float = 1e-4


@dataclass
class GateReport:
    """Largest deviations over everything compared, and what was over its bar, by name."""

    steps: int = 0
    canvases: int = 0
    entropy: float = 0.0
    cache: float = 0.0
    soft: float = 0.0
    argmax_differences: int = 0
    sample_differences: int = 0
    near_tie_samples: int = 0  # differing samples within the margin: named near ties, not failures
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures and self.steps > 0

    def add(self, other: GateReport) -> None:
        """Fold in the report of another generation."""
        for name in ("steps", "canvases", "argmax_differences", "sample_differences", "near_tie_samples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("entropy", "cache", "soft"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.failures += other.failures


def check_generation(
    trace: GenerationTrace,
    probe: EngineProbe,
    tolerance: Tolerance | None = None,
    encode_chunk: int | None = None,
    stop_at_first: bool = False,
) -> GateReport:
    """Lead `probe` through `trace`; encode_chunk: tokens per encode call, all at once without.

    stop_at_first: enough for asking whether a deliberate error is caught.
    """
    report, tolerance = GateReport(), tolerance or Tolerance()
    probe.start()
    for canvas in trace.canvases:
        size = encode_chunk or len(canvas.encoded_ids)
        for start in range(0, len(canvas.encoded_ids), size):
            probe.encode(canvas.encoded_ids[start : start + size])
        _check_cache(canvas, probe, tolerance, report)
        report.canvases += 1
        for step in canvas.steps:
            if report.failures and stop_at_first:
                return report
            got = probe.denoise(step.canvas_ids, None if step.step == 0 else step.soft, step.uniforms, step.temperature)
            _check_step(f"canvas {canvas.canvas_index} step {step.step}", step, got, tolerance, report)
            report.steps += 1
    return report


def check_generations(
    traces: Sequence[GenerationTrace], probe: EngineProbe, encode_chunk: int | None = None
) -> GateReport:
    """`check_generation` over several traces, in one report."""
    report = GateReport()
    for trace in traces:
        report.add(check_generation(trace, probe, encode_chunk=encode_chunk))
    return report


def _relative(got: Float32Array, expected: Float32Array) -> float:
    """Largest relative error of the vectors along the last axis; inf where shapes differ or values are not finite."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    error = np.linalg.norm(got.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected.astype(np.float64), axis=-1)
    return float((error / np.maximum(size, 1e-30)).max(initial=0.0))


def _check_cache(canvas: CanvasTrace, probe: EngineProbe, tolerance: Tolerance, report: GateReport) -> None:
    for layer, expected in enumerate(zip(canvas.keys, canvas.values, strict=True)):
        for name, got, wanted in zip(("K", "V"), probe.keys_values(layer), expected, strict=True):
            deviation = _relative(got[max(len(got) - len(wanted), 0) :], wanted)
            report.cache = max(report.cache, deviation)
            if not deviation <= tolerance.cache:
                where = f"canvas {canvas.canvas_index}: {name} of layer {layer}, {canvas.position} tokens of context"
                report.failures.append(f"{where}: relative error {deviation:.1e}")


def _check_step(where: str, step: StepTrace, got: ProbeStep, tolerance: Tolerance, report: GateReport) -> None:
    deviation = np.abs(got.entropies.astype(np.float64) - step.entropies)
    entropy = float(deviation.max()) if np.isfinite(deviation).all() else float("inf")
    soft = _relative(got.next_soft, step.next_soft)
    report.entropy, report.soft = max(report.entropy, entropy), max(report.soft, soft)
    if not entropy <= tolerance.entropy:
        report.failures.append(f"{where}: entropy differs by {entropy:.1e} at position {int(deviation.argmax())}")
    if not soft <= tolerance.soft:
        report.failures.append(f"{where}: soft embedding, relative error {soft:.1e}")
    wrong = np.flatnonzero(got.argmax_ids != step.argmax_ids)
    report.argmax_differences += len(wrong)
    if len(wrong):
        gap = float(step.argmax_margins[wrong].max())
        report.failures.append(f"{where}: argmax differs at positions {wrong.tolist()}, logit gap {gap:.1e}")
    differing = got.sampled_ids != step.sampled_ids
    near = differing & (step.sample_margins < tolerance.sample_margin)
    report.near_tie_samples += int(near.sum())
    wrong = np.flatnonzero(differing & ~near)
    report.sample_differences += len(wrong)
    if len(wrong):
        report.failures.append(f"{where}: sample differs at positions {wrong.tolist()}")
