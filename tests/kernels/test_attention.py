"""Paged attention against its definition in PyTorch: windows, canvases, pages in any order, parts of long contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dgemma_build.kernels.attention import AttentionConfig, AttentionSizes, KeyValuePages, paged_attention
from dgemma_runtime.errors import ConfigurationError

SMALL = AttentionConfig(pairs=16, keys=16, parts=3, least=1, warps=4, stages=2)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
LOST = -1  # in the table, for pages that have left every window


@dataclass(frozen=True)
class Row:
    position: int
    length: int
    is_canvas: bool


@dataclass(frozen=True)
class Case:
    """Arguments of `paged_attention`, and the rows' keys and values in order of position."""

    sizes: AttentionSizes
    rows: tuple[Row, ...]
    query: Tensor
    pages: KeyValuePages
    table: Tensor
    keys: list[Tensor]  # each [kv_heads, position + length, D]
    values: list[Tensor]

    def run(self, config: AttentionConfig | None = SMALL) -> Tensor:
        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        position, length = (column([getattr(row, name) for row in self.rows]) for name in ("position", "length"))
        canvas = column([int(row.is_canvas) for row in self.rows])
        return paged_attention(self.query, self.pages, self.table, position, length, canvas, self.sizes.window, config)

    def reference(self) -> Tensor:
        """By the definition, in float64."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        group, window = self.sizes.heads // self.sizes.kv_heads, self.sizes.window
        for index, row in enumerate(self.rows):
            seen = torch.arange(row.position + row.length)[None, :]
            token = torch.arange(row.position, row.position + row.length)[:, None]
            visible = seen >= 0 if row.is_canvas else seen <= token
            if window:
                reference_token = row.position if row.is_canvas else token
                visible = visible & (seen > reference_token - window)
            keys = self.keys[index].double().repeat_interleave(group, dim=0)
            values = self.values[index].double().repeat_interleave(group, dim=0)
            query = self.query[index, : row.length].double().transpose(0, 1)
            scores = (query @ keys.transpose(1, 2)).masked_fill(~visible, -torch.inf)
            out[index, : row.length] = (scores.softmax(dim=-1) @ values).transpose(0, 1)
        return out


def make(
    generator: torch.Generator,
    sizes: AttentionSizes,
    rows: tuple[Row, ...],
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
) -> Case:
    """Pages are dealt in random order and hold NaN wherever no token is; lost pages are -1 in the table."""
    used = [-(-(row.position + row.length) // sizes.page) for row in rows]
    order = torch.randperm(sum(used) + 2, generator=generator).tolist()
    shape = (len(order), sizes.kv_heads, sizes.page, sizes.head_dim)
    pools = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((len(rows), max(used) + 1), LOST, dtype=torch.int32)
    dense: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, row in enumerate(rows):
        tokens = row.position + row.length
        own = [order.pop() for _ in range(used[index])]
        first = max(0, row.position - (sizes.window - 1)) // sizes.page if sizes.window else 0
        table[index, first : used[index]] = torch.tensor(own[first:], dtype=torch.int32)
        for pool, kept in zip(pools, dense, strict=True):
            values = (torch.randn(sizes.kv_heads, tokens, sizes.head_dim, generator=generator) * 0.7).to(cache or dtype)
            kept.append(values.to(dtype))
            for page in range(first, used[index]):
                part = values[:, page * sizes.page : (page + 1) * sizes.page].to(dtype)
                pool[own[page], :, : part.shape[1]] = part
    longest = max(row.length for row in rows)
    query = torch.randn(len(rows), longest, sizes.heads, sizes.head_dim, generator=generator).to(dtype)
    pages = KeyValuePages(pools[0].to(cache or dtype), pools[1].to(cache or dtype))
    return Case(sizes, rows, query, pages, table, *dense)


def check(case: Case, config: AttentionConfig | None = SMALL) -> None:
    expected, result = case.reference(), case.run(config)
    assert result.dtype == case.query.dtype
    error = (result.double() - expected).abs().amax()
    assert error <= TOLERANCE[result.dtype] * max(1.0, float(expected.abs().amax())), error


SHAPES = {
    "one head": AttentionSizes(heads=1, kv_heads=1, head_dim=16, window=0, page=16),
    "grouped": AttentionSizes(heads=6, kv_heads=2, head_dim=32, window=0, page=32),
    "window": AttentionSizes(heads=4, kv_heads=2, head_dim=16, window=20, page=16),
    "window of one page": AttentionSizes(heads=8, kv_heads=1, head_dim=16, window=32, page=32),
}
ROWS = {
    "first tokens": (Row(0, 5, False),),
    "first canvas": (Row(0, 24, True),),
    "chunk": (Row(37, 18, False),),
    "canvas far in": (Row(75, 16, True),),
    "all kinds": (Row(0, 1, False), Row(50, 24, True), Row(19, 24, False), Row(64, 7, True), Row(33, 13, False)),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_attention_is_its_definition(generator: torch.Generator, sizes: AttentionSizes, rows: tuple[Row, ...]) -> None:
    check(make(generator, sizes, rows))


def test_attention_in_16_bits(generator: torch.Generator) -> None:
    check(make(generator, SHAPES["window"], ROWS["all kinds"], torch.float16))


@pytest.mark.parametrize(
    "sizes",
    [
        AttentionSizes(heads=4, kv_heads=2, head_dim=256, window=48, page=64),
        AttentionSizes(heads=8, kv_heads=1, head_dim=512, window=0, page=64),
    ],
    ids=["sliding", "full"],
)
def test_the_released_model_s_head_dims_with_its_own_tiles(generator: torch.Generator, sizes: AttentionSizes) -> None:
    check(make(generator, sizes, (Row(150, 9, True), Row(40, 30, False)), torch.float16), config=None)


@pytest.mark.parametrize("parts", [1, 2, 5, 16])
@pytest.mark.parametrize("least", [1, 3])
def test_any_number_of_parts(generator: torch.Generator, parts: int, least: int) -> None:
    case = make(generator, SHAPES["grouped"], (Row(201, 9, True), Row(3, 9, False)))
    check(case, replace(SMALL, parts=parts, least=least))


def test_a_canvas_sees_one_token_less_of_the_context_than_the_window(generator: torch.Generator) -> None:
    """Its positions see the same keys, the last one as many as the first."""
    case = make(generator, SHAPES["window"], (Row(60, 8, True),))
    before = case.run()
    for position, changes in ((60 - 20, False), (60 - 19, True)):
        page = case.table[0, position // 16]
        kept = case.pages.values[page, :, position % 16].clone()
        case.pages.values[page, :, position % 16] += 100.0
        assert bool((case.run() != before).flatten(2).any(dim=-1).all()) is changes
        assert bool((case.run() != before).any()) is changes
        case.pages.values[page, :, position % 16] = kept


def test_what_lies_behind_a_row_s_tokens_is_zero_in_the_output(generator: torch.Generator) -> None:
    case = make(generator, SHAPES["grouped"], (Row(10, 3, False), Row(10, 20, True)))
    assert torch.equal(case.run()[0, 3:], torch.zeros(17, 6, 32))


def test_fp8_keys_and_values_with_their_scales(generator: torch.Generator) -> None:
    case = make(generator, SHAPES["grouped"], ROWS["all kinds"], torch.float16, torch.float8_e4m3fn)
    check(case)
    scaled = replace(case, pages=replace(case.pages, key_scale=0.5, value_scale=3.0))
    same = replace(case, keys=[0.5 * k for k in case.keys], values=[3.0 * v for v in case.values])
    error = (scaled.run().double() - same.reference()).abs().amax()
    assert error <= TOLERANCE[torch.float16] * same.reference().abs().amax()


def test_rows_do_not_depend_on_their_company(generator: torch.Generator) -> None:
    case = make(generator, SHAPES["window"], ROWS["all kinds"], torch.float16)
    together = case.run()
    assert torch.equal(together, case.run())
    for index in range(len(case.rows)):
        part = slice(index, index + 1)
        alone = replace(case, rows=case.rows[part], query=case.query[part], table=case.table[part])
        assert torch.equal(alone.run()[0], together[index])


def test_scores_far_apart_stay_finite(generator: torch.Generator) -> None:
    case = make(generator, SHAPES["grouped"], (Row(90, 8, True),))
    case = replace(case, query=case.query * 300)  # scores in the thousands, each with float32's rounding
    torch.testing.assert_close(case.run().double(), case.reference(), rtol=0, atol=1e-3)


def test_a_page_that_tiles_do_not_divide_is_refused(generator: torch.Generator) -> None:
    case = make(generator, SHAPES["one head"], ROWS["chunk"])
    with pytest.raises(ConfigurationError, match="page of 16 tokens: choose a multiple of 32"):
        case.run(replace(SMALL, keys=32))
