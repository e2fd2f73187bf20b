"""Which kernels the released model needs, with its sizes. Knows no compiler and no tensors."""

from __future__ import annotations

from collections.abc import Iterator

from dgemma_build.kernels.attention import AttentionConfig, AttentionSizes, attention_kernels
from dgemma_build.kernels.experts import LARGE, ExpertsConfig, ExpertSizes, experts_kernels
from dgemma_build.kernels.head import HeadConfig, head_kernels
from dgemma_build.kernels.launch import Kernel
from dgemma_build.kernels.packing import GROUPS, WeightFormat
from dgemma_build.kernels.small import choose_kernel, gated_kernel, norm_kernels, quantise_kernel, rotate_kernel

HIDDEN, VOCABULARY, DENSE_INNER = 2816, 262_144, 2112
EXPERTS = ExpertSizes(experts=128, top_k=8, hidden=HIDDEN, inner=704)
SLIDING = AttentionSizes(heads=16, kv_heads=8, head_dim=256, window=1024, page=64)
FULL = AttentionSizes(heads=16, kv_heads=2, head_dim=512, window=0, page=64)
FORMATS = (WeightFormat("plain"), WeightFormat("fp8"), *(WeightFormat("int4", group) for group in GROUPS))


def released_kernels() -> Iterator[tuple[str, Kernel]]:
    """(variant, kernel) for everything that is compiled ahead of time."""
    for kernel in head_kernels(VOCABULARY, HIDDEN, "bf16", HeadConfig()):
        yield "bf16", kernel
    sort, _, _, total = experts_kernels(EXPERTS, FORMATS[0], "bf16", ExpertsConfig())
    yield "bf16", sort
    yield "bf16", total
    for form in FORMATS:
        for config in (ExpertsConfig(), ExpertsConfig(tokens=64), LARGE):
            for kernel in experts_kernels(EXPERTS, form, "bf16", config)[1:3]:
                yield f"{form.name}-{config.tokens}", kernel
    for name, sizes in (("sliding", SLIDING), ("full", FULL)):
        for cache in ("bf16", "fp8e4nv"):
            parts, total = attention_kernels(sizes, "bf16", cache, AttentionConfig.for_sizes(sizes, cache))
            yield f"{name}-{cache.removesuffix('e4nv')}", parts
        yield name, total
    yield from _small_kernels()


def _small_kernels() -> Iterator[tuple[str, Kernel]]:
    yield "bf16", choose_kernel(EXPERTS.experts, EXPERTS.top_k, "bf16")
    for operand in ("bf16", "fp8"):
        for kernel in (
            *norm_kernels(HIDDEN, "bf16", operand == "fp8"),
            gated_kernel(DENSE_INNER, "bf16", operand == "fp8"),
        ):
            yield operand, kernel
    for name, sizes in (("sliding", SLIDING), ("full", FULL)):
        yield name, quantise_kernel(sizes.heads * sizes.head_dim, "bf16")
        for cache in ("bf16", "fp8e4nv"):
            yield f"{name}-{cache.removesuffix('e4nv')}", rotate_kernel(sizes, "bf16", cache, sizes.window > 0)
