"""The fused head against its definition in PyTorch: ids, entropies, soft embeddings, and rules of sampling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgemma_build.kernels.head import HeadConfig, HeadResult, fused_head

CAP = 30.0
SMALL = HeadConfig(
    rows=16, ids=32, hidden=16, columns=32, soft_ids=16, choose_hidden=32, parts=3, sum_columns=32, rows_per_pass=24
)


def reference(hidden: Tensor, embedding: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[HeadResult, Tensor]:
    """The result, and the cumulative probabilities [rows, V], in float64."""
    raw = hidden.double() @ embedding.double().T
    z = CAP * torch.tanh(raw / CAP) / temperature.double()[:, None]
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    until = p.cumsum(dim=-1)
    sampled = (until <= uniforms.double()[:, None]).sum(dim=-1).clamp(max=p.shape[1] - 1)
    entropy = -(p * log_p.clamp(min=-1e30)).sum(dim=-1)
    soft = p @ embedding.double() * math.sqrt(hidden.shape[1])
    return HeadResult(z.argmax(dim=-1), sampled, entropy, soft), until


def inputs(
    generator: torch.Generator, rows: int, vocab: int, width: int, dtype: torch.dtype, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, width, generator=generator) * spread
    embedding = torch.randn(vocab, width, generator=generator) / math.sqrt(width) * 4
    temperature = 0.4 + 0.6 * torch.rand(rows, generator=generator)
    return hidden.to(dtype), embedding.to(dtype), temperature, torch.rand(rows, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [(1, 32, 16), (7, 64, 32), (16, 96, 48), (33, 100, 40), (50, 333, 56)],  # even and uneven in every dimension
)
def test_the_head_is_its_definition(
    generator: torch.Generator, rows: int, vocab: int, width: int, dtype: torch.dtype
) -> None:
    given = inputs(generator, rows, vocab, width, dtype)
    expected, until = reference(*given)
    result = fused_head(*given, CAP, SMALL)
    assert torch.equal(result.argmax.long(), expected.argmax)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=0, atol=2e-5)
    tolerance = 4e-3 if dtype == torch.float16 else 1e-5  # probabilities are rounded twice to the weights' type
    scale = expected.soft_embedding.abs().amax()
    assert (result.soft_embedding.double() - expected.soft_embedding).abs().amax() <= tolerance * scale
    chosen = result.sampled.long()
    near = (until - given[3].double()[:, None]).abs().amin(dim=-1) < 1e-6  # a uniform on the border of two ids
    assert torch.equal(chosen[~near], expected.sampled[~near])
    assert near.sum() <= 1


def test_defaults_take_small_inputs(generator: torch.Generator) -> None:
    given = inputs(generator, 5, 70, 24, torch.float16)
    expected, _ = reference(*given)
    result = fused_head(*given, CAP)
    assert torch.equal(result.argmax.long(), expected.argmax)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=0, atol=2e-5)


def test_every_id_can_be_sampled_and_borders_belong_to_the_later_id(generator: torch.Generator) -> None:
    hidden, embedding, _, _ = inputs(generator, 1, 77, 16, torch.float32, spread=0.2)
    _, until = reference(hidden, embedding, torch.ones(1), torch.zeros(1))
    starts = torch.cat([torch.zeros(1, dtype=torch.float64), until[0, :-1]])
    middles = (starts + until[0]) / 2
    rows = len(middles)
    result = fused_head(hidden.expand(rows, -1).contiguous(), embedding, torch.ones(rows), middles.float(), CAP, SMALL)
    assert result.sampled.tolist() == list(range(77))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_give_possible_ids(generator: torch.Generator, uniform: float) -> None:
    """With the mass in the middle of the vocabulary, neither end may give an id of probability zero."""
    vocab, width = 200, 16
    hidden = torch.ones(3, width)
    embedding = torch.full((vocab, width), -40.0)  # softcapped to -30: zero in float32 at a temperature of 0.1
    embedding[90:95] = torch.randn(5, width, generator=generator) * 0.01 + 2.0
    result = fused_head(hidden, embedding, torch.full((3,), 0.1), torch.full((3,), uniform), CAP, SMALL)
    assert set(result.sampled.tolist()) == {90 if uniform == 0 else 94}


def test_of_equal_logits_the_lowest_id_is_the_argmax(generator: torch.Generator) -> None:
    hidden, embedding, temperature, uniforms = inputs(generator, 4, 130, 16, torch.float32)
    best = (hidden @ embedding.T).argmax(dim=-1)
    for row, id_ in enumerate(best.tolist()):
        embedding[100 + row] = embedding[id_]
    result = fused_head(hidden, embedding, temperature, uniforms, CAP, SMALL)
    assert torch.equal(result.argmax.long(), best.minimum(torch.arange(100, 104)))


@pytest.mark.parametrize("temperature", [1e-6, 100.0])
def test_extreme_temperatures(generator: torch.Generator, temperature: float) -> None:
    hidden, embedding, _, uniforms = inputs(generator, 9, 120, 24, torch.float32)
    given = (hidden, embedding, torch.full((9,), temperature), uniforms)
    expected, _ = reference(*given)
    result = fused_head(*given, CAP, SMALL)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=0, atol=2e-5)
    if temperature < 1:
        assert torch.equal(result.sampled, result.argmax)
    assert torch.equal(result.argmax.long(), expected.argmax)


def test_logits_far_beyond_the_cap_stay_finite(generator: torch.Generator) -> None:
    given = inputs(generator, 6, 64, 16, torch.float32, spread=5000.0)
    expected, _ = reference(*given)
    result = fused_head(*given, CAP, SMALL)
    assert torch.isfinite(result.soft_embedding).all()
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=0, atol=1e-4)


def test_rows_do_not_depend_on_their_company(generator: torch.Generator) -> None:
    hidden, embedding, temperature, uniforms = inputs(generator, 40, 150, 32, torch.float16)
    together = fused_head(hidden, embedding, temperature, uniforms, CAP, SMALL)
    for rows in (slice(3, 4), slice(17, 40)):
        alone = fused_head(hidden[rows], embedding, temperature[rows], uniforms[rows], CAP, SMALL)
        assert torch.equal(alone.argmax, together.argmax[rows])
        assert torch.equal(alone.sampled, together.sampled[rows])
        torch.testing.assert_close(alone.entropy, together.entropy[rows], rtol=0, atol=1e-6)


def test_no_rows_are_no_work(generator: torch.Generator) -> None:
    given = inputs(generator, 0, 64, 16, torch.float16)
    assert fused_head(*given, CAP, SMALL).soft_embedding.shape == (0, 16)


def test_the_number_of_parts_changes_only_rounding(generator: torch.Generator) -> None:
    given = inputs(generator, 10, 300, 24, torch.float32)
    one, seven = (fused_head(*given, CAP, replace(SMALL, parts=parts)) for parts in (1, 7))
    assert torch.equal(one.sampled, seven.sampled)
    torch.testing.assert_close(one.soft_embedding, seven.soft_embedding, rtol=1e-5, atol=1e-5)
