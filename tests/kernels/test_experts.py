"""Grouped experts against their definition in PyTorch, for every weight format; sorting; packing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from dgemma_build.kernels.experts import LARGE, ExpertsConfig, ExpertSizes, experts_kernels, grouped_experts
from dgemma_build.kernels.packing import (
    ExpertWeights,
    WeightFormat,
    dequantised,
    pack_experts,
    pack_int4,
    to_int4,
    unpack_int4,
)
from dgemma_runtime.errors import ConfigurationError

SMALL = ExpertsConfig(tokens=16, inner=16, columns=32, step=32, sum_columns=64)
PLAIN, FP8 = WeightFormat("plain"), WeightFormat("fp8")
INT4 = [WeightFormat("int4", group) for group in (32, 64, 128)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}  # of the greatest output


def reference(x: Tensor, chosen: Tensor, share: Tensor, weights: ExpertWeights) -> Tensor:
    """The definition in float64, token by token."""
    stored = ((weights.gate_up, weights.gate_up_scale), (weights.down, weights.down_scale))
    gate_up, down = (dequantised(matrix, scale, weights.form).double() for matrix, scale in stored)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (experts, shares) in enumerate(zip(chosen.tolist(), share.tolist(), strict=True)):
        for expert, weight in zip(experts, shares, strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            out[token] += weight * (down[expert] @ (gelu(gate, approximate="tanh") * up))
    return out


def inputs(
    generator: torch.Generator, tokens: int, sizes: ExpertSizes, form: WeightFormat, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    x = torch.randn(tokens, sizes.hidden, generator=generator).to(dtype)
    scores = torch.randn(tokens, sizes.experts, generator=generator)
    top, chosen = scores.softmax(dim=-1).topk(sizes.top_k)
    gate_up = torch.randn(sizes.experts, 2 * sizes.inner, sizes.hidden, generator=generator) / sizes.hidden**0.5
    down = torch.randn(sizes.experts, sizes.hidden, sizes.inner, generator=generator) / sizes.inner**0.5
    return x, chosen.int(), top, pack_experts(gate_up.to(dtype), down.to(dtype), form)


def check(given: tuple[Tensor, Tensor, Tensor, ExpertWeights], config: ExpertsConfig | None) -> None:
    expected = reference(*given)
    result = grouped_experts(*given, config)
    assert result.dtype == given[0].dtype
    error = (result.double() - expected).abs().amax()
    assert error <= TOLERANCE[result.dtype] * expected.abs().amax(), error


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", [PLAIN, FP8], ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (1, ExpertSizes(experts=2, top_k=1, hidden=32, inner=16)),
        (9, ExpertSizes(experts=5, top_k=3, hidden=40, inner=24)),
        (40, ExpertSizes(experts=3, top_k=2, hidden=64, inner=48)),  # several tiles an expert
        (6, ExpertSizes(experts=20, top_k=2, hidden=33, inner=7)),  # experts that no token chose
    ],
    ids=str,
)
def test_plain_and_fp8_experts(
    generator: torch.Generator, tokens: int, sizes: ExpertSizes, form: WeightFormat, dtype: torch.dtype
) -> None:
    check(inputs(generator, tokens, sizes, form, dtype), SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", INT4, ids=lambda form: form.name)
def test_int4_experts(generator: torch.Generator, form: WeightFormat, dtype: torch.dtype) -> None:
    """128 inputs fill every group; 64 and 192 are no multiple of the largest."""
    for hidden, inner in ((128, 64), (192, 128)):
        check(inputs(generator, 11, ExpertSizes(4, 2, hidden, inner), form, dtype), SMALL)


@pytest.mark.parametrize("config", [None, ExpertsConfig(tokens=64), LARGE])
def test_the_configurations_of_the_released_model(generator: torch.Generator, config: ExpertsConfig | None) -> None:
    check(inputs(generator, 50, ExpertSizes(4, 3, 128, 64), INT4[0], torch.float16), config)


def test_all_tokens_may_choose_the_same_expert(generator: torch.Generator) -> None:
    x, chosen, share, weights = inputs(generator, 70, ExpertSizes(6, 1, 32, 16), PLAIN, torch.float32)
    check((x, torch.full_like(chosen, 5), share, weights), SMALL)


def test_equal_calls_give_equal_bits_and_rows_do_not_depend_on_their_company(generator: torch.Generator) -> None:
    x, chosen, share, weights = inputs(generator, 30, ExpertSizes(4, 2, 48, 32), PLAIN, torch.float16)
    together = grouped_experts(x, chosen, share, weights, SMALL)
    assert torch.equal(together, grouped_experts(x, chosen, share, weights, SMALL))
    alone = grouped_experts(x[7:9], chosen[7:9], share[7:9], weights, SMALL)
    torch.testing.assert_close(alone, together[7:9], rtol=0, atol=1e-3)


def test_no_tokens_are_no_work(generator: torch.Generator) -> None:
    given = inputs(generator, 0, ExpertSizes(4, 2, 32, 16), PLAIN, torch.float16)
    assert grouped_experts(*given, SMALL).shape == (0, 32)


@pytest.mark.parametrize("pairs", [1, 700, 1024, 2500])
def test_sorting_is_stable(generator: torch.Generator, pairs: int) -> None:
    experts = 5
    chosen = torch.randint(0, experts - 1, (pairs,), generator=generator, dtype=torch.int32)  # none for the last
    order, begin = torch.full((pairs,), -1, dtype=torch.int32), torch.full((experts + 1,), -1, dtype=torch.int32)
    sort = experts_kernels(ExpertSizes(experts, 1, 16, 16), PLAIN, "fp16", SMALL)[0]
    sort.launch((experts,), chosen, order, begin, pairs)
    assert order.tolist() == torch.sort(chosen, stable=True).indices.tolist()
    assert begin.tolist() == [0, *torch.bincount(chosen, minlength=experts).cumsum(0).tolist()]


@pytest.mark.parametrize("form", INT4, ids=lambda form: form.name)
@pytest.mark.parametrize("inputs_", [64, 128, 704])
def test_int4_packing_and_its_error(generator: torch.Generator, form: WeightFormat, inputs_: int) -> None:
    values = torch.randint(0, 16, (3, 5, inputs_), generator=generator, dtype=torch.uint8)
    packed = pack_int4(values, form)
    assert packed.shape == (3, 5, inputs_ // 2)
    assert torch.equal(unpack_int4(packed, form), values)

    weights = torch.randn(6, inputs_, generator=generator)
    stored, scale = to_int4(weights, form)
    assert scale.shape == (6, -(-inputs_ // form.group))
    by_input = scale.repeat_interleave(form.group, dim=-1)[:, :inputs_]
    error = ((unpack_int4(stored, form).float() - 8) * by_input - weights).abs()
    assert (error <= by_input * 0.5001).all()


def test_a_half_of_a_run_has_one_scale() -> None:
    for form in INT4:
        for size in (64, 128, 704, 2816):
            assert form.group % (form.run(size) // 2) == 0
            assert size % form.run(size) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightFormat("int8"), "choose plain, fp8 or int4"),
        (lambda: WeightFormat("int4", 48), "group 48 of int4"),
        (lambda: WeightFormat("fp8", 32), "group 32 of fp8"),
        (lambda: INT4[0].run(96), "multiple of 64"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError, match=message):
        make()
