"""The least time of one denoising step, from bytes that must be read and from arithmetic. Knows no memory limits.

Bytes: every weight once (experts as far as tokens reach them, routing taken as uniform), and the keys and values that
the canvases see. Activations and logits are taken to stay in caches. FLOPs: products of what each canvas token goes
through (`top_k` experts, the head, and the embedding once more for the soft embedding), and attention itself. What a
lowering does beyond that is not counted: the plugin-free graph runs every expert over every token.
Products of fp8 weights run in fp8; int4 weights are unpacked to bf16; all else runs in the activations' precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgemma_build.checkpoint import TextConfig
from dgemma_build.plan.cards import Card
from dgemma_build.plan.kv import KvSizes
from dgemma_build.plan.options import PlanOptions
from dgemma_build.plan.weights import EMBEDDING, EXPERTS, PlannedWeight
from dgemma_runtime.contract import FULL


@dataclass(frozen=True)
class StepWork:
    """What one step of `batch` canvases must do."""

    batch: int
    context: int  # tokens behind each canvas
    read_bytes: int
    flops: dict[str, float]  # by precision of the products

    def floor(self, card: Card) -> StepFloor:
        """The least time on a card."""
        arithmetic = sum(count / card.flops(compute) for compute, count in self.flops.items())
        return StepFloor(self.batch, self.context, 1e3 * self.read_bytes / card.bandwidth, 1e3 * arithmetic)


@dataclass(frozen=True)
class StepFloor:
    """Milliseconds of one step, at least."""

    batch: int
    context: int  # tokens
    bytes_ms: float
    flops_ms: float

    @property
    def ms(self) -> float:
        return max(self.bytes_ms, self.flops_ms)

    @property
    def bound(self) -> str:
        """What it is bound by: bytes or flops."""
        return "bytes" if self.bytes_ms >= self.flops_ms else "flops"


def step_work(
    config: TextConfig, weights: Sequence[PlannedWeight], options: PlanOptions, batch: int, context: int
) -> StepWork:
    """Of `batch` canvases, each behind `context` tokens."""
    tokens = batch * config.spec.canvas_length
    share = config.top_k_experts / config.num_experts
    reached = 1 - (1 - share) ** tokens
    kv = KvSizes.of(config.spec, options.kv)
    read = float(batch * (kv.seen_bytes(context) + kv.canvas_bytes()))
    flops: dict[str, float] = {}
    for weight in weights:
        is_expert = weight.part == EXPERTS
        read += weight.nbytes * (reached if is_expert else 1)
        if weight.is_matrix:
            uses = share if is_expert else 2 if weight.part == EMBEDDING else 1
            compute = _compute(weight, options)
            flops[compute] = flops.get(compute, 0.0) + 2.0 * weight.values * uses * tokens
    attention = sum(
        4.0 * config.num_attention_heads * layer.head_dim * (seen + config.spec.canvas_length)
        for layer in config.spec.layers
        for seen in (context if layer.kind == FULL else min(context, config.spec.sliding_window - 1),)
    )
    flops[options.activations] = flops.get(options.activations, 0.0) + attention * tokens
    return StepWork(batch, context, round(read), flops)


def _compute(weight: PlannedWeight, options: PlanOptions) -> str:
    return "fp8" if weight.name.endswith(".fp8") else options.activations
