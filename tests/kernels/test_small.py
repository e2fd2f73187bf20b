"""The kernels between products against their definitions in PyTorch, in 16 bits and with operands in fp8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm

from dgemma_build.kernels.attention import AttentionSizes, KeyValuePages
from dgemma_build.kernels.packing import to_fp8
from dgemma_build.kernels.small import (
    Fp8Rows,
    Rotation,
    branch_end,
    fp8_rows,
    gated,
    gated_fp8,
    layer_end,
    queries_into_pages,
    route,
)

EPS = 1e-6
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
HALF_STEP, LEAST_STEP = 0.0665, 2.0**-9  # of E4M3: relative, with 16 bits' rounding; absolute
SLIDING = AttentionSizes(heads=6, kv_heads=3, head_dim=32, window=40, page=16)
FULL = AttentionSizes(heads=4, kv_heads=2, head_dim=64, window=0, page=16)


def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double(), EPS)


def near(result: Tensor, expected: Tensor) -> None:
    error = (result.double() - expected).abs().amax()
    assert error <= TOLERANCE[result.dtype] * max(1.0, float(expected.abs().amax())), error


def check_fp8(operand: Fp8Rows | None, expected: Tensor) -> None:
    """Half a step of E4M3 at most; a whole one below its normal numbers, which Triton's interpreter cuts off."""
    assert operand is not None
    assert operand.values.dtype == torch.float8_e4m3fn
    assert operand.scale.shape == (len(expected), 1)
    scale = operand.scale.double()
    torch.testing.assert_close(scale[:, 0] * 448, expected.abs().amax(dim=-1), rtol=2e-3, atol=0)
    error = (operand.values.double() * scale - expected).abs()
    assert (error <= (HALF_STEP * expected.abs()).clamp(min=LEAST_STEP * float(scale.max()))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 100])
@pytest.mark.parametrize("quantise", [False, True])
def test_norms_and_their_sums(generator: torch.Generator, dtype: torch.dtype, width: int, quantise: bool) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    branch, other, residual, weights = normal(5, width) * 3, normal(5, width), normal(5, width), normal(3, width)
    made = branch_end(branch, residual, weights[0], EPS, quantise)
    expected = residual.double() + norm(branch, weights[0])
    near(made.total, expected)
    near(made.normed, norm(expected))

    ended = layer_end(branch, other, residual, weights, torch.tensor([0.75]), EPS, quantise)
    both = norm(branch, weights[0]) + norm(other, weights[1])
    expected_end = (residual.double() + norm(both, weights[2])) * 0.75
    near(ended.total, expected_end)
    near(ended.normed, norm(expected_end))
    for state, total in ((made, expected), (ended, expected_end)):
        if quantise:
            check_fp8(state.fp8, norm(total))
        else:
            assert state.fp8 is None


@pytest.mark.parametrize("inner", [16, 88])
def test_gating(generator: torch.Generator, inner: int) -> None:
    both = torch.randn(7, 2 * inner, generator=generator).half() * 2
    gate, up = both.double().chunk(2, dim=-1)
    expected = gelu(gate, approximate="tanh") * up
    near(gated(both), expected)
    check_fp8(gated_fp8(both), expected)


