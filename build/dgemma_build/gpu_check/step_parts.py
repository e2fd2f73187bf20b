"""The pieces of a step on their own, over all layers: where its time goes. Knows no numbers to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgemma_build.gpu_check.step import Step, StepResult
from dgemma_build.gpu_check.step_weights import Dense
from dgemma_build.kernels.attention import paged_attention
from dgemma_build.kernels.experts import grouped_experts
from dgemma_build.kernels.head import fused_head
from dgemma_build.kernels.small import fp8_rows


def step_parts(step: Step, result: StepResult) -> dict[str, Callable[[], object]]:
    """Calls that do what a step does of each kind; what is left of the step's time is between them."""
    hidden, weights, inputs = result.hidden, step.weights, step.inputs
    share = torch.full(result.chosen[0].shape, 0.1, dtype=torch.float32, device=hidden.device)
    pairs = list(zip(weights.layers, inputs.behind, strict=True))
    queries = {kind: _query(step, len(hidden), kind.heads, kind.head_dim) for kind in inputs.rotations}

    def experts() -> None:
        for layer, chosen in zip(weights.layers, result.chosen, strict=True):
            grouped_experts(hidden, chosen, share, layer.experts)

    def attention() -> None:
        for layer, behind in pairs:
            rules = (behind.table, behind.position, behind.length, behind.is_canvas)
            paged_attention(queries[layer.attention], behind.pages, *rules, layer.attention.window)

    def head() -> None:
        given = (inputs.temperature, inputs.uniforms, step.sizes.softcap)
        fused_head(hidden[: len(inputs.soft)], weights.embedding, *given)

    return {"experts": experts, "attention": attention, "products": _products(step, hidden), "head": head}


def _query(step: Step, tokens: int, heads: int, head_dim: int) -> Tensor:
    rows = len(step.inputs.behind[0].position)
    drawn = torch.randn(rows, tokens // rows, heads, head_dim, device=step.machine.device)
    return (drawn * float(head_dim**-0.25)).to(step.sizes.dtype)


def _products(step: Step, hidden: Tensor) -> Callable[[], None]:
    """Of attention, dense MLP, self-conditioning and router; operands are there already."""
    weights = step.weights
    dense = [weights.signal_gate_up, weights.signal_down]
    for layer in weights.layers:
        dense += [layer.qkv, layer.output, layer.gate_up, layer.down]
    widths = {matrix.weight.shape[1] for matrix in dense}
    plain = {width: torch.randn(len(hidden), width, device=hidden.device).to(hidden.dtype) for width in widths}
    fp8 = {width: fp8_rows(x) for width, x in plain.items()} if step.quantise else {}

    def product(matrix: Dense) -> None:
        width = matrix.weight.shape[1]
        if matrix.scale is None:
            torch.mm(plain[width], matrix.weight.t())
        else:
            operand = fp8[width]
            step.machine.fp8_product(operand.values, operand.scale, matrix.weight, matrix.scale, hidden.dtype)

    def products() -> None:
        for matrix in dense:
            product(matrix)
        for layer in weights.layers:
            torch.mm(hidden, layer.router.t())

    return products
