"""The denoiser's keys and values of given texts, by transformers' own encoder. Knows no drafter's weights.

They are what a serving engine has in its caches when a canvas begins, so nothing else is computed for the drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dgemma_build.oracle import load_oracle


@dataclass(frozen=True)
class Features:
    """Of one text: per layer that was asked for keys and values [kv_heads, n, head_dim]."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class ContextEncoder:
    """A frozen denoiser, of which only keys and values of `layers` are wanted, kept in `dtype`."""

    def __init__(self, checkpoint: Path, layers: Sequence[int], dtype: torch.dtype = torch.float16) -> None:
        self._model = load_oracle(checkpoint)
        self._layers, self._dtype = tuple(layers), dtype

    def encode(self, texts: Sequence[Sequence[int]]) -> list[Features]:
        """Of texts of token ids, in one padded batch; attention is causal, so padding behind changes nothing."""
        longest = max(len(text) for text in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        cache = DynamicCache()  # without a config: sliding layers keep every token too
        with torch.inference_mode():
            self._model.model.encoder.language_model(input_ids=ids, past_key_values=cache, use_cache=True)

        def part(tensor: Tensor, row: int) -> Tensor:
            return tensor[row, :, : len(texts[row])].to(self._dtype).clone()

        chosen: list[Any] = [cache.layers[index] for index in self._layers]
        return [
            Features(tuple((part(layer.keys, row), part(layer.values, row)) for layer in chosen))
            for row in range(len(texts))
        ]


def stack(features: Sequence[Features], lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The first `lengths` tokens of each text, padded behind: per layer [B, kv_heads, S, head_dim] float32."""
    longest = max(lengths)
    stacked = []
    for pairs in zip(*(item.layers for item in features), strict=True):
        both = []
        for which in (0, 1):
            first = pairs[0][which]
            padded = torch.zeros(len(pairs), first.shape[0], longest, first.shape[2])
            for row, (pair, length) in enumerate(zip(pairs, lengths, strict=True)):
                padded[row, :, :length] = pair[which][:, :length]
            both.append(padded)
        stacked.append((both[0], both[1]))
    return stacked
