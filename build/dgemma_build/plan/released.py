"""The model a plan is for: a checkpoint's `config.json`, or the released 26B-A4B. Reads no weights."""

from __future__ import annotations

from pathlib import Path

from dgemma_build.checkpoint import TextConfig, parse_config, read_config
from dgemma_build.random_checkpoint import config_dict
from dgemma_build.random_shapes import SHAPES

RELEASED_NAME = "DiffusionGemma 26B-A4B"


def model_config(checkpoint: Path | None) -> tuple[str, TextConfig]:
    """Name and config of the checkpoint, or of the released model without one; raises CheckpointError."""
    if checkpoint is None:
        return RELEASED_NAME, parse_config(config_dict(SHAPES["real"]), Path("config.json"))
    return checkpoint.resolve().name, read_config(checkpoint)
