"""The fused head: softcap, temperature, argmax, sample, entropy, soft embedding. Knows no layer of the model.

`rows` canvas positions go through four kernels, and float32 logits never reach global memory:

    head_tiles   one product hidden @ embedding.T; of every tile of the vocabulary each row keeps its greatest
                 tempered logit m, the mass s = sum exp(z - m), the moment sum exp(z - m)(z - m) and its argmax; the
                 probabilities relative to m stay behind in the weights' 16 bits, as the operand of the second product
    head_choose  per row: totals over the tiles, entropy, argmax; finds the sample's tile by cumulative mass, computes
                 that one tile of logits again in float32 and finds the id in it; leaves exp(m - greatest) / total
    head_soft    the other product, probabilities @ embedding, over parts of the vocabulary
    head_sum     adds the parts in a fixed order, so that equal inputs give equal bits, and scales by sqrt(hidden)

Cost at hidden size H, vocabulary V and N rows: 4 N V H FLOPs, the embedding read twice (4 V H bytes in 16 bits) and
N V relative probabilities written and read (4 N V bytes). One canvas of the released model (256, 262,144, 2816): 0.76
TFLOP and 3.2 GB, about 1 ms by either measure on an H100. Splitting the soft embedding's columns over programs is what
rules out a single pass in the manner of flash attention: an accumulator of 2816 columns fits in no program. More rows
than `rows_per_pass` go in turns, which bounds the scratch memory.

Every row's results depend on that row alone. The sample is the first id whose cumulative probability exceeds the
row's uniform number, as in `dgemma_build.head`; an id of probability zero is never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dgemma_build.kernels.launch import Kernel, dtype_name, pointer

NOWHERE = tl.constexpr(-1e30)  # logit of an id that does not exist: finite, so that no product of it with 0 is NaN


@triton.jit
def tempered(raw, cap, temperature):  # type: ignore[no-untyped-def]
    """Softcapped and tempered logits: cap * tanh(raw / cap) / temperature, from one exponential."""
    scale = cap / temperature
    return scale - 2.0 * scale / (1.0 + tl.exp(tl.minimum(raw * (2.0 / cap), 80.0)))


@triton.jit
def head_tiles(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [rows, H]
    embedding_ptr,  # [V, H]
    temperature_ptr,  # [rows] float32
    relative_ptr,  # out: [rows, V], probabilities relative to the tile's greatest
    top_ptr,  # out, as the next three: [rows, tiles] float32
    mass_ptr,
    moment_ptr,
    argmax_ptr,  # int32
    rows,
    cap,
    V: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of BLOCK_R rows and BLOCK_V ids."""
    row_blocks = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0) // row_blocks  # neighbours share a tile of the embedding in the L2 cache
    row = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    live = row < rows
    safe_row = tl.where(live, row, 0).to(tl.int64)
    safe_id = tl.where(ids < V, ids, 0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    hidden_at = hidden_ptr + safe_row[:, None] * H + columns[None, :]
    embedding_at = embedding_ptr + safe_id[None, :] * H + columns[:, None]
    raw = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if H % BLOCK_H == 0:
            hidden = tl.load(hidden_at + start)
            embedding = tl.load(embedding_at + start)
        else:
            hidden = tl.load(hidden_at + start, mask=(start + columns < H)[None, :], other=0.0)
            embedding = tl.load(embedding_at + start, mask=(start + columns < H)[:, None], other=0.0)
        raw = tl.dot(hidden, embedding, raw)
    temperature = tl.load(temperature_ptr + row, mask=live, other=1.0)
    z = tempered(raw, cap, temperature[:, None])
    if V % BLOCK_V:
        z = tl.where((ids < V)[None, :], z, NOWHERE)
    top = tl.max(z, axis=1)
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    at = safe_row * tiles + tile
    tl.store(top_ptr + at, top, mask=live)
    tl.store(argmax_ptr + at, tl.min(tl.where(z == top[:, None], ids[None, :], V), axis=1), mask=live)
    z -= top[:, None]
    p = tl.exp(z)
    tl.store(mass_ptr + at, tl.sum(p, axis=1), mask=live)
    tl.store(moment_ptr + at, tl.sum(p * z, axis=1), mask=live)
    relative_at = relative_ptr + safe_row[:, None] * V + ids[None, :]
    keep = live[:, None] if V % BLOCK_V == 0 else live[:, None] & (ids < V)[None, :]
    tl.store(relative_at, p.to(relative_ptr.dtype.element_ty), mask=keep)


@triton.jit
def head_choose(  # type: ignore[no-untyped-def]
    hidden_ptr,
    embedding_ptr,
    temperature_ptr,
    uniform_ptr,  # [rows] float32 in [0, 1)
    top_ptr,
    mass_ptr,
    moment_ptr,
    tile_argmax_ptr,
    argmax_ptr,  # out: [rows] int32
    sampled_ptr,  # out: [rows] int32
    entropy_ptr,  # out: [rows] float32, nats
    factor_ptr,  # out: [tiles, rows] float32, what makes a tile's relative probabilities absolute
    rows,
    cap,
    V: tl.constexpr,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least the number of tiles
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile = tl.arange(0, TILES)
    here = tile < tiles
    at = row * tiles + tile
    top = tl.load(top_ptr + at, mask=here, other=NOWHERE)
    greatest = tl.max(top, axis=0)
    weight = tl.exp(top - greatest)
    mass = tl.load(mass_ptr + at, mask=here, other=0.0) * weight
    total = tl.sum(mass, axis=0)
    moment = tl.load(moment_ptr + at, mask=here, other=0.0) * weight
    expected = tl.sum(moment + mass * (top - greatest), axis=0) / total
    tl.store(entropy_ptr + row, tl.log(total) - expected)
    candidates = tl.load(tile_argmax_ptr + at, mask=here & (top == greatest), other=V)
    tl.store(argmax_ptr + row, tl.min(candidates, axis=0))
    tl.store(factor_ptr + tile.to(tl.int64) * rows + row, weight / total, mask=here)

    until = tl.cumsum(mass, axis=0)
    below: tl.constexpr = 1.0 - 2.0**-23  # rounding must not put the number at or past the end
    target = tl.minimum(tl.load(uniform_ptr + row) * total, tl.max(until, axis=0) * below)
    chosen = tl.min(tl.where((until > target) & (mass > 0), tile, TILES), axis=0)
    before = tl.sum(tl.where(tile == chosen, until - mass, 0.0), axis=0)

    ids = chosen * BLOCK_V + tl.arange(0, BLOCK_V)
    safe_id = tl.where(ids < V, ids, 0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    raw = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, H, BLOCK_H):
        inside = start + columns < H
        hidden = tl.load(hidden_ptr + row * H + start + columns, mask=inside, other=0.0).to(tl.float32)
        embedding_at = embedding_ptr + safe_id[:, None] * H + start + columns[None, :]
        embedding = tl.load(embedding_at, mask=inside[None, :], other=0.0).to(tl.float32)
        raw += tl.sum(embedding * hidden[None, :], axis=1)
    z = tempered(raw, cap, tl.load(temperature_ptr + row))
    p = tl.where(ids < V, tl.exp(z - greatest), 0.0)
    inner = tl.cumsum(p, axis=0)
    left = tl.minimum(target - before, tl.max(inner, axis=0) * below)
    sampled = tl.min(tl.where((inner > left) & (p > 0), ids, V), axis=0)
    tl.store(sampled_ptr + row, sampled)


@triton.jit
def head_soft(  # type: ignore[no-untyped-def]
    relative_ptr,  # [rows, V]
    factor_ptr,  # [tiles, rows]
    embedding_ptr,  # [V, H]
    part_ptr,  # out: [PARTS, rows, H] float32
    rows,
    V: tl.constexpr,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,  # as in head_tiles
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # ids of one product; divides BLOCK_V
    PARTS: tl.constexpr,
):
    """BLOCK_R rows and BLOCK_H columns of one part of the vocabulary."""
    column_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    row_blocks = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0)
    row = (program % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (program // row_blocks % column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    part = program // (row_blocks * column_blocks)
    steps: tl.constexpr = (V + BLOCK_K - 1) // BLOCK_K
    per_part: tl.constexpr = (steps + PARTS - 1) // PARTS
    live = row < rows
    safe_row = tl.where(live, row, 0)
    offsets = tl.arange(0, BLOCK_K)
    soft = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for step in range(part * per_part, min((part + 1) * per_part, steps)):
        ids = step * BLOCK_K + offsets
        relative_at = relative_ptr + safe_row.to(tl.int64)[:, None] * V + ids[None, :]
        embedding_at = embedding_ptr + ids.to(tl.int64)[:, None] * H + column[None, :]
        if V % BLOCK_K == 0 and H % BLOCK_H == 0:
            relative = tl.load(relative_at)
            embedding = tl.load(embedding_at)
        else:
            relative = tl.load(relative_at, mask=(ids < V)[None, :], other=0.0)
            embedding = tl.load(embedding_at, mask=(ids < V)[:, None] & (column < H)[None, :], other=0.0)
        tile = step * BLOCK_K // BLOCK_V
        factor = tl.load(factor_ptr + tile * rows + safe_row)
        p = (relative.to(tl.float32) * factor[:, None]).to(embedding.dtype)
        soft = tl.dot(p, embedding, soft)
    at = part_ptr + (part.to(tl.int64) * rows + safe_row)[:, None] * H + column[None, :]
    tl.store(at, soft, mask=live[:, None] & (column < H)[None, :])


@triton.jit
def head_sum(  # type: ignore[no-untyped-def]
    part_ptr,  # [PARTS, rows, H] float32
    soft_ptr,  # out: [rows, H]
    rows,
    scale,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + (part * rows + row) * H + column, mask=column < H, other=0.0)
    tl.store(soft_ptr + row * H + column, (total * scale).to(soft_ptr.dtype.element_ty), mask=column < H)


@dataclass(frozen=True)
class HeadConfig:
    """Tile sizes, all powers of two, and how the work is cut; the defaults are for the released model on an H100."""

    rows: int = 256  # rows of a tile of either product
    ids: int = 128  # ids of a tile of the first product
    hidden: int = 64  # of one step of the first product
    columns: int = 128  # hidden columns of a tile of the second product
    soft_ids: int = 64  # ids of one step of the second product; divides `ids`
    choose_hidden: int = 256  # hidden columns of one step of head_choose
    parts: int = 6  # of the vocabulary in the second product: 22 column tiles times 6 are 132 programs a canvas
    sum_columns: int = 1024
    rows_per_pass: int = 512


@dataclass(frozen=True)
class HeadResult:
    argmax: torch.Tensor  # [rows] int32
    sampled: torch.Tensor  # [rows] int32
    entropy: torch.Tensor  # [rows] float32, nats
    soft_embedding: torch.Tensor  # [rows, H], in hidden's dtype


def tiles_of(vocab: int, config: HeadConfig) -> int:
    """Tiles of the vocabulary."""
    return -(-vocab // config.ids)


def head_kernels(vocab: int, hidden: int, dtype: str, config: HeadConfig) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    """head_tiles, head_choose, head_soft and head_sum for one model; `dtype` is bf16, fp16 or fp32."""
    weights, f32, i32 = pointer(dtype), pointer("fp32"), pointer("i32")
    model = {"V": vocab, "H": hidden}
    statistics = {"top_ptr": f32, "mass_ptr": f32, "moment_ptr": f32}
    inputs = {"hidden_ptr": weights, "embedding_ptr": weights, "temperature_ptr": f32}
    numbers = {"rows": "i32", "cap": "fp32"}
    tiles = Kernel(
        head_tiles,
        inputs | {"relative_ptr": weights} | statistics | {"argmax_ptr": i32} | numbers,
        model | {"BLOCK_R": config.rows, "BLOCK_V": config.ids, "BLOCK_H": config.hidden},
        warps=8,
        stages=4,
    )
    results = {"argmax_ptr": i32, "sampled_ptr": i32, "entropy_ptr": f32, "factor_ptr": f32}
    choose = Kernel(
        head_choose,
        inputs | {"uniform_ptr": f32} | statistics | {"tile_argmax_ptr": i32} | results | numbers,
        model
        | {"BLOCK_V": config.ids, "BLOCK_H": config.choose_hidden}
        | {"TILES": triton.next_power_of_2(tiles_of(vocab, config))},
        warps=8,
        stages=2,
    )
    soft = Kernel(
        head_soft,
        {"relative_ptr": weights, "factor_ptr": f32, "embedding_ptr": weights, "part_ptr": f32, "rows": "i32"},
        model
        | {"BLOCK_V": config.ids, "BLOCK_R": config.rows, "BLOCK_H": config.columns}
        | {"BLOCK_K": config.soft_ids, "PARTS": config.parts},
        warps=8,
        stages=4,
    )
    total = Kernel(
        head_sum,
        {"part_ptr": f32, "soft_ptr": weights, "rows": "i32", "scale": "fp32"},
        {"H": hidden, "PARTS": config.parts, "BLOCK": config.sum_columns},
        warps=4,
        stages=1,
    )
    return tiles, choose, soft, total


def fused_head(
    hidden: torch.Tensor,  # [rows, H]
    embedding: torch.Tensor,  # [V, H], same dtype
    temperature: torch.Tensor,  # [rows] float32
    uniforms: torch.Tensor,  # [rows] float32 in [0, 1)
    softcap: float,
    config: HeadConfig | None = None,
) -> HeadResult:
    """All of the head for any number of rows, `rows_per_pass` at a time."""
    config = config or HeadConfig()
    rows, device = hidden.shape[0], hidden.device
    result = HeadResult(
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty_like(hidden),
    )
    for start in range(0, rows, config.rows_per_pass):
        part = slice(start, min(start + config.rows_per_pass, rows))
        outputs = (result.argmax[part], result.sampled[part], result.entropy[part], result.soft_embedding[part])
        _pass(hidden[part], embedding, temperature[part], uniforms[part], softcap, config, outputs)
    return result


def _pass(
    hidden: torch.Tensor,
    embedding: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    softcap: float,
    config: HeadConfig,
    outputs: tuple[torch.Tensor, ...],
) -> None:
    (rows, width), vocab, tiles = hidden.shape, embedding.shape[0], tiles_of(embedding.shape[0], config)
    argmax, sampled, entropy, soft_embedding = outputs

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    top, mass, moment = (scratch(rows, tiles) for _ in range(3))
    tile_argmax, factor = scratch(rows, tiles, dtype=torch.int32), scratch(tiles, rows)
    relative, parts = scratch(rows, vocab, dtype=hidden.dtype), scratch(config.parts, rows, width)
    first, choose, soft, total = head_kernels(vocab, width, dtype_name(hidden.dtype), config)
    inputs: tuple[Any, ...] = (hidden, embedding, temperature)
    row_blocks = triton.cdiv(rows, config.rows)
    first.launch((row_blocks * tiles,), *inputs, relative, top, mass, moment, tile_argmax, rows, softcap)
    statistics = (top, mass, moment, tile_argmax)
    choose.launch((rows,), *inputs, uniforms, *statistics, argmax, sampled, entropy, factor, rows, softcap)
    column_blocks = triton.cdiv(width, config.columns)
    soft.launch((row_blocks * column_blocks * config.parts,), relative, factor, embedding, parts, rows)
    total.launch((rows, triton.cdiv(width, config.sum_columns)), parts, soft_embedding, rows, width**0.5)
