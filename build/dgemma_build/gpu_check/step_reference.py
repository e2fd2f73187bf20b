"""The same step in float32 PyTorch, by the model's definition. Knows no kernel.

Experts are those that the step under test chose: whether they were the right ones is an error of its own, so that a
near tie does not count as a wrong sum. Operands of fp8 products are rounded to E4M3 here too, but a difference in the
last of 16 bits may become one in the last bit of E4M3: two runs of this very reference, one with inputs moved by
bfloat16's rounding, are 0.09 apart after two layers of the released sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm

from dgemma_build.gpu_check import references
from dgemma_build.gpu_check.inputs import Canvases
from dgemma_build.gpu_check.results import Check
from dgemma_build.gpu_check.step import Step, StepResult
from dgemma_build.gpu_check.step_weights import Dense, LayerWeights
from dgemma_build.kernels.packing import to_fp8
from dgemma_build.kernels.small import Rotation

HIDDEN = {"bf16": 3e-2, "fp8": 0.2, "int4": 3e-2}  # relative, over all rows
CHOICE = {"bf16": 0.3, "fp8": 2.0, "int4": 0.3}  # by how much an expert left out may be more probable than one taken


class StepReference:
    """Walks through the layers of `step`, whose pages hold the context's keys and values."""

    def __init__(self, step: Step, rows: Canvases) -> None:
        self._step, self._rows = step, rows
        self._sizes, self._weights, self._inputs = step.sizes, step.weights, step.inputs
        self.choice = 0.0

    def hidden(self, chosen: tuple[Tensor, ...]) -> Tensor:
        """[T, H] behind the last layer."""
        weights, inputs = self._weights, self._inputs
        signal = self._product(self._norm(inputs.soft.float()), weights.signal_gate_up)
        tokens = weights.embedding[inputs.ids].float() * self._sizes.hidden**0.5
        canvases, ended = tokens[: len(signal)], tokens[len(signal) :]
        hidden = torch.cat([self._norm(canvases + self._down(signal, weights.signal_down)), ended])
        for index, layer in enumerate(weights.layers):
            hidden = self._layer(hidden, index, layer, chosen[index])
        return hidden

    def _norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return rms_norm(x, x.shape[-1:], None if weight is None else weight.float(), self._sizes.eps)

    def _product(self, x: Tensor, dense: Dense) -> Tensor:
        if dense.scale is None:
            return x @ dense.weight.float().T
        values, scale = to_fp8(x)
        return (values.float() * scale[:, None]) @ (dense.weight.float() * dense.scale.T).T

    def _down(self, both: Tensor, dense: Dense) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self._product(gelu(gate, approximate="tanh") * up, dense)

    def _layer(self, hidden: Tensor, index: int, layer: LayerWeights, chosen: Tensor) -> Tensor:
        hidden = hidden + self._norm(self._attention(self._norm(hidden), index, layer), layer.attention_norm)
        normed = self._norm(hidden)
        dense = self._down(self._product(normed, layer.gate_up), layer.down)
        p = (normed @ layer.router.float().T).softmax(dim=-1)
        taken = p.gather(1, chosen.long())
        left = p.scatter(1, chosen.long(), 0.0).amax(dim=-1)
        self.choice = max(self.choice, float((left / taken.amin(dim=-1) - 1).max()))
        share = taken / taken.sum(dim=-1, keepdim=True) * layer.per_expert[chosen.long()]
        sparse = references.experts(normed, chosen, share, layer.experts)
        both = self._norm(dense, layer.norms[0]) + self._norm(sparse, layer.norms[1])
        return (hidden + self._norm(both, layer.norms[2])) * layer.scalar

    def _attention(self, normed: Tensor, index: int, layer: LayerWeights) -> Tensor:
        """The canvas's keys and values go to their slots in the pages, over those of the step under test."""
        kind, rows = layer.attention, self._rows
        by_head = self._norm(self._product(normed, layer.qkv).view(len(normed), -1, kind.head_dim))
        turned = _turned(by_head[:, : kind.heads + kind.kv_heads] * layer.qk_norm.float(), self._inputs.rotations[kind])
        query, keys = turned[:, : kind.heads], turned[:, kind.heads :]
        behind = self._inputs.behind[index]
        place = torch.arange(rows.context, rows.context + rows.tokens, device=normed.device)
        for row in range(rows.count):
            page, slot = behind.table[row, place // kind.page].long(), place % kind.page
            own = slice(row * rows.tokens, (row + 1) * rows.tokens)
            for pool, values in ((behind.pages.keys, keys), (behind.pages.values, by_head[:, -kind.kv_heads :])):
                stored = values[own].to(pool.dtype).contiguous()
                pool.view(torch.uint8)[page, :, slot] = stored.view(torch.uint8)  # fp8 may not be put by index
        query = query.reshape(rows.count, rows.tokens, kind.heads, kind.head_dim)
        context = references.attention(query, behind, rows, kind)
        return self._product(context.flatten(0, 1).flatten(1), layer.output)


def _turned(x: Tensor, rotation: Rotation) -> Tensor:
    """x [T, heads, D], each half-pair by its angle."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def step_checks(step: Step, rows: Canvases, precision: str) -> tuple[StepResult, tuple[Check, ...]]:
    """The step's result and how far it is from the reference, which writes its own keys and values into the cache."""
    result = step.run()
    reference = StepReference(step, rows)
    expected = reference.hidden(result.chosen)
    error = float((result.hidden.float() - expected).norm() / expected.norm())
    canvases = result.hidden[: len(step.inputs.soft)]
    last = rms_norm(canvases, canvases.shape[-1:], step.weights.norm, step.sizes.eps)
    given = (step.inputs.temperature, step.inputs.uniforms, step.sizes.softcap)
    head = references.head_checks(result.head, last, step.weights.embedding, *given)
    hidden = Check("hidden", error, HIDDEN[precision])
    return result, (hidden, Check("experts chosen", reference.choice, CHOICE[precision]), *head)
