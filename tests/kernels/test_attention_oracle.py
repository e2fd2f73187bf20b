"""Paged attention against transformers' own DiffusionGemma, call by call of real generations.

Causal rows of prefill and commit, canvas rows, sliding and full layers. The oracle's attention is watched while it
generates. Its calls of one layer become rows of the kernel's, their keys and values at the positions that they have in
the text. What the oracle has dropped from a window is garbage here, and its pages are lost, so an output that used any
of it would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dgemma_build.kernels.attention import AttentionConfig, KeyValuePages, paged_attention
from dgemma_build.oracle import load_oracle, trace_generation
from dgemma_build.random_checkpoint import write_checkpoint
from dgemma_runtime.noise import CanvasNoise

# torch announces its own deprecations when transformers first compiles; they are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CONFIG = AttentionConfig(pairs=16, keys=16, parts=3, least=1, warps=4, stages=2)
PAGE, GARBAGE = 32, 1e4
PROMPTS = {29: 2, 5: 1}  # tokens, beyond every window and within, and canvases generated
IMPLEMENTATION = "sdpa"


@dataclass(frozen=True)
class Call:
    """One call of the oracle's attention, one row."""

    layer: int
    window: int  # tokens; 0: full attention
    is_canvas: bool
    query: Tensor  # [L, heads, D]
    keys: Tensor  # [kv_heads, S, D], the last L of them the tokens' own
    values: Tensor
    out: Tensor  # [L, heads, D]


@contextmanager
def watched() -> Iterator[list[Call]]:
    """Every call of attention that is made inside."""
    calls: list[Call] = []
    original: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def attention(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Any, **options: Any) -> Any:
        result = original(module, query, keys, values, mask, **options)
        is_canvas = type(module).__name__ == "DiffusionGemmaDecoderTextAttention"
        assert is_canvas or type(module).__name__ == "DiffusionGemmaEncoderTextAttention"
        assert options["scaling"] == 1.0
        row = (query[0].transpose(0, 1), keys[0], values[0], result[0][0])
        calls.append(Call(module.layer_idx, module.sliding_window or 0, is_canvas, *(part.clone() for part in row)))
        return result

    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = attention
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = original


@dataclass(frozen=True)
class Placed:
    """A call with the tokens of context behind which it stood."""

    call: Call
    position: int


def placed(calls: list[Call], layers: int) -> list[Placed]:
    """Passes go through all layers in turn; a full layer holds every token, so it tells where the pass stands."""
    assert len(calls) % layers == 0
    found = []
    for start in range(0, len(calls), layers):
        one_pass = calls[start : start + layers]
        assert [call.layer for call in one_pass] == list(range(layers))
        positions = {call.keys.shape[1] - len(call.query) for call in one_pass if not call.window}
        assert len(positions) == 1
        found += [Placed(call, *positions) for call in one_pass]
    return found


def run_kernel(rows: list[Placed]) -> list[Tensor]:
    """The kernel's outputs [L, heads, padded D] for calls of one layer, all in one call; padding is with zeros."""
    first = rows[0].call
    window, dim = first.window, first.query.shape[-1]
    padding = max(16, 1 << (dim - 1).bit_length()) - dim
    longest = max(len(row.call.query) for row in rows)
    used = [-(-(row.position + len(row.call.query)) // PAGE) for row in rows]
    shape = (sum(used), first.keys.shape[0], PAGE, dim + padding)
    pools = [torch.full(shape, GARBAGE) for _ in range(2)]
    table = torch.full((len(rows), max(used)), -1, dtype=torch.int32)
    query = torch.zeros(len(rows), longest, first.query.shape[1], dim + padding)
    free = iter(reversed(range(sum(used))))
    for index, row in enumerate(rows):
        call, end = row.call, row.position + len(row.call.query)
        query[index, : len(call.query)] = pad(call.query, (0, padding))
        held = end - call.keys.shape[1]  # the first position that the oracle holds
        own = {number: next(free) for number in range(held // PAGE, used[index])}
        for number, page in own.items():
            table[index, number] = page
        for pool, parts in zip(pools, (call.keys, call.values), strict=True):
            for place in range(held, end):
                pool[own[place // PAGE], :, place % PAGE] = pad(parts[:, place - held], (0, padding))

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    rules = zip(*((row.position, len(row.call.query), row.call.is_canvas) for row in rows), strict=True)
    position, length, is_canvas = (column(list(map(int, rule))) for rule in rules)
    out = paged_attention(query, KeyValuePages(pools[0], pools[1]), table, position, length, is_canvas, window, CONFIG)
    return [out[index, : len(row.call.query)] for index, row in enumerate(rows)]


@pytest.fixture(scope="module", params=["odd_a", "odd_b"])
def generations(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Placed]:
    """Every call of two short generations, one step a canvas."""
    directory: Path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)
    model = load_oracle(directory, attention=IMPLEMENTATION, threads=1)
    text = model.config.text_config
    found: list[Placed] = []
    for length, canvases in PROMPTS.items():
        prompt = np.random.default_rng(length).integers(0, text.vocab_size, length).tolist()
        options = {
            "max_new_tokens": canvases * model.config.canvas_length,
            "max_denoising_steps": 1,
            "eos_token_id": None,
        }
        with watched() as calls:
            trace_generation(model, prompt, length, CanvasNoise, **options)
        found += placed(calls, text.num_hidden_layers)
    return found


@pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "full"])
def test_attention_is_the_oracles(generations: list[Placed], sliding: bool) -> None:
    of_kind = [row for row in generations if (row.call.window > 0) == sliding]
    rows = [row for row in of_kind if row.call.layer == of_kind[0].call.layer]
    longest = max(rows, key=lambda row: len(row.call.query))
    for together in ([longest], [row for row in rows if row is not longest]):
        for row, result in zip(together, run_kernel(together), strict=True):
            expected = pad(row.call.out, (0, result.shape[-1] - row.call.out.shape[-1]))
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


def test_the_calls_are_of_every_kind(generations: list[Placed]) -> None:
    kinds = {
        (call.is_canvas, call.window > 0, row.position >= (call.window or 1))
        for row in generations
        for call in [row.call]
    }
    assert kinds == set(product((False, True), repeat=3)) - {(True, False, False)}  # a canvas has a prompt before it
    cut = [row for row in generations if row.call.keys.shape[1] < row.position + len(row.call.query)]
    assert {row.call.is_canvas for row in cut} == {False, True}, "the oracle dropped what is behind a window"


def test_a_key_more_or_less_in_the_window_would_show(generations: list[Placed]) -> None:
    """The comparison can fail: windows one token wider or narrower give other results."""
    rows = [row for row in generations if row.call.window and row.position > row.call.window]
    canvases = [row for row in rows if row.call.is_canvas][:1]
    for change in (-1, 1):
        moved = [Placed(replace(row.call, window=row.call.window + change), row.position) for row in canvases]
        for row, result in zip(canvases, run_kernel(moved), strict=True):
            assert (result[..., : row.call.out.shape[-1]] - row.call.out).abs().amax() > 1e-3
