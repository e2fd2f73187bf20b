"""One quantiser serves the graph and the kernels: the integers of `dgemma_build.quantize` in the kernels' order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dgemma_build.kernels.packing import GROUPS, WeightFormat, dequantised, int4_weights, split_pairs, to_int4
from dgemma_build.quantize import GroupFormat, dequantize, quantize
from dgemma_runtime.errors import ConfigurationError

FORM = WeightFormat("int4", 64)


def quantised(matrix: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values 0 to 15 [out, in], scales [out, groups] and the numbers they stand for, of a matrix [in, out]."""
    form = GroupFormat(4, group)
    made = quantize(matrix.numpy(), form)
    inputs, outputs = matrix.shape
    values = split_pairs(torch.from_numpy(made.packed).reshape(outputs, -1))[:, :inputs]
    numbers = torch.from_numpy(np.ascontiguousarray(dequantize(made, form, inputs).T))
    return values, torch.from_numpy(made.scales), numbers


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("inputs", [64, 128, 704])
def test_the_kernels_numbers_are_the_quantisers(generator: torch.Generator, group: int, inputs: int) -> None:
    matrix = torch.randn(inputs, 10, generator=generator)
    values, scales, numbers = quantised(matrix, group)
    form = WeightFormat("int4", group)
    for given in (values, values.to(torch.int8) - 8):
        stored, kept = int4_weights(given, scales, form, torch.float32)
        assert stored.shape == (10, inputs // 2)
        assert torch.equal(dequantised(stored, kept, form), numbers)

    plain = dequantised(*to_int4(matrix.T.contiguous(), form), form)
    assert (numbers - matrix.T).square().mean() < 0.95 * (plain - matrix.T).square().mean()


def test_a_stack_of_experts(generator: torch.Generator) -> None:
    made = [quantised(torch.randn(128, 6, generator=generator), FORM.group) for _ in range(3)]
    values, scales, numbers = (torch.stack(parts) for parts in zip(*made, strict=True))
    stored, kept = int4_weights(values, scales, FORM, torch.float32)
    assert torch.equal(dequantised(stored, kept, FORM), numbers)


def test_scales_in_16_bits_must_be_exact(generator: torch.Generator) -> None:
    values, scales, _ = quantised(torch.randn(64, 8, generator=generator), FORM.group)
    with pytest.raises(ConfigurationError, match="does not hold them exactly"):
        int4_weights(values, scales, FORM, torch.bfloat16)
    rounded = scales.bfloat16().float()
    stored, kept = int4_weights(values, rounded, FORM, torch.bfloat16)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(dequantised(stored, kept, FORM), (values.float() - 8) * rounded)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2), r"need \(2, 1\)"),
        (torch.full((2, 64), 16, dtype=torch.uint8), torch.ones(2, 1), "0 to 15 as uint8"),
        (torch.full((2, 64), 8, dtype=torch.int8), torch.ones(2, 1), "-8 to 7 as int8"),
        (torch.full((2, 64), -9, dtype=torch.int8), torch.ones(2, 1), "-8 to 7 as int8"),
        (torch.zeros(2, 64), torch.ones(2, 1), "in torch.float32: give int8"),
    ],
)
def test_what_are_no_int4_weights(values: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        int4_weights(values, scales, FORM, torch.float32)
