"""What the card does at best, by PyTorch's own kernels: bandwidth, products in bf16 and fp8. Knows no model."""

from __future__ import annotations

import torch

from dgemma_build.gpu_check.machine import Machine
from dgemma_build.gpu_check.results import Card
from dgemma_build.gpu_check.sizes import Scope


def measure_card(machine: Machine, scope: Scope, dtype: torch.dtype) -> Card:
    """Medians; `dtype` is the 16-bit type of products."""
    read, copy, launch = _memory(machine, scope)
    machine.release()
    side = scope.probe_side
    left, right = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
    plain = machine.time(lambda: torch.mm(left, right.t()), scope.repetitions)
    left_fp8, right_fp8 = (matrix.to(torch.float8_e4m3fn) for matrix in (left, right))
    one = torch.ones((), dtype=torch.float32, device=machine.device)
    fp8 = machine.time(lambda: machine.fp8_product(left_fp8, one, right_fp8, one, dtype), scope.repetitions)
    flops = 2.0 * side**3
    return Card(
        copy=2e3 * scope.probe_bytes / copy,
        read=1e3 * scope.probe_bytes / read,
        bf16_flops=1e3 * flops / plain.median_ms,
        fp8_flops=1e3 * flops / fp8.median_ms,
        launch_ms=launch,
    )


def _memory(machine: Machine, scope: Scope) -> tuple[float, float, float]:
    """Milliseconds to read `probe_bytes`, to copy them, and to do next to nothing."""
    source = torch.ones(scope.probe_bytes // 4, dtype=torch.float32, device=machine.device)
    target = torch.empty_like(source)
    calls = (source.sum, lambda: target.copy_(source), target[:32].zero_)
    read, copy, launch = (machine.time(call, scope.repetitions).median_ms for call in calls)
    return read, copy, launch
