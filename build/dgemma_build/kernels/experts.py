"""Grouped GEGLU experts: tokens sorted by expert, two grouped products, and a sum in a fixed order.

    experts_sort     the (token, expert) pairs in order of their expert, stable; where each expert's pairs begin
    experts_gate_up  gelu_tanh(gate) * up of every pair, from the token's row, for a tile of one expert's inner columns
    experts_down     every pair's product with its expert's other matrix, times the router's share
    experts_sum      adds each token's top-k products in the order of its choices

No atomics, no sizes read back by the host: the grid covers the most tiles that the number of pairs allows, and a
program finds its expert from the beginnings. Equal inputs give equal bits.

Weights are the left operand, because a canvas gives an expert 16 tokens on average and Hopper's products have at least
64 rows but as few as 8 columns. At one canvas the cost is reading the weights: in the released model 1.52 GB a layer in
16 bits, 0.76 GB in fp8, 0.39 to 0.43 GB in int4; the pairs write and read 29 MB, within the L2 cache.

Weights are plain (the activations' type), fp8 (E4M3, one float32 scale per output channel) or int4 (`packing`). Their
values are exact in the activations' type, in which they are multiplied; scales meet the float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dgemma_build.kernels.launch import Kernel, dtype_name, pointer
from dgemma_build.kernels.packing import ExpertWeights, WeightFormat

SORT_STEP = 1024  # pairs


@triton.jit
def experts_sort(expert_ptr, order_ptr, begin_ptr, pairs, E: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One expert: its pairs go to order [pairs] int32 from begin[expert] on; begin [E + 1] int32."""
    expert = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        before += (tl.load(expert_ptr + at, mask=at < pairs, other=E) < expert).to(tl.int32)
    begin = tl.sum(before, axis=0)
    tl.store(begin_ptr + expert, begin)
    if expert == E - 1:
        tl.store(begin_ptr + E, pairs)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = tl.load(expert_ptr + at, mask=at < pairs, other=E) == expert
        until = tl.cumsum(own.to(tl.int32), axis=0)
        tl.store(order_ptr + begin + until - 1, at, mask=own)
        begin += tl.sum(own.to(tl.int32), axis=0)


