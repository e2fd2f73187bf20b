"""Bytes that a TensorRT engine works in beside its weights and what the runtime keeps. An estimate; knows no GPU.

Prefill and denoising run one after the other in the same memory, so the larger of the two counts. Two lowerings:

- plugin-free: experts as dense products over all tokens, the head in float32 over all canvases of a step, full layers'
  attention as scores and weights of one query head of every KV head at a time;
- plugins, the kernels of `dgemma_build.kernels`: experts on their own tokens only, of the head only probabilities of
  `HEAD_ROWS` positions at a time, in the activations' precision. Attention is the same.

The plugin-free model was held to what the builder of TensorRT for RTX 1.7.1 reports for dozens of graphs, each with a
few dimensions of the released model changed: within 15% where scores, logits or experts take more than some 40 MB.
Three arrays of the size of the scores are alive at once (two in fp32), and two of the logits. Stages use each other's
memory, but what the logits are in 16 bits finds no room among the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgemma_build.checkpoint import TextConfig
from dgemma_build.moe import MOST_PARTS
from dgemma_build.plan.options import PlanOptions
from dgemma_build.tensorrt import longest_chunk
from dgemma_runtime.contract import FULL
from dgemma_runtime.memory_formulas import ELEMENT_BYTES

HEAD_ROWS = 512  # as the kernel is configured for the released model
_LOGITS = 2  # arrays alive at once
_SCORES = {"fp32": 2, "bf16": 3}  # the same, by precision of the activations: casts are stored, too
_GATED_FP8 = 2.5  # of experts: arrays of 2 bytes a value in between; the last is of one byte
_GATED = 3.0


@dataclass(frozen=True)
class Scratch:
    """Bytes at one batch size and context."""

    layer: int  # residual stream, queries and what attention makes of them
    attention: int  # scores, and values in fp8 turned; the larger of prefill and denoising
    experts: int  # the same
    logits: int  # of all canvases

    @property
    def total(self) -> int:
        """Of the widest stage."""
        return self.layer + max(self.logits, self.logits // (2 * _LOGITS) + self.attention, self.experts)


def scratch_bytes(config: TextConfig, options: PlanOptions, batch: int, context: int) -> Scratch:
    """For `batch` canvases in a step, each behind `context` tokens."""
    spec, element = config.spec, ELEMENT_BYTES[options.activations]
    canvases = batch * spec.canvas_length
    tokens = max(canvases, min(longest_chunk(spec.canvas_length), context))  # of a call
    if options.plugins:
        logits = min(canvases, HEAD_ROWS) * spec.vocab_size * element
        experts = tokens * config.top_k_experts * (config.moe_intermediate_size + spec.hidden_size) * element
    else:
        logits = _LOGITS * 4 * canvases * spec.vocab_size
        gated = _GATED_FP8 if options.precision == "fp8" else _GATED
        values = gated * config.num_experts * config.moe_intermediate_size + MOST_PARTS * spec.hidden_size
        experts = round(tokens * values * element)
    widest = config.num_attention_heads * max(layer.head_dim for layer in spec.layers)
    return Scratch(
        layer=tokens * (2 * spec.hidden_size + 3 * widest) * element,
        attention=_attention(config, options, batch, tokens, context),
        experts=experts,
        logits=logits,
    )


def _attention(config: TextConfig, options: PlanOptions, batch: int, tokens: int, context: int) -> int:
    """Of the widest full layer. Sliding layers see little, and have fused kernels."""
    element = ELEMENT_BYTES[options.activations]
    sizes = [0]
    for layer in config.spec.layers:
        if layer.kind == FULL:
            scores = _SCORES[options.activations] * layer.num_key_value_heads * tokens * context * element
            turned = batch * layer.num_key_value_heads * layer.head_dim * context if options.kv == "fp8" else 0
            sizes.append(scores + turned)
    return max(sizes)
