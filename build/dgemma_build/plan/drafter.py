"""What a drafter beside the model would take: bytes, and the least time of a draft beside a step. Reads no weights.

Two pairs of layers, each over the keys and values of a full layer and of the layer before it. The demo's own drafter
has as many, over other layers: 1, 3, 4 and 5, where these are 2, 3, 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_build.checkpoint import TextConfig
from dgemma_build.drafter.config import DrafterConfig
from dgemma_build.drafter.graph import drafter_weights
from dgemma_build.plan.cards import Card
from dgemma_build.plan.floor import StepFloor
from dgemma_build.plan.options import WEIGHT_BITS, PlanOptions
from dgemma_runtime.contract import FULL
from dgemma_runtime.memory_formulas import token_bytes

_EMBEDDING = "embed_tokens.weight"
_WIDEST, _PAIRS = 1024, 2


@dataclass(frozen=True)
class DrafterPlan:
    """A drafter of a model."""

    config: DrafterConfig
    denoiser: TextConfig
    values: int  # of its own, the denoiser's embedding apart
    embedding_values: int  # of the denoiser, of which its engine has a copy

    @property
    def activations_bytes(self) -> int:
        """Of a call for one canvas: its logits in float32, by far the most."""
        return 4 * self.config.canvas_length * self.config.vocab_size

    def bytes_of(self, options: PlanOptions) -> int:
        """Of its engine's weights, which are not quantised: its own, and the denoiser's embedding once more."""
        return (self.values + self.embedding_values) * WEIGHT_BITS[options.activations] // 8

    def floor(self, options: PlanOptions, card: Card, batch: int, context: int) -> StepFloor:
        """The least time of drafting `batch` canvases, each behind `context` tokens."""
        spec, tokens = self.config.spec(self.denoiser), batch * self.config.canvas_length
        seen = [context if layer.kind == FULL else min(context, spec.sliding_window - 1) for layer in spec.layers]
        kv = token_bytes(spec, options.kv)
        read = self.bytes_of(options)
        read += batch * (kv.full * context + kv.sliding * min(context, spec.sliding_window - 1))
        flops = 2.0 * (self.values + self.embedding_values) * tokens
        for layer, visible in zip(spec.layers, seen, strict=True):
            heads = 4.0 * self.config.num_attention_heads * layer.head_dim
            flops += heads * (visible + self.config.canvas_length) * tokens
        return StepFloor(batch, context, 1e3 * read / card.bandwidth, 1e3 * flops / card.flops(options.activations))


def plan_drafter(denoiser: TextConfig) -> DrafterPlan:
    """A drafter for this model."""
    spec = denoiser.spec
    full = [index for index, layer in enumerate(spec.layers) if layer.kind == FULL][-_PAIRS:]
    reads = sorted({max(index - offset, 0) for index in full for offset in (0, 1)}) or [len(spec.layers) - 1]
    hidden = min(spec.hidden_size, _WIDEST)
    sizes = (hidden, 2 * hidden, denoiser.num_attention_heads, tuple(reads))
    config = DrafterConfig("0" * 64, spec.vocab_size, spec.canvas_length, spec.hidden_size, *sizes)
    found = {weight.name: weight.nbytes // weight.dtype.itemsize for weight in drafter_weights(config, denoiser)}
    embedding = found.pop(_EMBEDDING)
    return DrafterPlan(config, denoiser, sum(found.values()), embedding)
