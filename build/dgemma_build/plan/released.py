"""The model a plan is for: a checkpoint's `config.json`, or the released 26B-A4B. Reads no weights."""

from __future__ import annotations

from pathlib import Path

from dgemma_build.checkpoint import TextConfig, _read_json, _text_config
from dgemma_build.random_checkpoint import config_dict
from dgemma_build.random_shapes import SHAPES
from dgemma_runtime.errors import CheckpointError

RELEASED_NAME = "DiffusionGemma 26B-A4B"


def model_config(checkpoint: Path | None) -> tuple[str, TextConfig]:
    """Name and config of the checkpoint, or of the released model without one; raises CheckpointError."""
    if checkpoint is None:
        return RELEASED_NAME, _text_config(config_dict(SHAPES["real"]), Path("config.json"))
    path = checkpoint / "config.json"
    raw = _read_json(path)
    if raw.get("model_type") != "diffusion_gemma":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'diffusion_gemma'")
    return checkpoint.resolve().name, _text_config(raw, path)
