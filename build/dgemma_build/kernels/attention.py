"""Paged attention: queries of one call over keys and values in pages, long contexts cut into parts.

    attention_parts  for a tile of queries of one KV head, softmax and sum over one part of the keys they see
    attention_sum    puts the parts together in a fixed order

A batch row has `length` new tokens behind `position` tokens of context; their keys and values are in the pages already.
The rules are the model's (`dgemma_build.graph`): a causal row's token sees what is not behind it, a canvas row's sees
the whole canvas; of the context a full layer shows everything, a sliding layer the last `window` keys up to the token
itself, and to every position of a canvas alike the last window - 1. Scores are not scaled: the model's norms do that.

Query heads that share a KV head are rows of one tile, so that keys and values are read once for all of them: a tile
reads every key it sees once, 2 D bytes each in 16 bits, and V as much. At head_dim 512 a tile of 64 rows is what
Hopper's registers hold: 64 x 512 float32 sums are 128 of a thread's 255 at 256 threads.

How the keys are cut depends only on the row's own positions, so a row's bits do not depend on its company. Scratch is
`parts` float32 outputs: 8 x 256 x 16 x 512 x 4 bytes, 67 MB a canvas of the released model, at any length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dgemma_build.kernels.launch import Kernel, dtype_name, pointer
from dgemma_runtime.errors import ConfigurationError

UNSEEN = tl.constexpr(-1e30)  # score of a key that is not to be seen, and log-sum of a part without keys
LOWEST = tl.constexpr(-1e20)  # where running maxima start: above UNSEEN, so that unseen keys weigh nothing


@triton.jit
def seen_keys(position, first_token, last_token, length, is_canvas, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key and the end of the keys that tokens first_token to last_token see between them."""
    end = position + length
    end = tl.where(is_canvas, end, tl.minimum(end, position + last_token + 1))
    if WINDOW == 0:
        return position * 0, end
    query = position + tl.where(is_canvas, 0, first_token)
    return tl.maximum(query - (WINDOW - 1), 0), end


