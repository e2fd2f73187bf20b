"""The generated checkpoints are what transformers saves, depend on their seed alone, and generate something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import DiffusionGemmaForBlockDiffusion

from dgemma_build.oracle import Model, trace_generation
from dgemma_build.random_checkpoint import build_plain_tokenizer, write_checkpoint
from dgemma_build.random_shapes import SHAPES
from dgemma_runtime.noise import CanvasNoise


def layout(path: Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, type) of a safetensors file."""
    with safe_open(path, "np") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_files_hold_what_transformers_saves(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint(name))  # in the type of the file
    model.save_pretrained(tmp_path)

    assert layout(checkpoint(name) / "model.safetensors") == layout(tmp_path / "model.safetensors")
    ours, theirs = (json.loads((path / "generation_config.json").read_text()) for path in (checkpoint(name), tmp_path))
    assert ours == theirs


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_no_norm_weight_or_scalar_is_one(name: str, oracle: Callable[[str], Model]) -> None:
    model = oracle(name)
    parameters = {**dict(model.model.decoder.named_parameters()), **dict(model.model.named_buffers())}
    ones = [
        key
        for key, value in parameters.items()
        if ("norm" in key or "scal" in key) and "vision" not in key and "embed_scale" not in key
        if bool((value == 1).all())
    ]

    assert ones == []
    for mine, theirs in zip(model.model.encoder.language_model.layers, model.model.decoder.layers, strict=True):
        assert mine.layer_scalar != theirs.layer_scalar


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    weights = [
        write_checkpoint(tmp_path / str(index), "odd_b", seed).joinpath("model.safetensors").read_bytes()
        for index, seed in enumerate((1, 1, 2))
    ]

    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    from dgemma_build.random_checkpoint import write_safetensors

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    write_safetensors(tmp_path / "x.safetensors", {"x": values}, "bfloat16")

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize("name", ["odd_a", "odd_b"])
def test_runs_are_not_degenerate(name: str, oracle: Callable[[str], Model]) -> None:
    model = oracle(name)
    steps, entropies = [], []
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, model.config.text_config.vocab_size, 11)
        run = trace_generation(
            model, prompt.tolist(), seed, CanvasNoise, max_new_tokens=3 * model.config.canvas_length, eos_token_id=None
        )
        steps += [len(canvas.steps) for canvas in run.canvases]
        entropies += [step.entropies for canvas in run.canvases for step in canvas.steps]
    limit = SHAPES[name].generation["max_denoising_steps"]

    assert min(steps) < limit, "no canvas stopped by confidence"
    assert max(steps) == limit or len(set(steps)) > 3
    spread = np.concatenate(entropies)
    assert np.quantile(spread, 0.1) < 0.01 < 0.5 < np.quantile(spread, 0.9)


@pytest.mark.parametrize("vocab_size", [211, 307, 32_768])
def test_every_id_decodes(vocab_size: int) -> None:
    tokenizer: Tokenizer = build_plain_tokenizer(vocab_size)

    assert tokenizer.get_vocab_size() == vocab_size
    ids = tokenizer.encode("Hi you\n<turn|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Hi you\n<turn|>"
    assert tokenizer.decode([vocab_size - 1]).strip()
