"""The drafter as a torch module, for training and as the reference of its graph. Knows no data and no files.

A canvas position starts as a learned embedding of its offset plus what it is told of the last committed token. Each
layer attends, in one softmax, to the context's keys and values in one layer of the denoiser and to its own of all
canvas positions, and then goes through a gated MLP. What comes out is projected to the denoiser's width and multiplied
with the denoiser's embedding. Queries and keys are normed and rotated as in the denoiser's layer, and sliding layers
see the last window - 1 tokens of context from every position, as its canvases do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgemma_build.drafter.config import DrafterConfig
from dgemma_build.text_config import TextConfig
from dgemma_runtime.contract import SLIDING, LayerSpec

Context = Sequence[tuple[Tensor, Tensor]]
"""Per layer of the drafter keys and values [B, kv_heads, S, head_dim] of the context, from its first token on."""


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float, start: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.eps) * self.weight


def _normed(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Layer(nn.Module):
    def __init__(self, config: DrafterConfig, spec: LayerSpec, eps: float) -> None:
        super().__init__()
        size, dim = config.hidden_size, spec.head_dim
        self.heads, self.kv_heads, self.dim, self.eps = config.num_attention_heads, spec.num_key_value_heads, dim, eps

        def linear(inputs: int, outputs: int) -> nn.Linear:
            module = nn.Linear(inputs, outputs, bias=False)
            nn.init.normal_(module.weight, std=inputs**-0.5)
            return module

        self.qkv_proj = linear(size, (self.heads + 2 * self.kv_heads) * dim)
        self.o_proj = linear(self.heads * dim, size)
        self.gate_up_proj = linear(size, 2 * config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, size)
        scale = dim**-0.25  # attention itself is not scaled
        self.q_norm, self.k_norm = RmsNorm(dim, eps, scale), RmsNorm(dim, eps, scale)
        self.input_norm, self.post_attention_norm = RmsNorm(size, eps), RmsNorm(size, eps)
        self.pre_mlp_norm, self.post_mlp_norm = RmsNorm(size, eps), RmsNorm(size, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, C, hidden], rope each [B, 1, C, dim], mask [B, 1, 1, S + C] additive."""
        x = x + self.post_attention_norm(self._attend(self.input_norm(x), rope, mask, context))
        gate, up = self.gate_up_proj(self.pre_mlp_norm(x)).chunk(2, -1)
        return x + self.post_mlp_norm(self.down_proj(F.gelu(gate, approximate="tanh") * up))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        by_head = self.qkv_proj(x).view(batch, length, -1, self.dim).transpose(1, 2)
        q, k, v = by_head.split((self.heads, self.kv_heads, self.kv_heads), 1)
        q, k, v = _rotate(self.q_norm(q), *rope), _rotate(self.k_norm(k), *rope), _normed(v, self.eps)
        keys, values = (torch.cat((past, own), 2) for past, own in zip(context, (k, v), strict=True))
        q, keys, values = q.to(mask.dtype), keys.to(mask.dtype), values.to(mask.dtype)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Drafter(nn.Module):
    """Logits of a whole canvas; `embedding` [vocab, denoiser_hidden] is the denoiser's and is not trained."""

    embedding: Tensor

    def __init__(self, config: DrafterConfig, denoiser: TextConfig, embedding: Tensor) -> None:
        super().__init__()
        self.config, self._denoiser = config, denoiser
        self.register_buffer("embedding", embedding, persistent=False)
        size, theirs, eps = config.hidden_size, config.denoiser_hidden_size, denoiser.rms_norm_eps
        self.offset_embedding = nn.Parameter(torch.randn(config.canvas_length, size))
        self.last_token_proj = nn.Linear(theirs, size, bias=False)
        self.layers = nn.ModuleList(Layer(config, spec, eps) for spec in config.layers(denoiser))
        self.norm = RmsNorm(size, eps)
        self.output_proj = nn.Linear(size, theirs, bias=False)
        for module in (self.last_token_proj, self.output_proj):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, context: Context, position: Tensor, last_id: Tensor) -> Tensor:
        """Softcapped logits [B, C, vocab] in float32; position [B] (tokens of context) and last_id [B] are int64."""
        theirs = self.config.denoiser_hidden_size
        last = self.last_token_proj(F.embedding(last_id, self.embedding) * theirs**0.5)
        x = self.offset_embedding + last[:, None]
        ropes, masks = self._ropes(position), self._masks(position, context[0][0].shape[2])
        specs = self.config.layers(self._denoiser)
        for layer, spec, pair in zip(self.layers, specs, context, strict=True):
            x = layer(x, ropes[spec.kind], masks[spec.kind], pair)
        logits = F.linear(self.output_proj(self.norm(x)), self.embedding).float()
        cap = self._denoiser.final_logit_softcapping
        return torch.tanh(logits / cap) * cap

    def _ropes(self, position: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        places = (position[:, None] + torch.arange(self.config.canvas_length)).float()
        found = {}
        for kind, rope in self._denoiser.rope.items():
            angles = places[..., None] * torch.from_numpy(rope.inverse_frequencies)
            angles = torch.cat((angles, angles), -1)[:, None]
            found[kind] = (angles.cos(), angles.sin())
        return found

    def _masks(self, position: Tensor, slots: int) -> dict[str, Tensor]:
        slot, length = torch.arange(slots), position[:, None]
        window = self._denoiser.spec.sliding_window - 1
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        found = {}
        for kind in self._denoiser.rope:
            seen = slot < length
            if kind == SLIDING:
                seen = seen & (slot >= length - window)
            seen = torch.cat((seen, torch.ones(len(position), self.config.canvas_length, dtype=torch.bool)), 1)
            found[kind] = torch.zeros((), dtype=dtype).masked_fill(~seen, -1e9)[:, None, None]
        return found
