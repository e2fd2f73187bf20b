"""Random contexts in pages, and what tensors take. Knows no kernel's answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_build.gpu_check.machine import Machine
from dgemma_build.kernels.attention import AttentionSizes, KeyValuePages
from dgemma_build.kernels.packing import ExpertWeights

NO_PAGE = -1  # in tables, for pages that no token sees
SEED = 20_261


def generator(machine: Machine, stream: int) -> torch.Generator:
    """Seeded, on the device."""
    return torch.Generator(machine.device).manual_seed(SEED + stream)


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def expert_bytes(weights: ExpertWeights) -> int:
    """Of all experts; plain weights have themselves for scales."""
    parts = (weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale)
    return sum(map(size_of, {part.data_ptr(): part for part in parts}.values()))


@dataclass(frozen=True)
class Canvases:
    """Rows of one call: `count` rows of `tokens` new tokens, each behind `context` of its own.

    Of whole steps the last `commits` rows are canvases that have ended and are encoded beside the others.
    """

    count: int
    tokens: int
    context: int
    bidirectional: bool
    commits: int = 0

    def sees_all(self, row: int) -> bool:
        """Whether a row's tokens see those behind them, too."""
        return self.bidirectional and row < self.count - self.commits

    def first_seen(self, window: int) -> int:
        """The first position that any token sees."""
        return max(0, self.context - (window - 1)) if window else 0

    def seen(self, window: int) -> tuple[int, float]:
        """Positions that a row's tokens see between them, and (token, position) pairs."""
        end = self.context + self.tokens
        positions = end - self.first_seen(window)
        if self.bidirectional:
            return positions, float(self.tokens * positions)
        each = (min(token + 1, window) if window else token + 1 for token in range(self.context, end))
        return positions, float(sum(each))


@dataclass(frozen=True)
class Behind:
    """Keys and values of one layer and what says where they are; new tokens' slots are filled too."""

    pages: KeyValuePages
    table: Tensor  # [count, width] int32
    position: Tensor  # [count] int32
    length: Tensor
    is_canvas: Tensor


def cache_behind(
    machine: Machine,
    layer: AttentionSizes,
    rows: Canvases,
    dtype: torch.dtype,
    cache: torch.dtype,
    random: torch.Generator,
    key_spread: float = 1.0,
) -> Behind:
    """Pages in random order, for what is seen; keys and values are normal numbers."""
    device = machine.device
    width = -(-(rows.context + rows.tokens) // layer.page)
    first = rows.first_seen(layer.window) // layer.page
    used = rows.count * (width - first)
    order = torch.randperm(used, generator=random, device=device).int()
    table = torch.full((rows.count, width), NO_PAGE, dtype=torch.int32, device=device)
    table[:, first:] = order.view(rows.count, -1)
    shape = (used, layer.kv_heads, layer.page, layer.head_dim)

    def values(spread: float) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, spread, generator=random)
        return drawn.to(cache)

    def column(value: int) -> Tensor:
        return torch.full((rows.count,), value, dtype=torch.int32, device=device)

    pages = KeyValuePages(values(key_spread), values(1.0))
    is_canvas = torch.tensor([rows.sees_all(row) for row in range(rows.count)], dtype=torch.int32, device=device)
    return Behind(pages, table, column(rows.context), column(rows.tokens), is_canvas)
