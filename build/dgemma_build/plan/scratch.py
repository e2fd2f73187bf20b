"""Bytes an engine works in beside weights and KV pages. An estimate from the graph's shapes; knows no GPU.

What is alive at once in the widest stage of one layer is counted, not what a library's planner makes of it. Prefill
and denoising run one after the other in the same memory, so the larger of the two counts. Two lowerings:

- plugin-free (the ONNX graph as written): experts as dense products over all tokens, logits and probabilities of all
  canvases of a step in fp32, full layers' attention as scores and weights of one query head of every KV head;
- plugins, the kernels of `dgemma_build.kernels`: experts on their own tokens only; attention's outputs in
  `ATTENTION_PARTS` parts in fp32, whatever the context; of the head only probabilities of `HEAD_ROWS` positions at a
  time, in the activations' precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_build.checkpoint import TextConfig
from dgemma_build.plan.kv import PREFILL_CHUNK, KvSizes
from dgemma_build.plan.options import ELEMENT_BYTES, PlanOptions
from dgemma_runtime.contract import FULL, LayerSpec

ATTENTION_PARTS, HEAD_ROWS = 8, 512  # as the kernels are configured for the released model


@dataclass(frozen=True)
class Scratch:
    """Bytes at one batch size and context."""

    prefill: int  # activations of one chunk
    canvases: int  # activations of all canvases
    logits: int  # of all canvases
    attention: int  # scores and masks, or parts; the larger of prefill and denoising
    canvas_kv: int  # keys and values behind the context
    soft: int  # soft embeddings, of the previous step and of the next

    @property
    def total(self) -> int:
        """Prefill and denoising share their memory."""
        return max(self.prefill, self.canvases + self.logits) + self.attention + self.canvas_kv + self.soft


def scratch_bytes(config: TextConfig, options: PlanOptions, batch: int, context: int) -> Scratch:
    """For `batch` canvases in a step, each behind `context` tokens."""
    spec, element = config.spec, ELEMENT_BYTES[options.activations]
    tokens = batch * spec.canvas_length
    chunk = min(PREFILL_CHUNK, context)
    kv = KvSizes.of(spec, ELEMENT_BYTES[options.kv])
    if options.plugins:
        logits = min(tokens, HEAD_ROWS) * spec.vocab_size * element
        widest = config.num_attention_heads * max(layer.head_dim for layer in spec.layers)
        attention = ATTENTION_PARTS * max(tokens, chunk) * widest * 4
    else:
        logits = tokens * spec.vocab_size * (4 + 4 + (element if element < 4 else 0))
        rows = max(tokens, chunk)
        attention = max(_scores(config, layer, context, rows, element) for layer in spec.layers)
    return Scratch(
        prefill=_activations(config, chunk, element, options.plugins),
        canvases=_activations(config, tokens, element, options.plugins),
        logits=logits,
        attention=attention,
        canvas_kv=batch * kv.canvas_bytes(),
        soft=2 * tokens * spec.hidden_size * element,
    )


def _activations(config: TextConfig, tokens: int, element: int, plugins: bool) -> int:
    """Residual, its norm, and the widest of attention's projections and the experts' intermediate values."""
    hidden, inner = config.spec.hidden_size, config.moe_intermediate_size
    heads = config.num_attention_heads
    attention = max(2 * (heads + 2 * layer.num_key_value_heads) * layer.head_dim for layer in config.spec.layers)
    if plugins:
        experts = config.top_k_experts * (inner + hidden)
    else:
        experts = config.num_experts * max(3 * inner, inner + hidden)
    return tokens * element * (2 * hidden + max(attention, experts))


def _scores(config: TextConfig, layer: LayerSpec, context: int, rows: int, element: int) -> int:
    """Scores and weights of `rows` tokens over the context of their sequence: what is in float32 between is not stored.

    Full layers: one query head of every KV head at a time. Sliding layers have fused kernels, and a mask instead.
    """
    spec = config.spec
    if layer.kind == FULL:
        return 2 * element * layer.num_key_value_heads * rows * (context + spec.canvas_length)
    return element * rows * (min(context, spec.sliding_window - 1) + spec.canvas_length)
