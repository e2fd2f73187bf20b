"""The shapes of the generated checkpoints, and the recipe of their weights. Knows no files.

Tuned on traces of the oracle: the odd shapes take 10 to 24 steps per canvas, some runs stop by confidence and some
run out of steps, and entropies fall from about one nat to near zero. The self-conditioning signal is small: in an
untrained network a large one amplifies rounding errors from step to step until nothing can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One checkpoint to make; sizes as `DiffusionGemmaTextConfig` names them, then the recipe of the weights."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_global_key_value_heads: int
    global_head_dim: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    sliding_window: int
    canvas_length: int
    layers: str  # one letter per layer: s sliding, f full
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float
    sliding_rope_theta: float
    full_rope_theta: float
    partial_rotary_factor: float
    released_spelling: bool  # `global_head_dim` as in the released config, or `per_layer_config` as saved by 5.23
    dtype: str  # of the file: float32 or bfloat16
    odd: bool  # scalars, scales and norm weights away from one
    branch_scale: float  # size of what attention and feed-forward add to the residual stream
    logit_scale: float  # weight of the final norm: the spread of the logits
    soft_scale: float  # size of the self-conditioning signal beside the canvas embedding
    generation: dict[str, Any]  # diffusion defaults


def _generation(max_denoising_steps: int, entropy_bound: float, confidence_threshold: float) -> dict[str, Any]:
    return {
        "max_denoising_steps": max_denoising_steps,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": entropy_bound},
        "t_min": 0.4,
        "t_max": 0.8,
        "stability_threshold": 1,
        "confidence_threshold": confidence_threshold,
    }


SHAPES: dict[str, Shape] = {
    "odd_a": Shape(
        vocab_size=211,
        hidden_size=56,
        intermediate_size=72,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        num_global_key_value_heads=3,
        global_head_dim=24,
        num_experts=5,
        top_k_experts=3,
        moe_intermediate_size=22,
        sliding_window=17,
        canvas_length=12,
        layers="sfsf",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        final_logit_softcapping=23.0,
        sliding_rope_theta=7_000.0,
        full_rope_theta=300_000.0,
        partial_rotary_factor=0.25,
        released_spelling=True,
        dtype="float32",
        odd=True,
        branch_scale=0.65,
        logit_scale=5.0,
        soft_scale=0.2,
        generation=_generation(24, 0.3, 0.05),
    ),
    "odd_b": Shape(
        vocab_size=307,
        hidden_size=40,
        intermediate_size=52,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=6,
        num_global_key_value_heads=1,
        global_head_dim=14,
        num_experts=7,
        top_k_experts=2,
        moe_intermediate_size=18,
        sliding_window=23,
        canvas_length=15,
        layers="ssfsf",
        max_position_embeddings=2048,
        rms_norm_eps=3e-6,
        final_logit_softcapping=41.0,
        sliding_rope_theta=23_000.0,
        full_rope_theta=2_000_000.0,
        partial_rotary_factor=0.5,
        released_spelling=False,
        dtype="bfloat16",
        odd=True,
        branch_scale=0.5,
        logit_scale=4.5,
        soft_scale=0.12,
        generation=_generation(24, 0.2, 0.08),
    ),
    "mid": Shape(
        vocab_size=32_768,
        hidden_size=512,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_global_key_value_heads=1,
        global_head_dim=128,
        num_experts=32,
        top_k_experts=8,
        moe_intermediate_size=128,
        sliding_window=1024,
        canvas_length=256,
        layers="sssssfsssssf",
        max_position_embeddings=262_144,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        sliding_rope_theta=10_000.0,
        full_rope_theta=1_000_000.0,
        partial_rotary_factor=0.25,
        released_spelling=True,
        dtype="bfloat16",
        odd=False,
        branch_scale=1.0,
        logit_scale=4.0,
        soft_scale=0.2,
        generation=_generation(48, 0.1, 0.005),
    ),
}
