"""The shapes of the generated checkpoints, and the recipe of their weights. Draws nothing and knows no files.

`real` has the released model's dimensions; take as many of its layers and tokens as are wanted with `resized`. The
other shapes were tuned on traces of the oracle: the odd ones take 10 to 24 steps per canvas, some runs stop by
confidence and some run out of steps, and entropies fall from about one nat to near zero. The self-conditioning signal
is small: in an untrained network a large one amplifies rounding errors from step to step until nothing can be compared.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from dgemma_runtime.errors import ConfigurationError


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
    streams: bool = False  # a random stream per tensor, drawn piece by piece; or one stream through all of them


@dataclass(frozen=True)
class Weight:
    """How one tensor is drawn.

    `normal`: about zero with the deviation `scale`. `around`: within 40% of `scale`. `constant`: all `scale`.
    """

    sizes: tuple[int, ...]
    kind: Literal["normal", "around", "constant"]
    scale: float = 1.0


Weights = dict[str, Weight]


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
    "real": Shape(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        num_global_key_value_heads=2,
        global_head_dim=512,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        sliding_window=1024,
        canvas_length=256,
        layers="sssssf" * 5,
        max_position_embeddings=262_144,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        sliding_rope_theta=10_000.0,
        full_rope_theta=1_000_000.0,
        partial_rotary_factor=0.25,
        released_spelling=True,
        dtype="bfloat16",
        odd=True,
        branch_scale=1.0,
        logit_scale=4.0,
        soft_scale=0.2,
        generation=_generation(48, 0.1, 0.005),
        streams=True,
    ),
}


def resized(shape: Shape, layers: int | None = None, vocab_size: int | None = None) -> Shape:
    """The shape with another number of layers or tokens; None keeps its own.

    The pattern of layers is repeated or cut. The last layer is full attention: transformers makes it that anyway.
    """
    if layers is not None:
        if layers < 1:
            raise ConfigurationError(f"--layers {layers}: must be at least 1")
        kinds = (shape.layers * layers)[: layers - 1] + "f"
        shape = dataclasses.replace(shape, layers=kinds)
    return shape if vocab_size is None else dataclasses.replace(shape, vocab_size=vocab_size)


# ---------------------------------------------------------------- weights


def weights(shape: Shape) -> Weights:
    """Every tensor of the checkpoint in the order of drawing: name as transformers saves it -> how it is drawn."""
    recipe = _Recipe(shape)
    listed = {"model.decoder.embed_tokens.weight": recipe.linear(shape.vocab_size, shape.hidden_size)}
    for index in range(len(shape.layers)):
        listed |= recipe.layer(index)
    listed["model.decoder.norm.weight"] = recipe.around(shape.logit_scale, shape.hidden_size)
    listed["model.decoder.self_conditioning.pre_norm.weight"] = recipe.around(1.0, shape.hidden_size)
    listed |= recipe.mlp("model.decoder.self_conditioning", shape.soft_scale)
    return listed | recipe.vision()


class _Recipe:
    """The parts of one shape's checkpoint."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def linear(self, *sizes: int, scale: float = 1.0) -> Weight:
        """Products with inputs of unit variance have the deviation `scale`."""
        return Weight(sizes, "normal", scale * sizes[-1] ** -0.5)

    def around(self, centre: float, *sizes: int) -> Weight:
        """Values near `centre`: exactly it in an even shape, within 40% of it in an odd one."""
        return Weight(sizes, "around" if self.shape.odd else "constant", centre)

    def mlp(self, prefix: str, scale: float = 1.0) -> Weights:
        hidden, inner = self.shape.hidden_size, self.shape.intermediate_size
        return {
            f"{prefix}.gate_proj.weight": self.linear(inner, hidden),
            f"{prefix}.up_proj.weight": self.linear(inner, hidden),
            f"{prefix}.down_proj.weight": self.linear(hidden, inner, scale=scale),
        }

    def attention(self, prefix: str, sliding: bool) -> Weights:
        shape = self.shape
        dim = shape.head_dim if sliding else shape.global_head_dim
        key_values = shape.num_key_value_heads if sliding else shape.num_global_key_value_heads
        query_width = shape.num_attention_heads * dim
        parts = {
            f"{prefix}.q_proj.weight": self.linear(query_width, shape.hidden_size),
            f"{prefix}.k_proj.weight": self.linear(key_values * dim, shape.hidden_size),
            f"{prefix}.o_proj.weight": self.linear(shape.hidden_size, query_width),
            # Attention itself is not scaled; these put the spread of its scores near one and a half.
            f"{prefix}.q_norm.weight": self.around(1.2 * dim**-0.25, dim),
            f"{prefix}.k_norm.weight": self.around(1.2 * dim**-0.25, dim),
        }
        if sliding:
            parts[f"{prefix}.v_proj.weight"] = self.linear(key_values * dim, shape.hidden_size)
        return parts

    def experts(self, prefix: str) -> Weights:
        count, inner, hidden = self.shape.num_experts, self.shape.moe_intermediate_size, self.shape.hidden_size
        return {
            f"{prefix}.experts.gate_up_proj": self.linear(count, 2 * inner, hidden),
            f"{prefix}.experts.down_proj": self.linear(count, hidden, inner),
            f"{prefix}.router.proj.weight": self.linear(count, hidden, scale=hidden**0.5),
            f"{prefix}.router.scale": self.around(1.0, hidden),
            f"{prefix}.router.per_expert_scale": self.around(1.0, count),
        }

    def layer(self, index: int) -> Weights:
        prefix, hidden = f"model.decoder.layers.{index}", self.shape.hidden_size
        parts = self.attention(f"{prefix}.self_attn", self.shape.layers[index] == "s")
        parts |= self.mlp(f"{prefix}.mlp")
        parts |= self.experts(prefix)
        branch = self.shape.branch_scale
        for name, centre in (
            ("input_layernorm", 1.0),
            ("post_attention_layernorm", branch),
            ("pre_feedforward_layernorm", 1.0),
            ("pre_feedforward_layernorm_2", 1.0),
            ("post_feedforward_layernorm", branch),
            ("post_feedforward_layernorm_1", 1.0),
            ("post_feedforward_layernorm_2", 1.0),
        ):
            parts[f"{prefix}.{name}.weight"] = self.around(centre, hidden)
        parts[f"{prefix}.layer_scalar"] = self.around(1.0, 1)
        parts[f"model.encoder.language_model.layers.{index}.layer_scalar"] = self.around(1.0, 1)
        return parts

    def vision(self) -> Weights:
        """The smallest vision tower that transformers accepts; text never reaches it."""
        prefix, size = "model.encoder.vision_tower", 8
        layer = f"{prefix}.encoder.layers.0"
        parts = {f"{layer}.mlp.{name}_proj.linear.weight": self.linear(size, size) for name in ("gate", "up", "down")}
        parts |= {f"{layer}.self_attn.{name}_proj.linear.weight": self.linear(size, size) for name in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
        for name in (*norms, "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            parts[f"{layer}.{name}.weight"] = Weight((size,), "constant")
        parts[f"{prefix}.patch_embedder.input_proj.weight"] = self.linear(size, 12)
        parts[f"{prefix}.patch_embedder.position_embedding_table"] = Weight((2, 4, size), "constant")
        parts["model.encoder.embed_vision.embedding_projection.weight"] = self.linear(self.shape.hidden_size, size)
        return parts
