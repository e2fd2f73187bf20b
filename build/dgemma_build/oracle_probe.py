"""The oracle behind the gate's probe: transformers' modules called directly, without `generate`.

Holds the gate to account: the unchanged oracle must pass its own trace, and one with a deliberate error must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from dgemma_build.gate import ProbeStep
from dgemma_build.oracle import Float32Array, Int32Array, Model


class OracleProbe:
    """An `EngineProbe` over a loaded oracle model."""

    def __init__(self, model: Model, carry_soft: bool = False) -> None:
        """carry_soft: use the soft embedding of its own previous step instead of the one given."""
        self._model, self._carry_soft = model, carry_soft
        self._cache: Any = None
        self._own_soft = np.zeros((0, 0), np.float32)

    def start(self) -> None:
        self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))

    @torch.no_grad()
    def encode(self, token_ids: Int32Array) -> None:
        position, count = self._cache.get_seq_length(), len(token_ids)
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        positions = torch.arange(position, position + count)[None]
        masks = self._model.model.encoder.create_masks_for_generate(
            config=self._model.config,
            inputs_embeds=torch.empty((1, count, 0)),
            attention_mask=torch.ones((1, position + count), dtype=torch.bool),
            past_key_values=self._cache,
            position_ids=positions,
        )
        self._model.model.encoder(
            input_ids=ids, attention_mask=masks, past_key_values=self._cache, position_ids=positions
        )

    @torch.no_grad()
    def denoise(
        self, canvas_ids: Int32Array, soft: Float32Array | None, uniforms: Float32Array, temperature: float
    ) -> ProbeStep:
        if self._carry_soft and soft is not None:
            soft = self._own_soft
        canvas = torch.from_numpy(canvas_ids.astype(np.int64))[None]
        position = self._cache.get_seq_length()
        masks = self._model.model.decoder.create_diffusion_decoder_attention_mask(
            config=self._model.config,
            inputs_embeds=canvas[..., None],
            past_key_values=self._cache,
            decoder_attention_mask=torch.ones((1, position + len(canvas_ids)), dtype=torch.bool),
        )
        with _soft_embedding(self._model, soft):
            out = self._model(
                decoder_input_ids=canvas,
                decoder_attention_mask=masks,
                past_key_values=self._cache,
                decoder_position_ids=torch.arange(position, position + len(canvas_ids))[None],
            )
        logits = (out.logits / temperature)[0]
        probabilities = logits.softmax(-1)
        embedding = self._model.model.decoder.embed_tokens
        distribution: Any = torch.distributions.Categorical(logits=logits)
        edges = probabilities.double().cumsum(-1).numpy()
        sampled = np.minimum((edges <= uniforms.astype(np.float64)[:, None]).sum(-1), edges.shape[-1] - 1)
        self._own_soft = (probabilities @ embedding.weight * embedding.embed_scale).numpy()
        return ProbeStep(
            argmax_ids=logits.argmax(-1).numpy().astype(np.int32),
            sampled_ids=sampled.astype(np.int32),
            entropies=distribution.entropy().numpy(),
            next_soft=self._own_soft,
        )

    def keys_values(self, layer: int) -> tuple[Float32Array, Float32Array]:
        held = self._cache.layers[layer]
        keys, values = (tensor[0].transpose(0, 1).numpy().copy() for tensor in (held.keys, held.values))
        return keys, values


@contextmanager
def _soft_embedding(model: Model, soft: Float32Array | None) -> Iterator[None]:
    """While open, self-conditioning reads `soft` ([canvas_length, hidden]) instead of zeros."""

    def hook(module: Any, args: Any) -> Any:
        embedded, zeros = args
        return embedded, zeros if soft is None else torch.from_numpy(soft)[None]

    handle = model.model.decoder.self_conditioning.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
