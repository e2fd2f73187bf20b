"""Each kernel at the model's sizes: inputs, PyTorch's answer, and the work that cannot be done without.

Bytes are those of memory: weights once, keys and values that a call sees once, what goes in and out; the head's
embedding twice, as no program holds a row of soft embedding, and its relative probabilities written and read. What
kernels pass to each other within the L2 cache does not count. FLOPs are those of the products, for tokens and keys that
are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma_build.gpu_check import references
from dgemma_build.gpu_check.inputs import Canvases, cache_behind, expert_bytes, generator
from dgemma_build.gpu_check.machine import Machine
from dgemma_build.gpu_check.results import Check, Work
from dgemma_build.gpu_check.sizes import ModelSizes, Scope
from dgemma_build.kernels.attention import AttentionSizes, paged_attention
from dgemma_build.kernels.experts import grouped_experts
from dgemma_build.kernels.head import fused_head
from dgemma_build.kernels.packing import WeightFormat, pack_experts

SHARE_BAR = 0.8  # of the measured bandwidth: experts and head at one canvas
ROWS = 1e-2  # greatest relative error of a row of results in 16 bits; 2 ** -9 is one rounding


@dataclass(frozen=True)
class Prepared:
    """A case with its inputs on the device."""

    run: Callable[[], object]
    check: Callable[[], tuple[Check, ...]]
    work: Work


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Machine], Prepared]
    bandwidth_bar: float | None = None  # least share


def all_cases(sizes: ModelSizes, scope: Scope) -> Iterator[Case]:
    for canvases in (1, scope.canvases):
        name = f"head, {in_words(canvases)}"
        yield Case(name, _head(sizes, canvases * sizes.canvas), SHARE_BAR if canvases == 1 else None)
    for precision in ("bf16", "fp8", "int4"):
        for tokens, text in (
            (sizes.canvas, in_words(1)),
            (scope.canvases * sizes.canvas, in_words(scope.canvases)),
            (scope.chunk, f"prefill of {scope.chunk:,}"),
        ):
            bar = SHARE_BAR if tokens == sizes.canvas else None
            yield Case(f"experts {precision}, {text}", _experts(sizes, sizes.form(precision), tokens), bar)
    for kind, layer in (("sliding", sizes.sliding), ("full", sizes.full)):
        for cache, dtype in (("bf16", sizes.dtype), ("fp8", torch.float8_e4m3fn)):
            stem = f"attention {kind} {cache} cache"
            for context in scope.contexts:
                rows = Canvases(1, sizes.canvas, context, True)
                yield Case(f"{stem}, 1 canvas behind {context:,}", _attention(sizes, layer, dtype, rows))
            several = Canvases(scope.canvases, sizes.canvas, scope.chunk_context, True)
            text = f"{in_words(scope.canvases)} behind {scope.chunk_context:,}"
            yield Case(f"{stem}, {text}", _attention(sizes, layer, dtype, several))
            chunk = Canvases(1, scope.chunk, scope.chunk_context, False)
            text = f"prefill of {scope.chunk:,} behind {scope.chunk_context:,}"
            yield Case(f"{stem}, {text}", _attention(sizes, layer, dtype, chunk))


def in_words(count: int) -> str:
    """Of canvases."""
    return f"{count} canvas" if count == 1 else f"{count} canvases"


def row_error(result: Tensor, expected: Tensor) -> float:
    """Greatest relative error of a row (the last axis), by Euclidean norm."""
    difference = (result.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1).clamp(min=1e-20)).max())


def _head(sizes: ModelSizes, rows: int) -> Callable[[Machine], Prepared]:
    def prepare(machine: Machine) -> Prepared:
        random = generator(machine, 1)
        hidden = torch.randn(rows, sizes.hidden, generator=random, device=machine.device).to(sizes.dtype)
        embedding = torch.randn(sizes.vocabulary, sizes.hidden, generator=random, device=machine.device)
        embedding = (embedding * (4 * sizes.hidden**-0.5)).to(sizes.dtype)
        temperature = 0.4 + 0.4 * torch.rand(rows, generator=random, device=machine.device)
        uniforms = torch.rand(rows, generator=random, device=machine.device)
        given = (hidden, embedding, temperature, uniforms, sizes.softcap)
        element = sizes.dtype.itemsize
        read = 2 * embedding.numel() + 2 * rows * sizes.vocabulary + 2 * hidden.numel()
        work = Work(bytes=element * read, flops=4.0 * rows * embedding.numel())
        return Prepared(lambda: fused_head(*given), lambda: references.head_checks(fused_head(*given), *given), work)

    return prepare


def _experts(sizes: ModelSizes, form: WeightFormat, tokens: int) -> Callable[[Machine], Prepared]:
    shape = sizes.experts

    def prepare(machine: Machine) -> Prepared:
        random = generator(machine, 2)

        def matrix(outputs: int, inputs: int) -> Tensor:
            values = torch.empty(shape.experts, outputs, inputs, dtype=sizes.dtype, device=machine.device)
            return values.normal_(0.0, inputs**-0.5, generator=random)

        weights = pack_experts(matrix(2 * shape.inner, shape.hidden), matrix(shape.hidden, shape.inner), form)
        x = torch.randn(tokens, shape.hidden, generator=random, device=machine.device).to(sizes.dtype)
        scores = torch.randn(tokens, shape.experts, generator=random, device=machine.device)
        share, chosen = scores.softmax(dim=-1).topk(shape.top_k)
        given = (x, chosen.int(), share, weights)

        def check() -> tuple[Check, ...]:
            expected = references.experts(*given)
            return (Check("output", row_error(grouped_experts(*given), expected), ROWS),)

        reached = len(torch.unique(chosen)) / shape.experts
        read = reached * expert_bytes(weights)
        pairs = float(tokens * shape.top_k)
        work = Work(read + 2 * x.numel() * x.element_size(), 6.0 * pairs * shape.hidden * shape.inner)
        return Prepared(lambda: grouped_experts(*given), check, work)

    return prepare


def _attention(
    sizes: ModelSizes, layer: AttentionSizes, cache: torch.dtype, rows: Canvases
) -> Callable[[Machine], Prepared]:
    def prepare(machine: Machine) -> Prepared:
        random = generator(machine, 3)
        behind = cache_behind(machine, layer, rows, sizes.dtype, cache, random)
        shape = (rows.count, rows.tokens, layer.heads, layer.head_dim)
        query = torch.randn(shape, generator=random, device=machine.device)
        query = (query * (2 * layer.head_dim**-0.5)).to(sizes.dtype)  # scores vary by 2
        given = (query, behind.pages, behind.table, behind.position, behind.length, behind.is_canvas, layer.window)

        def check() -> tuple[Check, ...]:
            expected = references.attention(query, behind, rows, layer)
            return (Check("output", row_error(paged_attention(*given), expected), ROWS),)

        seen, pairs = rows.seen(layer.window)
        slots = 2.0 * rows.count * seen * layer.kv_heads * layer.head_dim
        bytes_ = slots * behind.pages.keys.element_size() + 2 * query.numel() * query.element_size()
        work = Work(bytes_, 4.0 * rows.count * pairs * layer.heads * layer.head_dim)
        return Prepared(lambda: paged_attention(*given), check, work)

    return prepare
