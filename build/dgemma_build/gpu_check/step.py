"""One denoising step of the whole model, from ids to the next soft embedding, by the kernels and PyTorch's products.

    products of attention, dense MLP, self-conditioning   torch.mm, in fp8 torch._scaled_mm with a scale per row
    router                                                torch.mm
    experts, attention over pages, head                   the kernels
    everything between                                    dgemma_build.kernels.small, but for the embedding's few lines

It is `dgemma_build.graph` for canvases, and for ended ones that are encoded beside them, with norms folded in the same
places; but for the layers' scalars, which here are the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from dgemma_build.gpu_check.inputs import Behind
from dgemma_build.gpu_check.machine import Machine
from dgemma_build.gpu_check.sizes import ModelSizes
from dgemma_build.gpu_check.step_weights import Dense, LayerWeights, StepInputs, StepWeights
from dgemma_build.kernels.attention import paged_attention
from dgemma_build.kernels.experts import grouped_experts
from dgemma_build.kernels.head import HeadResult, fused_head
from dgemma_build.kernels.small import (
    Fp8Rows,
    Normed,
    branch_end,
    fp8_rows,
    gated,
    gated_fp8,
    layer_end,
    queries_into_pages,
    route,
)


@dataclass(frozen=True)
class StepResult:
    hidden: Tensor  # [T, H], behind the last layer
    head: HeadResult
    chosen: tuple[Tensor, ...]  # of each layer, [T, top_k] int32


@dataclass(frozen=True)
class Step:
    """A step that can be run again and again; keys and values of the canvas are written to the same slots."""

    machine: Machine
    sizes: ModelSizes
    weights: StepWeights
    inputs: StepInputs

    @property
    def quantise(self) -> bool:
        """Whether products are in fp8."""
        return self.weights.signal_down.scale is not None

    def run(self) -> StepResult:
        hidden = self._embed()
        normed = rms_norm(hidden, hidden.shape[-1:], eps=self.sizes.eps)
        state = Normed(hidden, normed, fp8_rows(normed) if self.quantise else None)
        chosen = []
        for layer, behind in zip(self.weights.layers, self.inputs.behind, strict=True):
            state, choice = self._layer(state, layer, behind)
            chosen.append(choice)
        canvases = state.total[: len(self.inputs.soft)]
        last = rms_norm(canvases, canvases.shape[-1:], self.weights.norm, self.sizes.eps)
        given = (self.inputs.temperature, self.inputs.uniforms, self.sizes.softcap)
        return StepResult(state.total, fused_head(last, self.weights.embedding, *given), tuple(chosen))

    def _embed(self) -> Tensor:
        shape, eps = (self.sizes.hidden,), self.sizes.eps
        tokens = self.weights.embedding[self.inputs.ids] * self.sizes.hidden**0.5
        signal = rms_norm(self.inputs.soft, shape, eps=eps)
        operand = fp8_rows(signal) if self.quantise else None
        both = self._product(signal, operand, self.weights.signal_gate_up)
        canvases, ended = tokens[: len(signal)], tokens[len(signal) :]
        conditioned = rms_norm(canvases + self._down(both, self.weights.signal_down), shape, eps=eps)
        return torch.cat([conditioned, ended]) if len(ended) else conditioned

    def _layer(self, state: Normed, layer: LayerWeights, behind: Behind) -> tuple[Normed, Tensor]:
        eps, quantise = self.sizes.eps, self.quantise
        attended = self._attention(state, layer, behind)
        state = branch_end(attended, state.total, layer.attention_norm, eps, quantise)
        both = self._product(state.normed, state.fp8, layer.gate_up)
        dense = self._down(both, layer.down)
        chosen, share = route(torch.mm(state.normed, layer.router.t()), layer.per_expert, self.sizes.experts.top_k)
        sparse = grouped_experts(state.normed, chosen, share, layer.experts)
        return layer_end(dense, sparse, state.total, layer.norms, layer.scalar, eps, quantise), chosen

    def _attention(self, state: Normed, layer: LayerWeights, behind: Behind) -> Tensor:
        kind = layer.attention
        projected = self._product(state.normed, state.fp8, layer.qkv)
        place = (behind.pages, behind.table, behind.position)
        query = queries_into_pages(
            projected, layer.qk_norm, self.inputs.rotations[kind], *place, sizes=kind, eps=self.sizes.eps
        )
        rules = (behind.table, behind.position, behind.length, behind.is_canvas)
        context = paged_attention(query, behind.pages, *rules, kind.window).view(len(projected), -1)
        return self._product(context, fp8_rows(context) if self.quantise else None, layer.output)

    def _product(self, x: Tensor, operand: Fp8Rows | None, dense: Dense) -> Tensor:
        """[T, out] of x [T, in], which is also `operand` where the product is in fp8."""
        if operand is None:
            return torch.mm(x, dense.weight.t())
        assert dense.scale is not None
        return self.machine.fp8_product(operand.values, operand.scale, dense.weight, dense.scale, x.dtype)

    def _down(self, both: Tensor, dense: Dense) -> Tensor:
        if dense.scale is None:
            return torch.mm(gated(both), dense.weight.t())
        operand = gated_fp8(both)
        return self.machine.fp8_product(operand.values, operand.scale, dense.weight, dense.scale, both.dtype)
