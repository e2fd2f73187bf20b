"""The model a plan is for: a checkpoint's `config.json`, or the released 26B-A4B. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgemma_build.checkpoint import TextConfig, _read_json, _text_config
from dgemma_runtime.errors import CheckpointError

RELEASED_NAME = "DiffusionGemma 26B-A4B"
_KINDS = (["sliding_attention"] * 5 + ["full_attention"]) * 5
RELEASED: dict[str, Any] = {  # what a plan needs of the released `config.json`
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "text_config": {
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": len(_KINDS),
        "layer_types": _KINDS,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
    },
}


def model_config(checkpoint: Path | None) -> tuple[str, TextConfig]:
    """Name and config of the checkpoint, or of the released model without one; raises CheckpointError."""
    if checkpoint is None:
        return RELEASED_NAME, _text_config(RELEASED, Path("config.json"))
    path = checkpoint / "config.json"
    raw = _read_json(path)
    if raw.get("model_type") != "diffusion_gemma":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'diffusion_gemma'")
    return checkpoint.resolve().name, _text_config(raw, path)