def test_rows_in_fp8_are_pytorch_s(generator: torch.Generator) -> None:
    x = torch.randn(9, 150, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    made, (values, scale) = fp8_rows(x), to_fp8(x)
    torch.testing.assert_close(made.scale[:, 0], scale, rtol=1e-6, atol=0)
    normal = values.float().abs() >= 2.0**-6  # the interpreter cuts what is below
    assert torch.equal(made.values.float()[normal], values.float()[normal])
    assert (made.values.float() - values.float()).abs().amax() <= 2.0**-8


@pytest.mark.parametrize("cache", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("sizes", [SLIDING, FULL], ids=["sliding", "full"])
def test_queries_keys_and_values(generator: torch.Generator, sizes: AttentionSizes, cache: torch.dtype) -> None:
    """Two rows at positions of their own, whose tokens cross pages that are in no order."""
    rows, tokens, heads, kv_heads, dim = 2, 9, sizes.heads, sizes.kv_heads, sizes.head_dim
    slots = heads + kv_heads * (2 if sizes.window else 1)
    projected = torch.randn(rows * tokens, slots * dim, generator=generator).half()
    weight = torch.randn(heads + kv_heads, dim, generator=generator).half()
    angle = torch.rand(rows * tokens, dim // 2, generator=generator) * 6
    position = torch.tensor([27, 0], dtype=torch.int32)
    table = torch.tensor([[-1, 3, 1], [4, -1, -1]], dtype=torch.int32)
    pools = [torch.zeros(5, kv_heads, sizes.page, dim).to(cache) for _ in range(2)]
    given = (KeyValuePages(pools[0], pools[1]), table, position, sizes, EPS)
    query = queries_into_pages(projected, weight, Rotation(angle.cos(), angle.sin()), *given)

    by_head = norm(projected.view(rows, tokens, slots, dim))
    scaled = by_head[:, :, : heads + kv_heads] * weight.double()
    low, high = scaled.chunk(2, dim=-1)
    cos, sin = (part.double().view(rows, tokens, 1, -1) for part in (angle.cos(), angle.sin()))
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    near(query, turned[:, :, :heads])
    step, least = (HALF_STEP, 1.1 * LEAST_STEP) if cache == torch.float8_e4m3fn else (2e-3, 1e-4)
    written = torch.zeros(5, sizes.page, dtype=torch.bool)
    for row in range(rows):
        for token in range(tokens):
            place = int(position[row]) + token
            page, slot = int(table[row, place // sizes.page]), place % sizes.page
            written[page, slot] = True
            for pool, expected in zip(
                pools, (turned[row, token, heads:], by_head[row, token, -kv_heads:]), strict=True
            ):
                error = (pool[page, :, slot].double() - expected).abs()
                assert (error <= (step * expected.abs()).clamp(min=least)).all()
    for pool in pools:
        assert not pool.float().transpose(1, 2)[~written].any()


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (7, 3), (128, 8)])
def test_the_choice_of_experts(generator: torch.Generator, experts: int, top_k: int) -> None:
    logits = torch.randn(11, experts, generator=generator) * 3
    per_expert = torch.rand(experts, generator=generator)
    chosen, share = route(logits, per_expert, top_k)
    top, expected = logits.double().softmax(dim=-1).topk(top_k)
    assert torch.equal(chosen.long(), expected)
    right = top / top.sum(dim=-1, keepdim=True) * per_expert.double()[expected]
    torch.testing.assert_close(share.double(), right, rtol=1e-5, atol=1e-7)


def test_of_equal_experts_the_first_is_chosen() -> None:
    chosen, share = route(torch.zeros(2, 6), torch.ones(6), 3)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(share, torch.full((2, 3), 1 / 3))


def test_logits_of_any_size_are_finite_shares() -> None:
    """Experts whose probability is zero in float32 are equal."""
    chosen, share = route(torch.tensor([[-3e4, 0.0, 3e4, 2.9e4, -1.0]]).half(), torch.ones(5), 3)
    assert chosen.tolist() == [[2, 0, 1]]
    assert share.tolist() == [[1.0, 0.0, 0.0]]


def test_a_row_does_not_depend_on_its_company(generator: torch.Generator) -> None:
    x, y = (torch.randn(6, 40, generator=generator).half() for _ in range(2))
    weight = torch.ones(40).half()
    together, alone = branch_end(x, y, weight, EPS, True), branch_end(x[2:3], y[2:3], weight, EPS, True)
    assert torch.equal(together.normed[2:3], alone.normed)
    assert together.fp8
    assert alone.fp8
    assert torch.equal(together.fp8.values[2:3].float(), alone.fp8.values.float())


def test_no_own_values_are_the_keys_without_weight_and_rotation(generator: torch.Generator) -> None:
    """A full layer's values differ from its keys, though one product makes both."""
    sizes = replace(FULL, heads=2, kv_heads=1)
    projected = torch.randn(3, 3 * 64, generator=generator)
    pools = [torch.zeros(1, 1, 16, 64) for _ in range(2)]
    still = Rotation(torch.zeros(3, 32), torch.ones(3, 32))  # a quarter turn
    weight, table, position = torch.full((3, 64), 2.0), torch.zeros(1, 1).int(), torch.zeros(1).int()
    queries_into_pages(projected, weight, still, KeyValuePages(pools[0], pools[1]), table, position, sizes, EPS)
    keys, values = (pool[0, 0, :3] for pool in pools)
    near(keys, torch.cat([-2.0 * values[:, 32:], 2.0 * values[:, :32]], dim=-1).double())