@triton.jit
def find_tile(begin_ptr, tile, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """The expert of a tile of pairs (E past the last), the tile's first place in the order and its expert's end."""
    expert = tl.arange(0, EXPERTS)
    begin = tl.load(begin_ptr + expert, mask=expert < E, other=0)
    end = tl.load(begin_ptr + expert + 1, mask=expert < E, other=0)
    tiles = (end - begin + BLOCK_T - 1) // BLOCK_T
    until = tl.cumsum(tiles, axis=0)
    found = tl.sum(((until <= tile) & (expert < E)).to(tl.int32), axis=0)
    own = expert == found
    first = tl.sum(tl.where(own, begin + (tile - until + tiles) * BLOCK_T, 0), axis=0)
    return found, first, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def add_product(  # type: ignore[no-untyped-def]
    total,  # [rows, tokens] float32
    weight_at,  # [rows, 1] pointers to the rows' first weights (bytes of int4)
    scale_at,  # [rows] pointers to the rows' first scales; one axis, or every thread loads its scales many times
    start,
    x_low,  # [step, tokens]; of int4, [step / 2, tokens]
    x_high,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # int4 values of one scale; 0: the weights are not int4
):
    """Add weights [rows, start : start + BLOCK_K] @ x."""
    if GROUP == 0:
        columns = start + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            weight = tl.load(weight_at + columns[None, :])
        else:
            weight = tl.load(weight_at + columns[None, :], mask=(columns < K)[None, :], other=0.0)
        if weight.dtype != x_low.dtype:  # fp8: by way of float32, as float16 to bfloat16 is an instruction a value
            weight = weight.to(tl.float32).to(x_low.dtype)
        total = tl.dot(weight, x_low, total)
    else:
        half: tl.constexpr = BLOCK_K // 2
        packed = tl.load(weight_at + start // 2 + tl.arange(0, half)[None, :])
        low_scale = tl.load(scale_at + start // GROUP).to(tl.float32)
        high_scale = tl.load(scale_at + (start + half) // GROUP).to(tl.float32)
        low = ((packed & 15).to(tl.int8) - 8).to(x_low.dtype)
        high = ((packed >> 4).to(tl.int8) - 8).to(x_high.dtype)
        total += tl.dot(low, x_low) * low_scale[:, None]
        total += tl.dot(high, x_high) * high_scale[:, None]
    return total


@triton.jit
def load_tokens(x_at, start, columns, K: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [columns, tokens] from `start` on; x_at are the tokens' rows, [1, tokens]."""
    if K % BLOCK_K == 0:
        x = tl.load(x_at + start + columns[:, None])
    else:
        x = tl.load(x_at + start + columns[:, None], mask=(start + columns < K)[:, None], other=0.0)
    return x


@triton.jit
def experts_gate_up(  # type: ignore[no-untyped-def]
    x_ptr,  # [tokens, K]
    weight_ptr,  # [E, 2 I, K]: gate, then up
    scale_ptr,  # fp8: [E, 2 I] float32; int4: [E, 2 I, groups]; plain: never read
    order_ptr,
    begin_ptr,
    gated_ptr,  # out: [pairs, I], in the sorted order
    K: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E
    TOP_K: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one expert's pairs, BLOCK_R of its inner columns."""
    expert, first, end = find_tile(begin_ptr, tl.program_id(0), E, EXPERTS, BLOCK_T)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_T)
    token = tl.load(order_ptr + place, mask=place < end, other=0) // TOP_K
    x_at = x_ptr + token.to(tl.int64)[None, :] * K
    inner = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    gate_row = expert.to(tl.int64) * 2 * INNER + tl.where(inner < INNER, inner, 0)
    width: tl.constexpr = K if GROUP == 0 else K // 2
    groups: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    gate_at = weight_ptr + gate_row[:, None] * width
    gate_scale_at = scale_ptr + gate_row * groups
    half: tl.constexpr = BLOCK_K if GROUP == 0 else BLOCK_K // 2
    columns = tl.arange(0, half)
    gate = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for start in range(0, K, BLOCK_K):
        low = load_tokens(x_at, start, columns, K, BLOCK_K)
        high = low if GROUP == 0 else load_tokens(x_at, start + half, columns, K, BLOCK_K)
        gate = add_product(gate, gate_at, gate_scale_at, start, low, high, K, BLOCK_K, GROUP)
        up_at, up_scale_at = gate_at + INNER * width, gate_scale_at + INNER * groups
        up = add_product(up, up_at, up_scale_at, start, low, high, K, BLOCK_K, GROUP)
    if FP8:
        gate *= tl.load(gate_scale_at)[:, None]
        up *= tl.load(gate_scale_at + INNER)[:, None]
    cubic = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # twice the argument of gelu's tanh
    gated = gate / (1.0 + tl.exp(tl.minimum(-cubic, 80.0))) * up
    at = gated_ptr + place.to(tl.int64)[None, :] * INNER + inner[:, None]
    tl.store(at, gated.to(gated_ptr.dtype.element_ty), mask=(place < end)[None, :] & (inner < INNER)[:, None])


@triton.jit
def experts_down(  # type: ignore[no-untyped-def]
    gated_ptr,  # [pairs, K], in the sorted order
    weight_ptr,  # [E, H, K]
    scale_ptr,  # fp8: [E, H] float32; int4: [E, H, groups]; plain: never read
    order_ptr,
    begin_ptr,
    share_ptr,  # [pairs] float32, by pair
    product_ptr,  # out: [pairs, H], by pair
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one expert's pairs, BLOCK_R of the output's columns."""
    expert, first, end = find_tile(begin_ptr, tl.program_id(0), E, EXPERTS, BLOCK_T)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_T)
    gated_at = gated_ptr + tl.where(place < end, place, 0).to(tl.int64)[None, :] * K
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = expert.to(tl.int64) * H + tl.where(column < H, column, 0)
    width: tl.constexpr = K if GROUP == 0 else K // 2
    groups: tl.constexpr = 1 if GROUP == 0 else (K + GROUP - 1) // GROUP
    weight_at = weight_ptr + row[:, None] * width
    scale_at = scale_ptr + row * groups
    half: tl.constexpr = BLOCK_K if GROUP == 0 else BLOCK_K // 2
    inner = tl.arange(0, half)
    product = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for start in range(0, K, BLOCK_K):
        low = load_tokens(gated_at, start, inner, K, BLOCK_K)
        high = low if GROUP == 0 else load_tokens(gated_at, start + half, inner, K, BLOCK_K)
        product = add_product(product, weight_at, scale_at, start, low, high, K, BLOCK_K, GROUP)
    if FP8:
        product *= tl.load(scale_at)[:, None]
    pair = tl.load(order_ptr + place, mask=place < end, other=0)
    product *= tl.load(share_ptr + pair)[None, :]
    at = product_ptr + pair.to(tl.int64)[None, :] * H + column[:, None]
    tl.store(at, product.to(product_ptr.dtype.element_ty), mask=(place < end)[None, :] & (column < H)[:, None])


@triton.jit
def experts_sum(product_ptr, out_ptr, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK columns of one token: out [tokens, H] from products [tokens * TOP_K, H]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        at = product_ptr + (token * TOP_K + choice) * H + column
        total += tl.load(at, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


@dataclass(frozen=True)
class ExpertSizes:
    experts: int
    top_k: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class ExpertsConfig:
    """Tile sizes, all powers of two; the defaults are for one canvas of the released model on an H100."""

    tokens: int = 32  # pairs of a tile
    inner: int = 64  # inner columns of a tile of the first product (as many of gate and of up)
    columns: int = 128  # output columns of a tile of the second product
    step: int = 64  # inputs of one step, doubled for fp8 where that divides; int4 takes its run instead
    warps: int = 4
    stages: int = 4
    sum_columns: int = 1024

    @staticmethod
    def for_tokens(tokens: int, sizes: ExpertSizes) -> ExpertsConfig:
        """Tiles about as long as an expert's share of the pairs."""
        share = tokens * sizes.top_k / sizes.experts
        return ExpertsConfig() if share <= 24 else ExpertsConfig(tokens=64) if share <= 96 else LARGE


LARGE = ExpertsConfig(tokens=128, warps=8)


def experts_kernels(
    sizes: ExpertSizes, form: WeightFormat, dtype: str, config: ExpertsConfig
) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    """experts_sort, experts_gate_up, experts_down and experts_sum; `dtype` is the activations'."""
    x, i32, f32 = pointer(dtype), pointer("i32"), pointer("fp32")
    weights = {"weight_ptr": pointer(form.stored(dtype)), "scale_ptr": pointer(form.scale(dtype))}
    sorted_ = {"order_ptr": i32, "begin_ptr": i32}
    shared = {"E": sizes.experts, "EXPERTS": triton.next_power_of_2(sizes.experts), "BLOCK_T": config.tokens}
    shared |= {"FP8": form.kind == "fp8", "GROUP": form.group}

    def step(inputs: int) -> int:
        if form.group:
            return form.run(inputs)
        return 2 * config.step if form.kind == "fp8" and inputs % (2 * config.step) == 0 else config.step

    sort = Kernel(
        experts_sort,
        {"expert_ptr": i32, "order_ptr": i32, "begin_ptr": i32, "pairs": "i32"},
        {"E": sizes.experts, "BLOCK": SORT_STEP},
        warps=4,
        stages=1,
    )
    gate_up = Kernel(
        experts_gate_up,
        {"x_ptr": x} | weights | sorted_ | {"gated_ptr": x},
        shared
        | {"K": sizes.hidden, "INNER": sizes.inner, "TOP_K": sizes.top_k}
        | {"BLOCK_R": config.inner, "BLOCK_K": step(sizes.hidden)},
        config.warps,
        config.stages,
    )
    down = Kernel(
        experts_down,
        {"gated_ptr": x} | weights | sorted_ | {"share_ptr": f32, "product_ptr": x},
        shared | {"K": sizes.inner, "H": sizes.hidden} | {"BLOCK_R": config.columns, "BLOCK_K": step(sizes.inner)},
        config.warps,
        config.stages,
    )
    total = Kernel(
        experts_sum,
        {"product_ptr": x, "out_ptr": x},
        {"H": sizes.hidden, "TOP_K": sizes.top_k, "BLOCK": config.sum_columns},
        warps=4,
        stages=1,
    )
    return sort, gate_up, down, total


def grouped_experts(
    x: torch.Tensor,  # [tokens, H]
    chosen: torch.Tensor,  # [tokens, top_k] int32, each in [0, experts)
    share: torch.Tensor,  # [tokens, top_k] float32
    weights: ExpertWeights,
    config: ExpertsConfig | None = None,
) -> torch.Tensor:
    """The experts' weighted sum [tokens, H], in x's type; partial products are rounded to that type as well."""
    (tokens, hidden), top_k = x.shape, chosen.shape[1]
    sizes = ExpertSizes(weights.gate_up.shape[0], top_k, hidden, weights.gate_up.shape[1] // 2)
    config = config or ExpertsConfig.for_tokens(tokens, sizes)
    sort, gate_up, down, total = experts_kernels(sizes, weights.form, dtype_name(x.dtype), config)
    pairs = tokens * top_k
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    begin = torch.empty(sizes.experts + 1, dtype=torch.int32, device=x.device)
    gated, products = x.new_empty(pairs, sizes.inner), x.new_empty(pairs, hidden)
    out = torch.empty_like(x)
    if not tokens:
        return out
    sort.launch((sizes.experts,), chosen, order, begin, pairs)
    tiles = min(pairs, sizes.experts) + pairs // config.tokens  # at most: every expert may have one that is not full
    grid = (tiles, triton.cdiv(sizes.inner, config.inner))
    gate_up.launch(grid, x, weights.gate_up, weights.gate_up_scale, order, begin, gated)
    grid = (tiles, triton.cdiv(hidden, config.columns))
    down.launch(grid, gated, weights.down, weights.down_scale, order, begin, share, products)
    total.launch((tokens, triton.cdiv(hidden, config.sum_columns)), products, out)
    return out
