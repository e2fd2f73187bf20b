"""The denoiser as a training module: prompt and canvas in one masked pass. Knows no data and no files.

Same function as transformers' `DiffusionGemmaForBlockDiffusion` (a test holds them together), laid out for training:
one sequence holds the clean context (causal) and the noised canvas (bidirectional, sees the context), and the
experts are evaluated densely with the unchosen ones weighted zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DemoConfig:
    """Shape of the demo denoiser; the names are those of `DiffusionGemmaTextConfig`."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_global_key_value_heads: int = 1
    global_head_dim: int = 64
    num_experts: int = 8
    top_k_experts: int = 2
    moe_intermediate_size: int = 64
    sliding_window: int = 96
    canvas_length: int = 64
    layer_types: tuple[str, ...] = ("sliding_attention", "full_attention") * 3
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    sliding_rope_theta: float = 10_000.0
    full_rope_theta: float = 1_000_000.0
    partial_rotary_factor: float = 0.25


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, init: float | None = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), init)) if init is not None else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return y if self.weight is None else y * self.weight


class Attention(nn.Module):
    def __init__(self, config: DemoConfig, sliding: bool) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads if sliding else config.num_global_key_value_heads
        self.head_dim = config.head_dim if sliding else config.global_head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False) if sliding else None
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        scale = self.head_dim**-0.25  # the attention itself is not scaled, so the norms start where 1/sqrt(d) would
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, scale)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, scale)
        self.v_norm = RMSNorm(self.head_dim, config.rms_norm_eps, None)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.head_dim))
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        v = k if self.v_proj is None else self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        q, k = _rotate(q, cos, sin), _rotate(self.k_norm(k), cos, sin)
        v = self.v_norm(v)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        q, k, v = (t.transpose(1, 2).to(mask.dtype) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))  # type: ignore[no-any-return]


class Router(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, None)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))
        self.top_k = config.top_k_experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of every expert per token ([..., experts], zero where not chosen) and the load-balance loss."""
        scaled = self.norm(x) * self.scale * x.shape[-1] ** -0.5
        with torch.autocast("cpu", enabled=False):
            probabilities = F.linear(scaled.float(), self.proj.weight.float()).softmax(-1)
        threshold = probabilities.topk(self.top_k, -1).values[..., -1:]
        chosen = (probabilities >= threshold).float()
        weights = probabilities * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        axes = tuple(range(chosen.dim() - 1))
        balance = (chosen.mean(axes) / self.top_k * probabilities.mean(axes)).sum() * probabilities.shape[-1]
        return weights * self.per_expert_scale, balance


class Experts(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        inner = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, inner))
        nn.init.normal_(self.gate_up_proj, std=config.hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=inner**-0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = self.gate_up_proj.chunk(2, 1)  # [experts, inner, hidden]
        hidden = F.gelu(F.linear(x, gate.flatten(0, 1)), approximate="tanh") * F.linear(x, up.flatten(0, 1))
        hidden = hidden.view(*hidden.shape[:-1], *gate.shape[:2]) * weights.to(hidden.dtype)[..., None]
        return F.linear(hidden.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self, config: DemoConfig, sliding: bool) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = Attention(config, sliding)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.pre_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = norm(), norm()
        self.encoder_scalar = nn.Parameter(torch.ones(1))
        self.decoder_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, is_canvas: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), *rope, mask))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        weights, balance = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), weights)
        x = x + self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(sparse))
        return x * torch.where(is_canvas, self.decoder_scalar, self.encoder_scalar), balance


class SelfConditioning(GatedMLP):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, None)

    def condition(self, embedded: Tensor, soft: Tensor) -> Tensor:
        """Embedded canvas with the previous step's soft embedding mixed in; both [B, C, hidden]."""
        return self.post_norm(embedded + self(self.pre_norm(soft)))  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """Logits of a canvas given its context; see `forward`."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(config, kind == "sliding_attention") for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Expected scaled embedding under softmax(logits): [..., vocab] to [..., hidden]."""
        soft: Tensor = logits.softmax(-1) @ self.embed_tokens.weight * self.config.hidden_size**0.5
        return soft

    def forward(self, context: Tensor, context_length: Tensor, canvas: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        """Softcapped logits [B, canvas, vocab] (fp32) and the load-balance loss.

        context: [B, P] ids, right-padded; context_length: [B]; canvas: [B, C] ids; soft: [B, C, hidden], the
        soft embedding of the previous step (zeros at the first).
        """
        config = self.config
        scale = config.hidden_size**0.5
        canvas_states = self.self_conditioning.condition(self.embed_tokens(canvas) * scale, soft)
        x = torch.cat((self.embed_tokens(context) * scale, canvas_states), 1)
        padded, canvas_length = context.shape[1], canvas.shape[1]
        steps = torch.arange(padded + canvas_length)
        is_canvas = steps >= padded
        length = context_length[:, None]
        position = torch.where(is_canvas, length + steps - padded, steps)  # [B, L]
        masks = self._masks(position, is_canvas, length, steps)
        ropes = {kind: self._rope(position, kind) for kind in set(config.layer_types)}
        balance = torch.zeros(())
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            x, layer_balance = layer(x, ropes[kind], masks[kind], is_canvas[:, None])
            balance = balance + layer_balance
        logits = F.linear(self.norm(x[:, padded:]), self.embed_tokens.weight).float()
        cap = config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap, balance / len(self.layers)

    def _masks(self, position: Tensor, is_canvas: Tensor, length: Tensor, steps: Tensor) -> dict[str, Tensor]:
        key_valid = is_canvas | (steps < length)  # [B, L]
        query_canvas, key_canvas = is_canvas[:, None], is_canvas[None, :]
        causal = (steps[:, None] >= steps[None, :]) & ~key_canvas
        visible = (torch.where(query_canvas, torch.ones_like(causal), causal) & key_valid[:, None, :])[:, None]
        window = self.config.sliding_window
        near_query = position[:, :, None] - position[:, None, :] < window
        near_canvas = key_canvas | (length[:, :, None] - position[:, None, :] < window)
        near = torch.where(query_canvas, near_canvas, near_query)[:, None]
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32

        def additive(allowed: Tensor) -> Tensor:
            return torch.zeros((), dtype=dtype).masked_fill(~allowed, -1e9)

        return {"full_attention": additive(visible), "sliding_attention": additive(visible & near)}

    def _rope(self, position: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        config = self.config
        if kind == "sliding_attention":
            dim, theta, rotated = config.head_dim, config.sliding_rope_theta, config.head_dim // 2
        else:
            dim, theta = config.global_head_dim, config.full_rope_theta
            rotated = int(config.partial_rotary_factor * dim // 2)
        frequency = torch.zeros(dim // 2)
        frequency[:rotated] = theta ** -(torch.arange(0, 2 * rotated, 2).float() / dim)
        angle = (position[..., None].float() * frequency).repeat(1, 1, 2)[:, :, None]  # [B, L, 1, dim]
        return angle.cos(), angle.sin()
