"""What stands between a layer's products, one kernel each: norms and sums, rotation, GEGLU, the choice of experts.

    add_norm        a branch's norm joins the residual, and the sum's own norm
    end_layer       both feed-forward branches' norms, the norm of their sum, the residual, the layer's scalar, and
                    the norm that the next layer reads
    quantise_rows   E4M3 values and one scale a row
    gated_rows      gelu_tanh(gate) * up
    rotate_heads    the norms of queries, keys and values, rotation, and keys and values into their pages
    choose_experts  softmax, top k, shares that sum to 1 times each expert's scale

Every program owns a row (or a head of it) and computes in float32; with fp8 it also leaves the next product's operand.
None of this is much work: what counts is that a step of 30 layers starts hundreds of kernels, not thousands. Norms have
no weight where it can be folded into the matrix behind them, as `dgemma_build.graph` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma_build.kernels.attention import AttentionSizes, KeyValuePages
from dgemma_build.kernels.launch import Kernel, dtype_name, pointer

FP8, FP8_MAX = "fp8e4nv", tl.constexpr(448.0)


@triton.jit
def normed_row(x, eps, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """x over its root mean square; beyond N it is zero."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / N + eps)


@triton.jit
def in_type(values, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 values in another type. To E4M3 in two steps, as Triton's interpreter drops the carry of its rounding."""
    if TYPE == tl.float8e4nv:  # noqa: SIM300 - TYPE is what varies
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF  # three bits behind the point, ties to even
        values = bits.to(tl.float32, bitcast=True)
    return values.to(TYPE)


@triton.jit
def store_fp8(at, scale_at, values, inside):  # type: ignore[no-untyped-def]
    """A row in E4M3, its greatest value at the type's own, and its scale."""
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / FP8_MAX
    tl.store(scale_at, scale)
    scaled = tl.minimum(tl.maximum(values / scale, -FP8_MAX), FP8_MAX)
    tl.store(at, in_type(scaled, at.dtype.element_ty), mask=inside)


@triton.jit
def add_norm(  # type: ignore[no-untyped-def]
    branch_ptr,  # [T, N]
    residual_ptr,  # [T, N]
    weight_ptr,  # [N], of the branch's norm
    sum_ptr,  # out: [T, N] residual + norm(branch) * weight
    normed_ptr,  # out: [T, N] norm of the sum
    fp8_ptr,  # out, with QUANTISE: [T, N] the same in E4M3
    scale_ptr,  # out, with QUANTISE: [T] float32
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < N
    at = row.to(tl.int64) * N + column
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = residual + normed_row(branch, eps, N) * weight
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=inside)
    normed = normed_row(total, eps, N)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    if QUANTISE:
        store_fp8(fp8_ptr + at, scale_ptr + row, normed, inside)


@triton.jit
def end_layer(  # type: ignore[no-untyped-def]
    dense_ptr,  # [T, N]
    sparse_ptr,  # [T, N]
    residual_ptr,  # [T, N]
    weight_ptr,  # [3, N]: of the dense branch's norm, of the experts', of their sum's
    scalar_ptr,  # [1] float32
    sum_ptr,  # out: [T, N] (residual + norm(both)) * scalar
    normed_ptr,  # out: [T, N]
    fp8_ptr,  # out, with QUANTISE: [T, N]
    scale_ptr,  # out, with QUANTISE: [T] float32
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < N
    at = row.to(tl.int64) * N + column
    dense = tl.load(dense_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sparse = tl.load(sparse_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    both = normed_row(dense, eps, N) * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    both += normed_row(sparse, eps, N) * tl.load(weight_ptr + N + column, mask=inside, other=0.0).to(tl.float32)
    both = normed_row(both, eps, N) * tl.load(weight_ptr + 2 * N + column, mask=inside, other=0.0).to(tl.float32)
    total = (residual + both) * tl.load(scalar_ptr)
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=inside)
    normed = normed_row(total, eps, N)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    if QUANTISE:
        store_fp8(fp8_ptr + at, scale_ptr + row, normed, inside)


@triton.jit
def quantise_rows(x_ptr, fp8_ptr, scale_ptr, N: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of [T, N]."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * N + column
    x = tl.load(x_ptr + at, mask=column < N, other=0.0).to(tl.float32)
    store_fp8(fp8_ptr + at, scale_ptr + row, x, column < N)


@triton.jit
def gated_rows(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, 2 N]: gate, then up
    out_ptr,  # out: [T, N], in E4M3 with QUANTISE
    scale_ptr,  # out, with QUANTISE: [T] float32
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTISE: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < N
    x_at = x_ptr + row.to(tl.int64) * 2 * N + column
    gate = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_at + N, mask=inside, other=0.0).to(tl.float32)
    cubic = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # twice the argument of gelu's tanh
    gated = gate / (1.0 + tl.exp(tl.minimum(-cubic, 80.0))) * up
    at = out_ptr + row.to(tl.int64) * N + column
    if QUANTISE:
        store_fp8(at, scale_ptr + row, gated, inside)
    else:
        tl.store(at, gated.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads(  # type: ignore[no-untyped-def]
    projected_ptr,  # [B * L, SLOTS, D]: queries, keys, and values where the layer has a product for them
    weight_ptr,  # [HEADS + KV_HEADS, D], of the norms of queries and keys
    cos_ptr,  # [B * L, D / 2] float32
    sin_ptr,
    table_ptr,  # [B, table_width] int32
    position_ptr,  # [B] int32, tokens of context
    query_ptr,  # out: [B * L, HEADS, D]
    key_ptr,  # out, at the tokens' positions: [pages, KV_HEADS, PAGE, D]
    value_ptr,  # the same
    tokens,  # L
    table_width,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    OWN_VALUES: tl.constexpr,
):
    """One head of one token. Values are normed without weight or rotation; without their own product they are keys'."""
    SLOTS: tl.constexpr = HEADS + KV_HEADS * (1 + OWN_VALUES)
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, HALF)
    x_at = projected_ptr + (token.to(tl.int64) * SLOTS + head) * D + column
    low = tl.load(x_at).to(tl.float32)
    high = tl.load(x_at + HALF).to(tl.float32)
    over = tl.rsqrt((tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / D + eps)
    low *= over
    high *= over
    place = tl.load(position_ptr + token // tokens) + token % tokens
    page = tl.load(table_ptr + token // tokens * table_width + place // PAGE).to(tl.int64)
    kv_head = tl.where(head < HEADS, 0, (head - HEADS) % KV_HEADS)
    slot_at = ((page * KV_HEADS + kv_head) * PAGE + place % PAGE) * D + column
    if head < HEADS + KV_HEADS:
        weight_at = weight_ptr + head * D + column
        cos = tl.load(cos_ptr + token * HALF + column)
        sin = tl.load(sin_ptr + token * HALF + column)
        first = low * tl.load(weight_at).to(tl.float32)
        second = high * tl.load(weight_at + HALF).to(tl.float32)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        if head < HEADS:
            query_at = query_ptr + (token.to(tl.int64) * HEADS + head) * D + column
            tl.store(query_at, turned.to(query_ptr.dtype.element_ty))
            tl.store(query_at + HALF, second.to(query_ptr.dtype.element_ty))
        else:
            tl.store(key_ptr + slot_at, in_type(turned, key_ptr.dtype.element_ty))
            tl.store(key_ptr + slot_at + HALF, in_type(second, key_ptr.dtype.element_ty))
    if head >= HEADS + KV_HEADS * OWN_VALUES:
        tl.store(value_ptr + slot_at, in_type(low, value_ptr.dtype.element_ty))
        tl.store(value_ptr + slot_at + HALF, in_type(high, value_ptr.dtype.element_ty))


@triton.jit
def choose_experts(  # type: ignore[no-untyped-def]
    logits_ptr,  # [T, E]
    per_expert_ptr,  # [E] float32
    chosen_ptr,  # out: [T, TOP_K] int32, most probable first
    share_ptr,  # out: [T, TOP_K] float32
    E: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,  # a power of two, at least TOP_K
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)
    logits = tl.load(logits_ptr + token * E + expert, mask=expert < E, other=0.0).to(tl.float32)
    logits = tl.where(expert < E, logits, -1e30)
    p = tl.where(expert < E, tl.exp(logits - tl.max(logits, axis=0)), -1.0)
    chosen = tl.zeros((CHOICES,), tl.int32)
    share = tl.zeros((CHOICES,), tl.float32)
    for index in tl.static_range(TOP_K):
        best = tl.max(p, axis=0)
        found = tl.min(tl.where(p == best, expert, EXPERTS), axis=0)
        chosen = tl.where(choice == index, found, chosen)
        share = tl.where(choice == index, best, share)
        p = tl.where(expert == found, -1.0, p)
    share = share / tl.sum(share, axis=0) * tl.load(per_expert_ptr + chosen, mask=choice < TOP_K, other=0.0)
    at = token * TOP_K + choice
    tl.store(chosen_ptr + at, chosen, mask=choice < TOP_K)
    tl.store(share_ptr + at, share, mask=choice < TOP_K)


@dataclass(frozen=True)
class Fp8Rows:
    """Activations as operand of an fp8 product."""

    values: Tensor  # [T, N] E4M3
    scale: Tensor  # [T, 1] float32


@dataclass(frozen=True)
class Normed:
    """What a norm leaves."""

    total: Tensor  # [T, N], what was normed: the new residual
    normed: Tensor  # [T, N]
    fp8: Fp8Rows | None


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def norm_kernels(width: int, dtype: str, quantise: bool) -> tuple[Kernel, Kernel]:
    """add_norm and end_layer."""
    x, fp8, f32 = pointer(dtype), pointer(FP8 if quantise else dtype), pointer("fp32")
    scale = f32 if quantise else x
    outputs = {"sum_ptr": x, "normed_ptr": x, "fp8_ptr": fp8, "scale_ptr": scale, "eps": "fp32"}
    block = triton.next_power_of_2(width)
    warps, constants = _warps(block), {"N": width, "BLOCK": block, "QUANTISE": quantise}
    add = {"branch_ptr": x, "residual_ptr": x, "weight_ptr": x} | outputs
    end = {"dense_ptr": x, "sparse_ptr": x, "residual_ptr": x, "weight_ptr": x, "scalar_ptr": f32} | outputs
    return Kernel(add_norm, add, constants, warps, 1), Kernel(end_layer, end, constants, warps, 1)


def quantise_kernel(width: int, dtype: str) -> Kernel:
    block = triton.next_power_of_2(width)
    signature = {"x_ptr": pointer(dtype), "fp8_ptr": pointer(FP8), "scale_ptr": pointer("fp32")}
    return Kernel(quantise_rows, signature, {"N": width, "BLOCK": block}, _warps(block), 1)


def gated_kernel(inner: int, dtype: str, quantise: bool) -> Kernel:
    block = triton.next_power_of_2(inner)
    out, scale = (FP8, "fp32") if quantise else (dtype, dtype)
    signature = {"x_ptr": pointer(dtype), "out_ptr": pointer(out), "scale_ptr": pointer(scale)}
    return Kernel(gated_rows, signature, {"N": inner, "BLOCK": block, "QUANTISE": quantise}, _warps(block), 1)


def rotate_kernel(sizes: AttentionSizes, dtype: str, cache_dtype: str, own_values: bool) -> Kernel:
    x, cache, i32, f32 = pointer(dtype), pointer(cache_dtype), pointer("i32"), pointer("fp32")
    return Kernel(
        rotate_heads,
        {"projected_ptr": x, "weight_ptr": x, "cos_ptr": f32, "sin_ptr": f32, "table_ptr": i32, "position_ptr": i32}
        | {"query_ptr": x, "key_ptr": cache, "value_ptr": cache, "tokens": "i32", "table_width": "i32", "eps": "fp32"},
        {"HEADS": sizes.heads, "KV_HEADS": sizes.kv_heads, "D": sizes.head_dim, "PAGE": sizes.page}
        | {"OWN_VALUES": int(own_values)},
        warps=1,
        stages=1,
    )


def choose_kernel(experts: int, top_k: int, dtype: str) -> Kernel:
    f32 = pointer("fp32")
    signature = {"logits_ptr": pointer(dtype), "per_expert_ptr": f32, "chosen_ptr": pointer("i32"), "share_ptr": f32}
    sizes = {"E": experts, "EXPERTS": triton.next_power_of_2(experts)}
    sizes |= {"TOP_K": top_k, "CHOICES": triton.next_power_of_2(top_k)}
    return Kernel(choose_experts, signature, sizes, warps=1, stages=1)


def _outputs(like: Tensor, quantise: bool) -> tuple[Normed, tuple[Tensor, ...]]:
    total, normed = torch.empty_like(like), torch.empty_like(like)
    if not quantise:
        return Normed(total, normed, None), (total, normed, normed, normed)
    fp8 = _fp8_like(like)
    return Normed(total, normed, fp8), (total, normed, fp8.values, fp8.scale)


def _fp8_like(x: Tensor) -> Fp8Rows:
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    return Fp8Rows(values, x.new_empty(x.shape[0], 1, dtype=torch.float32))


def branch_end(branch: Tensor, residual: Tensor, weight: Tensor, eps: float, quantise: bool) -> Normed:
    """residual + norm(branch) * weight and its norm, all [T, N] but the weight [N]."""
    made, outputs = _outputs(residual, quantise)
    add, _ = norm_kernels(residual.shape[1], dtype_name(residual.dtype), quantise)
    add.launch((residual.shape[0],), branch, residual, weight, *outputs, eps)
    return made


def layer_end(
    dense: Tensor, sparse: Tensor, residual: Tensor, weights: Tensor, scalar: Tensor, eps: float, quantise: bool
) -> Normed:
    """The residual after a layer and its norm, [T, N]; weights [3, N], scalar [1] float32."""
    made, outputs = _outputs(residual, quantise)
    _, end = norm_kernels(residual.shape[1], dtype_name(residual.dtype), quantise)
    end.launch((residual.shape[0],), dense, sparse, residual, weights, scalar, *outputs, eps)
    return made


def fp8_rows(x: Tensor) -> Fp8Rows:
    """x [T, N], quantised by row."""
    made = _fp8_like(x)
    quantise_kernel(x.shape[1], dtype_name(x.dtype)).launch((x.shape[0],), x, made.values, made.scale)
    return made


def gated(both: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, [T, N], of gate and up [T, 2 N]."""
    rows, inner = len(both), both.shape[1] // 2
    out = both.new_empty(rows, inner)
    gated_kernel(inner, dtype_name(both.dtype), False).launch((rows,), both, out, out)
    return out


def gated_fp8(both: Tensor) -> Fp8Rows:
    """The same, quantised by row."""
    rows, inner = len(both), both.shape[1] // 2
    made = _fp8_like(both.new_empty(rows, inner))
    gated_kernel(inner, dtype_name(both.dtype), True).launch((rows,), both, made.values, made.scale)
    return made


@dataclass(frozen=True)
class Rotation:
    """Of every token of a call."""

    cos: Tensor  # [B * L, D / 2] float32
    sin: Tensor


def queries_into_pages(
    projected: Tensor,  # [B * L, (heads + kv_heads [+ kv_heads]) * D]
    weight: Tensor,  # [heads + kv_heads, D]
    rotation: Rotation,
    pages: KeyValuePages,
    table: Tensor,  # [B, width] int32
    position: Tensor,  # [B] int32
    sizes: AttentionSizes,
    eps: float,
) -> Tensor:
    """Queries [B, L, heads, D]; keys and values go to their pages, which must have scale 1."""
    rows, tokens = position.shape[0], projected.shape[0] // position.shape[0]
    slots = projected.shape[1] // sizes.head_dim
    own_values = slots > sizes.heads + sizes.kv_heads
    kernel = rotate_kernel(sizes, dtype_name(projected.dtype), dtype_name(pages.keys.dtype), own_values)
    query = projected.new_empty(rows, tokens, sizes.heads, sizes.head_dim)
    inputs = (projected, weight, rotation.cos, rotation.sin, table, position)
    kernel.launch((rows * tokens, slots), *inputs, query, pages.keys, pages.values, tokens, table.shape[1], eps)
    return query


def route(logits: Tensor, per_expert: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, top_k] int32, the most probable first, and their shares float32."""
    tokens, experts = logits.shape
    chosen = logits.new_empty(tokens, top_k, dtype=torch.int32)
    share = logits.new_empty(tokens, top_k, dtype=torch.float32)
    choose_kernel(experts, top_k, dtype_name(logits.dtype)).launch((tokens,), logits, per_expert, chosen, share)
    return chosen, share
