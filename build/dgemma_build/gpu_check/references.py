"""PyTorch's answers in float32 (cumulative probabilities in float64), in pieces that fit beside the inputs.

Knows what the kernels compute, not how. Products of float32 must not run in TF32: `exact_products` sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import gelu

from dgemma_build.gpu_check.inputs import Behind, Canvases
from dgemma_build.gpu_check.results import Check
from dgemma_build.kernels.attention import AttentionSizes
from dgemma_build.kernels.head import HeadResult
from dgemma_build.kernels.packing import ExpertWeights, dequantised

HEAD_ROWS = 128  # at once
ARGMAX, SAMPLE, ENTROPY, SOFT = 2e-3, 5e-4, 3e-3, 1e-2


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def head_checks(
    result: HeadResult, hidden: Tensor, embedding: Tensor, temperature: Tensor, uniforms: Tensor, cap: float
) -> tuple[Check, ...]:
    """Of every row; errors are the greatest.

    argmax    how far the chosen id's tempered logit is below the greatest
    sampled   how far the uniform number is outside the chosen id's interval of cumulated probability
    entropies nats
    soft      relative, by row
    """
    argmax = sampled = entropies = soft = 0.0
    wide = embedding.float()
    for start in range(0, len(hidden), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        z = cap * torch.tanh(hidden[rows].float() @ wide.T / cap) / temperature[rows, None]
        log_p = torch.log_softmax(z, dim=-1)
        p = log_p.exp()
        below = z.amax(dim=-1) - z.gather(1, result.argmax[rows, None].long())[:, 0]
        until = p.double().cumsum(dim=-1)
        ids, drawn = result.sampled[rows, None].long(), uniforms[rows].double()
        upper = until.gather(1, ids)[:, 0]
        lower = upper - p.gather(1, ids)[:, 0].double()
        outside = torch.maximum(lower - drawn, drawn - upper).clamp(min=0)
        entropy = -(p * log_p).sum(dim=-1)
        expected = p @ wide * math.sqrt(hidden.shape[1])
        error = (result.soft_embedding[rows].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        argmax, sampled = _worst(argmax, below), _worst(sampled, outside)
        entropies = _worst(entropies, (result.entropy[rows] - entropy).abs())
        soft = _worst(soft, error)
    return (
        Check("argmax", argmax, ARGMAX),
        Check("sampled", sampled, SAMPLE),
        Check("entropies", entropies, ENTROPY),
        Check("soft embedding", soft, SOFT),
    )


def _worst(before: float, errors: Tensor) -> float:
    """NaN stays."""
    now = float(errors.max())
    return now if math.isnan(now) or now > before else before


def experts(x: Tensor, chosen: Tensor, share: Tensor, weights: ExpertWeights) -> Tensor:
    """[tokens, H] float32, expert by expert."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(weights.gate_up)):
        token, choice = torch.where(chosen == expert)
        gate_up = dequantised(weights.gate_up[expert], weights.gate_up_scale[expert], weights.form).float()
        down = dequantised(weights.down[expert], weights.down_scale[expert], weights.form).float()
        gate, up = (x[token].float() @ gate_up.T).chunk(2, dim=-1)
        product = (gelu(gate, approximate="tanh") * up) @ down.T
        out.index_add_(0, token, product * share[token, choice, None])
    return out


def attention(query: Tensor, behind: Behind, rows: Canvases, layer: AttentionSizes) -> Tensor:
    """[count, tokens, heads, head_dim] float32, one head at a time; cache scales are those of the pages."""
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    group = layer.heads // layer.kv_heads
    first = rows.first_seen(layer.window)
    page = first // layer.page
    position = torch.arange(page * layer.page, rows.context + rows.tokens, device=query.device)
    token = torch.arange(rows.context, rows.context + rows.tokens, device=query.device)[:, None]
    past = position <= token
    if layer.window:
        past = past & (position > token - layer.window)
    for row in range(rows.count):
        visible = position >= first if rows.sees_all(row) else past
        used = behind.table[row, page:].long()
        for head in range(layer.heads):
            kv_head = head // group
            # Widened before pages are picked: not every version of PyTorch can pick in fp8.
            keys = behind.pages.keys[:, kv_head].float()[used].flatten(0, 1)[: len(position)]
            scores = query[row, :, head].float() @ keys.T * behind.pages.key_scale
            p = scores.masked_fill_(~visible, -torch.inf).softmax(dim=-1)
            values = behind.pages.values[:, kv_head].float()[used].flatten(0, 1)[: len(position)]
            out[row, :, head] = p @ values * behind.pages.value_scale
    return out