@triton.jit
def attention_parts(  # type: ignore[no-untyped-def]
    query_ptr,  # [B, L, HEADS, D]
    key_ptr,  # [pages, KV_HEADS, PAGE, D]
    value_ptr,  # the same
    table_ptr,  # [B, table_width] int32: the page of positions i * PAGE on; what no token sees is not read
    position_ptr,  # [B] int32, tokens of context
    length_ptr,  # [B] int32, new tokens, at most L
    canvas_ptr,  # [B] int32, not 0 for canvases
    part_ptr,  # out: [PARTS, B, L, HEADS, D] float32
    log_sum_ptr,  # out: [PARTS, B, L, HEADS] float32, base 2
    rows,  # B
    tokens,  # L
    table_width,
    key_scale,  # of fp8 keys, else 1
    value_scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: full attention
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,  # tiles of keys worth a part of their own
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides PAGE
):
    """BLOCK_M (token, head) pairs of one row and KV head, one part of their keys."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    batch = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    part = tl.program_id(2)
    start = tl.program_id(0) * BLOCK_M
    pair = start + tl.arange(0, BLOCK_M)
    token = pair // GROUP
    length = tl.load(length_ptr + batch)
    position = tl.load(position_ptr + batch)
    is_canvas = tl.load(canvas_ptr + batch) != 0
    first, end = seen_keys(position, start // GROUP, (start + BLOCK_M - 1) // GROUP, length, is_canvas, WINDOW)
    first_tile = first // BLOCK_N
    tiles = tl.cdiv(end, BLOCK_N) - first_tile
    tiles = tl.where(start // GROUP < length, tiles, 0)
    in_part = tl.cdiv(tiles, tl.maximum(tl.minimum(tl.cdiv(tiles, LEAST), PARTS), 1))
    low = first_tile + tl.minimum(part * in_part, tiles)
    high = first_tile + tl.minimum((part + 1) * in_part, tiles)

    live = token < length
    at = (batch.to(tl.int64) * tokens + tl.where(live, token, 0)) * HEADS + kv_head * GROUP + pair % GROUP
    columns = tl.arange(0, D)
    offsets = tl.arange(0, BLOCK_N)
    query = tl.load(query_ptr + at[:, None] * D + columns[None, :], mask=live[:, None], other=0.0)
    last_seen = tl.where(is_canvas, end - 1, position + token)
    first_seen = tl.where(is_canvas, first, position + token - (WINDOW - 1)) if WINDOW else token * 0
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    to_base_2 = key_scale * 1.4426950408889634
    for tile in range(low, high):
        page = tl.load(table_ptr + batch * table_width + tile * BLOCK_N // PAGE).to(tl.int64)
        slot = (page * KV_HEADS + kv_head) * PAGE + tile * BLOCK_N % PAGE + offsets
        seen = tile * BLOCK_N + offsets
        exists = (seen < end)[:, None]  # pages may hold anything behind the last token
        key = tl.load(key_ptr + slot[:, None] * D + columns[None, :], mask=exists, other=0.0)
        if key.dtype != query.dtype:  # fp8: by way of float32, as float16 to bfloat16 is an instruction a value
            key = key.to(tl.float32).to(query.dtype)
        score = tl.dot(query, tl.trans(key)) * to_base_2
        visible = (seen[None, :] <= last_seen[:, None]) & (seen[None, :] >= first_seen[:, None])
        score = tl.where(visible, score, UNSEEN)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(p, axis=1)
        value = tl.load(value_ptr + slot[:, None] * D + columns[None, :], mask=exists, other=0.0)
        if value.dtype != query.dtype:
            value = value.to(tl.float32).to(query.dtype)
        total = tl.dot(p.to(query.dtype), value, total * shrink[:, None])
        top = new_top
    at += part.to(tl.int64) * rows * tokens * HEADS
    some = mass > 0
    tl.store(log_sum_ptr + at, tl.where(some, top + tl.log2(tl.where(some, mass, 1.0)), UNSEEN), mask=live)
    total *= (value_scale / tl.where(some, mass, 1.0))[:, None]
    tl.store(part_ptr + at[:, None] * D + columns[None, :], total, mask=(live & some)[:, None])


@triton.jit
def attention_sum(  # type: ignore[no-untyped-def]
    part_ptr,  # [PARTS, B, L, HEADS, D] float32
    log_sum_ptr,  # [PARTS, B, L, HEADS] float32, base 2
    length_ptr,
    out_ptr,  # out: [B, L, HEADS, D]; zeros behind a row's length
    rows,
    tokens,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr,  # a power of two, at least PARTS
):
    """One head of one token."""
    at = tl.program_id(0).to(tl.int64)
    live = at // HEADS % tokens < tl.load(length_ptr + at // HEADS // tokens)
    heads = rows * tokens * HEADS
    part = tl.arange(0, ALL_PARTS)
    log_sum = tl.load(log_sum_ptr + part.to(tl.int64) * heads + at, mask=(part < PARTS) & live, other=UNSEEN)
    top = tl.max(log_sum, axis=0)
    mass = tl.sum(tl.exp2(log_sum - top), axis=0)
    columns = tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    for index in tl.static_range(PARTS):
        own = tl.load(log_sum_ptr + index * heads + at, mask=live, other=UNSEEN)
        weight = tl.exp2(own - top) / mass
        used = live & (own > UNSEEN)
        total += weight * tl.load(part_ptr + (index * heads + at) * D + columns, mask=used, other=0.0)
    tl.store(out_ptr + at * D + columns, total.to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class AttentionSizes:
    """One kind of layer."""

    heads: int
    kv_heads: int
    head_dim: int  # a power of two from 16 on
    window: int  # tokens; 0: full attention
    page: int  # tokens


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles, powers of two, and the cutting of keys."""

    pairs: int  # (token, head) pairs of a tile
    keys: int  # of a tile; divides the page
    parts: int  # at most
    least: int  # tiles of keys worth a part of their own
    warps: int
    stages: int

    @staticmethod
    def for_sizes(sizes: AttentionSizes, cache_dtype: str) -> AttentionConfig:
        """For one canvas on an H100: a sliding layer of the released model has 32 tiles of queries, a full one 64."""
        if sizes.head_dim <= 256:  # fp8 pages are converted in registers, of which there are none left with 64 keys
            keys = 32 if cache_dtype == "fp8e4nv" else 64
            return AttentionConfig(128, min(keys, sizes.page), parts=4, least=256 // keys, warps=8, stages=2)
        return AttentionConfig(64, min(32, sizes.page), parts=8, least=16, warps=8, stages=2)


@dataclass(frozen=True)
class KeyValuePages:
    """One layer's keys and values, in the queries' type, or fp8 (E4M3) with one scale each."""

    keys: torch.Tensor  # [pages, kv_heads, page, head_dim]
    values: torch.Tensor  # the same
    key_scale: float = 1.0
    value_scale: float = 1.0


def attention_kernels(
    sizes: AttentionSizes, dtype: str, cache_dtype: str, config: AttentionConfig
) -> tuple[Kernel, Kernel]:
    """attention_parts and attention_sum; `cache_dtype` is that of keys and values."""
    if sizes.page % config.keys:
        raise ConfigurationError(
            f"page of {sizes.page} tokens: choose a multiple of {config.keys}, or fewer keys a tile"
        )
    x, cache, i32, f32 = pointer(dtype), pointer(cache_dtype), pointer("i32"), pointer("fp32")
    parts = Kernel(
        attention_parts,
        {"query_ptr": x, "key_ptr": cache, "value_ptr": cache, "table_ptr": i32}
        | {"position_ptr": i32, "length_ptr": i32, "canvas_ptr": i32, "part_ptr": f32, "log_sum_ptr": f32}
        | {"rows": "i32", "tokens": "i32", "table_width": "i32", "key_scale": "fp32", "value_scale": "fp32"},
        {"HEADS": sizes.heads, "KV_HEADS": sizes.kv_heads, "D": sizes.head_dim}
        | {"PAGE": sizes.page, "WINDOW": sizes.window, "PARTS": config.parts, "LEAST": config.least}
        | {"BLOCK_M": config.pairs, "BLOCK_N": config.keys},
        config.warps,
        config.stages,
    )
    total = Kernel(
        attention_sum,
        {"part_ptr": f32, "log_sum_ptr": f32, "length_ptr": i32, "out_ptr": x, "rows": "i32", "tokens": "i32"},
        {"HEADS": sizes.heads, "D": sizes.head_dim}
        | {"PARTS": config.parts, "ALL_PARTS": triton.next_power_of_2(config.parts)},
        warps=4,
        stages=1,
    )
    return parts, total


def paged_attention(
    query: torch.Tensor,  # [B, L, heads, head_dim], already normed and rotated
    pages: KeyValuePages,
    table: torch.Tensor,  # [B, width] int32
    position: torch.Tensor,  # [B] int32
    length: torch.Tensor,  # [B] int32
    is_canvas: torch.Tensor,  # [B] int32
    window: int,  # 0: full attention
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """Attention of all rows, [B, L, heads, head_dim]."""
    rows, tokens, heads, head_dim = query.shape
    sizes = AttentionSizes(heads, pages.keys.shape[1], head_dim, window, pages.keys.shape[2])
    cache_dtype = dtype_name(pages.keys.dtype)
    config = config or AttentionConfig.for_sizes(sizes, cache_dtype)
    parts, total = attention_kernels(sizes, dtype_name(query.dtype), cache_dtype, config)
    part = query.new_empty(config.parts, *query.shape, dtype=torch.float32)
    log_sum = query.new_empty(config.parts, rows, tokens, heads, dtype=torch.float32)
    out = torch.empty_like(query)
    pairs = tokens * heads // sizes.kv_heads
    grid = (triton.cdiv(pairs, config.pairs), rows * sizes.kv_heads, config.parts)
    rules = (table, position, length, is_canvas)
    scales = (pages.key_scale, pages.value_scale)
    inputs = (query, pages.keys, pages.values, *rules)
    parts.launch(grid, *inputs, part, log_sum, rows, tokens, table.shape[1], *scales)
    total.launch((rows * tokens * heads,), part, log_sum, length, out, rows, tokens)
    return out
